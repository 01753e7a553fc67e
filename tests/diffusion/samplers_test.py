"""Samplers against an analytic model, given scenes, guidance."""

import jax
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
    bar = alphas_bar[t][..., None, None, None]  # [B, T, 1, 1, 1]
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


def gaussian_flow(alpha, sigma, z):
    """The exact flow of a Gaussian at (alpha, sigma) from noise z, and its x0 and v, in float64."""
    std = np.sqrt(alpha**2 * STD**2 + sigma**2)
    x = alpha * MEAN + std * z
    x0 = MEAN + alpha * STD**2 / std**2 * (x - alpha * MEAN)
    return x, x0, (alpha * x - x0) / sigma


def error_of_uneven_steps(rule, lengths, z):
    """Error of a rule after steps of these lengths in log(alpha/sigma), centred at 0.

    It starts from exact values; neither the first step, which has no step before it, nor the last,
    which is always of first order, is taken.
    """
    ends = np.cumsum([0, *lengths]) - sum(lengths) / 2
    alpha = 1 / np.sqrt(1 + np.exp(-2 * ends))
    sigma = np.sqrt(1 - alpha**2)
    cx, cv, cp = rule(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])

    _, x0_prev, _ = gaussian_flow(alpha[0], sigma[0], z)
    x, _, _ = gaussian_flow(alpha[1], sigma[1], z)
    for i in range(1, len(lengths) - 1):
        std = np.sqrt(alpha[i] ** 2 * STD**2 + sigma[i] ** 2)
        _, x0, v = gaussian_flow(alpha[i], sigma[i], (x - alpha[i] * MEAN) / std)
        x = cx[i] * x + cv[i] * v + cp[i] * x0_prev
        x0_prev = x0
    return np.abs(x - gaussian_flow(alpha[-2], sigma[-2], z)[0]).max()


@pytest.mark.parametrize('sampler, order', [('ddim', 1), ('dpm++2m', 2)])
def test_order_of_convergence(sampler, order):
    """Of uneven steps, from the second one on, down to errors of one step.

    The order of one step is what tells h/(2·h_prev) from h_prev/(2·h): over many steps the errors
    of the latter cancel out but for second order.
    """
    z = np.linspace(-2, 2, 9)
    rule = samplers.SAMPLERS[sampler]

    def error(pattern, times, whole):
        lengths = np.tile(pattern, times) * whole / times
        return error_of_uneven_steps(rule, lengths, z)

    many = error((3, 1), 100, 1) / error((3, 1), 200, 1)
    assert np.log2(many) == pytest.approx(order, abs=0.1)
    for pattern in ((3, 1, 1), (1, 3, 1)):
        one = error(pattern, 1, 0.01) / error(pattern, 1, 0.005)
        assert np.log2(one) == pytest.approx(order + 1, abs=0.1)


def test_dpm_is_of_second_order_from_the_third_step_on_at_zero_terminal_snr():
    """The first step is infinitely long, so it tells the second one nothing; the last is, too."""
    for rescale, first_order in ((True, [0, 1, 9]), (False, [0, 9])):
        schedule = schedule_lib.Schedule(rescale_betas_zero_snr=rescale)
        _, table = samplers.sampler_table('dpm++2m', schedule, 10)
        assert list(np.flatnonzero(table[:, 2] == 0)) == first_order

        # First order is DDIM.
        _, ddim = samplers.sampler_table('ddim', schedule, 10)
        np.testing.assert_array_equal(table[first_order], ddim[first_order])


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
    assert shapes_of_t == [(8, 3)]


def test_the_model_may_be_told_of_another_timestep_of_given_scenes():
    """Given scenes stay all the same; a model that answers with their timestep tells it."""
    given = noise(seed=1)
    is_given = np.arange(LAYOUT.num_scenes) == 0
    kwargs = {'given': given, 'given_scenes': is_given}

    def answers(x, t):
        return jnp.broadcast_to(t[:, :1, None, None, None] / 1000, x.shape).astype(jnp.float32)

    def constant(x, t):
        return jnp.full_like(x, 0.007)

    def run_with(velocity, **more):
        times, table = samplers.sampler_table('ddim', SCHEDULE, 4)
        return samplers.sample(velocity, noise(), LAYOUT, times, table, None, **kwargs, **more)

    told = run_with(answers, given_timestep=7)
    np.testing.assert_allclose(told, run_with(constant), atol=1e-6)
    assert np.abs(told - run_with(answers)).max() > 1e-3
    first = LAYOUT.frames[0]
    np.testing.assert_array_equal(told[:, :first], given[:, :first])


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


def test_the_callback_hears_of_every_step():
    times, table = samplers.sampler_table('ddim', SCHEDULE, 5)
    heard = []
    out = samplers.sample(
        gaussian_velocity,
        noise(),
        LAYOUT,
        times,
        table,
        None,
        callback=heard.append,
        callback_data=np.int32(7),
    )
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert [int(number) for number in heard] == [7] * 5


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
@pytest.mark.parametrize('lag', [0, 1, 4, 9])
def test_a_staircase_leads_every_scene_through_the_same_steps(sampler, lag):
    """The Gaussian's frames know nothing of each other, so that each ends where it always does, and
    moves at its own steps alone."""
    steps = samplers.staircase(*samplers.sampler_table(sampler, SCHEDULE, 6), [0, lag])
    assert len(steps.timesteps) == 6 + lag
    times = []

    def velocity(x, t):
        jax.debug.callback(lambda t: times.append(t[0]), t)
        return gaussian_velocity(x, jnp.maximum(t, 1))

    out, trace = samplers.sample(velocity, noise(), LAYOUT, *steps, None, trace=True)
    jax.effects_barrier()
    np.testing.assert_allclose(out, run(sampler, 6), atol=1e-5)

    own, _ = samplers.sampler_table(sampler, SCHEDULE, 6)
    first = [*own, *[0] * lag]
    second = [*[own[0]] * lag, *own]
    np.testing.assert_array_equal(times, np.stack([first, second, second], axis=1))  # [K, T]
    np.testing.assert_array_equal(
        trace[5:, :, :1], np.broadcast_to(out[:, :1], trace[5:, :, :1].shape)
    )
    waiting = trace[:lag, :, 1:]
    np.testing.assert_array_equal(waiting, np.broadcast_to(noise()[:, 1:], waiting.shape))


def test_guidance_may_change_from_step_to_step_and_the_trace_shows_each():
    """Scales [N, S]: with Euler every step adds its own multiple of the velocity."""

    def velocity(x, t):
        is_negative = jnp.arange(len(x))[:, None, None, None, None] < len(x) // 2
        return jnp.where(is_negative, 0.0, 1.0) * jnp.ones_like(x)

    times, table = samplers.sampler_table('euler', SCHEDULE, 3)
    scales = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    out, steps = samplers.sample(velocity, noise(), LAYOUT, times, table, scales, trace=True)

    turns = table[:, 1]
    for number in range(3):
        moved = (turns[: number + 1, None] * scales[: number + 1]).sum(0)  # [S]
        expected = noise() + moved[frame_scenes(LAYOUT.frames)].reshape(1, -1, 1, 1, 1)
        np.testing.assert_allclose(steps[number], expected, atol=1e-5)
    np.testing.assert_array_equal(out, steps[-1])


def test_the_references_dynamic_guidance_by_hand():
    """1 + scale·(1 - cos(pi·((N - t) / N)^5)) / 2, with the timestep where a step would be."""
    assert guidance_lib.reference_dynamic_guidance(6.0, 0, 50) == pytest.approx(7.0)
    assert guidance_lib.reference_dynamic_guidance(6.0, 50, 50) == pytest.approx(1.0)
    by_hand = 1 + 6 * (1 - np.cos(np.pi * (-19.0) ** 5)) / 2  # (50 - 1000) / 50
    assert guidance_lib.reference_dynamic_guidance(6.0, 1000, 50) == pytest.approx(by_hand)
    assert guidance_lib.reference_dynamic_guidance(2.0, 25, 50) == pytest.approx(
        1 + 2 * (1 - np.cos(np.pi / 32)) / 2
    )
