"""Stories with a cast: what they show and say, what is held out, and recall scored by gap."""

import collections
import dataclasses
import math

import numpy as np
import pytest

from mask2dit_jax.stories import builder, cast, rendering, scores, world

LONG = (4,) * 50

# Ann leaves for two scenes, and comes back to another place.
STORY = world.CastStory(
    (world.Character('ann', 'ring', 'red'), world.Character('bob', 'ball', 'blue')),
    (world.Place('home', 'gray'), world.Place('park', 'white')),
    ('ann', 'bob', 'bob', 'ann'),
    ('home', 'home', 'park', 'park'),
    ('moves left', 'grows', 'stays', 'shrinks'),
    (4, 4, 8, 4),
    ((8.0, 10.5), (8.0, 8.0), (7.0, 9.0), (8.0, 8.0)),
)


def sample(count, frames, split='test', seed=0, **kwargs):
    return [
        cast.sample_cast_story(np.random.default_rng([seed, i]), frames, split=split, **kwargs)
        for i in range(count)
    ]


def video_of(story):
    return rendering.render(story) / np.float32(255)


def scored(video, story=STORY):
    return scores.score(video[None], [story])


# Stories.


def test_a_story_is_a_function_of_its_draws_and_survives_json():
    told = sample(20, (4, 8, 4))
    assert told == sample(20, (4, 8, 4))
    assert told != sample(20, (4, 8, 4), seed=1)
    assert len({world.story_to_json(story) for story in told}) == 20
    for story in told:
        assert world.story_from_json(world.story_to_json(story)) == story


@pytest.mark.parametrize('scenes', [1, 2, 3, 8, 50])
def test_names_and_looks_are_one_to_one(scenes):
    for story in sample(100, (2,) * scenes):
        assert len(story.who) == len(story.where) == len(story.actions) == scenes
        for looks in (story.shapes, story.colors):
            assert len(set(zip(story.who, looks))) == len(set(story.who)) == len(set(looks))
        pairs = set(zip(story.where, story.backgrounds))
        assert len(pairs) == len(set(story.where)) == len(set(story.backgrounds))


def test_a_name_says_nothing_about_the_look():
    looks = collections.Counter()
    for story in sample(2000, (4,) * 4):
        looks.update((character.name, character.shape) for character in story.characters)
    counts = list(looks.values())
    assert len(counts) == len(world.NAMES) * len(world.SHAPES)
    assert max(counts) < 1.4 * min(counts)


@pytest.mark.parametrize('names', ['who', 'where'])
def test_every_story_has_a_return_and_long_ones_have_gaps_of_every_octave(names):
    longest = []
    for story in sample(300, LONG):
        gaps = cast.gaps(getattr(story, names))
        assert max(gaps) >= 2
        longest.append(int(math.log2(max(gaps))))
    counts = collections.Counter(longest)
    assert set(counts) >= {2, 3, 4, 5}
    assert min(counts[octave] for octave in (3, 4, 5)) > 30


def test_cuts_are_of_four_kinds():
    kinds = collections.Counter()
    for story in sample(300, (4,) * 16):
        for i in range(15):
            kinds[story.who[i] == story.who[i + 1], story.where[i] == story.where[i + 1]] += 1
    assert len(kinds) == 4
    assert min(kinds.values()) > 0.2 * kinds.total()


def test_windows_of_four_scenes_often_have_returns():
    returns = [
        max(cast.gaps(names[i : i + 4])) > 1
        for story in sample(200, (4,) * 8, split='train')
        for names in (story.who, story.where)
        for i in range(5)
    ]
    assert 0.3 < np.mean(returns) < 0.7


def test_gaps():
    assert cast.gaps(STORY.who) == (0, 0, 1, 3)
    assert cast.gaps(STORY.where) == (0, 1, 0, 1)


def test_windows_of_four_scenes_or_more_are_of_one_split():
    """All of those in test stories are held out, and none of those in training stories."""
    for frames in (LONG, (4,) * 4, (4,) * 6):
        for split in ('train', 'test'):
            for story in sample(20, frames, split=split):
                for start in range(len(frames) - 3):
                    for stop in (start + 4, len(frames)):
                        assert world.is_held_out(story, start, stop) == (split == 'test')

    # Stories of fewer scenes are of one split as a whole, and an eighth of all windows is held out.
    for split in ('train', 'test'):
        stories = sample(50, (4,) * 3, split=split)
        assert {world.is_held_out(story, 0, 3) for story in stories} == {split == 'test'}
    parts = [world.is_held_out(s, i, i + 3) for s in sample(100, LONG) for i in range(48)]
    assert 0.1 < np.mean(parts) < 0.15

    # One scene among training scenes is enough.
    story = sample(1, (4,) * 8, split='train')[0]
    looks = list(zip(story.shapes, story.colors, story.backgrounds))
    held_out = world.held_out_action(looks[2:6], story.actions[2:5])
    changed = dataclasses.replace(story, actions=(*story.actions[:5], held_out, *story.actions[6:]))
    assert [world.is_held_out(changed, i, i + 4) for i in range(3)] == [False, False, True]
    assert world.is_held_out(changed, 0, 8) and world.is_held_out(changed, 1, 7)
    assert not world.is_held_out(changed, 0, 5)

    # By pictures, whatever the names: other names make no other window of them.
    names = dict(zip(world.NAMES, world.NAMES[1:] + world.NAMES[:1]))
    renamed = dataclasses.replace(
        changed,
        characters=tuple(c._replace(name=names[c.name]) for c in changed.characters),
        who=tuple(map(names.get, changed.who)),
    )
    assert world.is_held_out(renamed, 2, 6)

    # The same on every machine.
    assert world.held_out_action([('ring', 'red', 'gray')] * 2, ('stays',)) == 'grows'


def test_actions_are_all_as_likely_as_each_other():
    for split in ('train', 'test'):
        counts = collections.Counter()
        for story in sample(100, LONG, split=split):
            counts.update(story.actions)
        assert len(counts) == 8
        assert max(counts.values()) < 1.3 * min(counts.values())


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'who': ('ann', 'bob', 'bob', 'eve')}, "'eve' has no look"),
        ({'where': ('home', 'home', 'park')}, 'as many characters and places'),
        ({'characters': (world.Character('ann', 'ring', 'red'),) * 2}, 'repeat'),
        ({'places': (world.Place('moon', 'gray'),)}, "'moon'"),
        ({'frames': (4, 4, 4, 1)}, 'at least 2'),
    ],
)
def test_what_is_no_story_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STORY, **fields)
    with pytest.raises(ValueError, match='split'):
        sample(1, (4,), split='valid')


# Captions.


def test_captions_describe_once_where_something_is_first_shown():
    assert world.captions(STORY) == [
        'ann red ring at home gray moves left',
        'bob blue ball at home grows',
        'bob at park white stays',
        'ann at park shrinks',
    ]
    assert world.captions(STORY, 'every')[3] == 'ann red ring at park white shrinks'
    assert world.captions(STORY, 'never', given=2) == [
        'ann at home moves left',
        'bob at home grows',
        'bob at park white stays',
        'ann at park shrinks',
    ]
    described = [world.described(caption) for caption in world.captions(STORY)]
    assert described == [{'ann', 'home'}, {'bob'}, {'park'}, set()]


def test_captions_parse_back_and_fit_eight_tokens():
    for story in sample(50, (4,) * 12):
        for style in ('first', 'every'):
            texts = world.captions(story, style)
            characters, places, *told = cast.parse_cast_captions(texts)
            assert set(characters) == {c for c in story.characters if c.name in story.who}
            assert set(places) == {p for p in story.places if p.name in story.where}
            assert told == [story.who, story.where, story.actions]
            assert world.embed_captions(texts, tokens=8).shape == (12, 8, 64)


@pytest.mark.parametrize(
    'texts, message',
    [
        (['ann red cube at home gray stays'], "unknown word 'cube'"),
        (['ann red ring at home stays left'], 'follow the grammar'),
        (['red ring on gray stays'], 'follow the grammar'),
        (['ann at home gray stays'], "use 'ann' before"),
        (['ann red ring at home gray stays', 'ann red bar at home stays'], "'ann' in two ways"),
    ],
)
def test_captions_that_tell_no_story_are_named(texts, message):
    with pytest.raises(ValueError, match=message):
        cast.parse_cast_captions(texts)


def test_new_words_change_no_vector_of_the_first_release():
    words = ['red', 'ring', 'on', 'gray', 'moves', 'left', 'it', 'grows']
    assert world.embed_captions([' '.join(words)], tokens=8).sum() == pytest.approx(
        9.383713, abs=1e-3
    )


# Scores.


@pytest.mark.parametrize('frames', [(4,) * 4, (4, 8, 2, 4, 8), LONG])
def test_ground_truth_scores_one(frames):
    told = sample(12 if frames == LONG else 64, frames)
    clean = np.stack([video_of(story) for story in told])
    noisy = clean + np.random.default_rng(1).normal(0, 0.1, clean.shape)

    for videos in (clean, noisy):
        result = scores.score(videos, told)
        means = scores.summarize(result)
        for name, mean in means.items():
            if name.partition('/')[0] != 'residual':
                wrong = name.partition('/')[0] in ('leak', 'cut_deviation')
                assert mean == (0 if wrong else 1), name

        gaps = scores.by_gap(result, told)
        accuracy = {name: value for name, value in gaps.items() if not name.endswith('/count')}
        assert set(accuracy.values()) == {1.0}
        for names, score in (('who', 'identity'), ('where', 'background')):
            counts = collections.Counter(g for s in told for g in cast.gaps(getattr(s, names)))
            counts = {gap or 'new': count for gap, count in counts.items()}
            prefix = f'{score}/gap '
            found = {name: gaps[name] for name in gaps if name.startswith(prefix)}
            assert found == {f'{prefix}{gap}': 1.0 for gap in counts} | {
                f'{prefix}{gap}/count': count for gap, count in counts.items()
            }


def with_scene(scene, **fields):
    """A video of STORY, one scene of which is that of another story."""
    borders = np.cumsum((0, *STORY.frames))
    video = video_of(STORY)
    other = video_of(dataclasses.replace(STORY, **fields))
    video[borders[scene] : borders[scene + 1]] = other[borders[scene] : borders[scene + 1]]
    return video


def looks(*pairs):
    return tuple(
        world.Character(name, *look) for name, look in zip(('ann', 'bob'), pairs, strict=True)
    )


@pytest.mark.parametrize(
    'scene, fields, columns, kept, gap',
    [
        # Ann comes back after three scenes, in another colour.
        (
            3,
            {'characters': looks(('ring', 'green'), ('ball', 'blue'))},
            {'color', 'identity'},
            {'character_kept': 3},
            'identity/gap 3',
        ),
        # Bob is wrong where he is new: he is not kept in the scene after.
        (
            1,
            {'characters': looks(('ring', 'red'), ('bar', 'blue'))},
            {'shape', 'identity'},
            {'character_kept': 2},
            'identity/gap new',
        ),
        (
            1,
            {'places': (world.Place('home', 'black'), world.Place('park', 'white'))},
            {'background'},
            {'place_kept': 1},
            'background/gap 1',
        ),
    ],
)
def test_one_scene_changed_is_wrong_in_its_column_and_its_gap(scene, fields, columns, kept, gap):
    result = scored(with_scene(scene, **fields))
    for name in ('action', 'color', 'shape', 'background', 'identity'):
        expected = [not (i == scene and name in columns) for i in range(4)]
        assert result[name].tolist() == [expected], name
    for name in ('character_kept', 'place_kept'):
        wrong = np.flatnonzero(result[name][0] == 0).tolist()
        assert wrong == ([kept[name]] if name in kept else []), name
    assert not result['consistency'][0]

    gaps = scores.by_gap(result, [STORY])
    count = gaps[f'{gap}/count']
    assert gaps[gap] == pytest.approx(1 - 1 / count)
    for name, value in gaps.items():
        if name.startswith(('identity', 'background')) and not name.endswith('/count'):
            assert (value < 1) == (name == gap), name


def test_what_is_kept_counts_only_where_captions_are_followed():
    """The same wrong look in all scenes is kept; scenes that do another action do not count."""
    other = looks(('ring', 'red'), ('bar', 'blue'))
    video = video_of(dataclasses.replace(STORY, characters=other))
    result = scored(video)
    assert result['consistency'][0] and not result['story'][0]
    assert result['faithful'].tolist() == [[True, False, True, True]]
    gaps = scores.by_gap(result, [STORY])
    assert gaps['identity/gap 1'] == 0
    assert gaps['character_kept/gap 1/count'] == 0 and 'character_kept/gap 1' not in gaps
    assert gaps['character_kept/gap 3'] == gaps['character_kept/gap 3/count'] == 1

    # Given scenes are faithful: bob's, whose look is not that of his caption, is one now.
    only = scores.by_gap(scores.score(video[None], [STORY], scenes=(2,)), [STORY], scenes=(2,))
    assert only['character_kept/gap 1'] == only['character_kept/gap 1/count'] == 1

    # Nothing is not the same as nothing before.
    empty = np.full((sum(STORY.frames), 16, 16, 3), 0.5)
    kept = scored(empty)['character_kept'][0]
    assert kept[2:].tolist() == [0, 0] and np.isnan(kept[:2]).all()

    frozen = np.repeat(video_of(STORY)[:1], sum(STORY.frames), 0)
    result = scored(frozen)
    assert result['consistency'][0]
    gaps = scores.by_gap(result, [STORY])
    assert all(gaps[f'character_kept/gap {gap}/count'] == 0 for gap in (1, 3))


@pytest.mark.parametrize('shift', [-3, -1, 0, 1, 2, 4])
def test_cut_deviation_counts_frames(shift):
    """The scene before lasts longer, or shorter, by that many frames."""
    story = dataclasses.replace(STORY, frames=(8, 8, 8, 8), actions=('stays',) * 4)
    moved = dataclasses.replace(story, frames=(8, 8 + shift, 8 - shift, 8))
    deviations = scores.cut_deviation(video_of(moved), story)
    assert np.isnan(deviations[0])
    assert deviations[1:].tolist() == [0, abs(shift), 0]


def test_cut_deviation_without_a_cut_and_without_a_change():
    story = dataclasses.replace(STORY, who=('ann',) * 4)
    assert np.isnan(scores.cut_deviation(video_of(story), story)).tolist() == [
        True,
        True,
        False,
        True,
    ]
    # The first place stays: no cut is seen before the end of the third scene, of eight frames.
    stays = dataclasses.replace(story, where=('home',) * 4)
    assert scores.cut_deviation(video_of(stays), story)[2] == 8


# The data set.


def test_load_builds_stories_with_a_cast_beside_the_others(tmp_path):
    sizes = {'num_train': 12, 'num_test': 5}
    plain = builder.load(tmp_path, (4, 4, 4, 4), 'train', **sizes)
    source = builder.load(tmp_path, (4, 4, 4, 4), 'train', kind='cast', **sizes)
    assert source.config.name == f'cast_{plain.config.name}' == 'cast_4x4_16px_12_5'
    assert source.fingerprint != plain.fingerprint
    for index in (11, 0):
        example = source[index]
        assert example['story'] == builder.make_story(source.config, 'train', index)
        assert isinstance(example['story'], world.CastStory)
        np.testing.assert_array_equal(example['video'], rendering.render(example['story']))

    with pytest.raises(ValueError, match='kind'):
        builder.load(tmp_path, (4, 4), kind='casts', **sizes)
