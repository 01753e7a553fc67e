"""Classifier-free guidance."""

import numpy as np


def reference_dynamic_guidance(scale: float, t: int, num_steps: int) -> float:
    """The reference's `use_dynamic_cfg`: 1 + g·(1 - cos(pi·((N - t)/N)^5))/2 with the raw timestep
    t.

    It mixes timestep and step index, so that its values are erratic; kept only for comparing
    numbers.
    """
    return 1 + scale * (1 - np.cos(np.pi * ((num_steps - t) / num_steps) ** 5.0)) / 2
