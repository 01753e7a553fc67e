"""Properties of one update: timesteps, given scenes, caption dropout, randomness per step,
optimizers, EMA, rematerialisation."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

from mask2dit_jax import config as config_lib
from mask2dit_jax import generation
from mask2dit_jax.diffusion import loss as loss_lib
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.layout import frame_scenes
from mask2dit_jax.models import dit
from mask2dit_jax.training import optimizer as optimizer_lib
from mask2dit_jax.training import train_step
from mask2dit_jax.training.objectives import denoising

MODEL = dit.DiTConfig(
    num_layers=1,
    num_attention_heads=1,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_embed_dim=5,
    time_embed_dim=8,
    max_text_seq_length=3,
    patch_size=1,
    sample_height=2,
    sample_width=2,
    sample_frames=5,
    dtype='float32',
    attention_backend='dense',
)
FRAMES = 1, 2
RNG = np.random.default_rng(0)
BATCH = {
    'latents': RNG.standard_normal((8, 3, 2, 2, 4), np.float32),
    'text': RNG.standard_normal((8, 2, 3, 5), np.float32),
    'least_given': np.zeros(8, np.int32),
}
NULL = np.zeros((3, 5), np.float32)


def step_config(optimizer=config_lib.OptimizerConfig(), **train):  # noqa: B008 (frozen)
    train = {'batch_size': 8, 'caption_dropout': 0.0} | train
    return config_lib.Config(
        model=MODEL, optimizer=optimizer, train=config_lib.TrainConfig(**train)
    )


def random_state(cfg):
    """A state with random parameters: initialisation has zeros through which the output would
    depend on nothing."""
    example = (BATCH['latents'][0], BATCH['text'][0], FRAMES)
    shapes = jax.eval_shape(lambda: train_step.init_state(cfg, example))

    rng = np.random.default_rng(0)

    def random_params():
        return jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), shapes.params)

    params = random_params()
    ema = random_params()
    optimizer = optimizer_lib.make_optimizer(cfg.optimizer, cfg.train.steps)
    return train_step.TrainState(np.int32(0), params, ema, optimizer.init(params))


def loss_fn(cfg):
    """Jitted loss of an update as a function of step, captions and empty caption."""
    state = random_state(cfg)

    @jax.jit
    def loss(step, text=BATCH['text'], null=NULL):
        batch = BATCH | {'text': text}
        _, metrics = train_step.train_step(
            state.replace(step=step), batch, null, config=cfg, frames=FRAMES
        )
        return metrics['loss']

    return loss


def test_stratified_timesteps():
    batches = [denoising.stratified_timesteps(jax.random.key(i), 8, 1000) for i in range(200)]
    t = np.stack(batches)  # [200, B]

    # One in each eighth of the range, and every example of the batch sees every timestep.
    np.testing.assert_array_equal(np.sort(t // 125, axis=1), np.tile(np.arange(8), (200, 1)))
    assert np.abs(t.mean(0) - 499.5).max() < 80
    assert t.min() >= 0
    assert t.max() <= 999


def test_a_timestep_that_rounds_up_stays_in_the_range(monkeypatch):
    """In float32 (7 + an offset just below 1) / 8 is 1."""
    below_one = jnp.full(8, np.nextafter(np.float32(1), np.float32(0)))
    monkeypatch.setattr(jax.random, 'uniform', lambda key, shape: below_one)
    t = denoising.stratified_timesteps(jax.random.key(0), 8, 1000)
    assert t.max() == 999


def test_some_stories_have_given_scenes_but_never_all():
    given = np.asarray(denoising.sample_given_scenes(jax.random.key(0), 4000, 4, 0.5))
    count = given.sum(1)
    assert abs((count > 0).mean() - 0.5) < 0.05
    assert set(count) == {0, 1, 2, 3}

    # The leading ones.
    np.testing.assert_array_equal(given, np.arange(4) < count[:, None])

    # One scene alone is never given.
    assert not denoising.sample_given_scenes(jax.random.key(0), 8, 1, 1.0).any()


def test_any_scenes_can_be_given():
    given = np.asarray(denoising.sample_given_scenes(jax.random.key(0), 4000, 3, 1.0, 'any'))
    subsets = {tuple(row) for row in given.tolist()}
    assert len(subsets) == 2**3 - 2  # neither none nor all
    np.testing.assert_allclose(given.mean(0), 0.5, atol=0.05)


def test_captions_are_dropped_for_whole_stories():
    text = np.ones((4000, 2, 3, 5), np.float32)
    kept = np.asarray(denoising.drop_captions(jax.random.key(0), text, NULL, 0.3))
    assert set(kept.sum((1, 2, 3)).tolist()) == {0, 2 * 3 * 5}
    assert abs(kept.mean() - 0.7) < 0.03


def many_draws(key=0, step=0, least_given=(0, 0), **train):
    """What a step draws for 4,000 stories of three scenes, and their captions; `least_given` of the
    even and of the odd ones."""
    rng = np.random.default_rng(0)
    batch = {
        'latents': np.zeros((4000, 3, 1, 1, 1), np.float32),  # [B, T, H, W, C]
        'text': rng.standard_normal((4000, 3, 3, 5), np.float32),  # [B, S, M, E]
        'least_given': np.tile(least_given, 2000),
    }
    config = step_config(**train)
    return denoising.draw(jax.random.key(key), batch, NULL, step, config), batch['text']


def test_a_step_drops_captions_of_whole_stories_at_the_share_asked_for():
    for share in (0.0, 0.3, 1.0):
        drawn, text = many_draws(caption_dropout=share)
        kept = (drawn.text == text).all((2, 3))  # [B, S]
        dropped = (drawn.text == NULL).all((2, 3))
        np.testing.assert_array_equal(kept, ~dropped)
        np.testing.assert_array_equal(dropped, dropped[:, :1].repeat(3, axis=1))
        assert abs(dropped.mean() - share) < (0.03 if 0 < share < 1 else 1e-9)


@pytest.mark.parametrize('which, subsets', [('leading', 2), ('any', 6)])
def test_a_step_draws_given_scenes_for_every_story_by_itself(which, subsets):
    drawn, _ = many_draws(conditional_probability=1.0, given=which)
    _, counts = np.unique(drawn.given, axis=0, return_counts=True)
    assert len(counts) == subsets
    np.testing.assert_allclose(counts / 4000, 1 / subsets, atol=0.05)


@pytest.mark.parametrize('least', [1, 2])
@pytest.mark.parametrize('probability', [0.0, 0.5])
def test_what_no_caption_names_is_never_generated_from_captions_alone(probability, least):
    """Before conditional_from_step, too; other stories are drawn as if there were none of these."""
    train = {'conditional_probability': probability, 'conditional_from_step': 5}
    for step in (4, 5):
        drawn, _ = many_draws(step=step, least_given=(0, least), **train)
        count = np.asarray(drawn.given).sum(1)
        assert set(count[1::2]) == set(range(least, 3))
        share = probability if step >= 5 else 0
        assert abs((count[::2] > 0).mean() - share) < (0.04 if share else 1e-9)

        alone, _ = many_draws(step=step, **train)
        np.testing.assert_array_equal(drawn.given[::2], alone.given[::2])


def test_what_a_step_draws_is_independent():
    """Across stories: dropped captions, given scenes, timesteps and noise."""
    drawn, _ = many_draws(caption_dropout=0.5, conditional_probability=0.5, given='any')
    columns = [
        (drawn.text == NULL).all((1, 2, 3)),
        drawn.given.any(1),
        drawn.given.sum(1),
        drawn.timesteps.max(1),  # of the scenes that are not given
        drawn.noise[:, 0, 0, 0, 0],
        drawn.noise[:, 1, 0, 0, 0],
    ]
    correlation = np.corrcoef(np.array(columns, float))
    correlation[1, 2] = correlation[2, 1] = 0  # a story has given scenes if it has a number of them
    np.testing.assert_allclose(correlation, np.eye(6), atol=0.07)


@pytest.mark.parametrize('which', config_lib.GIVEN)
def test_no_key_is_used_twice_in_a_step(which):
    train = {'caption_dropout': 0.5, 'conditional_probability': 0.5, 'given': which}
    with jax.debug_key_reuse(True):
        jax.block_until_ready(many_draws(**train))

        # The check notices a key that is used twice.
        key = jax.random.key(0)
        jax.random.normal(key)
        with pytest.raises(jax.errors.KeyReuseError):
            jax.random.uniform(key)


class Zero:
    """A model that predicts nothing."""

    cfg = MODEL

    def apply(self, variables, latents, text, t, frames):
        return jnp.zeros(latents.shape)


@pytest.mark.parametrize('num_stories, num_scenes', [(1280, 3), (640, 3), (128, 24), (4096, 24)])
def test_the_count_of_loss_terms_passes_two_to_the_31(num_stories, num_scenes):
    """Scenes of 49 frames at 480 x 720, the first of each story given; only the count is made."""
    frames = (13,) * num_scenes

    @jax.jit
    def count():
        batch = {
            'latents': jnp.zeros((num_stories, sum(frames), 60, 90, 16)),
            'text': jnp.zeros((num_stories, num_scenes, 3, 5)),
        }
        given = jnp.broadcast_to(jnp.arange(num_scenes) == 0, (num_stories, num_scenes))
        given = given[:, frame_scenes(frames)]
        t = jnp.zeros(given.shape, jnp.int32)
        schedule = schedule_lib.Schedule()
        return loss_lib.denoising_loss(
            Zero(), {}, schedule, batch, batch['latents'], t, given, frames
        )[1]

    expected = num_stories * (num_scenes - 1) * 13 * 60 * 90 * 16
    assert count().dtype == np.float32
    np.testing.assert_allclose(float(count()), expected, rtol=1e-7)


def test_huge_counts_scale_loss_and_gradients(monkeypatch):
    """As if every term of the loss were there 2^28 times: their mean, and its gradient, are the
    same."""
    cfg = step_config(conditional_probability=0.5, grad_accumulation=4)
    state = random_state(cfg)

    def metrics():
        step = functools.partial(train_step.train_step, config=cfg, frames=FRAMES)
        return jax.jit(step)(state, BATCH, NULL)[1]

    expected = metrics()
    denoising_loss = loss_lib.denoising_loss

    def repeated(*args):
        total, count = denoising_loss(*args)
        return total * 2.0**28, count * 2**28

    monkeypatch.setattr(loss_lib, 'denoising_loss', repeated)
    chex.assert_trees_all_close(metrics(), expected, rtol=1e-6)


def test_given_scenes_are_clean_and_count_nothing():
    """Loss and gradient depend on the given scene's latents but neither on its noise nor on its
    error."""
    params = random_state(step_config()).params
    t = jnp.array([[0, 500, 500], [20, 20, 20]])
    given = t == 0
    latents = BATCH['latents'][:2]
    noise = BATCH['latents'][2:4]

    def loss(noise, latents):
        return loss_lib.denoising_loss(
            dit.DiT(MODEL),
            params,
            schedule_lib.Schedule(),
            {'latents': latents, 'text': BATCH['text'][:2]},
            noise,
            t,
            given,
            FRAMES,
        )

    gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (total, count), (by_noise, by_latents) = gradients(noise, latents)

    assert count == (2 + 3) * 2 * 2 * 4
    assert total > 0
    assert (by_noise[0, 0] == 0).all()
    assert (by_noise[0, 1:] != 0).all()
    assert (by_noise[1] != 0).all()
    assert (by_latents[0, 0] != 0).all()


def test_given_scenes_may_have_a_little_noise():
    """At the timestep that is drawn for them, of which the model is told; at 0 they are clean."""
    drawn, _ = many_draws(conditional_probability=1.0, given_max_timestep=9)
    values, counts = np.unique(drawn.timesteps[:, 0], return_counts=True)
    assert values.tolist() == list(range(10))
    np.testing.assert_allclose(counts / 4000, 0.1, atol=0.03)
    clean, _ = many_draws(conditional_probability=1.0)
    assert not clean.timesteps[clean.given].any()
    np.testing.assert_array_equal(drawn.timesteps[~drawn.given], clean.timesteps[~clean.given])
    for name in ('noise', 'given', 'text'):
        np.testing.assert_array_equal(getattr(drawn, name), getattr(clean, name))

    seen = []

    class Seeing(Zero):
        def apply(self, variables, latents, text, t, frames):
            seen.append((latents, t))
            return super().apply(variables, latents, text, t, frames)

    latents, noise = BATCH['latents'][:3], BATCH['latents'][3:6]
    given = np.array([[True, False, False], [True, False, False], [False, False, False]])
    t = np.array([[0, 500, 500], [9, 20, 20], [30, 30, 30]])
    batch = {'latents': latents, 'text': BATCH['text'][:3]}
    schedule = schedule_lib.Schedule()
    loss_lib.denoising_loss(Seeing(), {}, schedule, batch, noise, t, given, FRAMES)
    ((noisy, told),) = seen
    np.testing.assert_array_equal(told, t)
    np.testing.assert_array_equal(noisy[0, 0], latents[0, 0])
    expected = schedule_lib.add_noise(schedule, latents, noise, t)
    np.testing.assert_array_equal(noisy[0, 1:], expected[0, 1:])
    np.testing.assert_array_equal(noisy[1:], expected[1:])


def test_a_step_gives_noisy_scenes_where_the_configuration_says_so():
    def loss(most):
        cfg = step_config(conditional_probability=1.0, given_max_timestep=most)
        step = functools.partial(train_step.train_step, config=cfg, frames=FRAMES)
        return jax.jit(step)(random_state(cfg), BATCH, NULL)[1]['loss']

    assert loss(0) != loss(900)


def test_given_scenes_run_at_timestep_zero():
    """The others have that of the story."""
    drawn, _ = many_draws(conditional_probability=1.0)
    last = drawn.timesteps[:, -1:]  # never given
    expected = np.where(drawn.given, 0, np.broadcast_to(last, drawn.given.shape))
    np.testing.assert_array_equal(drawn.timesteps, expected)
    assert len(np.unique(last)) > 900


def test_under_diffusion_forcing_every_scene_has_a_timestep_of_its_own():
    """Given scenes are as they are without it."""
    drawn, _ = many_draws(objective='diffusion_forcing', conditional_probability=0.5)
    assert not drawn.timesteps[drawn.given].any()
    whole = np.asarray(drawn.timesteps)[~drawn.given.any(1)].astype(float)  # [B, S]
    np.testing.assert_allclose(np.corrcoef(whole.T), np.eye(3), atol=0.07)
    np.testing.assert_allclose(np.quantile(whole, [0.1, 0.5, 0.9]), [100, 500, 900], atol=20)
    denoising, _ = many_draws(conditional_probability=0.5)
    np.testing.assert_array_equal(drawn.given, denoising.given)


def test_caption_dropout_replaces_the_whole_story():
    loss = loss_fn(step_config(caption_dropout=1.0))
    assert loss(0) == loss(0, text=BATCH['text'] + 1)
    assert loss(0) != loss(0, null=NULL + 1)


def test_steps_differ_and_repeat():
    loss = loss_fn(step_config())
    assert loss(3) == loss(3)
    assert len({float(loss(i)) for i in range(4)}) == 4


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Micro-batches have unequal numbers of loss terms, as scenes are given: their sums count."""

    def stepped(parts):
        cfg = step_config(
            config_lib.OptimizerConfig(learning_rate=0.1, warmup_steps=0, eps=1.0, clip_norm=1e9),
            grad_accumulation=parts,
            conditional_probability=0.5,
        )
        step = functools.partial(train_step.train_step, config=cfg, frames=FRAMES)
        state, metrics = jax.jit(step)(random_state(cfg), BATCH, NULL)
        assert metrics.keys() == {'loss', 'grad_norm'}
        return state.params, metrics

    whole = stepped(1)
    for parts in (2, 8):
        chex.assert_trees_all_close(stepped(parts), whole, rtol=1e-4, atol=1e-5)


def test_grad_norm_is_the_gradients_before_clipping():
    """A tiny clip_norm changes the update and not what is recorded."""

    def norm(clip_norm):
        cfg = step_config(config_lib.OptimizerConfig(clip_norm=clip_norm))
        step = functools.partial(train_step.train_step, config=cfg, frames=FRAMES)
        return jax.jit(step)(random_state(cfg), BATCH, NULL)[1]['grad_norm']

    assert norm(1e-3) == norm(1e3) > 0.01


def test_grad_norm_is_that_of_the_mean_loss():
    cfg = step_config(conditional_probability=0.5)
    state = random_state(cfg)
    stream = jax.random.fold_in(jax.random.key(cfg.seed), train_step._TRAIN_STREAM)
    drawn = denoising.draw(jax.random.fold_in(stream, 0), BATCH, NULL, 0, cfg)

    def mean_loss(params):
        total, count = loss_lib.denoising_loss(
            dit.DiT(MODEL),
            params,
            cfg.schedule,
            {'latents': drawn.latents, 'text': drawn.text},
            drawn.noise,
            drawn.timesteps[:, frame_scenes(FRAMES)],
            drawn.given[:, frame_scenes(FRAMES)],
            FRAMES,
        )
        return total / count

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    step = functools.partial(train_step.train_step, config=cfg, frames=FRAMES)
    _, metrics = jax.jit(step)(state, BATCH, NULL)
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics['grad_norm'], optax.global_norm(grads), rtol=1e-4)


def test_streams_of_random_numbers_are_apart():
    """What initialises the model, what a step draws and the noise of sampling share no key."""
    key = jax.random.key(7)
    streams = (train_step._INIT_STREAM, train_step._TRAIN_STREAM)
    first = [
        jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, stream), 0), (4,))
        for stream in streams
    ]
    numbers = np.concatenate([*first, generation.story_noise(7, 0, (4,))])
    assert len(set(numbers.tolist())) == 12


def test_the_compiled_step_donates_the_state_and_leaves_it_where_it_was():
    cfg = step_config()
    mesh = mesh_of(1, 2, 1, 1)
    state = random_state(cfg)
    alone, _ = jax.jit(functools.partial(train_step.train_step, config=cfg, frames=FRAMES))(
        state, BATCH, NULL
    )
    shardings = partitioning.shardings(state, mesh)
    placed = jax.device_put(state, shardings)
    sharding = mesh_lib.batch_sharding(mesh)
    batch = jax.device_put(BATCH, sharding)
    step = train_step.jit_train_step(cfg, FRAMES, shardings, sharding)

    after, metrics = step(placed, batch, NULL)
    assert all(x.is_deleted() for x in jax.tree.leaves(placed.params))
    same = jax.tree.map(lambda x, there: x.sharding == there, after, shardings)
    assert all(jax.tree.leaves(same))
    assert any(not there.is_fully_replicated for there in jax.tree.leaves(shardings.params))
    assert all(metric.sharding.is_fully_replicated for metric in metrics.values())
    chex.assert_trees_all_close(after.params, alone.params, rtol=1e-3, atol=1e-5)


def test_a_run_may_be_shorter_than_its_warm_up():
    cfg = config_lib.OptimizerConfig(learning_rate=0.5, warmup_steps=10)
    rates = [-float(update['w']) for update in updates(cfg, {'w': jnp.array(0.3)}, 4)]
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.15], rtol=1e-4)


def test_scenes_are_given_from_the_step_asked_for():
    never = loss_fn(step_config(conditional_probability=0.0, conditional_from_step=5))
    late = loss_fn(step_config(conditional_probability=1.0, conditional_from_step=5))

    np.testing.assert_allclose(late(4), never(4), rtol=1e-5)
    assert abs(late(5) - never(5)) > 1e-3 * never(5)


def test_ema_follows_the_new_parameters():
    cfg = step_config(config_lib.OptimizerConfig(learning_rate=0.1, warmup_steps=0), ema_decay=0.9)
    state = random_state(cfg)

    @jax.jit
    def update(step):
        new_state, _ = train_step.train_step(
            state.replace(step=step), BATCH, NULL, config=cfg, frames=FRAMES
        )
        return new_state

    for step, decay in (0, 0.1), (8, 0.5), (1000, 0.9):
        after = update(step)
        assert after.step == step + 1

        trees = (state.params, after.params, state.ema, after.ema)
        for params, new_params, ema, new_ema in zip(*map(jax.tree.leaves, trees)):
            assert np.abs(new_params - params).max() > 0.05
            np.testing.assert_allclose(new_ema, decay * ema + (1 - decay) * new_params, atol=1e-6)


def updates(optimizer, grads, steps):
    """Updates of `steps` steps with constant gradients; the parameters stay zero."""
    tx = optimizer_lib.make_optimizer(optimizer, steps)
    params = jax.tree.map(jnp.zeros_like, grads)
    opt_state = tx.init(params)
    update = jax.jit(tx.update)

    out = []
    for _ in range(steps):
        delta, opt_state = update(grads, opt_state, params)
        out.append(delta)
    return out


def test_learning_rate_warms_up_and_decays():
    """With a constant gradient Adam moves by exactly the learning rate."""
    cfg = config_lib.OptimizerConfig(learning_rate=0.5, warmup_steps=4, final_fraction=0.2)
    rates = [-float(update['w']) for update in updates(cfg, {'w': jnp.array(0.3)}, 41)]

    np.testing.assert_allclose(rates[:5], [0, 0.125, 0.25, 0.375, 0.5], rtol=1e-4)
    assert (np.diff(rates[4:]) < 0).all()
    np.testing.assert_allclose(rates[-1], 0.1, rtol=0.02)  # one step before the end of the cosine


@pytest.mark.parametrize('name', config_lib.OPTIMIZERS)
def test_weights_decay(name):
    """Without gradients parameters shrink by learning rate x weight decay alone."""
    params = {
        'blocks': {'ff_in': {'kernel': jnp.ones((2, 8, 24)), 'bias': jnp.ones((2, 24))}},
        'patch': {'kernel': jnp.ones((8, 24))},
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    for decay in (0.0, 0.1):
        cfg = config_lib.OptimizerConfig(name, 0.5, warmup_steps=0, weight_decay=decay)
        tx = optimizer_lib.make_optimizer(cfg, 10)
        change, _ = tx.update(zeros, tx.init(params), params)
        for leaf in jax.tree.leaves(change):
            np.testing.assert_allclose(leaf, -0.5 * decay, atol=1e-7)


def test_gradients_are_clipped_by_their_global_norm():
    # With such an eps Adam's update depends on the size of the gradient.
    cfg = config_lib.OptimizerConfig(learning_rate=1.0, warmup_steps=0, eps=1.0)

    def update(scale):
        grads = {'a': jnp.array(3.0 * scale), 'b': jnp.array(4.0 * scale)}  # of norm 5 * scale
        return updates(cfg, grads, 1)[0]

    np.testing.assert_allclose(update(0.1)['a'], -0.3 / 1.3, rtol=1e-5)
    jax.tree.map(
        lambda large, clipped: np.testing.assert_allclose(large, clipped, rtol=1e-5),
        update(10),
        update(0.2),
    )


def test_muon_orthogonalises_each_layers_matrices_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((2, 8, 24)).astype(np.float32)
    grads = {
        'blocks': {
            'ff_in': {'kernel': kernel, 'bias': kernel[:, 0]},
            'norm1': {'linear': {'kernel': kernel}},
        },
        'patch': {'kernel': kernel[0]},
    }
    cfg = config_lib.OptimizerConfig('muon', 0.1, warmup_steps=0, muon_rms=0.5)
    update = updates(cfg, grads, 1)[0]

    # Muon's matrix of each layer has almost equal singular values, and the size that was asked for.
    matrix = np.asarray(update['blocks']['ff_in'].pop('kernel'))
    singular = np.linalg.svd(matrix, compute_uv=False)  # [layers, 8]
    assert (singular.min(1) > 0.6 * singular.max(1)).all()
    np.testing.assert_allclose(np.sqrt((matrix**2).mean((1, 2))), 0.1 * 0.5, rtol=0.2)

    # The rest makes the first step of Adam with Nesterov momentum: 1 + b1·(1 - b1)/(1 - b1²).
    for leaf in jax.tree.leaves(update):
        np.testing.assert_allclose(np.abs(leaf), 0.1 * (1 + 0.09 / 0.19), rtol=1e-3)

    # A layer's update does not depend on another's scale.
    grads['blocks']['ff_in']['kernel'] = kernel * np.array([1, 3])[:, None, None]
    other = updates(cfg, grads, 1)[0]['blocks']['ff_in']['kernel']
    np.testing.assert_allclose(other, matrix, atol=1e-3)


# The products that the backward pass computes again in a layer: adaLN's six choices of rows and
# rope's two turns; the eight weights; attention's two for each caption and scene.
AGAIN = {'save_matmuls': 8, 'save_attention': 8 + 8, 'full': 8 + 8 + 8}


@functools.cache
def products_and_gradients(remat):
    """The number of products in the program of a model's gradients, and the gradients."""
    model_config = dataclasses.replace(MODEL, num_layers=2, attention_backend='blockwise')
    params = random_state(dataclasses.replace(step_config(), model=model_config)).params
    model = dit.DiT(dataclasses.replace(model_config, remat=remat))
    timesteps = np.full((8, sum(FRAMES)), 300)

    def loss(params):
        out = model.apply({'params': params}, BATCH['latents'], BATCH['text'], timesteps, FRAMES)
        return jnp.sum(out**2)

    lowered = jax.jit(jax.grad(loss)).lower(params)
    return lowered.as_text().count('dot_general'), lowered.compile()(params)


@pytest.mark.parametrize('remat', AGAIN)
def test_remat_computes_again_what_it_says_and_the_same(remat):
    """Offloading needs an accelerator's host memory: aot/compiler_test.py compiles that."""
    products, gradients = products_and_gradients(remat)
    least_products, expected_gradients = products_and_gradients('none')

    assert products == least_products + AGAIN[remat]
    chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_scenes_are_filled_up_to_whole_patches_before_noise_is_drawn():
    """Under a temporal patch, by a copy of a scene's first latent, which has noise of its own."""
    cfg = step_config(conditional_probability=0.5)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(MODEL, patch_size_t=2))
    state = random_state(cfg)

    @functools.partial(jax.jit, static_argnames='frames')
    def loss(latents, frames):
        batch = BATCH | {'latents': latents}
        return train_step.train_step(state, batch, NULL, config=cfg, frames=frames)[1]['loss']

    # Scenes of 1 and 2 latents.
    latents = BATCH['latents']
    found = loss(latents, FRAMES)
    filled = np.concatenate([latents[:, :1], latents], axis=1)
    np.testing.assert_allclose(found, loss(filled, (2, 2)), rtol=1e-6)
    with_zeros = np.concatenate([latents[:, :1], 0 * latents[:, :1], latents[:, 1:]], axis=1)
    assert abs(found - loss(with_zeros, (2, 2))) > 1e-3
