"""One training step: draw, loss, gradients, update, EMA, on a mesh.

The model learns v-prediction over the scenes of a story; given scenes stay clean at timestep 0
(Mask²DiT, section 3.3). `init_state`, `train_step` and the shardings are built from the
configuration alone, so that the trainer, the ahead-of-time compiler and the benchmark run the same
functions.
"""

import chex
import flax
import jax
import jax.numpy as jnp
import optax

from mask2dit_jax import config as config_lib
from mask2dit_jax.diffusion import loss
from mask2dit_jax.layout import frame_scenes
from mask2dit_jax.models import dit, lora
from mask2dit_jax.training import ema as ema_lib
from mask2dit_jax.training import optimizer as optimizer_lib
from mask2dit_jax.training.objectives import denoising

# The seed's independent streams of random numbers; sampling has stream 2 (generation.story_noise).
_INIT_STREAM = 0
_TRAIN_STREAM = 1


@flax.struct.dataclass
class TrainState:
    """Everything that training carries from step to step.

    It holds no random state: what a step draws is a function of the seed and of `step`.
    """

    step: jax.Array  # int32 [], updates done
    params: chex.ArrayTree  # what is trained: the model's parameters, or LoRA tensors
    ema: chex.ArrayTree
    opt_state: optax.OptState
    frozen_params: chex.ArrayTree = ()  # under LoRA the model's parameters, which stay as they are


def init_state(config: config_lib.Config, inputs) -> TrainState:
    """Makes a fresh state.

    Args:
      config: the configuration.
      inputs: (latents, text, frames) of one example, for shapes: [T, H, W, C], [S, M, E] and the
        latent frames per scene.
    """
    latents, text, frames = inputs
    key = jax.random.fold_in(jax.random.key(config.seed), _INIT_STREAM)

    timesteps = jnp.zeros((1, len(latents)), jnp.int32)
    model = dit.DiT(config.model)
    params = model.init(key, latents[None], text[None], timesteps, frames)['params']

    frozen_params = ()
    if config.lora.rank:
        frozen_params = params
        params = lora.init(key, frozen_params, config.lora)

    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.train.steps)

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: the step donates the state, and one buffer must not be donated twice.
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        frozen_params=frozen_params,
    )


def train_step(
    state: TrainState, batch, null_text, *, config: config_lib.Config, frames: tuple[int, ...]
):
    """Does one update.

    Args:
      state: the state, donated.
      batch: 'latents' [B, T, H, W, C], 'text' [B, S, M, E] and 'least_given' [B], global; see
        denoising.draw.
      null_text: [M, E], the encoding of the empty caption.
      config: the configuration, static.
      frames: latent frames per scene, static.

    Returns:
      The new state and the metrics loss and grad_norm.
    """
    # Scenes of whole patches, before there is noise: copies have noise of their own.
    whole = config.model.whole_patches(frames)
    if whole.frames != frames:
        batch = batch | {'latents': batch['latents'][:, whole.source]}
        frames = whole.frames

    # Draw.
    stream = jax.random.fold_in(jax.random.key(config.seed), _TRAIN_STREAM)
    key = jax.random.fold_in(stream, state.step)
    drawn = denoising.draw(key, batch, null_text, state.step, config)

    # Loss and gradients: means over all latents that count, in all micro-batches.
    total, count, grads = _accumulated_gradients(state, drawn, config, frames)
    grads = jax.tree.map(lambda g: g / count, grads)

    # Update.
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.train.steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    # EMA.
    ema = ema_lib.update_ema(state.ema, params, state.step, config.train.ema_decay)

    new_state = TrainState(
        step=state.step + 1,
        params=params,
        ema=ema,
        opt_state=opt_state,
        frozen_params=state.frozen_params,
    )
    metrics = {'loss': total / count, 'grad_norm': optax.global_norm(grads)}
    return new_state, metrics


def _accumulated_gradients(
    state: TrainState,
    drawn: denoising.DenoisingBatch,
    config: config_lib.Config,
    frames: tuple[int, ...],
):
    """Sums over the micro-batches: squared error, the number of its terms, and gradients."""
    forced = config.train.objective == 'teacher_forcing'
    model = dit.DiT(config.model, forced=forced)
    scenes = frame_scenes(frames)  # [T]

    def loss_fn(params, micro_batch: denoising.DenoisingBatch):
        if config.lora.rank:
            params = lora.merge(state.frozen_params, params, config.lora)
        arguments = (
            model,
            params,
            config.schedule,
            {'latents': micro_batch.latents, 'text': micro_batch.text},
            micro_batch.noise,
            micro_batch.timesteps[:, scenes],
            micro_batch.given[:, scenes],
            frames,
        )
        return loss.forced_loss(*arguments) if forced else loss.denoising_loss(*arguments)

    def accumulate(sums, micro_batch):
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (total, count), grads = value_and_grad(state.params, micro_batch)
        return jax.tree.map(jnp.add, sums, (total, count, grads)), None

    num_micro_batches = config.train.grad_accumulation
    micro_batches = _split(drawn, num_micro_batches)
    zeros = (
        jnp.zeros(()),
        jnp.zeros(()),  # the count may pass 2^31
        jax.tree.map(jnp.zeros_like, state.params),
    )

    if num_micro_batches == 1:
        # One micro-batch needs no loop.
        sums, _ = accumulate(zeros, jax.tree.map(lambda x: x[0], micro_batches))
    else:
        sums, _ = jax.lax.scan(accumulate, zeros, micro_batches)
    return sums


def _split(batch, parts: int):
    """Arrays [B, ...] as [parts, B / parts, ...].

    Part i has the rows i, i + parts, i + 2 * parts, ... A device holds neighbouring rows of the
    batch, hence an equal share of every part, and no example moves to another device.
    """

    def split(x):
        rows = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
        return jnp.moveaxis(rows, 1, 0)

    return jax.tree.map(split, batch)


def jit_train_step(
    config: config_lib.Config, frames: tuple[int, ...], state_shardings, batch_sharding
):
    """Makes the compiled step for stories of one layout.

    Args:
      config: the configuration.
      frames: latent frames per scene.
      state_shardings: a TrainState of shardings.
      batch_sharding: the sharding of the batch, whose mesh the step runs on.

    Returns:
      A function of (state, batch, null_text), which donates the state; see `train_step`.
    """
    mesh = batch_sharding.mesh
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def step(state, batch, null_text):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return train_step(state, batch, null_text, config=config, frames=frames)

    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding, replicated),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )
