"""Runs of `main` that are killed, stopped, damaged, starved of disk or deserted by a peer, and what
comes after."""

import collections
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorstore as ts
from conftest import ROOT, free_port

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

# main, which also writes down every batch that it makes, and then does what the test says.
CODE = """
import hashlib, json, os, sys, time
sys.modules['torch'] = None  # tensorboardX imports it where it can, which takes as long as everything else
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
        self.workdir, self.base, self.starts = folder, base, 0
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *flags, count=1, disturb=None) -> list[subprocess.Popen]:
        """Processes of one start; `disturb` is code that one of them runs, by its number."""
        port, started = free_port(), []
        for i in range(count):
            several = [
                f'--coordinator=localhost:{port}',
                f'--num_processes={count}',
                f'--process_id={i}',
            ]
            env = os.environ | {
                'JAX_PLATFORMS': 'cpu',
                'PYTHONPATH': str(ROOT),
                'JAX_COMPILATION_CACHE_DIR': str(self.base / 'cache'),
                'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
                'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
                'SEEN': f'{self.workdir}/seen.{self.starts}.{i}',
                'DISTURB': (disturb or {}).get(i, ''),
            }
            log = open(f'{self.workdir}/log.{self.starts}.{i}', 'w')  # noqa: SIM115
            started.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        '-c',
                        CODE,
                        *FLAGS,
                        f'--config.data.dir={self.base}/data',
                        f'--workdir={self.workdir}',
                        *(several if count > 1 else []),
                        *flags,
                    ],
                    cwd=ROOT,
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        self.starts += 1
        return started

    def finish(self, *flags, **kwargs):
        started = self.start(*flags, **kwargs)
        assert [p.wait(300) for p in started] == [0] * len(started), self.log()

    def log(self, i=0) -> str:
        return pathlib.Path(f'{self.workdir}/log.{self.starts - 1}.{i}').read_text()

    def logged(self) -> int:
        """The last step that this start has logged."""
        return max(map(int, re.findall(r'step (\d+)/', self.log())), default=0)

    def records(self) -> dict[int, dict]:
        """Metrics by step; no step comes twice."""
        path = self.workdir / 'metrics.jsonl'
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith('\n')]
        assert len({r['step'] for r in records}) == len(records)
        return {r['step']: r for r in records}

    def curve(self) -> dict[int, tuple]:
        return {step: (r['loss'], r['grad_norm']) for step, r in self.records().items()}

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
                if kind == '.zarray':
                    array = ts.open(
                        {'driver': 'zarr', 'kvstore': store | {'path': name + '/'}}
                    ).result()
                    arrays[f'{item}/{name}'] = array.read().result()
        return arrays

    def saved(self) -> list[int]:
        return sorted(
            int(p.name) for p in (self.workdir / 'checkpoints').glob('*') if p.name.isdigit()
        )

    def wait_for(self, condition, started, seconds=200):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and all(p.poll() is None for p in started), self.log()
            time.sleep(0.005)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return tmp_path_factory.mktemp('survival')


@pytest.fixture(scope='module')
def straight(base):
    """An uninterrupted run."""
    run = Run(base / 'straight', base)
    run.finish()
    assert run.saved() == [2, 4, 6, 8, 10] and len(run.batches()) == STEPS * 16
    return run


@pytest.fixture
def started_processes():
    """Whatever a test leaves running is killed."""
    started = []
    yield started
    for p in started:
        p.kill()
        p.wait()


def assert_same_bits(run, other, steps=STEPS):
    ours, theirs = run.state(steps), other.state(steps)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert run.curve() == other.curve()
    assert run.batches() == other.batches()


def assert_close(run, other):
    np.testing.assert_allclose(
        [run.curve()[s] for s in range(1, STEPS + 1)],
        [other.curve()[s] for s in range(1, STEPS + 1)],
        rtol=5e-5,
    )
    ours, theirs = run.state(STEPS), other.state(STEPS)
    for name in theirs:
        if name.startswith('ema/'):
            np.testing.assert_allclose(ours[name], theirs[name], atol=5e-4, err_msg=name)
    assert run.batches() == other.batches()


def kill_at(run, step, rng, started, in_save):
    """SIGKILL soon after a step was logged, or while one is being saved; returns whether it was."""

    def saving():
        return list((run.workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp*'))

    run.wait_for(lambda: run.logged() >= step, started)
    if in_save:
        run.wait_for(saving, started)
        time.sleep(rng.uniform(0, 0.05))
    else:
        time.sleep(rng.uniform(0, 0.3))
    started[0].kill()
    started[0].wait()
    return bool(saving())


@pytest.mark.parametrize('kills, steps', [(2, STEPS), pytest.param(20, 60, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bit_equal(straight, base, kills, steps, started_processes):
    rng, run, hits = random.Random(kills), Run(base / f'killed_{kills}', base), 0
    longer = f'--config.train.steps={steps}'
    if steps != STEPS:
        straight = Run(base / f'straight_{steps}', base)
        straight.finish(longer)
    for i in range(kills):
        started_processes += run.start(longer)
        first = max(run.saved(), default=0) + 1
        hits += kill_at(
            run, rng.randint(first, first + 1), rng, started_processes[-1:], in_save=i % 3 == 0
        )
    assert hits and max(run.saved(), default=0) < steps
    print(f'{hits} of {kills} kills left a half-written checkpoint')
    run.finish(longer)
    assert_same_bits(run, straight, steps)
    assert not list((run.workdir / 'checkpoints').glob('*tmp*'))


def test_a_full_disk_costs_no_checkpoint_and_sigterm_saves(straight, base, started_processes):
    """Writes fail for real, with EFBIG instead of ENOSPC: no file may become larger than a small
    part of a save."""
    run = Run(base / 'stopped', base)
    code = 'import resource\ndisturb = lambda s: s == 5 and resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))\n'
    (process,) = run.start(disturb={0: code})
    assert process.wait(200) == 1
    assert (
        f'RuntimeError: Saving to {run.workdir}/checkpoints failed (File too large): ' in run.log()
    )
    kept = run.saved()[-1]
    assert kept in (2, 4)  # batches are made ahead of steps

    started_processes += run.start()
    run.wait_for(lambda: run.logged() > kept, started_processes)
    started_processes[0].terminate()
    assert started_processes[0].wait(60) == 0
    stopped = max(run.records())
    assert f'Resuming {run.workdir}/checkpoints/{kept}.' in run.log()
    assert (
        f'Stopped by SIGTERM at step {stopped} of {STEPS}; the same command resumes.' in run.log()
    )
    assert (
        kept < stopped < STEPS
        and run.saved()[-1] == stopped
        and not (run.workdir / 'scores.md').exists()
    )

    run.finish()
    assert f'Resuming {run.workdir}/checkpoints/{stopped}.' in run.log()
    assert_same_bits(run, straight)
    assert (run.workdir / 'scores.json').read_text() == (
        straight.workdir / 'scores.json'
    ).read_text()


TWO = '--config.mesh.data=2'


def test_two_processes_train_as_one_stop_together_and_resume_on_another_mesh(
    straight, base, started_processes
):
    run = Run(base / 'two', base)
    started_processes += run.start(TWO, count=2)
    run.wait_for(lambda: run.logged() >= 3, started_processes)
    started_processes[1].terminate()  # one of them is enough
    assert [p.wait(100) for p in started_processes] == [0, 0], run.log() + run.log(1)
    stopped = max(run.records())
    assert (
        all(f'Stopped by SIGTERM at step {stopped} of' in run.log(i) for i in (0, 1))
        and run.saved()[-1] == stopped
    )
    rows = [
        {json.loads(line)[1] for line in (run.workdir / f'seen.0.{i}').read_text().splitlines()}
        for i in (0, 1)
    ]
    assert rows == [set(range(8)), set(range(8, 16))]
    run.finish('--config.mesh.fsdp=2', '--config.mesh.cpu_devices=2')
    assert_close(run, straight)


def test_one_process_is_resumed_on_two(straight, base):
    run = Run(base / 'one_to_two', base)
    shutil.copytree(straight.workdir, run.workdir, dirs_exist_ok=True)
    for step in (6, 8, 10):
        shutil.rmtree(run.workdir / f'checkpoints/{step}')
    for path in run.workdir.glob('seen.*'):
        path.unlink()
    # One comes to its first step, which is to be compiled, later than a peer may come to others:
    # the other one waits.
    late = 'multihost.PEER_SECONDS = 12\ndisturb = lambda s: time.sleep(16 if s == 4 else 0)\n'
    run.finish(TWO, count=2, disturb={0: 'multihost.PEER_SECONDS = 12', 1: late})
    assert f'Resuming {run.workdir}/checkpoints/4.' in run.log(1)
    seen = run.batches()
    assert {step for step, _ in seen} == set(
        range(4, STEPS)
    ) and seen.items() <= straight.batches().items()
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
    """The shipped limits take a minute, and are tested in the slow variant; so is a kill, which
    leaves more traces."""
    run = Run(base / f'{how}_{victim}_{quick}', base)
    limits = 'multihost.HEARTBEAT_SECONDS = multihost.PEER_SECONDS = 10\n' if quick else ''
    hang = 'disturb = lambda step: time.sleep(1e6 if step == 5 else 0)\n' if how == 'hung' else ''
    started_processes += run.start(
        TWO, count=2, disturb={1 - victim: limits, victim: limits + hang}
    )
    run.wait_for(lambda: run.logged() >= 4, started_processes)
    if how != 'hung':
        started_processes[victim].send_signal(signal.SIGKILL if how == 'killed' else signal.SIGSTOP)
    survivor, start = started_processes[1 - victim], time.monotonic()
    assert survivor.wait(60 if quick else 120) != 0
    print(f'{how} {victim}: {time.monotonic() - start:.0f} s')
    if how == 'hung':
        assert 'did not come to step 5' in run.log(1 - victim)
        assert started_processes[victim].wait(60 if quick else 120) != 0
