"""Which examples a batch holds, and what is drawn for them, by seed and step alone."""

import dataclasses
import tracemalloc
import types

import grain
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import tiny_config

from mask2dit_jax import config as config_lib
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import encoded_clips, latent_codec, records
from mask2dit_jax.stories import cast, world

A, B = (5, 5), (9,)
SHAPE = (2, 2, 8)  # (h, w, C) of the latents


def numbers(first):
    """An endless data set of examples first, first + 1, first + 2, ..."""
    return grain.MapDataset.range(first, first + 1000).map(lambda i: {'number': np.int64(i)})


def batches_of_numbers(layouts, size):
    datasets = {A: numbers(0), B: numbers(1000)}
    return batches_lib.Batches(layouts, datasets, size, np.zeros((1, 1)), '')


@pytest.mark.parametrize('layouts', [(A,), (A, B), (A, A, B), (A, B, A), (B, A, A, B, B)])
def test_every_layout_goes_through_its_examples_one_after_another(layouts):
    """However often a layout is listed: none of its examples is left out or comes twice."""
    batches = batches_of_numbers(layouts, 3)
    seen = {A: [], B: []}
    for step in range(4 * len(layouts)):
        layout, batch = batches(step, range(3))
        assert layout == layouts[step % len(layouts)]
        seen[layout] += batch['number'].tolist()

    for layout, first in ((A, 0), (B, 1000)):
        count = 4 * 3 * layouts.count(layout)
        assert seen[layout] == list(range(first, first + count))


def test_a_host_gets_the_rows_that_it_asks_for():
    batches = batches_of_numbers((A,), 8)
    assert batches(3, [0, 5, 7])[1]['number'].tolist() == [24, 29, 31]
    assert batches(3, [6])[1]['number'].tolist() == [30]


# Windows of rendered stories.


class Codec:
    """Latents that say which frame they are of, text that says which caption."""

    latent_shape = (1, 1, 3)

    def latent_frames(self, frames):
        return frames

    def encode_video(self, videos, frames):
        return videos[:, :, :1, :1]

    def encode_text(self, captions):
        return np.array([[[ord(c) for c in f'{caption:<48}']] for caption in captions])


def source_of(stories):
    """Stories of scenes of two frames; the videos say which story and which frame they are."""

    class Source(list):
        config = types.SimpleNamespace(frames=stories[0].frames)

    source = Source()
    for index, story in enumerate(stories):
        frames = sum(story.frames)
        video = np.zeros((frames, 16, 16, 3), np.float32)
        video[:, 0, 0, 0] = index
        video[:, 0, 0, 1] = np.arange(frames)
        source.append({'video': video, 'story': story})
    return source


@pytest.mark.parametrize('style, named', [('first', {0}), ('every', {0, 1, 2})])
def test_windows_start_anywhere_and_none_is_held_out(style, named):
    rngs = map(np.random.default_rng, range(40))
    stories = [world.sample_story(rng, (2,) * 5, split='train') for rng in rngs]
    source = source_of(stories)
    windows = batches_lib.EncodedStories(source, Codec(), 3, style)
    seen = set()
    for example in (windows[i] for i in range(len(windows))):
        index, first = example['latents'][0, 0, 0, :2].astype(int)
        np.testing.assert_array_equal(example['latents'][:, 0, 0, 1], np.arange(first, first + 6))
        start = first // 2
        seen.add((index, start))
        story = stories[index]
        texts = [''.join(map(chr, text[0].astype(int))).strip() for text in example['text']]
        assert texts == world.captions(story, style)[start : start + 3]
        assert example['least_given'] == (start not in named)

    held_out = set()
    for index, story in enumerate(stories):
        for start in range(3):
            actions = story.actions[start : start + 3]
            if world.is_test(story.shape, story.color, story.background, actions):
                held_out.add((index, start))
    assert held_out
    assert seen == {(i, start) for i in range(40) for start in range(3)} - held_out
    assert len(windows) == len(seen)


def test_longer_stories_for_training_leave_the_held_out_ones_as_they_are(tmp_path):
    def opened(split, frames, story_scenes):
        data = {'num_train': 4, 'num_test': 3, 'story_scenes': story_scenes}
        config = config_lib.Config(data=config_lib.DataConfig(**data))
        return batches_lib.open_stories(config, tmp_path / 'run', frames, split)

    plain, beside_longer = (opened('test', (2, 2), count) for count in (0, 3))
    assert len(plain) == len(beside_longer) == 3
    for i in range(3):
        assert plain[i]['story'] == beside_longer[i]['story']

    longer = opened('train', (2, 2, 2), 3)
    assert len(longer) == 4
    folders = sorted(p.name for p in (tmp_path / 'data/stories').iterdir())
    assert folders == ['2x2_16px_1_3', '2x2_16px_4_3', '3x2_16px_4_1']


@pytest.mark.parametrize('style', ['first', 'every'])
def test_windows_say_how_many_scenes_must_be_given(style):
    rngs = map(np.random.default_rng, range(60))
    stories = [cast.sample_cast_story(rng, (2,) * 8, split='train') for rng in rngs]
    windows = batches_lib.EncodedStories(source_of(stories), Codec(), 4, style)
    found = {}
    for example in (windows[i] for i in range(len(windows))):
        index, first = example['latents'][0, 0, 0, :2].astype(int)
        found[index, first // 2] = int(example['least_given'])
    assert len(found) == len(windows)

    expected = {}
    undescribed_returns = 0
    for index, story in enumerate(stories):
        for start in range(5):
            scenes = range(start, start + 4)
            pairs = [(story.who[i], story.where[i]) for i in scenes]
            # Told before the window, and only there.
            told = {n for i in range(start) for n in (story.who[i], story.where[i])}
            undescribed = told & {n for pair in pairs for n in pair} if style == 'first' else set()
            enough = [
                count
                for count in range(4)
                if undescribed <= {n for pair in pairs[:count] for n in pair}
            ]
            if enough:
                expected[index, start] = enough[0]
            for names in zip(*pairs):
                is_return = names[0] in names[2:] and names[1] != names[0]
                undescribed_returns += names[0] in undescribed and is_return and bool(enough)
    assert found == expected
    if style == 'every':
        assert len(found) == 60 * 5 and not any(found.values())
    else:
        assert set(found.values()) == {0, 1, 2, 3}
        assert len(found) > 0.6 * 60 * 5
        assert undescribed_returns >= 10


def test_windows_of_a_cast_show_nothing_that_is_held_out():
    """Windows of other lengths than the runs that training stories leave out, too."""
    rngs = map(np.random.default_rng, range(60))
    stories = [cast.sample_cast_story(rng, (2,) * 8, split='train') for rng in rngs]
    windows = batches_lib.EncodedStories(source_of(stories), Codec(), 3, 'every')
    found = set()
    for example in (windows[i] for i in range(len(windows))):
        index, first = example['latents'][0, 0, 0, :2].astype(int)
        found.add((index, first // 2))
    held_out = {
        (i, s) for i in range(60) for s in range(6) if world.is_held_out(stories[i], s, s + 3)
    }
    assert len(held_out) > 20
    assert found == {(i, s) for i in range(60) for s in range(6)} - held_out


# Clips.


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    """A data set of standard normal posteriors: ten stories of one to four scenes, of which one in
    four is of 9 frames and the others of 5. Two scenes were left out: one between others, and one
    so that the scene after it follows the first scene of another story."""
    folder = tmp_path_factory.mktemp('clips')
    (folder / 'vae').mkdir()
    (folder / 'vae/config.json').write_text('{}')
    rng = np.random.default_rng(0)
    rows = [
        records.Row(2 * story, scene, int(rng.choice([5, 5, 5, 9])))
        for story in range(10)
        for scene in range(1 + story % 4)
    ]
    rows[6:10] = [records.Row(6, scene, 5) for scene in (0, 2, 3)]
    rows[9:12] = [records.Row(8, 0, 5), records.Row(10, 1, 5)]
    settings = {
        'kind': 'multi_scene',
        'store': 'moments',
        'parts': 3,
        'moments_shape': [2, 2, 16],
        'text_shape': [2, 8],
        'scaling_factor': 1.0,
        'folder': str(folder),
        'vae': latent_codec.network_digest(folder / 'vae'),
    }
    out = folder / 'data'
    records.write_settings(out, settings)
    safetensors.numpy.save_file(
        {'text': np.zeros((2, 8), np.float32)}, out / 'null_text.safetensors'
    )

    def example(number):
        moments = np.zeros((1, 2, 2, 16), ml_dtypes.bfloat16)
        text = np.full((2, 8), number, ml_dtypes.bfloat16)
        content = {'caption': '', 'path': '', 'moments': moments, 'text': text}
        return rows[number]._asdict() | content

    for part, own in enumerate(np.array_split(np.arange(len(rows)), 3)):
        records.write_part(out, settings, part, map(example, own), [])
    records.write_info(out, settings)
    return out


def open_clips(clips, **data):
    config = tiny_config(batch_size=4)
    own = {'encoded': str(clips), 'codec': 'vae'} | data
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **own))
    return encoded_clips.EncodedClips(config, SHAPE, clips)


def seeded(encoded, seed):
    encoded._config = dataclasses.replace(encoded._config, seed=seed)
    return encoded


def scenes_of(example):
    """Numbers of the records of an example, which their text states."""
    return example['text'][:, 0, 0].astype(int).tolist()


def plain_draw(rows, scenes, starts, rng, layout):
    """Records of an example, by the definition."""
    first = int(rng.choice(starts))
    if scenes == 'consecutive':
        return [first + i for i in range(len(layout))]
    picked = [first]
    for frames in layout[1:]:
        others = np.setdiff1d(np.flatnonzero(rows['frames'] == frames), picked)
        picked.append(int(rng.choice(others)))
    return picked


def plain_groups(rows, scenes, layout):
    """Groups of first records, by the definition."""
    if scenes == 'unrelated':
        return [[i] for i in range(len(rows)) if rows[i]['frames'] == layout[0]]
    groups = {}
    for i in range(len(rows) - len(layout) + 1):
        window = rows[i : i + len(layout)]
        expected = [
            (rows[i]['story'], rows[i]['scene'] + j, frames) for j, frames in enumerate(layout)
        ]
        if window.tolist() == expected:
            groups.setdefault(rows[i]['story'], []).append(i)
    return list(groups.values())


@pytest.mark.parametrize('scenes', config_lib.SCENES)
@pytest.mark.parametrize('layout', [(5,), (5, 5), (9, 5), (5, 5, 5)])
def test_draws_are_those_of_the_definition(scenes, layout, clips):
    """To the bit, since a run that is resumed must see the data that it would have seen."""
    encoded = open_clips(clips, scenes=scenes)
    rows = np.array(records.Records(clips).rows)
    groups = plain_groups(rows, scenes, layout)
    found = encoded.candidates(layout)
    assert [np.asarray(group).tolist() for group in found] == groups
    assert found.size == sum(map(len, groups))

    def draw(starts, rng):
        drawn = plain_draw(rows, scenes, starts, rng, layout)
        return drawn, rng.standard_normal((1, *SHAPE), np.float32)  # of the first scene

    dataset = grain.MapDataset.source(groups).seed(encoded._config.seed)
    expected = dataset.shuffle().repeat().random_map(draw)
    endless = encoded.endless(layout)
    for i in range(len(groups) + 3):
        scenes_expected, noise = expected[i]
        assert scenes_of(endless[i]) == scenes_expected
        np.testing.assert_array_equal(endless[i]['latents'][:1], noise)

    fixed = [
        plain_draw(rows, scenes, groups[i % len(groups)], np.random.default_rng([1, i]), layout)
        for i in range(20)
    ]
    assert [list(story) for story in encoded.fixed(layout, 20)] == fixed


def test_every_epoch_has_every_story_in_another_order(clips):
    encoded = open_clips(clips, scenes='unrelated')
    count = len(encoded.candidates((5,)))
    endless = encoded.endless((5,))
    epochs = [[scenes_of(endless[e * count + i])[0] for i in range(count)] for e in range(5)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_the_seed_changes_order_and_noise(clips):
    firsts = [seeded(open_clips(clips), seed).endless((5, 5))[0] for seed in range(20)]
    again = seeded(open_clips(clips), 0).endless((5, 5))[0]
    np.testing.assert_array_equal(firsts[0]['latents'], again['latents'])
    assert len({tuple(scenes_of(example)) for example in firsts}) > 3
    assert len(np.unique([example['latents'].ravel()[0] for example in firsts])) == 20


def test_no_noise_of_the_posterior_comes_twice(clips):
    """Not in the scenes of an example, nor in the examples of a batch, nor in another epoch."""
    endless = open_clips(clips).endless((5, 5))
    latents = np.stack([endless[i]['latents'] for i in range(100)])  # [examples, T, h, w, C]
    noise = latents.reshape(200, -1)  # one row per scene
    assert len(np.unique(noise)) > 0.999 * noise.size
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    between_scenes = np.mean(latents[:, 0] * latents[:, 1])
    between_examples = np.mean(latents[1:] * latents[:-1])
    assert abs(between_scenes) < 0.05 and abs(between_examples) < 0.05


def test_captions_that_name_once_name_in_windows_from_the_first_clip(clips):
    """The first clip of a story may be missing: then none of its windows is named."""
    rows = open_clips(clips)._records.rows
    for named_once in (False, True):
        endless = open_clips(clips, named_once=named_once).endless((5, 5))
        examples = [endless[i] for i in range(60)]
        begins = [rows['scene'][scenes_of(example)[0]] == 0 for example in examples]
        assert set(begins) == {False, True}
        unnamed = [bool(example['least_given']) for example in examples]
        assert unnamed == [named_once and not begun for begun in begins]


def test_the_fingerprint_tells_how_stories_are_made(clips):
    found = [open_clips(clips, scenes=scenes).fingerprint for scenes in config_lib.SCENES]
    assert len(set(found)) == 2
    assert open_clips(clips, scenes=config_lib.SCENES[0]).fingerprint == found[0]


# Scale.


def index_of(stories, scenes):
    """Clips of which only the index is there."""
    rows = np.zeros(3 * stories, records.ROW_DTYPE)
    rows['story'], rows['scene'] = np.divmod(np.arange(len(rows)), 3)
    rows['frames'] = 5
    encoded = encoded_clips.EncodedClips.__new__(encoded_clips.EncodedClips)
    data = config_lib.DataConfig(scenes=scenes)
    encoded._config = config_lib.Config(data=data)
    encoded._records = types.SimpleNamespace(rows=rows)
    return encoded


def peak_bytes(function):
    tracemalloc.start()
    try:
        result = function()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize('scenes', config_lib.SCENES)
def test_listing_stories_takes_some_bytes_for_each(scenes):
    groups, peak = peak_bytes(lambda: index_of(20_000, scenes).candidates((5, 5)))
    assert len(groups) == {'consecutive': 20_000, 'unrelated': 60_000}[scenes]
    assert peak < 60_000 * (24 + 50)  # the rows themselves take 24


@pytest.mark.parametrize('scenes', config_lib.SCENES)
def test_drawing_an_example_does_not_look_at_all_clips(scenes):
    encoded = index_of(100_000, scenes)
    groups = encoded.candidates((5, 5, 5))
    rng = np.random.default_rng(0)
    records_drawn, peak = peak_bytes(lambda: encoded._draw_records(groups[7], rng, (5,) * 24))
    assert len(np.unique(records_drawn)) == 24
    assert peak < 50_000


def test_sizes_and_codec_of_a_run_are_those_of_its_clips(tmp_path):
    records.write_settings(tmp_path, {'height_px': 48, 'width_px': 64, 'parts': 1})
    config = tiny_config()
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, encoded=str(tmp_path), fps=7.0)
    )
    changed = {'codec': 'vae', 'height_px': 48, 'width_px': 64}
    data = dataclasses.replace(config.data, **changed)
    assert encoded_clips.with_data_from(config) == dataclasses.replace(config, data=data)


# Rendered stories.


def test_rendered_stories_are_those_of_the_training_split(tmp_path):
    """Each once per epoch, as the codec encodes it, in an order of the seed."""
    config = tiny_config(batch_size=4)
    data = dataclasses.replace(config.data, layouts=((4, 8),), num_train=12, num_test=8)
    sizes = {'in_channels': 48, 'out_channels': 48, 'max_text_seq_length': 6, 'text_embed_dim': 64}
    model = dataclasses.replace(config.model, **sizes)
    config = dataclasses.replace(config, data=data, model=model)
    codec = latent_codec.StoriesCodec(config, tmp_path)

    def epoch(seed):
        seeded_config = dataclasses.replace(config, seed=seed)
        batches = batches_lib.train_batches(seeded_config, tmp_path / 'run', codec)
        examples = [batches(step, range(4))[1] for step in range(3)]
        return np.concatenate([batch['latents'] for batch in examples]), batches

    latents, batches = epoch(0)
    source = batches_lib.open_stories(config, tmp_path / 'run', (4, 8), 'train')
    videos = np.stack([source[i]['video'] for i in range(12)])
    expected = codec.encode_video(videos, (4, 8))

    def rows(array):
        return sorted(row.tobytes() for row in array)

    assert rows(latents) == rows(expected)
    other, _ = epoch(1)
    assert rows(other) == rows(expected)
    assert (other != latents).any()

    # Beside the workdir, of the numbers that were asked for, and named by the whole data set.
    assert len(source) == 12
    assert len(batches_lib.open_stories(config, tmp_path / 'run', (4, 8), 'test')) == 8
    assert (tmp_path / 'data').is_dir()
    np.testing.assert_array_equal(batches.null_text, codec.encode_text([''])[0])
