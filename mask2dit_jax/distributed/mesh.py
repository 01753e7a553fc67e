"""The device mesh, and how the rows of a batch lie on it."""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices share the work; the product of the four axes must be the device count.

    Attributes:
      data: copies of the model, between which only gradients travel; several slices must divide it.
      fsdp: devices over which one copy's parameters, optimizer and EMA are spread, each with
        examples of its own.
      context: devices that share the tokens of an example (Ulysses); it must divide the attention
        heads.
      tensor: devices that share the heads and the hidden features.
      slice: TPU slice (presets.SLICES) that the axes are meant for, which `aot` compiles for.
      cpu_devices: how many devices JAX makes of the host's CPU; it means nothing on accelerators.
    """

    data: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    slice: str = ''
    cpu_devices: int = 1


AXES = ('data', 'fsdp', 'context', 'tensor')
BATCH_AXES = AXES[:2]


def mesh_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh that is being traced for; empty on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape) if mesh.size > 1 else {}


def make_mesh(mesh, devices=None) -> jax.sharding.Mesh:
    """Mesh (data, fsdp, context, tensor): whole physical axes of the chips' torus where they fit,
    and slices on data.

    Args:
      mesh: config.MeshConfig, the sizes of the axes.
      devices: all of JAX's unless given, e.g. those of a topology that is only compiled for.

    Raises:
      ValueError: if the axes do not multiply to the number of devices, or data does not divide over
        slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(getattr(mesh, axis) for axis in AXES)
    want, have = math.prod(shape), len(devices)
    if want != have:
        sizes = ' x '.join(f'{axis} {n}' for axis, n in zip(AXES, shape))
        raise ValueError(
            f'config.mesh asks for {sizes} = {want} devices, but there are {have}: change the axes, or '
            'config.mesh.cpu_devices on a CPU.'
        )
    slices = len({getattr(d, 'slice_index', 0) for d in devices})
    if mesh.data % slices:
        raise ValueError(
            f'config.mesh.data {mesh.data} does not divide over {slices} slices, between which only '
            'gradients should travel: make it a multiple.'
        )
    if slices > 1:
        inner = (mesh.data // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Auto axes: the compiler propagates shardings; Explicit ones, the default, do not work with
    # linen modules.
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of(tree) -> jax.sharding.Mesh:
    """The mesh that a tree of arrays is spread over; the first device for arrays that are on no
    mesh."""
    sharding = getattr(jax.tree.leaves(tree)[0], 'sharding', None)
    if isinstance(sharding, NamedSharding):
        return sharding.mesh
    grid = np.array(jax.local_devices()[:1]).reshape((1,) * len(AXES))
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Examples spread over all devices of the batch axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
    """The examples of a global batch that this process's devices need; processes that share tokens
    share them."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (index,) in slices for row in range(*index.indices(batch_size))})


def global_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, batch_size: int):
    """Global arrays from the examples of `local_rows`."""
    sharding, rows = batch_sharding(mesh), local_rows(mesh, batch_size)

    def place(x):
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            return x[rows.index(start) : rows.index(start) + stop - start]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)
