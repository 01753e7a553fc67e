"""Measures one thing against its alternatives, all in one run.

  python -m mask2dit_jax.benchmark attention --out=runs/benchmark
  python -m mask2dit_jax.benchmark compile

`attention`: forward and gradients of q, k and v under the dual mask, three scenes of equal length, at video lengths of
L, 2L and 4L tokens, for the backends that any device runs. Times are only comparable within one run; memory is what the
compiler plans (arguments, outputs and temporaries), the same whatever else the machine does.

`compile`: schedules of the splash kernels for TPU, compiled here by libtpu and not run: instruction bundles per block
of queries and keys and per head, in blocks that are wholly visible and in those whose mask is evaluated. A bundle takes
about a cycle where nothing stalls.
"""
import functools
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import app, flags

from mask2dit_jax import attention, metric_writer, scenes, sharding
from mask2dit_jax import config as config_lib

_TOKENS = flags.DEFINE_integer('tokens', 1920, 'L, the shortest video; rounded to whole frames.', lower_bound=192)
_DENSE_TOKENS = flags.DEFINE_integer('dense_tokens', 4096, 'Longest video of the dense backend, whose memory is '
                                     'quadratic.', lower_bound=0)
_RUNS = flags.DEFINE_integer('runs', 5, 'Timed runs of each case.', lower_bound=5)
_OUT = flags.DEFINE_string('out', None, 'Folder for TASK.json and TASK.md; default: print only.')

HEADS, HEAD_DIM, TEXT_TOKENS, GRID, SCENES = 2, 64, 32, 8, 3
COLUMNS = ('backend', 'video tokens', 'ms', 'spread ms', 'time ratio', 'MB', 'MB growth')


def attention_layout(tokens: int, scale: int) -> scenes.SceneLayout:
    """Equal scenes: about `tokens` video tokens in all, times scale."""
    return scenes.SceneLayout((scale * round(tokens / (SCENES * GRID ** 2)),) * SCENES, GRID, GRID, TEXT_TOKENS)


def compile_attention(backend: str, layout: scenes.SceneLayout):
    """The compiled forward and backward pass, and its q, k, v, d_out, float32 [1, L, N, D]."""
    @jax.jit
    def run(q, k, v, d_out):
        attend = functools.partial(attention.attend, layout=layout, pattern='dual', backend=backend)
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(d_out)

    shape = 1, layout.num_tokens, HEADS, HEAD_DIM
    args = [jax.random.normal(key, shape, jnp.float32) for key in jax.random.split(jax.random.key(0), 4)]
    return run.lower(*args).compile(), args


def memory_bytes(compiled) -> int:
    """Peak that the compiler plans: arguments, outputs and temporaries."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes


def seconds(compiled, args) -> float:
    """Time of one run."""
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    return time.perf_counter() - start


def bench_attention(tokens: int, dense_tokens: int, runs: int) -> list[dict]:
    """One row per backend and length.

    Args:
      tokens: L; lengths are L, 2L and 4L.
      dense_tokens: 'dense' is left out of longer videos.
      runs: timed runs, after one that is not. Backends take turns, so that a busy machine slows all alike.
    """
    rows = []
    for scale in tqdm.tqdm((1, 2, 4), desc='attention', unit='length'):
        layout = attention_layout(tokens, scale)
        backends = [b for b in ('dense', 'decomposed') if b != 'dense' or layout.num_video <= dense_tokens]
        compiled = {b: compile_attention(b, layout) for b in backends}
        times = [{b: seconds(*compiled[b]) for b in backends} for _ in range(runs + 1)][1:]
        for b in backends:
            values, base = [1e3 * t[b] for t in times], [1e3 * t['decomposed'] for t in times]
            rows.append({'backend': b, 'video tokens': layout.num_video, 'ms': float(np.median(values)),
                         'spread ms': f'{min(values):.4g}...{max(values):.4g}',
                         'time ratio': float(np.median(values) / np.median(base)),
                         'MB': memory_bytes(compiled[b][0]) / 1e6})
    for row in rows:
        first = next(r for r in rows if r['backend'] == row['backend'])
        row['MB growth'] = row['MB'] / first['MB']
    return sorted(rows, key=lambda r: (r['backend'], r['video tokens']))


def dump_kernel(topology: str, block: int, head_dim: int, kernel: str, folder: str) -> None:
    """Compiles forward and backward of three published scenes, with every pass of the compiler written to `folder`.

    In a process of its own: libtpu reads its arguments once.
    """
    os.environ['LIBTPU_INIT_ARGS'] = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
    from mask2dit_jax import aot, splash
    mesh = sharding.make_mesh(config_lib.MeshConfig(), aot.topology_devices(topology)[:1])
    layout = scenes.SceneLayout((2,) * SCENES, 30, 45, 226)  # two frames each: a block's code does not depend on it
    x = jax.ShapeDtypeStruct((1, layout.num_tokens, 1, head_dim), jnp.bfloat16,
                             sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))

    def gradients(q, k, v, d_out):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            attend = functools.partial(splash.attend, layout=layout, pattern='dual', block=block, kernel=kernel)
            return jax.vjp(attend, q, k, v)[1](d_out)

    jax.jit(gradients).lower(x, x, x, x).compile()


def count_bundles(text: str) -> list[int]:
    """Bundles between branches in a final schedule, the longest stretches first."""
    address, marks = 0, [0]
    for line in text.splitlines():
        found = re.match(r'\s*(0x[0-9a-f]+)\s', line)
        if found:
            address = int(found.group(1), 16)
            if 'sbr.rel' in line:
                marks.append(address)
    return sorted((b - a for a, b in itertools.pairwise([*marks, address])), reverse=True)


def bench_compile() -> list[dict]:
    """One row per generation of chips, kernel and direction."""
    rows, cases = [], [(t, *c) for t in ('v5p:2x2x1', 'v6e:2x2', 'v5e:2x2')
                       for c in ((64, 'tokamax'), (128, 'tokamax'), (64, 'jax'))]
    for topology, head_dim, kernel in tqdm.tqdm(cases, desc='compile', unit='kernel'):
        with tempfile.TemporaryDirectory() as folder:
            code = ('import sys; from absl import flags; flags.FLAGS.mark_as_parsed(); '
                    'from mask2dit_jax import benchmark; '
                    f'benchmark.dump_kernel({topology!r}, 1024, {head_dim}, {kernel!r}, {folder!r})')
            subprocess.run([sys.executable, '-c', code], check=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'},
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for direction, name in (('forward', 'fwd'), ('backward', 'dkv')):
                path, = (p for p in pathlib.Path(folder).glob(f'*splash*{name}*-final_bundles.txt')
                         if 'schedule-analysis' not in p.name)
                counts = count_bundles(path.read_text())
                masked, visible = counts[:2] if kernel == 'tokamax' else (counts[0], counts[0])
                rows.append({'chip': topology.split(':')[0], 'kernel': kernel, 'head size': head_dim,
                             'direction': direction, 'visible': visible, 'masked': masked})
    return rows


def main(argv):
    if len(argv) != 2 or argv[1] not in ('attention', 'compile'):
        raise app.UsageError(f'Give the name of one task, attention or compile, got {" ".join(argv[1:]) or "none"}.')
    task = argv[1]
    device = f'{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}'
    if task == 'attention':
        rows, columns = bench_attention(_TOKENS.value, _DENSE_TOKENS.value, _RUNS.value), COLUMNS
        note = (f'Forward and backward, dual mask, {SCENES} equal scenes, {HEADS} heads of {HEAD_DIM}, float32, '
                f'{device}. Times are medians of {_RUNS.value} runs; time ratio is to decomposed at the same length, '
                'MB growth to the shortest video.')
    else:
        rows, columns = bench_compile(), ('chip', 'kernel', 'head size', 'direction', 'visible', 'masked')
        note = 'Bundles per head and block of 1024 queries and keys, dual mask. Compiled, not run.'
    text = f'{metric_writer.format_table(rows, columns)}\n\n{note}\n'
    print(text, end='')
    if _OUT.value:
        out = pathlib.Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        (out / f'{task}.md').write_text(text)
        (out / f'{task}.json').write_text(json.dumps({'device': device, 'rows': rows}, indent=2) + '\n')


if __name__ == '__main__':
    app.run(main)
