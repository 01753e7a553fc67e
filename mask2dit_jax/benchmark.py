"""Measures one thing against its alternatives, all in one run.

  python -m mask2dit_jax.benchmark attention --out=runs/benchmark

`attention`: forward and gradients of q, k and v under the dual mask, three scenes of equal length, at video lengths of
L, 2L and 4L tokens, for every backend. Times are only comparable within one run; memory is what the compiler
plans (arguments, outputs and temporaries), the same whatever else the machine does.
"""
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import app, flags

from mask2dit_jax import attention, metric_writer, scenes

_TOKENS = flags.DEFINE_integer('tokens', 1920, 'L, the shortest video; rounded to whole frames.', lower_bound=192)
_DENSE_TOKENS = flags.DEFINE_integer('dense_tokens', 4096, 'Longest video of the dense backend, whose memory is '
                                     'quadratic.', lower_bound=0)
_RUNS = flags.DEFINE_integer('runs', 5, 'Timed runs of each case.', lower_bound=5)
_OUT = flags.DEFINE_string('out', None, 'Folder for attention.json and attention.md; default: print only.')

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
        backends = [b for b in attention.BACKENDS if b != 'dense' or layout.num_video <= dense_tokens]
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


def main(argv):
    if argv[1:] != ['attention']:
        raise app.UsageError(f'Give the name of one task, attention, got {" ".join(argv[1:]) or "none"}.')
    rows = bench_attention(_TOKENS.value, _DENSE_TOKENS.value, _RUNS.value)
    device = f'{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}'
    table = metric_writer.format_table(rows, COLUMNS)
    text = (f'{table}\n\nForward and backward, dual mask, {SCENES} equal scenes, {HEADS} heads of {HEAD_DIM}, float32, '
            f'{device}. Times are medians of {_RUNS.value} runs; time ratio is to decomposed at the same length, MB '
            'growth to the shortest video.\n')
    print(text, end='')
    if _OUT.value:
        out = pathlib.Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        (out / 'attention.md').write_text(text)
        (out / 'attention.json').write_text(json.dumps({'device': device, 'rows': rows}, indent=2) + '\n')


if __name__ == '__main__':
    app.run(main)
