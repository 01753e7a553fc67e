"""The tasks of the benchmark: what computes the same is compared in one run."""
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
import tqdm

from mask2dit_jax import checkpoint
from mask2dit_jax import config as config_lib
from mask2dit_jax.attention import attend as attend_lib
from mask2dit_jax.attention import splash
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import manifest, records
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.training import train_step

HEADS, HEAD_DIM, TEXT_TOKENS, GRID, SCENES = 2, 64, 32, 8, 3
COLUMNS = {
    'attention': ('formulation', 'video tokens', 'ms', 'spread ms', 'time ratio', 'MB', 'MB growth'),
    'model': ('scenes', 'what', 'formulation', 'remat', 'ms', 'spread ms', 'time ratio', 'MB', 'MB ratio', 'value'),
    'profile': ('scenes', 'what', 'formulation', 'remat', 'attention', 'matmuls', 'rest'),
    'loader': ('scenes/s', 'spread scenes/s', 'MB/s'),
    'checkpoint': ('what', 'GB', 's/GB', 'spread s/GB'),
    'compile': ('chip', 'kernel', 'head size', 'direction', 'visible', 'masked'),
}

# (formulation, remat) of `train`, and how many scenes and what the tasks measure.
FORMULATIONS = (('decomposed', 'save_matmuls'), ('decomposed', 'none'), ('decomposed', 'full'), ('dense', 'none'))
TASKS = {
    'train': [(3, 'forward'), (3, 'forward + backward')],
    'sample': [(3, 'sampling')],
    'scenes': [(n, 'forward + backward') for n in (1, 3, 6)],
}


def attention_layout(tokens: int, scale: int) -> SceneLayout:
    """Equal scenes: about `tokens` video tokens in all, times scale."""
    return SceneLayout((scale * round(tokens / (SCENES * GRID ** 2)),) * SCENES, GRID, GRID, TEXT_TOKENS)


def repeated(q, k, v, layout: SceneLayout, pattern: str):
    """The reference's dual mask for scenes of equal length: captions with their scene, scenes with all video."""
    assert pattern == 'dual'
    b, _, n, d = q.shape

    def by_scene(x):
        return x.reshape(b * layout.num_scenes, -1, n, d)

    captions, video = ([x[:, a:z] for x in (q, k, v)]
                       for a, z in ((0, layout.num_text), (layout.num_text, layout.num_tokens)))
    captions = [by_scene(x) for x in captions]
    copies = [jnp.repeat(x, layout.num_scenes, axis=0) for x in video[1:]]
    video = [by_scene(x) for x in video]

    def attend(query, *pairs):
        return jax.nn.dot_product_attention(query, *(jnp.concatenate(p, axis=1) for p in pairs)).reshape(b, -1, n, d)

    return jnp.concatenate([attend(captions[0], *zip(captions[1:], video[1:])),
                            attend(video[0], *zip(captions[1:], copies))], axis=1)


def attention_formulations() -> dict:
    """Functions of (q, k, v, layout, pattern) by name: what this device can run."""
    names = {'cpu': ('dense', 'decomposed'), 'gpu': ('dense', 'decomposed', 'cudnn'),
             'tpu': ('dense', 'decomposed', 'splash', 'jax_splash')}[jax.default_backend()]
    formulations = {name: functools.partial(attend_lib.attend, backend=name) for name in names} | {'repeated': repeated}
    if jax.default_backend() == 'cpu':
        formulations['splash (interpreted)'] = functools.partial(splash.attend, block=128, interpret=True)
    return formulations


def compile_attention(function, layout: SceneLayout):
    """The compiled forward and backward pass, and its q, k, v, d_out, float32 [1, L, N, D]."""
    @jax.jit
    def run(q, k, v, d_out):
        out, vjp = jax.vjp(functools.partial(function, layout=layout, pattern='dual'), q, k, v)
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


def spread(values) -> dict:
    """Median and range of times in milliseconds."""
    return {'ms': float(np.median(values)), 'spread ms': f'{min(values):.4g}...{max(values):.4g}'}


def bench_attention(tokens: int, dense_tokens: int, runs: int) -> list[dict]:
    """One row per formulation and length.

    Args:
      tokens: L; lengths are L, 2L and 4L.
      dense_tokens: 'dense' and 'repeated' are left out of longer videos.
      runs: timed runs, after one that is not.
    """
    rows, formulations = [], attention_formulations()
    for scale in tqdm.tqdm((1, 2, 4), desc='attention', unit='length'):
        layout = attention_layout(tokens, scale)
        names = [n for n in formulations if not (n in ('dense', 'repeated') and layout.num_video > dense_tokens)
                 and not (n == 'splash (interpreted)' and scale > 1)]
        compiled = {n: compile_attention(formulations[n], layout) for n in names}
        times = [{n: 1e3 * seconds(*compiled[n]) for n in names} for _ in range(runs + 1)][1:]
        base = np.median([t['decomposed'] for t in times])
        for n in names:
            timed = spread([t[n] for t in times])
            rows.append({'formulation': n, 'video tokens': layout.num_video, **timed, 'time ratio': timed['ms'] / base,
                         'MB': memory_bytes(compiled[n][0]) / 1e6})
    for row in rows:
        first = next(r for r in rows if r['formulation'] == row['formulation'])
        row['MB growth'] = row['MB'] / first['MB']
    return sorted(rows, key=lambda r: (r['formulation'], r['video tokens']))


def ask(worker: subprocess.Popen, question: str) -> dict:
    """One answer of a worker.

    Raises:
      RuntimeError: if it died.
    """
    worker.stdin.write(question + '\n')
    worker.stdin.flush()
    return listen(worker)


def listen(worker: subprocess.Popen) -> dict:
    """The next line of a worker, as `ask`."""
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f'A case stopped with code {worker.wait()}: {worker.args[-1]}; its last words are above.')
    return json.loads(line)


def bench_model(task: str, runs: int) -> tuple[list[dict], list[dict]]:
    """Rows of times and memory, and of where the time goes, for one of TASKS.

    Ratios are to diffusers where it is installed, else to the first formulation, at the same scenes and work.
    """
    rows, profiles = [], []
    for num_scenes, what in tqdm.tqdm(TASKS[task], desc=task, unit='group'):
        trained = what == 'forward + backward'
        pairs = FORMULATIONS if trained and task == 'train' else [FORMULATIONS[0], ('dense', 'save_matmuls')]
        cases = [{'formulation': f, 'remat': r if trained else '', 'scenes': num_scenes, 'what': what}
                 for f, r in pairs]
        if importlib.util.find_spec('diffusers') and importlib.util.find_spec('torch'):
            cases.append(cases[0] | {'formulation': 'diffusers', 'remat': ''})
        workers = [subprocess.Popen([sys.executable, '-m', 'mask2dit_jax.benchmark.worker', json.dumps(case)],
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for case in cases]
        try:
            values = [listen(worker)['value'] for worker in workers]
            answers = [[ask(worker, 'run') for worker in workers] for _ in range(runs)]
            profiles += [case | ask(worker, 'profile') for case, worker in zip(cases, workers)
                         if case['formulation'] != 'diffusers']
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        group = [case | {'value': value, **spread([1e3 * a['seconds'] for a in timed]), 'MB': timed[-1]['mb']}
                 for case, value, timed in zip(cases, values, zip(*answers))]
        base = next((r for r in group if r['formulation'] == 'diffusers'), group[0])
        rows += [r | {'time ratio': r['ms'] / base['ms'], 'MB ratio': r['MB'] / base['MB']} for r in group]
    return rows, profiles


def dump_kernel(topology: str, block: int, head_dim: int, kernel: str, folder: str) -> None:
    """Compiles forward and backward of three published scenes, with every pass of the compiler written to `folder`.

    In a process of its own: libtpu reads its arguments once.
    """
    os.environ['LIBTPU_INIT_ARGS'] = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
    from mask2dit_jax.aot import compiler  # which imports this module
    mesh = partitioning.make_mesh(config_lib.MeshConfig(), compiler.topology_devices(topology)[:1])
    layout = SceneLayout((2,) * SCENES, 30, 45, 226)  # two frames each: a block's code does not depend on it
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


def kernel_bundles(topology: str, head_dim: int, kernel: str, block: int = 1024) -> dict[str, tuple[int, int]]:
    """Bundles per head and block of so many queries and keys: 'forward' and 'backward', (visible, masked)."""
    bundles = {}
    with tempfile.TemporaryDirectory() as folder:
        code = ('import sys; from absl import flags; flags.FLAGS.mark_as_parsed(); from mask2dit_jax.benchmark import tasks; '
                f'tasks.dump_kernel({topology!r}, {block}, {head_dim}, {kernel!r}, {folder!r})')
        subprocess.run([sys.executable, '-c', code], check=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'},
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for direction, name in (('forward', 'fwd'), ('backward', 'dkv')):
            path, = (p for p in pathlib.Path(folder).glob(f'*splash*{name}*-final_bundles.txt')
                     if 'schedule-analysis' not in p.name)
            longest, second = count_bundles(path.read_text())[:2]
            bundles[direction] = (second, longest) if kernel == 'tokamax' else (longest, longest)
    return bundles


def bench_compile() -> list[dict]:
    """One row per generation of chips, kernel and direction."""
    cases = [(topology, *case) for topology in ('v5p:2x2x1', 'v6e:2x2', 'v5e:2x2')
             for case in ((64, 'tokamax'), (128, 'tokamax'), (64, 'jax'))]
    return [{'chip': topology.split(':')[0], 'kernel': kernel, 'head size': head_dim, 'direction': direction,
             'visible': visible, 'masked': masked}
            for topology, head_dim, kernel in tqdm.tqdm(cases, desc='compile', unit='kernel')
            for direction, (visible, masked) in kernel_bundles(topology, head_dim, kernel).items()]


def write_random_clips(folder: pathlib.Path, count: int) -> config_lib.Config:
    """A data set of stories of three clips with the shapes of 49 frames at 480x720 and CogVideoX-5B's text, and a
    configuration to train on it."""
    (folder / 'vae').mkdir(parents=True)
    (folder / 'vae/config.json').write_text('{}')
    config = config_lib.Config(data=config_lib.DataConfig(
        encoded=str(folder / 'data'), codec='vae', layouts=((49,) * 3,), height_px=480, width_px=720))
    latent_frames, (h, w, channels) = batches_lib.latent_shape(config, (49,))
    m, rng = config.model, np.random.default_rng(0)
    settings = {'kind': manifest.MULTI_SCENE, 'store': 'moments', 'parts': 1, 'moments_shape': [h, w, 2 * channels],
                'text_shape': [m.max_text_seq_length, m.text_embed_dim], 'scaling_factor': 0.7, 'folder': str(folder),
                'vae': batches_lib.network_digest(folder / 'vae')}
    records.write_settings(folder / 'data', settings)

    def random(*shape):
        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    safetensors.numpy.save_file({'text': random(*settings['text_shape'])}, folder / 'data/null_text.safetensors')
    examples = ({'story': i // 3, 'scene': i % 3, 'frames': 49, 'caption': '', 'path': '',
                 'moments': random(*latent_frames, h, w, 2 * channels), 'text': random(*settings['text_shape'])}
                for i in tqdm.trange(count, desc='writing', unit='clip'))
    records.write_part(folder / 'data', settings, 0, examples, [])
    records.write_info(folder / 'data', settings)
    return config


def bench_loader(runs: int, folder) -> list[dict]:
    """One row: what a thread of the trainer reads."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        config = write_random_clips(pathlib.Path(work), 48)
        _, shape = batches_lib.latent_shape(config, (49,))
        batches, speeds = batches_lib.train_batches(config, work, types.SimpleNamespace(latent_shape=shape)), []
        for step in tqdm.trange(runs + 1, desc='loader', unit='batch'):
            start = time.perf_counter()
            _, batch = batches(step, range(8))
            speeds.append(batch['text'].shape[0] * batch['text'].shape[1] / (time.perf_counter() - start))
        stored = 2 * (2 * batch['latents'].size + batch['text'].size)  # bytes: mean and log-variance, and text
    speed = float(np.median(speeds[1:]))
    return [{'scenes/s': speed, 'spread scenes/s': f'{min(speeds[1:]):.3g}...{max(speeds[1:]):.3g}',
             'MB/s': speed * stored / batch['text'].shape[0] / batch['text'].shape[1] / 1e6}]


def bench_checkpoint(gb: float, runs: int, folder) -> list[dict]:
    """One row for what saving holds up, saving, and restoring; parameters, EMA and two moments of equal size."""
    arrays = max(1, round(gb * 1e9 / 4 / 2 ** 26))  # of 64 MiB, in each of the four
    gb = 4 * arrays * 2 ** 26 / 1e9
    trees = [{str(j): jax.random.normal(jax.random.key(arrays * i + j), (4096, 4096)) for j in range(arrays)}
             for i in range(4)]
    state = train_step.TrainState(jnp.int32(0), trees[0], trees[1], trees[2:])
    targets = {item: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                                  getattr(state, item)) for item in checkpoint.ITEMS}
    times = {'save: the loop waits': [], 'save: all': [], 'restore': []}
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        manager = checkpoint.manager(workdir, keep=1, keep_every=0, start=0)
        for run in tqdm.trange(runs + 1, desc='checkpoint', unit='run'):
            marks = [time.perf_counter()]
            checkpoint.save(manager, run, state, {})
            marks.append(time.perf_counter())
            manager.wait_until_finished()
            marks.append(time.perf_counter())
            jax.block_until_ready(checkpoint.latest(workdir, targets)[1])
            marks.append(time.perf_counter())
            for values, (a, b) in zip(times.values(), ((0, 1), (0, 2), (2, 3))):
                values.append((marks[b] - marks[a]) / gb)
        checkpoint.finish(manager)
    return [{'what': what, 'GB': gb, 's/GB': float(np.median(values[1:])),
             'spread s/GB': f'{min(values[1:]):.3g}...{max(values[1:]):.3g}'} for what, values in times.items()]
