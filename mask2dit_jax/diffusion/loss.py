"""The denoising loss over the scenes that are not given (Mask²DiT, section 3.3)."""

import math

import jax.numpy as jnp

from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.layout import SceneLayout, frame_scenes


def loss_mask(layout: SceneLayout, given):
    """Says which latent frames the loss counts: those of scenes that are not given.

    Args:
      layout: the story's layout.
      given: bool [..., S], true where a scene is given (clean, at timestep 0).

    Returns:
      bool [..., T].
    """
    return ~given[..., frame_scenes(layout)]


def denoising_loss(
    model, params, schedule: schedule_lib.Schedule, batch, noise, t, given, frames, given_t=None
):
    """Squared error of the predicted v over the latents of scenes that are not given.

    Args:
      model: DiT.
      params: its parameters.
      schedule: the noise schedule.
      batch: 'latents' [B, T, H, W, C] and 'text' [B, S, M, E].
      noise: standard normal noise in the shape of the latents, float32.
      t: int [B], one timestep for all scenes of a story that are not given.
      given: bool [B, S]; a given scene enters clean, at timestep 0, and adds nothing to the loss.
      frames: static, latent frames per scene.
      given_t: int [B], the timestep of given scenes, with its noise; None if all are clean.

    Returns:
      The sum of squared errors and the number of terms in the sum, both float32. The number may
      pass 2^31, where int32 ends: 640 stories of three scenes of 13 latent frames of 60 x 90 x 16
      values have 2.2e9 terms. It is rounded once, in a product of two exact numbers.
    """
    latents = batch['latents']
    layout = model.cfg.layout(frames, *latents.shape[2:4])
    counts = loss_mask(layout, given)[..., None, None, None]  # [B, T, 1, 1, 1]

    # Given scenes stay clean, and the model is told so by their timestep.
    context = latents
    if given_t is not None:
        is_clean = (given_t == 0)[:, None, None, None, None]
        context = schedule_lib.add_noise(schedule, latents, noise, given_t)
        context = jnp.where(is_clean, latents, context)
    noisy = jnp.where(counts, schedule_lib.add_noise(schedule, latents, noise, t), context)
    context_times = 0 if given_t is None else given_t[:, None]
    scene_times = jnp.where(given, context_times, t[:, None])  # [B, S]
    predicted = model.apply({'params': params}, noisy, batch['text'], scene_times, frames=frames)

    target = schedule_lib.velocity(schedule, latents, noise, t)
    error = jnp.where(counts, predicted - target, 0.0)  # [B, T, H, W, C]

    # A count of frames fits int32 and is exact in float32 below 2^24, unlike one of their values.
    values_per_frame = float(math.prod(latents.shape[2:]))
    num_terms = jnp.sum(counts).astype(jnp.float32) * values_per_frame
    return jnp.sum(error**2), num_terms
