"""Timing of what is compared in one run."""

import time

import jax
import numpy as np


def seconds(compiled, args) -> float:
    """Time of one run."""
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    return time.perf_counter() - start


def spread(values) -> dict:
    """Median and range of times in milliseconds."""
    return {'ms': float(np.median(values)), 'spread ms': f'{min(values):.4g}...{max(values):.4g}'}
