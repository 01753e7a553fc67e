"""The training run: data, state, loop, sample sheets, checkpoints, and the scores at the end."""
import contextlib
import dataclasses
import json
import math
import pathlib
import time

import jax
import numpy as np
import tqdm
from absl import logging

from mask2dit_jax import checkpoint, hardware, pipeline, stories
from mask2dit_jax import config as config_lib
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import video
from mask2dit_jax.distributed import multihost, partitioning
from mask2dit_jax.models import dit
from mask2dit_jax.pretrained import runs
from mask2dit_jax.training import metric_writer, train_step

SCORE_COLUMNS = ('task', 'frames', 'action', 'identity', 'background', 'consistency', 'story', 'leak', 'color', 'shape',
                 'residual', 'loss')
SCORE_NOTES = {'residual': 'residual: distance to the best rendering, lower is cleaner.',
               'loss': 'loss: of v-prediction at fixed noise, over scenes that are not given.'}
TRACED_STEPS = 3  # enough to see one that is not the first


def _initial_state(config: config_lib.Config, coders: batches_lib.Coders, mesh):
    """State straight into its shardings; from a model folder or the EMA of another run if the configuration says so."""
    frames, m = coders.latent_frames(config.data.layouts[0]), config.model
    text = np.zeros((len(frames), m.max_text_seq_length, m.text_embed_dim), np.float32)
    inputs = np.zeros((sum(frames), *coders.latent_shape), np.float32), text, frames
    abstract = jax.eval_shape(lambda: train_step.init_state(config, inputs))
    shardings = partitioning.shardings(abstract, mesh)
    if config.lora.rank:
        # The base is never made, only read.
        state = jax.jit(lambda: train_step.init_state(config, inputs).replace(base=()),
                        out_shardings=shardings.replace(base=()))()
        return state.replace(base=runs.load_base(config, partitioning.targets(abstract.base, mesh))), shardings
    state = jax.jit(lambda: train_step.init_state(config, inputs), out_shardings=shardings)()
    if config.init_from:
        params = runs.load_base(config, partitioning.targets(abstract.params, mesh))
        state = state.replace(params=params, ema=jax.tree.map(lambda x: x.copy(), params))
    return state, shardings


def _run_meta(config: config_lib.Config, batches: batches_lib.Batches) -> dict:
    """What must not change between a run and its continuation."""
    return {'data': batches.fingerprint, 'seed': config.seed, 'init_from': config.init_from,
            'optimizer': config.optimizer.name,
            'model': dataclasses.asdict(config.model) | {'remat': '', 'attention_backend': ''},
            'lora': dataclasses.asdict(config.lora),
            'batch_size': config.train.batch_size, 'caption_style': config.data.caption_style}


def _checked_mean(values, step: int) -> float:
    """Mean of metrics fetched from the device.

    Raises:
      FloatingPointError: if it is not finite.
    """
    mean = float(np.mean(jax.device_get(values)))
    if not math.isfinite(mean):
        raise FloatingPointError(f'Loss or gradient became {mean} before step {step}: nothing was saved since the '
                                 'last checkpoint; lower optimizer.learning_rate or clip_norm and start again.')
    return mean


def generate_held_out(config: config_lib.Config, params, coders: batches_lib.Coders, source: stories.StorySource,
                      frames: tuple[int, ...], given_scenes: int, desc: str) -> tuple[np.ndarray, list[stories.Story]]:
    """Videos float32 [config.eval.stories, F, H, W, 3] of held-out stories, leading scenes given; and the stories."""
    size, total = config.eval.batch_size, config.eval.stories
    videos, known = [], []
    for first in tqdm.tqdm(range(0, total, size), desc=desc, unit='batch', disable=jax.process_index() != 0):
        examples = [source[i % len(source)] for i in range(first, first + size)]
        known += [e['story'] for e in examples]
        captions = [stories.captions(s, config.data.caption_style) for s in known[-size:]]
        given = np.stack([e['video'][:sum(frames[:given_scenes])] for e in examples]) if given_scenes else None
        videos.append(pipeline.generate(config, params, coders, captions, frames, seed=config.seed, first_index=first,
                                        given_videos=given))
    return np.concatenate(videos)[:total], known[:total]


def score_stories(config: config_lib.Config, params, coders: batches_lib.Coders, workdir) -> list[dict]:
    """Exact scores on held-out stories: generation and extension, for every layout of the configuration.

    Returns:
      One row per task and layout, the keys of SCORE_COLUMNS and scores per scene.
    """
    rows = []
    for frames in dict.fromkeys(config.data.layouts):
        source = batches_lib.open_stories(config, workdir, frames, 'test')
        name = '+'.join(map(str, frames))
        tasks = {'generate': 0, f'extend {len(frames) - 1} given': len(frames) - 1}
        for task, given in tasks.items() if len(frames) > 1 else [('generate', 0)]:
            picked = tuple(range(given, len(frames)))
            videos, known = generate_held_out(config, params, coders, source, frames, given, f'scoring {task} {name}')
            scores = stories.summarize(stories.score(videos, known, scenes=picked), scenes=picked)
            rows.append({'task': task, 'frames': name} | scores)
    return rows


def _held_out(config, workdir, coders, frames, count: int, given_scenes: int):
    """Captions, and what the transformer gets, of `count` stories: held-out ones, with leading scenes given."""
    if not config.data.encoded:
        source = batches_lib.open_stories(config, workdir, frames, 'test')
        examples = [source[i] for i in range(count)]
        captions = [stories.captions(e['story'], config.data.caption_style) for e in examples]
        given = np.stack([e['video'][:sum(frames[:given_scenes])] for e in examples]) if given_scenes else None
        return captions, pipeline.encode_inputs(coders, captions, frames, given)
    encoded = batches_lib.EncodedClips(config, coders.latent_shape, config.data.held_out or config.data.encoded)
    picked = encoded.fixed(frames, count)
    examples = [encoded.example(records, None) for records in picked]
    latent_frames = coders.latent_frames(frames)
    given = np.stack([e['latents'] for e in examples])
    given[:, sum(latent_frames[:given_scenes]):] = 0
    marks = np.tile(np.arange(len(frames)) < given_scenes, (count, 1))
    inputs = pipeline.Inputs(latent_frames, np.stack([e['text'] for e in examples]), encoded.null_text, given, marks)
    return [encoded.captions(records) for records in picked], inputs


def _tasks(frames) -> dict[str, int]:
    """Given scenes by task: generation, and extension by the last scene."""
    return {'generated': 0, 'extended': len(frames) - 1} if len(frames) > 1 else {'generated': 0}


def write_sheets(config: config_lib.Config, params, coders: batches_lib.Coders, workdir, step: int) -> list[pathlib.Path]:
    """Sample sheets of held-out stories: generated from captions, and extended from all scenes but the last.

    Beside each picture stands a .json of its captions: {"stories": [[caption, ...], ...], "given_scenes": 0}.
    """
    frames, count = config.data.layouts[0], config.sample.sheet_stories
    paths = []
    for name, given in _tasks(frames).items():
        captions, inputs = _held_out(config, workdir, coders, frames, count, given)
        out = coders.decode_video(pipeline.sample_latents(config, params, inputs, seed=config.seed),
                                  inputs.latent_frames)
        paths.append(pathlib.Path(workdir) / 'sheets' / f'{step:08d}_{name}.png')
        if jax.process_index() == 0:
            grid = [pipeline.split_scenes(v, frames) for v in out]
            marks = [[i < given for i in range(len(frames))]] * count
            video.write_png(paths[-1], video.story_grid(grid, captions, given=marks))
            known = {'stories': [list(c) for c in captions], 'given_scenes': given}
            paths[-1].with_suffix('.json').write_text(json.dumps(known) + '\n', encoding='utf-8')
    return paths


def held_out_losses(config: config_lib.Config, params, coders: batches_lib.Coders) -> list[dict]:
    """Denoising loss of encoded clips, for generation and extension, at the same noise and timesteps every time.

    Returns:
      One row per task and layout: 'task', 'frames', 'loss'.
    """
    rows, schedule, mesh = [], config.schedule, partitioning.mesh_of(params)
    encoded = batches_lib.EncodedClips(config, coders.latent_shape, config.data.held_out or config.data.encoded)
    size, total = config.eval.batch_size, config.eval.stories
    spread = partitioning.batch_sharding(mesh)
    for frames in dict.fromkeys(config.data.layouts):
        picked, latent_frames = encoded.fixed(frames, total), coders.latent_frames(frames)

        def loss(params, batch, noise, t, given, latent_frames=latent_frames):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                error, count = train_step.denoising_loss(dit.DiT(config.model), params, schedule, batch, noise, t,
                                                         given, latent_frames)
                return error / count

        run = jax.jit(loss, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        for task, given_scenes in _tasks(frames).items():
            values = []
            for first in range(0, total, size):
                examples = [encoded.example(p, None) for p in picked[first:first + size]]
                batch = {k: np.stack([e[k] for e in examples]) for k in examples[0]}
                rng = np.random.default_rng([config.seed, first])
                t = (np.arange(size) + 0.5) / size * schedule.num_train_timesteps
                given = np.tile(np.arange(len(frames)) < given_scenes, (size, 1))
                noise = rng.standard_normal(batch['latents'].shape, np.float32)
                args = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, spread, lambda i, x=x: x[i]),
                                    (batch, noise, t.astype(np.int32), given))
                values.append(float(run(params, *args)))
            rows.append({'task': task, 'frames': '+'.join(map(str, frames)), 'loss': float(np.mean(values))})
    return rows


def _by_task(sheets: list[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Sheets by name, without their steps; only process 0 has drawn them."""
    return {path.stem.split('_', 1)[1]: path for path in sheets}


def _write_scores(rows: list[dict], workdir: pathlib.Path, seconds: float) -> None:
    if jax.process_index() != 0:
        return
    (workdir / 'scores.json').write_text(json.dumps(rows, indent=2) + '\n')
    columns = [c for c in SCORE_COLUMNS if c in rows[0]]
    table = metric_writer.format_table([{k: round(v, 3) if isinstance(v, float) else v for k, v in r.items()}
                                        for r in rows], columns)
    (workdir / 'scores.md').write_text(table + '\n')
    print(f'\n{table}\n\n{SCORE_NOTES[columns[-1]]} Total time {metric_writer.format_eta(seconds)}.\n'
          f'Scores: {workdir}/scores.md and scores.json   Pictures: {workdir}/sheets   '
          f'Curves: {workdir}/metrics.jsonl\n'
          f'Next: python -m mask2dit_jax.sample --workdir={workdir} --prompt="red ring on gray moves left" '
          f'--prompt="it grows" --prompt="it blinks"')


def _peak_share(config: config_lib.Config, mesh, coders: batches_lib.Coders) -> dict[tuple[int, ...], float]:
    """Model FLOPs of a step on stories of each layout, as a share of what the devices do in a second at their peak.

    Times steps per second that is MFU: steps/s x batch_size x chips.model_flops / (devices x peak bf16 FLOP/s of one).
    Nothing that is computed again counts. Empty where the device's peak is not in chips.CHIPS.
    """
    peaks = {chip.device_kind: chip.peak_flops for chip in hardware.CHIPS.values()}
    kind = mesh.devices.flat[0].device_kind
    if kind not in peaks:
        return {}
    layouts = {f: config.model.layout(coders.latent_frames(f), *coders.latent_shape[:2]) for f in config.data.layouts}
    return {f: config.train.batch_size * sum(hardware.model_flops(config, layout, 'train').values())
            / (mesh.size * peaks[kind]) for f, layout in layouts.items()}


def train_and_evaluate(config: config_lib.Config, workdir, trace_step: int | None = None) -> list[dict] | None:
    """Trains to the end, resuming from the newest good checkpoint of the workdir if there is one, and scores.

    Args:
      config: the validated configuration.
      workdir: folder for config.json, checkpoints, metrics.jsonl, sheets and scores.
      trace_step: the step from which TRACED_STEPS are recorded by jax.profiler, if any.

    Returns:
      The rows of `score_stories`, by the EMA parameters; None if SIGTERM stopped training, at a step that is saved.

    Raises:
      FloatingPointError: if training diverges.
      RuntimeError: if a checkpoint cannot be written.
      TimeoutError: if another process hangs.
      ValueError: if the workdir holds another run, LoRA has no base, or the steps to record are not all to be run.
    """
    started = time.monotonic()
    config = runs.pin_base(config)
    cfg, workdir = config.train, pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)

    # 1. Devices, data, state.
    mesh = partitioning.make_mesh(config.mesh)
    coders = batches_lib.coders(config, workdir)
    for layout in config.data.layouts:
        coders.latent_frames(layout)  # a scene that cannot be coded is an error now, not after encoding
    batches = batches_lib.train_batches(config, workdir, coders)
    state, shardings = _initial_state(config, coders, mesh)
    trained, frozen = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, state.base))
    logging.info('%d trained and %d frozen parameters on mesh %s.', trained, frozen, dict(mesh.shape))

    # 2. Resume.
    meta, start, found = _run_meta(config, batches), 0, checkpoint.folders(workdir)
    multihost.require_same(configuration=config, data=batches.fingerprint, checkpoints=[p.name for p in found])
    if found:
        # Only shapes and places stay of what is read, so that it is not held twice.
        base, targets = state.base, {k: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), getattr(state, k))
            for k in checkpoint.ITEMS}
        del state
        path, items = checkpoint.latest(workdir, targets, meta)
        start = int(path.name)
        logging.info('Resuming %s.', path)
        state = train_step.TrainState(step=jax.device_put(np.int32(start), shardings.step), base=base, **items)
    checkpoints = checkpoint.manager(workdir, cfg.keep_checkpoints, cfg.keep_every_steps, start)
    if jax.process_index() == 0:
        config_lib.save(config, workdir / 'config.json')
    if start >= cfg.steps:
        logging.info('%s is finished at step %d; raise config.train.steps to train on.', workdir, start)

    if trace_step is not None and not start <= trace_step <= cfg.steps - TRACED_STEPS:
        raise ValueError(f'--trace_step={trace_step} cannot be recorded: this run goes from step {start} to '
                         f'{cfg.steps}, and {TRACED_STEPS} steps are.')

    # 3. The loop. Metrics stay on the device until they are logged, so that no step waits for them.
    writer = metric_writer.MetricWriter(workdir, cfg.steps, start)
    steps = {f: train_step.jit_train_step(config, coders.latent_frames(f), shardings, partitioning.batch_sharding(mesh))
             for f in dict.fromkeys(config.data.layouts)}
    rows, peak_share = partitioning.local_rows(mesh, cfg.batch_size), _peak_share(config, mesh, coders)
    logging.info('data_wait is the share of time for which the loop waits for data%s.', ', mfu is model FLOPs / (time '
                 'x devices x peak bf16 FLOP/s)' if peak_share else '')

    def prepare(step):
        layout, batch = batches(step, rows)
        return layout, partitioning.global_batch(batch, mesh, cfg.batch_size)

    with contextlib.ExitStack() as stack:
        terminated = stack.enter_context(multihost.termination())
        ready = stack.enter_context(batches_lib.prefetched(prepare, range(start, cfg.steps)))
        pending, compiled, stopped = [], set(), False
        waited, since, steady = 0.0, None, False  # steady: nothing slow came before this step
        for step in range(start, cfg.steps):
            if step == trace_step:
                jax.profiler.start_trace(workdir / 'trace')
            asked = time.monotonic()
            layout, batch = next(ready)
            waited += time.monotonic() - asked
            multihost.meet(step, limited=steady)
            state, metrics = steps[layout](state, batch, batches.null_text)
            pending.append((layout, metrics))
            steady, done = layout in compiled, step + 1
            compiled.add(layout)
            traced = trace_step is not None and done == trace_step + TRACED_STEPS
            if traced:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                logging.info('Trace of steps %d to %d: %s.', trace_step, step, workdir / 'trace')
            last, due = done == cfg.steps, lambda every, done=done: done % every == 0
            stopped = terminated()
            saves, samples = last or stopped or due(cfg.checkpoint_every_steps), due(cfg.sample_every_steps)
            if saves or due(cfg.log_every_steps):
                means = {k: _checked_mean([m[k] for _, m in pending], done) for k in metrics}
                now = time.monotonic()
                if since is not None:  # the first record would tell of compiling
                    means['data_wait'] = waited / (now - since)
                    means |= {'mfu': sum(peak_share[f] for f, _ in pending) / (now - since)} if peak_share else {}
                writer.write(done, means)
                waited, since, pending = 0.0, now, []
            checkpoint.check(checkpoints)
            if saves:
                checkpoint.save(checkpoints, done, state, meta)
            if stopped:
                break
            if samples and not last:
                writer.write_images(done, _by_task(
                    write_sheets(config, train_step.model_ema(config, state), coders, workdir, done)))
            steady &= not (saves or samples or traced)
        checkpoint.finish(checkpoints)
    if stopped:
        writer.close()
        logging.info('Stopped by SIGTERM at step %d of %d; the same command resumes.', done, cfg.steps)
        return None

    # 4. Sheets and scores of the EMA parameters.
    ema = train_step.model_ema(config, state)
    sheets = write_sheets(config, ema, coders, workdir, cfg.steps)
    if start < cfg.steps:  # a finished run's are in TensorBoard already
        writer.write_images(cfg.steps, _by_task(sheets))
    writer.close()
    rows = (held_out_losses(config, ema, coders) if config.data.encoded
            else score_stories(config, ema, coders, workdir))
    _write_scores(rows, workdir, time.monotonic() - started)
    return rows
