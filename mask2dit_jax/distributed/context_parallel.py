"""Attention on a mesh: Ulysses (Jacobs et al. 2023). Tokens are spread over the `context` axis
outside, heads inside.

Every device sees all tokens for some heads, so that any backend and any pattern run unchanged and
the mask is the one of a single device.
"""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.layout import SceneLayout

SPEC = P(mesh_lib.BATCH_AXES, 'context', 'tensor')  # of q, k and v [B, L, N, D] outside


def check(axes: dict[str, int], batch: int, num_tokens: int, num_heads: int) -> None:
    """Makes sure that examples, tokens and heads spread evenly.

    Raises:
      ValueError: saying which sizes would do.
    """
    copies, context, tensor = axes['data'] * axes['fsdp'], axes['context'], axes['tensor']
    if batch % copies:
        raise ValueError(
            f'A batch of {batch} does not divide over data {axes["data"]} x fsdp {axes["fsdp"]}: make it '
            f'a multiple of {copies}, or let context or tensor take more devices.'
        )
    if num_heads % (context * tensor):
        fitting = [n for n in range(1, num_heads + 1) if num_heads % (n * tensor) == 0]
        raise ValueError(
            f'{num_heads} attention heads do not divide over context {context} x tensor {tensor}: with '
            f'tensor {tensor}, context may be {", ".join(map(str, fitting)) or "nothing"}.'
        )
    if num_tokens % context:
        fitting = [
            n
            for n in range(1, num_heads + 1)
            if num_heads % (n * tensor) == 0 and num_tokens % n == 0
        ]
        raise ValueError(
            f'{num_tokens} tokens do not divide over context {context}: for these scenes it may be '
            f'{", ".join(map(str, fitting))}.'
        )


def attend(q, k, v, layout: SceneLayout, pattern: str, backend: Callable):
    """A backend's attention over the mesh that is being traced for, or on one device without one.

    Args:
      q, k, v: [B, L, N, D], laid out as SPEC says.
      layout, pattern: as in attention.attend.
      backend: function of (q, k, v, layout, pattern).

    Returns:
      [B, L, N, D], laid out alike.

    Raises:
      ValueError: if B, L or N do not divide.
    """
    axes = mesh_lib.mesh_axes()
    if not axes:
        return backend(q, k, v, layout, pattern)
    check(axes, *q.shape[:3])

    def swap(x, **axes):
        # XLA's CPU backend sometimes gives the parts of a bare all-to-all different layouts, and
        # then fails.
        return jax.lax.all_to_all(jax.lax.optimization_barrier(x), 'context', tiled=True, **axes)

    def local(q, k, v):
        if axes['context'] == 1:
            return backend(q, k, v, layout, pattern)
        q, k, v = (
            swap(x, split_axis=2, concat_axis=1) for x in (q, k, v)
        )  # [B, L, N / context, D]
        return swap(backend(q, k, v, layout, pattern), split_axis=1, concat_axis=2)

    return jax.shard_map(local, in_specs=SPEC, out_specs=SPEC, check_vma=False)(q, k, v)
