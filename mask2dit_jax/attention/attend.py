"""Attention over the joint [text, video] sequence under a scene pattern (Mask²DiT, section 3.2).

One signature, `attend`; backends differ in how they compute, never in what. `dense` builds the mask and is the
definition; `decomposed` is plain XLA that never forms an L x L array and never repeats video keys or values.

What the backward pass needs of the result is named 'attention', so that rematerialization can keep or offload it.
"""
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mask2dit_jax.attention import splash
from mask2dit_jax.distributed import context_parallel
from mask2dit_jax.layout import SceneLayout, dense_mask, key_ranges

# Queries per block of the decomposed backend, which works head by head: the largest whose scores of a few thousand keys
# stay in a CPU's caches; smaller blocks make smaller matmuls.
QUERY_BLOCK = 512


def dense(q, k, v, layout: SceneLayout, pattern: str):
    """Reference: softmax over an explicit boolean mask. Memory is quadratic in L."""
    mask = dense_mask(layout, pattern)
    scores = jnp.einsum('bqnd,bknd->bnqk', q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    out = jnp.einsum('bnqk,bknd->bqnd', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return checkpoint_name(out.astype(q.dtype), 'attention')


def _product(x, y, x_axis: int, y_axis: int):
    """Matmul of two matrices over these axes, in float32."""
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _segments(layout: SceneLayout, pattern: str):
    """First and one-past-last query of every caption and scene, and the ranges of keys that they see."""
    return [(*(layout.text_range(i) if is_text else layout.video_range(i)),
             key_ranges(layout, pattern, i, is_text))
            for is_text in (True, False) for i in range(layout.num_scenes)]


def _join(x, ranges):
    return jnp.concatenate([x[a:b] for a, b in ranges])


def _scan_queries(block, carry, queries):
    """lax.scan of `block` over arrays [Q, ...] in blocks of even size, the last one filled with zeros."""
    length = len(queries[0])
    count = -(-length // QUERY_BLOCK)
    size = -(-length // count)
    cut = [jnp.pad(x, [(0, count * size - length)] + [(0, 0)] * (x.ndim - 1)).reshape(count, size, *x.shape[1:])
           for x in queries]
    carry, results = jax.lax.scan(block, carry, cut)
    return carry, [x.reshape(-1, *x.shape[2:])[:length] for x in results]


def _forward_head(q, k, v, layout, pattern):
    """Result [L, D] and log-sum-exp of the scores [L] of one head, from q, k and v [L, D]."""
    parts = []
    for start, stop, ranges in _segments(layout, pattern):
        keys, values = _join(k, ranges), _join(v, ranges)

        def block(carry, queries, keys=keys, values=values):
            scores = _product(*queries, keys, 1, 1)
            top = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            out = _product(weights.astype(v.dtype), values, 1, 0) / total
            return carry, (out.astype(v.dtype), (top + jnp.log(total))[:, 0])

        parts.append(_scan_queries(block, None, [q[start:stop]])[1])
    return tuple(map(jnp.concatenate, zip(*parts)))


def _backward_head(q, k, v, out, log_sum, d_out, layout, pattern):
    """Gradients of q, k and v of one head: the derivative of softmax over all pieces of keys at once."""
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)  # [L]
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for start, stop, ranges in _segments(layout, pattern):
        keys, values = _join(k, ranges), _join(v, ranges)

        def block(carry, queries, keys=keys, values=values):
            q, d_out, log_sum, delta = queries
            weights = jnp.exp(_product(q, keys, 1, 1) - log_sum[:, None])
            d_values = carry[1] + _product(weights.astype(v.dtype), d_out, 0, 0)
            d_weights = _product(d_out, values, 1, 1)
            d_scores = (weights * (d_weights - delta[:, None])).astype(q.dtype)
            d_keys = carry[0] + _product(d_scores, q, 0, 0)
            return (d_keys, d_values), (_product(d_scores, keys, 1, 0),)

        zeros = jnp.zeros(keys.shape, jnp.float32)
        (d_keys, d_values), (dq_part,) = _scan_queries(
            block, (zeros, zeros), [x[start:stop] for x in (q, d_out, log_sum, delta)])
        dq.append(dq_part)
        at = 0
        for a, b in ranges:
            dk, dv = (x.at[a:b].add(d[at:at + b - a]) for x, d in ((dk, d_keys), (dv, d_values)))
            at += b - a
    return jnp.concatenate(dq), dk, dv


def _heads_first(x):
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])  # [B·N, L, D]


def _heads_last(x, like):
    b, length, n, d = like.shape
    return x.reshape(b, n, length, d).swapaxes(1, 2).astype(like.dtype)  # [B, L, N, D]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def decomposed(q, k, v, layout: SceneLayout, pattern: str):
    """Each caption's and each scene's queries against exactly the keys they may see, head by head; memory linear in L.

    Pieces of keys are normalised together, and the backward pass starts from their common log-sum-exp: merging the
    pieces' own results would lose the gradient of their sums.
    """
    return _decomposed_fwd(q, k, v, layout, pattern)[0]


def _decomposed_fwd(q, k, v, layout, pattern):
    heads = [_heads_first(x) for x in (q * q.shape[-1] ** -0.5, k, v)]
    out, log_sum = jax.lax.map(lambda x: _forward_head(*x, layout, pattern), heads)
    out, log_sum = (checkpoint_name(x, 'attention') for x in (out, log_sum))
    return _heads_last(out, q), (*heads, out, log_sum)


def _decomposed_bwd(layout, pattern, residuals, d_out):
    gradients = jax.lax.map(lambda x: _backward_head(*x, layout, pattern), (*residuals, _heads_first(d_out)))
    dq, dk, dv = (_heads_last(x, d_out) for x in gradients)
    return dq * d_out.shape[-1] ** -0.5, dk, dv


decomposed.defvjp(_decomposed_fwd, _decomposed_bwd)


def flash_pieces(q, k, v, layout: SceneLayout, pattern: str, implementation: str = 'cudnn'):
    """Full flash attention of each caption's and each scene's queries over the keys they may see, put side by side.

    No statistics are merged, so that gradients are those of jax.nn.dot_product_attention, whatever implementation.
    """
    outputs = []
    for is_text in (True, False):
        for scene in range(layout.num_scenes):
            start, stop = layout.text_range(scene) if is_text else layout.video_range(scene)
            ranges = key_ranges(layout, pattern, scene, is_text)
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


def attend(q, k, v, layout: SceneLayout, pattern: str, backend: str):
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
