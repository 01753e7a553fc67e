"""Metrics of multi-scene video, on features and pixels: pure functions of numpy arrays, float64 throughout.

A scene has one feature (of its video), a caption one in the same space, a frame one of its own space. All consistency
is mean cosine, as in the paper's table: visual between scenes, semantic between a scene and its caption, sequence the
mean of both. High consistency may only mean that nothing was cut, so that `cut_scores` belongs beside every such
number.
"""
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

LEAST_CHANGE = 0.5 / 255  # mean change between frames that counts; video codecs make smaller ones by themselves
_TIE = 1e-12  # cosines this close are equal: rounding differs between positions in one matrix product


def unit(features) -> np.ndarray:
    """Features [..., D] scaled to length 1, float64.

    Raises:
      ValueError: if one is not finite or zero.
    """
    features = np.asarray(features, np.float64)
    length = np.linalg.norm(features, axis=-1, keepdims=True)
    if not np.isfinite(length).all() or not length.all():
        raise ValueError('A feature is zero or not finite: it has no direction to compare.')
    return features / length


def cosines(a, b) -> np.ndarray:
    """Cosine of every row of [N, D] with every row of [M, D], float64 [N, M]."""
    return unit(a) @ unit(b).T


def visual_consistency(scenes, pairs: str = 'all') -> float:
    """Mean cosine between the video features [S, D] of scenes (Mask²DiT's visual consistency).

    The paper does not say which pairs it takes: 'all', or 'adjacent'.

    Raises:
      ValueError: for fewer than two scenes.
    """
    if len(scenes) < 2:
        raise ValueError(f'{len(scenes)} scene(s) have no pair to compare: give at least two.')
    first, second = {'all': np.triu_indices(len(scenes), 1),
                     'adjacent': (np.arange(len(scenes) - 1), np.arange(1, len(scenes)))}[pairs]
    return float(cosines(scenes, scenes)[first, second].mean())


def semantic_consistency(scenes, captions) -> float:
    """Mean cosine of scenes' video features [S, D] with their own captions' text features [S, D] (Mask²DiT)."""
    return float(caption_cosines(scenes, captions).diagonal().mean())


def sequence_consistency(visual: float, semantic: float) -> float:
    """Mean of visual and semantic consistency; so it is in every row of Mask²DiT's table."""
    return (visual + semantic) / 2


def caption_cosines(scenes, captions) -> np.ndarray:
    """Confusion matrix [S, S]: cosine of scene i [S, D] with caption j [S, D].

    Raises:
      ValueError: if there is not one caption per scene.
    """
    if np.shape(scenes) != np.shape(captions):
        raise ValueError(f'Scenes have features {np.shape(scenes)}, captions {np.shape(captions)}: give one caption '
                         'per scene, in the same space.')
    return cosines(scenes, captions)


def caption_matches(confusion) -> np.ndarray:
    """Per scene [S], whether its own caption is the best of the story's: 1 or 0, or 1 / k among k that tie.

    Scenes that say nothing of their captions get 1 / S on average.
    """
    best = confusion >= confusion.max(1, keepdims=True) - _TIE
    return best.diagonal() / best.sum(1)


def caption_margin(confusion) -> float:
    """Mean cosine with the own caption, less the mean with the story's other captions."""
    own, others = np.eye(len(confusion), dtype=bool), ~np.eye(len(confusion), dtype=bool)
    return float(confusion[own].mean() - confusion[others].mean())


def subject_within(scenes: Sequence) -> float:
    """Subject consistency within scenes (VBench, Huang et al. 2024), mean over scenes of frame features [F, E].

    In a scene, the mean over frames after the first of their cosines with the first frame and with the one before,
    averaged. VBench takes DINO features, and negative cosines as zero, which we do not.

    Raises:
      ValueError: for a scene of one frame.
    """
    if any(len(frames) < 2 for frames in scenes):
        raise ValueError('A scene of one frame has no frames to compare: give features of at least two.')
    units = [unit(frames) for frames in scenes]
    return float(np.mean([((f[1:] @ f[0]).mean() + (f[1:] * f[:-1]).sum(1).mean()) / 2 for f in units]))


def subject_between(scenes: Sequence) -> float:
    """Mean cosine between frames of two scenes, over all pairs of scenes; frame features [F, E] per scene."""
    means = np.stack([unit(frames).mean(0) for frames in scenes])  # products of means are means of products
    return float((means @ means.T)[np.triu_indices(len(scenes), 1)].mean())


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
    """Moments of both sets together (Chan, Golub & LeVeque 1983), without the cancellation of sums of squares."""
    count, shift = a.count + b.count, b.mean - a.mean
    return Moments(count, a.mean + shift * (b.count / count),
                   a.scatter + b.scatter + np.outer(shift, shift) * (a.count * b.count / count))


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
        raise ValueError(f'{a.count} features of size {len(a.mean)} and {b.count} of size {len(b.mean)} have no '
                         'Fréchet distance: give two or more of either, of one encoder.')
    shared = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    shift = a.mean - b.mean
    return max(0.0, float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared))


def transitions(pixels) -> np.ndarray:
    """Mean absolute change of pixels from each frame to the next, in [0, 1], float64 [F - 1]; uint8 [F, H, W, 3]."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8:
        raise ValueError(f'Pixels have dtype {pixels.dtype}: pass uint8.')
    change = [np.abs(b.astype(np.int16) - a).mean(dtype=np.float64) / 255 for a, b in itertools.pairwise(pixels)]
    return np.array(change)


def cut_scores(change, frames: Sequence[int]) -> dict[str, np.ndarray]:
    """How sharp the cuts between scenes are, and whether the sharpest ones are where the layout says.

    Args:
      change: [F - 1] of `transitions`; what is below LEAST_CHANGE counts as none.
      frames: per scene.

    Returns:
      'sharpness' [S - 1]: (d - m) / (d + m) with d the change at the border and m the mean change inside of the two
      scenes it divides. 1 is a hard cut between still scenes, 0 no more change than inside, or none at all.
      'placed' [S - 1]: 1 where the border is among the video's S - 1 largest changes, else 0; a border without a
      change, or one that does not stand out from inside changes, is not.

    Raises:
      ValueError: if change and frames do not fit, or two neighbouring scenes have a frame each.
    """
    if len(change) + 1 != sum(frames) or min(frames) < 1:
        raise ValueError(f'A video of {len(change) + 1} frames does not have scenes of {tuple(frames)} frames.')
    change = np.where(np.asarray(change) < LEAST_CHANGE, 0, change)
    ends = np.cumsum(frames)
    borders = ends[:-1] - 1
    inside = [change[end - n:end - 1] for n, end in zip(frames, ends)]
    if any(len(a) + len(b) == 0 for a, b in itertools.pairwise(inside)):
        raise ValueError('Neighbouring scenes of one frame each have no inside to compare their cut with.')
    at, within = change[borders], np.array([np.concatenate(pair).mean() for pair in itertools.pairwise(inside)])
    total = at + within
    sharpness = np.divide(at - within, total, out=np.zeros_like(total), where=total > 0)
    rivals = (np.concatenate(inside) >= at[:, None]).sum(1)
    return {'sharpness': sharpness, 'placed': ((at > 0) & (rivals < len(borders))).astype(float)}


def bootstrap(values, seed: int, *, resamples: int = 2000, level: float = 0.95) -> tuple[float, float] | None:
    """Percentile bootstrap interval (Efron 1979) of the mean of values [N], drawn anew with replacement.

    None for fewer than two values, of which nothing can be said.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
