"""Who may attend to whom (Mask²DiT, section 3.2): one predicate, from which every mask is made."""

import itertools

import numpy as np

from mask2dit_jax.layout import TEXT, VIDEO, SceneLayout, Segment, token_scenes

PATTERNS = ('dual', 'full', 'isolated', 'causal')
# The pattern of training by teacher forcing: see dit.DiT.
FORCED = 'forced'


def may_attend(pattern: str, q_scene, q_kind, k_scene, k_kind):
    """The attention predicate: may this query see this key?

    The patterns are
      `dual`: the paper's mask. The two are of the same scene, or both are video.
      `full`: everything sees everything.
      `isolated`: the two are of the same scene.
      `causal`: as `dual`, but video does not see video of later scenes.
      `forced`: `causal` for all scenes at once. Of every scene there are two copies, the clean one
        with the number 2·i and the noisy one with 2·i + 1. A copy sees itself, and its video sees
        the clean video of earlier scenes.

    Of video of kind TAIL other scenes see nothing, but under `full`.

    Only comparisons, bits and boolean operators are used, so that numpy, jax and the computable
    masks of kernels can evaluate the predicate.

    Args:
      pattern: one of PATTERNS, or FORCED.
      q_scene, k_scene: scene of the query and of the key; integers that broadcast.
      q_kind, k_kind: kinds of their segments, layout.TEXT, VIDEO or TAIL; integers that broadcast.

    Returns:
      Boolean, broadcast.

    Raises:
      ValueError: for an unknown pattern.
    """
    same_scene = q_scene == k_scene
    if pattern == 'isolated':
        return same_scene
    if pattern == 'full':
        return same_scene | (q_scene != k_scene)  # always true, in the shape that is asked for

    both_video = (q_kind < TEXT) & (k_kind == VIDEO)
    if pattern == 'dual':
        return same_scene | both_video
    if pattern == 'causal':
        return same_scene | (both_video & (k_scene <= q_scene))
    if pattern == FORCED:
        k_is_clean = (k_scene & 1) < 1
        return same_scene | (both_video & k_is_clean & (k_scene < q_scene - (q_scene & 1)))
    raise ValueError(f'Unknown attention pattern {pattern!r}: use one of {", ".join(PATTERNS)}.')


def dense_mask(layout: SceneLayout, pattern: str) -> np.ndarray:
    """The whole mask, bool [queries, keys], true where query i may see key j.

    It is quadratic: for tests, pictures and tiny models.
    """
    q_scene, q_kind = token_scenes(layout.segments)  # [queries] each
    k_scene, k_kind = token_scenes(layout.key_segments)  # [keys] each
    return may_attend(pattern, q_scene[:, None], q_kind[:, None], k_scene[None], k_kind[None])


def key_ranges(layout: SceneLayout, pattern: str, queries: Segment) -> list[tuple[int, int]]:
    """Contiguous ranges of keys that the queries of one segment may see, read off the predicate.

    Args:
      layout: the sequence.
      pattern: one of PATTERNS.
      queries: the segment of the queries. The predicate depends on nothing finer.

    Returns:
      At most a few disjoint (start, stop) ranges in ascending order.
    """
    ranges: list[tuple[int, int]] = []
    for keys in layout.key_segments:
        if not may_attend(pattern, queries.scene, queries.kind, keys.scene, keys.kind):
            continue

        if ranges and ranges[-1][1] == keys.start:
            start, _ = ranges.pop()
            ranges.append((start, keys.stop))
        else:
            ranges.append((keys.start, keys.stop))
    return ranges


def segment_pairs(layout: SceneLayout, pattern: str) -> int:
    """Number of (query, key) pairs that the pattern lets see each other."""
    pairs = 0
    for queries, keys in itertools.product(layout.segments, layout.key_segments):
        if may_attend(pattern, queries.scene, queries.kind, keys.scene, keys.kind):
            pairs += queries.length * keys.length
    return pairs
