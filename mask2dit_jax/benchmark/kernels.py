"""Schedules of the TPU kernels, compiled and not run."""

import tqdm

from mask2dit_jax.aot import kernel_schedules

TOPOLOGIES = ('v5p:2x2x1', 'v6e:2x2', 'v5e:2x2')
KERNELS = (('tokamax', 64), ('tokamax', 128), ('jax', 64))  # with their head sizes


def bench_compile() -> list[dict]:
    """Returns one row per generation of chips, kernel and direction."""
    cases = [(topology, *kernel) for topology in TOPOLOGIES for kernel in KERNELS]
    rows = []
    for topology, kernel, head_dim in tqdm.tqdm(cases, desc='compile', unit='kernel'):
        directions = kernel_schedules.kernel_bundles(topology, head_dim, kernel)
        for direction, bundles in directions.items():
            rows.append(
                {
                    'chip': topology.split(':')[0],
                    'kernel': kernel,
                    'head size': head_dim,
                    'direction': direction,
                    'visible': bundles.visible,
                    'masked': bundles.masked,
                }
            )
    return rows
