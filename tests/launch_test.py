"""launch/env.sh: flags that libtpu takes, and errors in words."""
import os
import pathlib
import subprocess
import sys

import pytest

ENV = pathlib.Path(__file__).parents[1] / 'launch/env.sh'
COMPILE = '''
from absl import flags
import jax
flags.FLAGS.mark_as_parsed()
from mask2dit_jax import aot, config, sharding
mesh = sharding.make_mesh(config.MeshConfig(), aot.topology_devices({!r})[:1])
x = jax.ShapeDtypeStruct((8, 128), 'float32', sharding=sharding.batch_sharding(mesh))
print(jax.jit(lambda x: x + 1).lower(x).compile().memory_analysis().output_size_in_bytes)
'''


def run(generation, topology, extra=''):
    script = f'set -euo pipefail; source "{ENV}"; exec "{sys.executable}" -c "$0"'
    environment = os.environ | {'TPU_GENERATION': generation, 'LIBTPU_INIT_ARGS': extra, 'JAX_PLATFORMS': 'cpu'}
    return subprocess.run(['bash', '-c', script, COMPILE.format(topology)], env=environment, capture_output=True,
                          text=True)


@pytest.mark.parametrize('generation, topology', [('v4', 'v4:2x2x1'), ('v5e', 'v5e:2x2'), ('v5p', 'v5p:2x2x1'),
                                                  ('v6e', 'v6e:2x2')])
def test_libtpu_takes_every_flag(generation, topology):
    pytest.importorskip('libtpu')
    done = run(generation, topology)
    assert (done.returncode, done.stdout.split()) == (0, ['4096']), done.stderr


def test_libtpu_would_refuse_a_flag_that_it_does_not_know():
    pytest.importorskip('libtpu')
    assert run('v5e', 'v5e:2x2', '--xla_tpu_no_such_flag=1').returncode != 0


def test_unknown_generations_are_named():
    done = run('v9', 'v9:2x2')
    assert done.returncode == 1 and 'unknown TPU_GENERATION=v9: use v4, v5e, v5p or v6e' in done.stderr
