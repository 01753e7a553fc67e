"""Attention over the joint [text, video] sequence under a scene pattern (Mask²DiT, section 3.2).

One signature, `attend`; backends differ in how they compute, never in what. `dense` builds the mask and is the
definition; `decomposed` is plain XLA that never forms an L x L array and never repeats video keys or values.

What the backward pass needs of the result is named 'attention', so that rematerialization can keep or offload it.
"""
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mask2dit_jax import context_parallel, scenes, splash

# Queries per block of the decomposed backend: large enough for matmul efficiency, small enough that one block's
# scores (256 x L, float32, per head) stay far below the size of the activations.
QUERY_BLOCK = 256


def dense(q, k, v, layout: scenes.SceneLayout, pattern: str):
    """Reference: softmax over an explicit boolean mask. Memory is quadratic in L."""
    mask = scenes.dense_mask(layout, pattern)
    scores = jnp.einsum('bqnd,bknd->bnqk', q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    out = jnp.einsum('bnqk,bknd->bqnd', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return checkpoint_name(out.astype(q.dtype), 'attention')


def _block(q, pieces):
    """Exact attention of a block of queries over several pieces of keys, normalised jointly.

    Written without merging partial softmaxes by their log-sum-exp: autodiff of this form is exact.
    """
    scale = q.shape[-1] ** -0.5
    scores = [jnp.einsum('bqnd,bknd->bnqk', q, k, preferred_element_type=jnp.float32) * scale for k, _ in pieces]
    top = jnp.max(jnp.stack([s.max(-1) for s in scores]), axis=0)[..., None]  # [B, N, Q, 1]
    weights = [jnp.exp(s - jax.lax.stop_gradient(top)) for s in scores]
    total = sum(w.sum(-1) for w in weights)  # [B, N, Q]
    out = sum(jnp.einsum('bnqk,bknd->bqnd', (w / total[..., None]).astype(v.dtype), v,
                         preferred_element_type=jnp.float32) for w, (_, v) in zip(weights, pieces))
    return out.astype(q.dtype)


def _segment(q, pieces):
    """Runs `_block` over blocks of queries one after another, recomputing scores in the backward pass."""
    b, n_q, n, d = q.shape
    if n_q <= QUERY_BLOCK:
        return _block(q, pieces)
    count = -(-n_q // QUERY_BLOCK)
    q = jnp.pad(q, ((0, 0), (0, count * QUERY_BLOCK - n_q), (0, 0), (0, 0)))  # rows of zeros, cut off again below
    blocks = jnp.moveaxis(q.reshape(b, count, QUERY_BLOCK, n, d), 1, 0)
    out = jax.lax.map(jax.checkpoint(lambda block: _block(block, pieces)), blocks)
    return jnp.moveaxis(out, 0, 1).reshape(b, count * QUERY_BLOCK, n, d)[:, :n_q]


def decomposed(q, k, v, layout: scenes.SceneLayout, pattern: str):
    """Each caption's and each scene's queries against exactly the keys they may see. Memory is linear in L."""
    outputs = []
    for is_text in (True, False):
        for scene in range(layout.num_scenes):
            start, stop = layout.text_range(scene) if is_text else layout.video_range(scene)
            ranges = scenes.key_ranges(layout, pattern, scene, is_text)
            outputs.append(_segment(q[:, start:stop], [(k[:, a:b], v[:, a:b]) for a, b in ranges]))
    return checkpoint_name(jnp.concatenate(outputs, axis=1), 'attention')


def flash_pieces(q, k, v, layout: scenes.SceneLayout, pattern: str, implementation: str = 'cudnn'):
    """Full flash attention of each caption's and each scene's queries over the keys they may see, put side by side.

    No statistics are merged, so that gradients are those of jax.nn.dot_product_attention, whatever implementation.
    """
    outputs = []
    for is_text in (True, False):
        for scene in range(layout.num_scenes):
            start, stop = layout.text_range(scene) if is_text else layout.video_range(scene)
            ranges = scenes.key_ranges(layout, pattern, scene, is_text)
            keys, values = (jnp.concatenate([x[:, a:b] for a, b in ranges], axis=1) for x in (k, v))
            outputs.append(jax.nn.dot_product_attention(q[:, start:stop], keys, values, implementation=implementation))
    return jnp.concatenate(outputs, axis=1)


def _splash(kernel: str):
    def attend(q, k, v, layout, pattern):
        return splash.attend(q, k, v, layout, pattern, block=splash.block_of_chip(), kernel=kernel)
    return attend


# By name: XLA anywhere, XLA anywhere, tokamax's and jax's kernels on TPU, cuDNN on GPU.
BACKENDS = {'dense': dense, 'decomposed': decomposed, 'splash': _splash('tokamax'), 'jax_splash': _splash('jax'),
            'cudnn': flash_pieces}


def attend(q, k, v, layout: scenes.SceneLayout, pattern: str, backend: str):
    """Scaled dot-product attention under a scene pattern, on the mesh that is being traced for.

    Args:
      q, k, v: [B, L, N, D], text tokens first; any float dtype. Scores and softmax are float32.
      layout: says which token belongs to which scene; its num_tokens must be L.
      pattern: one of scenes.PATTERNS.
      backend: one of BACKENDS.

    Returns:
      [B, L, N, D] in q's dtype.

    Raises:
      ValueError: unknown pattern or backend, a backend that the device cannot run, L that is not the layout's, or a
        mesh that it does not divide over.
    """
    if backend not in BACKENDS:
        raise ValueError(f'Unknown attention backend {backend!r}: use one of {", ".join(BACKENDS)}.')
    if not (q.shape == k.shape == v.shape and q.ndim == 4 and q.shape[1] == layout.num_tokens):
        raise ValueError(f'Attention over {layout} needs q, k, v of shape [B, {layout.num_tokens}, N, D], '
                         f'got {q.shape}, {k.shape}, {v.shape}.')
    return context_parallel.attend(q, k, v, layout, pattern, BACKENDS[backend])
