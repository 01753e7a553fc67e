"""Several processes as one program: they start, agree, stop, and end together.

JAX notices a process that is killed or stopped: the runtime of every process sends heartbeats from
a thread of its own, and JAX ends the other processes when they cease. JAX cannot notice a process
whose Python hangs while its threads live (a file system that does not answer): `barrier` does, and
watchdog.py ends the process that hangs.
"""

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import traceback
import zlib
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from absl import logging
from jax.experimental import multihost_utils

from mask2dit_jax.distributed import watchdog

# A process without a sign of life for this long counts as dead.
HEARTBEAT_SECONDS = 60
# If nothing slow precedes a step, processes may come to it this much later than the first one.
PEER_SECONDS = 90


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

    # As bytes, since JAX would round float64 and int64. safetensors writes the memory of an array
    # as it lies there, which may be transposed.
    arrays = {name: np.asarray(array, order='C') for name, array in arrays.items()}
    content = np.frombuffer(safetensors.numpy.save(arrays), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(content), np.uint32))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(content)] = content
    gathered = multihost_utils.process_allgather(padded)  # [processes, bytes]
    return [
        safetensors.numpy.load(row[:length].tobytes()) for row, length in zip(gathered, lengths)
    ]


def barrier(step: int, limited: bool, slow_seconds: float = PEER_SECONDS) -> None:
    """Waits for all processes before a step.

    Args:
      step: the number of the step. It must be the same on all processes, and be used once.
      limited: whether to end the wait after PEER_SECONDS. To be false where a process may well be
        minutes late, because it compiled or saved before this step. The duration of steps does not
        matter, since processes wait for the end of every step together.
      slow_seconds: when the wait ends if it is not `limited`.

    Raises:
      TimeoutError: if some processes do not come.
    """
    if jax.process_count() == 1:
        return

    seconds = PEER_SECONDS if limited else slow_seconds
    watchdog.enter('other processes', seconds + PEER_SECONDS)
    wait = ocp.multihost.get_barrier_sync_fn()
    try:
        wait(key=f'step {step}', timeout_ms=int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(
            f'Another process did not come to step {step} within {seconds:g} s: it hangs, or it is '
            'gone. Start all processes again; they resume.'
        ) from error


@contextlib.contextmanager
def termination():
    """Yields a function that says whether to stop, because SIGTERM or Ctrl-C came to a process.

    The function returns 'SIGTERM', 'Ctrl-C', or '' to go on. It must be called after every step;
    all processes are told to stop after the same step. Ctrl-C, that is SIGINT, means the same as
    SIGTERM, and a second one ends the process at once, whatever it is doing. A process that was
    started with SIGINT ignored (by nohup, or in the background of a script) goes on ignoring it.

    Outside the context SIGTERM ends a single process at once. With several processes it does so
    after the context; when it comes before the context, JAX remembers it.
    """
    several = jax.distributed.is_initialized()
    reasons = []

    def hear(number: int) -> None:
        name = 'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'
        if name == 'Ctrl-C' and name in reasons:
            logging.warning('Ctrl-C again: stopped at once. The same command resumes.')
            logging.flush()
            os._exit(128 + number)
        if not reasons:
            logging.warning(
                '%s: what runs now is finished, then the state is saved. Ctrl-C%s stops at once.',
                name,
                ' again' if name == 'Ctrl-C' else ' twice',
            )
        reasons.append(name)
        if several and name == 'Ctrl-C':
            os.kill(os.getpid(), signal.SIGTERM)  # by which JAX tells the other processes

    # JAX handles SIGTERM itself where there are several processes.
    handled = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    handled = [number for number in handled if signal.getsignal(number) != signal.SIG_IGN]
    with _signals(handled, hear):
        if not several:
            yield lambda: reasons[0] if reasons else ''
            return

        # The count begins at 1, and not at the step that a run resumes at: if the signal comes
        # before the first call, JAX takes call 1 for the one that says True.
        calls = itertools.count(1)

        def reached() -> str:
            if not multihost_utils.reached_preemption_sync_point(next(calls)):
                return ''
            return reasons[0] if reasons else 'SIGTERM'

        try:
            yield reached
        finally:
            # JAX's own handler would swallow the signal, since nobody asks any more.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _signals(numbers: list[int], hear: Callable[[int], None]):
    """Calls `hear` with the number of each signal that comes, from a thread of its own.

    Python would call a handler only when the main thread comes back from the compiler, or from
    waiting for a device. The thread hears of the signal at once.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def listen() -> None:
        while received := receiver.recv(1):  # one byte per signal; none once the sender is closed
            if received[0] in numbers:
                hear(received[0])

    thread = threading.Thread(target=listen, name='signals', daemon=True)
    thread.start()
    previous = {number: signal.signal(number, lambda *_: None) for number in numbers}
    previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        sender.close()
        thread.join()
        receiver.close()


@contextlib.contextmanager
def ending_together():
    """Ends this process at once when an error is raised, if it is one of several.

    The other processes notice that the heartbeats of this one cease. Python's orderly exit would
    wait for computations that cannot end without the other processes.
    """
    try:
        yield
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        logging.flush()
        sys.stdout.flush()
        os._exit(1)
