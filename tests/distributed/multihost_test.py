"""Two processes on this machine train to the numbers of one, whichever axis lies between them; they
agree and stop."""

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

CODE = """
    import json, os, signal, sys, time
    import jax
    jax.config.update('jax_num_cpu_devices', 4)
    jax.config.update('jax_disable_most_optimizations', True)
    address, process, axes = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    from mask2dit_jax.distributed import mesh as mesh_lib, multihost
    multihost.initialize(address, 2, process, devices=8)
    import conftest
    jax.config.update('jax_num_cpu_devices', 4)  # conftest asks for eight
    mesh = conftest.mesh_of(*axes)
    curve, _ = conftest.train_on(conftest.tiny_config(), mesh)
    agreed = [multihost.all_agree(True), multihost.all_agree(process == 0), multihost.all_agree(False)]
    try:
        multihost.assert_same_on_all_hosts(model='dual', steps=process)
    except ValueError as error:
        different = str(error)
    if process == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(4)  # JAX hears of it before anybody asks
    with multihost.termination() as terminated:
        asked = 1
        while not terminated() and asked < 100:
            asked += 1
            multihost.barrier(asked, limited=True)
            time.sleep(0.1)
    print('RESULT', json.dumps({'curve': curve.tolist(), 'rows': mesh_lib.local_rows(mesh, 16), 'agreed': agreed,
                                'different': different, 'asked': asked}))
"""


def run_two(axes, tmp_path):
    (tmp_path / 'run.py').write_text(textwrap.dedent(CODE))
    address = f'localhost:{free_port()}'
    processes = [
        subprocess.Popen(
            [sys.executable, tmp_path / 'run.py', address, str(i), json.dumps(axes)],
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [p.communicate(timeout=600) for p in processes]
    assert not any(p.returncode for p in processes), outputs
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
    rows = [set(r['rows']) for r in results]
    assert (rows[0] == rows[1]) == shared and rows[0] | rows[1] == set(range(16))
    assert shared or not rows[0] & rows[1]
    for result in results:
        assert result['agreed'] == [True, False, False]
        assert result['different'].startswith('Processes differ in steps: ')
        assert result['asked'] == results[0]['asked'] < 100


WRONG = """
import sys
from absl import app, flags
from mask2dit_jax import main
for given in (['--coordinator=localhost:1'], ['--num_processes=2', '--process_id=0'],
              ['--coordinator=localhost:1', '--num_processes=2', '--process_id=2']):
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
    root = ROOT
    out = subprocess.run(
        [sys.executable, '-c', WRONG],
        cwd=root,
        env=os.environ | {'PYTHONPATH': str(root)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(out) == 3 and all('belong together' in line for line in out[:2])
    assert '--process_id=2 must be less than --num_processes=2' in out[2]


def test_a_host_without_tpu_is_alone():
    assert jax.config.jax_platforms == 'cpu' or multihost.tpu_chips() == 0
    multihost.initialize(None, None, None, devices=256)
    assert (
        not jax.distributed.is_initialized()
        and multihost.all_agree(True)
        and not multihost.all_agree(False)
    )
