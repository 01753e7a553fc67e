"""Attention under a scene pattern (Mask²DiT, section 3.2) by the flash kernels of a GPU (cuDNN)."""

import jax
import jax.numpy as jnp

from mask2dit_jax.attention import masks
from mask2dit_jax.layout import SceneLayout


def flash(q, k, v, layout: SceneLayout, pattern: str, implementation: str = 'cudnn'):
    """Full flash attention of each segment's queries over the keys that they may see.

    Every query is answered by one call of jax.nn.dot_product_attention, and no statistics of
    several calls are merged: merging by log-sum-exp would give silently wrong gradients there.

    Args:
      q, k, v, layout, pattern: as in attend.attend.
      implementation: as in jax.nn.dot_product_attention; tests use 'xla', which runs anywhere.

    Returns:
      [B, L, N, D] in q's dtype.
    """
    outputs = []
    for queries in layout.segments:
        ranges = masks.key_ranges(layout, pattern, queries)
        keys = jnp.concatenate([k[:, start:stop] for start, stop in ranges], axis=1)
        values = jnp.concatenate([v[:, start:stop] for start, stop in ranges], axis=1)
        out = jax.nn.dot_product_attention(
            q[:, queries.start : queries.stop], keys, values, implementation=implementation
        )
        outputs.append(out)
    return jnp.concatenate(outputs, axis=1)
