"""Teacher forcing: one pass over clean and noisy copies is the sum of the scenes one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CAUSAL_MODEL, mesh_of

from mask2dit_jax import config as config_lib
from mask2dit_jax import layout as layout_lib
from mask2dit_jax.attention import attend, masks, splash
from mask2dit_jax.diffusion import loss
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.layout import SceneLayout, frame_scenes, token_scenes
from mask2dit_jax.models import dit, flops
from mask2dit_jax.pretrained import names
from mask2dit_jax.training.objectives import denoising

MODEL = dataclasses.replace(CAUSAL_MODEL, attention_backend='dense')
FRAMES = (2, 3, 1)
BATCH = 2


def test_scenes_come_twice():
    frames, source = layout_lib.twice((2, 1))
    assert frames == (2, 2, 1, 1)
    assert source.tolist() == [0, 1, 0, 1, 2, 2]


@pytest.mark.parametrize('frames', [(2,), (1, 2), (2, 1, 3), (1, 2, 1, 1, 2)], ids=str)
@pytest.mark.parametrize('lead', [None, 1])
def test_the_mask_by_brute_force(frames, lead):
    copies, _ = layout_lib.twice(frames)
    layout = SceneLayout(copies, 1, 2, 3, lead=lead)
    mask = masks.dense_mask(layout, masks.FORCED)
    scene, kind = token_scenes(layout.segments)
    for q, k in np.ndindex(mask.shape):
        story_scene, is_noisy = divmod(int(scene[q]), 2)
        key_scene, key_is_noisy = divmod(int(scene[k]), 2)
        same_copy = (story_scene, is_noisy) == (key_scene, key_is_noisy)
        both_video = kind[q] < 1 and kind[k] == 0
        from_before = both_video and not key_is_noisy and key_scene < story_scene
        assert mask[q, k] == (same_copy or from_before)


def draws():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params = jax.tree.map(lambda leaf: 0.3 * normal(*leaf.shape), names.abstract_params(MODEL))
    total = sum(FRAMES)
    batch = {'latents': normal(BATCH, total, 4, 4, 4), 'text': normal(BATCH, 3, 4, 8)}
    return params, batch, normal(BATCH, total, 4, 4, 4), rng.integers(1, 1000, (BATCH, 3))


def one_by_one(model, params, batch, noise, t, given):
    """Each scene as the last of a story whose other scenes are given."""
    config = config_lib.Config(model=model)
    ends = np.cumsum(FRAMES)
    total, count = 0.0, 0.0
    for scene in range(3):
        shown = scene + 1
        story = {
            'latents': batch['latents'][:, : ends[scene]],
            'text': batch['text'][:, :shown],
        }
        is_given = (np.arange(shown) < scene) | given[:, scene : scene + 1]
        part, number = loss.denoising_loss(
            dit.DiT(model),
            params,
            config.schedule,
            story,
            noise[:, : ends[scene]],
            np.where(is_given, 0, t[:, scene : scene + 1])[:, frame_scenes(FRAMES[:shown])],
            is_given[:, frame_scenes(FRAMES[:shown])],
            FRAMES[:shown],
        )
        total, count = total + part, count + number
    return total, count


def forced(model, params, batch, noise, t, given):
    config = config_lib.Config(model=model)
    scenes = frame_scenes(FRAMES)
    return loss.forced_loss(
        dit.DiT(model, forced=True),
        params,
        config.schedule,
        batch,
        noise,
        t[:, scenes],
        given[:, scenes],
        FRAMES,
    )


def assert_same(ours, expected):
    """To rounding; a gradient that is zero but for it is compared by the size of the others."""
    leaves = jax.tree.leaves(expected)
    largest = max(np.abs(leaf).max() for leaf in leaves)
    for mine, theirs in zip(jax.tree.leaves(ours), leaves, strict=True):
        tolerance = 2e-5 * np.abs(theirs).max() + 1e-7 * largest
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)


CASES = {
    'rotary': {},
    'learned and rotary': {'learned_positions': True},
    'sin-cos': {'rotary': False},
    'jumps at cuts': {'scene_offset_frames': 4.0, 'scene_phase': 0.5},
    'blockwise': {'attention_backend': 'blockwise'},
    'lead frames': {'lead_frames': 1},
}


@pytest.mark.parametrize('case', CASES)
def test_loss_and_gradients_are_the_sum_of_the_scenes(case):
    """With the same noise and timesteps; in one story the first scene is given."""
    model = dataclasses.replace(MODEL, **CASES[case])
    params, batch, noise, t = draws()
    params = jax.tree.map(
        lambda leaf: 0.3 * np.random.default_rng(leaf.size).normal(size=leaf.shape),
        names.abstract_params(model),
    )
    given = np.array([[False, False, False], [True, False, False]])
    results = []
    for function in (forced, one_by_one):

        def of_params(params, function=function):
            return function(model, params, batch, noise, t, given)

        results.append(jax.jit(jax.value_and_grad(of_params, has_aux=True))(params))
    assert_same(*results)
    (_, count), _ = results[0]
    assert count == (2 * sum(FRAMES) - FRAMES[0]) * 4 * 4 * 4


def test_on_eight_devices():
    """With context parallelism; the clean and the noisy copy of a scene lie side by side."""
    params, batch, noise, t = draws()
    given = np.zeros((BATCH, 3), bool)
    expected = jax.jit(lambda p: forced(MODEL, p, batch, noise, t, given))(params)
    mesh = mesh_of(1, 2, 2, 2)
    params = jax.device_put(params, partitioning.shardings(names.abstract_params(MODEL), mesh))

    @jax.jit
    def on_mesh(params):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return forced(MODEL, params, batch, noise, t, given)

    assert_same(on_mesh(params), expected)


@pytest.mark.parametrize('kernel', splash.KERNELS)
def test_splash(kernel):
    layout = SceneLayout(layout_lib.twice((2, 1))[0], 6, 8, 7)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (jax.random.normal(key, (1, layout.num_tokens, 1, 64)) for key in keys)

    def ours(q, k, v):
        return splash.attend(
            q, k, v, layout, masks.FORCED, block=128, kernel=kernel, interpret=True
        )

    def dense(q, k, v):
        return attend.attend(q, k, v, layout, masks.FORCED, 'dense')

    results = []
    for function in (ours, dense):
        out, vjp = jax.vjp(function, q, k, v)
        results.append((out, *vjp(d_out)))
    assert_same(*results)


def test_every_scene_has_a_timestep_and_only_unsaid_ones_are_given():
    config = config_lib.Config(
        model=MODEL, train=config_lib.TrainConfig(objective='teacher_forcing', caption_dropout=0.0)
    )
    _, batch, _, _ = draws()
    batch['least_given'] = jnp.array([0, 2])
    drawn = denoising.draw(jax.random.key(0), batch, batch['text'][0, 0], 0, config)
    assert len(np.unique(drawn.timesteps[~drawn.given])) == 4
    np.testing.assert_array_equal(drawn.given, [[False] * 3, [True, True, False]])


def test_what_does_not_go_with_it_is_named():
    raw = config_lib.default()
    raw.train.objective = 'teacher_forcing'
    raw.train.conditional_probability = 0.5
    with pytest.raises(ValueError) as error:
        config_lib.parse(raw)
    assert 'is for config.model.pattern causal, not dual' in str(error.value)
    assert 'conditional_probability 0.5 does not go with' in str(error.value)

    raw.model.update(pattern='causal', learned_positions=True, position_rule='reference')
    raw.train.conditional_probability = 0.0
    with pytest.raises(
        ValueError, match=r'teacher_forcing: .* stretches positions over all scenes'
    ):
        config_lib.parse(raw)


def test_flops_are_those_of_both_copies():
    """Twice the tokens, and the pairs that the mask shows; nothing else changes."""
    layout = MODEL.layout((1, 1, 1), 4, 4)
    ours = flops.training_flops(MODEL, layout, 'teacher_forcing')
    plain = flops.training_flops(MODEL, layout)
    assert ours['dense'] == 2 * plain['dense']

    # Of 3 scenes of 16 tokens: with themselves 6 times, and with clean ones before them 2 x 3.
    video = 16 * 16 * (6 + 2 * 3)
    text = 6 * (4 * 4 + 2 * 4 * 16)
    assert ours['attention'] == 3.5 * MODEL.num_layers * 4 * MODEL.width * (video + text)
