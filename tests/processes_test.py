"""Two processes on this machine train to the numbers of one, whichever axis lies between them."""
import json
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import sharding_test

CODE = '''
    import json, sys
    import jax
    jax.config.update('jax_num_cpu_devices', 4)
    jax.config.update('jax_disable_most_optimizations', True)
    address, process, axes = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    jax.distributed.initialize(address, 2, process)
    import sharding_test
    from mask2dit_jax import sharding
    mesh = sharding_test.mesh_of(*axes)
    curve, _ = sharding_test.run(sharding_test.tiny_config(), mesh)
    print('RESULT', json.dumps({'curve': curve.tolist(), 'rows': sharding.local_rows(mesh, 16)}))
'''


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def run_two(axes, tmp_path):
    (tmp_path / 'run.py').write_text(textwrap.dedent(CODE))
    address = f'localhost:{free_port()}'
    processes = [subprocess.Popen([sys.executable, tmp_path / 'run.py', address, str(i), json.dumps(axes)],
                                  env=sharding_test.child_environment(), stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True) for i in range(2)]
    outputs = [p.communicate(timeout=600) for p in processes]
    assert not any(p.returncode for p in processes), outputs
    return [json.loads(out.split('RESULT')[1]) for out, _ in outputs]


@pytest.mark.parametrize('axes, shared', [((2, 2, 2), False), ((1, 1, 8), True)], ids=str)
def test_two_processes_train_as_one(axes, shared, tmp_path):
    results = run_two(axes, tmp_path)
    expected, _ = sharding_test.run(sharding_test.tiny_config(), sharding_test.mesh_of(1))
    for result in results:
        np.testing.assert_allclose(result['curve'], expected, rtol=2e-5)
    rows = [set(r['rows']) for r in results]
    assert (rows[0] == rows[1]) == shared and rows[0] | rows[1] == set(range(16))
    assert shared or not rows[0] & rows[1]
