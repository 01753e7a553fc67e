"""Shardings: ordered regular expressions that map parameter paths to partition specs.

The paths of optimizer state and EMA end with the parameters' paths, so that one table shards them
all.

Parameters are spread over fsdp along one axis and over context along the other, so that every
gather and every reduction runs over one mesh axis, which is one or more whole axes of the chips'
torus. When one array axis is spread over both at once, the TPU compiler reduces gradients of full
size everywhere (seen on v6e:8x8).
"""

import math
import re

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mask2dit_jax.distributed import mesh as mesh_lib

# Names of layers, and the mesh axes over which the rows and the columns of their kernels are
# spread. LoRA's A [in, rank] lies as the rows do and B [rank, out] as the columns, so that A @ B
# needs no collective.
_KERNELS = (
    ('to_q|to_k|to_v|ff_in', 'fsdp', ('tensor', 'context')),
    ('to_out|ff_out', ('tensor', 'fsdp'), 'context'),
    ('linear', 'fsdp', 'context'),
    ('patch|text|time_in|time_out', None, 'fsdp'),
    ('proj_out', 'fsdp', None),
)

# (pattern, mesh axes). A pattern is searched in '/' + path, and the first match wins. The mesh axes
# are those of the array's last axes, so that a stacked layer axis in front stays whole.
RULES = (
    *((rf'/({names})/kernel$', (rows, columns)) for names, rows, columns in _KERNELS),
    *((rf'/({names})/lora_A$', (rows, None)) for names, rows, _ in _KERNELS),
    *((rf'/({names})/lora_B$', (None, columns)) for names, _, columns in _KERNELS),
    (r'/positions$', (None, 'fsdp')),
    (r'/(bias|scale)$', ()),
    (r'^/step$|/(count|ns_coeffs)$', ()),
)


def constrain_tokens(x):
    """Spreads [B, L, E] over the batch axes and context; does nothing on one device."""
    if not mesh_lib.mesh_axes():
        return x
    return jax.lax.with_sharding_constraint(x, P(mesh_lib.BATCH_AXES, 'context'))


def constrain_token_table(x):
    """Spreads a table [L, D] of all tokens over context; does nothing on one device."""
    if not mesh_lib.mesh_axes():
        return x
    return jax.lax.with_sharding_constraint(x, P('context'))


def gather_context(x, name: str):
    """Gathers a parameter over the context axis alone; the compiler gathers over the others.

    The gradient takes the same way back. Without this step the gradient would be reduced over all
    devices at once, in full size.

    Args:
      x: the parameter.
      name: its path, for RULES.
    """
    if mesh_lib.mesh_axes().get('context', 1) == 1:
        return x

    spec = []
    for entry in _tail(name, x.shape):
        spec.append(tuple(axis for axis in _mesh_axes_of(entry) if axis != 'context'))
    return jax.lax.with_sharding_constraint(x, P(*spec))


def path_name(path) -> str:
    """'params/blocks/attn/to_q/kernel' from a key path."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def _tail(name: str, shape: tuple[int, ...]) -> tuple:
    """The mesh axes of an array's last axes, by the first rule that matches its path."""
    for pattern, tail in RULES:
        if re.search(pattern, f'/{name}'):
            return tail
    raise ValueError(f'No sharding rule matches {name} {shape}: add one to partitioning.RULES.')


def _mesh_axes_of(entry) -> tuple[str, ...]:
    """Names of the mesh axes in one entry of a spec, which is a name, several names or None."""
    if entry is None:
        return ()
    if isinstance(entry, str):
        return (entry,)
    return entry


def partition_spec(name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
    """Partition spec of one array.

    Args:
      name: its path, as path_name has it.
      shape: its shape.
      mesh: the mesh, whose axes must divide the sharded axes.

    Raises:
      ValueError: if no rule matches, or a sharded axis does not divide.
    """
    tail = _tail(name, shape)
    if len(shape) < len(tail):
        # The array is an optimizer's placeholder for a parameter that another part of the optimizer
        # serves.
        return P()

    spec = (None,) * (len(shape) - len(tail)) + tail
    for size, entry in zip(shape, spec):
        axes = _mesh_axes_of(entry)
        if size % math.prod(mesh.shape[axis] for axis in axes):
            over = ' x '.join(f'{axis}={mesh.shape[axis]}' for axis in axes)
            raise ValueError(f'{name} {shape} does not divide over {over}: change config.mesh.')
    return P(*spec)


def shardings(tree, mesh: jax.sharding.Mesh):
    """NamedSharding of every array of a train state, or of a part of one.

    Args:
      tree: of arrays or ShapeDtypeStructs.
      mesh: the mesh to spread them over.

    Raises:
      ValueError: as partition_spec.
    """

    def sharding(path, x):
        return NamedSharding(mesh, partition_spec(path_name(path), x.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def abstract_arrays(tree, mesh: jax.sharding.Mesh, dtype: str | None = None):
    """ShapeDtypeStructs of a tree's arrays with their places on the mesh.

    Args:
      tree: of arrays or ShapeDtypeStructs.
      mesh: the mesh to spread them over.
      dtype: instead of the arrays' own.
    """

    def abstract(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)

    return jax.tree.map(abstract, tree, shardings(tree, mesh))
