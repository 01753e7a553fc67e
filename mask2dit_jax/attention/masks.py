"""Who may attend to whom (Mask²DiT, section 3.2): one predicate, from which every mask is made."""

import itertools

import numpy as np

from mask2dit_jax.layout import SceneLayout, token_scenes

PATTERNS = ('dual', 'full', 'isolated', 'causal')


def may_attend(pattern: str, q_scene, q_is_text, k_scene, k_is_text):
    """The attention predicate: may this query see this key?

    `dual` is the paper's mask (same scene, or both video), `full` none at all, `isolated` same
    scene only, and `causal` is `dual` except that video sees no video of later scenes. Only
    comparisons and boolean operators are used, so that numpy, jax and kernels' computable masks can
    evaluate it. Arguments broadcast.

    Raises:
      ValueError: for an unknown pattern.
    """
    same = q_scene == k_scene
    if pattern == 'isolated':
        return same
    if pattern == 'full':
        return same | (q_scene != k_scene)
    both_video = (q_is_text < 1) & (k_is_text < 1)
    if pattern == 'dual':
        return same | both_video
    if pattern == 'causal':
        return same | (both_video & (k_scene <= q_scene))
    raise ValueError(f'Unknown attention pattern {pattern!r}: use one of {", ".join(PATTERNS)}.')


def dense_mask(layout: SceneLayout, pattern: str) -> np.ndarray:
    """The whole mask, bool [L, L], true where query i may see key j. Quadratic: for tests,
    pictures, tiny models."""
    scene, is_text = token_scenes(layout)
    return may_attend(pattern, scene[:, None], is_text[:, None], scene[None], is_text[None])


def key_ranges(
    layout: SceneLayout, pattern: str, scene: int, is_text: bool
) -> list[tuple[int, int]]:
    """Contiguous token ranges that the queries of one segment may see, read off the predicate.

    A segment is the caption or the video of one scene; the predicate depends on nothing finer.

    Returns:
      At most a few disjoint (start, stop) ranges in ascending order.
    """
    segments = [(s, True, layout.text_range(s)) for s in range(layout.num_scenes)]
    segments += [(s, False, layout.video_range(s)) for s in range(layout.num_scenes)]
    ranges: list[tuple[int, int]] = []
    for k_scene, k_is_text, (start, stop) in segments:
        if not may_attend(pattern, scene, is_text, k_scene, k_is_text):
            continue
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return ranges


def segment_pairs(layout: SceneLayout, pattern: str) -> int:
    """Number of (query, key) pairs that the pattern lets see each other."""
    segments = list(itertools.product(range(layout.num_scenes), (True, False)))
    size = {
        (s, text): np.diff(layout.text_range(s) if text else layout.video_range(s)).item()
        for s, text in segments
    }
    return sum(size[q] * size[k] for q in segments for k in segments if may_attend(pattern, *q, *k))
