"""Meshes and shardings: ordered regex rules from parameter paths to partition specs.

Optimizer state and EMA carry the parameters' paths inside their own, so that one table shards them all.

Parameters are spread over fsdp along one axis and over context along the other, so that every gather and every
reduction runs over one mesh axis, which is one or more whole axes of the chips' torus: over both at once the TPU
compiler reduces gradients of full size everywhere (seen on v6e:8x8).
"""
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp', 'context', 'tensor')
BATCH_AXES = AXES[:2]

# Names, and the axes over which the rows and the columns of their kernels are spread. LoRA's A [in, rank] lies as the
# rows do and B [rank, out] as the columns, so that A @ B needs no collective.
_KERNELS = (
    ('to_q|to_k|to_v|ff_in', 'fsdp', ('tensor', 'context')),
    ('to_out|ff_out', ('tensor', 'fsdp'), 'context'),
    ('linear', 'fsdp', 'context'),
    ('patch|text|time_in|time_out', None, 'fsdp'),
    ('proj_out', 'fsdp', None),
)
# Of '/' and the path. First match wins; a spec names the last axes, so that a stacked layer axis stays whole.
RULES = (
    *((rf'/({names})/kernel$', (rows, columns)) for names, rows, columns in _KERNELS),
    *((rf'/({names})/lora_A$', (rows, None)) for names, rows, _ in _KERNELS),
    *((rf'/({names})/lora_B$', (None, columns)) for names, _, columns in _KERNELS),
    (r'/positions$', (None, 'fsdp')),
    (r'/(bias|scale)$', ()),
    (r'^/step$|/(count|ns_coeffs)$', ()),
)


def mesh_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh that is being traced for; empty on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape) if mesh.size > 1 else {}


def constrain_tokens(x):
    """Spreads [B, L, E] over the batch axes and context; nothing on one device."""
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES, 'context')) if mesh_axes() else x


def gather_context(x, name: str):
    """Gathers a parameter over context alone; the compiler does the rest. Its gradient takes the way back.

    Without this step the gradient would be reduced over all devices at once, in full size.
    """
    if mesh_axes().get('context', 1) == 1:
        return x
    spec = (tuple(a for a in ((axis,) if isinstance(axis, str) else axis or ()) if a != 'context')
            for axis in _tail(name, x.shape))
    return jax.lax.with_sharding_constraint(x, P(*spec))


def make_mesh(mesh, devices=None) -> jax.sharding.Mesh:
    """Mesh (data, fsdp, context, tensor): whole physical axes of the chips' torus where they fit, and slices on data.

    Args:
      mesh: config.MeshConfig, the sizes of the axes.
      devices: all of JAX's unless given, e.g. those of a topology that is only compiled for.

    Raises:
      ValueError: if the axes do not multiply to the number of devices, or data does not divide over slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(getattr(mesh, axis) for axis in AXES)
    want, have = math.prod(shape), len(devices)
    if want != have:
        sizes = ' x '.join(f'{axis} {n}' for axis, n in zip(AXES, shape))
        raise ValueError(f'config.mesh asks for {sizes} = {want} devices, but there are {have}: change the axes, or '
                         'config.mesh.cpu_devices on a CPU.')
    slices = len({getattr(d, 'slice_index', 0) for d in devices})
    if mesh.data % slices:
        raise ValueError(f'config.mesh.data {mesh.data} does not divide over {slices} slices, between which only '
                         'gradients should travel: make it a multiple.')
    if slices > 1:
        inner = (mesh.data // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Auto axes: the compiler propagates shardings; Explicit ones, the default, do not work with linen modules.
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of(tree) -> jax.sharding.Mesh:
    """The mesh that a tree of arrays is spread over; the first device for arrays that are on no mesh."""
    sharding = getattr(jax.tree.leaves(tree)[0], 'sharding', None)
    if isinstance(sharding, NamedSharding):
        return sharding.mesh
    grid = np.array(jax.local_devices()[:1]).reshape((1,) * len(AXES))
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def path_name(path) -> str:
    """'params/blocks/attn/to_q/kernel' from a key path."""
    return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def _tail(name: str, shape: tuple[int, ...]) -> tuple:
    tail = next((tail for pattern, tail in RULES if re.search(pattern, f'/{name}')), None)
    if tail is None:
        raise ValueError(f'No sharding rule matches {name} {shape}: add one to sharding.RULES.')
    return tail


def spec_of(name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
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
    """NamedSharding for every array of a train state (or part of one) of arrays or ShapeDtypeStructs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_of(path_name(path), x.shape, mesh)), tree)


def targets(tree, mesh: jax.sharding.Mesh, dtype: str | None = None):
    """ShapeDtypeStructs of a tree's arrays with their places on the mesh, optionally in another dtype."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), tree,
                        shardings(tree, mesh))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Examples spread over all devices of the batch axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
    """The examples of a global batch that this process's devices need; processes that share tokens share them."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index, in slices for row in range(*index.indices(batch_size))})


def global_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, batch_size: int):
    """Global arrays from the examples of `local_rows`."""
    sharding, rows = batch_sharding(mesh), local_rows(mesh, batch_size)

    def place(x):
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            return x[rows.index(start):rows.index(start) + stop - start]
        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)
