"""How sharp the cuts between scenes are."""

import itertools
from collections.abc import Sequence

import numpy as np

from mask2dit_jax.evaluation import metrics


def transitions(pixels) -> np.ndarray:
    """Mean absolute change of pixels from each frame to the next, in [0, 1], float64 [F - 1]; uint8
    [F, H, W, 3]."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8:
        raise ValueError(f'Pixels have dtype {pixels.dtype}: pass uint8.')
    change = [
        np.abs(b.astype(np.int16) - a).mean(dtype=np.float64) / 255
        for a, b in itertools.pairwise(pixels)
    ]
    return np.array(change)


def cut_scores(change, frames: Sequence[int]) -> dict[str, np.ndarray]:
    """How sharp the cuts between scenes are, and whether the sharpest ones are where the layout
    says.

    Args:
      change: [F - 1] of `transitions`; what is below LEAST_CHANGE counts as none.
      frames: per scene.

    Returns:
      'sharpness' [S - 1]: (d - m) / (d + m) with d the change at the border and m the mean change
      inside of the two scenes it divides. 1 is a hard cut between still scenes, 0 no more change
      than inside, or none at all. 'placed' [S - 1]: 1 where the border is among the video's S - 1
      largest changes, else 0; a border without a change, or one that does not stand out from inside
      changes, is not.

    Raises:
      ValueError: if change and frames do not fit, or two neighbouring scenes have a frame each.
    """
    if len(change) + 1 != sum(frames) or min(frames) < 1:
        raise ValueError(
            f'A video of {len(change) + 1} frames does not have scenes of {tuple(frames)} frames.'
        )
    change = np.where(np.asarray(change) < metrics.LEAST_CHANGE, 0, change)
    ends = np.cumsum(frames)
    borders = ends[:-1] - 1
    inside = [change[end - n : end - 1] for n, end in zip(frames, ends)]
    if any(len(a) + len(b) == 0 for a, b in itertools.pairwise(inside)):
        raise ValueError(
            'Neighbouring scenes of one frame each have no inside to compare their cut with.'
        )
    at, within = (
        change[borders],
        np.array([np.concatenate(pair).mean() for pair in itertools.pairwise(inside)]),
    )
    total = at + within
    sharpness = np.divide(at - within, total, out=np.zeros_like(total), where=total > 0)
    rivals = (np.concatenate(inside) >= at[:, None]).sum(1)
    return {'sharpness': sharpness, 'placed': ((at > 0) & (rivals < len(borders))).astype(float)}
