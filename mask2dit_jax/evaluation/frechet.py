"""The Fréchet distance between videos."""

import dataclasses
import functools

import numpy as np

from mask2dit_jax.evaluation import videos as videos_lib


def frechet_video_distance(videos: list[videos_lib.Video], features: dict) -> dict | None:
    """Fréchet distance between all NAME/video and the reference, with the counts that it rests on;
    None without them.

    Raises:
      ValueError: if there is a reference but not a feature of every video, or too few of either.
    """
    if 'reference' not in features:
        return None
    lost = [item.name for item in videos if f'{item.name}/video' not in features]
    if lost:
        raise ValueError(f'{lost[0]}/video is missing from the features, which have a reference.')
    parts = [moments(np.atleast_2d(features[f'{item.name}/video'])) for item in videos]
    made, real = functools.reduce(merge, parts), moments(features['reference'])
    return {
        'distance': frechet_distance(made, real),
        'videos': made.count,
        'references': real.count,
        'size': len(real.mean),
    }


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of features, as sums that can be merged.

    Attributes:
      count: features seen.
      mean: float64 [D].
      scatter: float64 [D, D], sum of outer products of deviations from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased, [D, D]."""
        return self.scatter / (self.count - 1)


def moments(features) -> Moments:
    """Moments of features [N, D], N >= 1."""
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    return Moments(len(features), mean, (features - mean).T @ (features - mean))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets together (Chan, Golub & LeVeque 1983), without the cancellation of sums
    of squares."""
    count, shift = a.count + b.count, b.mean - a.mean
    return Moments(
        count,
        a.mean + shift * (b.count / count),
        a.scatter + b.scatter + np.outer(shift, shift) * (a.count * b.count / count),
    )


def _root(covariance) -> np.ndarray:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982): FVD on features of videos.

    |mean_a - mean_b|² + tr(A + B - 2 (A B)^(1/2)). The eigenvalues of (A B)^(1/2) are the singular values of
    A^(1/2) B^(1/2), which also serves covariances without full rank, as those of few samples are.

    Raises:
      ValueError: for fewer than two features, or other sizes of features.
    """
    if min(a.count, b.count) < 2 or a.mean.shape != b.mean.shape:
        raise ValueError(
            f'{a.count} features of size {len(a.mean)} and {b.count} of size {len(b.mean)} have no '
            'Fréchet distance: give two or more of either, of one encoder.'
        )
    shared = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    shift = a.mean - b.mean
    return max(
        0.0, float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared)
    )
