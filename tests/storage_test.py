"""A folder has one owner at a time, and a file of ours is whole or not there."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from mask2dit_jax import storage

# Claims the folder argv[1], says so, and keeps it until a line comes.
HOLD = """
import sys
from mask2dit_jax import storage
with storage.claim(sys.argv[1]) as held:
    print('held', flush=True)
    sys.stdin.readline()
    held.check()
"""


def start_owner(folder):
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == 'held\n'
    return process


def test_a_living_owner_is_named_and_kept(tmp_path):
    owner = start_owner(tmp_path / 'run')
    refused = pytest.raises(storage.ClaimedError, match=f'written by process {owner.pid} of host')
    with refused, storage.claim(tmp_path / 'run'):
        pass

    owner.communicate('\n')
    assert owner.returncode == 0
    assert os.listdir(tmp_path / 'run') == []


def test_waiting_for_a_living_owner(tmp_path):
    owner = start_owner(tmp_path)
    threading.Timer(1, owner.communicate, ['\n']).start()
    with storage.claim(tmp_path, waits=True) as held:
        assert owner.wait() == 0
        held.check()


def test_a_killed_owner_is_followed_at_once(tmp_path):
    owner = start_owner(tmp_path)
    owner.kill()
    owner.communicate()
    with storage.claim(tmp_path) as held:
        held.check()
    assert os.listdir(tmp_path) == []


def test_a_process_number_that_comes_again_is_another_process(tmp_path):
    owner = {'host': storage.socket.gethostname(), 'pid': os.getpid(), 'started': 'x 1'}
    (tmp_path / storage.OWNER_FILE).write_text(json.dumps(owner | {'token': 'a'}))
    with storage.claim(tmp_path):
        pass


def test_on_another_machine_silence_tells_that_the_owner_is_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, 'SILENCE_SECONDS', 1)
    owner_file = tmp_path / storage.OWNER_FILE
    there = {'host': 'elsewhere', 'pid': 1, 'started': 'x 1', 'token': 'a'}
    owner_file.write_text(json.dumps(there))

    # It lives: its file moves on.
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            os.utime(owner_file)

    thread = threading.Thread(target=beat)
    thread.start()
    refused = pytest.raises(storage.ClaimedError, match='process 1 of host elsewhere')
    with refused, storage.claim(tmp_path):
        pass
    stop.set()
    thread.join()

    # It is silent.
    with storage.claim(tmp_path) as held:
        held.check()


def test_an_owner_file_that_was_never_written_does_not_block(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, 'SILENCE_SECONDS', 1)
    (tmp_path / storage.OWNER_FILE).touch()
    with storage.claim(tmp_path):
        pass


def test_a_process_that_stood_still_notices_who_took_over(tmp_path, monkeypatch):
    owner = start_owner(tmp_path)
    owner.send_signal(signal.SIGSTOP)
    owner_file = tmp_path / storage.OWNER_FILE
    there = json.loads(owner_file.read_text()) | {'host': 'elsewhere'}
    owner_file.write_text(json.dumps(there))

    monkeypatch.setattr(storage, 'SILENCE_SECONDS', 1)
    with storage.claim(tmp_path) as held:
        owner.send_signal(signal.SIGCONT)
        _, errors = owner.communicate('\n')
        assert owner.returncode != 0
        assert f'taken over by process {os.getpid()} of host' in errors
        held.check()  # the other one's end did not take the folder away


def test_one_of_many_takes_over(tmp_path):
    """Ten processes find the same dead owner at once; one gets the folder."""
    dead = start_owner(tmp_path)
    dead.kill()
    dead.communicate()

    processes = [
        subprocess.Popen(
            [sys.executable, '-c', HOLD, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(10)
    ]
    # Those who are refused end by themselves; the one that is not waits for its line.
    said = [process.stdout.readline() for process in processes]
    assert said.count('held\n') == 1
    for process in processes:
        process.communicate('\n')
    assert [p.returncode for p in processes].count(0) == 1
    assert os.listdir(tmp_path) == []


def test_what_a_kill_during_a_takeover_leaves_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, 'SILENCE_SECONDS', 1)
    owner = {'host': storage.socket.gethostname(), 'pid': 1, 'started': 'x 1', 'token': 'a'}
    (tmp_path / storage.OWNER_FILE).write_text(json.dumps(owner))
    (tmp_path / f'{storage.OWNER_FILE}.after-a').touch()
    with pytest.raises(storage.ClaimedError, match='delete'), storage.claim(tmp_path):
        pass


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / 'a.json'
    storage.write_text(path, 'before')
    with pytest.raises(OSError, match='full'), storage.whole_file(path) as temporary:
        temporary.write_text('half')
        raise OSError('full')
    assert path.read_text() == 'before'
    assert os.listdir(tmp_path) == ['a.json']

    with storage.whole_file(path) as temporary:
        temporary.write_text('after')
        assert path.read_text() == 'before'
    assert path.read_text() == 'after'
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_unfinished_file_is_found_by_no_pattern(tmp_path):
    with storage.whole_file(tmp_path / 'video_0.mp4') as temporary:
        temporary.touch()
        assert list(pathlib.Path(tmp_path).glob('*.mp4')) == []
