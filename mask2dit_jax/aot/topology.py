"""Devices of a TPU topology that need not be there."""

import importlib.metadata
import importlib.util
import os

from mask2dit_jax import hardware


def topology_devices(topology: str, slices: int = 1):
    """Devices of a TPU topology such as 'v5p:4x4x4' that need not be there.

    Raises:
      ValueError: if libtpu is not installed or knows no such topology.
    """
    if importlib.util.find_spec('libtpu') is None:
        raise ValueError("Compiling for TPU needs libtpu: pip install 'mask2dit_jax[tpu]'.")
    # No search for a TPU on this machine, no lock against other processes, no log files.
    os.environ.update(
        TPU_SKIP_MDS_QUERY='1',
        TPU_WORKER_HOSTNAMES='localhost',
        TPU_ACCELERATOR_TYPE='v5p-8',
        ALLOW_MULTIPLE_LIBTPU_LOAD='1',
        TPU_LOG_DIR='disabled',
        TF_CPP_MIN_LOG_LEVEL='2',
    )
    from jax.experimental import topologies

    generation = topology.split(':')[0]
    if generation not in hardware.CHIPS:
        raise ValueError(
            f'{topology!r} is no topology: write one of {", ".join(hardware.CHIPS)}, a colon and its shape.'
        )
    options = dict(hardware.CHIPS[generation].topology_options) | (
        {'num_slices': slices} if slices > 1 else {}
    )
    try:
        return topologies.get_topology_desc(
            platform='tpu', topology_name=topology, **options
        ).devices
    except Exception as error:  # libtpu raises several kinds
        raise ValueError(
            f'libtpu knows no topology {topology!r} ({str(error).splitlines()[0][:200]}).'
        ) from error
