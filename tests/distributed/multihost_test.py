"""Two processes on this machine train to the numbers of one process; they agree, and they stop."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from conftest import ROOT, child_environment, free_port, mesh_of, tiny_config, train_on

from mask2dit_jax.distributed import multihost

# Each of two processes runs this. Its arguments are the coordinator's address, its own number and
# the mesh's axes.
CODE = """
    import json, os, signal, sys, time

    import jax
    from jax._src import distributed

    jax.config.update('jax_num_cpu_devices', 4)
    jax.config.update('jax_disable_most_optimizations', True)
    address, process, axes = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])

    from mask2dit_jax.distributed import mesh as mesh_lib, multihost

    multihost.initialize(address, 2, process, devices=8)

    import conftest

    jax.config.update('jax_num_cpu_devices', 4)  # conftest asks for eight
    mesh = conftest.mesh_of(*axes)
    curve, _ = conftest.train_on(conftest.tiny_config(), mesh)

    agreed = [multihost.all_agree(good) for good in (True, process == 0, False)]
    try:
        multihost.assert_same_on_all_hosts(model='dual', steps=process)
    except ValueError as error:
        different = str(error)

    if process == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    # Both have heard of the signal before anybody asks.
    client = distributed.global_state.client
    client.blocking_key_value_get('RECEIVED_PREEMPTION_NOTICE', 100_000)
    with multihost.termination() as terminated:
        asked = 1
        while not terminated() and asked < 100:
            asked += 1
            multihost.barrier(asked, limited=True)
            time.sleep(0.1)

    result = {
        'curve': curve.tolist(),
        'rows': mesh_lib.local_rows(mesh, 16),
        'agreed': agreed,
        'different': different,
        'asked': asked,
    }
    print('RESULT', json.dumps(result))
"""


def run_two(axes, tmp_path):
    """Runs CODE in two processes of four devices each, and returns their results."""
    script = tmp_path / 'run.py'
    script.write_text(textwrap.dedent(CODE))
    address = f'localhost:{free_port()}'

    processes = []
    for i in range(2):
        process = subprocess.Popen(
            [sys.executable, script, address, str(i), json.dumps(axes)],
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)

    outputs = [process.communicate(timeout=600) for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return [json.loads(out.split('RESULT')[1]) for out, _ in outputs]


@pytest.mark.parametrize(
    'axes, shared',
    [((1, 1, 8), True), pytest.param((2, 2, 2), False, marks=pytest.mark.slow)],
    ids=str,
)
def test_two_processes_train_as_one(axes, shared, tmp_path):
    results = run_two(axes, tmp_path)
    expected, _ = train_on(tiny_config(), mesh_of(1))
    for result in results:
        np.testing.assert_allclose(result['curve'], expected, rtol=2e-5)

    first, second = (set(result['rows']) for result in results)
    assert first | second == set(range(16))
    if shared:
        assert first == second
    else:
        assert not first & second

    for result in results:
        assert result['agreed'] == [True, False, False]
        assert result['different'].startswith('Processes differ in steps: ')
        assert result['asked'] == results[0]['asked'] < 100


WRONG = """
from absl import app, flags

from mask2dit_jax import main

for given in (
    ['--coordinator=localhost:1'],
    ['--num_processes=2', '--process_id=0'],
    ['--coordinator=localhost:1', '--num_processes=2', '--process_id=2'],
):
    flags.FLAGS.unparse_flags()
    for name in ('coordinator', 'num_processes', 'process_id'):
        flags.FLAGS[name].unparse()
    flags.FLAGS(['main', '--config=configs/tiny.py', '--workdir=/nowhere', *given])
    try:
        main.main(['main'])
    except app.UsageError as error:
        print(error)
"""


def test_wrong_flags_are_usage_errors():
    process = subprocess.run(
        [sys.executable, '-c', WRONG],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    no_number, no_coordinator, number_too_large = process.stdout.splitlines()
    assert 'belong together' in no_number
    assert 'belong together' in no_coordinator
    assert '--process_id=2 must be less than --num_processes=2' in number_too_large


def test_a_host_without_tpu_is_alone():
    assert jax.config.jax_platforms == 'cpu' or multihost.tpu_chips() == 0
    multihost.initialize(None, None, None, devices=256)
    assert not jax.distributed.is_initialized()
    assert multihost.all_agree(True)
    assert not multihost.all_agree(False)
