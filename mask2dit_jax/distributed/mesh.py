"""The device mesh, and how the rows of a batch lie on it."""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mask2dit_jax import hardware, ranges


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices share the work; the product of the four axes must be the device count.

    Attributes:
      data: copies of the model, between which only gradients travel. With several TPU slices, it
        must be a multiple of their number.
      fsdp: devices over which the parameters, the optimizer state and the EMA of one copy are
        spread; each device has examples of its own.
      context: devices that share the tokens of an example (Ulysses); it must divide the attention
        heads.
      tensor: devices that share the heads and the hidden features.
      slice: TPU slice (hardware.SLICES) that the axes are meant for, which `aot` compiles for.
      cpu_devices: number of devices that JAX makes of the host's CPU; accelerators ignore it.
    """

    data: int = ranges.whole(1, least=1)
    fsdp: int = ranges.whole(1, least=1)
    context: int = ranges.whole(1, least=1)
    tensor: int = ranges.whole(1, least=1)
    slice: str = ranges.word('', hardware.SLICES, or_empty=True)
    cpu_devices: int = ranges.whole(1, least=1)


AXES = ('data', 'fsdp', 'context', 'tensor')
BATCH_AXES = AXES[:2]


def mesh_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh that is being traced for; empty on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape) if mesh.size > 1 else {}


def _mesh_from_grid(grid: np.ndarray) -> jax.sharding.Mesh:
    # Auto axes: the compiler propagates shardings. Explicit axes, which are jax.make_mesh's
    # default, do not work with linen modules.
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_mesh(mesh: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """Mesh (data, fsdp, context, tensor) over all devices.

    Every axis takes whole physical axes of the chips' torus where they fit, and slices lie on data.

    Args:
      mesh: the sizes of the axes.
      devices: all of JAX's unless given, e.g. those of a topology that is only compiled for.

    Raises:
      ValueError: if the axes do not multiply to the number of devices, or data does not divide over
        slices.
    """
    if devices is None:
        devices = jax.devices()

    shape = tuple(getattr(mesh, axis) for axis in AXES)
    want = math.prod(shape)
    have = len(devices)
    if want != have:
        sizes = ' x '.join(f'{axis} {size}' for axis, size in zip(AXES, shape))
        raise ValueError(
            f'config.mesh asks for {sizes} = {want} devices, but there are {have}: '
            'change the axes, or config.mesh.cpu_devices on a CPU.'
        )

    # Only devices of TPU slices have the attribute.
    num_slices = len({getattr(device, 'slice_index', 0) for device in devices})
    if mesh.data % num_slices:
        raise ValueError(
            f'config.mesh.data {mesh.data} does not divide over {num_slices} slices, between which '
            'only gradients should travel: make it a multiple.'
        )

    if num_slices > 1:
        within_slice = (mesh.data // num_slices, *shape[1:])
        across_slices = (num_slices, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(
            within_slice, across_slices, devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return _mesh_from_grid(grid)


def partial_mesh(mesh: MeshConfig, devices) -> jax.sharding.Mesh:
    """Mesh over a part of the devices, in the order of their numbers.

    A part need not fill a box of the chips' torus, which `make_mesh` wants.

    Args:
      mesh: the sizes of the axes.
      devices: as many as the axes need.
    """
    shape = tuple(getattr(mesh, axis) for axis in AXES)
    return _mesh_from_grid(np.array(devices).reshape(shape))


def mesh_of(tree) -> jax.sharding.Mesh:
    """The mesh that a tree of arrays is spread over.

    For arrays that are not on a mesh it is a mesh of this process's first device.
    """
    first_leaf = jax.tree.leaves(tree)[0]
    sharding = getattr(first_leaf, 'sharding', None)
    if isinstance(sharding, NamedSharding):
        return sharding.mesh

    grid = np.array(jax.local_devices()[:1]).reshape((1,) * len(AXES))
    return _mesh_from_grid(grid)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Examples spread over all devices of the batch axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def batch_devices(mesh: jax.sharding.Mesh) -> int:
    """How many parts the batch axes cut a batch into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def row_sharding(mesh: jax.sharding.Mesh, num_rows: int) -> NamedSharding:
    """Rows spread over the batch axes, or over one of them, or whole on every device: over as many
    devices as divide their number."""
    by_size = sorted(BATCH_AXES, key=lambda axis: mesh.shape[axis], reverse=True)
    for axes in (BATCH_AXES, *((axis,) for axis in by_size)):
        if num_rows % math.prod(mesh.shape[axis] for axis in axes) == 0:
            return NamedSharding(mesh, P(axes))
    return NamedSharding(mesh, P())


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
    """The examples of a global batch that this process's devices need, in ascending order.

    Processes whose devices share the tokens of an example all need that example.
    """
    indices = row_sharding(mesh, batch_size).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (rows,) in indices for row in range(*rows.indices(batch_size))})


def owned_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
    """The examples of `local_rows` that this process looks after.

    Every example of the global batch is owned by one of the processes that need it, and they share
    them evenly.
    """
    needed_by = [set() for _ in range(batch_size)]
    for device, (rows,) in (
        row_sharding(mesh, batch_size).devices_indices_map((batch_size,)).items()
    ):
        for row in range(*rows.indices(batch_size)):
            needed_by[row].add(device.process_index)

    owned = {process: [] for process in sorted(set.union(*needed_by))}
    for row, processes in enumerate(needed_by):
        owner = min(processes, key=lambda process: (len(owned[process]), process))
        owned[owner].append(row)
    return owned.get(jax.process_index(), [])


def global_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, batch_size: int):
    """Global arrays from the examples of `local_rows`.

    Args:
      batch: arrays whose first axis runs over local_rows(mesh, batch_size).
      mesh: the mesh to spread them over.
      batch_size: examples of the global batch.

    Returns:
      jax.Arrays [batch_size, ...], spread as row_sharding says.
    """
    sharding = row_sharding(mesh, batch_size)
    rows = local_rows(mesh, batch_size)

    def place(x):
        def part(index):
            """The examples of one device, which lie side by side in x."""
            start, stop, _ = index[0].indices(batch_size)
            first = rows.index(start)
            return x[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)


def local_batch(array: jax.Array) -> np.ndarray:
    """The examples of `local_rows` from a global array; the inverse of `global_batch`."""
    parts = {}
    for shard in array.addressable_shards:
        start, _, _ = shard.index[0].indices(len(array))
        if start not in parts:
            parts[start] = np.asarray(shard.data)
    return np.concatenate([parts[start] for start in sorted(parts)])
