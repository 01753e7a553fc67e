"""Generation with a cache of the given scenes equals that which computes them at every step."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import CAUSAL_MODEL, mesh_of

from mask2dit_jax import config as config_lib
from mask2dit_jax import generation
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.distributed import partitioning
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


def generated(num_given, remembered, *, mesh=None, sampler='ddim', model=MODEL, **sample):
    """Latents of the loop with a cache of so many scenes."""
    config = config_lib.Config(model=model, sample=config_lib.SampleConfig(**sample))
    mesh = mesh or mesh_of(1, 1, 1, 1)
    shardings = partitioning.shardings(names.abstract_params(model), mesh)
    given_scenes = np.arange(3) < np.full((STORIES, 1), num_given)
    guidance = np.array([9.0, 3.0, 2.0], np.float32)
    run = generation.jit_sample(config, FRAMES, mesh, remembered=remembered)
    table = samplers.sampler_table(sampler, config.schedule, 3)
    latents = run(
        jax.device_put(params_of(model), shardings),
        *inputs().values(),
        given_scenes,
        *table,
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


POSITIONS = {
    'learned and rotary': {'learned_positions': True},
    'learned': {'learned_positions': True, 'rotary': False},
    'sin-cos': {'rotary': False},
    'jumps at cuts': {'scene_offset_frames': 4.0, 'scene_phase': 0.5},
}


@pytest.mark.parametrize('positions', POSITIONS)
@pytest.mark.parametrize('backend', ['dense', 'blockwise'])
def test_positions_count_the_remembered_scenes(backend, positions):
    model = dataclasses.replace(MODEL, attention_backend=backend, **POSITIONS[positions])
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
