"""The training run: data, state, loop, sample grids, checkpoints, and the scores at the end."""

import collections
import contextlib
import ctypes
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from mask2dit_jax import checkpoint, hardware, paths, storage
from mask2dit_jax import config as config_lib
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import latent_codec
from mask2dit_jax.data import records as records_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import multihost, partitioning, watchdog
from mask2dit_jax.models import flops
from mask2dit_jax.pretrained import runs
from mask2dit_jax.training import ema as ema_lib
from mask2dit_jax.training import metric_writer, validation
from mask2dit_jax.training import train_step as train_step_lib

TRACED_STEPS = 3  # enough to see one that is neither the first nor the last
# Steps that devices may not have finished. Two keep them busy; with more, SIGTERM would wait for
# all of them, and each holds its batch in the devices' memory.
STEPS_IN_FLIGHT = 2

Layout = tuple[int, ...]  # frames per scene


def train_and_evaluate(
    config: config_lib.Config, workdir, trace_step: int | None = None
) -> list[dict] | None:
    """Trains to the last step and computes the scores.

    Training resumes from the newest good checkpoint of the workdir if there is one.

    Args:
      config: the validated configuration.
      workdir: folder for config.json, checkpoints, metrics.jsonl, sample grids and scores.
      trace_step: the step from which TRACED_STEPS are recorded by jax.profiler, if any.

    Returns:
      The rows of `score_stories` (of `held_out_losses`, if the run trains on encoded clips), by the
      EMA parameters; None if SIGTERM or Ctrl-C stopped training, at a step that is saved.

    Raises:
      FloatingPointError: if training diverges.
      RuntimeError: if a checkpoint cannot be written, or if none can be read though none is known
        to be damaged.
      storage.ClaimedError: if another run writes to the workdir, or has taken it over.
      TimeoutError: if another process hangs.
      ValueError: if the configuration is wrong, the workdir holds another run or is not on this
        machine, LoRA has no base, or the run does not contain all the steps to record.
    """
    config_lib.check_training(config)
    paths.check_local(workdir=workdir)
    workdir = pathlib.Path(workdir)
    pinned = runs.pinned_base(workdir)
    config = runs.resolve_base_checkpoint(config, pinned)
    with watchdog.watching(dataclasses.asdict(config.limits)), _owned(workdir) as check_owner:
        return _train_and_evaluate(config, workdir, trace_step, pinned, check_owner)


@contextlib.contextmanager
def _owned(workdir: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Keeps other runs out of the workdir; yields a function that checks that they are.

    Process 0 owns it for all processes of the run.
    """
    if jax.process_index() != 0:
        yield lambda: None
        return
    with storage.claim(workdir) as held:
        yield held.check


def _keep_freed_memory(mesh: jax.sharding.Mesh) -> None:
    """Lets glibc keep freed memory for the next step, where a CPU computes.

    XLA allocates the temporary memory of a step anew each time. What is larger than 32 MB glibc
    returns to the system in between, and then its pages are made and cleared at every step.
    """
    if mesh.devices.flat[0].platform != 'cpu':
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):
        # By the numbers of malloc.h: trim threshold, top padding, and how many blocks are mapped.
        for option, value in ((-1, 2**31 - 1), (-2, 64 * 2**20), (-4, 0)):
            libc.mallopt(option, value)


def _train_and_evaluate(
    config: config_lib.Config,
    workdir: pathlib.Path,
    trace_step: int | None,
    pinned: str,
    check_owner: Callable[[], None],
) -> list[dict] | None:
    """`train_and_evaluate` in a workdir that belongs to this run."""
    started = time.monotonic()
    workdir.mkdir(parents=True, exist_ok=True)
    total_steps = config.train.steps

    # 1. Devices.
    mesh = mesh_lib.make_mesh(config.mesh)

    # 2. Data. A scene that the codec cannot take is an error now, not after hours of encoding.
    codec = latent_codec.for_run(config, workdir)
    for layout in config.data.layouts:
        codec.latent_frames(layout)
    watchdog.enter('data')
    batches = batches_lib.train_batches(config, workdir, codec)

    # 3. State, of the newest good checkpoint or fresh.
    watchdog.enter('restore')
    meta = _run_meta(config, batches)
    found = checkpoint.folders(workdir)
    multihost.assert_same_on_all_hosts(
        configuration=config,
        data=batches.fingerprint,
        base=pinned,
        checkpoints=[path.name for path in found],
    )
    if found:
        is_moved = config.init_from != pinned
        state, shardings, meta = _resume(config, codec, mesh, workdir, meta, is_moved)
    else:
        state, shardings = _initial_state(config, codec, mesh)
        if config.init_from:
            base = state.frozen_params if config.lora.rank else state.params
            meta['init_from'] = runs.base_checksum(base)
    start = int(state.step)
    logging.info(
        '%d trained and %d frozen parameters on mesh %s.',
        _num_parameters(state.params),
        _num_parameters(state.frozen_params),
        dict(mesh.shape),
    )

    # 4. Where checkpoints go.
    check_owner()
    checkpoints = checkpoint.manager(
        workdir, config.train.keep_checkpoints, config.train.keep_every_steps, start
    )
    if jax.process_index() == 0:
        config_lib.save(config, workdir / 'config.json')
    if start >= total_steps:
        logging.info(
            '%s is finished at step %d; raise config.train.steps to train on.', workdir, start
        )
    trace = _Trace(workdir / 'trace', trace_step)
    trace.check(start, total_steps)

    # 5. Records. One line now explains the terms that later lines use.
    writer = metric_writer.MetricWriter(workdir, total_steps, start)
    recorder = _Recorder(_peak_share(config, mesh, codec))
    logging.info(
        'data_wait is the share of time for which the loop waits for data%s.',
        ', mfu is model FLOPs / (time x devices x peak bf16 FLOP/s)' if recorder.peak_share else '',
    )

    # 6. The loop.
    _keep_freed_memory(mesh)
    jitted_steps = _jit_steps(config, codec, shardings, mesh)
    prepare = _batch_preparer(config, batches, mesh)
    slow_seconds = max(dataclasses.asdict(config.limits).values())
    compiled = set()
    steady = False  # whether nothing slow came between the barrier before and the next one
    stopped = ''

    def record(done: int) -> None:
        values = recorder.record(done)
        check_owner()
        writer.write(done, values)

    def save(done: int) -> None:
        watchdog.enter('save')
        check_owner()
        checkpoint.save(checkpoints, done, state, meta)

    def draw(done: int) -> None:
        watchdog.enter('sample')
        check_owner()
        ema = ema_lib.model_ema(config, state)  # under LoRA a second model, freed on return
        grids = validation.write_sample_grids(config, ema, codec, workdir, done)
        writer.write_images(done, validation.by_task(grids))

    # A run that ended while it drew had saved this step before.
    if start and _due(start, config.train, stopped=False).sample:
        is_drawn = validation.has_sample_grids(config, workdir, start)
        if not multihost.all_agree(is_drawn):
            draw(start)

    with (
        multihost.termination() as terminated,
        batches_lib.prefetched(prepare, range(start, total_steps)) as ready,
    ):
        for step in range(start, total_steps):
            trace.start_before(step)
            watchdog.enter('step')
            recorder.wait_for_device()
            watchdog.enter('data')
            layout, batch = recorder.wait_for(ready)

            # The wait has a short limit only where no process has a good reason to come late.
            multihost.barrier(step, limited=steady, slow_seconds=slow_seconds)

            compiles = layout not in compiled
            compiled.add(layout)
            watchdog.enter('compile' if compiles else 'step')
            state, metrics = jitted_steps[layout](state, batch, batches.null_text)
            recorder.add(layout, metrics)
            done = step + 1
            traced = trace.stop_after(step, state)

            # SIGTERM to any process stops all after the same step.
            stopped = terminated()
            due = _due(done, config.train, bool(stopped))

            if due.log:
                record(done)

            # A save that fails in the background ends the run at once, not at the next save.
            checkpoint.check(checkpoints)
            if due.save:
                save(done)

            if stopped:
                break

            if due.sample:
                draw(done)
                # Who was told to stop meanwhile need not run another step.
                stopped = terminated()
                if stopped:
                    if not due.log:
                        record(done)
                    if not due.save:
                        save(done)
                    break

            steady = not (compiles or traced or due.save or due.sample)

        watchdog.enter('save')
        checkpoint.finish(checkpoints)

    if stopped:
        writer.close()
        logging.info(
            'Stopped by %s at step %d of %d; the same command resumes.', stopped, done, total_steps
        )
        return None

    # 7. Sample grids and scores of the EMA parameters.
    watchdog.enter('sample')
    check_owner()
    ema = ema_lib.model_ema(config, state)
    grids = validation.write_sample_grids(config, ema, codec, workdir, total_steps)
    if start < total_steps:  # TensorBoard has the grids of a finished run already
        writer.write_images(total_steps, validation.by_task(grids))
    writer.close()

    watchdog.enter('score')
    if config.data.encoded:
        rows = validation.held_out_losses(config, ema, codec)
    else:
        rows = validation.score_stories(config, ema, codec, workdir)
    check_owner()
    validation.write_scores(config, rows, workdir, time.monotonic() - started)
    return rows


# The state: fresh, or of a checkpoint.


def _state_maker(config: config_lib.Config, codec: latent_codec.LatentCodec, mesh):
    """A function that makes the random state at step 0, its shapes, and its shardings."""
    model_config = config.model
    frames = codec.latent_frames(config.data.layouts[0])
    latents = np.zeros((sum(frames), *codec.latent_shape), np.float32)  # [T, H, W, C]
    text = np.zeros(
        (len(frames), model_config.max_text_seq_length, model_config.text_embed_dim), np.float32
    )  # [S, M, E]

    def init():
        return train_step_lib.init_state(config, (latents, text, frames))

    abstract = jax.eval_shape(init)
    return init, abstract, partitioning.shardings(abstract, mesh)


def _initial_state(config: config_lib.Config, codec: latent_codec.LatentCodec, mesh):
    """The state at step 0, made where its shardings put it, and these shardings.

    Its parameters are random, or from a model folder or the EMA of another run if the configuration
    says so.
    """
    init, abstract, shardings = _state_maker(config, codec, mesh)

    if config.lora.rank:
        # The base is read, and never made at random: the compiler drops what is not returned.
        def init_without_base():
            return init().replace(frozen_params=())

        state = jax.jit(init_without_base, out_shardings=shardings.replace(frozen_params=()))()
        target = partitioning.abstract_arrays(abstract.frozen_params, mesh)
        return state.replace(frozen_params=runs.load_base(config, target)), shardings

    state = jax.jit(init, out_shardings=shardings)()
    if config.init_from:
        target = partitioning.abstract_arrays(abstract.params, mesh)
        params = runs.load_base(config, target)
        state = state.replace(params=params, ema=jax.tree.map(lambda x: x.copy(), params))
    return state, shardings


def _resume(
    config: config_lib.Config,
    codec: latent_codec.LatentCodec,
    mesh,
    workdir: pathlib.Path,
    meta: dict,
    is_moved: bool,
):
    """The state of the newest good checkpoint.

    The base is read if it is part of the state, as under LoRA, and if it is at another place than
    before: it must be the same one.

    Args:
      config, codec, mesh: of the run.
      workdir: its folder.
      meta: of `_run_meta`.
      is_moved: whether init_from is not what it was.

    Returns:
      The state, its shardings, and `meta` with the base's checksum.
    """
    _, abstract, shardings = _state_maker(config, codec, mesh)
    frozen_params = ()
    meta = dict(meta)
    if config.lora.rank:
        target = partitioning.abstract_arrays(abstract.frozen_params, mesh)
        frozen_params = runs.load_base(config, target)
        meta['init_from'] = runs.base_checksum(frozen_params)
    elif config.init_from and is_moved:
        target = partitioning.abstract_arrays(abstract.params, mesh)
        meta['init_from'] = runs.base_checksum(runs.load_base(config, target))

    targets = {
        item: jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            getattr(abstract, field),
            getattr(shardings, field),
        )
        for item, field in checkpoint.ITEMS.items()
    }
    path, items = checkpoint.latest(workdir, targets, meta)
    logging.info('Resuming %s.', path)
    meta['init_from'] = checkpoint.read_meta(path).get('init_from')

    restored = {checkpoint.ITEMS[item]: tree for item, tree in items.items()}
    state = train_step_lib.TrainState(
        step=jax.device_put(np.int32(path.name), shardings.step),
        frozen_params=frozen_params,
        **restored,
    )
    return state, shardings, meta


def _num_parameters(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


# Sections and keys of the configuration that may have other values when a run continues. They say
# on what it is computed, how long it goes on, or what is written beside its state. All others are
# part of what the run is.
_MAY_CHANGE = {
    'eval',
    'limits',
    'mesh',
    'requires',
    'sample',
    'data.fps',
    'model.attention_backend',
    'model.remat',
    # Where data and the base lie; they themselves are compared.
    'init_from',
    'data.dir',
    'data.encoded',
    'data.held_out',
    # What a run that diverged is told to lower.
    'optimizer.clip_norm',
    'optimizer.learning_rate',
    'train.checkpoint_every_steps',
    'train.grad_accumulation',
    'train.keep_checkpoints',
    'train.keep_every_steps',
    'train.log_every_steps',
    'train.sample_every_steps',
    'train.steps',
}


def _run_meta(config: config_lib.Config, batches: batches_lib.Batches) -> dict:
    """Everything that must be the same for a run to continue, by name; checkpoints hold it.

    Where the run has a base, they also hold its checksum, as 'init_from': the folder may move.
    """
    meta = {} if config.init_from else {'init_from': ''}
    for key, value in checkpoint.flat(dataclasses.asdict(config)).items():
        if key not in _MAY_CHANGE and key.partition('.')[0] not in _MAY_CHANGE:
            meta[key] = value

    # The digest below includes these settings, but would not say which of them is another one.
    if config.data.encoded:
        settings = records_lib.read_settings(config.data.encoded)
        meta |= {f'encoded.{key}': settings[key] for key in settings if key != 'folder'}
    return meta | {'data': batches.fingerprint}


# The loop: its functions, what is due at a step, what is recorded.


def _jit_steps(
    config: config_lib.Config, codec: latent_codec.LatentCodec, shardings, mesh
) -> dict[Layout, Callable]:
    """The jitted training step of each layout; each compiles when it is first called."""
    return {
        layout: train_step_lib.jit_train_step(
            config, codec.latent_frames(layout), shardings, mesh_lib.batch_sharding(mesh)
        )
        for layout in dict.fromkeys(config.data.layouts)
    }


def _batch_preparer(
    config: config_lib.Config, batches: batches_lib.Batches, mesh
) -> Callable[[int], tuple[Layout, dict]]:
    """A function from a step to its layout and its global batch on the mesh."""
    batch_size = config.train.batch_size
    rows = mesh_lib.local_rows(mesh, batch_size)

    def prepare(step: int):
        layout, batch = batches(step, rows)
        return layout, mesh_lib.global_batch(batch, mesh, batch_size)

    return prepare


class _Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    save: bool
    sample: bool


def _due(done: int, train: config_lib.TrainConfig, stopped: bool) -> _Due:
    """What is due when `done` steps are done; `stopped` says that the run ends here.

    Every save is logged, too: fetching the metrics is what keeps a diverged state from being saved.
    The sample grids of the last step are drawn after the loop.
    """
    ends = stopped or done == train.steps
    save = ends or done % train.checkpoint_every_steps == 0
    log = save or done % train.log_every_steps == 0
    sample = not ends and done % train.sample_every_steps == 0
    return _Due(log=log, save=save, sample=sample)


class _StepMetrics(NamedTuple):
    """What one step returned."""

    layout: Layout
    metrics: dict[str, jax.Array]


@dataclasses.dataclass
class _Recorder:
    """Collects the steps since the last record.

    Metrics stay on the device until `record`: fetching them after every step would make the loop
    wait for the device, and the device would then be idle until the loop sends the next step.

    Attributes:
      peak_share: of `_peak_share`.
      pending: the metrics of the steps since the last record.
      in_flight: the metrics of the steps that the devices may not have finished.
      waited_seconds: how long the loop waited for data since the last record.
      recorded_at: the time.monotonic of the last record; None before the first one.
    """

    peak_share: dict[Layout, float]
    pending: list[_StepMetrics] = dataclasses.field(default_factory=list)
    in_flight: collections.deque = dataclasses.field(default_factory=collections.deque)
    waited_seconds: float = 0.0
    recorded_at: float | None = None

    def wait_for_device(self) -> None:
        """Waits until another step may be sent to the devices."""
        while len(self.in_flight) >= STEPS_IN_FLIGHT:
            jax.block_until_ready(self.in_flight.popleft())

    def wait_for(self, ready: Iterator[tuple[Layout, dict]]) -> tuple[Layout, dict]:
        """The next layout and batch; the time until they are there counts as waiting for data."""
        asked_at = time.monotonic()
        layout, batch = next(ready)
        self.waited_seconds += time.monotonic() - asked_at
        return layout, batch

    def add(self, layout: Layout, metrics: dict[str, jax.Array]) -> None:
        """Keeps the metrics of one step."""
        self.pending.append(_StepMetrics(layout, metrics))
        self.in_flight.append(metrics)

    def record(self, step: int) -> dict[str, float]:
        """Means since the last record; waits for the device.

        Args:
          step: the number of steps done, for the error.

        Returns:
          The means of the steps' metrics, and from the second record on data_wait and (where the
          device's peak is known) mfu. The first record's time is mostly the compiler's.

        Raises:
          FloatingPointError: if a metric is not finite.
        """
        record = {}
        for name in self.pending[-1].metrics:
            values = [pending.metrics[name] for pending in self.pending]
            record[name] = _checked_mean(values, step)

        now = time.monotonic()
        if self.recorded_at is not None:
            seconds = now - self.recorded_at
            record['data_wait'] = self.waited_seconds / seconds
            if self.peak_share:
                peak_seconds = sum(self.peak_share[pending.layout] for pending in self.pending)
                record['mfu'] = peak_seconds / seconds

        self.pending = []
        self.waited_seconds = 0.0
        self.recorded_at = now
        return record


def _checked_mean(values: list[jax.Array], step: int) -> float:
    """Fetches one metric of several steps, and takes the mean.

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
) -> dict[Layout, float]:
    """Model FLOPs of a step of each layout, divided by the FLOP/s of all devices at their peak.

    This is the number of seconds that the step would take at the peak: divided by the seconds that
    it takes, it is the MFU. Activations that are computed again in the backward pass do not count.
    The result is empty where hardware.CHIPS does not have the device's peak.
    """
    peaks = {chip.device_kind: chip.peak_flops for chip in hardware.CHIPS.values()}
    device_kind = mesh.devices.flat[0].device_kind
    if device_kind not in peaks:
        return {}
    peak_of_all_devices = mesh.size * peaks[device_kind]

    shares = {}
    for layout in config.data.layouts:
        scene_layout = config.model.layout(codec.latent_frames(layout), *codec.latent_shape[:2])
        flops_of_story = sum(
            flops.training_flops(config.model, scene_layout, config.train.objective).values()
        )
        shares[layout] = config.train.batch_size * flops_of_story / peak_of_all_devices
    return shares


@dataclasses.dataclass(frozen=True)
class _Trace:
    """Records some steps by jax.profiler.

    Attributes:
      folder: where the trace is written.
      first: the first of TRACED_STEPS steps; None records nothing.
    """

    folder: pathlib.Path
    first: int | None

    def check(self, start: int, total_steps: int) -> None:
        """Raises a ValueError if a run of these steps does not contain all that are recorded."""
        if self.first is None:
            return
        if not start <= self.first <= total_steps - TRACED_STEPS:
            raise ValueError(
                f'--trace_step={self.first} cannot be recorded: this run goes from step {start} to '
                f'{total_steps}, and a trace needs {TRACED_STEPS} steps of it.'
            )

    def start_before(self, step: int) -> None:
        """Starts recording if this is the first step to record."""
        if step == self.first:
            jax.profiler.start_trace(self.folder)

    def stop_after(self, step: int, state) -> bool:
        """Writes the trace if this was the last step to record, and returns whether it was."""
        if self.first is None or step != self.first + TRACED_STEPS - 1:
            return False

        # Steps run in the background: without waiting, the trace would miss the end of the last.
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        logging.info('Trace of steps %d to %d: %s.', self.first, step, self.folder)
        return True
