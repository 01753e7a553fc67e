"""The whole transformer, in training and sampling, beside diffusers.

Every case runs in a process of its own, `python -m mask2dit_jax.benchmark.worker`, which is asked
over its stdin and answers on its stdout.
"""

import importlib.util
import json
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import tqdm


class Group(NamedTuple):
    """Cases that are compared: all do the same work on stories with the same number of scenes."""

    scenes: int
    what: str


# Groups by task.
TASKS = {
    'train': [Group(3, 'forward'), Group(3, 'forward + backward')],
    'sample': [Group(3, 'sampling')],
    'scenes': [Group(scenes, 'forward + backward') for scenes in (1, 3, 6)],
}

# Attention backend and rematerialization of the cases: in the task train, and in all other groups.
TRAIN_VARIANTS = (
    ('blockwise', 'save_matmuls'),
    ('blockwise', 'none'),
    ('blockwise', 'full'),
    ('dense', 'none'),
)
VARIANTS = (
    ('blockwise', 'save_matmuls'),
    ('dense', 'save_matmuls'),
)


def listen(worker: subprocess.Popen) -> dict:
    """Returns the next answer of a worker.

    Raises:
      RuntimeError: if the worker has died.
    """
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(
            f'A case stopped with code {worker.wait()}: {worker.args[-1]}; its last words are '
            'above.'
        )
    return json.loads(line)


def ask(worker: subprocess.Popen, question: str) -> dict:
    """Returns the answer of a worker to 'run' or 'profile'; errors as for `listen`."""
    worker.stdin.write(question + '\n')
    worker.stdin.flush()
    return listen(worker)


def start_worker(case: dict) -> subprocess.Popen:
    """Starts the worker of a case."""
    return subprocess.Popen(
        [sys.executable, '-m', 'mask2dit_jax.benchmark.worker', json.dumps(case)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _cases(task: str, group: Group) -> list[dict]:
    """What the workers of a group run; diffusers is the last if it is installed."""
    trains = group.what == 'forward + backward'
    variants = TRAIN_VARIANTS if trains and task == 'train' else VARIANTS
    cases = []
    for formulation, remat in variants:
        cases.append(
            {
                'formulation': formulation,
                'remat': remat if trains else '',
                'scenes': group.scenes,
                'what': group.what,
            }
        )
    if importlib.util.find_spec('diffusers') and importlib.util.find_spec('torch'):
        cases.append(cases[0] | {'formulation': 'diffusers', 'remat': ''})
    return cases


def bench_model(task: str, runs: int) -> tuple[list[dict], list[dict]]:
    """Measures the cases of a task.

    Args:
      task: one of TASKS.
      runs: timed runs of each case.

    Returns:
      Rows of times and memory, and rows of where the time is spent. Ratios are to diffusers if it
      is installed, else to the first case, at the same scenes and work.
    """
    rows = []
    profiles = []
    for group in tqdm.tqdm(TASKS[task], desc=task, unit='group'):
        cases = _cases(task, group)
        workers = [start_worker(case) for case in cases]
        try:
            # The first answer is a number that equal results have in common.
            values = [listen(worker)['value'] for worker in workers]

            # Cases take turns, so that a busy machine slows all of them alike.
            rounds = []
            for _ in range(runs):
                rounds.append([ask(worker, 'run') for worker in workers])

            for case, worker in zip(cases, workers):
                if case['formulation'] != 'diffusers':
                    profiles.append(case | ask(worker, 'profile'))
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()

        measured = []
        for case, value, answers in zip(cases, values, zip(*rounds)):
            times = [1e3 * answer['seconds'] for answer in answers]
            measured.append(
                case
                | {
                    'value': value,
                    'ms': float(np.median(times)),
                    'spread ms': f'{min(times):.4g}...{max(times):.4g}',
                    'MB': answers[-1]['mb'],
                }
            )

        by_diffusers = [row for row in measured if row['formulation'] == 'diffusers']
        base = (by_diffusers or measured)[0]
        for row in measured:
            ratios = {
                'time ratio': row['ms'] / base['ms'],
                'MB ratio': row['MB'] / base['MB'],
            }
            rows.append(row | ratios)
    return rows, profiles
