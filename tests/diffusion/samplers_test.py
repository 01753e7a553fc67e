"""Samplers against an analytic model, given scenes, guidance."""

import jax.numpy as jnp
import numpy as np
import pytest

from mask2dit_jax.diffusion import samplers
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.layout import SceneLayout, frame_scenes

LAYOUT = SceneLayout((1, 2), 1, 1, 1)
SCHEDULE = schedule_lib.Schedule()
STD = 2.0


def gaussian_velocity(x, t, mean=0.7):
    """Exact v for data ~ N(mean, STD²): the posterior mean of a·noise - s·x0 given x."""
    bar = jnp.asarray(SCHEDULE.alphas_bar(), jnp.float32)[t][:, frame_scenes(LAYOUT)][
        ..., None, None, None
    ]
    a, s = jnp.sqrt(bar), jnp.sqrt(1 - bar)
    x0 = mean + a * STD**2 / (bar * STD**2 + 1 - bar) * (x - a * mean)
    # From x = a·x0 + s·noise: v = (a·x - x0)/s, which is -x0 at pure noise.
    return (a * x - x0) / s


def noise(batch=4, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, 1, 1, 5)).astype(np.float32)


def run(sampler, steps, guidance=None, **kwargs):
    times, table = samplers.sampler_table(sampler, SCHEDULE, steps)
    return samplers.sample(gaussian_velocity, noise(), LAYOUT, times, table, guidance, **kwargs)


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_samplers_converge_to_the_exact_flow(sampler):
    """The probability-flow ODE of a Gaussian maps noise z to mean + STD·z."""
    exact = 0.7 + STD * noise()
    errors = [np.abs(run(sampler, n) - exact).max() for n in (10, 50, 250)]
    assert errors[2] < 0.05 and errors[0] > errors[1] > errors[2]


def test_second_order_beats_first_order():
    exact = 0.7 + STD * noise()
    ddim, dpm = (np.abs(run(s, 50) - exact).max() for s in ('ddim', 'dpm++2m'))
    assert dpm < ddim / 2


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
@pytest.mark.parametrize('steps', [1, 2, 7])
def test_few_steps_are_finite(sampler, steps):
    assert jnp.isfinite(run(sampler, steps)).all()


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_given_scenes_stay_and_run_at_timestep_zero(sampler):
    times, table = samplers.sampler_table(sampler, SCHEDULE, 6)
    given = 3 + noise(seed=1)
    seen = []

    def velocity(x, t):
        seen.append(t.shape)
        # What the model sees of the given scene, and its timestep, leak into the other scene if
        # they are wrong.
        return (
            gaussian_velocity(x, t)
            + jnp.sum(t[:, 0])
            + jnp.abs(x[:, :1] - np.concatenate([given] * 2)[:, :1]).sum()
        )

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
    assert seen == [(8, 2)]


def test_default_steps_follow_the_list_and_the_reference_rule_only_where_asked():
    table = samplers.sampler_table('ddim', SCHEDULE, 7)[1]
    np.testing.assert_array_equal(
        table, samplers.sampler_table('ddim', SCHEDULE, 7, reference_prev=False)[1]
    )
    assert (
        np.abs(table - samplers.sampler_table('ddim', SCHEDULE, 7, reference_prev=True)[1]).max()
        > 1e-3
    )
    fifty = [
        samplers.sampler_table('ddim', SCHEDULE, 50, reference_prev=r)[1] for r in (False, True)
    ]
    np.testing.assert_array_equal(*fifty)


def test_guidance_per_scene():
    def velocity(x, t):
        return jnp.where(
            jnp.arange(len(x))[:, None, None, None, None] < len(x) // 2, 1.0, 3.0
        ) * jnp.ones_like(x)

    times, table = samplers.sampler_table('euler', SCHEDULE, 1)
    out = samplers.sample(velocity, noise(), LAYOUT, times, table, np.array([0.0, 2.0]))
    delta = table[0, 1]
    np.testing.assert_allclose(out[:, 0], noise()[:, 0] + delta * 1, atol=1e-5)
    np.testing.assert_allclose(out[:, 1:], noise()[:, 1:] + delta * 5, atol=1e-5)


def test_errors_name_the_choice():
    with pytest.raises(ValueError, match="'heun': use one of ddim"):
        samplers.sampler_table('heun', SCHEDULE, 5)
    with pytest.raises(ValueError, match=r'must be in 1...1000, got 0'):
        samplers.sampler_table('ddim', SCHEDULE, 0)
    with pytest.raises(ValueError, match='Unknown timestep_spacing'):
        schedule_lib.Schedule(timestep_spacing='random').timesteps(5)
