"""Samplers as tables of coefficients, classifier-free guidance, and one `lax.scan` driver.

Every sampler here is linear in the latents x, the predicted v and the previous step's x_0 estimate,

    x' = cx·x + cv·v + cp·x0_prev,    x0 = a·x - s·v,

so a sampler is a float64 table [N, 5] of (cx, cv, cp, a, s), and the loop is the same for all:

* `ddim`: deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0), exactly the reference's
CogVideoX DDIM.
* `dpm++2m`: DPM-Solver++ 2M (Lu et al. 2022, algorithm 2), first order at the first and last step.
* `euler`: with a = cos(phi), s = sin(phi) the probability-flow ODE is dx/dphi = v; Euler steps on
  phi stay finite at zero terminal SNR. (Euler in sigma = s/a would be DDIM again.)
"""

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.layout import SceneLayout, frame_scenes

SAMPLERS = ('ddim', 'dpm++2m', 'euler')


def _ddim(a, s, a2, s2):
    """x' = (s'/s)·x + (a' - a·s'/s)·x0 in terms of x and v."""
    ratio = s2 / s
    b = a2 - a * ratio
    return ratio + b * a, -b * s, np.zeros_like(a)


def _euler(a, s, a2, s2):
    return np.ones_like(a), np.arctan2(s2, a2) - np.arctan2(s, a), np.zeros_like(a)


def _dpm2m(a, s, a2, s2):
    """DDIM on the extrapolated estimate x0 + (x0 - x0_prev)·h/(2·h_prev), h the step in
    log(a/s)."""
    with np.errstate(divide='ignore', invalid='ignore'):
        log_snr, log_snr2 = np.log(a / s), np.log(a2 / s2)
        h = log_snr2 - log_snr
        extra = np.zeros_like(a)
        extra[1:] = h[1:] / (2 * h[:-1])
    # Infinite steps (from pure noise, or to clean latents) carry no second-order information.
    extra = np.where(np.isfinite(extra), extra, 0.0)
    extra[-1] = 0.0
    ratio = s2 / s
    b = a2 - a * ratio
    return ratio + b * (1 + extra) * a, -b * (1 + extra) * s, -b * extra


def sampler_table(
    sampler: str, schedule: schedule_lib.Schedule, num_steps: int, reference_prev: bool = False
):
    """Timesteps int64 [N] and coefficients float64 [N, 5] of a sampler.

    Args:
      sampler: one of SAMPLERS.
      schedule: the noise schedule.
      num_steps: N, 1...num_train_timesteps.
      reference_prev: use the reference's prev = t - 1000//N instead of the next timestep of the
        list; they differ where N does not divide 1000.

    Raises:
      ValueError: for an unknown sampler or step count.
    """
    rules = {'ddim': _ddim, 'dpm++2m': _dpm2m, 'euler': _euler}
    if sampler not in rules:
        raise ValueError(f'Unknown sampler {sampler!r}: use one of {", ".join(SAMPLERS)}.')
    t = schedule.timesteps(num_steps)
    step = schedule.num_train_timesteps // num_steps
    prev = t - step if reference_prev else np.append(t[1:], -1)
    bar = schedule.alphas_bar()
    bar2 = np.where(prev >= 0, bar[np.maximum(prev, 0)], 1.0)
    a, s, a2, s2 = np.sqrt(bar[t]), np.sqrt(1 - bar[t]), np.sqrt(bar2), np.sqrt(1 - bar2)
    return t, np.stack([*rules[sampler](a, s, a2, s2), a, s], axis=1)


def step(row, x, v, x0_prev):
    """One sampler step.

    Args:
      row: [5], one row of `sampler_table`.
      x, v, x0_prev: latents, predicted velocity, and the previous step's x_0 estimate (anything
        finite at first).

    Returns:
      The next latents and this step's x_0 estimate.
    """
    cx, cv, cp, a, s = (row[i] for i in range(5))
    return cx * x + cv * v + cp * x0_prev, a * x - s * v


def sample(
    velocity_fn,
    noise,
    layout: SceneLayout,
    timesteps,
    table,
    guidance,
    given=None,
    given_scenes=None,
    trace: bool = False,
):
    """Denoises a story from noise, holding given scenes fixed.

    Args:
      velocity_fn: (x [2B, T, H, W, C], t [2B, S]) -> v; the first B rows are the negative half of
        classifier-free guidance, the second the positive one. Without guidance (None) it gets B
        rows.
      noise: [B, T, H, W, C] standard normal, float32; axes after T may be merged, here and in all
        that has them.
      layout: the story's layout.
      timesteps, table: from `sampler_table`.
      guidance: None, a scalar, [S] (one scale per scene) or [N, S] (also per step).
      given: clean latents [B, T, H, W, C], read only in given scenes; they stay as they are
        throughout, at timestep 0 (Mask²DiT, section 3.3).
      given_scenes: bool [S] or [B, S].
      trace: also return the latents after every step.

    Returns:
      [B, T, H, W, C], or that and [N, B, T, H, W, C].
    """
    frame_scene = frame_scenes(layout)
    batch, num_scenes = noise.shape[0], layout.num_scenes
    is_given = jnp.broadcast_to(
        jnp.zeros(num_scenes, bool) if given is None else given_scenes, (batch, num_scenes)
    )
    ones = (1,) * (noise.ndim - 2)
    keep = is_given[:, frame_scene].reshape(batch, -1, *ones)  # [B, T, 1, 1, 1]
    given = jnp.zeros_like(noise) if given is None else given
    if guidance is not None:
        guidance = jnp.broadcast_to(
            jnp.asarray(guidance, jnp.float32), (len(timesteps), num_scenes)
        )

    def guided(x, t, scale):
        if guidance is None:
            return velocity_fn(x, t)
        v = velocity_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t])).astype(jnp.float32)
        negative, positive = jnp.split(v, 2)
        return negative + scale[frame_scene].reshape(-1, *ones) * (positive - negative)

    def body(carry, xs):
        x, x0_prev = carry
        t, row, scale = xs
        v = guided(x, jnp.where(is_given, 0, t), scale)
        x_next, x0 = step(row, x, v, x0_prev)
        x_next = jnp.where(keep, given, x_next)
        return (x_next, x0), (x_next if trace else None)

    x = jnp.where(keep, given, noise)
    xs = jnp.asarray(timesteps, jnp.int32), jnp.asarray(table, jnp.float32), guidance
    (x, _), steps = jax.lax.scan(body, (x, jnp.zeros_like(x)), xs)
    return (x, steps) if trace else x
