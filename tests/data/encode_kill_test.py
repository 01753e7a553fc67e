"""Encode is killed before one of its file operations: nothing that it leaves is misread, and the
same command makes what it would have made without the kill."""

import csv
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import child_environment, moving

from mask2dit_jax import storage
from mask2dit_jax.data import records as records_lib
from mask2dit_jax.data import video
from mask2dit_jax.tools import random_model

# Kills its process before the argv[2]-th operation on a file of the folder argv[1], where the
# commands of argv[3:] say which functions run.
KILLER = """
import os, signal, sys

OPERATIONS = ('open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.utime')

def kill_before(folder, number):
    seen = 0
    def observe(event, args):
        nonlocal seen
        if event in OPERATIONS and str(args[0]).startswith(folder):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(observe)
"""

# Each kill has a fork of its own, since importing takes far longer than the work.
EVERY_KILL = (
    KILLER
    + """
import pathlib, shutil
from mask2dit_jax.data import precompute, records

manifest, folder = sys.argv[1:3]
kills = [int(kill) for kill in sys.argv[3:]]
job = precompute.Job(manifest, None, None, 5, 32, 32, store='frames', part_clips=2)
work = pathlib.Path(folder)

def forked(function):
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def content(out):
    data = records.Records(out)
    clips = [data[i] for i in range(len(data))]
    return [data.fingerprint, *((clip['path'], clip['video'].tobytes()) for clip in clips)]

def whole():
    assert precompute.precompute(job, work / 'whole')

def killed():
    kill_before(str(out), kill)
    precompute.precompute(job, out)

def read():
    try:
        found = content(out)
    except (FileNotFoundError, ValueError) as error:
        assert 'is not finished' in str(error) or 'is not a data set' in str(error), error
    else:
        assert found == content(work / 'whole')

def continued():
    assert precompute.precompute(job, out)
    assert content(out) == content(work / 'whole')
    assert '3 of 3 clips' in (out / 'report.md').read_text()
    assert sorted(os.listdir(out)) == sorted(os.listdir(work / 'whole')), os.listdir(out)

assert forked(whole) == 0
survived = 0
for kill in kills or range(1, 1000):
    out = work / f'killed-{kill}'
    code = forked(killed)
    assert code in (-9, 0), code
    for action in (read, continued):
        assert forked(action) == 0, (kill, action)
    shutil.rmtree(out)
    if code == 0:
        break  # there is no such operation: all were tried
print(kill)
"""
)


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    """Three shots in clips.csv."""
    root = tmp_path_factory.mktemp('videos')
    film = moving(3 * 24)
    for i in range(3):
        video.write_mp4(root / f'{i}.mp4', film[24 * i : 24 * (i + 1)], 25)
    with (root / 'clips.csv').open('w', newline='') as file:
        csv.writer(file).writerows(
            [('caption', 'path'), *((f'shot {i}', f'{i}.mp4') for i in range(3))]
        )
    return root


def run_kills(videos, folder, *kills):
    """Kills before operations of these numbers, or before every one; returns the last number."""
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            EVERY_KILL,
            str(videos / 'clips.csv'),
            str(folder),
            *map(str, kills),
        ],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout.split()[-1])


def test_some_kills(videos, tmp_path):
    kills = np.random.default_rng(0).choice(np.arange(1, 60), 6, replace=False)
    run_kills(videos, tmp_path, *kills)


@pytest.mark.slow
def test_a_kill_before_every_operation(videos, tmp_path):
    assert run_kills(videos, tmp_path) > 40


def encode(videos, folder, out):
    return [
        f'--manifest={videos}/clips.csv',
        f'--checkpoint={folder}',
        f'--out={out}',
        '--frames=5',
        '--dtype=float32',
        '--part_clips=1',
        '--height=32',
        '--width=32',
    ]


COMMAND = (
    KILLER
    + """
import runpy
kill_before(sys.argv[1], int(sys.argv[2]))
sys.argv = ['encode', *sys.argv[3:]]
runpy.run_module('mask2dit_jax.encode', run_name='__main__')
"""
)


@pytest.mark.slow
def test_ten_kills_of_one_data_set(videos, tmp_path):
    """The command itself, with its networks, is killed again and again, later and later."""
    random_model.write(tmp_path / 'tiny')

    def run(out, kill):
        arguments = [str(out), str(kill), *encode(videos, tmp_path / 'tiny', out)]
        done = subprocess.run(
            [sys.executable, '-c', COMMAND, *arguments],
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode in (0, -9), done.stdout[-3000:]
        return done.returncode

    assert run(tmp_path / 'whole', -1) == 0
    expected = records_lib.Records(tmp_path / 'whole')

    out = tmp_path / 'killed'
    rng = np.random.default_rng(1)
    kept = {}
    for kill in np.sort(rng.choice(np.arange(1, 40), 10, replace=False)):
        if run(out, kill) == 0:
            break
        with pytest.raises((FileNotFoundError, ValueError), match='is not'):
            records_lib.Records(out)
        # What was whole stays as it is.
        times = {path.name: path.stat().st_mtime_ns for path in out.glob('*-of-00003')}
        assert kept.items() <= times.items()
        kept = times

    assert run(out, -1) == 0
    found = records_lib.Records(out)
    assert found.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(found.rows, expected.rows)
    for i in range(3):
        for key in expected[i]:
            np.testing.assert_array_equal(found[i][key], expected[i][key])
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / 'whole'))
    assert pathlib.Path(out / 'report.md').read_text().startswith('# single_scene')


@pytest.mark.slow
def test_workers_at_the_same_time(videos, tmp_path):
    """Four share the work, and one more for the same share is refused while it is at work."""
    out = tmp_path / 'out'

    def start(worker):
        return subprocess.Popen(
            [
                sys.executable,
                '-m',
                'mask2dit_jax.encode',
                f'--manifest={videos}/clips.csv',
                '--store=frames',
                f'--out={out}',
                '--frames=5',
                '--height=32',
                '--width=32',
                '--windows=40',
                '--part_clips=2',
                '--num_workers=4',
                f'--worker={worker}',
            ],
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    with storage.claim(out / 'workers/2-of-4'):
        refused = start(2)
        said, _ = refused.communicate()
    assert refused.returncode != 0 and f'is being written by process {os.getpid()}' in said

    workers = [start(worker) for worker in range(4)]
    said = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, said
    assert any('120 of 120 clips are in the data set' in text for text in said)
    data = records_lib.Records(out)
    assert data.rows['story'].tolist() == list(range(120))
    assert all(data[i]['path'].decode().endswith(f'{i // 40}.mp4') for i in range(120))
    assert not list(out.glob('*.unfinished')) and not (out / 'workers').exists()
