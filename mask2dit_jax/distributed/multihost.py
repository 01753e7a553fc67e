"""Several processes as one program: they start, agree, stop, and end together.

JAX notices a process that is killed or stopped, by heartbeats that each one's runtime sends from a
thread of its own, and then ends the others. It cannot notice one whose Python hangs while its
threads live (a file system that does not answer): `meet` does.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
import traceback
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 60  # without a sign of life, a process counts as dead
PEER_SECONDS = 90  # by which the others may come later to a step that nothing slow precedes
_UNLIMITED_SECONDS = 7 * 24 * 3600


def tpu_chips() -> int:
    """TPU chips of this host that JAX would use; asks PCI as JAX does, and touches no device."""
    platforms = jax.config.jax_platforms
    if platforms and 'tpu' not in platforms.split(','):
        return 0
    from jax._src import (
        hardware_utils,
    )  # no public function counts chips before devices are touched

    return hardware_utils.num_available_tpu_chips_and_device_id()[0]


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, devices: int
) -> None:
    """Connects the processes of a run; to be called before devices are touched.

    Args:
      coordinator: HOST:PORT of process 0; None for one process, or on TPU, where a host that has
        fewer chips than the mesh needs is one of several and learns the rest from its environment.
      num_processes, process_id: with the coordinator.
      devices: that the mesh needs.
    """
    limits = {
        'heartbeat_timeout_seconds': HEARTBEAT_SECONDS,
        'shutdown_timeout_seconds': PEER_SECONDS,
    }
    if coordinator is not None:
        jax.distributed.initialize(coordinator, num_processes, process_id, **limits)
    elif 0 < tpu_chips() < devices:
        jax.distributed.initialize(**limits)


def all_agree(good: bool) -> bool:
    """Whether it is good on all processes, which all call this."""
    return (
        good
        if jax.process_count() == 1
        else bool(multihost_utils.process_allgather(np.array(good)).all())
    )


def assert_same_on_all_hosts(**things) -> None:
    """Checks that all processes, which all call this, have the same things (compared by repr).

    Raises:
      ValueError: naming what differs.
    """
    if jax.process_count() == 1:
        return
    digests = np.array([zlib.crc32(repr(thing).encode()) for thing in things.values()], np.uint32)
    gathered = multihost_utils.process_allgather(digests)  # [processes, things]
    different = [name for name, column in zip(things, gathered.T) if len(set(column.tolist())) > 1]
    if different:
        raise ValueError(
            f'Processes differ in {", ".join(different)}: start all by the same command, with a --workdir '
            'that they share.'
        )


def barrier(step: int, limited: bool) -> None:
    """Waits for all processes before a step.

    Args:
      step: the same on all, each once.
      limited: end the wait after PEER_SECONDS. Not where a process may well be minutes late, since
        it compiled or saved before; how long steps take does not matter, since processes wait for
        their ends together.

    Raises:
      TimeoutError: if some do not come.
    """
    if jax.process_count() == 1:
        return
    seconds = PEER_SECONDS if limited else _UNLIMITED_SECONDS
    try:
        ocp.multihost.get_barrier_sync_fn()(key=f'step {step}', timeout_ms=1000 * seconds)
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(
            f'Another process did not come to step {step} within {seconds} s, so that it hangs or is '
            'gone: start all again, and they resume.'
        ) from error


@contextlib.contextmanager
def termination():
    """A function that says whether to stop, since SIGTERM came to one of the processes.

    It must be asked after every step, and says True after the same one on all. While Python waits
    (for the compiler, say) the signal waits, too. Afterwards SIGTERM ends the process at once;
    before, too, if it is the only one.
    """
    if jax.distributed.is_initialized():
        asked = itertools.count(
            1
        )  # from the start on: JAX takes the first one as 0 if the signal comes before it
        try:
            yield lambda: multihost_utils.reached_preemption_sync_point(next(asked))
        finally:
            signal.signal(
                signal.SIGTERM, signal.SIG_DFL
            )  # JAX's handler, which nobody asks any more, ignores it
        return
    received = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received.is_set
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def ending_together():
    """With several processes an error ends this one at once, by which the others notice.

    Python's orderly exit would wait for computations that cannot end without the others.
    """
    try:
        yield
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        logging.flush()
        sys.stdout.flush()
        os._exit(1)
