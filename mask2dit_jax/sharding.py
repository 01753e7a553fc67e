"""Meshes and shardings: ordered regex rules from parameter paths to partition specs.

Optimizer state and EMA carry the parameters' paths inside their own, so that one table shards them all.
"""
import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mask2dit_jax import config as config_lib

BATCH_AXES = ('data', 'fsdp')

# First match wins; a spec names the last axes of the array, so that a stacked layer axis in front stays whole.
RULES = (
    (r'/(to_q|to_k|to_v|ff_in)/kernel$', ('fsdp', None)),
    (r'/(to_out|ff_out)/kernel$', (None, 'fsdp')),
    (r'/linear/kernel$', (None, 'fsdp')),
    (r'/(patch|text|time_in|time_out)/kernel$', (None, 'fsdp')),
    (r'/proj_out/kernel$', ('fsdp', None)),
    (r'/positions$', (None, 'fsdp')),
    (r'/(bias|scale)$', ()),
    (r'^step$|/(count|ns_coeffs)$', ()),
)


def make_mesh(mesh: config_lib.MeshConfig) -> jax.sharding.Mesh:
    """Mesh (data, fsdp) over all devices.

    Raises:
      ValueError: if the axes do not multiply to the number of devices.
    """
    want, have = mesh.data * mesh.fsdp, jax.device_count()
    if want != have:
        raise ValueError(f'config.mesh asks for data {mesh.data} x fsdp {mesh.fsdp} = {want} devices, but there are '
                         f'{have}: change the axes, or config.mesh.cpu_devices on a CPU.')
    # Auto axes: the compiler propagates shardings; Explicit ones, the default, do not work with linen modules.
    return jax.make_mesh((mesh.data, mesh.fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def path_name(path) -> str:
    """'params/blocks/attn/to_q/kernel' from a key path."""
    return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def spec_of(name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
    """Partition spec of one array.

    Raises:
      ValueError: if no rule matches, or a sharded axis does not divide.
    """
    tail = next((tail for pattern, tail in RULES if re.search(pattern, name)), None)
    if tail is None:
        raise ValueError(f'No sharding rule matches {name} {shape}: add one to sharding.RULES.')
    if len(shape) < len(tail):
        return P()  # an optimizer's placeholder for a parameter that another part of it serves
    spec = (None,) * (len(shape) - len(tail)) + tail
    for size, axis in zip(shape, spec):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(f'{name} {shape} does not divide over {axis}={mesh.shape[axis]}: change config.mesh.')
    return P(*spec)


def shardings(tree, mesh: jax.sharding.Mesh):
    """NamedSharding for every array of a train state (or part of one) of arrays or ShapeDtypeStructs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_of(path_name(path), x.shape, mesh)), tree)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Examples spread over all devices of the batch axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def global_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh):
    """Global arrays from this process's share of the examples, in process order."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
