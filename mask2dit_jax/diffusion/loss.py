"""The denoising loss over the scenes that are not given (Mask²DiT, section 3.3)."""

import math

import jax.numpy as jnp
import numpy as np

from mask2dit_jax import layout as layout_lib
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
    return _squared_error(predicted, target, counts)


def _squared_error(predicted, target, counts):
    """Sum of squared errors over the frames that count [B, T, 1, 1, 1], and number of its terms."""
    error = jnp.where(counts, predicted - target, 0.0)  # [B, T, H, W, C]

    # A count of frames fits int32 and is exact in float32 below 2^24, unlike one of their values.
    values_per_frame = float(math.prod(target.shape[2:]))
    num_terms = jnp.sum(counts).astype(jnp.float32) * values_per_frame
    return jnp.sum(error**2), num_terms


def forced_loss(model, params, schedule: schedule_lib.Schedule, batch, noise, t, given, frames):
    """Squared error of v of all scenes that are not given, each generated from those before it.

    All are computed in one pass, over a clean and a noisy copy of every scene (teacher forcing).

    Args:
      model: DiT with `forced`.
      params, schedule, batch, noise, frames: as in `denoising_loss`.
      t: int [B, S], a timestep for each scene of a story.
      given: bool [B, S]; a given scene adds nothing to the loss.

    Returns:
      As `denoising_loss`.
    """
    latents = batch['latents']
    layout = model.cfg.layout(frames, *latents.shape[2:4])
    frame_times = t[:, frame_scenes(layout)]  # [B, T]
    noisy = schedule_lib.add_noise(schedule, latents, noise, frame_times)

    # Copies side by side: of every scene the clean one and then the noisy one.
    frames_of_copies, source = layout_lib.twice(frames)
    copies = model.cfg.layout(frames_of_copies, *latents.shape[2:4])
    of_noisy = (frame_scenes(copies) % 2 == 1)[:, None, None, None]  # [2T, 1, 1, 1]
    inputs = jnp.where(of_noisy, noisy[:, source], latents[:, source])
    scene_times = jnp.stack([jnp.zeros_like(t), t], axis=2).reshape(len(t), -1)  # [B, 2S]
    predicted = model.apply(
        {'params': params},
        inputs,
        jnp.repeat(batch['text'], 2, axis=1),
        scene_times,
        frames=frames_of_copies,
    )
    predicted = predicted[:, np.flatnonzero(of_noisy)]  # [B, T, H, W, C]

    target = schedule_lib.velocity(schedule, latents, noise, frame_times)
    counts = loss_mask(layout, given)[..., None, None, None]
    return _squared_error(predicted, target, counts)
