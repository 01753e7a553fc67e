"""Training: v-prediction over scenes, given scenes clean at timestep 0, on a mesh.

`init_state`, `train_step` and the shardings are built from the config alone, so that the trainer,
the compiler's check and the benchmark run the same functions.
"""

import chex
import flax
import jax
import jax.numpy as jnp
import optax

from mask2dit_jax import config as config_lib
from mask2dit_jax.diffusion import loss
from mask2dit_jax.models import dit, lora
from mask2dit_jax.training import optimizer
from mask2dit_jax.training.objectives import denoising


@flax.struct.dataclass
class TrainState:
    """Everything that training carries from step to step; randomness is not in it, being a function
    of `step`."""

    step: jax.Array  # int32 [], updates done
    params: chex.ArrayTree  # what is trained: the model's parameters, or LoRA tensors
    ema: chex.ArrayTree
    opt_state: optax.OptState
    frozen_params: chex.ArrayTree = ()  # under LoRA the model's parameters, which stay as they are


def init_state(config: config_lib.Config, inputs) -> TrainState:
    """A fresh state.

    Args:
      config: the configuration.
      inputs: one example's (latents, text, frames), for shapes.
    """
    latents, text, frames = inputs
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    t = jnp.zeros((1, len(frames)), jnp.int32)
    params, base = (
        dit.DiT(config.model).init(key, latents[None], text[None], t, frames)['params'],
        (),
    )
    if config.lora.rank:
        params, base = lora.init(key, params, config.lora), params
    opt = optimizer.make_optimizer(config.optimizer, config.train.steps).init(params)
    # The EMA starts as a copy: the same buffer must not be donated twice.
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), opt, base)


def train_step(
    state: TrainState, batch, null_text, *, config: config_lib.Config, frames: tuple[int, ...]
):
    """One update.

    Args:
      state: the state, donated.
      batch: 'latents' [B, T, H, W, C] and 'text' [B, S, M, E], global.
      null_text: [M, E], the encoding of the empty caption.
      config, frames: static.

    Returns:
      The new state and the metrics loss and grad_norm.
    """
    cfg, schedule = config.train, config.schedule
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), state.step)
    noise_key, time_key, drop_key, given_key = jax.random.split(key, 4)
    x, (b, s) = batch['latents'], batch['text'].shape[:2]
    noise = jax.random.normal(noise_key, x.shape, jnp.float32)
    t = denoising.stratified_timesteps(time_key, b, schedule.num_train_timesteps)
    given = denoising.random_given(given_key, b, s, cfg.conditional_probability, cfg.given)
    given &= state.step >= cfg.conditional_from_step
    drop = jax.random.bernoulli(drop_key, cfg.caption_dropout, (b, 1, 1, 1))
    text = jnp.where(drop, null_text, batch['text'])
    model = dit.DiT(config.model)

    def loss_fn(params, micro):
        params = (
            lora.merge(state.frozen_params, params, config.lora) if config.lora.rank else params
        )
        x, text, noise, t, given = micro
        return loss.denoising_loss(
            model, params, schedule, {'latents': x, 'text': text}, noise, t, given, frames
        )

    def accumulate(carry, micro):
        (total, count), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, micro)
        return jax.tree.map(jnp.add, carry, (total, count, grads)), None

    parts = cfg.grad_accumulation
    # Interleaved split, so that each device's examples stay on it.
    micros = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(b // parts, parts, *a.shape[1:]), 1, 0),
        (x, text, noise, t, given),
    )
    zero = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, state.params))
    if parts == 1:
        (total, count, grads), _ = accumulate(zero, jax.tree.map(lambda a: a[0], micros))
    else:
        (total, count, grads), _ = jax.lax.scan(accumulate, zero, micros)
    grads = jax.tree.map(lambda g: g / count, grads)

    updates, opt = optimizer.make_optimizer(config.optimizer, cfg.steps).update(
        grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum((1.0 + state.step) / (10.0 + state.step), cfg.ema_decay)
    ema = jax.tree.map(lambda e, p: e - (1 - decay) * (e - p), state.ema, params)
    metrics = {'loss': total / count, 'grad_norm': optax.global_norm(grads)}
    return TrainState(state.step + 1, params, ema, opt, state.frozen_params), metrics


def jit_train_step(
    config: config_lib.Config, frames: tuple[int, ...], state_shardings, batch_sharding
):
    """The compiled step for stories of these latent frames per scene."""
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
