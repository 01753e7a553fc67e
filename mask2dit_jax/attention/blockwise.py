"""Exact attention under a scene pattern in plain XLA, which never forms an L x L array."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mask2dit_jax.attention import masks
from mask2dit_jax.layout import SceneLayout

# Queries per block of the blockwise backend, which works head by head: the largest whose scores of
# a few thousand keys stay in a CPU's caches; smaller blocks make smaller matmuls.
QUERY_BLOCK = 512


def _product(x, y, x_axis: int, y_axis: int):
    """Matmul of two matrices over these axes, in float32."""
    return jax.lax.dot_general(
        x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def _segments(layout: SceneLayout, pattern: str):
    """First and one-past-last query of every caption and scene, and the ranges of keys that they
    see."""
    return [
        (
            *(layout.text_range(i) if is_text else layout.video_range(i)),
            masks.key_ranges(layout, pattern, i, is_text),
        )
        for is_text in (True, False)
        for i in range(layout.num_scenes)
    ]


def _join(x, ranges):
    return jnp.concatenate([x[a:b] for a, b in ranges])


def _scan_queries(block, carry, queries):
    """lax.scan of `block` over arrays [Q, ...] in blocks of even size, the last one filled with
    zeros."""
    length = len(queries[0])
    count = -(-length // QUERY_BLOCK)
    size = -(-length // count)
    cut = [
        jnp.pad(x, [(0, count * size - length)] + [(0, 0)] * (x.ndim - 1)).reshape(
            count, size, *x.shape[1:]
        )
        for x in queries
    ]
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
    """Gradients of q, k and v of one head: the derivative of softmax over all pieces of keys at
    once."""
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
            block, (zeros, zeros), [x[start:stop] for x in (q, d_out, log_sum, delta)]
        )
        dq.append(dq_part)
        at = 0
        for a, b in ranges:
            dk, dv = (x.at[a:b].add(d[at : at + b - a]) for x, d in ((dk, d_keys), (dv, d_values)))
            at += b - a
    return jnp.concatenate(dq), dk, dv


def _heads_first(x):
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])  # [B·N, L, D]


def _heads_last(x, like):
    b, length, n, d = like.shape
    return x.reshape(b, n, length, d).swapaxes(1, 2).astype(like.dtype)  # [B, L, N, D]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def blockwise(q, k, v, layout: SceneLayout, pattern: str):
    """Each caption's and each scene's queries against exactly the keys they may see, head by head;
    memory linear in L.

    Pieces of keys are normalised together, and the backward pass starts from their common
    log-sum-exp: merging the pieces' own results would lose the gradient of their sums.
    """
    return _blockwise_fwd(q, k, v, layout, pattern)[0]


def _blockwise_fwd(q, k, v, layout, pattern):
    heads = [_heads_first(x) for x in (q * q.shape[-1] ** -0.5, k, v)]
    out, log_sum = jax.lax.map(lambda x: _forward_head(*x, layout, pattern), heads)
    out, log_sum = (checkpoint_name(x, 'attention') for x in (out, log_sum))
    return _heads_last(out, q), (*heads, out, log_sum)


def _blockwise_bwd(layout, pattern, residuals, d_out):
    gradients = jax.lax.map(
        lambda x: _backward_head(*x, layout, pattern), (*residuals, _heads_first(d_out))
    )
    dq, dk, dv = (_heads_last(x, d_out) for x in gradients)
    return dq * d_out.shape[-1] ** -0.5, dk, dv


blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)
