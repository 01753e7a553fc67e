"""Metrics of multi-scene video, on features and pixels: pure functions of numpy arrays, float64
throughout.

A scene has one feature (of its video), a caption one in the same space, a frame one of its own
space. All consistency is mean cosine, as in the paper's table: visual between scenes, semantic
between a scene and its caption, sequence the mean of both. High consistency may only mean that
nothing was cut, so that `cut_scores` belongs beside every such number.
"""

from collections.abc import Sequence

import numpy as np

LEAST_CHANGE = (
    0.5 / 255
)  # mean change between frames that counts; video codecs make smaller ones by themselves
_TIE = (
    1e-12  # cosines this close are equal: rounding differs between positions in one matrix product
)


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
    first, second = {
        'all': np.triu_indices(len(scenes), 1),
        'adjacent': (np.arange(len(scenes) - 1), np.arange(1, len(scenes))),
    }[pairs]
    return float(cosines(scenes, scenes)[first, second].mean())


def semantic_consistency(scenes, captions) -> float:
    """Mean cosine of scenes' video features [S, D] with their own captions' text features [S, D]
    (Mask²DiT)."""
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
        raise ValueError(
            f'Scenes have features {np.shape(scenes)}, captions {np.shape(captions)}: give one caption '
            'per scene, in the same space.'
        )
    return cosines(scenes, captions)


def caption_matches(confusion) -> np.ndarray:
    """Per scene [S], whether its own caption is the best of the story's: 1 or 0, or 1 / k among k
    that tie.

    Scenes that say nothing of their captions get 1 / S on average.
    """
    best = confusion >= confusion.max(1, keepdims=True) - _TIE
    return best.diagonal() / best.sum(1)


def caption_margin(confusion) -> float:
    """Mean cosine with the own caption, less the mean with the story's other captions."""
    own, others = np.eye(len(confusion), dtype=bool), ~np.eye(len(confusion), dtype=bool)
    return float(confusion[own].mean() - confusion[others].mean())


def subject_within(scenes: Sequence) -> float:
    """Subject consistency within scenes (VBench, Huang et al. 2024), mean over scenes of frame
    features [F, E].

    In a scene, the mean over frames after the first of their cosines with the first frame and with
    the one before, averaged. VBench takes DINO features, and negative cosines as zero, which we do
    not.

    Raises:
      ValueError: for a scene of one frame.
    """
    if any(len(frames) < 2 for frames in scenes):
        raise ValueError(
            'A scene of one frame has no frames to compare: give features of at least two.'
        )
    units = [unit(frames) for frames in scenes]
    return float(
        np.mean([((f[1:] @ f[0]).mean() + (f[1:] * f[:-1]).sum(1).mean()) / 2 for f in units])
    )


def subject_between(scenes: Sequence) -> float:
    """Mean cosine between frames of two scenes, over all pairs of scenes; frame features [F, E] per
    scene."""
    means = np.stack(
        [unit(frames).mean(0) for frames in scenes]
    )  # products of means are means of products
    return float((means @ means.T)[np.triu_indices(len(scenes), 1)].mean())


def bootstrap(
    values, seed: int, *, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float] | None:
    """Percentile bootstrap interval (Efron 1979) of the mean of values [N], drawn anew with
    replacement.

    None for fewer than two values, of which nothing can be said.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
