"""Attention under a scene pattern by the flash kernels of a GPU (cuDNN)."""

import jax
import jax.numpy as jnp

from mask2dit_jax.attention import masks
from mask2dit_jax.layout import SceneLayout


def flash(q, k, v, layout: SceneLayout, pattern: str, implementation: str = 'cudnn'):
    """Full flash attention of each caption's and each scene's queries over the keys they may see,
    put side by side.

    No statistics are merged, so that gradients are those of jax.nn.dot_product_attention, whatever
    implementation.
    """
    outputs = []
    for is_text in (True, False):
        for scene in range(layout.num_scenes):
            start, stop = layout.text_range(scene) if is_text else layout.video_range(scene)
            ranges = masks.key_ranges(layout, pattern, scene, is_text)
            keys, values = (jnp.concatenate([x[:, a:b] for a, b in ranges], axis=1) for x in (k, v))
            outputs.append(
                jax.nn.dot_product_attention(
                    q[:, start:stop], keys, values, implementation=implementation
                )
            )
    return jnp.concatenate(outputs, axis=1)
