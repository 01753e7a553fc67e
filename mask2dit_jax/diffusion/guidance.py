"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

import numpy as np


def classifier_free_guidance(negative, positive, scale):
    """Moves the prediction away from the negative caption, by `scale` (Ho & Salimans 2022, eq. 6).

    The paper writes (1 + w)·positive - w·negative; `scale` here is 1 + w, as in diffusers: 0 gives
    the negative prediction, 1 the positive one, and more goes beyond it.

    Args:
      negative: predicted v under the negative (usually empty) caption, [B, T, ...].
      positive: predicted v under the scene's own caption, [B, T, ...].
      scale: guidance scale, broadcastable to both.

    Returns:
      The guided v, [B, T, ...].
    """
    return negative + scale * (positive - negative)


def reference_dynamic_guidance(scale: float, t: int, num_steps: int) -> float:
    """Guidance scale of the reference's `use_dynamic_cfg` at one step.

    The formula is 1 + scale·(1 - cos(pi·((num_steps - t) / num_steps)^5)) / 2. The reference puts
    the raw timestep t (0...999), not the step's index, beside the number of steps, so the values
    are erratic. The sampler does not use it; it is here to compare numbers with the reference.

    Args:
      scale: the constant guidance scale.
      t: timestep of the step.
      num_steps: number of sampling steps.

    Returns:
      The scale at this step.
    """
    return 1 + scale * (1 - np.cos(np.pi * ((num_steps - t) / num_steps) ** 5.0)) / 2
