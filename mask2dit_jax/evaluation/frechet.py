"""The Fréchet video distance (FVD) between two sets of videos.

`frechet_video_distance` compares the features of two sets of videos (Unterthiner et al. 2018): it
fits a Gaussian to either set, with `moments`, and takes the distance between the two Gaussians,
`frechet_distance` (Dowson & Landau 1982).
"""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of features, as sums that can be merged.

    Attributes:
      count: number of features.
      mean: float64 [D].
      scatter: float64 [D, D], sum of the outer products of deviations from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance, [D, D]."""
        return self.scatter / (self.count - 1)


def moments(features) -> Moments:
    """Moments of features [N, D], N >= 1."""
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    scatter = (features - mean).T @ (features - mean)
    return Moments(len(features), mean, scatter)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of two sets together (Chan, Golub & LeVeque 1983).

    Sums of squares would lose their digits where the mean is far from zero; these sums do not.
    """
    count = a.count + b.count
    shift = b.mean - a.mean
    mean = a.mean + shift * (b.count / count)
    between = np.outer(shift, shift) * (a.count * b.count / count)
    return Moments(count, mean, a.scatter + b.scatter + between)


def _square_root(covariance) -> np.ndarray:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance between two Gaussians (Dowson & Landau 1982).

    |mean_a - mean_b|² + tr(A + B - 2 (A B)^(1/2)), with the covariances A and B. The eigenvalues of
    (A B)^(1/2) are the singular values of A^(1/2) B^(1/2), which also exist for covariances without
    full rank, such as those of few samples.

    Raises:
      ValueError: if either set has fewer than two features, or their sizes differ.
    """
    if min(a.count, b.count) < 2 or a.mean.shape != b.mean.shape:
        raise ValueError(
            f'{a.count} features of size {len(a.mean)} and {b.count} of size {len(b.mean)} have no '
            'Fréchet distance: give two or more of either, of one encoder.'
        )

    roots = _square_root(a.covariance) @ _square_root(b.covariance)
    shared = np.linalg.svd(roots, compute_uv=False).sum()
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return max(0.0, float(distance))  # rounding can turn the zero of equal sets negative


def frechet_video_distance(generated: Iterable, reference) -> float:
    """Fréchet video distance (Unterthiner et al. 2018) between the features of two sets of videos.

    Args:
      generated: features of the generated videos in parts of any length, each [N, D]; `evaluate`
        passes one part per video.
      reference: features [R, D] of the reference videos.

    Raises:
      ValueError: if either set has fewer than two videos, or their features' sizes differ.
    """
    generated_moments = functools.reduce(merge, map(moments, generated))
    return frechet_distance(generated_moments, moments(reference))
