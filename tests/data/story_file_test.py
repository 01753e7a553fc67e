"""Story files in the forms that people have them in."""

import json

import pytest
from absl import logging

from mask2dit_jax.data import story_file


def written(tmp_path, content, name='story.txt'):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def said(caplog):
    """Returns the lines that were logged."""
    logging.set_verbosity(logging.INFO)
    caplog.set_level('INFO', logger='absl')
    return lambda: caplog.messages


@pytest.mark.parametrize(
    'text',
    [
        'a ball rolls [5s] | it stops | it grows [2.5s]',
        'a ball rolls[5s]|it stops|it grows[2.5s]\n',
        '"a ball rolls [5s] | it stops | it grows [2.5s]"\n',
        '"a ball rolls"[5s] | "it stops" | "it grows"[2.5s]',
        'a ball\nrolls [5s] |\nit stops\n| it grows [ 2.5 s ]\n',
        'a ball rolls [5s] | it stops | it grows [2.5s#]',
    ],
)
def test_text_says_captions_and_seconds(tmp_path, text):
    path = written(tmp_path, text)
    assert story_file.read_record(path)['scenes'] == [
        {'caption': 'a ball rolls', 'seconds': 5},
        {'caption': 'it stops'},
        {'caption': 'it grows', 'seconds': 2.5},
    ]
    assert story_file.read_story(path) == (['a ball rolls', 'it stops', 'it grows'], [None] * 3)


def test_text_may_have_brackets_and_one_scene(tmp_path):
    path = written(tmp_path, '[character1] says "hi" to [character2] [3s]')
    (scene,) = story_file.read_record(path)['scenes']
    assert scene == {'caption': '[character1] says "hi" to [character2]', 'seconds': 3}


@pytest.mark.parametrize(
    'text, message',
    [
        ('', 'scene 1 has no caption'),
        ('a [5s] | | b', 'scene 2 has no caption'),
        ('a [5s] | b |', 'scene 3 has no caption'),
        ('a | [5s]', 'scene 2 has no caption'),
        ('a | b [0s]', r'scene 2 has ".*\[0s\]": give seconds above 0'),
        ('a [-5s] | b', r'scene 1 has "\[-5s\]": give seconds above 0'),
        ('a [5] | b', r'scene 1 has "\[5\]"'),
        ('a [5 min] | b', r'scene 1 has "\[5 min\]"'),
        ('a [5s | b', r'scene 1 has "\[5s"'),
        ('a [5s] b [6s] | c', r'scene 1 has "\[5s\]": .* at the end of a caption'),
        ('a [5s] | b [5s] ; text under a', r'scene 2 has "\[5s\]"'),
        ('a\nb', r'several lines and no \| between scenes'),
    ],
)
def test_text_that_is_malformed_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=f'story.txt.*{message}') as error:
        story_file.read_record(written(tmp_path, text))
    assert 'caption [5s] | caption [10s]' in str(error.value)


ST_BENCH = {
    'story_overview': 'A knight finds a fox.',
    'scenes': [
        {'scene_num': 1, 'video_prompts': ['A knight.', 'She rides.'], 'cut': [True, False]},
        {'scene_num': 2, 'video_prompts': ['A fox.'], 'cut': ['True']},
    ],
}


def test_every_prompt_of_st_bench_is_a_scene(tmp_path, said):
    path = written(tmp_path, ST_BENCH, 'story.json')
    record = story_file.read_record(path)
    assert record == {'scenes': [{'caption': c} for c in ('A knight.', 'She rides.', 'A fox.')]}
    assert len(said()) == 1
    assert 'has 3 scene(s); 2 should go on without a cut' in said()[0]
    assert said()[0].endswith('not used: story_overview.')


def test_every_action_of_entity_bench_is_a_scene(tmp_path, said):
    scene = {'action_descriptions': ['A knight.', 'She rides.'], 'entities': ['knight']}
    path = written(tmp_path, {'scenes': [scene]}, 'story.json')
    assert story_file.read_story(path)[0] == ['A knight.', 'She rides.']
    assert said() == [f'{path} has 2 scene(s); not used: entities.']

    # Whole prompts are preferred, and what is left out is said.
    both = written(tmp_path, {'scenes': [scene | {'video_prompts': ['A.']}]}, 'both.json')
    assert story_file.read_story(both)[0] == ['A.']
    assert said()[1] == f'{both} has 1 scene(s); not used: action_descriptions, entities.'


def test_text_with_some_cuts_says_which_scenes_have_none(tmp_path, said):
    story_file.read_record(written(tmp_path, 'a [5s] | b [5s] | c [5s#]'))
    assert 'has 3 scene(s); 2 should go on without a cut' in said()[0]


@pytest.mark.parametrize(
    'scene, message',
    [
        ({'caption': 'a'}, 'has none of video_prompts, action_descriptions'),
        ('a', 'has none of'),
        ({'video_prompts': 'a'}, 'has (a )?"video_prompts" that are not a list of texts'),
        (
            {'action_descriptions': []},
            'has (a )?"action_descriptions" that are not a list of texts',
        ),
        ({'video_prompts': ['a', 3]}, 'has the prompt 3, which is not a text'),
        ({'video_prompts': [' ']}, 'has the prompt " ", which is not a text'),
        ({'video_prompts': ['a', 'b'], 'cut': [True]}, 'has (a )?"cut" that is not a list of 2'),
        ({'video_prompts': ['a'], 'cut': True}, 'has (a )?"cut" that is not a list of 1'),
        ({'video_prompts': ['a'], 'cut': [1]}, 'has the cut 1, which is neither true nor false'),
        ({'video_prompts': ['a'], 'cut': ['no']}, 'has the cut "no"'),
        ({'video_prompts': ['a'], 'cut': [[]]}, r'has the cut \[\]'),
    ],
)
def test_prompts_that_are_malformed_are_refused(tmp_path, scene, message):
    path = written(tmp_path, {'scenes': [ST_BENCH['scenes'][0], scene]}, 'story.json')
    with pytest.raises(ValueError, match=f'story.json: scene 2 {message}.*write .*"video_prompts"'):
        story_file.read_record(path)


@pytest.mark.parametrize('content', ['a [5s] | b [5s]', '[]', '{"shots": ["a"]}', '{"scenes": 3}'])
def test_other_forms_are_refused_and_all_forms_listed(tmp_path, content):
    with pytest.raises(ValueError, match='is not a story file') as error:
        story_file.read_record(written(tmp_path, content, 'story.json'))
    for form in ('"caption"', '"video_prompts"', 'EntityBench', '.txt', 'caption [5s] | caption'):
        assert form in str(error.value)


@pytest.mark.parametrize(
    'scene, message',
    [
        ({'seconds': 2, 'frames': 8}, 'has frames and seconds'),
        ({'seconds': 0}, 'has 0 seconds, not a number above 0'),
        ({'seconds': '2'}, 'has "2" seconds'),
        ({'seconds': float('inf')}, 'has Infinity seconds'),
        ({'seconds': None}, 'has null seconds'),
    ],
)
def test_seconds_that_are_none_are_refused(tmp_path, scene, message):
    path = written(tmp_path, {'scenes': [{'caption': 'a'} | scene]}, 'story.json')
    with pytest.raises(ValueError, match=f'scene 1 {message}'):
        story_file.read_record(path)


def test_seconds_become_the_nearest_length(said):
    scenes = [{'caption': 'a', 'seconds': s} for s in (5, 2.0, 5)]
    scenes += [{'caption': 'b'}, {'caption': 'c', 'frames': 7}]

    def nearest_frames(frames):
        return round((frames - 1) / 4) * 4 + 1

    assert story_file.lengths(scenes, 8, nearest_frames) == [41, 17, 41, None, 7]
    assert said() == ['Seconds at 8 frames per second: 5 s to 41 frames, 2 s to 17 frames.']
    assert story_file.lengths(scenes[3:], 8, nearest_frames) == [None, 7]
    assert len(said()) == 1
