"""Measures one thing beside its alternatives, all in one run.

Required: the name of a task; there are no required flags.

  python -m mask2dit_jax.benchmark attention --out=runs/benchmark
  python -m mask2dit_jax.benchmark train
  python -m mask2dit_jax.benchmark sample
  python -m mask2dit_jax.benchmark scenes
  python -m mask2dit_jax.benchmark extend
  python -m mask2dit_jax.benchmark compile
  python -m mask2dit_jax.benchmark loader
  python -m mask2dit_jax.benchmark index --clips=10000000
  python -m mask2dit_jax.benchmark checkpoint --gb=4

`attention`: forward pass and gradients of q, k and v under the dual mask, for three scenes of equal
length, at videos of L, 2L and 4L tokens. It compares the backends that the device runs and the
reference's formulation ('repeated': two dense calls, video keys and values copied for every scene);
on a CPU also the splash kernel, interpreted, at L tokens. Memory is what the compiler plans
(arguments, outputs and temporaries), so it does not depend on what else the machine does.

`train`, `sample`, `scenes`: a transformer of 8 layers with 8 heads of 64, in float32, on scenes of
480 tokens. `train` has the forward pass, and forward + backward, at 3 scenes; `sample` has two
guided steps of the sampling loop; `scenes` has forward + backward at 1, 3 and 6 scenes. With the
extra `oracle`, diffusers' transformer runs with the same weights and mask, by the reference's two
calls. Every case is a process of its own. Its memory is the most that a run held beyond what
importing had taken (Linux only).

`extend`: one more scene after 2, 4, 8 and 16 given ones, by the same model under the causal mask:
with all scenes in the sampling loop, with the last two alone, and with a cache of the keys and
values of all. 'ms before' is what comes before the first step (the pass that fills the cache), and
's/scene' is for 50 guided steps, extrapolated from 3. Memory is what the compiler plans.

`compile`: schedules of the splash kernels for TPU, which libtpu compiles here and which do not run.
The table has instruction bundles per head and block of queries and keys, for blocks that are wholly
visible and for blocks whose mask is evaluated. A bundle takes about a cycle where nothing stalls.

`loader`: scenes and bytes per second of one thread that reads batches as the trainer does. The
encoded clips have the size of CogVideoX-5B's and random values; they are written to --out, or to
temporary files.

`index`: what a data set of --clips clips costs every host before a clip is read. The columns are
seconds to open it and to list what examples may begin with, milliseconds to draw the clips of a
batch of 8 stories, and the memory at most, beyond what importing had taken (Linux only). The index
is written to --out, or to temporary files; there are no records.

`checkpoint`: seconds per GB for saving and restoring a state of random values by the trainer's
functions: how long the training loop waits, how long it takes until everything is written, and how
long restoring takes, checksums included. Files are in --out, or temporary. What was just written is
read from the page cache where it fits.

Cases take turns, so that a busy machine slows all of them alike. Compare times of one run only.
"""

import json
import os
import pathlib

import jax
from absl import app, flags

from mask2dit_jax import logs, paths
from mask2dit_jax import tables as tables_lib
from mask2dit_jax.benchmark import attention, checkpoints, extend, index, kernels, loader, model

NAMES = ('attention', *model.TASKS, 'extend', 'compile', 'loader', 'index', 'checkpoint')

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
    'extend': (
        'given scenes',
        'formulation',
        'ms/step',
        'step ratio',
        'ms before',
        's/scene',
        'MB',
        'cache MB',
    ),
    'profile': ('scenes', 'what', 'formulation', 'remat', 'attention', 'matmuls', 'rest'),
    'loader': ('scenes/s', 'spread scenes/s', 'MB/s'),
    'index': ('clips', 'scenes', 'open s', 'list s', 'ms/batch', 'MB'),
    'checkpoint': ('what', 'GB', 's/GB', 'spread s/GB'),
    'compile': ('chip', 'kernel', 'head size', 'direction', 'visible', 'masked'),
}


def _measure(task: str, runs: int, device: str) -> tuple[dict[str, list[dict]], str]:
    """The rows of every table of a task, and the note below the tables."""
    if task == 'attention':
        rows = attention.bench_attention(_TOKENS.value, _DENSE_TOKENS.value, runs)
        note = (
            f'Forward and backward, dual mask, {attention.SCENES} equal scenes, {attention.HEADS} '
            f'heads of {attention.HEAD_DIM}, float32, {device}. Times are medians of {runs} runs; '
            'time ratio is to blockwise at the same length, MB growth to the shortest video.'
        )
        return {task: rows}, note

    if task == 'extend':
        rows = extend.bench_extend(runs)
        note = (
            f'Scenes of 480 tokens, guided DDIM, float32, {device}. Times are medians of {runs} '
            'runs; ratios are to all scenes in the loop.'
        )
        return {task: rows}, note

    if task == 'compile':
        note = 'Bundles per head and block of 1024 queries and keys, dual mask. Compiled, not run.'
        return {task: kernels.bench_compile()}, note

    if task == 'loader':
        rows = loader.bench_loader(runs, _OUT.value)
        note = (
            'Batches of 8 stories of 3 scenes of 49 frames at 480x720; '
            f'{os.cpu_count()} processors; median of {runs} batches, after one that does not '
            'count; files are in the page cache.'
        )
        return {task: rows}, note

    if task == 'index':
        rows = index.bench_index(_CLIPS.value, _OUT.value)
        note = (
            f'Stories of {loader.SCENES} scenes; {os.cpu_count()} processors; files are in the '
            'page cache.'
        )
        return {task: rows}, note

    if task == 'checkpoint':
        rows = checkpoints.bench_checkpoint(_GB.value, runs, _OUT.value)
        note = f'{device}. Medians of {runs} runs, after one that does not count.'
        return {task: rows}, note

    rows, profiles = model.bench_model(task, runs)
    note = (
        f'{device}. Times are medians of {runs} runs, memory is that of the last, ratios are to '
        'diffusers if it is installed. Equal values mean equal results. The second table has '
        'milliseconds of one traced run by kind of work; the times of threads that work at the '
        'same time are added up.'
    )
    return {'model': rows, 'profile': profiles}, note


def main(argv):
    if len(argv) != 2 or argv[1] not in NAMES:
        raise app.UsageError(
            f'Give the name of one task, {", ".join(NAMES)}; got {" ".join(argv[1:]) or "none"}.'
        )
    task = argv[1]
    logs.quiet_libraries()
    out = pathlib.Path(_OUT.value) if _OUT.value else None
    if out:
        out.mkdir(parents=True, exist_ok=True)

    device = f'{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}'
    tables, note = _measure(task, _RUNS.value, device)

    parts = [tables_lib.format_table(rows, COLUMNS[name]) for name, rows in tables.items()]
    text = '\n\n'.join([*parts, note])
    print(text)
    if out:
        (out / f'{task}.md').write_text(text + '\n')
        values = {'device': device, **tables}
        (out / f'{task}.json').write_text(json.dumps(values, indent=2) + '\n')


# Only here, since tests import this module next to sample, which has a flag --out, too.
if __name__ == '__main__':
    _TOKENS = flags.DEFINE_integer(
        'tokens',
        1920,
        'L, the tokens of the shortest video; rounded to whole frames.',
        lower_bound=192,
    )
    _DENSE_TOKENS = flags.DEFINE_integer(
        'dense_tokens',
        4096,
        'Tokens of the longest video for the dense formulations, whose memory is quadratic.',
        lower_bound=0,
    )
    _RUNS = flags.DEFINE_integer('runs', 5, 'Timed runs of each case.', lower_bound=5)
    _GB = flags.DEFINE_float(
        'gb', 1.0, 'Size of the state that is saved, in 10^9 bytes.', lower_bound=0.001
    )
    _CLIPS = flags.DEFINE_integer(
        'clips', 1_000_000, 'Number of clips in the index.', lower_bound=3
    )
    _OUT = flags.DEFINE_string(
        'out', None, 'Folder for TASK.json and TASK.md. Without it tables are only printed.'
    )
    paths.check_flags_local('out')
    app.run(main)
