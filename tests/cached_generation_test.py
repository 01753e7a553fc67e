"""Generation with a cache of the given scenes equals that which computes them at every step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CAUSAL_MODEL, mesh_of

from mask2dit_jax import config as config_lib
from mask2dit_jax import generation
from mask2dit_jax.attention import masks
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.models import dit, embeddings
from mask2dit_jax.pretrained import names

MODEL = CAUSAL_MODEL
FRAMES = (2, 3, 1)
STORIES = 2


def params_of(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), names.abstract_params(model)
    )


def inputs():
    rng = np.random.default_rng(1)
    return {
        'noise': rng.normal(size=(STORIES, 6, 4, 4, 4)).astype(np.float32),
        'text': rng.normal(size=(STORIES, 3, 4, 8)).astype(np.float32),
        'null_text': rng.normal(size=(4, 8)).astype(np.float32),
        'given': rng.normal(size=(STORIES, 6, 4, 4, 4)).astype(np.float32),
    }


def generated(num_given, remembered, *, mesh=None, sampler='ddim', lag=0, model=MODEL, **sample):
    """Latents of the loop with a cache of so many scenes."""
    config = config_lib.Config(model=model, sample=config_lib.SampleConfig(**sample))
    mesh = mesh or mesh_of(1, 1, 1, 1)
    shardings = partitioning.shardings(names.abstract_params(model), mesh)
    given_scenes = np.arange(3) < np.full((STORIES, 1), num_given)
    guidance = np.array([9.0, 3.0, 2.0], np.float32)
    run = generation.jit_sample(config, FRAMES, mesh, remembered=remembered)
    table = samplers.sampler_table(sampler, config.schedule, 3)
    steps = samplers.staircase(*table, lag * np.maximum(np.arange(3) - num_given, 0))
    latents = run(
        jax.device_put(params_of(model), shardings),
        *inputs().values(),
        given_scenes,
        *steps,
        guidance,
    )
    return np.asarray(latents)


def assert_same(ours, expected):
    assert np.abs(expected[:, -1] - inputs()['given'][:, -1]).max() > 1  # something was generated
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize('captions_of_given', [False, True])
@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_every_sampler(sampler, captions_of_given):
    """One scene is new. Two caches serve the two halves of guidance, or one if given scenes have
    their captions in both."""
    choice = {'sampler': sampler, 'captions_of_given': captions_of_given}
    assert_same(generated(2, 2, **choice), generated(2, 0, **choice))


def test_captions_in_the_negative_half_matter():
    ours, others = (generated(2, 2, captions_of_given=chosen) for chosen in (False, True))
    assert np.abs(ours - others)[:, -1].max() > 3e-4


@pytest.mark.parametrize('num_given, remembered', [(1, 1), (2, 1)])
def test_several_new_scenes(num_given, remembered):
    """Scenes that are given and not remembered stay in the loop."""
    assert_same(generated(num_given, remembered), generated(num_given, 0))


def test_scenes_that_begin_one_after_another():
    assert_same(generated(1, 1, lag=2), generated(1, 0, lag=2))
    assert np.abs(generated(1, 1, lag=2) - generated(1, 1))[:, -1].max() > 3e-4


def test_given_scenes_with_noise():
    assert_same(generated(2, 2, given_timestep=30), generated(2, 0, given_timestep=30))
    assert np.abs(generated(2, 2, given_timestep=30) - generated(2, 2))[:, -1].max() > 3e-4


@pytest.mark.parametrize('captions_of_given', [False, True])
def test_on_eight_devices(captions_of_given):
    mesh = mesh_of(1, 2, 2, 2)
    choice = {'captions_of_given': captions_of_given}
    assert_same(generated(2, 2, mesh=mesh, **choice), generated(2, 0, **choice))


def test_a_batch_that_one_half_of_guidance_does_not_fill():
    """Two stories on four devices: only both halves together spread over them."""
    choice = {'captions_of_given': True}
    assert_same(generated(2, 2, mesh=mesh_of(2, 2, 1, 1), **choice), generated(2, 0, **choice))


def test_blockwise():
    model = dataclasses.replace(MODEL, attention_backend='blockwise')
    assert_same(generated(2, 2, model=model), generated(2, 0, model=model))


POSITIONS = {
    'learned and rotary': {'learned_positions': True},
    'learned': {'learned_positions': True, 'rotary': False},
    'sin-cos': {'rotary': False},
    'jumps at cuts': {'scene_offset_frames': 4.0, 'scene_phase': 0.5},
    'lead frames': {'lead_frames': 1},
}


@pytest.mark.parametrize('positions', POSITIONS)
def test_positions_count_the_remembered_scenes(positions):
    model = dataclasses.replace(MODEL, **POSITIONS[positions])
    assert_same(generated(2, 2, model=model), generated(2, 0, model=model))


def test_what_depends_on_later_scenes_is_not_remembered():
    with pytest.raises(ValueError, match="not under 'dual'"):
        generated(2, 2, model=dataclasses.replace(MODEL, pattern='dual'))
    stretched = dataclasses.replace(MODEL, learned_positions=True, position_rule='reference')
    with pytest.raises(ValueError, match='stretches positions over all scenes'):
        generated(2, 2, model=stretched)


def test_scenes_that_all_stories_are_given_first_are_remembered():
    config = config_lib.Config(model=MODEL)
    given = np.array([[1, 1, 0, 1], [1, 1, 1, 0]], bool)
    assert generation.num_remembered(config, given) == 2
    assert generation.num_remembered(config, np.ones((2, 3), bool)) == 2
    assert generation.num_remembered(config, np.array([[0, 1, 0], [1, 1, 0]], bool)) == 0
    dual = config_lib.Config(model=dataclasses.replace(MODEL, pattern='dual'))
    assert generation.num_remembered(dual, given) == 0


# What is carried from scene to scene.

STORY = (2, 1, 2, 1)


def told(model, context, mesh=None, window=1):
    """Latents of the last of four scenes, each given those right before it, and carried what is."""
    config = config_lib.Config(
        model=model, sample=config_lib.SampleConfig(steps=3, guidance=3.0, context=context)
    )
    mesh = mesh or mesh_of(1, 1, 1, 1)
    params = params_of(model)
    params = jax.device_put(params, partitioning.shardings(params, mesh))
    rng = np.random.default_rng(2)
    story = generation.Inputs(
        latent_frames=STORY,
        text=rng.normal(size=(STORIES, 4, 4, 8)).astype(np.float32),
        null_text=rng.normal(size=(4, 8)).astype(np.float32),
        given=rng.normal(size=(STORIES, 6, 4, 4, 4)).astype(np.float32),
        given_scenes=np.tile(np.arange(4) < 3, (STORIES, 1)),
    )
    scenes = np.split(story.given, np.cumsum(STORY)[:-1], axis=1)
    carried = generation.NOTHING
    blocks = generation.plan_blocks(4, 0, joint=1, window=window, sinks=0)
    for block, scene in zip(blocks[:-1], scenes):
        carried = generation.carry(config, params, story, block, [scene], carried)
    (last,) = generation.tell(config, params, story, blocks[-1], scenes, carried, seed=0)
    return config, params, story, last


def slowly(monkeypatch, config, params, story, window):
    """The loop over all scenes, in which each sees itself and those right before it alone.

    Text is not rotated, so that it shows video where it stands in the window: in the loop over all
    scenes it stands at the window's beginning.
    """

    def sees_the_window(pattern, q_scene, q_is_text, k_scene, k_is_text):
        near = (q_scene - k_scene <= window) & (k_scene <= q_scene)
        return (q_scene == k_scene) | (near & (q_is_text < 1) & (k_is_text < 1))

    def rope_from_the_window(self, places, remembered):
        del remembered
        layout = places.layout
        tables = embeddings.rope_table(
            layout, self.cfg.attention_head_dim, 'linspace', self.cfg.base_grid[1:]
        )
        frame = layout.height * layout.width
        starts = [sum(STORY[: max(0, scene - window)]) for scene in range(4)]  # of each window
        of_text = [frame * start for start in starts for _ in range(layout.text_tokens)]
        joint = tuple(jnp.concatenate([table[np.array(of_text)], table]) for table in tables)
        return dit.RotaryTables(joint, joint)

    with monkeypatch.context() as patch:
        patch.setattr(masks, 'may_attend', sees_the_window)
        patch.setattr(dit.DiT, '_rope', rope_from_the_window)
        noise = np.zeros_like(story.given)
        for row in range(STORIES):
            noise[row, -1:] = generation.scene_noise(0, row, 3, noise[row, -1:].shape)
        table = samplers.sampler_table('ddim', config.schedule, 3)
        run = generation.jit_sample.__wrapped__(config, STORY, mesh_of(1, 1, 1, 1))
        latents = run(
            params,
            noise,
            story.text,
            story.null_text,
            story.given,
            story.given_scenes,
            *samplers.staircase(*table, [0] * 4),
            np.full(4, 3.0, np.float32),
        )
    return np.asarray(latents)[:, -1:]


CARRIED = {
    'rotary': {},
    'learned': {'learned_positions': True, 'rotary': False},
}


@pytest.mark.parametrize('positions, window', [('rotary', 1), ('rotary', 2), ('learned', 2)])
def test_what_is_carried_equals_its_slow_loop(monkeypatch, positions, window):
    model = dataclasses.replace(MODEL, num_layers=3, **CARRIED[positions])
    config, params, story, ours = told(model, 'carried', window=window)
    expected = slowly(monkeypatch, config, params, story, window)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_what_is_carried_tells_of_scenes_that_have_left_the_window():
    """From the second layer on: in the first one a scene's keys know nothing of others."""
    for layers in (1, 3):
        model = dataclasses.replace(MODEL, num_layers=layers)
        difference = np.abs(told(model, 'carried')[-1] - told(model, 'anew')[-1]).max()
        assert difference < 1e-5 if layers == 1 else difference > 1e-3


def test_what_is_carried_on_eight_devices():
    alone, spread = (told(MODEL, 'carried', mesh)[-1] for mesh in (None, mesh_of(1, 2, 2, 2)))
    np.testing.assert_allclose(spread, alone, rtol=0, atol=3e-6 * np.abs(alone).max())


def test_what_cannot_be_carried_is_named():
    def conflicts(model, **sample):
        sample = config_lib.SampleConfig(context='carried', **sample)
        return config_lib.context_conflicts(config_lib.Config(model=model, sample=sample))

    assert conflicts(MODEL) == []
    (dual,) = conflicts(dataclasses.replace(MODEL, pattern='dual'))
    assert "not under 'dual'" in dual
    (fixed,) = conflicts(dataclasses.replace(MODEL, rotary=False))
    assert "use 'anew'" in fixed
    (noisy,) = conflicts(MODEL, given_timestep=3)
    assert 'set given_timestep to 0' in noisy
