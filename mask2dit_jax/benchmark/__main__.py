"""Measures one thing against its alternatives, all in one run.

  python -m mask2dit_jax.benchmark attention --out=runs/benchmark
  python -m mask2dit_jax.benchmark train
  python -m mask2dit_jax.benchmark sample
  python -m mask2dit_jax.benchmark scenes
  python -m mask2dit_jax.benchmark compile
  python -m mask2dit_jax.benchmark loader
  python -m mask2dit_jax.benchmark checkpoint --gb=4

`attention`: forward and gradients of q, k and v under the dual mask, three scenes of equal length,
at video lengths of L, 2L and 4L tokens: the backends that the device runs, the reference's
formulation ('repeated': two dense calls, video keys and values copied for every scene), and at
length L on a CPU the splash kernel, interpreted. Memory is what the compiler plans (arguments,
outputs and temporaries), the same whatever else the machine does.

`train`, `sample`, `scenes`: a transformer of 8 layers of 8 heads of 64 in float32, scenes of 480
tokens: forward and forward + backward at 3 scenes; two guided steps of the sampling loop; forward +
backward at 1, 3 and 6 scenes. With the `oracle` extra, diffusers' transformer with the same weights
and mask, by the reference's two calls, beside ours. Every case is a process of its own; its memory
is the most that it held in a run beyond what importing took (Linux only).

`compile`: schedules of the splash kernels for TPU, compiled here by libtpu and not run: instruction
bundles per block of queries and keys and per head, in blocks that are wholly visible and in those
whose mask is evaluated. A bundle takes about a cycle where nothing stalls.

`loader`: reading batches of encoded clips of CogVideoX-5B's size (random values, written to --out
or to temporary files) as the trainer does, with one thread: scenes and bytes per second of a host.

`checkpoint`: saving and restoring a state of random values by the trainer's functions, on the file
system of --out (or of temporary files), in seconds per GB: how long the training loop stands still,
until all is written, and restoring with its checksums. What was just written is read from the page
cache where it fits.

Cases take turns, so that a busy machine slows all alike; times are only comparable within one run.
"""

import json
import os
import pathlib

import jax
from absl import app, flags

from mask2dit_jax import logs
from mask2dit_jax import tables as tables_lib
from mask2dit_jax.benchmark import attention, checkpoints, kernels, loader, model


def main(argv):
    names = ('attention', *model.TASKS, 'compile', 'loader', 'checkpoint')
    if len(argv) != 2 or argv[1] not in names:
        raise app.UsageError(
            f'Give the name of one task, {", ".join(names)}; got {" ".join(argv[1:]) or "none"}.'
        )
    task, runs = argv[1], _RUNS.value
    logs.quiet_libraries()
    device = f'{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}'
    tables = {}
    if task == 'attention':
        tables[task] = attention.bench_attention(_TOKENS.value, _DENSE_TOKENS.value, runs)
        note = (
            f'Forward and backward, dual mask, {attention.SCENES} equal scenes, {attention.HEADS} heads of {attention.HEAD_DIM}, float32, '
            f'{device}. Times are medians of {runs} runs; time ratio is to blockwise at the same length, '
            'MB growth to the shortest video.'
        )
    elif task == 'compile':
        tables[task] = kernels.bench_compile()
        note = 'Bundles per head and block of 1024 queries and keys, dual mask. Compiled, not run.'
    elif task == 'loader':
        tables[task] = loader.bench_loader(runs, _OUT.value)
        note = (
            f'Batches of 8 stories of 3 scenes of 49 frames at 480x720; {os.cpu_count()} processors; median of '
            f'{runs} batches, after one that does not count; files are in the page cache.'
        )
    elif task == 'checkpoint':
        tables[task] = checkpoints.bench_checkpoint(_GB.value, runs, _OUT.value)
        note = f'{device}. Medians of {runs} runs, after one that does not count.'
    else:
        tables['model'], tables['profile'] = model.bench_model(task, runs)
        note = (
            f'{device}. Times are medians of {runs} runs, memory is that of the last, ratios are to diffusers if '
            'it is installed. Equal values mean equal results. The second table has milliseconds of one traced '
            'run by kind of work; what threads do at once counts for each.'
        )
    text = '\n\n'.join(
        [*(tables_lib.format_table(rows, COLUMNS[name]) for name, rows in tables.items()), note]
    )
    print(text)
    if _OUT.value:
        out = pathlib.Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        (out / f'{task}.md').write_text(text + '\n')
        (out / f'{task}.json').write_text(json.dumps({'device': device, **tables}, indent=2) + '\n')


if (
    __name__ == '__main__'
):  # only here, since tests import this next to sample, which has an --out of its own
    _TOKENS = flags.DEFINE_integer(
        'tokens', 1920, 'L, the shortest video; rounded to whole frames.', lower_bound=192
    )
    _DENSE_TOKENS = flags.DEFINE_integer(
        'dense_tokens',
        4096,
        'Longest video of the dense backend, whose memory is quadratic.',
        lower_bound=0,
    )
    _RUNS = flags.DEFINE_integer('runs', 5, 'Timed runs of each case.', lower_bound=5)
    _GB = flags.DEFINE_float(
        'gb', 1.0, 'Size of the state that is saved, in 10^9 bytes.', lower_bound=0.0
    )
    _OUT = flags.DEFINE_string(
        'out', None, 'Folder for TASK.json and TASK.md; default: print only.'
    )
    app.run(main)

COLUMNS = {
    'attention': (
        'formulation',
        'video tokens',
        'ms',
        'spread ms',
        'time ratio',
        'MB',
        'MB growth',
    ),
    'model': (
        'scenes',
        'what',
        'formulation',
        'remat',
        'ms',
        'spread ms',
        'time ratio',
        'MB',
        'MB ratio',
        'value',
    ),
    'profile': ('scenes', 'what', 'formulation', 'remat', 'attention', 'matmuls', 'rest'),
    'loader': ('scenes/s', 'spread scenes/s', 'MB/s'),
    'checkpoint': ('what', 'GB', 's/GB', 'spread s/GB'),
    'compile': ('chip', 'kernel', 'head size', 'direction', 'visible', 'masked'),
}
