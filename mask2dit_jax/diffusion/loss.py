"""The denoising loss over the scenes that are not given."""

import jax.numpy as jnp

from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.layout import SceneLayout, frame_scenes


def loss_mask(layout: SceneLayout, given):
    """Which latent frames the loss counts: those of scenes that are not given.

    Args:
      layout: the story's layout.
      given: bool [..., S], true where a scene is given (clean, at timestep 0).

    Returns:
      bool [..., T].
    """
    return ~given[..., frame_scenes(layout)]


def denoising_loss(model, params, schedule: schedule_lib.Schedule, batch, noise, t, given, frames):
    """Squared error of the predicted v over the latents of scenes that are not given.

    Args:
      model: DiT.
      params: its parameters.
      schedule: the noise schedule.
      batch: 'latents' [B, T, H, W, C] and 'text' [B, S, M, E].
      noise: like the latents, standard normal, float32.
      t: int [B], one timestep for all scenes of a story that are not given.
      given: bool [B, S]; given scenes enter clean, at timestep 0, and count nothing (Mask²DiT,
        section 3.3).
      frames: static, latent frames per scene.

    Returns:
      Sum of squared errors, float32, and the number of terms in it.
    """
    x = batch['latents']
    layout = model.cfg.layout(frames, *x.shape[2:4])
    counts = loss_mask(layout, given)[..., None, None, None]  # [B, T, 1, 1, 1]
    noisy = jnp.where(counts, schedule_lib.add_noise(schedule, x, noise, t), x)
    v = model.apply(
        {'params': params}, noisy, batch['text'], jnp.where(given, 0, t[:, None]), frames=frames
    )
    error = jnp.where(counts, v - schedule_lib.velocity(schedule, x, noise, t), 0.0)
    return jnp.sum(error**2), jnp.sum(counts) * x[0, 0].size
