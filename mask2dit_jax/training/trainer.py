"""The training run: data, state, loop, sample sheets, checkpoints, and the scores at the end."""

import contextlib
import dataclasses
import math
import pathlib
import time

import jax
import numpy as np
from absl import logging

from mask2dit_jax import checkpoint, hardware
from mask2dit_jax import config as config_lib
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import latent_codec
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import multihost, partitioning
from mask2dit_jax.models import flops
from mask2dit_jax.pretrained import runs
from mask2dit_jax.training import ema as ema_lib
from mask2dit_jax.training import metric_writer, train_step, validation

TRACED_STEPS = 3  # enough to see one that is not the first


def _initial_state(config: config_lib.Config, codec: latent_codec.LatentCodec, mesh):
    """State straight into its shardings; from a model folder or the EMA of another run if the
    configuration says so."""
    frames, m = codec.latent_frames(config.data.layouts[0]), config.model
    text = np.zeros((len(frames), m.max_text_seq_length, m.text_embed_dim), np.float32)
    inputs = np.zeros((sum(frames), *codec.latent_shape), np.float32), text, frames
    abstract = jax.eval_shape(lambda: train_step.init_state(config, inputs))
    shardings = partitioning.shardings(abstract, mesh)
    if config.lora.rank:
        # The base is never made, only read.
        state = jax.jit(
            lambda: train_step.init_state(config, inputs).replace(frozen_params=()),
            out_shardings=shardings.replace(frozen_params=()),
        )()
        return state.replace(
            frozen_params=runs.load_base(
                config, partitioning.abstract_arrays(abstract.frozen_params, mesh)
            )
        ), shardings
    state = jax.jit(lambda: train_step.init_state(config, inputs), out_shardings=shardings)()
    if config.init_from:
        params = runs.load_base(config, partitioning.abstract_arrays(abstract.params, mesh))
        state = state.replace(params=params, ema=jax.tree.map(lambda x: x.copy(), params))
    return state, shardings


def _run_meta(config: config_lib.Config, batches: batches_lib.Batches) -> dict:
    """What must not change between a run and its continuation."""
    return {
        'data': batches.fingerprint,
        'seed': config.seed,
        'init_from': config.init_from,
        'optimizer': config.optimizer.name,
        'model': dataclasses.asdict(config.model) | {'remat': '', 'attention_backend': ''},
        'lora': dataclasses.asdict(config.lora),
        'batch_size': config.train.batch_size,
        'caption_style': config.data.caption_style,
    }


def _checked_mean(values, step: int) -> float:
    """Mean of metrics fetched from the device.

    Raises:
      FloatingPointError: if it is not finite.
    """
    mean = float(np.mean(jax.device_get(values)))
    if not math.isfinite(mean):
        raise FloatingPointError(
            f'Loss or gradient became {mean} before step {step}: nothing was saved since the '
            'last checkpoint; lower optimizer.learning_rate or clip_norm and start again.'
        )
    return mean


def _peak_share(
    config: config_lib.Config, mesh, codec: latent_codec.LatentCodec
) -> dict[tuple[int, ...], float]:
    """Model FLOPs of a step on stories of each layout, as a share of what the devices do in a
    second at their peak.

    Times steps per second that is MFU: steps/s x batch_size x flops.training_flops / (devices x
      peak bf16 FLOP/s of one).
    Nothing that is computed again counts. Empty where the device's peak is not in hardware.CHIPS.
    """
    peaks = {chip.device_kind: chip.peak_flops for chip in hardware.CHIPS.values()}
    kind = mesh.devices.flat[0].device_kind
    if kind not in peaks:
        return {}
    layouts = {
        f: config.model.layout(codec.latent_frames(f), *codec.latent_shape[:2])
        for f in config.data.layouts
    }
    return {
        f: config.train.batch_size
        * sum(flops.training_flops(config.model, layout).values())
        / (mesh.size * peaks[kind])
        for f, layout in layouts.items()
    }


def train_and_evaluate(
    config: config_lib.Config, workdir, trace_step: int | None = None
) -> list[dict] | None:
    """Trains to the end, resuming from the newest good checkpoint of the workdir if there is one,
    and scores.

    Args:
      config: the validated configuration.
      workdir: folder for config.json, checkpoints, metrics.jsonl, sheets and scores.
      trace_step: the step from which TRACED_STEPS are recorded by jax.profiler, if any.

    Returns:
      The rows of `score_stories`, by the EMA parameters; None if SIGTERM stopped training, at a
      step that is saved.

    Raises:
      FloatingPointError: if training diverges.
      RuntimeError: if a checkpoint cannot be written.
      TimeoutError: if another process hangs.
      ValueError: if the workdir holds another run, LoRA has no base, or the steps to record are not
        all to be run.
    """
    started = time.monotonic()
    config = runs.resolve_base_checkpoint(config)
    cfg, workdir = config.train, pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)

    # 1. Devices, data, state.
    mesh = mesh_lib.make_mesh(config.mesh)
    codec = latent_codec.for_run(config, workdir)
    for layout in config.data.layouts:
        codec.latent_frames(
            layout
        )  # a scene that cannot be coded is an error now, not after encoding
    batches = batches_lib.train_batches(config, workdir, codec)
    state, shardings = _initial_state(config, codec, mesh)
    trained, frozen = (
        sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, state.frozen_params)
    )
    logging.info(
        '%d trained and %d frozen parameters on mesh %s.', trained, frozen, dict(mesh.shape)
    )

    # 2. Resume.
    meta, start, found = _run_meta(config, batches), 0, checkpoint.folders(workdir)
    multihost.assert_same_on_all_hosts(
        configuration=config, data=batches.fingerprint, checkpoints=[p.name for p in found]
    )
    if found:
        # Only shapes and places stay of what is read, so that it is not held twice.
        frozen_params, targets = (
            state.frozen_params,
            {
                item: jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                    getattr(state, field),
                )
                for item, field in checkpoint.ITEMS.items()
            },
        )
        del state
        path, items = checkpoint.latest(workdir, targets, meta)
        start = int(path.name)
        logging.info('Resuming %s.', path)
        restored = {checkpoint.ITEMS[item]: tree for item, tree in items.items()}
        state = train_step.TrainState(
            step=jax.device_put(np.int32(start), shardings.step),
            frozen_params=frozen_params,
            **restored,
        )
    checkpoints = checkpoint.manager(workdir, cfg.keep_checkpoints, cfg.keep_every_steps, start)
    if jax.process_index() == 0:
        config_lib.save(config, workdir / 'config.json')
    if start >= cfg.steps:
        logging.info(
            '%s is finished at step %d; raise config.train.steps to train on.', workdir, start
        )

    if trace_step is not None and not start <= trace_step <= cfg.steps - TRACED_STEPS:
        raise ValueError(
            f'--trace_step={trace_step} cannot be recorded: this run goes from step {start} to '
            f'{cfg.steps}, and {TRACED_STEPS} steps are.'
        )

    # 3. The loop. Metrics stay on the device until they are logged, so that no step waits for them.
    writer = metric_writer.MetricWriter(workdir, cfg.steps, start)
    steps = {
        f: train_step.jit_train_step(
            config, codec.latent_frames(f), shardings, mesh_lib.batch_sharding(mesh)
        )
        for f in dict.fromkeys(config.data.layouts)
    }
    rows, peak_share = mesh_lib.local_rows(mesh, cfg.batch_size), _peak_share(config, mesh, codec)
    logging.info(
        'data_wait is the share of time for which the loop waits for data%s.',
        ', mfu is model FLOPs / (time x devices x peak bf16 FLOP/s)' if peak_share else '',
    )

    def prepare(step):
        layout, batch = batches(step, rows)
        return layout, mesh_lib.global_batch(batch, mesh, cfg.batch_size)

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
            multihost.barrier(step, limited=steady)
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
            saves, samples = (
                last or stopped or due(cfg.checkpoint_every_steps),
                due(cfg.sample_every_steps),
            )
            if saves or due(cfg.log_every_steps):
                means = {k: _checked_mean([m[k] for _, m in pending], done) for k in metrics}
                now = time.monotonic()
                if since is not None:  # the first record would tell of compiling
                    means['data_wait'] = waited / (now - since)
                    means |= (
                        {'mfu': sum(peak_share[f] for f, _ in pending) / (now - since)}
                        if peak_share
                        else {}
                    )
                writer.write(done, means)
                waited, since, pending = 0.0, now, []
            checkpoint.check(checkpoints)
            if saves:
                checkpoint.save(checkpoints, done, state, meta)
            if stopped:
                break
            if samples and not last:
                writer.write_images(
                    done,
                    validation.by_task(
                        validation.write_sample_grids(
                            config, ema_lib.model_ema(config, state), codec, workdir, done
                        )
                    ),
                )
            steady &= not (saves or samples or traced)
        checkpoint.finish(checkpoints)
    if stopped:
        writer.close()
        logging.info(
            'Stopped by SIGTERM at step %d of %d; the same command resumes.', done, cfg.steps
        )
        return None

    # 4. Sheets and scores of the EMA parameters.
    ema = ema_lib.model_ema(config, state)
    sheets = validation.write_sample_grids(config, ema, codec, workdir, cfg.steps)
    if start < cfg.steps:  # a finished run's are in TensorBoard already
        writer.write_images(cfg.steps, validation.by_task(sheets))
    writer.close()
    rows = (
        validation.held_out_losses(config, ema, codec)
        if config.data.encoded
        else validation.score_stories(config, ema, codec, workdir)
    )
    validation.write_scores(rows, workdir, time.monotonic() - started)
    return rows
