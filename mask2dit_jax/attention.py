"""Attention over the joint [text, video] sequence under a scene pattern (Mask²DiT, section 3.2).

One signature, `attend`; backends differ in how they compute, never in what. `dense` builds the mask and is the
definition; `decomposed` is plain XLA that never forms an L x L array and never repeats video keys or values.

What the backward pass needs of the result is named 'attention', so that rematerialization can keep or offload it.
"""
import functools

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


def _product(spec, x, y):
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _blocks(length: int) -> tuple[int, int]:
    """Number of blocks of queries and their size, evenly, so that little is padded."""
    count = -(-length // QUERY_BLOCK)
    return count, -(-length // count)


def _cut(x, count: int, size: int):
    """[B, N, Q, ...] to blocks [count, B, N, size, ...], the last one filled with zeros."""
    pad = [(0, 0), (0, 0), (0, count * size - x.shape[2])] + [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, pad).reshape(*x.shape[:2], count, size, *x.shape[3:])
    return jnp.moveaxis(x, 2, 0)


def _uncut(x, length: int):
    """Inverse of _cut."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length]


def _segments(layout: scenes.SceneLayout, pattern: str):
    """First and one-past-last query of every caption and scene, and the ranges of keys that they see."""
    return [(*(layout.text_range(i) if is_text else layout.video_range(i)),
             scenes.key_ranges(layout, pattern, i, is_text))
            for is_text in (True, False) for i in range(layout.num_scenes)]


def _decomposed_forward(q, k, v, layout, pattern):
    """Result and log-sum-exp of the scores, from q, k and v as [B, N, L, D]."""
    turned = k.swapaxes(2, 3)  # once, and not for every block

    def block(q, ranges):
        scores = [_product('bnqd,bndk->bnqk', q, turned[..., a:b]) for a, b in ranges]
        top = functools.reduce(jnp.maximum, [s.max(-1, keepdims=True) for s in scores])
        weights = [jnp.exp(s - top) for s in scores]
        total = sum(w.sum(-1, keepdims=True) for w in weights)
        out = sum(_product('bnqk,bnkd->bnqd', w.astype(v.dtype), v[:, :, a:b]) for w, (a, b) in zip(weights, ranges))
        return (out / total).astype(v.dtype), (top + jnp.log(total))[..., 0]

    outs, sums = [], []
    for start, stop, ranges in _segments(layout, pattern):
        parts = _cut(q[:, :, start:stop], *_blocks(stop - start))
        out, log_sum = jax.lax.map(functools.partial(block, ranges=ranges), parts)
        outs.append(_uncut(out, stop - start))
        sums.append(_uncut(log_sum, stop - start))
    return jnp.concatenate(outs, axis=2), jnp.concatenate(sums, axis=2)


def _decomposed_backward(q, k, v, out, log_sum, d_out, layout, pattern):
    """Gradients of q, k and v, all [B, N, L, D]: the derivative of softmax over all pieces of keys at once."""
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)  # [B, N, L]

    def block(carry, xs, ranges):
        dk, dv = carry
        q, d_out, log_sum, delta = xs
        dq, q_turned, d_out_turned = 0.0, q.swapaxes(2, 3), d_out.swapaxes(2, 3)
        for a, b in ranges:
            # Keys before queries, so that only one product, dq's, has a matrix on its left to turn around.
            keys, values = k[:, :, a:b], v[:, :, a:b]
            weights = jnp.exp(_product('bnkd,bndq->bnkq', keys, q_turned) - log_sum[:, :, None])
            dv = dv.at[:, :, a:b].add(_product('bnkq,bnqd->bnkd', weights.astype(v.dtype), d_out))
            d_weights = _product('bnkd,bndq->bnkq', values, d_out_turned)
            d_scores = (weights * (d_weights - delta[:, :, None])).astype(q.dtype)
            dk = dk.at[:, :, a:b].add(_product('bnkq,bnqd->bnkd', d_scores, q))
            dq = dq + _product('bnkq,bnkd->bnqd', d_scores, keys)
        return (dk, dv), dq

    carry, dqs = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)), []
    for start, stop, ranges in _segments(layout, pattern):
        parts = [_cut(x[:, :, start:stop], *_blocks(stop - start)) for x in (q, d_out, log_sum, delta)]
        carry, dq = jax.lax.scan(functools.partial(block, ranges=ranges), carry, parts)
        dqs.append(_uncut(dq, stop - start))
    return jnp.concatenate(dqs, axis=2), *carry


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def decomposed(q, k, v, layout: scenes.SceneLayout, pattern: str):
    """Each caption's and each scene's queries against exactly the keys they may see. Memory is linear in L.

    Pieces of keys are normalised together, and the backward pass starts from their common log-sum-exp: merging the
    pieces' own results would lose the gradient of their sums.
    """
    return _decomposed_fwd(q, k, v, layout, pattern)[0]


def _decomposed_fwd(q, k, v, layout, pattern):
    # Heads lead from here on: XLA's CPU backend would turn the keys around for every block otherwise.
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))  # [B, N, L, D]
    out, log_sum = (checkpoint_name(x, 'attention') for x in _decomposed_forward(q, k, v, layout, pattern))
    return out.swapaxes(1, 2), (q, k, v, out, log_sum)


def _decomposed_bwd(layout, pattern, residuals, d_out):
    q, k, v, out, log_sum = residuals
    dq, dk, dv = _decomposed_backward(q, k, v, out, log_sum, d_out.swapaxes(1, 2), layout, pattern)
    scale = q.shape[-1] ** -0.5
    return tuple(x.swapaxes(1, 2).astype(q.dtype) for x in (dq * scale, dk, dv))


decomposed.defvjp(_decomposed_fwd, _decomposed_bwd)


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
