"""Training metrics: one log line with speed and ETA, one JSON object per line in metrics.jsonl,
score tables.

Where tensorboardX is installed, the same scalars and the sample sheets go to <workdir>/tensorboard,
too.
"""

import collections
import importlib.util
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import PIL.Image
from absl import logging

from mask2dit_jax import logs

_WINDOW_WRITES = 10  # writes over which the speed is averaged


def _drop_steps_after(path: pathlib.Path, step: int) -> None:
    """Rewrites the file atomically without later steps and without a last line torn by a kill in
    mid-write."""
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
    lines = [line for line in lines if line.endswith('\n')]
    try:
        kept = [line for line in lines if json.loads(line)['step'] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} has a line that is no metrics record ({error}): repair or move the file.'
        ) from error
    rewritten = path.with_name(path.name + '.tmp')
    rewritten.write_text(''.join(kept), encoding='utf-8')
    os.replace(rewritten, path)


def _speed(marks: Sequence[tuple[float, int]]) -> float | None:
    """Steps per second from the first to the last (time, step); None while there is no such
    span."""
    (start, first), (end, last) = marks[0], marks[-1]
    return (last - first) / (end - start) if last > first and end > start else None


class MetricWriter:
    """Writes metrics to log, workdir/metrics.jsonl and TensorBoard on process 0; on others it does
    nothing."""

    def __init__(self, workdir, total_steps: int, start_step: int = 0):
        """Opens the file for appending.

        Args:
          workdir: local folder, made if needed.
          total_steps: the step at which training ends, for the ETA.
          start_step: the step resumed from. Records of later steps, written by a run that was
            killed after its last checkpoint, are removed: no step appears twice.

        Raises:
          ValueError: for a remote workdir, where files cannot be appended to, or a damaged
            metrics.jsonl.
        """
        self._total_steps = total_steps
        self._marks = collections.deque(maxlen=_WINDOW_WRITES + 1)
        self._file = None
        if '://' in os.fspath(workdir):
            raise ValueError(
                f'metrics.jsonl cannot be appended to in {workdir}: pass a local folder.'
            )
        if jax.process_index() != 0:
            return
        path = pathlib.Path(workdir) / 'metrics.jsonl'
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _drop_steps_after(path, start_step)
        self._file = path.open('a', encoding='utf-8')
        self._board = None
        if importlib.util.find_spec('tensorboardX') is None:
            logging.info(
                "No TensorBoard files are written: pip install 'mask2dit_jax[tensorboard]' for them."
            )
            return
        import tensorboardX

        # TensorBoard forgets what earlier files say of purge_step and later. Its thread writes
        # within flush_secs (its flush does not wait for the thread), so that a kill costs it a
        # record at most.
        self._board = tensorboardX.SummaryWriter(
            os.fspath(path.parent / 'tensorboard'), purge_step=start_step + 1, flush_secs=1
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one record and logs one line.

        The speed is averaged over the last writes. It starts at the first write, so that the
        compilation before it does not count; the first record hence has no speed. NaN and
        infinities become strings in the file.

        Args:
          step: the number of steps done.
          metrics: scalars by name; anything that `float` accepts.

        Raises:
          OSError: naming the file if it cannot be written.
        """
        if self._file is None:
            return
        self._marks.append((time.monotonic(), step))
        speed = _speed(self._marks)
        values = {name: float(value) for name, value in metrics.items()}
        record = {'step': step, **values} | ({} if speed is None else {'steps_per_second': speed})
        # JSON knows no NaN: a bare one would make the line unreadable to everything but Python.
        record = {
            name: value if math.isfinite(value) else str(value) for name, value in record.items()
        }
        try:
            self._file.write(json.dumps(record, allow_nan=False) + '\n')
            self._file.flush()
        except OSError as error:
            raise OSError(
                f'{self._file.name} cannot be written ({error.strerror}): make room or mend the disk, and '
                'the same command resumes.'
            ) from error
        if self._board is not None:
            for name, value in (
                values.items() if speed is None else [*values.items(), ('steps_per_second', speed)]
            ):
                self._board.add_scalar(name, value, step)
        logging.info('%s', self._log_line(step, values, speed))

    def _log_line(self, step: int, values: dict[str, float], speed: float | None) -> str:
        parts = [f'step {step}/{self._total_steps}']
        if speed is not None:
            parts.append(f'{speed:.1f} steps/s' if speed >= 10 else f'{speed:.3g} steps/s')
            parts.append(f'ETA {logs.format_eta(max(0, self._total_steps - step) / speed)}')
        return ' | '.join(parts + [f'{name} {value:.4g}' for name, value in values.items()])

    def write_images(self, step: int, images: Mapping[str, os.PathLike]) -> None:
        """Shows image files in TensorBoard, by name."""
        if self._file is None or self._board is None:
            return
        for name, path in images.items():
            self._board.add_image(
                name, np.asarray(PIL.Image.open(path).convert('RGB')), step, dataformats='HWC'
            )

    def close(self) -> None:
        """Closes the files; later writes do nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
            if self._board is not None:
                self._board.close()
