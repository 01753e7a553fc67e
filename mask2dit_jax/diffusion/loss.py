"""The denoising loss over the latent frames that are not given (Mask²DiT, section 3.3)."""

import math

import jax.numpy as jnp
import numpy as np

from mask2dit_jax import layout as layout_lib
from mask2dit_jax.diffusion import schedule as schedule_lib


def denoising_loss(model, params, schedule: schedule_lib.Schedule, batch, noise, t, given, frames):
    """Squared error of the predicted v over the latents of frames that are not given.

    Args:
      model: DiT.
      params: its parameters.
      schedule: the noise schedule.
      batch: 'latents' [B, T, H, W, C] and 'text' [B, S, M, E].
      noise: standard normal noise in the shape of the latents, float32.
      t: int [B, T], the timestep of every latent frame. A given frame at timestep 0 is clean, at
        another one it has its noise.
      given: bool [B, T]; a given frame adds nothing to the loss.
      frames: static, latent frames per scene.

    Returns:
      The sum of squared errors and the number of terms in the sum, both float32. The number may
      pass 2^31, where int32 ends: 640 stories of three scenes of 13 latent frames of 60 x 90 x 16
      values have 2.2e9 terms. It is rounded once, in a product of two exact numbers.
    """
    latents = batch['latents']
    is_clean = (given & (t == 0))[..., None, None, None]  # [B, T, 1, 1, 1]
    noisy = schedule_lib.add_noise(schedule, latents, noise, t)
    noisy = jnp.where(is_clean, latents, noisy)
    predicted = model.apply({'params': params}, noisy, batch['text'], t, frames=frames)

    target = schedule_lib.velocity(schedule, latents, noise, t)
    return _squared_error(predicted, target, ~given)


def _squared_error(predicted, target, counts):
    """Sum of squared errors over the frames that count, bool [B, T], and number of its terms."""
    error = jnp.where(counts[..., None, None, None], predicted - target, 0.0)  # [B, T, H, W, C]

    # A count of frames fits int32 and is exact in float32 below 2^24, unlike one of their values.
    values_per_frame = float(math.prod(target.shape[2:]))
    num_terms = jnp.sum(counts).astype(jnp.float32) * values_per_frame
    return jnp.sum(error**2), num_terms


def forced_loss(model, params, schedule: schedule_lib.Schedule, batch, noise, t, given, frames):
    """Squared error of v of all frames that are not given, each scene generated from those before.

    All are computed in one pass, over a clean and a noisy copy of every scene (teacher forcing).

    Args:
      model: DiT with `forced`.
      params, schedule, batch, noise, t, given, frames: as in `denoising_loss`; t is that of the
        noisy copies, and given frames have such copies like others.

    Returns:
      As `denoising_loss`.
    """
    latents = batch['latents']
    noisy = schedule_lib.add_noise(schedule, latents, noise, t)

    # Copies side by side: of every scene the clean one and then the noisy one.
    frames_of_copies, source = layout_lib.twice(frames)
    is_noisy = layout_lib.frame_scenes(frames_of_copies) % 2 == 1  # [2T]
    inputs = jnp.where(is_noisy[:, None, None, None], noisy[:, source], latents[:, source])
    predicted = model.apply(
        {'params': params},
        inputs,
        jnp.repeat(batch['text'], 2, axis=1),
        jnp.where(is_noisy, t[:, source], 0),
        frames=frames_of_copies,
    )
    predicted = predicted[:, np.flatnonzero(is_noisy)]  # [B, T, H, W, C]

    target = schedule_lib.velocity(schedule, latents, noise, t)
    return _squared_error(predicted, target, ~given)
