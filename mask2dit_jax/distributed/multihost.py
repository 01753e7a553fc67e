"""Several processes as one program: they start, agree, stop, and end together.

JAX notices a process that is killed or stopped: the runtime of every process sends heartbeats from
a thread of its own, and JAX ends the other processes when they cease. JAX cannot notice a process
whose Python hangs while its threads live (a file system that does not answer): `barrier` does.
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
import safetensors.numpy
from absl import logging
from jax.experimental import multihost_utils

# A process without a sign of life for this long counts as dead.
HEARTBEAT_SECONDS = 60
# If nothing slow precedes a step, processes may come to it this much later than the first one.
PEER_SECONDS = 90
_UNLIMITED_SECONDS = 7 * 24 * 3600


def tpu_chips() -> int:
    """Number of TPU chips of this host that JAX would use.

    The function asks PCI, as JAX does, and touches no device.
    """
    platforms = jax.config.jax_platforms
    if platforms and 'tpu' not in platforms.split(','):
        return 0

    # No public function of JAX counts chips before devices are touched.
    from jax._src import hardware_utils

    num_chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    return num_chips


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, devices: int
) -> None:
    """Connects the processes of a run; to be called before devices are touched.

    Args:
      coordinator: HOST:PORT of process 0. None for a single process, and on TPU, where a host with
        fewer chips than the mesh needs is one of several and learns the rest from its environment.
      num_processes, process_id: given if and only if the coordinator is.
      devices: number of devices that the mesh needs.
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
    """Whether `good` is true on all processes. All processes must call this."""
    if jax.process_count() == 1:
        return good
    answers = multihost_utils.process_allgather(np.array(good))
    return bool(answers.all())


def assert_same_on_all_hosts(**things) -> None:
    """Checks that all processes have the same things. All processes must call this.

    Args:
      **things: compared by their repr, and named in the error.

    Raises:
      ValueError: if something differs, saying what.
    """
    if jax.process_count() == 1:
        return

    digests = [zlib.crc32(repr(thing).encode()) for thing in things.values()]
    gathered = multihost_utils.process_allgather(np.array(digests, np.uint32))

    differs = (gathered != gathered[0]).any(axis=0)  # of [processes, things]
    names = [name for name, differ in zip(things, differs) if differ]
    if names:
        raise ValueError(
            f'Processes differ in {", ".join(names)}: start all by the same command, with a '
            '--workdir that they share.'
        )


def gather(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The arrays of every process, in the order of processes. All processes must call this.

    All of them are copied to every process: they are to be small.

    Args:
      arrays: of this process; names, shapes and types may differ from process to process.
    """
    if jax.process_count() == 1:
        return [arrays]

    # As bytes, since JAX would round float64 and int64.
    content = np.frombuffer(safetensors.numpy.save(arrays), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(content), np.uint32))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(content)] = content
    gathered = multihost_utils.process_allgather(padded)  # [processes, bytes]
    return [
        safetensors.numpy.load(row[:length].tobytes()) for row, length in zip(gathered, lengths)
    ]


def barrier(step: int, limited: bool) -> None:
    """Waits for all processes before a step.

    Args:
      step: the number of the step. It must be the same on all processes, and be used once.
      limited: whether to end the wait after PEER_SECONDS. To be false where a process may well be
        minutes late, because it compiled or saved before this step. The duration of steps does not
        matter, since processes wait for the end of every step together.

    Raises:
      TimeoutError: if some processes do not come.
    """
    if jax.process_count() == 1:
        return

    seconds = PEER_SECONDS if limited else _UNLIMITED_SECONDS
    wait = ocp.multihost.get_barrier_sync_fn()
    try:
        wait(key=f'step {step}', timeout_ms=1000 * seconds)
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(
            f'Another process did not come to step {step} within {seconds} s: it hangs, or it is '
            'gone. Start all processes again; they resume.'
        ) from error


@contextlib.contextmanager
def termination():
    """Yields a function that says whether to stop, because SIGTERM came to one of the processes.

    The function must be called after every step; all processes get True after the same step. While
    Python waits (for the compiler, say), the signal waits, too. Outside the context SIGTERM ends a
    single process at once. With several processes it does so after the context; when it comes
    before the context, JAX remembers it.
    """
    if jax.distributed.is_initialized():
        # The count begins at 1, and not at the step that a run resumes at: if the signal comes
        # before the first call, JAX takes call 1 for the one that says True.
        calls = itertools.count(1)
        try:
            yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
        finally:
            # JAX's own handler would swallow the signal, since nobody asks any more.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return

    received = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received.is_set
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def ending_together():
    """Ends this process at once when an error is raised, if it is one of several.

    The other processes notice that the heartbeats of this one cease. Python's orderly exit would
    wait for computations that cannot end without the other processes.
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
