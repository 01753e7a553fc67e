"""The noise schedule against its definition in plain numbers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from mask2dit_jax.diffusion import samplers
from mask2dit_jax.diffusion import schedule as schedule_lib

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4))  # [B, T, C]
NOISE = RNG.standard_normal((2, 3, 4))


def alphas_bar_by_hand(count, start, end, shift, rescale):
    """One timestep after the other, in plain Python."""
    powers = []
    power = 1.0
    for i in range(count):
        root = math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * i / (count - 1)
        power *= 1 - root**2
        # The signal-to-noise ratio power / (1 - power) is divided by the shift.
        ratio = power / (1 - power) / shift
        powers.append(ratio / (1 + ratio))
    if not rescale:
        return powers

    roots = [math.sqrt(p) for p in powers]
    first, last = roots[0], roots[-1]
    return [((root - last) * first / (first - last)) ** 2 for root in roots]


@pytest.mark.parametrize('rescale', [True, False])
@pytest.mark.parametrize('shift', [1.0, 3.0])
def test_alphas_bar_are_the_definition(shift, rescale):
    schedule = schedule_lib.Schedule(
        num_train_timesteps=40,
        beta_start=0.01,
        beta_end=0.2,
        snr_shift_scale=shift,
        rescale_betas_zero_snr=rescale,
    )
    by_hand = alphas_bar_by_hand(40, 0.01, 0.2, shift, rescale)
    assert schedule.alphas_bar().dtype == np.float64
    np.testing.assert_allclose(schedule.alphas_bar(), by_hand, rtol=1e-12, atol=1e-15)


def test_defaults_are_those_of_5b():
    by_hand = alphas_bar_by_hand(1000, 0.00085, 0.012, 1.0, True)
    np.testing.assert_allclose(
        schedule_lib.Schedule().alphas_bar(), by_hand, rtol=1e-11, atol=1e-15
    )
    assert schedule_lib.Schedule().timesteps(4).tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize(
    'spacing, offset, num_steps, expected',
    [
        ('trailing', 0, 5, [19, 15, 11, 7, 3]),
        ('trailing', 0, 3, [19, 12, 6]),
        ('leading', 0, 5, [16, 12, 8, 4, 0]),
        ('leading', 1, 3, [13, 7, 1]),
        ('linspace', 0, 3, [19, 10, 0]),
        ('linspace', 0, 1, [0]),
    ],
)
def test_timesteps_by_hand(spacing, offset, num_steps, expected):
    schedule = schedule_lib.Schedule(
        num_train_timesteps=20, timestep_spacing=spacing, steps_offset=offset
    )
    assert schedule.timesteps(num_steps).tolist() == expected


@pytest.mark.parametrize('spacing', ['trailing', 'leading', 'linspace'])
def test_every_number_of_steps_up_to_the_schedules_own_is_served(spacing):
    schedule = schedule_lib.Schedule(num_train_timesteps=67, timestep_spacing=spacing)
    for num_steps in range(1, 68):
        steps = schedule.timesteps(num_steps)
        assert len(steps) == num_steps
        assert (np.diff(steps) < 0).all()
        assert steps.min() >= 0
        assert steps.max() <= 66

    for num_steps in (0, 68):
        with pytest.raises(ValueError, match=f'must be in 1...67, got {num_steps}'):
            schedule.timesteps(num_steps)


@pytest.mark.parametrize('t', [3, [0, 17], [[0, 5, 19], [2, 2, 2]]])
def test_noisy_latents_and_velocity_are_a_rotation(t):
    """(x_t, v) is (x, noise) turned by the timestep's angle, for one timestep per batch, per story
    or per frame."""
    schedule = schedule_lib.Schedule(num_train_timesteps=20)
    noisy = schedule_lib.add_noise(schedule, X, NOISE, np.array(t))
    v = schedule_lib.velocity(schedule, X, NOISE, np.array(t))

    powers = schedule.alphas_bar()
    of_frame = np.broadcast_to(np.reshape(t, np.shape(t) + (1,) * (2 - np.ndim(t))), (2, 3))
    for story in range(2):
        for frame in range(3):
            power = powers[of_frame[story, frame]]
            alpha, sigma = math.sqrt(power), math.sqrt(1 - power)
            x, e = X[story, frame], NOISE[story, frame]
            np.testing.assert_allclose(noisy[story, frame], alpha * x + sigma * e, atol=1e-6)
            np.testing.assert_allclose(v[story, frame], alpha * e - sigma * x, atol=1e-6)


def test_a_table_in_bfloat16_adds_no_noise_at_the_first_timesteps():
    """As the reference does with its sample dtype: 1 - alpha_bar is below bfloat16's resolution."""
    schedule = schedule_lib.Schedule()
    x, noise = (jnp.asarray(a, jnp.bfloat16) for a in (X, NOISE))
    for t, changes in (0, False), (1, False), (20, True):
        noisy = schedule_lib.add_noise(schedule, x, noise, t, table_dtype=jnp.bfloat16)
        assert bool((noisy != x).any()) == changes

    # With float32 roots the first timestep adds its share.
    exact = schedule_lib.add_noise(schedule, X, NOISE, 0)
    assert np.abs(exact - X).max() > 1e-2


@pytest.mark.parametrize('sampler', ['ddim', 'dpm++2m'])
def test_a_perfect_model_is_followed_exactly_to_the_clean_latents(sampler):
    """With the exact v of one x0 and one noise, every step lands on the same x0 and noise at the
    next timestep, and the last step on x0."""
    schedule = schedule_lib.Schedule(num_train_timesteps=50)
    timesteps, table = samplers.sampler_table(sampler, schedule, 7)
    powers = np.append(schedule.alphas_bar()[timesteps], 1.0)
    alphas, sigmas = np.sqrt(powers), np.sqrt(1 - powers)

    x0, noise = 0.8, -1.7
    x, x0_prev = alphas[0] * x0 + sigmas[0] * noise, x0
    for i, row in enumerate(table):
        v = alphas[i] * noise - sigmas[i] * x0
        x, x0_prev = samplers.step(row, x, v, x0_prev)
        np.testing.assert_allclose(x0_prev, x0, atol=1e-12)
        np.testing.assert_allclose(x, alphas[i + 1] * x0 + sigmas[i + 1] * noise, atol=1e-12)


def test_eulers_steps_are_turns_by_the_angle():
    schedule = schedule_lib.Schedule(num_train_timesteps=50)
    timesteps, table = samplers.sampler_table('euler', schedule, 7)
    angles = np.append(np.arccos(np.sqrt(schedule.alphas_bar()[timesteps])), 0.0)
    for row, angle, after in zip(table, angles, angles[1:]):
        expected = [1, after - angle, 0, np.cos(angle), np.sin(angle)]
        np.testing.assert_allclose(row, expected, atol=1e-7)


def test_the_references_rule_steps_down_by_a_whole_number_of_timesteps():
    """It goes to t - 1000 // N, below zero to clean latents, whatever the next timestep is."""
    schedule = schedule_lib.Schedule()
    timesteps, table = samplers.sampler_table('ddim', schedule, 7, reference_prev=True)
    powers = schedule.alphas_bar()
    for t, (cx, cv, cp, *_) in zip(timesteps, table):
        after = powers[t - 142] if t >= 142 else 1.0
        alpha, sigma = np.sqrt(powers[t]), np.sqrt(1 - powers[t])
        x0, noise = 0.3, 1.1
        x = cx * (alpha * x0 + sigma * noise) + cv * (alpha * noise - sigma * x0)
        np.testing.assert_allclose(x, np.sqrt(after) * x0 + np.sqrt(1 - after) * noise, atol=1e-12)
        assert cp == 0
