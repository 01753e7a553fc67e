"""The noise schedule of CogVideoX: scaled linear betas, SNR shift, zero terminal SNR.

Noisy latents are x_t = alpha·x_0 + sigma·noise with alpha = sqrt(alpha_bar) and
sigma = sqrt(1 - alpha_bar). The model predicts v = alpha·noise - sigma·x_0 (Salimans & Ho 2022,
appendix D). Zero terminal SNR is Lin et al. 2024, algorithm 1. Tables are float64 numpy arrays.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from mask2dit_jax import ranges

SPACINGS = ('trailing', 'leading', 'linspace')


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Scheduler settings under the names of scheduler_config.json.

    The defaults are CogVideoX-5B's; 2B has snr_shift_scale 3.0.

    Attributes:
      num_train_timesteps: timesteps of the noise schedule.
      beta_start: variance that the first timestep adds.
      beta_end: variance that the last timestep adds; square roots are linear in between.
      snr_shift_scale: the signal-to-noise ratio is divided by it at every timestep.
      rescale_betas_zero_snr: whether the last timestep is pure noise.
      timestep_spacing: timesteps that a sampler visits: 'trailing', 'leading' or 'linspace'.
      steps_offset: added to the timesteps of 'leading'.
    """

    num_train_timesteps: int = ranges.whole(1000, least=2)
    beta_start: float = ranges.real(0.00085, above=0, below=1)
    beta_end: float = ranges.real(0.012, above=0, below=1)
    snr_shift_scale: float = ranges.real(1.0, above=0)
    rescale_betas_zero_snr: bool = ranges.switch(True)
    timestep_spacing: str = ranges.word('trailing', SPACINGS)
    steps_offset: int = ranges.whole(0, least=0)

    def alphas_bar(self) -> np.ndarray:
        """Cumulative signal power per timestep, float64 [num_train_timesteps]."""
        betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps) ** 2
        alphas_bar = np.cumprod(1 - betas)

        # With scale 1 the denominator is 1.
        shift = self.snr_shift_scale
        alphas_bar = alphas_bar / (shift + (1 - shift) * alphas_bar)

        # The roots are shifted so that the last is 0, and scaled so that the first stays.
        if self.rescale_betas_zero_snr:
            roots = np.sqrt(alphas_bar)
            roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
            alphas_bar = roots**2

        return alphas_bar

    def timesteps(self, num_steps: int) -> np.ndarray:
        """Timesteps of a sampler, from noisy to clean.

        Args:
          num_steps: number of sampling steps.

        Returns:
          int64 [num_steps].

        Raises:
          ValueError: if num_steps is not in 1...num_train_timesteps, or the spacing is unknown.
        """
        total = self.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise ValueError(f'Number of sampling steps must be in 1...{total}, got {num_steps}.')

        if self.timestep_spacing == 'trailing':
            # Floating point may give one timestep too many.
            steps = np.round(np.arange(total, 0, -total / num_steps)).astype(np.int64)
            return steps[:num_steps] - 1

        if self.timestep_spacing == 'leading':
            steps = np.arange(num_steps, dtype=np.int64)[::-1]
            return steps * (total // num_steps) + self.steps_offset

        if self.timestep_spacing == 'linspace':
            return np.round(np.linspace(0, total - 1, num_steps)).astype(np.int64)[::-1]

        raise ValueError(
            f'Unknown timestep_spacing {self.timestep_spacing!r}: '
            'use trailing, leading or linspace.'
        )


def _roots(schedule: Schedule, t, ndim: int, table_dtype):
    """Returns alpha and sigma at t, with trailing axes added up to ndim."""
    if table_dtype is None:
        alphas_bar = schedule.alphas_bar()
        alpha = jnp.asarray(np.sqrt(alphas_bar), jnp.float32)
        sigma = jnp.asarray(np.sqrt(1 - alphas_bar), jnp.float32)
    else:
        alphas_bar = jnp.asarray(schedule.alphas_bar()).astype(table_dtype)
        alpha = jnp.sqrt(alphas_bar)
        sigma = jnp.sqrt(1 - alphas_bar)

    t = jnp.asarray(t)
    shape = t.shape + (1,) * (ndim - t.ndim)
    return alpha[t].reshape(shape), sigma[t].reshape(shape)


def add_noise(schedule: Schedule, x, noise, t, table_dtype=None):
    """Noisy latents x_t = alpha_t·x + sigma_t·noise.

    Args:
      schedule: the noise schedule.
      x, noise: [B, T, ...] clean latents and standard normal noise.
      t: integer timesteps whose shape is a leading part of x's: scalar, [B], or [B, T] for one per
        frame.
      table_dtype: None for float32 roots of the float64 table. With a dtype, alpha_bar is rounded
        to it before the roots are taken, as the reference does with its sample dtype (in bfloat16,
        t < 2 then adds no noise at all).

    Returns:
      [B, T, ...].
    """
    alpha, sigma = _roots(schedule, t, x.ndim, table_dtype)
    return alpha * x + sigma * noise


def velocity(schedule: Schedule, x, noise, t, table_dtype=None):
    """The model's target v = alpha_t·noise - sigma_t·x; arguments are those of `add_noise`."""
    alpha, sigma = _roots(schedule, t, x.ndim, table_dtype)
    return alpha * noise - sigma * x
