"""The world of stories: exact scores, the codec, and the TFDS builder."""

import dataclasses
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import child_environment

from mask2dit_jax.stories import builder, rendering, scores, world
from mask2dit_jax.stories import codec as codec_lib

RIGHT = ('action', 'color', 'shape', 'background', 'identity', 'story', 'consistency')
SCENE_SCORES = ('action', 'color', 'shape', 'background', 'identity')
RED_RING = world.Story(
    'ring',
    'red',
    'gray',
    ('moves left', 'grows', 'stays'),
    (4, 4, 4),
    ((8.0, 10.5), (8.0, 8.0), (7.0, 9.0)),
)


def sample(count, frames, seed=0, split='test', **kwargs):
    rng = np.random.default_rng(seed)
    return [world.sample_story(rng, frames, split=split, **kwargs) for _ in range(count)]


def video_of(story):
    return rendering.render(story) / np.float32(255)


def means(videos, told):
    return scores.summarize(scores.score(videos, told))


def assert_all_right(out):
    assert {name: out[name] for name in RIGHT} == dict.fromkeys(RIGHT, 1.0)
    assert out['leak'] == 0


@pytest.mark.parametrize('frames', [(4, 4, 4), (4, 8, 4, 12, 8), (2, 3)])
def test_ground_truth_scores_one(frames):
    told = sample(256, frames)
    clean = np.stack([video_of(story) for story in told])
    noisy = clean + np.random.default_rng(1).normal(0, 0.1, clean.shape)

    for videos, worst in ((clean, 0.01), (noisy, 0.7)):
        out = means(videos, told)
        assert_all_right(out)
        assert out['residual'] < worst


@pytest.mark.parametrize('patch_frames', [2, 4])
def test_codec_keeps_what_is_scored(patch_frames):
    told = sample(256, (4, 8, 4))
    codec = codec_lib.default_codec(16, patch_frames)
    latents = codec_lib.encode(codec, np.stack([rendering.render(story) for story in told]))

    assert latents.shape == (256, 16 // patch_frames, 4, 4, 12 * patch_frames)
    assert latents.dtype == np.float32
    assert abs(latents.mean()) < 0.05
    assert abs(latents.var() - 1) < 0.1

    out = means(codec_lib.decode(codec, latents), told)
    assert_all_right(out)
    assert out['residual'] < 0.2


def test_codec_of_larger_patches_keeps_what_is_scored():
    """Of 32 px in as many latents as 16 px have: more channels leave a smaller residual."""
    told = sample(64, (4, 8, 4), size_px=32)
    videos = np.stack([rendering.render(story) for story in told])
    residuals = []
    for components in (48, 96):
        codec = codec_lib.default_codec(32, components=components, patch_px=8)
        latents = codec_lib.encode(codec, videos)
        assert latents.shape == (64, 4, 4, 4, components)
        out = means(codec_lib.decode(codec, latents), told)
        assert_all_right(out)
        residuals.append(out['residual'])
    assert residuals[1] < 0.1 < residuals[0] < 0.2


@pytest.mark.parametrize('frames', [(9, 9, 9), (9, 5, 13)])
def test_codec_of_first_frames_keeps_what_is_scored(frames):
    told = sample(128, frames)
    codec = codec_lib.default_codec(components=24, first_frame=True)
    videos = np.stack([rendering.render(story) for story in told])
    latents = codec_lib.encode(codec, videos, frames)

    latent_frames = tuple((f - 1) // 4 + 1 for f in frames)
    assert latents.shape == (128, sum(latent_frames), 4, 4, 24)
    assert abs(latents.var() - 1) < 0.1

    decoded = codec_lib.decode(codec, latents, latent_frames)
    assert decoded.shape == videos.shape
    out = means(decoded, told)
    assert_all_right(out)
    assert out['residual'] < 0.22


def test_codec_of_first_frames_codes_scenes_apart():
    """The latents of a scene are the same whatever stands before and after it."""
    codec = codec_lib.default_codec(components=24, first_frame=True)
    videos = rendered(4, (9, 5, 13))
    latents = codec_lib.encode(codec, videos, (9, 5, 13))
    np.testing.assert_array_equal(latents[:, 3:5], codec_lib.encode(codec, videos[:, 9:14]))

    # The first latent frame of a scene knows nothing of its other frames.
    other = videos.copy()
    other[:, 10:14] = 255 - other[:, 10:14]
    changed = codec_lib.encode(codec, other, (9, 5, 13)) != latents
    assert changed.any((0, 2, 3, 4)).tolist() == [False] * 4 + [True] + [False] * 4


def test_score_at_other_sizes():
    told = sample(32, (4, 4), size_px=32)
    videos = [rendering.render(story) for story in told]  # uint8, as a list
    assert_all_right(means(videos, told))


def test_swapped_action_is_wrong_and_leaks_only_if_another_scene_has_it():
    for shown, leak in (('moves left', True), ('shrinks', False)):
        story = dataclasses.replace(
            RED_RING,
            actions=('moves left', 'grows', shown),
            starts=((8.0, 10.5), (8.0, 8.0), (7.0, 10.5)),
        )
        out = scores.score(video_of(story)[None], [RED_RING])

        assert out['action'].tolist() == [[True, True, False]]
        assert out['leak'].tolist() == [[False, False, leak]]
        assert not out['story'][0]
        assert out['consistency'][0]
        assert out['identity'].all()
        assert out['background'].all()


@pytest.mark.parametrize(
    'field, value, columns',
    [
        ('color', 'blue', {'color', 'identity'}),
        ('shape', 'ball', {'shape', 'identity'}),
        ('background', 'brown', {'background'}),
    ],
)
def test_one_scene_changed_is_wrong_in_its_column(field, value, columns):
    video = video_of(RED_RING)
    video[4:8] = video_of(dataclasses.replace(RED_RING, **{field: value}))[4:8]
    out = scores.score(video[None], [RED_RING])

    for name in SCENE_SCORES:
        assert out[name].tolist() == [[True, name not in columns, True]], name
    assert not out['story'][0]
    assert not out['consistency'][0]
    assert not out['leak'].any()


def test_other_identity_in_all_scenes_is_consistent():
    other = dataclasses.replace(RED_RING, shape='tower', color='cyan', background='white')
    out = scores.score(video_of(other)[None], [RED_RING])

    assert out['consistency'][0]
    assert out['action'].all()
    assert not out['story'][0]
    for name in ('color', 'shape', 'background'):
        assert not out[name].any(), name


def test_nothing_shown_scores_nothing():
    empty = np.full((1, 12, 16, 16, 3), 0.5, np.float32)
    out = scores.score(empty, [RED_RING])

    assert out['background'].all()
    assert (out['residual'] == 1).all()
    for name in ('action', 'color', 'shape', 'leak', 'story', 'consistency'):
        assert not out[name].any(), name


def test_scenes_select_columns_but_consistency_sees_all():
    video = video_of(RED_RING)
    video[:4] = video_of(dataclasses.replace(RED_RING, color='blue'))[:4]
    out = scores.score(video[None], [RED_RING], scenes=(2,))

    assert out['color'].shape == (1, 1)
    assert out['story'][0]
    assert not out['consistency'][0]
    assert scores.summarize(out, scenes=(2,))['identity/3'] == 1.0


def test_blur_and_noise_raise_the_residual():
    told = sample(16, (4, 4))
    clean = np.stack([video_of(story) for story in told])
    blurred = (clean + np.roll(clean, 2, axis=3)) / 2
    assert means(clean, told)['residual'] < means(blurred, told)['residual'] / 5


def test_mottled_characters_keep_their_shape():
    told = sample(128, (4, 4, 4))
    clean = np.stack([video_of(story) for story in told])
    ground = clean[:, :, :1, :1]
    mottle = np.random.default_rng(0).uniform(0.3, 1, (*clean.shape[:-1], 1))
    out = means(ground + (clean - ground) * mottle, told)

    assert out['identity'] == out['background'] == 1
    assert out['action'] > 0.97
    assert out['residual'] > 0.3


@pytest.mark.parametrize(
    'videos, told, message',
    [
        (np.zeros((1, 11, 16, 16, 3)), [RED_RING], '11 frames'),
        (np.zeros((2, 12, 16, 16, 3)), [RED_RING], '2 videos'),
    ],
)
def test_score_refuses_what_does_not_match(videos, told, message):
    with pytest.raises(ValueError, match=message):
        scores.score(videos, told)


def test_train_and_test_share_no_combination():
    def combinations(split):
        stories = sample(2000, (4,), split=split)
        return {(s.shape, s.color, s.background, s.actions) for s in stories}

    train = combinations('train')
    test = combinations('test')
    assert not train & test
    assert 0.08 < len(test) / (len(train) + len(test)) < 0.18

    # The same on every machine.
    assert world.is_test('ring', 'red', 'gray', ('stays', 'blinks', 'grows')) is False


def test_every_action_spans_its_scene_inside_the_frame():
    border = np.ones((16, 16), bool)
    border[1:-1, 1:-1] = False

    for story in sample(300, (2, 4, 12)):
        video = rendering.render(story).astype(int)

        # At most the outer half of a soft edge lies on the border.
        ground = video[0, 0, 0]
        assert np.abs(video[:, border] - ground).max() <= 128

        if story.actions[2] == 'moves left':
            first = video[6]
            last = video[17]
            assert np.abs(np.roll(first, -5, axis=1) - last).max() <= 1


@pytest.mark.parametrize(
    'frames, shown', [(2, [1, 0]), (3, [1, 0, 1]), (4, [1, 1, 0, 0]), (8, [1, 1, 0, 0, 1, 1, 0, 0])]
)
def test_blink_is_seen_in_every_scene_length(frames, shown):
    assert rendering.visible_frames('blinks', frames).tolist() == shown
    assert rendering.visible_frames('stays', frames).all()


def test_sampling_is_deterministic_and_survives_json():
    assert sample(20, (4, 8)) == sample(20, (4, 8))
    assert sample(20, (4, 8)) != sample(20, (4, 8), seed=1)
    for story in sample(20, (4, 8)):
        assert world.story_from_json(world.story_to_json(story)) == story


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'shape': 'cube'}, 'cube'),
        ({'actions': ('flies', 'grows', 'stays')}, 'flies'),
        ({'frames': (4, 4)}, 'frame counts'),
        ({'frames': (4, 1, 4)}, 'at least 2'),
    ],
)
def test_story_refuses_what_is_not_in_the_world(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RED_RING, **fields)


def test_captions():
    assert world.captions(RED_RING) == ['red ring on gray moves left', 'it grows', 'it stays']
    assert world.captions(RED_RING, 'every')[1] == 'red ring on gray grows'

    for story in sample(50, (4, 4, 4)):
        told = (story.shape, story.color, story.background, story.actions)
        assert world.parse_captions(world.captions(story)) == told
        assert world.parse_captions(world.captions(story, 'every')) == told

    with pytest.raises(ValueError, match='style'):
        world.captions(RED_RING, 'last')


@pytest.mark.parametrize(
    'texts, message',
    [
        (['red cube on gray stays'], "unknown word 'cube'"),
        (['red ring on gray'], 'follow the grammar'),
        (['ring red on gray stays'], 'follow the grammar'),
        (['it grows'], '0 identities'),
        ([''], 'follow the grammar'),
        (['red ring on gray stays', 'blue ring on gray stays'], '2 identities'),
    ],
)
def test_parse_captions_names_what_is_wrong(texts, message):
    with pytest.raises(ValueError, match=message):
        world.parse_captions(texts)


def test_embed_captions():
    out = world.embed_captions(['red ring on gray moves left', 'it grows', ''])
    assert out.shape == (3, 6, 64)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out[1, 2:], out[2, 2:])  # the pad word

    # The same on every platform.
    np.testing.assert_allclose(out[0, 0, :3], [-0.4029734, -1.5617714, 0.5530654], atol=1e-6)

    # No two words are alike.
    words = world.embed_captions(list(world.VOCABULARY), tokens=1)[:, 0]
    assert abs(words.var() - 1) < 0.05
    similar = words @ words.T / 64 - np.eye(len(words))
    assert np.abs(similar).max() < 0.6


def test_embed_captions_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"'cube'.*tower"):
        world.embed_captions(['red cube on gray stays'])
    with pytest.raises(ValueError, match='more than 6'):
        world.embed_captions(['it ' * 7])


def rendered(count, frames):
    return np.stack([rendering.render(story) for story in sample(count, frames)])


def test_codec_is_exact_with_all_components():
    codec = codec_lib.fit_codec(rendered(64, (4, 4)), components=96, patch_frames=2)
    # Any leading axes, any size.
    noise = np.random.default_rng(0).random((2, 3, 4, 8, 12, 3), np.float32)
    decoded = codec_lib.decode(codec, codec_lib.encode(codec, noise))
    np.testing.assert_allclose(decoded, noise, atol=1e-3)


def test_codec_is_deterministic_and_survives_its_file(tmp_path):
    codec = codec_lib.default_codec()
    again = codec_lib.default_codec.__wrapped__()
    np.testing.assert_array_equal(codec.basis, again.basis)

    codec_lib.save_codec(tmp_path / 'codec.safetensors', codec)
    loaded = codec_lib.load_codec(tmp_path / 'codec.safetensors')
    assert (loaded.patch_px, loaded.patch_frames) == (codec.patch_px, codec.patch_frames)
    videos = rendered(64, (4, 4))
    np.testing.assert_array_equal(codec_lib.encode(loaded, videos), codec_lib.encode(codec, videos))


def test_codec_of_first_frames_survives_its_file(tmp_path):
    codec = codec_lib.default_codec(patch_px=8, components=40, first_frame=True)
    codec_lib.save_codec(tmp_path / 'codec.safetensors', codec)
    loaded = codec_lib.load_codec(tmp_path / 'codec.safetensors')
    videos = rendered(8, (9, 5))
    latents = codec_lib.encode(loaded, videos, (9, 5))
    np.testing.assert_array_equal(latents, codec_lib.encode(codec, videos, (9, 5)))
    np.testing.assert_array_equal(
        codec_lib.decode(loaded, latents, (3, 2)), codec_lib.decode(codec, latents, (3, 2))
    )


def test_codec_scales_by_the_root_of_the_deviation():
    videos = rendered(64, (4, 4))
    codec = codec_lib.fit_codec(videos, components=20)
    latents = codec_lib.encode(codec, videos).reshape(-1, 20)
    np.testing.assert_allclose(latents.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(latents.var(), 1, atol=1e-3)

    # The variance is proportional to the deviation, and the scale to the root of its inverse.
    variance = latents.var(0)
    relative = codec.scale / codec.scale[0]
    np.testing.assert_allclose(variance * relative**2, variance[0], rtol=1e-2)


def test_codec_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match='6 frames'):
        codec_lib.encode(codec_lib.default_codec(), np.zeros((6, 16, 16, 3)))
    with pytest.raises(ValueError, match='200 components'):
        codec_lib.fit_codec(np.zeros((1, 4, 16, 16, 3)), components=200)


def test_load_builds_once_and_gives_the_stories(tmp_path):
    sizes = {'num_train': 24, 'num_test': 5}
    train = builder.load(tmp_path, (4, 8), 'train', **sizes)
    test = builder.load(tmp_path, (4, 8), 'test', **sizes)
    assert len(train) == 24
    assert len(test) == 5
    assert train.fingerprint != test.fingerprint

    for index in (23, 0, 7):  # in any order
        example = train[index]
        assert example['story'] == builder.make_story(train.config, 'train', index)
        np.testing.assert_array_equal(example['video'], rendering.render(example['story']))

    train_starts = {train[i]['story'].starts for i in range(24)}
    test_starts = {test[i]['story'].starts for i in range(5)}
    assert not train_starts & test_starts

    # The second opening writes nothing.
    folder = tmp_path / 'stories' / train.config.name
    written = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    again = builder.load(tmp_path, (4, 8), 'train', **sizes)
    assert again.fingerprint == train.fingerprint
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('*')} == written


def test_fingerprint_is_that_of_the_first_release(tmp_path):
    """Other constants, draws or rendering would be another data set under the same version."""
    source = builder.load(tmp_path, (4, 8), 'train', num_train=12, num_test=5)
    assert source.fingerprint.startswith('934197f025eade90')


def test_load_refuses_another_split(tmp_path):
    sizes = {'num_train': 24, 'num_test': 5}
    with pytest.raises(ValueError, match="split 'valid' is unknown"):
        builder.load(tmp_path, (4, 8), 'valid', **sizes)


def test_load_refuses_stories_of_another_world(tmp_path, monkeypatch):
    builder.load(tmp_path, (4, 4), num_train=4, num_test=1)
    monkeypatch.setattr(world, 'TRAVEL', 4.0)
    monkeypatch.setitem(world.EXTENTS, 'ball', (2.0, 2.0))
    monkeypatch.setitem(world.EXTENTS, 'ring', (3.0, 3.0))
    monkeypatch.setitem(world.EXTENTS, 'bar', (1.0, 3.0))
    monkeypatch.setitem(world.EXTENTS, 'tower', (3.0, 1.0))
    with pytest.raises(ValueError, match=r'stories.2x4_16px_4_1.*delete'):
        builder.load(tmp_path, (4, 4), num_train=4, num_test=1)


RENDERING = """
import sys
from absl import logging
from mask2dit_jax.stories import builder
logging.set_verbosity(logging.INFO)
source = builder.load(sys.argv[1], (4,), num_train=300, num_test=2)
print(len(source), source.fingerprint)
"""


def test_of_two_that_need_the_same_stories_one_renders_and_the_other_waits(tmp_path):
    def start():
        return subprocess.Popen(
            [sys.executable, '-c', RENDERING, str(tmp_path)],
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    # One that is killed at it is followed by the others.
    killed = start()
    folder = tmp_path / 'stories/1x4_16px_300_2'
    while not list(folder.glob('*incomplete*')):
        assert killed.poll() is None
        time.sleep(0.005)
    killed.kill()
    killed.communicate()

    both = [start(), start()]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0].splitlines()[-1] == outputs[1][0].splitlines()[-1]
    assert sum('Rendering 300 + 2 stories' in errors for _, errors in outputs) == 1
    assert [path.name for path in folder.iterdir()] == ['1.0.0']
