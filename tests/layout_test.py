"""Masks by brute force from the definition; positions; who influences whom."""

import itertools

import jax
import numpy as np
import pytest

from mask2dit_jax.attention import masks
from mask2dit_jax.diffusion import loss
from mask2dit_jax.layout import SceneLayout, frame_scenes
from mask2dit_jax.models import dit, embeddings

LAYOUTS = [SceneLayout(f, 2, 3, 4) for f in ((2,), (1, 3), (2, 1, 3), (1, 2, 1, 3, 2))]


def brute_force(layout, pattern):
    """The masks spelled out token by token, as the paper's text has them."""
    tokens = [('text', s) for s in range(layout.num_scenes) for _ in range(layout.text_tokens)]
    tokens += [
        ('video', s)
        for s, f in enumerate(layout.frames)
        for _ in range(f * layout.height * layout.width)
    ]

    def sees(q, k):
        (q_kind, q_scene), (k_kind, k_scene) = q, k
        if pattern == 'full' or q_scene == k_scene:
            return True
        if pattern == 'isolated' or 'text' in (q_kind, k_kind):
            return False
        return pattern == 'dual' or k_scene < q_scene

    return np.array([[sees(q, k) for k in tokens] for q in tokens])


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda x: str(x.frames))
@pytest.mark.parametrize('pattern', masks.PATTERNS)
def test_masks_are_the_definition(layout, pattern):
    mask = masks.dense_mask(layout, pattern)
    np.testing.assert_array_equal(mask, brute_force(layout, pattern))
    assert mask.sum() == masks.segment_pairs(layout, pattern)
    assert mask.diagonal().all()
    if pattern != 'causal':
        np.testing.assert_array_equal(mask, mask.T)
    ranges = np.zeros_like(mask)
    for scene, is_text in itertools.product(range(layout.num_scenes), (True, False)):
        a, b = layout.text_range(scene) if is_text else layout.video_range(scene)
        for start, stop in masks.key_ranges(layout, pattern, scene, is_text):
            ranges[a:b, start:stop] = True
    np.testing.assert_array_equal(ranges, mask)


def test_published_setting_counts():
    """Three scenes of 13 latent frames on a 30 x 45 grid with 226 text tokens (pairs as in the
    paper's setting)."""
    layout = SceneLayout((13, 13, 13), 30, 45, 226)
    assert layout.num_tokens == 53328
    assert masks.segment_pairs(layout, 'full') == 53328**2
    assert masks.segment_pairs(layout, 'dual') == 3 * 226 * (226 + 17550) + 3 * 17550 * (
        226 + 52650
    )


def tiny_model(pattern, layers):
    cfg = dit.DiTConfig(
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        text_embed_dim=5,
        time_embed_dim=8,
        max_text_seq_length=3,
        patch_size=1,
        sample_height=2,
        sample_width=2,
        sample_frames=5,
        dtype='float32',
        pattern=pattern,
    )
    frames = 1, 2, 1
    rng = np.random.default_rng(0)
    x, text, t = (
        rng.standard_normal((1, 4, 2, 2, 3)),
        rng.standard_normal((1, 3, 3, 5)),
        np.full((1, 3), 400),
    )
    model = dit.DiT(cfg)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, text, t, frames))['params']
    # All random: zero-initialised modulation would hide every influence.
    params = jax.tree.map(lambda p: rng.normal(0, 0.5, p.shape).astype(np.float32), shapes)
    return model, params, x.astype(np.float32), text.astype(np.float32), t, frames


def influence(pattern, layers):
    """How much scene i depends on caption j, [S, S]: size of the gradient of a random projection of
    scene i."""
    model, params, x, text, t, frames = tiny_model(pattern, layers)
    which = frame_scenes(model.cfg.layout(frames, 2, 2))
    of_scene = (which == np.arange(3)[:, None])[:, None, :, None, None, None]
    weights = of_scene * np.random.default_rng(1).normal(size=x.shape)

    @jax.jit
    def gradients(weights):  # [S, B, T, H, W, C]
        _, vjp = jax.vjp(lambda c: model.apply({'params': params}, x, c, t, frames), text)
        return jax.vmap(vjp)(weights)[0]  # [S, B, S, M, E]

    return np.abs(gradients(weights.astype(np.float32))).sum(axis=(1, 3, 4))


def test_captions_reach_other_scenes_only_through_video():
    one, two = influence('dual', 1), influence('dual', 2)
    off = ~np.eye(3, dtype=bool)
    assert (one[off] == 0).all() and (one[~off] > 0).all()
    assert (two > 0).all()


def test_other_patterns_influence():
    off = ~np.eye(3, dtype=bool)
    assert (influence('full', 1) > 0).all()
    assert (influence('isolated', 2)[off] == 0).all()
    causal = influence('causal', 2)
    assert (causal[np.triu_indices(3, 1)] == 0).all() and (causal[np.tril_indices(3)] > 0).all()


def test_each_scene_follows_its_own_timestep():
    """Under `isolated`, changing one scene's timestep changes that scene and no other."""
    model, params, x, text, t, frames = tiny_model('isolated', 1)
    run = jax.jit(lambda t: model.apply({'params': params}, x, text, t, frames))
    which = frame_scenes(model.cfg.layout(frames, 2, 2))
    for scene in range(3):
        change = np.abs(run(t) - run(np.where(np.arange(3) == scene, 0, t))).max(axis=(0, 2, 3, 4))
        np.testing.assert_array_equal(change > 0, which == scene)


def test_rotary_timeline_runs_straight_through_scenes():
    one = embeddings.rope_table(SceneLayout((6,), 2, 3, 4), 32, 'linspace', (2, 3))
    three = embeddings.rope_table(SceneLayout((1, 3, 2), 2, 3, 4), 32, 'linspace', (2, 3))
    np.testing.assert_array_equal(one[0], three[0])
    np.testing.assert_array_equal(one[1], three[1])


def test_sincos_rules_agree_on_one_trained_clip_and_only_the_reference_stretches():
    base = (4, 2, 3)
    clip = SceneLayout((4,), 2, 3, 5)
    a, b = (
        embeddings.sincos_positions(clip, 32, base, rule) for rule in ('reference', 'continuous')
    )
    np.testing.assert_allclose(a, b, atol=1e-6)
    story = SceneLayout((2, 4), 2, 3, 5)
    straight = embeddings.sincos_positions(story, 32, base, 'continuous')[story.num_text :]
    np.testing.assert_allclose(straight[:24], a[5:], atol=1e-6)  # frames 0...3, whatever the scenes
    assert (
        np.abs(
            embeddings.sincos_positions(story, 32, base, 'reference')[story.num_text :] - straight
        ).max()
        > 0.1
    )
    with pytest.raises(ValueError, match='holds 4 latent frames per scene'):
        embeddings.sincos_positions(SceneLayout((5, 4), 2, 3, 5), 32, base, 'reference')


def test_learned_positions_start_anew_in_every_scene():
    layout = SceneLayout((2, 2, 4), 2, 3, 5)
    text, time, _, _ = embeddings.resample_positions(layout, (2, 2, 3), scenes_share=True)
    np.testing.assert_array_equal(text, np.tile(np.eye(5), (3, 1)))
    np.testing.assert_array_equal(time[:4], np.tile(np.eye(2), (2, 1)))
    np.testing.assert_allclose(time.sum(1), 1)


def test_loss_mask_counts_scenes_that_are_not_given():
    mask = loss.loss_mask(SceneLayout((1, 2), 1, 1, 1), np.array([[True, False], [False, False]]))
    np.testing.assert_array_equal(mask, [[False, True, True], [True, True, True]])


@pytest.mark.parametrize('frames', [(), (2, 0)])
def test_layout_without_frames_is_refused(frames):
    with pytest.raises(ValueError, match='at least one'):
        SceneLayout(frames, 2, 2, 4)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'diagonal': use one of dual"):
        masks.dense_mask(LAYOUTS[0], 'diagonal')
    with pytest.raises(ValueError, match='Unknown rotary rule'):
        embeddings.rope_table(LAYOUTS[0], 32, 'spiral', (2, 3))
    with pytest.raises(ValueError, match='exceeds the trained 1x3'):
        embeddings.rope_table(LAYOUTS[0], 32, 'slice', (1, 3))
