"""Schedules of the TPU kernels, compiled and not run."""

import tqdm

from mask2dit_jax.aot import kernel_schedules


def bench_compile() -> list[dict]:
    """One row per generation of chips, kernel and direction."""
    cases = [
        (topology, *case)
        for topology in ('v5p:2x2x1', 'v6e:2x2', 'v5e:2x2')
        for case in ((64, 'tokamax'), (128, 'tokamax'), (64, 'jax'))
    ]
    return [
        {
            'chip': topology.split(':')[0],
            'kernel': kernel,
            'head size': head_dim,
            'direction': direction,
            'visible': visible,
            'masked': masked,
        }
        for topology, head_dim, kernel in tqdm.tqdm(cases, desc='compile', unit='kernel')
        for direction, (visible, masked) in kernel_schedules.kernel_bundles(
            topology, head_dim, kernel
        ).items()
    ]
