"""Everything random that one training step draws.

Each story gets noise and one timestep. Some stories have given scenes, which stay clean at timestep
0 (Mask²DiT, section 3.3), and some lose their captions, for classifier-free guidance.
`diffusion.loss.denoising_loss` computes the loss from these draws.

Under diffusion forcing (Chen et al. 2024, arXiv 2407.01392) each scene has a timestep of its own.
So it has under teacher forcing, where it is generated from the clean scenes before it, for all
scenes at once (`diffusion.loss.forced_loss`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mask2dit_jax import config as config_lib


class DenoisingBatch(NamedTuple):
    """A batch with everything that was drawn for it."""

    latents: jax.Array  # [B, T, H, W, C]
    text: jax.Array  # [B, S, M, E], the empty caption where captions were dropped
    noise: jax.Array  # [B, T, H, W, C], standard normal, float32
    timesteps: jax.Array  # int32 [B, S]; a given scene at timestep 0 is clean
    given: jax.Array  # bool [B, S]


def draw(key, batch, null_text, step, config: config_lib.Config) -> DenoisingBatch:
    """Draws what one training step needs.

    Args:
      key: PRNG key of this step.
      batch: 'latents' [B, T, H, W, C], 'text' [B, S, M, E], and 'least_given' int [B]: how many
        leading scenes must be given, because they alone show what captions do not say. Without
        them the model would learn to invent.
      null_text: [M, E], the encoding of the empty caption.
      step: int [], the updates done before this one.
      config: the configuration.
    """
    noise_key, time_key, drop_key, given_key, given_time_key = jax.random.split(key, 5)
    latents = batch['latents']
    batch_size, num_scenes = batch['text'].shape[:2]
    train = config.train

    noise = jax.random.normal(noise_key, latents.shape, jnp.float32)
    num_timesteps = config.schedule.num_train_timesteps
    # One timestep for all scenes of a story, or for each.
    columns = 1 if train.objective == 'denoising' else num_scenes
    timesteps = stratified_timesteps(time_key, batch_size * columns, num_timesteps)
    timesteps = timesteps.reshape(batch_size, columns)

    if train.objective == 'teacher_forcing':
        # All that may be generated is: only scenes that captions leave unsaid are given.
        given = jnp.arange(num_scenes) < batch['least_given'][:, None]
    else:
        probability = train.conditional_probability
        probability = jnp.where(step >= train.conditional_from_step, probability, 0.0)
        given = sample_given_scenes(
            given_key,
            batch_size,
            num_scenes,
            jnp.where(batch['least_given'] > 0, 1.0, probability),
            train.given,
            batch['least_given'],
        )

    text = drop_captions(drop_key, batch['text'], null_text, train.caption_dropout)

    given_timesteps = jax.random.randint(
        given_time_key, (batch_size, 1), 0, train.given_max_timestep + 1
    )
    timesteps = jnp.where(given, given_timesteps, timesteps)  # [B, S]

    return DenoisingBatch(latents, text, noise, timesteps, given)


def stratified_timesteps(key, batch_size: int, num_timesteps: int):
    """Draws timesteps that cover the range evenly in every batch, so that the loss varies less.

    Args:
      key: PRNG key.
      batch_size: B.
      num_timesteps: timesteps are from 0 to num_timesteps - 1.

    Returns:
      int32 [B]. Each timestep is uniform over the whole range; together there is one in each of
      the B equal parts of the range, in random order.
    """
    offset_key, order_key = jax.random.split(key)

    part = jax.random.permutation(order_key, batch_size)
    offset = jax.random.uniform(offset_key, (batch_size,))
    fraction = (part + offset) / batch_size

    # In float32 the fraction can round up to 1, which is not below the range's end.
    return jnp.minimum((fraction * num_timesteps).astype(jnp.int32), num_timesteps - 1)


def sample_given_scenes(
    key, batch_size: int, num_scenes: int, probability, which: str = 'leading', least=0
):
    """Chooses the given (conditioning) scenes of each story.

    Args:
      key: PRNG key.
      batch_size: B.
      num_scenes: S.
      probability: how likely a story has given scenes, a number or [B]. Their number is uniform
        from 1 (or `least`) to S - 1, so that there is always a scene left to train on.
      which: 'leading' gives the first scenes of a story, 'any' a random subset.
      least: a story that has given scenes has at least so many of them, a number or [B].

    Returns:
      bool [B, S], true where a scene is given.
    """
    if num_scenes == 1:
        return jnp.zeros((batch_size, num_scenes), bool)

    coin_key, count_key, *order_key = jax.random.split(key, 3 if which == 'any' else 2)
    lowest = jnp.broadcast_to(jnp.maximum(1, least), batch_size)
    count = jax.random.randint(count_key, (batch_size,), lowest, num_scenes)[:, None]
    has_given = jax.random.uniform(coin_key, (batch_size,)) < probability

    # The scenes with the lowest ranks are given.
    rank = jnp.broadcast_to(jnp.arange(num_scenes), (batch_size, num_scenes))
    if which == 'any':
        rank = jax.random.permutation(order_key[0], rank, axis=1, independent=True)

    return has_given[:, None] & (rank < count)


def drop_captions(key, text, null_text, probability: float):
    """Replaces all captions of some stories by the empty caption.

    Args:
      key: PRNG key.
      text: [B, S, M, E].
      null_text: [M, E], the encoding of the empty caption.
      probability: the share of stories that lose their captions.

    Returns:
      [B, S, M, E].
    """
    drop = jax.random.bernoulli(key, probability, (text.shape[0], 1, 1, 1))
    return jnp.where(drop, null_text, text)
