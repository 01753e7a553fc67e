"""The noise schedule of CogVideoX: scaled linear, SNR shift, zero terminal SNR; v-prediction.

Tables are float64 numpy. x_t = a·x_0 + s·noise with a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar),
and v = a·noise - s·x_0 (Salimans & Ho 2022, appendix D; zero terminal SNR: Lin et al. 2024,
algorithm 1).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Scheduler settings under the names of scheduler_config.json; defaults are CogVideoX-5B's (2B:
    shift 3.0).

    Attributes:
      num_train_timesteps: timesteps of the noise schedule.
      beta_start: variance that the first timestep adds.
      beta_end: variance that the last timestep adds; square roots are linear in between.
      snr_shift_scale: the signal-to-noise ratio is divided by it at every timestep.
      rescale_betas_zero_snr: whether the last timestep is pure noise.
      timestep_spacing: timesteps that a sampler visits: 'trailing', 'leading' or 'linspace'.
      steps_offset: added to the timesteps of 'leading'.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift_scale: float = 1.0
    rescale_betas_zero_snr: bool = True
    timestep_spacing: str = 'trailing'
    steps_offset: int = 0

    def alphas_bar(self) -> np.ndarray:
        """Cumulative signal power per timestep, float64 [num_train_timesteps]."""
        betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps) ** 2
        bar = np.cumprod(1 - betas)
        bar = bar / (self.snr_shift_scale + (1 - self.snr_shift_scale) * bar)
        if self.rescale_betas_zero_snr:
            root = np.sqrt(bar)
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            bar = root**2
        return bar

    def timesteps(self, num_steps: int) -> np.ndarray:
        """Timesteps of a sampler, int64 [num_steps], from noisy to clean.

        Raises:
          ValueError: if num_steps is not in 1...num_train_timesteps, or the spacing is unknown.
        """
        n = self.num_train_timesteps
        if not 1 <= num_steps <= n:
            raise ValueError(f'Number of sampling steps must be in 1...{n}, got {num_steps}.')
        if self.timestep_spacing == 'trailing':
            return np.round(np.arange(n, 0, -n / num_steps)).astype(np.int64)[:num_steps] - 1
        if self.timestep_spacing == 'leading':
            return np.arange(num_steps, dtype=np.int64)[::-1] * (n // num_steps) + self.steps_offset
        if self.timestep_spacing == 'linspace':
            return np.round(np.linspace(0, n - 1, num_steps)).astype(np.int64)[::-1]
        raise ValueError(
            f'Unknown timestep_spacing {self.timestep_spacing!r}: use trailing, leading or linspace.'
        )


def _roots(schedule: Schedule, t, ndim: int, table_dtype):
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at t, broadcastable against ndim axes."""
    if table_dtype is None:
        bar = schedule.alphas_bar()
        a, s = jnp.asarray(np.sqrt(bar), jnp.float32), jnp.asarray(np.sqrt(1 - bar), jnp.float32)
    else:
        bar = jnp.asarray(schedule.alphas_bar()).astype(table_dtype)
        a, s = jnp.sqrt(bar), jnp.sqrt(1 - bar)
    t = jnp.asarray(t)
    shape = t.shape + (1,) * (ndim - t.ndim)
    return a[t].reshape(shape), s[t].reshape(shape)


def add_noise(schedule: Schedule, x, noise, t, table_dtype=None):
    """x_t = sqrt(alpha_bar_t)·x + sqrt(1 - alpha_bar_t)·noise.

    Args:
      schedule: the noise schedule.
      x, noise: [B, T, ...] clean latents and standard normal noise.
      t: integer timesteps, any leading part of x's shape: scalar, [B], or [B, T] for one per frame.
      table_dtype: None for float32 roots of the float64 table. Given a dtype, alpha_bar is rounded
        to it before the roots, as the reference does with its sample dtype (in bf16, t < 2 then
        adds no noise at all).
    """
    a, s = _roots(schedule, t, x.ndim, table_dtype)
    return a * x + s * noise


def velocity(schedule: Schedule, x, noise, t, table_dtype=None):
    """v = sqrt(alpha_bar_t)·noise - sqrt(1 - alpha_bar_t)·x; arguments as for `add_noise`."""
    a, s = _roots(schedule, t, x.ndim, table_dtype)
    return a * noise - s * x
