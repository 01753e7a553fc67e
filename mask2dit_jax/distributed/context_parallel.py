"""Attention on a mesh by DeepSpeed-Ulysses (Jacobs et al. 2023).

Outside attention the tokens are spread over the `context` axis; inside, the heads are. Every device
sees all tokens for some heads, so that any backend and any pattern run unchanged, under the same
mask as on a single device.
"""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.layout import SceneLayout

SPEC = P(mesh_lib.BATCH_AXES, 'context', 'tensor')  # of q, k and v [B, L, N, D] outside
# Of the keys and values of a cache [B, L, N, D] or [B, L, N·D]: as attention has them inside.
CACHE_SPEC = P(mesh_lib.BATCH_AXES, None, ('tensor', 'context'))


def sizes_for_heads(num_heads: int, tensor: int = 1) -> list[int]:
    """Sizes of the context axis over which so many attention heads spread evenly, ascending."""
    return [n for n in range(1, num_heads + 1) if num_heads % (n * tensor) == 0]


def check(axes: dict[str, int], batch: int, num_tokens: int, num_heads: int) -> None:
    """Makes sure that examples, tokens and heads spread evenly.

    Args:
      axes: sizes of the mesh's axes by name.
      batch: B, examples of the global batch.
      num_tokens: L.
      num_heads: N.

    Raises:
      ValueError: if one of them does not divide; the message says which sizes would do.
    """
    copies = axes['data'] * axes['fsdp']
    context = axes['context']
    tensor = axes['tensor']

    if batch % copies:
        raise ValueError(
            f'A batch of {batch} does not divide over data {axes["data"]} x fsdp {axes["fsdp"]}: '
            f'make it a multiple of {copies}, or let context or tensor take more devices.'
        )

    heads_fit = sizes_for_heads(num_heads, tensor)
    if context not in heads_fit:
        raise ValueError(
            f'{num_heads} attention heads do not divide over context {context} x tensor {tensor}: '
            f'with tensor {tensor}, context may be {", ".join(map(str, heads_fit)) or "nothing"}.'
        )

    if num_tokens % context:
        both_fit = [n for n in heads_fit if num_tokens % n == 0]
        raise ValueError(
            f'{num_tokens} tokens do not divide over context {context}: for these scenes it may be '
            f'{", ".join(map(str, both_fit))}.'
        )


def _all_to_all(x, split_axis: int, concat_axis: int):
    """Spreads split_axis over the context axis, and gathers concat_axis from it."""
    # XLA's CPU backend sometimes gives the parts of a bare all-to-all different layouts, and then
    # fails; behind a barrier it does not.
    x = jax.lax.optimization_barrier(x)
    return jax.lax.all_to_all(
        x, 'context', split_axis=split_axis, concat_axis=concat_axis, tiled=True
    )


def spread_cache(cache):
    """Lays a layer's cache, arrays [B, L, N·D], out as `attend` takes it, once for all the steps
    that use it; does nothing on one device."""
    if not mesh_lib.mesh_axes():
        return cache
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, CACHE_SPEC), cache)


def attend(
    q,
    k,
    v,
    layout: SceneLayout,
    pattern: str,
    backend: Callable,
    cache: tuple = (),
):
    """A backend's attention over the mesh that is being traced for, or on one device without one.

    Args:
      q, k, v: [B, L, N, D], laid out as SPEC says.
      layout, pattern: as in attention.attend.attend.
      backend: function of (q, k, v, layout, pattern, *cache).
      cache: arrays [B, L', N, D], laid out as CACHE_SPEC says.

    Returns:
      [B, L, N, D], laid out alike.

    Raises:
      ValueError: if B, L or N do not divide.
    """
    axes = mesh_lib.mesh_axes()
    if not axes:
        return backend(q, k, v, layout, pattern, *cache)

    batch, num_tokens, num_heads, _ = q.shape
    check(axes, batch, num_tokens, num_heads)

    def local(q, k, v, *cache):
        if axes['context'] == 1:
            return backend(q, k, v, layout, pattern, *cache)

        # [B, L / context, N, D] to [B, L, N / context, D], and back.
        q, k, v = (_all_to_all(x, split_axis=2, concat_axis=1) for x in (q, k, v))
        out = backend(q, k, v, layout, pattern, *cache)
        return _all_to_all(out, split_axis=1, concat_axis=2)

    specs = (SPEC, SPEC, SPEC, *[CACHE_SPEC] * len(cache))
    run = jax.shard_map(local, in_specs=specs, out_specs=SPEC, check_vma=False)
    return run(q, k, v, *cache)
