"""A process that hangs ends itself, so that whoever started it can start it again.

Work has phases, and each phase a limit in seconds. `enter` tells which phase begins; called again,
it says that the phase goes on. When a limit passes without a call, the stacks of all threads are
printed and the process exits with 1.

Two threads watch. One of Python knows the phase. The other, faulthandler's, is written in C and
comes a little later: it also ends a process whose interpreter stands still, so that the first one
stands still, too, as it does while a page of a mapped file does not come.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping

from absl import logging

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 20

_watch = None  # that of this process; faulthandler has but one, too


class _Watch:
    """The limits, and the present phase."""

    def __init__(self, limits: Mapping[str, float]):
        self._limits = dict(limits)
        self.enter(next(iter(limits)), None)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name='watchdog', daemon=True)
        self._thread.start()

    def enter(self, phase: str, seconds: float | None) -> None:
        if seconds is None:
            seconds = self._limits[phase]
        # Cheap, since it is done several times a step: the threads look by themselves.
        self._now = (phase, seconds, time.monotonic() + seconds)

    def _keep_looking(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            phase, seconds, end = self._now
            left = end - time.monotonic()
            if left < 0:
                self._give_up(phase, seconds)
            # The original stderr: others may have no file descriptor.
            faulthandler.dump_traceback_later(left + _GRACE_SECONDS, exit=True, file=sys.__stderr__)

    def _give_up(self, phase: str, seconds: float) -> None:
        advice = ''
        if phase in self._limits:
            advice = f' If it is only slow here, raise --config.limits.{phase}.'
        logging.error(
            'Phase %r hangs: no sign of life for %g s. The same command resumes.%s Stacks of all '
            'threads:',
            phase,
            seconds,
            advice,
        )
        logging.flush()
        faulthandler.dump_traceback(file=sys.__stderr__)
        os._exit(1)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def watching(limits: Mapping[str, float]) -> Iterator[None]:
    """Watches this process until the block ends; the first phase is the first of the limits.

    Args:
      limits: seconds by the name of the phase.
    """
    global _watch
    told = ', '.join(f'{phase} {seconds:g} s' for phase, seconds in limits.items())
    logging.info('A phase without a sign of life for this long ends the process: %s.', told)

    _watch = _Watch(limits)
    try:
        yield
    finally:
        _watch.end()
        _watch = None


def enter(phase: str, seconds: float | None = None) -> None:
    """Says that a phase begins or goes on; nothing happens where nobody watches.

    Args:
      phase: one of the limits' names, or any if `seconds` is given.
      seconds: instead of the phase's own limit.
    """
    if _watch is not None:
        _watch.enter(phase, seconds)
