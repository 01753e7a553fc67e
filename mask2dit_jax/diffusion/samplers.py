"""Samplers as tables of coefficients, and the one `lax.scan` loop that runs them all.

Noisy latents are x = alpha·x0 + sigma·noise (see schedule.py). Every sampler here is linear in the
latents x, the predicted v and the previous step's estimate of x0:

    x' = cx·x + cv·v + cp·x0_prev,    x0 = alpha·x - sigma·v.

A sampler is therefore a float64 table [N, 5] with one row of coefficients per step, and the loop
does not know which sampler it runs:

* `ddim`: deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0), exactly the reference's
  CogVideoX DDIM.
* `dpm++2m`: DPM-Solver++ 2M (Lu et al. 2022, algorithm 2), first order at the first and last step.
  At zero terminal SNR the second step is first order, too: the first is infinitely long in
  log(alpha/sigma), and what it says of the slope then has no weight, h/(2·h_prev) = 0.
* `euler`: with alpha = cos(phi) and sigma = sin(phi) the probability-flow ODE is dx/dphi = v. Euler
  steps on phi stay finite at zero terminal SNR; Euler steps on sigma/alpha would be DDIM again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax.diffusion import guidance as guidance_lib
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.layout import SceneLayout, frame_scenes


class Coefficients(NamedTuple):
    """The columns of a sampler's table, in this order.

    Attributes:
      cx, cv, cp: factors of the latents, of v and of the previous estimate of x0.
      alpha, sigma: share of signal and of noise in the latents before the step.
    """

    cx: np.ndarray
    cv: np.ndarray
    cp: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray


# A sampler's rule takes alpha and sigma before and after every step, float64 [N] each, and returns
# cx, cv and cp, float64 [N] each.


def _ddim(alpha, sigma, next_alpha, next_sigma):
    """x' = (sigma'/sigma)·x + (alpha' - alpha·sigma'/sigma)·x0, in terms of x and v."""
    ratio = next_sigma / sigma
    x0_factor = next_alpha - alpha * ratio
    return ratio + x0_factor * alpha, -x0_factor * sigma, np.zeros_like(alpha)


def _dpm2m(alpha, sigma, next_alpha, next_sigma):
    """DDIM on the extrapolated estimate x0 + (x0 - x0_prev)·h/(2·h_prev).

    h is the step in log(alpha/sigma).
    """
    with np.errstate(divide='ignore', invalid='ignore'):
        log_snr = np.log(alpha / sigma)
        next_log_snr = np.log(next_alpha / next_sigma)
        h = next_log_snr - log_snr
        extra = np.zeros_like(alpha)
        extra[1:] = h[1:] / (2 * h[:-1])

    # An infinite step to clean latents takes no second-order information, and one from pure noise
    # leaves none to the step after it: h / inf is 0.
    extra = np.where(np.isfinite(extra), extra, 0.0)
    extra[-1] = 0.0

    ratio = next_sigma / sigma
    x0_factor = next_alpha - alpha * ratio
    cx = ratio + x0_factor * (1 + extra) * alpha
    cv = -x0_factor * (1 + extra) * sigma
    cp = -x0_factor * extra
    return cx, cv, cp


def _euler(alpha, sigma, next_alpha, next_sigma):
    """x' = x + (phi' - phi)·v with the angle phi of (alpha, sigma)."""
    step_in_phi = np.arctan2(next_sigma, next_alpha) - np.arctan2(sigma, alpha)
    return np.ones_like(alpha), step_in_phi, np.zeros_like(alpha)


SAMPLERS = {'ddim': _ddim, 'dpm++2m': _dpm2m, 'euler': _euler}


def sampler_table(
    sampler: str, schedule: schedule_lib.Schedule, num_steps: int, reference_prev: bool = False
):
    """Timesteps and coefficients of a sampler.

    Args:
      sampler: one of SAMPLERS.
      schedule: the noise schedule.
      num_steps: N, 1...num_train_timesteps.
      reference_prev: lead each step to t - 1000//N, as the reference does, instead of to the next
        timestep of the list. The two differ where N does not divide 1000.

    Returns:
      Timesteps int64 [N], and a table float64 [N, 5] whose columns are `Coefficients`.

    Raises:
      ValueError: for an unknown sampler or step count.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f'Unknown sampler {sampler!r}: use one of {", ".join(SAMPLERS)}.')
    timesteps = schedule.timesteps(num_steps)

    # A timestep below 0 stands for clean latents.
    if reference_prev:
        next_timesteps = timesteps - schedule.num_train_timesteps // num_steps
    else:
        next_timesteps = np.append(timesteps[1:], -1)

    alphas_bar = schedule.alphas_bar()
    power = alphas_bar[timesteps]
    next_power = np.where(next_timesteps >= 0, alphas_bar[np.maximum(next_timesteps, 0)], 1.0)

    alpha = np.sqrt(power)
    sigma = np.sqrt(1 - power)
    rule = SAMPLERS[sampler]
    cx, cv, cp = rule(alpha, sigma, np.sqrt(next_power), np.sqrt(1 - next_power))
    return timesteps, np.stack(Coefficients(cx, cv, cp, alpha, sigma), axis=1)


class SceneSteps(NamedTuple):
    """Where the denoising of every scene stands at every step of the loop.

    Attributes:
      timesteps: int [K, S].
      table: float64 [K, S, 5], rows of `sampler_table`.
    """

    timesteps: np.ndarray
    table: np.ndarray


def staircase(timesteps, table, delays) -> SceneSteps:
    """Lets scenes begin later than others (Chen et al. 2025, SkyReels-V2, arXiv 2504.13074).

    At step k a scene stands at entry clip(k - delay, 0, N) of the list of timesteps: until its
    turn it is noise, and when it is done it stays clean, at timestep 0.

    Args:
      timesteps, table: from `sampler_table`, [N] and [N, 5].
      delays: whole numbers [S]. All 0 is joint denoising; N more than the scene before is scene by
        scene.

    Returns:
      SceneSteps, of K = N + max(delays) steps.
    """
    num_steps = len(timesteps)
    loop = np.arange(num_steps + max(delays))[:, None]
    entry = loop - np.asarray(delays)  # [K, S]
    waits = entry < 0
    is_done = entry >= num_steps
    entry = np.clip(entry, 0, num_steps - 1)

    # Neither moves: x' = x.
    still = Coefficients(cx=1.0, cv=0.0, cp=0.0, alpha=1.0, sigma=0.0)
    return SceneSteps(
        np.where(is_done, 0, timesteps[entry]),
        np.where((waits | is_done)[..., None], still, table[entry]),
    )


def step(row, x, v, x0_prev):
    """One sampler step.

    Args:
      row: one row of `sampler_table`, [5], or a row for every frame, [5, T, 1, 1, 1].
      x, v, x0_prev: latents, predicted velocity, and the previous step's estimate of x0 (anything
        finite at the first step).

    Returns:
      The next latents and this step's estimate of x0.
    """
    c = Coefficients(*(row[i] for i in range(5)))
    x_next = c.cx * x + c.cv * v + c.cp * x0_prev
    x0 = c.alpha * x - c.sigma * v
    return x_next, x0


def sample(
    velocity_fn,
    noise,
    layout: SceneLayout,
    timesteps,
    table,
    guidance,
    given=None,
    given_scenes=None,
    given_timestep: int = 0,
    trace: bool = False,
    callback=None,
    callback_data=None,
):
    """Denoises stories from noise, and keeps given scenes clean (Mask²DiT, section 3.3).

    Args:
      velocity_fn: function of (x [2B, T, H, W, C], t [2B, T]) to v. The first B rows are the
        negative half of classifier-free guidance, the last B rows the positive half. Without
        guidance there are B rows.
      noise: [B, T, H, W, C] standard normal, float32. The axes after T may be merged, here and in
        every array that has them.
      layout: the story's layout.
      timesteps, table: from `sampler_table`, for all scenes, or from `staircase`.
      guidance: None, a scalar, [S] (one scale per scene) or [N, S] (also per step).
      given: clean latents [B, T, H, W, C], of which only given scenes are read.
      given_scenes: bool [S] or [B, S].
      given_timestep: the timestep that the model is told of given scenes. It is 0 for clean ones;
        for another one `given` has its noise.
      trace: also return the latents after every step.
      callback: function that is called on the host when a step is done.
      callback_data: None, or an array that the callback gets.

    Returns:
      Latents [B, T, H, W, C]; with `trace` also [N, B, T, H, W, C].
    """
    batch = noise.shape[0]
    num_scenes = layout.num_scenes
    frame_scene = frame_scenes(layout.frames)  # [T]
    ones = (1,) * (noise.ndim - 2)  # the axes after T

    # A given scene is kept clean in three places, marked (1) to (3) below.
    if given is None:
        given_scenes = jnp.zeros(num_scenes, bool)
    is_given = jnp.broadcast_to(given_scenes, (batch, num_scenes))
    keep = is_given[:, frame_scene].reshape(batch, -1, *ones)  # [B, T, 1, 1, 1]
    if given is None:
        given = jnp.zeros_like(noise)

    if guidance is not None:
        guidance = jnp.asarray(guidance, jnp.float32)
        guidance = jnp.broadcast_to(guidance, (len(timesteps), num_scenes))

    timesteps = jnp.asarray(timesteps, jnp.int32).reshape(len(timesteps), -1)
    timesteps = jnp.broadcast_to(timesteps, (len(timesteps), num_scenes))
    table = jnp.asarray(table, jnp.float32).reshape(len(timesteps), -1, 5)
    table = jnp.broadcast_to(table, (len(timesteps), num_scenes, 5))

    def guided_velocity(x, t, scale):
        """v [B, T, H, W, C] at timesteps t [B, T] and guidance scales [S]."""
        if guidance is None:
            return velocity_fn(x, t)

        # Both halves go through the model as one batch.
        v = velocity_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t])).astype(jnp.float32)
        negative, positive = jnp.split(v, 2)
        frame_scale = scale[frame_scene].reshape(-1, *ones)  # [T, 1, 1, 1]
        return guidance_lib.classifier_free_guidance(negative, positive, frame_scale)

    def body(carry, inputs):
        x, x0_prev = carry
        t, rows, scale = inputs  # [S], [S, 5], [S]

        # (1) The model is told that given scenes are clean: their timestep is 0 at every step.
        frame_times = jnp.where(is_given, given_timestep, t)[:, frame_scene]  # [B, T]
        v = guided_velocity(x, frame_times, scale)
        row = rows[frame_scene].T.reshape(5, -1, *ones)  # [5, T, 1, 1, 1]
        x_next, x0 = step(row, x, v, x0_prev)

        # (2) The step moved all scenes; given ones are put back.
        x_next = jnp.where(keep, given, x_next)

        if callback is not None:
            # A value of the step's result comes along, so that the call cannot come before it.
            result = x_next[(0,) * x_next.ndim]
            data = () if callback_data is None else (callback_data,)
            jax.debug.callback(lambda _, *told: callback(*told), result, *data)
        return (x_next, x0), (x_next if trace else None)

    # (3) The loop starts from noise only in the scenes that are to be generated.
    x = jnp.where(keep, given, noise)
    (x, _), steps = jax.lax.scan(body, (x, jnp.zeros_like(x)), (timesteps, table, guidance))
    return (x, steps) if trace else x
