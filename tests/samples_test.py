"""What `sample` writes: a folder belongs to one story.json, which makes it again to the byte; no
kill, Ctrl-C or full disk leaves half of anything."""

import dataclasses
import itertools
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import app
from absl.testing import flagsaver
from conftest import STORY_MODEL, child_environment

import mask2dit_jax
from mask2dit_jax import checkpoint, generation, sample, storage
from mask2dit_jax import config as config_lib
from mask2dit_jax.data import latent_file, samples
from mask2dit_jax.data import video as video_lib
from mask2dit_jax.evaluation import videos as videos_lib
from mask2dit_jax.pretrained import names
from mask2dit_jax.training import train_step

CONFIG = config_lib.Config(
    model=STORY_MODEL,
    data=config_lib.DataConfig(codec_components=8, layouts=((4, 4),)),
    sample=config_lib.SampleConfig(steps=2),
)
PROMPT = ['red ring on gray moves left', 'it grows']
# In the order of writing.
FILES = [
    'story.json',
    'video_0/latents.safetensors',
    'video_0/scene_0.mp4',
    'video_0/scene_1.mp4',
    'sheet_0.png',
    'video_0.gif',
    'video_0.mp4',
]


def add_checkpoint(workdir, step, seed=0):
    """Random parameters, as a run of so many steps would leave them."""
    rng = np.random.default_rng((seed, step))
    params = jax.tree.map(
        lambda p: rng.normal(0, 0.5, p.shape).astype(np.float32),
        names.abstract_params(CONFIG.model),
    )
    state = train_step.TrainState(np.int32(step), params, params, {'unused': np.ones(1)})
    checkpoints = checkpoint.manager(workdir, 10, 0, step - 1)
    checkpoint.save(checkpoints, step, state, {})
    checkpoint.finish(checkpoints)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The workdir of a run with one checkpoint."""
    workdir = tmp_path_factory.mktemp('runs') / 'run'
    workdir.mkdir()
    config_lib.save(CONFIG, workdir / 'config.json')
    add_checkpoint(workdir, 3)
    mask2dit_jax.load(workdir)  # fits the codec
    return workdir


@pytest.fixture
def workdir(run, tmp_path):
    """One whose checkpoints a test may change."""
    return shutil.copytree(run, tmp_path / 'run')


def run_sample(out, **chosen):
    """Runs the command with these flags; PROMPT is the story if they have none."""
    if 'story' not in chosen:
        chosen = {'prompt': PROMPT} | chosen
    with flagsaver.flagsaver(out=str(out), **chosen):
        sample.main(['sample'])
    return out


def content(folder):
    """Every file's bytes by its name."""
    paths = [path for path in sorted(pathlib.Path(folder).rglob('*')) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def differing(one, other):
    one, other = content(one), content(other)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def given_clip(path, level=0.5):
    clip = np.full((8, 16, 16, 3), level, np.float32)
    clip[:, 4:12, 4:12] = (1, 0, 0)
    video_lib.write_mp4(path, clip, 4, scale=16)
    return str(path)


def warnings(caplog):
    found = [r.getMessage() for r in caplog.records if 'byte for byte' in r.getMessage()]
    caplog.clear()
    return found


def test_a_global_prompt_stands_before_every_caption(workdir, tmp_path):
    """The video is that of the whole captions; the sheet and the record have the parts."""
    settings = {'workdir': str(workdir), 'steps': 2}
    whole = run_sample(
        tmp_path / 'whole', prompt=['red ring on gray grows', 'red ring on gray blinks'], **settings
    )
    joined = run_sample(
        tmp_path / 'joined',
        prompt=['grows', 'blinks'],
        global_prompt='red ring on gray',
        **settings,
    )
    assert set(differing(whole, joined)) == {'story.json', 'sheet_0.png'}
    told = json.loads((joined / 'story.json').read_text())
    assert told['global_prompt'] == 'red ring on gray'
    assert [scene['caption'] for scene in told['scenes']] == ['grows', 'blinks']

    again = run_sample(tmp_path / 'again', story=str(joined / 'story.json'))
    assert differing(joined, again) == []


def test_a_story_makes_its_folder_again(workdir, tmp_path, monkeypatch, caplog):
    """Seed, sampler, steps, guidance, negative prompt, given clip, its cut, number of videos, and
    the checkpoint, after newer ones have come."""
    monkeypatch.chdir(tmp_path)
    given_clip('given:1.mp4')
    out = run_sample(
        pathlib.Path('2026-11-27T10:30'),
        workdir='run',
        prompt=['red ball on gray stays', *PROMPT],
        given=['given:1.mp4'],
        given_frames=4,
        seed=5,
        sampler='dpm++2m',
        steps=3,
        guidance=['1', '2', '3'],
        negative_prompt='blue ball on white stays',
        num_videos=2,
    )
    add_checkpoint(workdir, 6)
    monkeypatch.chdir('/')
    story = str(tmp_path / out / 'story.json')

    again = run_sample(tmp_path / 'again', story=story)
    assert differing(tmp_path / out, again) == []
    assert len(content(again)) == 1 + 2 * 7
    again = run_sample(tmp_path / 'workdir', story=story, workdir=str(workdir))
    assert differing(tmp_path / out, again) == []
    assert warnings(caplog) == []

    # Flags replace single values.
    other = run_sample(tmp_path / 'other', story=story, seed=6, num_videos=1, guidance=['1'])
    told, made = (json.loads((f / 'story.json').read_text()) for f in (tmp_path / out, other))
    changed = {key for key in told if told[key] != made[key]}
    assert changed == {'seed', 'num_videos', 'guidance'}
    (line,) = warnings(caplog)
    assert 'seed 5, not 6' in line and 'guidance [1.0, 2.0, 3.0], not 1.0' in line

    newest = str(workdir / 'checkpoints/6')
    run_sample(tmp_path / 'newest', story=story, checkpoint=newest)
    assert 'weights' in warnings(caplog)[0]


def test_seconds_of_a_story_become_frames_of_the_model(run, tmp_path):
    """At 4 fps, rounded to what the codec can take; the scene without seconds has the default."""
    text = tmp_path / 'story.txt'
    text.write_text('red ring on gray moves left [1.2s] | it grows [1.6s] |\nit blinks\n')
    out = run_sample(tmp_path / 'out', story=str(text), workdir=str(run))
    scenes = json.loads((out / 'story.json').read_text())['scenes']
    assert scenes == [
        {'caption': 'red ring on gray moves left', 'frames': 4},
        {'caption': 'it grows', 'frames': 8},
        {'caption': 'it blinks', 'frames': 4},
    ]


def test_a_story_whose_sources_changed(workdir, tmp_path, caplog):
    clip = given_clip(tmp_path / 'clip.mp4')
    flags = {'given': [clip], 'prompt': ['red ball on gray stays', *PROMPT]}
    story = run_sample(tmp_path / 'out', workdir=str(workdir), **flags) / 'story.json'

    # Another machine or version.
    record = json.loads(story.read_text())
    (tmp_path / 'old.json').write_text(json.dumps(record | {'jax': '0.1', 'device': 'TPU v9'}))
    run_sample(tmp_path / 'old', story=str(tmp_path / 'old.json'))
    (line,) = warnings(caplog)
    assert 'device "TPU v9", not "cpu"' in line and 'jax "0.1"' in line

    # A relative path is looked for beside the story.
    record['given'][0]['file'] = 'clip.mp4'
    (tmp_path / 'near.json').write_text(json.dumps(record))
    run_sample(tmp_path / 'near', story=str(tmp_path / 'near.json'))
    assert differing(tmp_path / 'near', tmp_path / 'out') == []

    given_clip(clip, 0.7)
    with pytest.raises(ValueError, match=r'clip\.mp4 has changed since the story was made from it'):
        run_sample(tmp_path / 'x', story=str(story))
    pathlib.Path(clip).unlink()
    with pytest.raises(FileNotFoundError, match=r'clip\.mp4 is not a file'):
        run_sample(tmp_path / 'x', story=str(story))

    add_checkpoint(workdir, 6)
    shutil.rmtree(workdir / 'checkpoints/3')
    with pytest.raises(
        FileNotFoundError, match=r'checkpoints/3, from which .*story\.json was made'
    ):
        run_sample(tmp_path / 'x', story=str(story))
    given = given_clip(clip)
    run_sample(tmp_path / 'y', story=str(story), workdir=str(workdir), given=[given])
    assert 'checkpoint' in warnings(caplog)[0]


def test_a_folder_belongs_to_one_story(run, tmp_path, capsys):
    out = tmp_path / 'out'
    flags = {'workdir': str(run)}
    run_sample(out, num_videos=2, **flags)
    first = content(out)

    # The same command has nothing to do; one that asks for more keeps what is there.
    times = {path: path.stat().st_mtime_ns for path in out.rglob('*')}
    run_sample(out, num_videos=2, **flags)
    assert 'Nothing to do' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob('*')} == times
    run_sample(out, num_videos=3, **flags)
    assert first.items() - content(out).items() == {('story.json', first['story.json'])}

    for other, message in (
        ({'seed': 1}, 'seed 0, not 1'),
        ({'prompt': ['red ring on gray moves left', 'it blinks']}, 'other scenes|scenes .*blinks'),
        ({'steps': 3}, 'steps 2, not 3'),
        ({'num_videos': 1}, '3 videos, not 1'),
    ):
        with pytest.raises(ValueError, match=f'out holds other samples .*({message}).*overwrite'):
            run_sample(out, **{'num_videos': 3} | flags | other)
    run_sample(out, overwrite=True, seed=1, **flags)
    assert set(content(out)) == set(FILES)
    assert json.loads((out / 'story.json').read_text())['seed'] == 1

    # From Python.
    video = mask2dit_jax.load(run).generate(PROMPT, seed=1)
    video.save(out)
    other = mask2dit_jax.load(run).generate([PROMPT] * 2, seed=2)
    with pytest.raises(ValueError, match='holds other samples'):
        other[0].save(out)
    samples.save(other, out, overwrite=True)
    with pytest.raises(ValueError, match='does not follow video 0'):
        samples.save(other[::-1], tmp_path / 'python')

    # The second of several is made again as itself.
    other[1].save(tmp_path / 'second')
    again = run_sample(tmp_path / 'again', story=str(tmp_path / 'second/story.json'))
    assert differing(again, tmp_path / 'second') == []


def test_a_run_that_was_trained_anew_is_another_story(workdir, tmp_path):
    """Though its checkpoint has the same name."""
    out = run_sample(tmp_path / 'out', workdir=str(workdir))
    shutil.copytree(workdir / 'checkpoints/3', tmp_path / '3')
    shutil.rmtree(workdir / 'checkpoints/3')
    add_checkpoint(workdir, 3, seed=1)
    with pytest.raises(ValueError, match=r'out holds other samples \(weights'):
        run_sample(out, workdir=str(workdir))
    shutil.rmtree(workdir / 'checkpoints/3')
    (tmp_path / '3').rename(workdir / 'checkpoints/3')
    run_sample(out, workdir=str(workdir))


def test_files_of_others_are_neither_counted_nor_deleted(run, tmp_path):
    for name in 'mine.mp4', 'video_0.mp4':
        out = tmp_path / name
        out.mkdir()
        given_clip(out / name)
        with pytest.raises(ValueError, match=f'{name} has no story.json'):
            run_sample(out, workdir=str(run))
    with pytest.raises(ValueError, match=r'mine\.mp4, which sample did not write'):
        run_sample(tmp_path / 'mine.mp4', workdir=str(run), overwrite=True)
    assert (tmp_path / 'mine.mp4/mine.mp4').is_file()

    (tmp_path / 'video_0.mp4/notes.txt').touch()
    (tmp_path / 'video_0.mp4/video_0').mkdir()
    (tmp_path / 'video_0.mp4/video_0/notes.txt').touch()
    out = run_sample(tmp_path / 'video_0.mp4', workdir=str(run), overwrite=True)
    assert set(content(out)) == {*FILES, 'notes.txt', 'video_0/notes.txt'}


def test_latents_without_their_story_are_not_told_on(run, tmp_path):
    """As `rm out/*` leaves them, which keeps folders."""
    out = run_sample(tmp_path / 'out', workdir=str(run))
    for path in list(out.iterdir()):
        if path.is_file():
            path.unlink()
    other = {'workdir': str(run), 'prompt': ['blue ball on white stays', 'it blinks']}
    with pytest.raises(samples.OtherStoryError, match=r'latents\.safetensors has no story\.json'):
        run_sample(out, **other)
    run_sample(out, overwrite=True, **other)
    assert differing(out, run_sample(tmp_path / 'new', **other)) == []


def test_a_claimed_folder_is_left_alone(run, tmp_path):
    with storage.claim(tmp_path), pytest.raises(storage.ClaimedError, match='is being written by'):
        run_sample(tmp_path, workdir=str(run))


def test_outputs_are_tried_first(tmp_path):
    """Before the workdir is even looked for."""
    (tmp_path / 'file').touch()
    for out, reason in (
        (tmp_path / 'file/out', 'Not a directory'),
        (tmp_path / 'file', 'it is a file'),
        (pathlib.Path('/proc/out'), 'No such file'),
    ):
        with pytest.raises(storage.OutputError, match=reason) as error:
            run_sample(out, workdir='missing')
        assert '--out' in str(error.value) and '\n' not in str(error.value)


def test_a_full_disk_leaves_nothing_half(run, tmp_path):
    video = mask2dit_jax.load(run).generate(PROMPT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    video.save(tmp_path / 'whole')
    sizes = sorted({path.stat().st_size for path in (tmp_path / 'whole').rglob('*')} - {0})
    for size in sizes[1:]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
        try:
            with pytest.raises(
                storage.OutputError, match=r'out cannot be written \(File too large'
            ) as error:
                video.save(tmp_path / 'out')
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert '\n' not in str(error.value)
        assert content(tmp_path / 'out').items() <= content(tmp_path / 'whole').items()
    video.save(tmp_path / 'out')
    assert differing(tmp_path / 'whole', tmp_path / 'out') == []


def test_scene_clips_are_no_videos(run, tmp_path):
    out = run_sample(tmp_path / 'out', workdir=str(run), num_videos=2)
    for scene in range(2):
        clip, fps = video_lib.read_video(out / f'video_1/scene_{scene}.mp4')
        assert (clip.shape, fps) == ((4, 256, 256, 3), 4)
        whole = video_lib.read_video(out / 'video_1.mp4')[0][4 * scene : 4 * scene + 4]
        assert np.abs(clip.astype(float) - whole).mean() < 8
    for folder in out, tmp_path:
        found = videos_lib.find_videos(folder)
        assert [video.path.name for video in found] == ['video_0.mp4', 'video_1.mp4']
        assert videos_lib.whole_videos(folder) == [video.path for video in found]


def test_latents_are_extended(run, tmp_path):
    """By their file or its folder, and again by the story of the extension."""
    out = run_sample(tmp_path / 'out', workdir=str(run))
    prompt = [*PROMPT, 'it blinks']
    flags = {'workdir': str(run), 'prompt': prompt}
    longer = run_sample(tmp_path / 'a', given=[str(out / 'video_0')], **flags)
    by_file = run_sample(tmp_path / 'b', given=[str(out / FILES[1])], **flags)
    again = run_sample(tmp_path / 'c', story=str(longer / 'story.json'))
    assert differing(longer, by_file) == differing(longer, again) == []
    assert len(json.loads((longer / 'story.json').read_text())['given']) == 2

    model = mask2dit_jax.load(run)
    first = model.generate(PROMPT)
    model.generate(prompt, given=[first.latents]).save(tmp_path / 'memory')
    assert differing(longer, tmp_path / 'memory') == ['story.json']

    with pytest.raises(FileNotFoundError, match=r'out/latents\.safetensors is not a file'):
        run_sample(tmp_path / 'x', given=[str(out)], **flags)
    with pytest.raises(ValueError, match=r'from Python, which story\.json does not hold'):
        run_sample(tmp_path / 'x', story=str(tmp_path / 'memory/story.json'))


# Stories of more scenes than the model was trained on.

LONG = [*PROMPT, 'it blinks', 'it stays', 'it moves up', 'it shrinks']


def told_scenes(folder):
    return latent_file.read(folder / 'video_0/latents.safetensors').scenes


@pytest.mark.parametrize('joint, window, sinks', [(2, 1, 0), (2, 2, 1), (3, 1, 2), (1, 3, 0)])
def test_a_later_scene_is_made_of_its_window_and_the_sinks(run, joint, window, sinks):
    """Of their latents and captions, at positions from 0, with noise of its own."""
    model = mask2dit_jax.load(run)
    guidance = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    plan = {'joint': joint, 'window': window, 'sinks': sinks, 'guidance': guidance}
    scenes = list(model.tell(LONG, seed=3, first_index=5, **plan))
    assert [scene.number for scene in scenes] == list(range(6))
    assert [scene.caption for scene in scenes] == LONG

    # The beginning is generated as a story of so many scenes.
    begun = model.generate(LONG[:joint], seed=3, first_index=5, guidance=guidance[:joint], joint=9)
    for scene, expected in zip(scenes, begun.latents.scenes):
        np.testing.assert_array_equal(scene.latents, expected)

    _, params = model.params()
    for scene in scenes[joint:]:
        n = scene.number
        given = [i for i in range(n) if i < sinks or i >= n - window]
        inputs = generation.encode_inputs(
            model.codec,
            [[LONG[i] for i in (*given, n)]],
            (4,) * (len(given) + 1),
            given_latents=[scenes[i].latents for i in given],
        )
        expected = generation.sample_latents(
            model.config,
            params,
            inputs,
            seed=3,
            first_index=5,
            guidance=[guidance[i] for i in (*given, n)],
            scene=n,
        )
        np.testing.assert_array_equal(scene.latents, expected[0, -1:])
        clip = model.codec.decode_video(expected[:, -1:], (1,))[0]
        np.testing.assert_array_equal(scene.pixels, clip)


def test_scenes_of_a_story_have_noise_of_their_own():
    noise = [np.ravel(generation.story_noise(seed, i, (50,))) for seed in (0, 1) for i in (0, 1)]
    for draw in generation.scene_noise, generation.given_noise:
        for case in itertools.product((0, 1), (0, 1), (3, 4)):
            noise.append(np.ravel(draw(*case, (50,))))
    assert len(np.unique(noise)) == np.size(noise)


def test_given_scenes_with_noise_come_back_clean(run):
    """Their noise is drawn from the seed, the story and the new scene."""
    model = mask2dit_jax.load(run)
    noisy = dataclasses.replace(model.config.sample, given_timestep=200)
    config = dataclasses.replace(model.config, sample=noisy)
    _, params = model.params()
    first = model.generate(PROMPT).latents.scenes[0]
    inputs = generation.encode_inputs(model.codec, [PROMPT], (4, 4), given_latents=[first])

    def made(config, **settings):
        return generation.sample_latents(config, params, inputs, **({'seed': 0} | settings))[0]

    clean, again, other, later = (
        made(model.config),
        made(config),
        made(config, seed=0, scene=3),
        made(config, seed=0, scene=4),
    )
    np.testing.assert_array_equal(again, made(config))
    for latents in clean, again, other, later:
        np.testing.assert_array_equal(latents[:1], first)
    assert np.abs(clean[1:] - again[1:]).max() > 1e-3
    assert np.abs(other[1:] - later[1:]).max() > 1e-3


def test_given_clips_begin_a_long_story(run, tmp_path):
    """They are decoded with the others, and stay as they are."""
    clip = given_clip(tmp_path / 'given.mp4')  # of 8 frames
    model = mask2dit_jax.load(run)
    encoded = model.generate(LONG[:2], given=[clip]).latents.scenes[0]
    for joint in None, 1, 3:
        scenes = list(model.tell(LONG[:4], given=[clip], joint=joint))
        np.testing.assert_array_equal(scenes[0].latents, encoded)
        assert [len(scene.pixels) for scene in scenes] == [8, 4, 4, 4]


def test_extending_a_folder_is_telling_in_one_go(run, tmp_path):
    """By prompts and by a story of all scenes, again and again, for every video."""
    flags = {'window': 2, 'sinks': 1, 'joint': 2, 'num_videos': 2, 'seed': 4}
    flags |= {'workdir': str(run)}
    whole = run_sample(tmp_path / 'whole', prompt=LONG, **flags)
    made = run_sample(tmp_path / 'made', prompt=LONG[:3], **flags)
    before = content(made)

    more = run_sample(tmp_path / 'more', prompt=LONG[3:5], extend=str(made))
    longer = run_sample(tmp_path / 'longer', prompt=LONG[5:], extend=str(more))
    assert differing(whole, longer) == []
    assert content(made) == before

    story = {'scenes': [{'caption': caption} for caption in LONG]}
    (tmp_path / 'all.json').write_text(json.dumps(story))
    longer = run_sample(
        tmp_path / 'again', prompt=[], story=str(tmp_path / 'all.json'), extend=str(made)
    )
    assert differing(whole, longer) == []


def test_extending_takes_the_latents_that_are_there(run, tmp_path):
    """It generates none of these scenes again, and the next one is made from them."""
    made = run_sample(tmp_path / 'made', workdir=str(run), prompt=LONG[:3])
    plain = run_sample(tmp_path / 'plain', prompt=LONG[3:4], extend=str(made))
    path = made / 'video_0/latents.safetensors'
    latents = latent_file.read(path)
    changed = [scene + 0.5 for scene in latents.scenes]
    latent_file.write(path, dataclasses.replace(latents, scenes=changed))
    more = run_sample(tmp_path / 'more', prompt=LONG[3:4], extend=str(made))
    np.testing.assert_array_equal(told_scenes(more)[:3], changed)
    assert np.abs(told_scenes(more)[3] - told_scenes(plain)[3]).max() > 1e-3


def test_what_cannot_be_extended_is_named(run, workdir, tmp_path, caplog):
    made = run_sample(tmp_path / 'made', workdir=str(run))
    flags = {'extend': str(made), 'prompt': ['it blinks']}
    out = tmp_path / 'out'
    with pytest.raises(app.UsageError, match=r'keeps the settings .* --seed cannot be given'):
        run_sample(out, seed=3, **flags)
    with pytest.raises(app.UsageError, match='--out must be another folder'):
        run_sample(made, **flags)

    add_checkpoint(workdir, 9, seed=1)
    with pytest.raises(ValueError, match=r'made was made by another model .*--given='):
        run_sample(out, checkpoint=str(workdir / 'checkpoints/9'), **flags)

    (tmp_path / 'other.json').write_text('{"scenes": [{"caption": "it grows"}], "steps": 9}')
    with pytest.raises(ValueError, match='steps 2, not 9; it does not begin with the 2 scenes'):
        run_sample(out, extend=str(made), prompt=[], story=str(tmp_path / 'other.json'))

    shutil.copytree(made, tmp_path / 'bare')
    (tmp_path / 'bare/video_0/latents.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match=r'bare/video_0/latents\.safetensors is not there'):
        run_sample(out, extend=str(tmp_path / 'bare'), prompt=['it blinks'])
    (made / 'story.json').write_text('{"scenes": [{"caption": "it grows"}]}')
    with pytest.raises(ValueError, match='made was not written by sample'):
        run_sample(out, **flags)

    def warned(**chosen):
        caplog.clear()
        list(mask2dit_jax.load(run).tell(LONG[:3], **chosen))
        return [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']

    assert warned() == []
    assert 'the model was trained on 2' in warned(window=2)[0]
    assert 'the model was trained on 2' in warned(joint=3)[0]
    assert 'A scene has 8 frames, and the model was trained on scenes of 4' in warned(frames=8)[0]
    with pytest.raises(ValueError, match='window is 0: use a whole number of at least 1'):
        warned(window=0)


def test_a_folder_of_an_earlier_version_is_made_again_jointly(run, tmp_path):
    """Its story.json does not say that all scenes were generated together."""
    out = run_sample(tmp_path / 'out', workdir=str(run), prompt=LONG[:3], joint=3)
    record = json.loads((out / 'story.json').read_text())
    for key in 'joint', 'window', 'sinks':
        del record[key]
    (tmp_path / 'old.json').write_text(json.dumps(record))
    again = run_sample(tmp_path / 'again', story=str(tmp_path / 'old.json'))
    assert differing(out, again) == []


# In processes of their own.

# Runs `sample` with the flags argv[3:], and kills itself instead of giving a file its name, with a
# part of the file written: before the argv[2]-th file whose name matches argv[1].
KILLED = """
import os, re, signal, sys
name, count = sys.argv[1], int(sys.argv[2])
replace = os.replace
def killing(source, target, *args, **kwargs):
    global count
    if re.search(name, os.fspath(target)):
        count -= 1
        if not count:
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target, *args, **kwargs)
os.replace = killing
from absl import app
from mask2dit_jax import sample
sys.argv = ['sample', *sys.argv[3:]]
app.run(sample.main)
"""


def start(run, out, *more, code=('-m', 'mask2dit_jax.sample')):
    environment = child_environment() | {
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'JAX_COMPILATION_CACHE_DIR': str(out.parents[1] / 'cache'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    flags = [f'--workdir={run}', f'--out={out}', *(f'--prompt={p}' for p in PROMPT), *more]
    return subprocess.Popen(
        [sys.executable, *code, *flags], env=environment, stderr=subprocess.PIPE, text=True
    )


def killed_before(run, out, name, count, *more):
    process = start(run, out, *more, code=['-c', KILLED, name, str(count)])
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def finish(run, out, *more):
    process = start(run, out, *more)
    _, err = process.communicate()
    assert process.returncode == 0, err


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_a_killed_command_goes_on(workdir, tmp_path):
    """Killed twice, and trained on in between: the checkpoint of its start is kept to."""
    finish(workdir, tmp_path / 'whole', '--num_videos=2')
    out = tmp_path / 'out'
    killed_before(workdir, out, r'video_0/scene_1\.mp4', 1, '--num_videos=2')
    assert 'video_0.mp4' not in content(out)
    add_checkpoint(workdir, 6)
    killed_before(workdir, out, r'video_1\.gif', 1, '--num_videos=2')
    kept = (out / 'video_0.mp4').stat().st_mtime_ns
    finish(workdir, out, '--num_videos=2')
    assert differing(tmp_path / 'whole', out) == []
    assert (out / 'video_0.mp4').stat().st_mtime_ns == kept


def test_a_story_is_told_on_after_kills(run, tmp_path):
    """In the joint scenes, between the latents of a scene and its clip, and before the whole."""
    more = [f'--prompt={caption}' for caption in LONG[2:]]
    finish(run, tmp_path / 'whole', *more)
    out = tmp_path / 'out'
    for name, count, there in (
        (r'scene_1\.mp4', 1, 2),
        (r'latents\.safetensors', 3, 4),
        (r'scene_4\.mp4', 1, 5),
        (r'video_0\.gif', 1, 6),
    ):
        killed_before(run, out, name, count, *more)
        assert len(told_scenes(out)) == there
    finish(run, out, *more)
    assert differing(tmp_path / 'whole', out) == []


@pytest.mark.slow
def test_ten_kills(run, tmp_path):
    """At each kind of file, and at random times."""
    count = '--num_videos=6'
    finish(run, tmp_path / 'whole', count)
    out = tmp_path / 'out'
    for number, name in enumerate(FILES):
        killed_before(run, out, f'{re.escape(name)}$', 1, count)
        assert content(out).keys() - set(FILES[:number]) == {f'{name}.unfinished', 'owner.json'}
    rng = random.Random(0)
    for _ in range(3):
        process = start(run, out, count)
        wait_for(out / 'story.json', process)
        time.sleep(rng.uniform(0, 6))
        process.kill()
        process.communicate()
    finish(run, out, count)
    assert differing(tmp_path / 'whole', out) == []


def communicate(process):
    """What it writes until it ends; one that does not stop is killed, so that the test fails."""
    try:
        return process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


# Runs `sample` with the flags argv[2:], and hangs where it loads the model, after making argv[1].
HANGS = """
import pathlib, sys, time
from absl import app
from mask2dit_jax import pipeline, sample
marker = pathlib.Path(sys.argv[1])
def load(*args, **kwargs):
    marker.touch()
    time.sleep(1e6)
pipeline.load = load
sys.argv = ['sample', *sys.argv[2:]]
app.run(sample.main)
"""


def test_ctrl_c(run, tmp_path):
    """The first stops after the present scene, the second at once."""
    out = tmp_path / 'out'
    process = start(run, out, '--num_videos=1000')
    wait_for(out / 'video_0.mp4', process)
    process.send_signal(signal.SIGINT)
    _, err = communicate(process)
    assert process.returncode == 130, err
    assert err.count('Stopping after the present scene') == 1
    assert re.search(r'Stopped: \d+ video\(s\) are not yet in .*; the same command goes on', err)
    assert 'Traceback' not in err
    record = json.loads((out / 'story.json').read_text())
    lacking = samples.missing(out, record)
    made = 1000 - len(lacking)
    assert 1 <= made < 1000 and len(content(out)) == 1 + 6 * made

    # At once, in the midst of loading.
    other = tmp_path / 'other'
    marker = tmp_path / 'loading'
    process = start(run, other, '--num_videos=1000', code=['-c', HANGS, str(marker)])
    wait_for(marker, process)
    process.send_signal(signal.SIGINT)
    assert 'Stopping after' in ''.join(process.stderr.readline() for _ in range(2))
    process.send_signal(signal.SIGINT)
    _, err = communicate(process)
    assert process.returncode == 130, err
    assert 'Stopped' not in err and 'Traceback' not in err
    assert os.listdir(other) in ([storage.OWNER_FILE], [storage.OWNER_FILE, 'story.json'])
