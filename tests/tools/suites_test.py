"""Folders and lists, read as each suite's own tool reads them: every clip must meet its caption,
and no other one.

Every caption ends in the gray level of its scene, so that a clip tells which caption it belongs to.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import child_environment

from mask2dit_jax.data import story_file, video
from mask2dit_jax.tools import random_model, suites

FPS = 10


def clip(level, frames):
    return np.full((frames, 16, 16, 3), level, np.uint8)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def meets(path, caption, frames=None):
    """Whether a clip is that of the caption, at the rate it had."""
    pixels, fps = video.read_video(path)
    assert fps == FPS
    assert frames in (None, len(pixels))
    assert np.ptp(pixels.mean((1, 2, 3))) < 4, f'{path} has frames of another scene'
    return abs(pixels.mean() - float(caption.split()[-1])) < 4


# Level and frames of each scene. Story a has two videos, see write_samples.
STORIES = {
    'a': ((20, 3), (60, 5)),
    'b/c': ((100, 4), (140, 2), (180, 3)),
}
SCENES = [scene for name in ('a', 'a', 'b/c') for scene in STORIES[name]]


@pytest.fixture
def samples(tmp_path):
    """Two stories as sample writes them, the first with two videos."""
    return write_samples(tmp_path / 'samples', STORIES)


def write_samples(folder, stories):
    for name, told in stories.items():
        scenes = [{'caption': f'level/ {level}', 'frames': frames} for level, frames in told]
        write_json(folder / name / 'story.json', {'seed': 3, 'scenes': scenes})

        pixels = np.concatenate([clip(*scene) for scene in told])
        for i in range(2 if name == 'a' else 1):
            video.write_mp4(folder / name / f'video_{i}.mp4', pixels, FPS)
            (folder / name / f'video_{i}.gif').touch()
    return folder


def vbench_standard(folder, info, dimensions):
    """Dimension to (video, prompt): one suffix for all names, and five videos by the name of the
    prompt."""
    names = os.listdir(folder)
    suffix = pathlib.Path(names[0]).suffix

    out = {}
    for entry in json.loads(info.read_text()):
        for dimension in set(dimensions) & set(entry['dimension']):
            wanted = [f'{entry["prompt_en"]}-{i}{suffix}' for i in range(5)]
            assert not set(wanted) - set(names)
            out.setdefault(dimension, []).extend((folder / n, entry['prompt_en']) for n in wanted)
    return out


def vbench_custom(folder, prompts):
    """All videos of a folder with their prompts: names are keys relative to it."""
    suffixes = ('.mp4', '.gif', '.jpg', '.png')
    found = [name for name in os.listdir(folder) if pathlib.Path(name).suffix in suffixes]

    given = {}
    for name, prompt in json.loads(prompts.read_text()).items():
        given[os.path.abspath(os.path.join(folder, name))] = prompt

    assert len(given) >= len(found)
    return [(folder / name, given[os.path.abspath(folder / name)]) for name in found]


def vbench_long_custom(folder):
    """Clips by whole video, if VBench-Long takes the given clips as they are instead of cutting its
    own."""
    split = folder / 'split_clip'
    folders = [name for name in os.listdir(split) if re.search(r'-\d+$', name)]
    whole = [name for name in os.listdir(folder) if name.endswith('.mp4')]
    assert len(folders) == len(whole)

    out = {}
    for name in os.listdir(split):
        clips = [split / name / clip for clip in sorted(os.listdir(split / name))]
        out.setdefault(name.split('-Scene')[0], []).extend(clips)
    return out


def evalcrafter(videos, checkout):
    """All that lies in the folder with prompts by name, and attributes by its first four
    characters."""
    metadata = json.loads((checkout / 'metadata.json').read_text())
    out = []
    for name in os.listdir(videos):
        prompt = checkout / 'prompts' / f'{os.path.splitext(name)[0]}.txt'
        attributes = metadata[name[:4]]['attributes']
        out.append((videos / name, prompt.read_text().strip(), attributes))
    return out


def compbench(folder, metadata):
    """Sorted names that begin with a digit; the first four are the place in the list, from 1."""
    prompts = json.loads(metadata.read_text())
    assert all(name[0].isdigit() for name in os.listdir(folder))
    return [(folder / name, prompts[int(name[0:4]) - 1]) for name in sorted(os.listdir(folder))]


def check_commands(text, out):
    """The last part is shell, and the files that it reads in `out` are there."""
    commands = text.split('\n\n', 1)[1]
    assert subprocess.run(['bash', '-n', '-c', commands], check=False).returncode == 0
    assert '{' not in commands

    read = re.findall(
        r'--(?:videos_path|prompt_file|full_json_dir|dir_videos|read-prompt-file) (/[^;)\s]+)',
        commands,
    )
    assert all(pathlib.Path(path).exists() for path in read)
    return commands


def test_scenes_for_vbench(samples, tmp_path):
    out = tmp_path / 'out'
    commands = check_commands(suites.lay_out('vbench', samples, out), out)
    assert f'--videos_path {out}/videos' in commands
    assert '--mode=custom_input' in commands

    pairs = vbench_custom(out / 'videos', out / 'prompts.json')
    assert len(pairs) == len(SCENES)
    assert all(meets(*pair) for pair in pairs)

    files = [row['file'] for row in json.loads((out / 'clips.json').read_text())]
    lengths = [len(video.read_video(out / file)[0]) for file in files]
    assert len(set(files)) == len(files)
    assert lengths == [count for _, count in SCENES]


def test_whole_videos_and_scenes_for_vbench_long(samples, tmp_path):
    """Clips are scenes in the order of the story, and whole videos are copies."""
    out = tmp_path / 'out'
    commands = check_commands(suites.lay_out('vbench_long', samples, out), out)
    assert '--mode=long_custom_input' in commands

    groups = vbench_long_custom(out / 'videos')
    rows = {row['file']: row for row in json.loads((out / 'clips.json').read_text())}
    assert len(groups) == 3
    for name, clips in groups.items():
        row = rows[f'videos/{name}.mp4']
        assert (out / row['file']).read_bytes() == pathlib.Path(row['video']).read_bytes()

        told = STORIES['b/c' if 'b/c' in row['video'] else 'a']
        assert row['caption'] == ' '.join(f'level/ {level}' for level, _ in told)
        for path, (level, count) in zip(clips, told, strict=True):
            assert meets(path, str(level), count)


def test_scenes_for_evalcrafter(samples, tmp_path):
    out = tmp_path / 'out'
    commands = check_commands(suites.lay_out('evalcrafter', samples, out), out)
    found = evalcrafter(out / 'videos', out)
    assert len(found) == len(SCENES)
    for path, text, attributes in found:
        assert meets(path, text)
        assert not attributes

    # The checkout's own list, and the files that it keeps by number, must not meet these videos.
    checkout = tmp_path / 'EvalCrafter'
    for name in 'prompts/0000.txt', 'prompts/0699.txt', 'SDXL_Imgs/0000_0.png', 'metadata.json':
        write_json(checkout / name, {})
    for _ in range(2):
        subprocess.run(['bash', '-euc', commands.split('\n(')[0]], cwd=checkout, check=True)
        assert len(evalcrafter(out / 'videos', checkout)) == len(SCENES)
        assert len(os.listdir(checkout / 'prompts')) == len(SCENES)
    assert not (checkout / 'SDXL_Imgs').exists()
    assert len(list(checkout.rglob('0699.txt'))) == 1

    # These divide by the number of videos that have the attribute.
    for metric in (
        'action_score',
        'color_score',
        'count_score',
        'motion_ac_score',
        'ocr_score',
        'eval_from_metrics',
    ):
        assert metric not in commands


def test_scenes_for_compbench(tmp_path):
    """Clips count from 1, and have 16 frames or more: its detectors take 16 of each video."""
    stories = {'a': ((20, 16), (60, 17)), 'b': ((100, 16), (140, 16))}
    samples = write_samples(tmp_path / 'samples', stories)
    out = tmp_path / 'out'
    check_commands(suites.lay_out('compbench', samples, out), out)

    pairs = compbench(out / 'video/object_interactions', out / 'meta_data/object_interactions.json')
    assert len(pairs) == 6
    assert all(meets(path, entry['prompt']) for path, entry in pairs)

    stories['a'] = (20, 16), (60, 15)
    samples = write_samples(tmp_path / 'short', stories)
    message = r'a/video_0\.mp4 has 15 frames in a clip, compbench needs 16'
    with pytest.raises(ValueError, match=message):
        suites.lay_out('compbench', samples, tmp_path / 'again')


def write_source(folder, suite):
    """A small list of prompts in a suite's form, two of one text where the suite allows it."""
    if suite.startswith('vbench'):
        entries = [
            {'prompt_en': 'a still 20', 'dimension': ['color', 'scene']},
            {
                'prompt_en': 'another, with dots. 60',
                'dimension': ['scene'],
                'auxiliary_info': {'scene': {}},
            },
            {'prompt_en': 'a still 20', 'dimension': ['human_action']},
        ]
        return write_json(folder / 'VBench_full_info.json', entries)

    if suite == 'evalcrafter':
        entries = {}
        for i, level in enumerate((20, 60, 20)):
            entries[f'{i:04d}'] = {'prompt': f'a / thing {level}', 'attributes': {'count': '2'}}
        return write_json(folder / 'metadata.json', entries)

    for n, name in enumerate(suites.COMPBENCH_COMMANDS):
        entries = [{'prompt': f'{name} {level + n}', 'extra': n} for level in (20, 120)]
        write_json(folder / 'meta_data' / f'{name}.json', entries)
    return folder / 'meta_data'


def sample(stories, samples, suite, frames=17):
    """Writes for all stories below a folder what sample.sh makes of them."""
    for path in stories.rglob('story.json'):
        (caption,), _ = story_file.read_story(path)
        level = int(caption.split()[-1])
        folder = samples / path.parent.relative_to(stories)
        for i in range(suites.SUITES[suite].videos):
            video.write_mp4(folder / f'video_{i}.mp4', clip(level + i / 2, frames), FPS)
        scenes = [{'caption': caption, 'frames': frames}]
        write_json(folder / 'story.json', {'scenes': scenes, 'seed': 1})
    return samples


def round_trip(tmp_path, suite, **kwargs):
    """Prompts out, videos in: the folder, the source and the commands."""
    source = write_source(tmp_path / 'checkout', suite)
    suites.write_prompts(suite, source, tmp_path / 'stories', frames=17, **kwargs)
    samples = sample(tmp_path / 'stories', tmp_path / 'samples', suite)

    out = tmp_path / 'out'
    said = suites.lay_out(suite, samples, out, source=source, **kwargs)
    return out, source, check_commands(said, out)


@pytest.mark.parametrize('suite', ['vbench', 'vbench_long'])
def test_own_prompts_of_vbench(tmp_path, suite):
    out, source, commands = round_trip(tmp_path, suite)
    found = vbench_standard(out / 'videos', source, ('color', 'scene', 'human_action'))
    assert {k: len(v) for k, v in found.items()} == {'color': 5, 'scene': 10, 'human_action': 5}
    assert all(meets(*pair) for pairs in found.values() for pair in pairs)
    assert len(os.listdir(tmp_path / 'samples')) == 2  # a prompt of two entries is sampled once
    assert len(os.listdir(out / 'videos')) == 10
    assert 'for d in color scene human_action; do' in commands


def test_one_dimension_of_vbench(tmp_path):
    out, source, commands = round_trip(tmp_path, 'vbench', categories=['human_action'])
    assert 'for d in human_action; do' in commands
    assert len(vbench_standard(out / 'videos', source, ['human_action'])['human_action']) == 5
    assert len(os.listdir(out / 'videos')) == 5


def test_own_prompts_of_evalcrafter(tmp_path):
    """Two prompts of one text are two videos; names are the keys of its prompts."""
    out, source, commands = round_trip(tmp_path, 'evalcrafter')
    assert commands.startswith('bash start.sh $PWD ')

    for key, entry in json.loads(source.read_text()).items():
        (source.parent / 'prompts').mkdir(exist_ok=True)
        (source.parent / f'prompts/{key}.txt').write_text(entry['prompt'])
    found = evalcrafter(out / 'videos', source.parent)
    assert len(found) == 3
    for path, text, attributes in found:
        assert meets(path, text)
        assert attributes


def test_own_prompts_of_compbench(tmp_path):
    out, source, commands = round_trip(tmp_path, 'compbench')
    for name in suites.COMPBENCH_COMMANDS:
        pairs = compbench(out / 'video' / name, source / f'{name}.json')
        assert len(pairs) == 2
        assert all(meets(path, entry['prompt']) for path, entry in pairs)
        assert f'--video-path {out}/video/{name}' in commands
    assert f'--total_frame 17 --fps {FPS} ' in commands
    # Segmentation writes resampled videos to that folder, beside theirs; tracking reads them.
    assert f'--video-path {out}/video/video_standard/motion_binding)' in commands


def test_stories_are_those_that_sample_takes(tmp_path):
    """A story has one scene with the prompt, and frames only if asked for."""
    source = write_source(tmp_path, 'evalcrafter')
    suites.write_prompts('evalcrafter', source, tmp_path / 'plain')
    suites.write_prompts('evalcrafter', source, tmp_path / 'asked', frames=49)
    assert story_file.read_story(tmp_path / 'plain/0001/story.json') == (['a / thing 60'], [None])
    assert story_file.read_story(tmp_path / 'asked/0001/story.json') == (['a / thing 60'], [49])


def test_sample_script_goes_on_where_it_stopped(tmp_path):
    """Every story is sampled once, with its own seed and folder and the caller's flags; a failure
    stops the script."""
    source = write_source(tmp_path, 'compbench')
    categories = ['action_binding', 'object_interactions']
    suites.write_prompts('compbench', source, tmp_path / 'stories', categories=categories)
    write_json(tmp_path / 'samples/action_binding/0002/video_0.mp4', {})
    write_json(tmp_path / 'samples/action_binding/0001/story.json', {})  # killed before its video

    # A python that only notes its arguments, and fails if there is a file named broken.
    (tmp_path / 'bin').mkdir()
    fake = tmp_path / 'bin/python'
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$*" >>calls\n[ ! -f broken ]\n')
    fake.chmod(0o755)

    def run():
        done = subprocess.run(
            ['sh', 'stories/sample.sh', 'samples', '--workdir=my run'],
            cwd=tmp_path,
            env=os.environ | {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}'},
            check=False,
        )
        return done.returncode, (tmp_path / 'calls').read_text().splitlines()

    code, calls = run()
    assert code == 0
    assert len(calls) == 3
    assert calls[0] == (
        f'-m mask2dit_jax.sample --story={tmp_path}/stories/action_binding/0001/story.json '
        '--num_videos=1 --seed=1 --out=samples/action_binding/0001 --workdir=my run'
    )
    assert [re.search(r'seed=(\d)', call).group(1) for call in calls] == ['1', '3', '4']

    (tmp_path / 'broken').touch()
    (tmp_path / 'calls').unlink()
    code, calls = run()
    assert code != 0
    assert len(calls) == 1


@pytest.mark.slow
def test_end_to_end_on_a_random_model(tmp_path):
    """From prompts through samples to the folder, by the commands."""
    entries = [{'prompt_en': 'a red ring', 'dimension': ['color']}]
    source = write_json(tmp_path / 'VBench_full_info.json', entries)
    random_model.write(tmp_path / 'model')

    commands = f"""
      python() {{ {sys.executable} "$@"; }}; export -f python
      suites="python -m mask2dit_jax.tools.suites"
      $suites prompts --suite=vbench --source={source} --out=stories
      bash stories/sample.sh samples --checkpoint=model --height=64 --width=64 --steps=1 \\
        --dtype=float32
      $suites layout --suite=vbench --source={source} --videos=samples --out=out"""
    done = subprocess.run(
        ['bash', '-euc', commands], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(vbench_standard(tmp_path / 'out/videos', source, ['color'])['color']) == 5
    assert 'vbench evaluate' in done.stdout


@pytest.mark.parametrize(
    'suite, content, message',
    [
        (
            'vbench',
            [{'prompt_en': 'a/b', 'dimension': ['color']}],
            r"info\.json: 'a/b' has a / or is .* take it out",
        ),
        (
            'vbench',
            [{'prompt_en': 'ä' * 125, 'dimension': ['color']}],
            'too long for the name of a file',
        ),
        ('vbench', [{'prompt_en': ' ', 'dimension': ['color']}], 'holds Prompt'),
        (
            'vbench',
            [{'prompt': 'a'}],
            r"holds no prompts of vbench \(KeyError\('prompt_en'\)\): give VBench_full_info",
        ),
        ('vbench', [], 'holds no prompts: give VBench_full_info'),
        ('evalcrafter', {'../1': {'prompt': 'a'}}, r"holds Prompt\(key='\.\./1'.* four digits"),
        ('evalcrafter', ['a'], 'holds no prompts of evalcrafter'),
    ],
)
def test_prompts_that_do_not_fit_are_named(tmp_path, suite, content, message):
    source = write_json(tmp_path / 'info.json', content)
    with pytest.raises(ValueError, match=message) as error:
        suites.write_prompts(suite, source, tmp_path / 'out')
    assert '\n' not in str(error.value) and not (tmp_path / 'out').exists()


def test_longest_prompt_fits(tmp_path):
    """249 bytes and -0.mp4 are 255."""
    source = write_json(tmp_path / 'info.json', [{'prompt_en': 'a' * 249, 'dimension': ['color']}])
    assert suites.read_prompts('vbench', source)


def test_missing_categories_are_named(tmp_path):
    source = write_source(tmp_path, 'compbench')
    with pytest.raises(ValueError, match=r'no category colour, but consistent_attribute_binding, '):
        suites.read_prompts('compbench', source, ['action_binding', 'colour'])
    (source / 'motion_binding.json').unlink()
    with pytest.raises(
        FileNotFoundError, match=r'motion_binding\.json cannot be read .*the folder meta_data'
    ):
        suites.read_prompts('compbench', source)
    with pytest.raises(ValueError, match='no category a, but none at all'):
        suites.read_prompts('evalcrafter', write_source(tmp_path, 'evalcrafter'), ['a'])


@pytest.mark.parametrize(
    'damage, message',
    [
        (
            lambda d: (d / 'samples/0001/story.json').unlink(),
            r'1 of 3 prompts have no samples, such as .*0001/story\.json',
        ),
        (
            lambda d: (d / 'samples/0001/video_0.mp4').rename(d / 'samples/0000/video_1.mp4'),
            '0000 has 2 mp4 .* takes 1',
        ),
        (
            lambda d: (d / 'samples/0001/video_0.mp4').unlink(),
            '0001 has 0 mp4 files, evalcrafter takes 1 .*--num_videos=1',
        ),
        (
            lambda d: (d / 'samples/0001/video_0.mp4').write_bytes(b'no'),
            r'0001/video_0\.mp4 cannot be decoded',
        ),
        (
            lambda d: write_json(
                d / 'samples/0001/story.json', {'scenes': [{'caption': 'b', 'frames': 17}]}
            ),
            r"0001/story\.json has captions \['b'\], --source 'a / thing 60'",
        ),
        (
            lambda d: video.write_mp4(d / 'samples/0001/video_0.mp4', clip(60, 16), FPS),
            'have different frames and',
        ),
        (
            lambda d: write_json(d / 'out/videos/left.json', {}),
            'out is not empty: choose a new folder',
        ),
    ],
)
def test_samples_that_do_not_fit_are_named(tmp_path, damage, message):
    source = write_source(tmp_path, 'evalcrafter')
    suites.write_prompts('evalcrafter', source, tmp_path / 'stories')
    sample(tmp_path / 'stories', tmp_path / 'samples', 'evalcrafter')
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        suites.lay_out('evalcrafter', tmp_path / 'samples', tmp_path / 'out', source=source)
    assert '\n' not in str(error.value) and not list(tmp_path.glob('out/videos/*.mp4'))


@pytest.mark.parametrize(
    'damage, message',
    [
        (
            lambda d: write_json(d / 'a/story.json', {'scenes': [{'caption': 'a'}] * 2}),
            '"frames" in each',
        ),
        (
            lambda d: write_json(
                d / 'a/story.json', {'scenes': [{'caption': 'a', 'frames': 5}] * 2}
            ),
            'its story 10',
        ),
        (lambda d: (d / 'b/c/video_0.mp4').unlink(), 'b/c holds no mp4 file'),
        (
            lambda d: write_json(
                d / 'a/story.json', {'scenes': [{'caption': 'a', 'frames': n} for n in (1, 7)]}
            ),
            '1 frames in a clip, vbench needs 2',
        ),
        (
            lambda d: write_json(
                d / 'b/c/story.json', {'scenes': [{'caption': 'a', 'frames': 1}] * 9998}
            ),
            '10002 scenes',
        ),
    ],
)
def test_stories_that_do_not_fit_are_named(samples, tmp_path, damage, message):
    damage(samples)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        suites.lay_out('vbench', samples, tmp_path / 'out')


def test_paths_that_tools_do_not_quote_are_refused(samples, tmp_path):
    with pytest.raises(ValueError, match='my out has blanks'):
        suites.lay_out('vbench', samples, tmp_path / 'my out')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['prompts'], 'prompts needs --source'),
        (['layout', '--videos=missing'], 'missing holds no story.json'),
        (
            ['layout', '--videos=b', '--category=c', '--frames=9'],
            'layout has no use here for --category, --frames',
        ),
    ],
)
def test_wrong_commands_say_so(tmp_path, arguments, message):
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'mask2dit_jax.tools.suites',
            '--suite=vbench',
            '--out=out',
            *arguments,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and message in done.stderr + done.stdout


# Calls a function of suites with keyword arguments, and dies before a change to the files.
KILLED = """
import json, sys

import killing
from mask2dit_jax.tools import suites

function, args, folder, number = json.loads(sys.argv[1])
killing.before_change(folder, number)
getattr(suites, function)(**args)
"""


@pytest.mark.parametrize('number', [2, 5])
@pytest.mark.parametrize('command', ['write_prompts', 'lay_out'])
def test_a_folder_appears_whole_and_a_killed_command_goes_again(tmp_path, command, number):
    source = write_source(tmp_path, 'evalcrafter')
    args = {'suite': 'evalcrafter', 'source': str(source), 'out': f'{tmp_path}/out'}
    if command == 'lay_out':
        suites.write_prompts('evalcrafter', source, tmp_path / 'stories')
        sample(tmp_path / 'stories', tmp_path / 'samples', 'evalcrafter')
        args['videos'] = f'{tmp_path}/samples'

    point = json.dumps([command, args, f'{tmp_path}/out', number])
    done = subprocess.run([sys.executable, '-c', KILLED, point], env=child_environment())
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / 'out').exists()

    getattr(suites, command)(**args)
    getattr(suites, command)(**args | {'out': f'{tmp_path}/undisturbed'})
    found, expected = (
        sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob('*'))
        for name in ('out', 'undisturbed')
    )
    assert found == expected
    assert not list(tmp_path.glob('*.unfinished'))
