"""Training metrics: one log line with speed and ETA, and one JSON object per line in metrics.jsonl.

Where tensorboardX is installed, the same scalars and the sample grids also go to
<workdir>/tensorboard.
"""

import collections
import importlib.util
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import PIL.Image
from absl import logging

from mask2dit_jax import logs, paths, storage

_WINDOW_WRITES = 10  # the speed is averaged over the last ten writes


class _Mark(NamedTuple):
    """When a step was written."""

    seconds: float  # of time.monotonic
    step: int


def _speed(marks: Sequence[_Mark]) -> float | None:
    """Steps per second from the first mark to the last; None if steps or time did not advance."""
    steps = marks[-1].step - marks[0].step
    seconds = marks[-1].seconds - marks[0].seconds
    if steps <= 0 or seconds <= 0:
        return None
    return steps / seconds


def _step_of(line: bytes) -> int | None:
    """The step of a record; None if the line is no record."""
    try:
        step = json.loads(line.decode('utf-8'))['step']
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def _clean_up(path: pathlib.Path, last_step: int) -> None:
    """Leaves one record of each step up to `last_step` in a metrics.jsonl.

    Records of later steps are removed, and so is a last line without an end: the run was killed
    while it was written. Lines that are no records, and records of a step that comes again later in
    the file, are moved to metrics.jsonl.bad. The file is replaced in one operation: a kill leaves
    either the old or the new one.
    """
    content = path.read_bytes()
    # What a machine that lost its power had not written yet may be zeros.
    lines = [line.strip(b'\0') for line in content.split(b'\n')[:-1]]
    steps = [_step_of(line) for line in lines]
    last_place = {step: place for place, step in enumerate(steps)}

    kept = []
    bad = []
    for place, (line, step) in enumerate(zip(lines, steps)):
        if step is None or last_place[step] != place:
            bad.append(line)
        elif step <= last_step:
            kept.append(line)

    if bad:
        aside = path.with_name(f'{path.name}.bad')
        with aside.open('ab') as file:
            file.writelines(line + b'\n' for line in bad)
        logging.warning(
            '%d line(s) of %s are no record, or one of a step that comes again: moved to %s.',
            len(bad),
            path,
            aside.name,
        )
    rewritten = b''.join(line + b'\n' for line in kept)
    if rewritten != content:
        with storage.whole_file(path) as temporary:
            temporary.write_bytes(rewritten)


def _open_board(workdir: pathlib.Path, start_step: int):
    """TensorBoard's writer; None where tensorboardX is not installed."""
    if importlib.util.find_spec('tensorboardX') is None:
        logging.info(
            "No TensorBoard files are written: pip install 'mask2dit_jax[tensorboard]' for them."
        )
        return None

    import tensorboardX

    try:
        return tensorboardX.SummaryWriter(
            os.fspath(workdir / 'tensorboard'),
            # TensorBoard hides what earlier files say about this step and later ones.
            purge_step=start_step + 1,
            # tensorboardX writes in a thread, for which its flush() does not wait. With one second
            # between writes, a kill costs at most one record.
            flush_secs=1,
        )
    except OSError as error:
        # metrics.jsonl holds the same: no reason to end a run.
        logging.warning('No TensorBoard files are written: %s.', error)
        return None


class MetricWriter:
    """Writes metrics to the log, metrics.jsonl and TensorBoard.

    Only process 0 writes; on the others the methods do nothing.
    """

    def __init__(self, workdir, total_steps: int, start_step: int = 0):
        """Opens the file for appending.

        Args:
          workdir: local folder, made if needed.
          total_steps: the step at which training ends, for the ETA.
          start_step: the step from which the run is resumed. Records of later steps, written by a
            run that was killed after its last checkpoint, are removed: no step appears twice.
            Lines that are no records are moved to metrics.jsonl.bad.

        Raises:
          ValueError: for a remote workdir, where files cannot be appended to.
        """
        self._total_steps = total_steps
        self._marks = collections.deque(maxlen=_WINDOW_WRITES + 1)
        self._file = None
        self._board = None

        paths.check_local(workdir=workdir)
        if jax.process_index() != 0:
            return

        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)

        path = workdir / 'metrics.jsonl'
        if path.exists():
            _clean_up(path, start_step)
        self._file = path.open('a', encoding='utf-8')

        self._board = _open_board(workdir, start_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one record and logs one line.

        The speed is averaged over the last writes. The first record has no speed: timing starts
        with this record, so that the compilation before it does not count. NaN and infinities
        become strings in the file.

        Args:
          step: the number of steps done.
          metrics: scalars by name; anything that `float` accepts.

        Raises:
          OSError: naming the file if it cannot be written.
        """
        if self._file is None:
            return

        self._marks.append(_Mark(time.monotonic(), step))
        speed = _speed(self._marks)

        values = {name: float(value) for name, value in metrics.items()}
        recorded = dict(values)
        if speed is not None:
            recorded['steps_per_second'] = speed

        self._append_to_file({'step': step} | recorded)

        if self._board is not None:
            for name, value in recorded.items():
                self._board.add_scalar(name, value, step)

        logging.info('%s', self._log_line(step, values, speed))

    def _append_to_file(self, record: dict[str, float]) -> None:
        """Writes one line, which is in the file when this returns."""
        # JSON has no NaN: a bare one would make the line unreadable to all programs but Python.
        record = {
            name: value if math.isfinite(value) else str(value) for name, value in record.items()
        }

        try:
            self._file.write(json.dumps(record, allow_nan=False) + '\n')
            self._file.flush()
        except OSError as error:
            raise OSError(
                f'{self._file.name} cannot be written ({error.strerror}): make room or mend the '
                'disk, and the same command resumes.'
            ) from error

    def _log_line(self, step: int, values: dict[str, float], speed: float | None) -> str:
        """The line for people, e.g. 'step 10/100 | 2.5 steps/s | ETA 36s | loss 0.51'."""
        parts = [f'step {step}/{self._total_steps}']

        if speed is not None:
            digits = f'{speed:.1f}' if speed >= 10 else f'{speed:.3g}'
            steps_left = max(0, self._total_steps - step)
            parts.append(f'{digits} steps/s')
            parts.append(f'ETA {logs.format_eta(steps_left / speed)}')

        parts += [f'{name} {value:.4g}' for name, value in values.items()]
        return ' | '.join(parts)

    def write_images(self, step: int, images: Mapping[str, os.PathLike]) -> None:
        """Shows image files in TensorBoard.

        Args:
          step: the number of steps done.
          images: paths of the files by the name under which TensorBoard shows each.
        """
        if self._file is None or self._board is None:
            return

        for name, path in images.items():
            pixels = np.asarray(PIL.Image.open(path).convert('RGB'))  # [H, W, 3]
            self._board.add_image(name, pixels, step, dataformats='HWC')

    def close(self) -> None:
        """Closes the files; later writes do nothing."""
        if self._file is None:
            return

        self._file.close()
        self._file = None

        if self._board is not None:
            self._board.close()
