"""The benchmark compares what computes the same, and says so when a case dies."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from mask2dit_jax.aot import kernel_schedules
from mask2dit_jax.attention import dense
from mask2dit_jax.benchmark import attention, model
from mask2dit_jax.layout import SceneLayout


def test_the_repeated_formulation_is_the_dual_mask():
    layout = SceneLayout((2, 2, 2), 3, 4, 5)
    q, k, v = (
        jax.random.normal(key, (2, layout.num_tokens, 2, 16))
        for key in jax.random.split(jax.random.key(0), 3)
    )
    np.testing.assert_allclose(
        attention.repeated(q, k, v, layout, 'dual'), dense.dense(q, k, v, layout, 'dual'), atol=2e-6
    )


def test_count_bundles_reads_the_stretches_between_branches():
    lines = (
        ' 0x0   :  { a }',
        ' 0x1   :  { sbr.rel $3 }',
        ' 0x6 LB: { x }',
        ' 0x9   :  { sbr.rel $1 }',
        ' 0xa : {}',
    )
    assert kernel_schedules.count_bundles('\n'.join(lines)) == [8, 1, 1]


def test_a_worker_answers_and_its_death_is_an_error():
    case = {'formulation': 'blockwise', 'remat': 'full', 'scenes': 1, 'what': 'forward'}

    def start(case):
        return subprocess.Popen(
            [sys.executable, '-m', 'mask2dit_jax.benchmark.worker', json.dumps(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    with start(case) as worker:
        assert np.isfinite(model.listen(worker)['value'])
        answer = model.ask(worker, 'run')
        assert (
            answer['seconds'] > 0 and 150 < answer['mb'] < 2000
        )  # its parameters alone are 150 MB
        assert {'attention', 'matmuls', 'rest'} <= set(model.ask(worker, 'profile'))
        worker.stdin.close()
    with (
        start(case | {'formulation': 'fast'}) as worker,
        pytest.raises(RuntimeError, match='stopped with code 1'),
    ):
        model.listen(worker)
