"""Metrics of multi-scene videos on features: pure functions of numpy arrays, float64 throughout.

A scene has one feature, of its video; a caption has one feature in the same space; each frame has
a feature in a space of its own. Every consistency is a mean cosine, as in the columns of Mask²DiT's
table: visual between scenes, semantic between a scene and its caption, sequence the mean of both.
A consistency may be high only because the video has no cuts, so the scores of cuts.py stand beside
it wherever it is printed.

To add a metric, write a function here and give it a row in METRICS, at the end of this file.
`evaluate` then computes the metric, and writes its mean and interval to evaluation.json and
evaluation.md.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# Cosines that differ by less are equal: the rounding of a matrix product differs between entries.
_TIE = 1e-12


def unit(features) -> np.ndarray:
    """Scales features to length 1.

    Args:
      features: [..., D].

    Returns:
      float64 [..., D].

    Raises:
      ValueError: if a feature is zero or not finite.
    """
    features = np.asarray(features, np.float64)
    length = np.linalg.norm(features, axis=-1, keepdims=True)
    if not np.isfinite(length).all() or not length.all():
        raise ValueError('A feature is zero or not finite: it has no direction to compare.')
    return features / length


def cosines(a, b) -> np.ndarray:
    """Cosine of every row of a [N, D] with every row of b [K, D], float64 [N, K]."""
    return unit(a) @ unit(b).T


def visual_consistency(scenes, pairs: str = 'all') -> float:
    """Mean cosine between the features of scenes: the visual consistency of Mask²DiT.

    Args:
      scenes: features [S, D].
      pairs: 'all' compares every pair of scenes, 'adjacent' only neighbours. The paper does not say
        which of them it compares.

    Raises:
      ValueError: for fewer than two scenes.
    """
    num_scenes = len(scenes)
    if num_scenes < 2:
        raise ValueError(f'{num_scenes} scene(s) have no pair to compare: give at least two.')

    indices = {
        'all': np.triu_indices(num_scenes, 1),
        'adjacent': (np.arange(num_scenes - 1), np.arange(1, num_scenes)),
    }
    return float(cosines(scenes, scenes)[indices[pairs]].mean())


def semantic_consistency(scenes, captions) -> float:
    """Mean cosine between a scene and its own caption: the semantic consistency of Mask²DiT.

    Args:
      scenes: features [S, D].
      captions: features [S, D].

    Raises:
      ValueError: if there is not one caption per scene.
    """
    return float(caption_cosines(scenes, captions).diagonal().mean())


def sequence_consistency(visual: float, semantic: float) -> float:
    """Mean of visual and semantic consistency, which holds in every row of Mask²DiT's table."""
    return (visual + semantic) / 2


def caption_cosines(scenes, captions) -> np.ndarray:
    """Confusion matrix: the cosine of every scene with every caption of the story.

    Args:
      scenes: features [S, D].
      captions: features [S, D].

    Returns:
      float64 [S, S]; a row per scene, a column per caption.

    Raises:
      ValueError: if there is not one caption per scene.
    """
    if np.shape(scenes) != np.shape(captions):
        raise ValueError(
            f'Scenes have features {np.shape(scenes)}, captions {np.shape(captions)}: give one '
            'caption per scene, in the same space.'
        )
    return cosines(scenes, captions)


def caption_matches(confusion) -> np.ndarray:
    """Tells for every scene whether its own caption is the best one of the story.

    Args:
      confusion: [S, S] of `caption_cosines`.

    Returns:
      float64 [S]: 1 or 0, or 1 / k where the own caption ties with k - 1 others for the best.
      Scenes that show nothing of their captions therefore have 1 / S on average.
    """
    is_best = confusion >= confusion.max(1, keepdims=True) - _TIE  # [S, S]
    return is_best.diagonal() / is_best.sum(1)


def caption_match_rate(confusion) -> float:
    """Mean of `caption_matches` over the scenes."""
    return float(caption_matches(confusion).mean())


def caption_margin(confusion) -> float:
    """Mean cosine with the own caption minus the mean cosine with the story's other captions.

    Args:
      confusion: [S, S] of `caption_cosines`.
    """
    is_own = np.eye(len(confusion), dtype=bool)
    return float(confusion[is_own].mean() - confusion[~is_own].mean())


def subject_within(scenes: Sequence) -> float:
    """Subject consistency of VBench (Huang et al. 2024) within scenes, averaged over scenes.

    Within a scene, every frame but the first is compared with the first frame and with the frame
    before it, and both cosines are averaged. VBench takes the features of DINO and counts a
    negative cosine as zero; here it stays negative.

    Args:
      scenes: frame features [F, E] of every scene.

    Raises:
      ValueError: for a scene of one frame.
    """
    if any(len(frames) < 2 for frames in scenes):
        raise ValueError(
            'A scene of one frame has no frames to compare: give features of at least two.'
        )

    per_scene = []
    for features in scenes:
        frames = unit(features)  # [F, E]
        with_first = frames[1:] @ frames[0]  # [F - 1]
        with_previous = (frames[1:] * frames[:-1]).sum(1)  # [F - 1]
        per_scene.append((with_first.mean() + with_previous.mean()) / 2)
    return float(np.mean(per_scene))


def subject_between(scenes: Sequence) -> float:
    """Mean cosine between the frames of two scenes, over all pairs of scenes.

    Args:
      scenes: frame features [F, E] of every scene.
    """
    # The product of two means is the mean over all pairs of frames.
    means = np.stack([unit(frames).mean(0) for frames in scenes])  # [S, E]
    return float((means @ means.T)[np.triu_indices(len(scenes), 1)].mean())


def bootstrap(
    values, seed: int, *, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float] | None:
    """Percentile bootstrap interval (Efron 1979) of the mean.

    Args:
      values: [N].
      seed: of the draws, with replacement, from values.
      resamples: number of draws of N values.
      level: probability that the interval should have.

    Returns:
      Lower and upper end; None for fewer than two values, which have no interval.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return None

    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(values), size=(resamples, len(values)))
    means = values[drawn].mean(1)  # [resamples]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Metric(NamedTuple):
    """A row of METRICS.

    Attributes:
      function: computes the metric: a number, or an array that evaluation.json holds as lists.
      takes: names of the function's arguments. Each is the name of a metric in a row above, or of
        features of the video: 'scenes' [S, D], 'captions' [S, D], 'frames' (per scene [F, E]).
        Where one of them does not exist, the metric is left out.
    """

    function: Callable
    takes: tuple[str, ...]


# The metrics of a video, by their names in evaluation.json. A new metric gets its row here;
# report_table.py prints the metric under this name, or under a label if it has one there.
METRICS = {
    'visual': Metric(visual_consistency, ('scenes',)),
    'visual_adjacent': Metric(functools.partial(visual_consistency, pairs='adjacent'), ('scenes',)),
    'confusion': Metric(caption_cosines, ('scenes', 'captions')),
    'semantic': Metric(semantic_consistency, ('scenes', 'captions')),
    'matches': Metric(caption_match_rate, ('confusion',)),
    'margin': Metric(caption_margin, ('confusion',)),
    'sequence': Metric(sequence_consistency, ('visual', 'semantic')),
    'sequence_adjacent': Metric(sequence_consistency, ('visual_adjacent', 'semantic')),
    'subject_within': Metric(subject_within, ('frames',)),
    'subject_between': Metric(subject_between, ('frames',)),
}
