"""The reference: attention over an explicit boolean mask."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mask2dit_jax.attention import masks
from mask2dit_jax.layout import SceneLayout


def dense(q, k, v, layout: SceneLayout, pattern: str):
    """Reference: softmax over an explicit boolean mask. Memory is quadratic in L."""
    mask = masks.dense_mask(layout, pattern)
    scores = (
        jnp.einsum('bqnd,bknd->bnqk', q, k, preferred_element_type=jnp.float32)
        * q.shape[-1] ** -0.5
    )
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    out = jnp.einsum(
        'bnqk,bknd->bqnd', weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return checkpoint_name(out.astype(q.dtype), 'attention')
