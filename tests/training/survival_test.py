"""Runs of `main` that are killed, stopped, out of disk space or left by a peer, and how they
resume.

What happens to a process, it does to itself at a marked point (see killing.py), so that the order
of things does not depend on how busy the machine is.
"""

import collections
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorstore as ts
from conftest import ROOT, TESTS, free_port

STEPS = 10
FLAGS = [
    '--config=configs/tiny.py:smoke',
    *(
        f'--config.{value}'
        for value in (
            'model.num_layers=1',
            'model.remat=none',
            'optimizer.name=adamw',
            'data.num_train=32',
            'data.num_test=2',
            f'train.steps={STEPS}',
            'train.log_every_steps=1',
            'train.checkpoint_every_steps=2',
            'train.sample_every_steps=100',
            'train.keep_checkpoints=100',
            'sample.steps=1',
            'eval.stories=2',
            'eval.batch_size=2',
        )
    ),
]

# Runs main. It also writes down every batch that is made, and then does what the test says.
CODE = """
import hashlib, json, os, signal, sys, time

# pytest may have been started with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# tensorboardX imports torch where it can, which takes as long as everything else.
sys.modules['torch'] = None

import killing
from absl import app
from mask2dit_jax import main
from mask2dit_jax.data import batches
from mask2dit_jax.distributed import multihost

def observed(self, step, rows, make=batches.Batches.__call__):
    layout, batch = make(self, step, rows)
    for i, row in enumerate(rows):
        digest = hashlib.sha256(b''.join(batch[k][i].tobytes() for k in sorted(batch))).hexdigest()
        with open(os.environ['SEEN'], 'a') as file:
            file.write(json.dumps([step, row, digest]) + '\\n')
    disturb(step)
    return layout, batch

batches.Batches.__call__ = observed
disturb = lambda step: None
exec(os.environ.get('DISTURB', ''))
app.run(main.main)
"""


class Run:
    """A workdir, and processes of main on it."""

    def __init__(self, folder: pathlib.Path, base: pathlib.Path):
        """Makes the folder.

        Args:
          folder: the workdir.
          base: a folder that several runs share, for data and the compilation cache.
        """
        self.workdir = folder
        self.base = base
        self.starts = 0
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *flags, count=1, disturb=None) -> list[subprocess.Popen]:
        """Starts the processes of one run.

        Args:
          *flags: more flags of main.
          count: the number of processes.
          disturb: code that a process runs before main, by the number of the process.
        """
        disturb = disturb or {}
        port = free_port()

        started = []
        for i in range(count):
            env = os.environ | {
                'JAX_PLATFORMS': 'cpu',
                'PYTHONPATH': f'{ROOT}{os.pathsep}{TESTS}',
                'JAX_COMPILATION_CACHE_DIR': str(self.base / 'cache'),
                'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
                'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
                'SEEN': f'{self.workdir}/seen.{self.starts}.{i}',
                'DISTURB': disturb.get(i, ''),
            }

            command = [
                sys.executable,
                '-c',
                CODE,
                *FLAGS,
                f'--config.data.dir={self.base}/data',
                f'--workdir={self.workdir}',
            ]
            if count > 1:
                command += [
                    f'--coordinator=localhost:{port}',
                    f'--num_processes={count}',
                    f'--process_id={i}',
                ]
            command += flags

            log = open(f'{self.workdir}/log.{self.starts}.{i}', 'w')  # noqa: SIM115
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT
            )
            started.append(process)

        self.starts += 1
        return started

    def finish(self, *flags, **kwargs):
        """Starts processes and waits until all have succeeded."""
        started = self.start(*flags, **kwargs)
        assert [process.wait(900) for process in started] == [0] * len(started), self.log()

    def log(self, i=0) -> str:
        """The output of a process of the last start."""
        return pathlib.Path(f'{self.workdir}/log.{self.starts - 1}.{i}').read_text()

    def records(self) -> dict[int, dict]:
        """Metrics by step; no step comes twice."""
        path = self.workdir / 'metrics.jsonl'
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith('\n')]

        by_step = {record['step']: record for record in records}
        assert len(by_step) == len(records)
        return by_step

    def curve(self) -> dict[int, tuple]:
        """Loss and gradient norm by step."""
        return {
            step: (record['loss'], record['grad_norm']) for step, record in self.records().items()
        }

    def batches(self) -> dict[tuple[int, int], set]:
        """Digests of what was seen at each step and row, in all starts by all processes."""
        seen = collections.defaultdict(set)
        for path in self.workdir.glob('seen.*'):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith('\n'):
                    step, row, digest = json.loads(line)
                    seen[step, row].add(digest)
        return seen

    def state(self, step) -> dict[str, np.ndarray]:
        """All arrays of a checkpoint, read by tensorstore alone."""
        arrays = {}
        for item in ('params', 'ema', 'opt'):
            store = {'driver': 'ocdbt', 'base': f'file://{self.workdir}/checkpoints/{step}/{item}/'}
            for key in ts.KvStore.open(store).result().list().result():
                name, kind = key.decode().rsplit('/', 1)
                if kind != '.zarray':
                    continue
                spec = {'driver': 'zarr', 'kvstore': store | {'path': name + '/'}}
                array = ts.open(spec).result()
                arrays[f'{item}/{name}'] = array.read().result()
        return arrays

    def saved(self) -> list[int]:
        """Steps of the finished checkpoints."""
        names = [path.name for path in (self.workdir / 'checkpoints').glob('*')]
        return sorted(int(name) for name in names if name.isdigit())

    def half_written(self) -> list[pathlib.Path]:
        """Checkpoints that a process did not finish."""
        return list((self.workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp*'))


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return tmp_path_factory.mktemp('survival')


@pytest.fixture(scope='module')
def straight(base):
    """An uninterrupted run."""
    run = Run(base / 'straight', base)
    run.finish()
    assert run.saved() == [2, 4, 6, 8, 10]
    assert len(run.batches()) == STEPS * 16
    return run


@pytest.fixture
def started_processes():
    """A list of processes, which are killed if the test leaves them running."""
    started = []
    yield started

    for process in started:
        process.kill()
        process.wait()


def assert_same_bits(run, other, steps=STEPS):
    ours = run.state(steps)
    theirs = other.state(steps)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 100
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)

    assert run.curve() == other.curve()
    assert run.batches() == other.batches()


def assert_close(run, other):
    """Equal but for rounding: sums over devices have another order."""
    steps = range(1, STEPS + 1)
    our_curve = run.curve()
    their_curve = other.curve()
    np.testing.assert_allclose(
        [our_curve[step] for step in steps], [their_curve[step] for step in steps], rtol=5e-5
    )

    ours = run.state(STEPS)
    theirs = other.state(STEPS)
    for name in theirs:
        if name.startswith('ema/'):
            np.testing.assert_allclose(ours[name], theirs[name], atol=5e-4, err_msg=name)

    assert run.batches() == other.batches()


def at_batch(step, action) -> str:
    """Code by which a process does something to itself when it makes the batch of a step."""
    return f'disturb = lambda step: {action} if step == {step} else None\n'


# Code that kills the process at a marked point.
DIE = """
from mask2dit_jax import checkpoint, storage
from mask2dit_jax.stories import builder, scores
from mask2dit_jax.training import trainer, validation

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def at_call(count, function):
    calls = []
    def counted(*args, **kwargs):
        calls.append(1)
        return die() if len(calls) == count else function(*args, **kwargs)
    return counted

def before_rename(name):
    def replace(source, target, do=os.replace):
        return die() if str(target).endswith(name) else do(source, target)
    os.replace = replace
"""
# In this order each is met: the run has come far enough.
KILL_POINTS = {
    'start': 'trainer.mesh_lib.make_mesh = die',
    'the codec': "before_rename('codec.safetensors')",
    'rendering': 'builder.make_story = at_call(20, builder.make_story)',
    'config.json': "before_rename('config.json')",
    'compiling': """
def jit_steps(*args, make=trainer._jit_steps):
    steps = make(*args)
    def compile(step):
        return lambda *args: (step.lower(*args), die())
    return {layout: compile(step) for layout, step in steps.items()}
trainer._jit_steps = jit_steps
""",
    'a record': 'checkpoint.check = at_call(3, checkpoint.check)',
    'metrics.jsonl': "before_rename('metrics.jsonl')",
    'restoring': 'checkpoint._array_checksum = die',
    'a batch': 'disturb = lambda step: die() if step % 4 == 3 else None',
    'a sample grid': 'validation.sheets.story_grid = at_call(2, validation.sheets.story_grid)',
    'a picture of a saved step': "before_rename('00000010_extended.png')",
    'a save': 'checkpoint.save = lambda *a, do=checkpoint.save: die(do(*a))',
    'the last save': 'checkpoint.finish = die',
    'scoring': 'scores.score = at_call(2, scores.score)',
    'scores.md': "before_rename('scores.md')",
}


def final_files(run):
    """What a finished run leaves beside metrics and checkpoints, by name."""
    files = [*run.workdir.glob('sheets/*'), *run.workdir.glob('scores.*')]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize('kills, steps', [(2, STEPS), pytest.param(20, 40, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bit_equal(straight, base, kills, steps):
    """Kills at random batches and in saves; the slow variant first kills at every marked point
    too, with data of its own that is to be rendered."""
    flags = [f'--config.train.steps={steps}']
    points = []
    if steps != STEPS:
        flags.append('--config.train.sample_every_steps=10')
        straight = Run(base / f'straight_{steps}', base)
        straight.finish(*flags)
        flags.append(f'--config.data.dir={base}/data_{kills}')
        points = list(KILL_POINTS)

    run = Run(base / f'killed_{kills}', base)
    last = points.index('the last save') if points else 0
    for point in points[:last]:
        (process,) = run.start(*flags, disturb={0: DIE + KILL_POINTS[point]})
        assert process.wait(900) == -signal.SIGKILL, run.log()
        print(f'killed at {point}, saved {run.saved()}')

    rng = random.Random(kills)
    for i in range(kills - len(points)):
        saved = max(run.saved(), default=0)
        in_save = i % 3 == 0
        if in_save:
            step = min(saved + rng.choice([2, 4]), steps)
            code = f"killing.before('os.rename', '/checkpoints/{step}')"
        else:
            step = min(saved + rng.randint(1, 4), steps - 1)
            code = at_batch(step, 'killing.kill()')

        (process,) = run.start(*flags, disturb={0: code})
        assert process.wait(900) == -signal.SIGKILL, run.log()
        if in_save:
            assert run.half_written() and step not in run.saved()
    assert max(run.saved(), default=0) < steps

    for point in points[last:]:
        (process,) = run.start(*flags, disturb={0: DIE + KILL_POINTS[point]})
        assert process.wait(900) == -signal.SIGKILL, run.log()
        print(f'killed at {point}')

    run.finish(*flags)
    assert_same_bits(run, straight, steps)
    assert not run.half_written()
    assert final_files(run) == final_files(straight)
    assert not list((run.workdir / 'checkpoints').glob('*tmp*'))
    assert not list(run.workdir.rglob('*.damaged*')) + list(run.workdir.rglob('owner.json*'))


def telling(base, name, wait) -> tuple[pathlib.Path, str]:
    """A pipe, and code by which a process says through it that it makes the batch of step 3, and
    then waits."""
    pipe = base / name
    os.mkfifo(pipe)
    return pipe, at_batch(3, f'(open({str(pipe)!r}, "w").close(), {wait})')


def test_one_owner_and_ctrl_c(straight, base, started_processes):
    run = Run(base / 'interrupted', base)
    go_on = base / 'go_on'
    os.mkfifo(go_on)
    there, code = telling(base, 'there', f'open({str(go_on)!r}).read()')
    (owner,) = run.start(disturb={0: code})
    started_processes.append(owner)
    there.read_text()

    # A second command on the same workdir is refused, and touches nothing.
    (second,) = run.start()
    assert second.wait(200) not in (0, -signal.SIGKILL)
    assert f'{run.workdir} is being written by process {owner.pid} of host' in run.log()
    assert owner.poll() is None

    # Ctrl-C saves.
    owner.send_signal(signal.SIGINT)
    go_on.write_text('')
    assert owner.wait(100) == 0
    stopped = max(run.records())
    log = (run.workdir / 'log.0.0').read_text()
    assert f'Stopped by Ctrl-C at step {stopped} of {STEPS}; the same command resumes.' in log
    assert stopped < STEPS
    assert run.saved()[-1] == stopped

    # One that waits for ever does not stop before the second Ctrl-C.
    there, code = telling(base, 'waits', 'time.sleep(1e6)')
    code = code.replace('step == 3', f'step == {stopped}')
    (hanging,) = run.start(disturb={0: code})
    started_processes[:] = [hanging]
    there.read_text()
    hanging.send_signal(signal.SIGINT)
    while 'Ctrl-C again stops at once' not in run.log():
        assert hanging.poll() is None
        time.sleep(0.1)
    hanging.send_signal(signal.SIGINT)
    assert hanging.wait(10) == 128 + signal.SIGINT

    run.finish()
    assert_same_bits(run, straight)


# The phase, what hangs in it, and how far the run must have come.
HANGS = {
    'start': 'trainer.mesh_lib.make_mesh = hang',
    'data': 'disturb = hang',
    'restore': 'checkpoint.latest = hang',
    'compile': 'trainer._jit_steps = lambda *args: collections.defaultdict(lambda: hang)',
    'save': 'checkpoint.save = hang',
    'sample': 'validation.write_sample_grids = hang',
    'score': 'scores.score = hang',
}


@pytest.mark.parametrize(
    'phase',
    [
        'sample',
        *(pytest.param(name, marks=pytest.mark.slow) for name in HANGS if name != 'sample'),
    ],
)
def test_a_hang_in_any_phase_ends_the_run(straight, base, phase, started_processes):
    run = Run(base / f'hangs_{phase}', base)
    shutil.copytree(straight.workdir, run.workdir, dirs_exist_ok=True)
    for step in (6, 8, 10):
        shutil.rmtree(run.workdir / f'checkpoints/{step}')
    code = (
        f'{DIE}import collections\nhang = lambda *args, **kwargs: time.sleep(1e6)\n{HANGS[phase]}'
    )
    started_processes += run.start(
        f'--config.limits.{phase}=5', '--config.train.sample_every_steps=3', disturb={0: code}
    )
    assert started_processes[0].wait(200) == 1
    assert f"Phase '{phase}' hangs: no sign of life for 5 s." in run.log()
    assert f'{phase} 5 s' in run.log()  # told at the start
    assert 'in <lambda>' in run.log()  # where it stands


# When checkpoint 6 begins, after 4 is finished, no file may become larger than a small part of a
# save. Writes then fail for real, with EFBIG instead of the ENOSPC of a full disk.
SMALL_FILES = """
import resource

def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))

killing.before('os.mkdir', '/checkpoints/6.orbax-checkpoint-tmp', small_files)
"""


def test_a_full_disk_costs_no_checkpoint_and_sigterm_saves(straight, base):
    run = Run(base / 'stopped', base)

    # The disk is full.
    (process,) = run.start(disturb={0: SMALL_FILES})
    assert process.wait(200) == 1
    message = f'RuntimeError: Saving to {run.workdir}/checkpoints failed (File too large): '
    assert message in run.log()
    assert run.saved() == [2, 4]

    # There is room again, but SIGTERM comes.
    run.finish(disturb={0: at_batch(6, 'os.kill(os.getpid(), signal.SIGTERM)')})
    stopped = max(run.records())
    assert 4 < stopped < STEPS
    assert run.saved()[-1] == stopped
    assert not (run.workdir / 'scores.md').exists()
    message = f'Stopped by SIGTERM at step {stopped} of {STEPS}; the same command resumes.'
    assert f'Resuming {run.workdir}/checkpoints/4.' in run.log()
    assert message in run.log()

    # Nothing is lost.
    run.finish()
    assert f'Resuming {run.workdir}/checkpoints/{stopped}.' in run.log()
    assert_same_bits(run, straight)
    scores = (run.workdir / 'scores.json').read_text()
    assert scores == (straight.workdir / 'scores.json').read_text()


TWO = '--config.mesh.data=2'
# Waits until the coordinator knows of the signal, so that the run does not end before.
SIGTERM_OF_ONE = """
from jax._src import distributed

def disturb(step):
    if step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
        client = distributed.global_state.client
        client.blocking_key_value_get('RECEIVED_PREEMPTION_NOTICE', 100_000)
"""


def test_two_processes_train_as_one_stop_together_and_resume_on_another_mesh(straight, base):
    # SIGTERM to one of them stops both after the same step.
    run = Run(base / 'two', base)
    run.finish(TWO, count=2, disturb={1: SIGTERM_OF_ONE})
    stopped = max(run.records())
    assert 2 < stopped < STEPS
    for i in (0, 1):
        assert f'Stopped by SIGTERM at step {stopped} of' in run.log(i)
    assert run.saved()[-1] == stopped

    # Each has made its own half of every batch.
    def rows_of(process):
        lines = (run.workdir / f'seen.0.{process}').read_text().splitlines()
        return {row for _, row, _ in map(json.loads, lines)}

    assert rows_of(0) == set(range(8))
    assert rows_of(1) == set(range(8, 16))

    run.finish('--config.mesh.fsdp=2', '--config.mesh.cpu_devices=2')
    assert_close(run, straight)


def test_one_process_is_resumed_on_two(straight, base):
    # A copy of the run of one process, as it was after step 4.
    run = Run(base / 'one_to_two', base)
    shutil.copytree(straight.workdir, run.workdir, dirs_exist_ok=True)
    for step in (6, 8, 10):
        shutil.rmtree(run.workdir / f'checkpoints/{step}')
    for path in run.workdir.glob('seen.*'):
        path.unlink()

    # One process comes to its first step later than the limit allows at other steps. The other one
    # waits, since a first step is compiled.
    limit = 'multihost.PEER_SECONDS = 12\n'
    late = 'disturb = lambda step: time.sleep(16 if step == 4 else 0)\n'
    run.finish(TWO, count=2, disturb={0: limit, 1: limit + late})
    assert f'Resuming {run.workdir}/checkpoints/4.' in run.log(1)

    seen = run.batches()
    assert {step for step, _ in seen} == set(range(4, STEPS))
    assert seen.items() <= straight.batches().items()

    shutil.copy(straight.workdir / 'seen.0.0', run.workdir)
    assert_close(run, straight)


@pytest.mark.parametrize(
    'how, victim, quick',
    [
        ('stopped', 0, True),
        ('hung', 1, True),
        *(
            pytest.param(how, victim, False, marks=pytest.mark.slow)
            for how in ('killed', 'stopped', 'hung')
            for victim in (0, 1)
        ),
    ],
)
def test_a_peer_that_is_gone_ends_the_others(base, how, victim, quick, started_processes):
    """The slow variant waits for the shipped limits, which take a minute, and also kills, which
    leaves more traces."""
    run = Run(base / f'{how}_{victim}_{quick}', base)
    survivor = 1 - victim

    limits = 'multihost.HEARTBEAT_SECONDS = multihost.PEER_SECONDS = 10\n' if quick else ''
    actions = {
        'killed': 'killing.kill()',
        'stopped': 'os.kill(os.getpid(), signal.SIGSTOP)',
        'hung': 'time.sleep(1e6)',
    }
    gone = limits + at_batch(5, actions[how])
    started_processes += run.start(TWO, count=2, disturb={survivor: limits, victim: gone})
    assert started_processes[survivor].wait(300) != 0
    assert 'step 3/' in run.log() and len(run.records()) < STEPS

    # Only the barrier notices a process whose Python hangs while its threads live.
    if how == 'hung':
        assert 'did not come to step 5' in run.log(survivor)
        assert started_processes[victim].wait(300) != 0
