"""Devices of a TPU topology, made by libtpu without a TPU."""

import importlib.util
import os

from mask2dit_jax import hardware


def topology_devices(topology: str, slices: int = 1):
    """Returns the devices of TPU slices, for compiling only.

    Args:
      topology: generation and shape of a slice, such as 'v5p:4x4x4'.
      slices: number of such slices.

    Raises:
      ValueError: if libtpu is not installed or does not know the topology.
    """
    if importlib.util.find_spec('libtpu') is None:
        raise ValueError("Compiling for TPU needs libtpu: pip install 'mask2dit_jax[tpu]'.")

    # libtpu reads these when it is loaded: no search for a TPU on this machine, no lock against
    # other processes, no log files.
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
            f'{topology!r} is not a topology: write one of {", ".join(hardware.CHIPS)}, a colon '
            'and its shape.'
        )

    options = dict(hardware.CHIPS[generation].topology_options)
    if slices > 1:
        options['num_slices'] = slices
    try:
        description = topologies.get_topology_desc(
            platform='tpu', topology_name=topology, **options
        )
        return description.devices
    except Exception as error:  # libtpu raises several kinds
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f'libtpu does not know the topology {topology!r} ({reason}).') from error
