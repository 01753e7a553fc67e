"""Scores of the cuts between scenes: how sharp they are, and how far from where they belong."""

import itertools
from collections.abc import Sequence

import numpy as np

# Smaller mean changes between frames count as none: video codecs make them in still scenes too.
LEAST_CHANGE = 0.5 / 255


def transitions(pixels) -> np.ndarray:
    """Mean absolute change of the pixels from each frame to the next.

    Args:
      pixels: uint8 [F, H, W, 3].

    Returns:
      float64 [F - 1], in [0, 1].

    Raises:
      ValueError: if the pixels are not uint8.
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8:
        raise ValueError(f'Pixels have dtype {pixels.dtype}: pass uint8.')

    changes = []
    for frame, following in itertools.pairwise(pixels):
        difference = np.abs(following.astype(np.int16) - frame)  # uint8 alone would wrap around
        changes.append(difference.mean(dtype=np.float64) / 255)
    return np.array(changes)


def cut_scores(change, frames: Sequence[int]) -> dict[str, np.ndarray]:
    """Scores the cuts at the borders between scenes.

    Args:
      change: [F - 1] of `transitions`; values below LEAST_CHANGE count as zero.
      frames: number of frames of each scene.

    Returns:
      'sharpness' [S - 1]: (d - m) / (d + m), where d is the change at the border and m the mean
        change inside the two scenes on either side. It is 1 for a hard cut between still scenes,
        and 0 where the border changes as much as the scenes do, or nothing changes at all.
      'placed' [S - 1]: 1 where the border is among the S - 1 largest changes of the video, else 0.
        A border without a change, or one that changes no more than the inside of scenes, is 0.
      'transition_deviation' [S - 1]: frames from the border to the cut, which is the largest change
        among those that are nearer to this border than to any other. Of changes that are equal it
        is the farthest one: where no cut is seen, the deviation is as large as it can be.

    Raises:
      ValueError: if change and frames do not fit, or two neighbouring scenes have one frame each.
    """
    if len(change) + 1 != sum(frames) or min(frames) < 1:
        raise ValueError(
            f'A video of {len(change) + 1} frames does not have scenes of {tuple(frames)} frames.'
        )
    change = np.where(np.asarray(change) < LEAST_CHANGE, 0, change)

    # Every change is either at the border between two scenes or inside a scene.
    ends = np.cumsum(frames)
    at_border = change[ends[:-1] - 1]  # [S - 1]
    inside = [change[end - length : end - 1] for length, end in zip(frames, ends)]

    # Each border is compared with the two scenes that it divides.
    inside_mean = []
    for before, after in itertools.pairwise(inside):
        neighbours = np.concatenate([before, after])
        if len(neighbours) == 0:
            raise ValueError(
                'Neighbouring scenes of one frame each have no inside to compare their cut with.'
            )
        inside_mean.append(neighbours.mean())
    inside_mean = np.array(inside_mean)  # [S - 1]

    total = at_border + inside_mean
    sharpness = np.divide(at_border - inside_mean, total, out=np.zeros_like(total), where=total > 0)

    # A border has its place if fewer than S - 1 changes inside scenes are as large as it.
    rivals = (np.concatenate(inside) >= at_border[:, None]).sum(1)  # [S - 1]
    placed = (at_border > 0) & (rivals < len(at_border))

    distance = np.abs(np.arange(len(change)) - (ends[:-1, None] - 1))  # [S - 1, F - 1]
    is_near = distance == distance.min(0)
    largest = np.where(is_near, change, -1).max(1, keepdims=True)  # [S - 1, 1]
    deviation = np.where(is_near & (change == largest), distance, 0).max(1)
    return {
        'sharpness': sharpness,
        'placed': placed.astype(float),
        'transition_deviation': deviation.astype(float),
    }
