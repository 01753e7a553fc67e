"""Meshes and shardings: ordered regex rules from parameter paths to partition specs.

Optimizer state and EMA carry the parameters' paths inside their own, so that one table shards them
all.

Parameters are spread over fsdp along one axis and over context along the other, so that every
gather and every reduction runs over one mesh axis, which is one or more whole axes of the chips'
torus: over both at once the TPU compiler reduces gradients of full size everywhere (seen on
v6e:8x8).
"""

import math
import re

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mask2dit_jax.distributed import mesh as mesh_lib

# Names, and the axes over which the rows and the columns of their kernels are spread. LoRA's A [in,
# rank] lies as the rows do and B [rank, out] as the columns, so that A @ B needs no collective.
_KERNELS = (
    ('to_q|to_k|to_v|ff_in', 'fsdp', ('tensor', 'context')),
    ('to_out|ff_out', ('tensor', 'fsdp'), 'context'),
    ('linear', 'fsdp', 'context'),
    ('patch|text|time_in|time_out', None, 'fsdp'),
    ('proj_out', 'fsdp', None),
)
# Of '/' and the path. First match wins; a spec names the last axes, so that a stacked layer axis
# stays whole.
RULES = (
    *((rf'/({names})/kernel$', (rows, columns)) for names, rows, columns in _KERNELS),
    *((rf'/({names})/lora_A$', (rows, None)) for names, rows, _ in _KERNELS),
    *((rf'/({names})/lora_B$', (None, columns)) for names, _, columns in _KERNELS),
    (r'/positions$', (None, 'fsdp')),
    (r'/(bias|scale)$', ()),
    (r'^/step$|/(count|ns_coeffs)$', ()),
)


def constrain_tokens(x):
    """Spreads [B, L, E] over the batch axes and context; nothing on one device."""
    return (
        jax.lax.with_sharding_constraint(x, P(mesh_lib.BATCH_AXES, 'context'))
        if mesh_lib.mesh_axes()
        else x
    )


def gather_context(x, name: str):
    """Gathers a parameter over context alone; the compiler does the rest. Its gradient takes the
    way back.

    Without this step the gradient would be reduced over all devices at once, in full size.
    """
    if mesh_lib.mesh_axes().get('context', 1) == 1:
        return x
    spec = (
        tuple(a for a in ((axis,) if isinstance(axis, str) else axis or ()) if a != 'context')
        for axis in _tail(name, x.shape)
    )
    return jax.lax.with_sharding_constraint(x, P(*spec))


def path_name(path) -> str:
    """'params/blocks/attn/to_q/kernel' from a key path."""
    return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def _tail(name: str, shape: tuple[int, ...]) -> tuple:
    tail = next((tail for pattern, tail in RULES if re.search(pattern, f'/{name}')), None)
    if tail is None:
        raise ValueError(f'No sharding rule matches {name} {shape}: add one to sharding.RULES.')
    return tail


def partition_spec(name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
    """Partition spec of one array.

    Raises:
      ValueError: if no rule matches, or a sharded axis does not divide.
    """
    tail = _tail(name, shape)
    if len(shape) < len(tail):
        return P()  # an optimizer's placeholder for a parameter that another part of it serves
    spec = (None,) * (len(shape) - len(tail)) + tail
    for size, axis in zip(shape, spec):
        axes = (axis,) if isinstance(axis, str) else axis or ()
        if size % math.prod(mesh.shape[a] for a in axes):
            over = ' x '.join(f'{a}={mesh.shape[a]}' for a in axes)
            raise ValueError(f'{name} {shape} does not divide over {over}: change config.mesh.')
    return P(*spec)


def shardings(tree, mesh: jax.sharding.Mesh):
    """NamedSharding for every array of a train state (or part of one) of arrays or
    ShapeDtypeStructs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, partition_spec(path_name(path), x.shape, mesh)), tree
    )


def abstract_arrays(tree, mesh: jax.sharding.Mesh, dtype: str | None = None):
    """ShapeDtypeStructs of a tree's arrays with their places on the mesh, optionally in another
    dtype."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s),
        tree,
        shardings(tree, mesh),
    )
