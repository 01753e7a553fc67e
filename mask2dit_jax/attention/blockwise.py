"""Exact attention under a scene pattern in plain XLA, which never forms an L x L array.

All tokens of one segment (a scene's caption, or its video) see the same keys. So the queries of a
segment attend, without a mask, to a concatenation of the keys that they may see (Mask²DiT, section
3.2), in blocks of queries and head by head. The backward pass is written out, since JAX would keep
the weights of every block.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mask2dit_jax.attention import masks
from mask2dit_jax.layout import SceneLayout

# Queries per block: the largest number whose scores over a few thousand keys of one head stay in a
# CPU's caches. Smaller blocks make smaller matmuls.
QUERY_BLOCK = 512


def _product(x, y, x_axis: int, y_axis: int):
    """Matmul of two matrices over these axes, in float32."""
    dimensions = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _join(x, ranges):
    """The rows of x [L, ...] in these (start, stop) ranges, one range after the other."""
    return jnp.concatenate([x[start:stop] for start, stop in ranges])


def _cut(x, count: int, size: int):
    """[Q, ...] to [count, size, ...], the end of the last block filled with zeros."""
    padding = [(0, count * size - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])


def _scan_queries(block, carry, queries):
    """Scans `block` over arrays [Q, ...] in blocks of equal size, at most QUERY_BLOCK each.

    Returns:
      The last carry, and the results of all blocks as arrays [Q, ...].
    """
    length = len(queries[0])
    count = -(-length // QUERY_BLOCK)
    size = -(-length // count)

    blocks = [_cut(x, count, size) for x in queries]
    carry, results = jax.lax.scan(block, carry, blocks)
    return carry, [x.reshape(-1, *x.shape[2:])[:length] for x in results]


def _forward_head(q, k, v, layout, pattern):
    """Result [L, D] and log-sum-exp of the scores [L] of one head, from q, k and v [L, D]."""
    outs = []
    log_sums = []
    for segment in layout.segments:
        ranges = masks.key_ranges(layout, pattern, segment)
        keys = _join(k, ranges)
        values = _join(v, ranges)

        def block(carry, queries, keys=keys, values=values):
            (q,) = queries
            scores = _product(q, keys, 1, 1)
            top = scores.max(-1, keepdims=True)  # subtracted so that exp stays finite
            weights = jnp.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            out = _product(weights.astype(v.dtype), values, 1, 0) / total
            log_sum = (top + jnp.log(total))[:, 0]
            return carry, (out.astype(v.dtype), log_sum)

        _, (out, log_sum) = _scan_queries(block, None, [q[segment.start : segment.stop]])
        outs.append(out)
        log_sums.append(log_sum)
    return jnp.concatenate(outs), jnp.concatenate(log_sums)


def _backward_head(q, k, v, out, log_sum, d_out, layout, pattern):
    """Gradients of q, k and v of one head: the derivative of softmax over all the keys at once."""
    # The part of the derivative of softmax that all keys of a query share.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)  # [L]

    dq = []
    dk = jnp.zeros(k.shape, jnp.float32)
    dv = jnp.zeros(v.shape, jnp.float32)
    for segment in layout.segments:
        ranges = masks.key_ranges(layout, pattern, segment)
        keys = _join(k, ranges)
        values = _join(v, ranges)

        def block(carry, queries, keys=keys, values=values):
            d_keys, d_values = carry
            q, d_out, log_sum, delta = queries
            weights = jnp.exp(_product(q, keys, 1, 1) - log_sum[:, None])
            d_values = d_values + _product(weights.astype(v.dtype), d_out, 0, 0)
            d_weights = _product(d_out, values, 1, 1)
            d_scores = (weights * (d_weights - delta[:, None])).astype(q.dtype)
            d_keys = d_keys + _product(d_scores, q, 0, 0)
            return (d_keys, d_values), (_product(d_scores, keys, 1, 0),)

        zeros = jnp.zeros(keys.shape, jnp.float32)
        queries = [x[segment.start : segment.stop] for x in (q, d_out, log_sum, delta)]
        (d_keys, d_values), (dq_part,) = _scan_queries(block, (zeros, zeros), queries)
        dq.append(dq_part)

        # Back from the joined keys to where they lie in the sequence.
        first = 0
        for start, stop in ranges:
            last = first + stop - start
            dk = dk.at[start:stop].add(d_keys[first:last])
            dv = dv.at[start:stop].add(d_values[first:last])
            first = last
    return jnp.concatenate(dq), dk, dv


def _heads_first(x):
    """[B, L, N, D] to [B·N, L, D]."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _heads_last(x, like):
    """[B·N, L, D] to [B, L, N, D], with the batch, the heads and the dtype of `like`."""
    b, _, n, d = like.shape
    return x.reshape(b, n, -1, d).swapaxes(1, 2).astype(like.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def blockwise(q, k, v, layout: SceneLayout, pattern: str):
    """Each segment's queries against exactly the keys that they may see; memory linear in L.

    The keys of a segment are normalised together, and the backward pass starts from their common
    log-sum-exp. Attending to the captions and to the video apart and merging the two results would
    lose the gradient of the two sums.

    Args:
      q, k, v, layout, pattern: as in attend.attend.

    Returns:
      [B, L, N, D] in q's dtype.
    """
    return _blockwise_fwd(q, k, v, layout, pattern)[0]


def _blockwise_fwd(q, k, v, layout, pattern):
    scaled = q * q.shape[-1] ** -0.5
    heads = [_heads_first(x) for x in (scaled, k, v)]  # [B·N, L, D] each

    out, log_sum = jax.lax.map(lambda head: _forward_head(*head, layout, pattern), heads)
    out = checkpoint_name(out, 'attention')  # [B·N, L, D]
    log_sum = checkpoint_name(log_sum, 'attention')  # [B·N, L]
    return _heads_last(out, q), (*heads, out, log_sum)


def _blockwise_bwd(layout, pattern, residuals, d_out):
    heads = (*residuals, _heads_first(d_out))
    gradients = jax.lax.map(lambda head: _backward_head(*head, layout, pattern), heads)

    dq, dk, dv = (_heads_last(x, d_out) for x in gradients)
    return dq * d_out.shape[-1] ** -0.5, dk, dv


blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)
