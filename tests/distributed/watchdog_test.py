"""A process that hangs says where and ends, whatever it hangs in; one that goes on lives."""

import subprocess
import sys

import pytest
from conftest import child_environment

CODE = """
import ctypes, time
from mask2dit_jax.distributed import watchdog

watchdog._GRACE_SECONDS = 1

def hang_here():
    HANG

with watchdog.watching({'start': 60, 'data': 1.5}):
    for _ in range(8):  # longer than the limit, but alive
        watchdog.enter('data')
        time.sleep(0.25)
    print('alive', flush=True)
    hang_here()
print('not reached')
"""


def run(hang):
    return subprocess.run(
        [sys.executable, '-c', CODE.replace('HANG', hang)],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    'hang, is_told',
    [
        ('time.sleep(1e6)', True),
        ("watchdog.enter('other', 0.5); time.sleep(1e6)", True),
        ('ctypes.PyDLL(None).sleep(1000)', False),  # no other thread of Python runs meanwhile
    ],
)
def test_a_hang_ends_the_process_and_says_where(hang, is_told):
    ended = run(hang)
    assert ended.returncode == 1
    assert ended.stdout == 'alive\n'
    assert 'in hang_here' in ended.stderr
    if is_told:
        phase = 'other' if 'other' in hang else 'data'
        assert f"Phase '{phase}' hangs: no sign of life for " in ended.stderr
        assert ('--config.limits.data' in ended.stderr) == (phase == 'data')


def test_after_the_block_nobody_watches():
    ended = run('return')
    assert (ended.returncode, ended.stdout) == (0, 'alive\nnot reached\n')
