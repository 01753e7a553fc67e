"""The benchmark compares formulations that compute the same, and says so when a case dies."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from mask2dit_jax.aot import kernel_schedules
from mask2dit_jax.attention import dense
from mask2dit_jax.benchmark import attention, extend, model, worker
from mask2dit_jax.layout import SceneLayout

ROOT = pathlib.Path(__file__).parents[2]


def test_the_repeated_formulation_is_the_dual_mask():
    layout = SceneLayout((2, 2, 2), 3, 4, 5)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, layout.num_tokens, 2, 16)) for key in keys)

    out = attention.repeated(q, k, v, layout, 'dual')
    np.testing.assert_allclose(out, dense.dense(q, k, v, layout, 'dual'), atol=2e-6)


def test_count_bundles_reads_the_stretches_between_branches():
    lines = (
        ' 0x0   :  { a }',
        ' 0x1   :  { sbr.rel $3 }',
        ' 0x6 LB: { x }',
        ' 0x9   :  { sbr.rel $1 }',
        ' 0xa : {}',
    )
    assert kernel_schedules.count_bundles('\n'.join(lines)) == [8, 1, 1]


def test_a_worker_answers():
    case = {'formulation': 'blockwise', 'remat': 'full', 'scenes': 1, 'what': 'forward'}
    with model.start_worker(case) as worker:
        assert np.isfinite(model.listen(worker)['value'])

        answer = model.ask(worker, 'run')
        assert answer['seconds'] > 0
        assert 150 < answer['mb'] < 2000  # the parameters alone are 150 MB

        assert {'attention', 'matmuls', 'rest'} <= set(model.ask(worker, 'profile'))
        worker.stdin.close()


def test_a_cache_extends_as_the_loop_over_all_scenes_does():
    results = []
    for cached in (False, True):
        compiled, arguments = extend.compile_extension(1, cached, num_steps=1)
        results.append(np.asarray(compiled(*arguments))[:, -worker.FRAMES :])
    assert np.abs(results[0]).max() > 0.1
    np.testing.assert_allclose(results[1], results[0], atol=1e-5 * np.abs(results[0]).max())


def test_the_death_of_a_worker_is_an_error():
    case = {'formulation': 'fast', 'remat': 'full', 'scenes': 1, 'what': 'forward'}
    with (
        model.start_worker(case) as worker,
        pytest.raises(RuntimeError, match='stopped with code 1'),
    ):
        model.listen(worker)


def test_the_command_prints_and_writes_its_table(tmp_path):
    out = tmp_path / 'out'
    flags = ('--tokens=192', '--dense_tokens=0', f'--out={out}')
    done = subprocess.run(
        [sys.executable, '-m', 'mask2dit_jax.benchmark', 'attention', *flags],
        cwd=ROOT,
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (out / 'attention.md').read_text() == done.stdout

    rows = json.loads((out / 'attention.json').read_text())['attention']
    found = {(row['formulation'], row['video tokens']) for row in rows}
    assert found == {
        ('blockwise', 192),
        ('blockwise', 384),
        ('blockwise', 768),
        ('splash (interpreted)', 192),
    }
