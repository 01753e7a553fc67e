"""The reference: attention over an explicit boolean mask (Mask²DiT, section 3.2)."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mask2dit_jax.attention import masks
from mask2dit_jax.layout import SceneLayout, traced_token_scenes


def dense(q, k, v, layout: SceneLayout, pattern: str):
    """Softmax over an explicit boolean mask: the definition that the other backends must equal.

    Memory is quadratic in L.

    Args:
      q, k, v, layout, pattern: as in attend.attend.

    Returns:
      [B, L, N, D] in q's dtype.
    """
    # Computed in the program, of which a numpy mask would be a constant of L x L bytes.
    q_scene, q_kind = (x[:, None] for x in traced_token_scenes(layout.segments))  # [Q, 1] each
    k_scene, k_kind = traced_token_scenes(layout.key_segments)  # [K] each
    mask = masks.may_attend(pattern, q_scene, q_kind, k_scene[None], k_kind[None])

    scores = jnp.einsum('bqnd,bknd->bnqk', q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5  # [B, N, L, L]
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)

    weights = weights.astype(v.dtype)
    out = jnp.einsum('bnqk,bknd->bqnd', weights, v, preferred_element_type=jnp.float32)
    return checkpoint_name(out.astype(q.dtype), 'attention')
