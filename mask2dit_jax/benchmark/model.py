"""The whole transformer, in training and sampling, beside diffusers."""

import importlib.util
import json
import subprocess
import sys

import tqdm

from mask2dit_jax.benchmark import timing

# (formulation, remat) of `train`, and how many scenes and what the tasks measure.
FORMULATIONS = (
    ('blockwise', 'save_matmuls'),
    ('blockwise', 'none'),
    ('blockwise', 'full'),
    ('dense', 'none'),
)
TASKS = {
    'train': [(3, 'forward'), (3, 'forward + backward')],
    'sample': [(3, 'sampling')],
    'scenes': [(n, 'forward + backward') for n in (1, 3, 6)],
}


def ask(worker: subprocess.Popen, question: str) -> dict:
    """One answer of a worker.

    Raises:
      RuntimeError: if it died.
    """
    worker.stdin.write(question + '\n')
    worker.stdin.flush()
    return listen(worker)


def listen(worker: subprocess.Popen) -> dict:
    """The next line of a worker, as `ask`."""
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(
            f'A case stopped with code {worker.wait()}: {worker.args[-1]}; its last words are above.'
        )
    return json.loads(line)


def bench_model(task: str, runs: int) -> tuple[list[dict], list[dict]]:
    """Rows of times and memory, and of where the time goes, for one of TASKS.

    Ratios are to diffusers where it is installed, else to the first formulation, at the same scenes
    and work.
    """
    rows, profiles = [], []
    for num_scenes, what in tqdm.tqdm(TASKS[task], desc=task, unit='group'):
        trained = what == 'forward + backward'
        pairs = (
            FORMULATIONS
            if trained and task == 'train'
            else [FORMULATIONS[0], ('dense', 'save_matmuls')]
        )
        cases = [
            {'formulation': f, 'remat': r if trained else '', 'scenes': num_scenes, 'what': what}
            for f, r in pairs
        ]
        if importlib.util.find_spec('diffusers') and importlib.util.find_spec('torch'):
            cases.append(cases[0] | {'formulation': 'diffusers', 'remat': ''})
        workers = [
            subprocess.Popen(
                [sys.executable, '-m', 'mask2dit_jax.benchmark.worker', json.dumps(case)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for case in cases
        ]
        try:
            values = [listen(worker)['value'] for worker in workers]
            answers = [[ask(worker, 'run') for worker in workers] for _ in range(runs)]
            profiles += [
                case | ask(worker, 'profile')
                for case, worker in zip(cases, workers)
                if case['formulation'] != 'diffusers'
            ]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        group = [
            case
            | {
                'value': value,
                **timing.spread([1e3 * a['seconds'] for a in timed]),
                'MB': timed[-1]['mb'],
            }
            for case, value, timed in zip(cases, values, zip(*answers))
        ]
        base = next((r for r in group if r['formulation'] == 'diffusers'), group[0])
        rows += [
            r | {'time ratio': r['ms'] / base['ms'], 'MB ratio': r['MB'] / base['MB']}
            for r in group
        ]
    return rows, profiles
