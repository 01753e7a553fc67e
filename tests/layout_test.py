"""Segments and masks by brute force from the definition; positions; who influences whom."""

import itertools

import jax
import numpy as np
import pytest

from mask2dit_jax.attention import masks
from mask2dit_jax.layout import SceneLayout, frame_scenes, token_scenes, whole_patches
from mask2dit_jax.models import dit, embeddings

LAYOUTS = [SceneLayout(frames, 2, 3, 4) for frames in ((2,), (1, 3), (2, 1, 3), (1, 2, 1, 3, 2))]
LAYOUTS += [SceneLayout(frames, 2, 3, 4, lead=1) for frames in ((3,), (2, 1, 3))]
LAYOUTS += [SceneLayout((1, 4, 3), 2, 3, 4, lead=2)]


def tokens_of(layout):
    """(kind, scene) of every token, spelled out one by one."""
    tokens = []
    for scene in range(layout.num_scenes):
        tokens += [('text', scene)] * layout.text_tokens
    for scene, frames in enumerate(layout.frames):
        for frame in range(frames):
            is_seen = layout.lead is None or frame < layout.lead
            tokens += [('video' if is_seen else 'tail', scene)] * (layout.height * layout.width)
    return tokens


def brute_force(layout, pattern):
    """The masks spelled out token by token, as the paper's text has them."""

    def sees(query, key):
        q_kind, q_scene = query
        k_kind, k_scene = key
        if pattern == 'full' or q_scene == k_scene:
            return True
        if pattern == 'isolated' or 'text' in (q_kind, k_kind) or k_kind == 'tail':
            return False
        return pattern == 'dual' or k_scene < q_scene

    tokens = tokens_of(layout)
    return np.array([[sees(query, key) for key in tokens] for query in tokens])


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda x: f'{x.frames} {x.lead}')
def test_segments_are_the_sequence(layout):
    """They follow each other without a gap, and every token lies in the segment of its kind."""
    tokens = []
    for segment in layout.segments:
        assert segment.start == len(tokens)
        kind = {-1: 'tail', 0: 'video', 1: 'text'}[segment.kind]
        tokens += [(kind, segment.scene)] * segment.length
        assert segment.stop == len(tokens)

    assert tokens == tokens_of(layout)
    for scene in range(layout.num_scenes):
        of_text = {token for token, kind in enumerate(tokens) if kind == ('text', scene)}
        of_all = {token for token, (_, other) in enumerate(tokens) if other == scene}
        assert set(range(*layout.text_range(scene))) == of_text
        assert set(range(*layout.video_range(scene))) == of_all - of_text

    scenes, kinds = token_scenes(layout.segments)
    assert scenes.tolist() == [scene for _, scene in tokens]
    assert kinds.tolist() == [{'text': 1, 'video': 0, 'tail': -1}[kind] for kind, _ in tokens]


def test_segments_count_padded_frames():
    """With two latent frames per token, a scene of three frames has two token frames."""
    layout = SceneLayout((3, 4), 2, 3, 5, patch_t=2)
    assert layout.segments == (
        (0, True, 0, 5),
        (1, True, 5, 10),
        (0, False, 10, 22),
        (1, False, 22, 34),
    )


def test_scenes_are_filled_up_in_front_each_by_its_own_first_frame():
    whole = whole_patches((3, 2, 1), 2)
    assert whole.frames == (4, 2, 2)
    assert whole.source.tolist() == [0, 0, 1, 2, 3, 4, 5, 5]
    assert whole.source[whole.kept].tolist() == [0, 1, 2, 3, 4, 5]
    assert whole.kept.tolist() == [1, 2, 3, 4, 5, 7]

    whole = whole_patches((4,), 3)
    assert whole.source.tolist() == [0, 0, 0, 1, 2, 3]
    for frames, patch_t in (((3, 2, 1), 1), ((4, 2), 2)):
        whole = whole_patches(frames, patch_t)
        assert whole.frames == frames
        assert whole.source.tolist() == whole.kept.tolist() == list(range(sum(frames)))


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda x: f'{x.frames} {x.lead}')
@pytest.mark.parametrize('pattern', masks.PATTERNS)
def test_masks_are_the_definition(layout, pattern):
    mask = masks.dense_mask(layout, pattern)
    np.testing.assert_array_equal(mask, brute_force(layout, pattern))
    assert mask.sum() == masks.segment_pairs(layout, pattern)
    assert mask.diagonal().all()
    if pattern != 'causal' and (layout.lead is None or pattern != 'dual'):
        np.testing.assert_array_equal(mask, mask.T)

    from_ranges = np.zeros_like(mask)
    for queries in layout.segments:
        ranges = masks.key_ranges(layout, pattern, queries)
        for start, stop in ranges:
            from_ranges[queries.start : queries.stop, start:stop] = True
        # Neighbouring ranges are joined.
        assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(ranges))
    np.testing.assert_array_equal(from_ranges, mask)


def test_published_setting_counts():
    """The paper's setting: three scenes of 13 latent frames, a 30 x 45 grid, 226 text tokens."""
    layout = SceneLayout((13, 13, 13), 30, 45, 226)
    text = 226
    video = 13 * 30 * 45
    assert layout.num_tokens == 3 * (text + video) == 53328
    assert masks.segment_pairs(layout, 'full') == 53328**2

    text_pairs = 3 * text * (text + video)
    video_pairs = 3 * video * (text + 3 * video)
    assert masks.segment_pairs(layout, 'dual') == text_pairs + video_pairs


def tiny_model(pattern, layers, lead_frames=None):
    """A model of three scenes with random parameters, and its inputs."""
    config = dit.DiTConfig(
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
        lead_frames=lead_frames,
    )
    frames = 1, 2, 1
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 2, 2, 3))  # [B, T, H, W, C]
    text = rng.standard_normal((1, 3, 3, 5))  # [B, S, M, E]
    t = np.full((1, 4), 400)  # [B, T]

    model = dit.DiT(config)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, text, t, frames))['params']
    # All are random: zero-initialised modulation would hide every influence.
    params = jax.tree.map(lambda p: rng.normal(0, 0.5, p.shape).astype(np.float32), shapes)
    return model, params, x.astype(np.float32), text.astype(np.float32), t, frames


def influence(pattern, layers):
    """How much scene i depends on caption j, [S, S].

    It is the size of the gradient of a random projection of scene i with respect to caption j.
    """
    model, params, x, text, t, frames = tiny_model(pattern, layers)
    scene_of_frame = frame_scenes(frames)  # [T]
    in_scene = scene_of_frame == np.arange(3)[:, None]  # [S, T]
    projection = np.random.default_rng(1).normal(size=x.shape)
    weights = in_scene[:, None, :, None, None, None] * projection  # [S, B, T, H, W, C]

    @jax.jit
    def gradients(weights):
        _, vjp = jax.vjp(lambda text: model.apply({'params': params}, x, text, t, frames), text)
        return jax.vmap(vjp)(weights)[0]  # [S, B, S, M, E]

    return np.abs(gradients(weights.astype(np.float32))).sum(axis=(1, 3, 4))


def test_captions_reach_other_scenes_only_through_video():
    one_layer = influence('dual', 1)
    two_layers = influence('dual', 2)

    other = ~np.eye(3, dtype=bool)
    assert (one_layer[other] == 0).all()
    assert (one_layer[~other] > 0).all()
    assert (two_layers > 0).all()


def test_other_patterns_influence():
    assert (influence('full', 1) > 0).all()

    other = ~np.eye(3, dtype=bool)
    assert (influence('isolated', 2)[other] == 0).all()

    causal = influence('causal', 2)
    assert (causal[np.triu_indices(3, 1)] == 0).all()
    assert (causal[np.tril_indices(3)] > 0).all()


@pytest.mark.parametrize('pattern', ['dual', 'causal'])
def test_other_scenes_see_lead_frames_alone(pattern):
    """Of the scene of two frames, whose second one is seen by nobody else; by its gradient."""
    model, params, x, text, t, frames = tiny_model(pattern, 1, lead_frames=1)

    def run(x):
        return model.apply({'params': params}, x, text, t, frames)

    @jax.jit
    def gradient(projection):
        return jax.vjp(run, x)[1](projection)[0]

    seen = np.zeros((4, 4), bool)  # whether frame i depends on frame j
    projection = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    for frame in range(4):
        of_frame = np.zeros_like(projection)
        of_frame[:, frame] = projection[:, frame]
        seen[frame] = np.abs(gradient(of_frame)).max((0, 2, 3, 4)) > 0
    later = 1 if pattern == 'dual' else 0
    assert seen.astype(int).tolist() == [
        [1, later, 0, later],
        [1, 1, 1, later],
        [1, 1, 1, later],
        [1, 1, 0, 1],
    ]


def test_lead_frames_are_for_patterns_that_see_other_scenes():
    for pattern in ('full', 'isolated'):
        with pytest.raises(ValueError, match=f'which the pattern {pattern!r} says already'):
            tiny_model(pattern, 1, lead_frames=1)
    layout = dit.DiTConfig(pattern='causal', lead_frames=3, patch_size_t=2).layout((4, 2), 60, 90)
    assert layout.lead == 2


def test_each_frame_follows_its_own_timestep():
    """Under `isolated`, changing one frame's timestep changes its scene and no other."""
    model, params, x, text, t, frames = tiny_model('isolated', 1)
    run = jax.jit(lambda t: model.apply({'params': params}, x, text, t, frames))
    scene_of_frame = frame_scenes(frames)

    def change(other_t):
        return np.abs(run(t) - run(other_t)).max(axis=(0, 2, 3, 4))  # [T]

    for frame, scene in enumerate(scene_of_frame):
        other_t = np.where(np.arange(4) == frame, 0, t)
        np.testing.assert_array_equal(change(other_t) > 0, scene_of_frame == scene)

    # One for each scene is one for all of its frames.
    of_scenes = np.array([[400, 0, 30]])
    np.testing.assert_array_equal(run(of_scenes), run(of_scenes[:, scene_of_frame]))

    # Which frame of a scene has which timestep matters, too: captions have the same in both.
    assert (np.abs(run(np.array([[400, 0, 400, 400]])) - run(np.array([[400, 400, 0, 400]]))) > 0)[
        :, 1:3
    ].all()


def test_a_caption_has_the_timestep_of_the_frames_that_are_denoised():
    """Where all of a scene are given, that of given ones; frames are counted by tokens of two."""
    layout = SceneLayout((2, 4, 4), 1, 1, 1, patch_t=2)
    t = np.array([[0, 0, 0, 0, 7, 7, 3, 3, 3, 3]])
    of_frames, of_captions = dit._token_times(t, layout)
    np.testing.assert_array_equal(of_frames, [[0, 0, 7, 3, 3]])
    np.testing.assert_array_equal(of_captions, [[0, 7, 3]])
    of_frames, of_captions = dit._token_times(t[:, :5], SceneLayout((1, 3, 1), 1, 1, 1, patch_t=2))
    np.testing.assert_array_equal(of_frames, [[0, 0, 0, 7]])
    np.testing.assert_array_equal(of_captions, [[0, 0, 7]])


def test_rotary_timeline_runs_straight_through_scenes():
    one = embeddings.rope_table(SceneLayout((6,), 2, 3, 4), 32, 'linspace', (2, 3))
    three = embeddings.rope_table(SceneLayout((1, 3, 2), 2, 3, 4), 32, 'linspace', (2, 3))
    np.testing.assert_array_equal(one[0], three[0])
    np.testing.assert_array_equal(one[1], three[1])


def test_rotary_timeline_jumps_at_cuts():
    """A frame has the angles of the straight timeline, later by the jumps of the cuts before it."""
    layout = SceneLayout((1, 3, 2), 2, 3, 4)
    offset, phase, dim = 2.0, 0.25, 32
    cos, sin = embeddings.rope_table(layout, dim, 'linspace', (2, 3), offset, phase)
    long = SceneLayout((6 + 2 * int(offset),), 2, 3, 4)
    straight = embeddings.rope_table(long, dim, 'linspace', (2, 3))

    def by_frame(table):
        return np.asarray(table).reshape(-1, 6, dim)

    cosines, sines = map(by_frame, straight)
    for frame, scene in enumerate((0, 1, 1, 1, 2, 2)):
        source = frame + int(offset) * scene
        turned = np.zeros(dim)
        turned[: dim // 4] = phase * scene  # the share of time
        expected = cosines[source] * np.cos(turned) - sines[source] * np.sin(turned)
        np.testing.assert_allclose(by_frame(cos)[frame], expected, atol=1e-6)
        expected = sines[source] * np.cos(turned) + cosines[source] * np.sin(turned)
        np.testing.assert_allclose(by_frame(sin)[frame], expected, atol=1e-6)


@pytest.mark.parametrize('name', ['scene_offset_frames', 'scene_phase'])
def test_jumps_at_cuts_need_rotary_positions(name):
    with pytest.raises(ValueError, match=rf'model.{name} 0.5 is about rotary positions'):
        dit.DiTConfig(rotary=False, **{name: 0.5})


def test_sincos_rules_agree_on_one_trained_clip_and_only_the_reference_stretches():
    base = (4, 2, 3)
    clip = SceneLayout((4,), 2, 3, 5)
    clip_reference = embeddings.sincos_positions(clip, 32, base, 'reference')
    clip_continuous = embeddings.sincos_positions(clip, 32, base, 'continuous')
    np.testing.assert_allclose(clip_reference, clip_continuous, atol=1e-6)

    # Frames 0 to 3 are where the clip's are, although the story cuts after frame 1.
    story = SceneLayout((2, 4), 2, 3, 5)
    continuous = embeddings.sincos_positions(story, 32, base, 'continuous')[story.num_text :]
    np.testing.assert_allclose(continuous[:24], clip_reference[clip.num_text :], atol=1e-6)

    reference = embeddings.sincos_positions(story, 32, base, 'reference')[story.num_text :]
    assert np.abs(reference - continuous).max() > 0.1

    with pytest.raises(ValueError, match='holds 4 latent frames per scene'):
        embeddings.sincos_positions(SceneLayout((5, 4), 2, 3, 5), 32, base, 'reference')


def test_learned_positions_start_anew_in_every_scene():
    layout = SceneLayout((2, 2, 4), 2, 3, 5)
    text, time, _, _ = embeddings.resample_positions(layout, (2, 2, 3), scenes_share=True)
    np.testing.assert_array_equal(text, np.tile(np.eye(5), (3, 1)))
    np.testing.assert_array_equal(time[:4], np.tile(np.eye(2), (2, 1)))
    np.testing.assert_allclose(time.sum(1), 1)


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


def test_equal_layouts_are_one_key():
    """Compiled functions are kept by layout."""
    assert len({SceneLayout((1, 2), 4, 4, 3), SceneLayout((1, 2), 4, 4, 3, patch_t=1)}) == 1
