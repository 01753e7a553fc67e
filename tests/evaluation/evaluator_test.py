"""Videos and stories to scores, with tiny random encoders and with features of known scores."""

import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from conftest import child_environment

from mask2dit_jax import storage
from mask2dit_jax.data import video
from mask2dit_jax.evaluation import evaluator, feature_encoders, metrics
from mask2dit_jax.evaluation import videos as videos_lib
from mask2dit_jax.tools import random_model


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('encoders')
    return {kind: random_model.write_encoder(root / kind, kind) for kind in random_model.ENCODERS}


RED = (200, 0, 0)
GREEN = (0, 180, 0)
BLUE = (0, 0, 220)


def scene(color, frames):
    return np.broadcast_to(np.array(color, np.uint8), (frames, 24, 32, 3))


def write_videos(folder, frames=(4, 7, 3)):
    """Two stories of scenes of unequal length: one with cuts, one without."""
    folder.mkdir(exist_ok=True)
    captions = ('a red ball', 'it moves', 'it moves')
    scenes = [{'caption': c, 'frames': f} for c, f in zip(captions, frames)]
    story = {'scenes': scenes, 'seed': 0, 'sampler': 'ddim'}
    (folder / 'story.json').write_text(json.dumps(story))

    colored = [scene(color, count) for color, count in zip((RED, GREEN, BLUE), frames)]
    video.write_mp4(folder / 'video_2.mp4', np.concatenate(colored), 8)
    video.write_mp4(folder / 'video_10.mp4', scene(GREEN, sum(frames)), 8)
    return folder


def test_end_to_end_with_all_encoders(folders, tmp_path):
    """Cuts are seen, a still video is consistent, and its written features give the same scores."""
    videos = write_videos(tmp_path / 'samples')
    result = evaluator.evaluate(
        videos,
        tmp_path / 'out',
        encoder=folders['clip'],
        frame_encoder=folders['dinov2'],
        video_encoder=folders['videomae'],
        reference=videos,
        frames=3,
    )
    cut, still = result['videos']
    assert [cut['name'], still['name']] == ['video_2', 'video_10']

    # The video with cuts differs between scenes, the still one nowhere.
    assert cut['sharpness'] > 0.9
    assert cut['placed'] == 1
    assert cut['transition_deviation'] == 0
    assert still['transition_deviation'] == 3  # of 4 + 7 + 3 frames: 3 at both borders
    assert still['sharpness'] == still['placed'] == 0
    for name in 'visual', 'visual_adjacent', 'subject_within', 'subject_between':
        assert still[name] == pytest.approx(1, abs=1e-4)
    assert cut['subject_within'] == pytest.approx(1, abs=1e-3)
    assert cut['visual'] < 0.999
    assert cut['subject_between'] < 0.999
    assert still['sequence'] == pytest.approx((still['visual'] + still['semantic']) / 2)
    matrix = np.array(cut['confusion'])
    np.testing.assert_allclose(matrix[:, 1], matrix[:, 2])  # captions 2 and 3 are the same
    # The videos are their own reference.
    assert result['frechet']['distance'] == pytest.approx(0, abs=1e-4)

    visual = result['summary']['visual']
    assert visual['mean'] == pytest.approx((cut['visual'] + still['visual']) / 2)
    assert visual['interval'] == pytest.approx((cut['visual'], still['visual']))

    written = json.loads((tmp_path / 'out/evaluation.json').read_text())
    assert written == json.loads(json.dumps(result))
    again = evaluator.evaluate(
        videos, tmp_path / 'again', features=tmp_path / 'out/features.safetensors'
    )
    for key in 'summary', 'videos', 'confusion', 'frechet':
        assert again[key] == result[key]

    page = (tmp_path / 'out/evaluation.md').read_text()
    assert f'| all pairs | {100 * visual["mean"]:.2f} [' in page
    assert page.count('caption 3') == 1
    assert '| 1.50 [0.00, 3.00] |' in page  # frames, no percentage
    assert 'So few videos bias it' in page


def test_scene_features_are_means_over_frames(folders, tmp_path):
    """They average the frames asked for, from first to last, whatever else is in the batch."""
    videos = write_videos(tmp_path / 'samples')
    noise = np.random.default_rng(0).integers(0, 256, (14, 4, 4, 3), np.uint8)
    video.write_mp4(videos / 'video_2.mp4', noise, 8, scale=8)
    evaluator.evaluate(videos, tmp_path / 'out', encoder=folders['clip'], frames=2)
    features = safetensors.numpy.load_file(tmp_path / 'out/features.safetensors')

    # The second scene has the frames 4 to 10.
    pixels, _ = video.read_video(videos / 'video_2.mp4')
    encoder = feature_encoders.load(folders['clip'])
    frames = metrics.unit(feature_encoders.encode_clips(encoder, pixels[[4, 10]][:, None]))
    np.testing.assert_allclose(features['video_2/frames/1'], frames, atol=1e-5)
    np.testing.assert_allclose(features['video_2/scenes'][1], frames.mean(0), atol=1e-5)
    assert 'video_2/video' not in features


def test_encoders_without_captions_score_what_they_can(folders, tmp_path):
    videos = write_videos(tmp_path / 'samples')
    summary = evaluator.evaluate(videos, tmp_path / 'out', encoder=folders['videomae'])['summary']
    cuts = {'sharpness', 'placed', 'transition_deviation'}
    assert set(summary) == {'visual', 'visual_adjacent', *cuts}
    assert '| – | – | – |' in (tmp_path / 'out/evaluation.md').read_text()


def known_features(names=('video_2', 'video_10')):
    """Scenes along axes: the captions of the first video fit, those of the second are one off."""
    axes = np.eye(3, 5, dtype=np.float32)
    return {
        f'{names[0]}/scenes': axes,
        f'{names[0]}/captions': 2 * axes,
        f'{names[1]}/scenes': axes,
        f'{names[1]}/captions': np.roll(axes, 1, axis=0),
    }


def test_known_features_from_a_file_and_folders_of_stories(tmp_path):
    """The command scores two folders below --videos, without an encoder."""
    for name in 'a', 'b':
        write_videos(tmp_path / 'samples', (3, 3, 2)).rename(tmp_path / name)
        (tmp_path / name / 'video_10.mp4').unlink()
    features = known_features(('a/video_2', 'b/video_2'))
    for key in 'a/video_2/video', 'b/video_2/video':
        features[key] = np.zeros((1, 2), np.float32)
    features['reference'] = np.array([[3, 4], [3, 4], [3, 4]], np.float32)
    safetensors.numpy.save_file(features, tmp_path / 'features.safetensors')

    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'mask2dit_jax.evaluate',
            f'--videos={tmp_path}',
            f'--features={tmp_path / "features.safetensors"}',
            f'--out={tmp_path / "out"}',
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr

    result = json.loads((tmp_path / 'out/evaluation.json').read_text())
    known = {'visual': 0, 'semantic': 0.5, 'sequence': 0.25, 'matches': 0.5, 'margin': 0.25}
    assert {name: result['summary'][name]['mean'] for name in known} == known
    assert result['frechet'] == {'distance': 25, 'videos': 2, 'references': 3, 'size': 2}
    assert (
        '| all pairs | 0.00 [0.00, 0.00] | 50.00 [0.00, 100.00] | 25.00 [0.00, 50.00] | 25 | '
        in done.stdout
    )
    assert (tmp_path / 'out/evaluation.md').read_text() == done.stdout


def call(folder, **kwargs):
    return evaluator.evaluate(folder / 'samples', folder / 'out', **kwargs)


def test_a_row_of_the_table_adds_a_metric(tmp_path, monkeypatch):
    """A metric is computed wherever its features exist, and printed without a label of its own."""
    write_videos(tmp_path / 'samples')
    safetensors.numpy.save_file(known_features(), tmp_path / 'features.safetensors')
    size = metrics.Metric(lambda scenes: np.linalg.norm(scenes, axis=1).mean(), ('scenes',))
    monkeypatch.setitem(metrics.METRICS, 'scene_size', size)
    frames = metrics.Metric(len, ('frames',))
    monkeypatch.setitem(metrics.METRICS, 'frame_count', frames)

    result = call(tmp_path, features=tmp_path / 'features.safetensors')
    assert result['summary']['scene_size'] == {'mean': 1, 'interval': (1, 1)}
    assert 'frame_count' not in result['summary']
    page = (tmp_path / 'out/evaluation.md').read_text()
    assert re.search(r'^\| scene_size \| 100\.00 \[100\.00, 100\.00\] \|', page, re.MULTILINE)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'video_2/scenes': None}, r'video_2\.mp4: video_2/scenes is missing'),
        (
            {'video_2/scenes': np.ones((2, 5))},
            r'video_2\.mp4: video_2/scenes has shape \(2, 5\).* 3\.',
        ),
        ({'video_2/captions': np.ones((3, 4))}, r'video_2\.mp4: .*same space'),
        ({'video_2/captions': np.zeros((3, 5))}, r'video_2\.mp4: .*zero or not finite'),
        ({'video_2/captions': None}, 'video_10 and video_2 differ in confusion, margin'),
        ({'video_10/frames/0': np.ones((2, 5))}, 'video_10/frames/1, video_10/frames/2 is missing'),
        ({'reference': np.ones((3, 5))}, 'video_2/video is missing'),
    ],
)
def test_features_that_do_not_fit_are_named(tmp_path, change, message):
    write_videos(tmp_path / 'samples')
    features = {}
    for name, value in (known_features() | change).items():
        if value is not None:
            features[name] = value.astype(np.float32)
    safetensors.numpy.save_file(features, tmp_path / 'features.safetensors')

    with pytest.raises(ValueError, match=message) as error:
        call(tmp_path, features=tmp_path / 'features.safetensors')
    assert '\n' not in str(error.value)


def story_of(folder, scenes):
    (folder / 'samples/story.json').write_text(json.dumps({'scenes': scenes}))


@pytest.mark.parametrize(
    'damage, message',
    [
        (
            lambda d: (d / 'samples/story.json').unlink(),
            r'samples holds no story\.json: give --story',
        ),
        (
            lambda d: story_of(d, [{'caption': 'a', 'frames': 3}, {'caption': 'b'}]),
            r'story\.json must have two scenes',
        ),
        (
            lambda d: story_of(d, [{'caption': 'a', 'frames': 14}]),
            r'story\.json must have two scenes',
        ),
        (
            lambda d: story_of(d, [{'caption': c, 'frames': 8} for c in 'ab']),
            r'video_2\.mp4 has 14 frames, its story 16',
        ),
        (lambda d: [p.unlink() for p in d.glob('samples/*.mp4')], 'samples holds no mp4 file'),
        (
            lambda d: (d / 'samples/video_10.mp4').write_bytes(b'no'),
            r'video_10\.mp4 cannot be decoded',
        ),
        (
            lambda d: (d / 'features.safetensors').unlink(),
            r'features\.safetensors is not a file: check --features',
        ),
        (
            lambda d: (d / 'features.safetensors').write_bytes(b'no'),
            r'features\.safetensors is damaged',
        ),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, damage, message):
    write_videos(tmp_path / 'samples')
    safetensors.numpy.save_file(known_features(), tmp_path / 'features.safetensors')
    damage(tmp_path)

    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        call(tmp_path, features=tmp_path / 'features.safetensors')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        ({}, 'either --encoder or --features'),
        ({'encoder': 'a', 'features': 'b'}, 'either --encoder or --features'),
        ({'features': 'a', 'reference': 'b'}, 'leave these out'),
        ({'encoder': 'a', 'video_encoder': 'b'}, 'give --reference'),
        ({'encoder': 'a', 'reference': 'missing'}, 'missing holds no mp4 file'),
        ({'encoder': 'missing'}, r'missing/config\.json cannot be read'),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, kwargs, message):
    write_videos(tmp_path / 'samples')
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        call(tmp_path, **kwargs)


def test_an_encoder_of_clips_does_not_encode_frames(folders, tmp_path):
    write_videos(tmp_path / 'samples')
    with pytest.raises(ValueError, match='give --frame_encoder an encoder of pictures'):
        call(tmp_path, encoder=folders['clip'], frame_encoder=folders['videomae'])


def test_one_story_for_all_files_of_a_folder(tmp_path):
    """With --story no story.json is looked for, and the names are those of the files."""
    write_videos(tmp_path / 'samples').joinpath('story.json').rename(tmp_path / 'mine.json')

    found = videos_lib.find_videos(tmp_path / 'samples', tmp_path / 'mine.json')
    assert [(v.name, v.frames) for v in found] == [('video_2', (4, 7, 3)), ('video_10', (4, 7, 3))]


# Evaluates into copies of a folder with older results, and is killed at random marked points:
# before it changes a file, or where it has written so many bytes of one. Then it evaluates again.
KILLED = """
import json, os, random, shutil, sys

import killing
from mask2dit_jax.evaluation import evaluator

folder, encoder, kills = sys.argv[1:]
kills = int(kills)

def evaluate(out, **kwargs):
    evaluator.evaluate(f'{folder}/samples', out, encoder=encoder, **kwargs)

def status(function):
    # JAX has not started, so that this process can fork.
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os._exit(function() or 0)

def count_changes():
    changes = killing.before_change(f'{folder}/new', None)
    evaluate(f'{folder}/new')
    return len(changes)

status(lambda: evaluate(f'{folder}/old', frames=2, seed=1))
shutil.copytree(f'{folder}/old', f'{folder}/new')
num_changes = status(count_changes)
num_bytes = max(file.stat().st_size for file in os.scandir(f'{folder}/new'))

rng = random.Random(0)
points = [(killing.before_change, rng.randrange(num_changes)) for _ in range((kills + 1) // 2)]
points += [(killing.die_of_files_above, rng.randrange(num_bytes)) for _ in range(kills // 2)]
for i, (at, point) in enumerate(points):
    out = f'{folder}/{i}'
    shutil.copytree(f'{folder}/old', out)
    args = (out, point) if at is killing.before_change else (point,)
    killed = status(lambda: (at(*args), evaluate(out)))
    shutil.copytree(out, f'{out}_killed')
    print(json.dumps([killed, at.__name__, point, num_changes]), flush=True)
    assert status(lambda: evaluate(out)) == 0
"""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


RESULTS = {'evaluation.json', 'evaluation.md', 'features.safetensors'}


@pytest.mark.parametrize('kills', [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_kill_leaves_nothing_that_is_misread(folders, tmp_path, kills):
    """What is there under its name is whole, old results do not stand beside new ones, and the same
    command ends as if nothing had been."""
    write_videos(tmp_path / 'samples')
    cache = {
        'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    }
    done = subprocess.run(
        [sys.executable, '-c', KILLED, tmp_path, folders['clip'], str(kills)],
        env=child_environment() | cache,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('[')]
    assert len(points) == kills

    old = contents(tmp_path / 'old')
    new = contents(tmp_path / 'new')
    assert old.keys() == new.keys() == RESULTS
    for i, (status, *point) in enumerate(points):
        assert status in (-signal.SIGKILL, -signal.SIGXFSZ), point
        left = contents(tmp_path / f'{i}_killed')
        left = {name: content for name, content in left.items() if name in RESULTS}
        assert left.items() <= old.items() or left.items() <= new.items(), point
        assert contents(tmp_path / f'{i}') == new, point


def test_features_of_other_videos_are_refused(folders, tmp_path):
    """A name says nothing: another video, or another story, makes the features useless."""
    videos = write_videos(tmp_path / 'samples')
    evaluator.evaluate(videos, tmp_path / 'out', encoder=folders['clip'])
    features = tmp_path / 'features.safetensors'
    shutil.copy(tmp_path / 'out/features.safetensors', features)
    call(tmp_path, features=features)

    story = (videos / 'story.json').read_text()
    (videos / 'story.json').write_text(story.replace('red', 'blue'))
    with pytest.raises(ValueError, match=r'features\.safetensors is of another video_2, video_10'):
        call(tmp_path, features=features)

    (videos / 'story.json').write_text(story)
    shutil.copy(videos / 'video_10.mp4', videos / 'video_2.mp4')
    with pytest.raises(ValueError, match=r'features\.safetensors is of another video_2, or'):
        call(tmp_path, features=features)

    # The results of the one evaluation that was possible are still there.
    assert (tmp_path / 'out/evaluation.json').exists()


def test_features_beside_the_results_are_kept(folders, tmp_path):
    videos = write_videos(tmp_path / 'samples')
    features = tmp_path / 'out/features.safetensors'
    evaluator.evaluate(videos, tmp_path / 'out', encoder=folders['clip'])
    before = features.read_bytes()
    call(tmp_path, features=features)
    assert features.read_bytes() == before
    assert contents(tmp_path / 'out').keys() == RESULTS


@pytest.mark.parametrize('out', ['file', 'file/below'])
def test_out_is_tried_before_anything_is_loaded(tmp_path, out):
    write_videos(tmp_path / 'samples')
    (tmp_path / 'file').write_text('')
    message = f'{tmp_path / out} cannot be written .*choose another folder by --out'
    with pytest.raises(storage.OutputError, match=message):
        evaluator.evaluate(tmp_path / 'samples', tmp_path / out, encoder=tmp_path / 'no_encoder')
