"""metrics.jsonl stays valid and without repeated steps; speed, ETA and tables are right."""

import json
import logging
import pathlib
import re
import struct
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT, free_port

from mask2dit_jax import logs, tables
from mask2dit_jax.training import metric_writer


def _refuse(constant):
    raise AssertionError(f'{constant} is not JSON')


def _records(workdir):
    lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line, parse_constant=_refuse) for line in lines]


@pytest.mark.parametrize(
    'seconds, text',
    [
        (12, '12s'),
        (0.2, '0s'),
        (59.6, '1m00s'),
        (209, '3m29s'),
        (3599.7, '1h00m'),
        (3720, '1h02m'),
        (360000, '100h00m'),
    ],
)
def test_format_eta(seconds, text):
    assert logs.format_eta(seconds) == text


def test_non_finite_values_keep_the_file_valid_json(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path / 'run', 10)
    metrics = {
        'loss': np.float32('nan'),
        'grad_norm': float('inf'),
        'low': -np.inf,
        'lr': np.float32(0.5),
    }
    writer.write(1, metrics)

    assert _records(tmp_path / 'run') == [
        {'step': 1, 'loss': 'nan', 'grad_norm': 'inf', 'low': '-inf', 'lr': 0.5}
    ]
    writer.close()


def test_each_line_is_on_disk_at_once(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path, 10)
    for step in (1, 2):
        writer.write(step, {'loss': 1.0})
        assert len(_records(tmp_path)) == step

    writer.close()
    writer.write(3, {'loss': 1.0})
    assert len(_records(tmp_path)) == 2


def test_resume_keeps_old_steps_and_drops_later_and_torn_ones(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path, 100)
    for step in (10, 20, 30):
        writer.write(step, {'loss': step})
    writer.close()

    # As if the run was killed while it wrote a line.
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 4')

    writer = metric_writer.MetricWriter(tmp_path, 100, start_step=20)
    assert [record['step'] for record in _records(tmp_path)] == [10, 20]

    writer.write(30, {'loss': -1.0})
    writer.close()
    steps_and_losses = [(record['step'], record['loss']) for record in _records(tmp_path)]
    assert steps_and_losses == [(10, 10), (20, 20), (30, -1)]
    assert {path.name for path in tmp_path.iterdir()} <= {'metrics.jsonl', 'tensorboard'}


def _events(path):
    """The events of one TensorBoard file, whose records are: length, its checksum, data, its
    checksum."""
    from tensorboardX.proto import event_pb2

    data = path.read_bytes()
    while data:
        (size,) = struct.unpack('<Q', data[:8])
        yield event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def _board(workdir):
    """What TensorBoard shows: {name: {step: scalar, or size of an image}}.

    A file that starts at a step hides what earlier files say about this step and later ones.
    """
    shown = {}
    for path in sorted((workdir / 'tensorboard').iterdir()):
        for event in _events(path):
            if event.session_log.status == event.session_log.START:
                shown = {
                    name: {step: value for step, value in values.items() if step < event.step}
                    for name, values in shown.items()
                }

            for value in event.summary.value:
                values = shown.setdefault(value.tag, {})
                assert event.step not in values
                if value.HasField('simple_value'):
                    values[event.step] = value.simple_value
                else:
                    values[event.step] = (value.image.height, value.image.width)
    return shown


def test_tensorboard_shows_what_the_file_says_and_no_step_twice(tmp_path):
    pytest.importorskip('tensorboardX')
    PIL.Image.new('RGB', (6, 4)).save(tmp_path / 'sheet.png')

    # The first run is not closed, as if it was killed.
    killed = metric_writer.MetricWriter(tmp_path, 100)
    for step in (10, 20, 30):
        killed.write(step, {'loss': step})
    killed.write_images(20, {'generated': tmp_path / 'sheet.png'})

    end = time.monotonic() + 300
    while 'generated' not in _board(tmp_path) and time.monotonic() < end:
        time.sleep(0.5)
    assert set(_board(tmp_path)['loss']) == {10, 20, 30}

    # Names of files have whole seconds: the second run must start in another one.
    time.sleep(1.1)
    writer = metric_writer.MetricWriter(tmp_path, 100, start_step=20)
    writer.write(30, {'loss': -1.0})
    writer.write(40, {'loss': -2.0})
    writer.close()

    board = _board(tmp_path)
    assert board.pop('generated') == {20: (4, 6)}
    assert board.keys() == {'loss', 'steps_per_second'}
    assert len(board['loss']) == 4
    for name, values in board.items():
        in_file = {record['step']: record[name] for record in _records(tmp_path) if name in record}
        assert values == pytest.approx(in_file), name


def test_without_tensorboard_a_line_says_how_to_get_it(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sys, 'path', [])
    monkeypatch.delitem(sys.modules, 'tensorboardX', raising=False)

    with caplog.at_level(logging.INFO, logger='absl'):
        metric_writer.MetricWriter(tmp_path, 100).write_images(1, {})

    assert "pip install 'mask2dit_jax[tensorboard]'" in caplog.text
    assert not (tmp_path / 'tensorboard').exists()


def test_a_full_disk_names_the_file(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path, 100)
    writer._file = open('/dev/full', 'a')  # noqa: SIM115

    with pytest.raises(OSError, match=r'/dev/full cannot be written \(No space left on device\)'):
        writer.write(1, {'loss': 1.0})


@pytest.mark.parametrize(
    'content, steps, bad',
    [
        (b'{"step": 1}\nnonsense\n{"step": 2}\n', [1, 2], [b'nonsense']),
        (b'{"step": 1}\n{"step": 2}\n{"st', [1, 2], None),
        (b'{"step": 1}\n{"step": 2}\n' + bytes(4096), [1, 2], None),
        (b'{"step": 1}\n' + bytes(64) + b'{"step": 2}\n', [1, 2], None),
        (b'{"step": 1}\n\xff\xfe{}\n{"step": 2}\n', [1, 2], [b'\xff\xfe{}']),
        (b'{"step": 1}\n{"step": 1, "x": 2}\n', [1], [b'{"step": 1}']),
        (b'{"step": 1}\n\n' + b'[' * 100_000 + b'\n', [1], [b'', b'[' * 100_000]),
        (b'{"step": 9}\n{"step": 1}\n', [1], None),
        (
            b'\n'.join(junk := [b'5', b'null', b'[]', b'{}', b'"a"', b'{"step": "1"}']) + b'\n',
            [],
            junk,
        ),
        (b'{"step": true}\n{"step": 1.5}\n{"step": NaN}\n{"step": 3}\n', [3], 3),
        (b'', [], None),
    ],
)
def test_lines_that_are_no_records_are_set_aside(tmp_path, content, steps, bad, caplog):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger='absl'):
        writer = metric_writer.MetricWriter(tmp_path, 10, start_step=5)
    assert [record['step'] for record in _records(tmp_path)] == steps

    aside = tmp_path / 'metrics.jsonl.bad'
    assert aside.exists() == ('moved to metrics.jsonl.bad' in caplog.text) == (bad is not None)
    if bad is not None:
        lines = aside.read_bytes().splitlines()
        assert lines == bad if isinstance(bad, list) else len(lines) == bad

    writer.write(6, {'loss': 1.0})
    assert [record['step'] for record in _records(tmp_path)] == [*steps, 6]
    writer.close()


def test_a_board_that_cannot_be_written_does_not_end_a_run(tmp_path, caplog):
    pytest.importorskip('tensorboardX')
    (tmp_path / 'tensorboard').write_text('a file')
    writer = metric_writer.MetricWriter(tmp_path, 10)
    writer.write(1, {'loss': 1.0})
    writer.close()
    assert 'No TensorBoard files are written' in caplog.text


def test_remote_folder_is_an_error():
    with pytest.raises(ValueError, match='gs://bucket/run'):
        metric_writer.MetricWriter('gs://bucket/run', 10)


def _speed(*marks):
    return metric_writer._speed([metric_writer._Mark(*mark) for mark in marks])


def test_speed_spans_the_first_to_the_last_mark():
    assert _speed((100.0, 5)) is None
    assert _speed((100.0, 5), (101.0, 5)) is None
    assert _speed((100.0, 10), (101.0, 20), (104.0, 50)) == pytest.approx(10)


def test_speed_forgets_marks_older_than_the_window(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path, 10**9)
    for step in range(30):
        writer.write(step, {})

    assert [mark.step for mark in writer._marks] == list(range(19, 30))
    writer.close()


def test_first_record_has_no_speed_and_later_ones_have(tmp_path, caplog):
    writer = metric_writer.MetricWriter(tmp_path, 4000)
    with caplog.at_level(logging.INFO, logger='absl'):
        writer.write(1, {'loss': 0.5})
        writer.write(1200, {'loss': 0.12344, 'grad_norm': 0.56})
        writer.write(1200, {'lr': 1e-4})  # an evaluation at the same step keeps the speed
    writer.close()

    first, second, third = (record.get('steps_per_second') for record in _records(tmp_path))
    assert first is None
    assert second > 0
    assert third > 0

    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == 'step 1/4000 | loss 0.5'
    assert re.fullmatch(
        r'step 1200/4000 \| [\d.]+ steps/s \| ETA \d+s \| loss 0.1234 \| grad_norm 0.56', lines[1]
    )
    assert lines[2].endswith('| lr 0.0001')


@pytest.mark.parametrize(
    'speed, text', [(13.44, '13.4 steps/s | ETA 3m28s'), (0.05124, '0.0512 steps/s | ETA 15h10m')]
)
def test_log_line_speed_and_eta(tmp_path, speed, text):
    writer = metric_writer.MetricWriter(tmp_path, 4000)
    assert writer._log_line(1200, {}, speed) == f'step 1200/4000 | {text}'
    assert 'ETA 0s' in writer._log_line(4001, {}, speed)
    writer.close()


_PROCESS = """
import sys
import jax
from mask2dit_jax.training import metric_writer

port, index, workdir = sys.argv[1:]
jax.distributed.initialize(f'localhost:{port}', 2, int(index))
writer = metric_writer.MetricWriter(f'{workdir}/{index}', 10)
writer.write(1, {'loss': float(index)})
writer.close()
"""


def test_only_process_0_writes(tmp_path):
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', _PROCESS, port, str(index), str(tmp_path)], cwd=ROOT
        )
        for index in range(2)
    ]

    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert _records(tmp_path / '0') == [{'step': 1, 'loss': 0.0}]
    assert not (tmp_path / '1').exists()


def test_format_table():
    rows = [
        {'pattern': 'dual', 'cut': 0.98765432, 'steps': 12345},
        {'pattern': 'a|b', 'steps': 7},
    ]
    assert tables.format_table(rows, ['pattern', 'cut', 'steps']).splitlines() == [
        '| pattern |    cut | steps |',
        '| ------- | -----: | ----: |',
        '| dual    | 0.9877 | 12345 |',
        r'| a\|b    |        |     7 |',
    ]
