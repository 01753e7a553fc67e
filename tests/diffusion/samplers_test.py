"""Samplers against an analytic model, given scenes, guidance."""

import jax.numpy as jnp
import numpy as np
import pytest

from mask2dit_jax.diffusion import guidance as guidance_lib
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.layout import SceneLayout, frame_scenes

LAYOUT = SceneLayout((1, 2), 1, 1, 1)
SCHEDULE = schedule_lib.Schedule()
MEAN = 0.7
STD = 2.0


def gaussian_velocity(x, t):
    """Exact v for data ~ N(MEAN, STD²): the posterior mean of alpha·noise - sigma·x0 given x."""
    alphas_bar = jnp.asarray(SCHEDULE.alphas_bar(), jnp.float32)
    bar = alphas_bar[t][:, frame_scenes(LAYOUT)][..., None, None, None]  # [B, T, 1, 1, 1]
    alpha = jnp.sqrt(bar)
    sigma = jnp.sqrt(1 - bar)
    x0 = MEAN + alpha * STD**2 / (bar * STD**2 + 1 - bar) * (x - alpha * MEAN)

    # From x = alpha·x0 + sigma·noise: v = (alpha·x - x0)/sigma, which is -x0 at pure noise.
    return (alpha * x - x0) / sigma


def noise(batch=4, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, 1, 1, 5)).astype(np.float32)


def run(sampler, steps, guidance=None, **kwargs):
    times, table = samplers.sampler_table(sampler, SCHEDULE, steps)
    return samplers.sample(gaussian_velocity, noise(), LAYOUT, times, table, guidance, **kwargs)


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_samplers_converge_to_the_exact_flow(sampler):
    """The probability-flow ODE of a Gaussian maps noise z to MEAN + STD·z."""
    exact = MEAN + STD * noise()
    errors = [np.abs(run(sampler, steps) - exact).max() for steps in (10, 50, 250)]
    assert errors[2] < 0.05
    assert errors[0] > errors[1] > errors[2]


def test_second_order_beats_first_order():
    exact = MEAN + STD * noise()
    ddim = np.abs(run('ddim', 50) - exact).max()
    dpm = np.abs(run('dpm++2m', 50) - exact).max()
    assert dpm < ddim / 2


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
@pytest.mark.parametrize('steps', [1, 2, 7])
def test_few_steps_are_finite(sampler, steps):
    assert jnp.isfinite(run(sampler, steps)).all()


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_given_scenes_stay_and_run_at_timestep_zero(sampler):
    times, table = samplers.sampler_table(sampler, SCHEDULE, 6)
    given = 3 + noise(seed=1)
    shapes_of_t = []

    def velocity(x, t):
        shapes_of_t.append(t.shape)
        # If the model sees another timestep or other latents of the given scene (the first one),
        # the difference leaks into the second scene, where it shows.
        wrong_time = jnp.sum(t[:, 0])
        wrong_latents = jnp.abs(x[:, :1] - np.concatenate([given, given])[:, :1]).sum()
        return gaussian_velocity(x, t) + wrong_time + wrong_latents

    out = samplers.sample(
        velocity,
        noise(),
        LAYOUT,
        times,
        table,
        1.0,
        given=given,
        given_scenes=np.array([True, False]),
    )
    np.testing.assert_array_equal(out[:, :1], given[:, :1])
    np.testing.assert_allclose(out[:, 1:], run(sampler, 6)[:, 1:], atol=1e-5)
    assert shapes_of_t == [(8, 2)]


def test_default_steps_follow_the_list_and_the_reference_rule_only_where_asked():
    def table(steps, **kwargs):
        return samplers.sampler_table('ddim', SCHEDULE, steps, **kwargs)[1]

    np.testing.assert_array_equal(table(7), table(7, reference_prev=False))
    assert np.abs(table(7) - table(7, reference_prev=True)).max() > 1e-3

    # 50 divides 1000, where both rules are the same.
    np.testing.assert_array_equal(table(50, reference_prev=False), table(50, reference_prev=True))


def test_guidance_per_scene():
    def velocity(x, t):
        """1 in the negative half, 3 in the positive one."""
        is_negative = jnp.arange(len(x))[:, None, None, None, None] < len(x) // 2
        return jnp.where(is_negative, 1.0, 3.0) * jnp.ones_like(x)

    times, table = samplers.sampler_table('euler', SCHEDULE, 1)
    out = samplers.sample(velocity, noise(), LAYOUT, times, table, np.array([0.0, 2.0]))

    # Scale 0 follows the negative half; scale 2 goes as far beyond the positive one.
    delta = samplers.Coefficients(*table[0]).cv
    np.testing.assert_allclose(out[:, 0], noise()[:, 0] + delta * 1, atol=1e-5)
    np.testing.assert_allclose(out[:, 1:], noise()[:, 1:] + delta * 5, atol=1e-5)


def test_guidance_is_equation_6_with_scale_one_plus_w():
    """Ho & Salimans 2022: (1 + w)·positive - w·negative."""
    negative = noise(seed=1)
    positive = noise(seed=2)
    w = np.float32(1.5)
    guided = guidance_lib.classifier_free_guidance(negative, positive, 1 + w)
    np.testing.assert_allclose(guided, (1 + w) * positive - w * negative, atol=1e-5)
    np.testing.assert_array_equal(
        guidance_lib.classifier_free_guidance(negative, positive, 0.0), negative
    )


def test_errors_name_the_choice():
    with pytest.raises(ValueError, match=r"'heun': use one of ddim, dpm\+\+2m, euler"):
        samplers.sampler_table('heun', SCHEDULE, 5)
    with pytest.raises(ValueError, match=r'must be in 1...1000, got 0'):
        samplers.sampler_table('ddim', SCHEDULE, 0)
    with pytest.raises(ValueError, match='Unknown timestep_spacing'):
        schedule_lib.Schedule(timestep_spacing='random').timesteps(5)
