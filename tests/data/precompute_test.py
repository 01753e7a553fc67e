"""Videos become data sets and batches, on a tiny random model folder.

The tests say what is kept, what is refused, and what continues after a kill.
"""

import collections
import csv
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
import wave

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import child_environment, damage, mesh_of, moving, panned, turn, write_times
from PIL import Image

from mask2dit_jax import config as config_lib
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import clips, encoded_clips, latent_codec, precompute, video
from mask2dit_jax.data import manifest as manifest_lib
from mask2dit_jax.data import records as records_lib
from mask2dit_jax.diffusion import loss as loss_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.models import dit, vae
from mask2dit_jax.pretrained import load as load_lib
from mask2dit_jax.pretrained import names
from mask2dit_jax.tools import random_model
from mask2dit_jax.training import trainer, validation

FRAMES, SIZE = 5, 32

# x264's assembly makes other bytes of the same frames, depending on what lies in memory. In some of
# them the damage that a test does is another legal video; without assembly the bytes are always the
# same.
REPEATABLE = {'crf': '16', 'x264-params': 'asm=0'}


def job(manifest, folder, **kwargs):
    """A job that stores moments by the networks of a folder, or frames without a folder."""
    own = {
        'manifest': str(manifest),
        'root': None,
        'folder': folder and str(folder),
        'frames': FRAMES,
        'store': 'moments' if folder else 'frames',
        'height_px': SIZE,
        'width_px': SIZE,
        'dtype': 'float32',
        'part_clips': 3,
    }
    return precompute.Job(**own | kwargs)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models') / 'tiny'
    random_model.write(folder)
    return folder


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    """Seven shots, clips.csv and stories.json: two stories of three and four scenes, one of them
    longer."""
    root = tmp_path_factory.mktemp('videos')
    film = moving(40 * 7)
    for i in range(7):
        video.write_mp4(root / f'{i}.mp4', film[40 * i : 40 * (i + 1)], 25)
    with (root / 'clips.csv').open('w', newline='') as file:
        csv.writer(file).writerows(
            [('caption', 'path', 'num_frame'), *((f'shot {i}', f'{i}.mp4', 40) for i in range(7))]
        )
    shots = [{'url': f'{i}.mp4', 'caption': f'shot {i}'} for i in range(7)]
    shots[5]['frames'] = 9
    (root / 'stories.json').write_text(json.dumps([{'values': shots[:3]}, {'values': shots[3:]}]))
    return root


@pytest.fixture(scope='module')
def encoded(folder, videos, tmp_path_factory):
    """A folder with two data sets, 'clips' and 'stories'."""
    out = tmp_path_factory.mktemp('encoded')
    assert precompute.precompute(job(videos / 'clips.csv', folder), out / 'clips')
    assert precompute.precompute(job(videos / 'stories.json', folder), out / 'stories')
    return out


def config_of(folder, encoded, **kwargs):
    cfg = load_lib.with_model_from(config_lib.Config(), folder)
    own = {'encoded': str(encoded), 'layouts': ((5, 5),)} | kwargs
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, **own),
        train=config_lib.TrainConfig(batch_size=4, steps=4),
    )
    return encoded_clips.with_data_from(cfg)


def batches_of(cfg):
    return batches_lib.train_batches(cfg, '/nowhere', latent_codec.for_run(cfg, '/nowhere'))


def test_records_hold_what_the_networks_say(encoded, folder, videos):
    records = records_lib.Records(encoded / 'stories')
    assert records.rows.tolist() == [
        (0, 0, 5),
        (0, 1, 5),
        (0, 2, 5),
        (1, 0, 5),
        (1, 1, 5),
        (1, 2, 9),
        (1, 3, 5),
    ]

    record = records[5]
    assert record['caption'] == b'shot 5'
    assert record['moments'].shape == (3, 4, 4, 8)

    # The moments are those of the frames that the random start chooses.
    rng = np.random.default_rng([0, 1, 2, 0])
    indices = clips.choose_frames(manifest_lib.MULTI_SCENE, 40, 9, 3, rng)
    pixels = video.read_video(videos / '5.mp4', height_px=SIZE, width_px=SIZE)[0][indices]
    model, params = load_lib.load_vae(folder / 'vae')
    mean, logvar = vae.encode(model.cfg, params, pixels[None] / np.float32(127.5) - 1)
    np.testing.assert_allclose(
        record['moments'].astype(np.float32),
        np.concatenate([mean, logvar], -1)[0],
        rtol=2e-2,
        atol=1e-2,
    )

    codec = latent_codec.PretrainedCodec(folder, random_model.TRANSFORMER, (SIZE, SIZE))
    np.testing.assert_allclose(
        record['text'].astype(np.float32), codec.encode_text(['shot 5'])[0], rtol=1e-2, atol=1e-2
    )


def test_the_data_set_is_one_of_tfds(encoded):
    builder = tfds.builder_from_directory(str(encoded / 'clips'))
    assert builder.info.name == 'single_scene'
    assert len(builder.as_data_source('train')) == 7
    assert tfds.builder_from_directory(str(encoded / 'stories')).info.name == 'multi_scene'


def test_frames_can_be_stored_instead(videos, tmp_path):
    cut = job(videos / 'clips.csv', None, windows=2)
    assert precompute.precompute(cut, tmp_path / 'out')
    records = records_lib.Records(tmp_path / 'out')
    assert len(records) == 14
    assert records[0]['video'].shape == (FRAMES, SIZE, SIZE, 3)
    # The two windows of a video are stories of their own, with other frames.
    assert len(np.unique(records.rows['story'])) == 14
    assert (records[0]['video'] != records[1]['video']).any()


def test_workers_share_the_parts(encoded, folder, videos, tmp_path):
    work = job(videos / 'stories.json', folder)
    assert [precompute.precompute(work, tmp_path / 'out', w, 2) for w in (1, 0)] == [False, True]

    shared = records_lib.Records(tmp_path / 'out')
    alone = records_lib.Records(encoded / 'stories')
    np.testing.assert_array_equal(shared.rows, alone.rows)
    for i in range(7):
        np.testing.assert_array_equal(shared[i]['moments'], alone[i]['moments'])


def test_going_on_after_a_kill(encoded, folder, videos, tmp_path):
    """A kill after the first part: that part stays as it is, and the whole is what it would have
    been."""
    out = tmp_path / 'out'
    command = [
        sys.executable,
        '-m',
        'mask2dit_jax.encode',
        f'--manifest={videos}/clips.csv',
        f'--checkpoint={folder}',
        f'--out={out}',
        '--frames=5',
        '--dtype=float32',
        '--part_clips=3',
        f'--height={SIZE}',
        f'--width={SIZE}',
    ]
    process = subprocess.Popen(
        command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    deadline = time.monotonic() + 300
    while not list(out.glob('*-00000-of-00003')):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()

    kept = {p: p.stat().st_mtime_ns for p in out.glob('*-of-00003')}
    assert precompute.precompute(job(videos / 'clips.csv', folder), out)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    resumed = records_lib.Records(out)
    undisturbed = records_lib.Records(encoded / 'clips')
    for i in range(7):
        np.testing.assert_array_equal(resumed[i]['moments'], undisturbed[i]['moments'])
        assert resumed[i]['path'] == undisturbed[i]['path']


def test_other_settings_do_not_go_on(encoded, folder, videos):
    with pytest.raises(ValueError, match='begun with another seed, stride: use the same'):
        precompute.precompute(
            job(videos / 'clips.csv', folder, stride=2, seed=1), encoded / 'clips'
        )


def test_several_devices_take_a_clip_each(folder):
    """The batch of a host's devices gives what one device gives, also when clips run out."""
    run, size = precompute.video_encoder(folder, False)
    assert size == jax.local_device_count() > 1
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, SIZE, SIZE, 3), np.uint8)
    alone = np.concatenate([run(p[None]) for p in pixels])
    np.testing.assert_allclose(
        run(pixels).astype(np.float32), alone.astype(np.float32), atol=2e-2, rtol=2e-2
    )


def bad_videos(root):
    """File name to (kind, whether it is used all the same, a word of the message)."""
    good = root / 'good.mp4'
    video._encode(str(good), panned(40, 64), 25, 'libx264', REPEATABLE)
    content = good.read_bytes()
    (root / 'folder.mp4').mkdir()
    (root / 'empty.mp4').write_bytes(b'')
    (root / 'text.mp4').write_text('not a video')
    (root / 'cut.mp4').write_bytes(content[: len(content) // 2])
    damage(good, root / 'damaged.mp4', 0.6)
    with wave.open(str(root / 'sound.wav'), 'wb') as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))
    Image.fromarray(panned(1, 64)[0]).save(root / 'picture.png')
    video.write_mp4(root / 'short.mp4', panned(4, 64), 25)
    turn(good, root / 'rotated.mp4')
    odd = Image.fromarray(panned(1, 65)[0])
    odd.save(
        root / 'odd.gif',
        save_all=True,
        append_images=[odd.rotate(i) for i in range(1, 40)],
        duration=40,
    )
    write_times(root / 'variable.mp4', panned(40, 64), [*range(20), *range(60, 80)])
    video.write_mp4(root / 'small.mp4', panned(40, 16), 25)
    return {
        'missing.mp4': ('missing', False, 'is not a file'),
        'folder.mp4': ('missing', False, 'is not a file'),
        'empty.mp4': ('unreadable', False, 'cannot be decoded'),
        'text.mp4': ('unreadable', False, 'cannot be decoded'),
        'cut.mp4': ('unreadable', False, 'of the 40 frames that its index lists'),
        'damaged.mp4': ('unreadable', False, 'replace or re-encode'),
        'sound.wav': ('unreadable', False, 'has no video stream'),
        'picture.png': ('short', False, '1 frames and 5 were asked for'),
        'short.mp4': ('short', False, '4 frames and 5 were asked for'),
        'rotated.mp4': ('rotated', True, 'turned by -90 degrees'),
        'odd.gif': ('odd size', True, '65x65'),
        'variable.mp4': ('variable rate', True, 'read at a constant'),
        'small.mp4': ('enlarged', True, '16x16 was scaled up to 32x32'),
        'good.mp4': ('manifest differs', True, 'says frames 400, not 40: the video file decides'),
    }


def test_bad_videos_are_counted_listed_and_left_out(tmp_path):
    """All of them in one manifest: the good rest is encoded."""
    expected = bad_videos(tmp_path)
    with (tmp_path / 'clips.csv').open('w', newline='') as file:
        csv.writer(file).writerows(
            [
                ('caption', 'path', 'num_frame'),
                *((f'about {n}', n, 400 if n == 'good.mp4' else '') for n in expected),
            ]
        )
    assert precompute.precompute(job(tmp_path / 'clips.csv', None), tmp_path / 'out')

    # The usable ones are in the data set, in their order.
    records = records_lib.Records(tmp_path / 'out')
    used = [name for name, (_, ok, _) in expected.items() if ok]
    paths = [records[i]['path'].decode() for i in range(len(records))]
    assert paths == [str(tmp_path / name) for name in used]

    # The report counts them, and lists every problem in a line of its own.
    text = (tmp_path / 'out/report.md').read_text()
    left_out = len(expected) - len(used)
    assert f'{len(used)} of {len(expected)} clips are in the data set; {left_out} are not' in text
    for name, (kind, ok, message) in expected.items():
        (line,) = (
            x
            for x in text.splitlines()
            if f'{tmp_path / name} ' in x and x.startswith(f'| {kind} ')
        )
        assert message in line and ('yes' in line.split('|')[2]) == ok, line

    # The summary counts the problems by kind.
    counts = collections.Counter(kind for kind, _, _ in expected.values())
    cells = [
        [c.strip() for c in x.split('|')[1:-1]] for x in text.splitlines() if x.startswith('| ')
    ]
    assert {c[0]: int(c[1]) for c in cells if len(c) == 3 and c[1].isdecimal()} == counts


def test_a_host_reads_only_its_rows(encoded, folder, monkeypatch):
    read = []
    real = records_lib.Records.__getitem__

    def observed(self, index):
        read.append(int(index))
        return real(self, index)

    monkeypatch.setattr(records_lib.Records, '__getitem__', observed)
    batches = batches_of(config_of(folder, encoded / 'stories'))
    batches(2, range(4))
    whole = list(read)
    assert len(whole) == 8

    read.clear()
    batches(2, [1, 3])
    assert read == whole[2:4] + whole[6:8]


def test_scenes_that_the_vae_cannot_code_are_listed(folder, videos, tmp_path):
    shots = [{'video': str(videos / '0.mp4'), 'caption': 'a', 'frames': n} for n in (6, 9)]
    (tmp_path / 'stories.json').write_text(json.dumps({'scenes': shots}))
    precompute.precompute(job(tmp_path / 'stories.json', folder), tmp_path / 'out')
    assert 'A scene of 6 frames cannot be coded' in (tmp_path / 'out/report.md').read_text()
    assert records_lib.Records(tmp_path / 'out').rows.tolist() == [(0, 1, 9)]
    with pytest.raises(ValueError, match='A scene of 6 frames cannot be coded'):
        precompute.precompute(job(tmp_path / 'stories.json', folder, frames=6), tmp_path / 'other')


# Batches.


def stories_of(batches, encoded, cfg, steps):
    """Records that the batches of these steps hold, found by their text."""
    records = records_lib.Records(encoded)
    text = np.stack([records[i]['text'].astype(np.float32) for i in range(len(records))])
    rows = range(cfg.train.batch_size)

    def record_of(scene):
        return int(np.flatnonzero((text == scene).all((1, 2)))[0])

    found = []
    for step in range(steps):
        _, batch = batches(step, rows)
        found.append([[record_of(scene) for scene in story] for story in batch['text']])
    return found


def test_consecutive_scenes_are_windows_of_a_story(encoded, folder):
    cfg = config_of(folder, encoded / 'stories')
    steps = stories_of(batches_of(cfg), encoded / 'stories', cfg, 30)
    seen = {tuple(story) for step in steps for story in step}
    assert seen == {(0, 1), (1, 2), (3, 4)}  # not across stories, nor over the scene of 9 frames

    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, layouts=((5, 9, 5), (9, 5))))
    batches = batches_of(cfg)
    shapes = [batches(step, [0])[1]['latents'].shape[1] for step in range(4)]
    assert shapes == [2 + 3 + 2, 3 + 2] * 2  # static by layout, which take turns


def test_unrelated_scenes_are_any_other_clips(encoded, folder):
    cfg = config_of(folder, encoded / 'clips', scenes='unrelated')
    steps = stories_of(batches_of(cfg), encoded / 'clips', cfg, 14)
    stories = [s for step in steps for s in step]
    assert all(len(set(s)) == 2 for s in stories)
    firsts = [s[0] for s in stories]
    # Every clip begins one example per epoch.
    assert all(sorted(firsts[i : i + 7]) == list(range(7)) for i in range(0, 56, 7))
    assert len({tuple(s) for s in stories}) > 20


def test_the_posterior_is_drawn_anew_every_time(encoded, folder):
    """Means and deviations over many epochs are those of the record."""
    cfg = config_of(folder, encoded / 'clips', scenes='unrelated', layouts=((5,),))
    batches, records = batches_of(cfg), records_lib.Records(encoded / 'clips')
    text = records[4]['text'].astype(np.float32)
    draws = np.stack(
        [
            x
            for step in range(350)
            for x, t in zip(*batches(step, range(4))[1].values())
            if (t[0] == text).all()
        ]
    )
    assert len(draws) == 200

    mean, logvar = np.split(records[4]['moments'].astype(np.float32), 2, -1)
    z = (draws / 0.7 - mean) / np.exp(0.5 * logvar)
    assert abs(z.mean()) < 0.02
    assert abs(z.std() - 1) < 0.02
    assert np.abs(z.mean(0)).max() < 0.4


def test_batches_are_a_function_of_the_step(encoded, folder):
    """Neither the batches read before nor the choice of rows changes a row."""
    cfg = config_of(folder, encoded / 'stories')
    whole = batches_of(cfg)
    later = [whole(step, range(4))[1] for step in range(6)][5]
    for rows in ([0, 1, 2, 3], [2, 3], [1]):
        part = batches_of(cfg)(5, rows)[1]
        for k in part:
            np.testing.assert_array_equal(part[k], later[k][rows])


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 255
    path.write_bytes(content)


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


BAD_DATA = {
    'not one': (lambda d: shutil.rmtree(d), {}, 'is not a data set of clips'),
    'unfinished': (
        lambda d: next(d.glob('*-00001-of-*')).unlink(),
        {},
        r'not finished \(1 of 3 parts are missing\)',
    ),
    'no description': (lambda d: (d / 'dataset_info.json').unlink(), {}, 'is not finished'),
    'index lost': (
        lambda d: (d / 'index-00001.json').unlink(),
        {},
        r'is damaged \(.*index-00001.json',
    ),
    'index damaged': (lambda d: (d / 'index-00002.json').write_text('{'), {}, 'is damaged'),
    'record damaged': (
        lambda d: flip(next(d.glob('*-00001-of-*')), 700),
        {},
        '-00001-of-00003 is damaged .*hash mismatch',
    ),
    'records cut off': (
        lambda d: cut(next(d.glob('*-00000-of-*')), 900),
        {},
        '-00000-of-00003 is damaged',
    ),
    'records of another': (
        lambda d: (d / 'index-00002.json').write_text('{"rows": [], "problems": []}'),
        {},
        'holds 7 records where its index has 6',
    ),
    'no such layout': (
        None,
        {'layouts': ((5, 5), (9, 9))},
        r'no consecutive scenes of \(9, 9\) frames; its clips are '
        r'6 of 5 frames, 1 of 9 frames in 2 stories',
    ),
    'too few to combine': (
        None,
        {'layouts': ((9, 9),), 'scenes': 'unrelated'},
        'no unrelated scenes of',
    ),
    'another size': (None, {'height_px': 64}, r'has moments \[4, 4, 8\].* asks for \[8, 4, 8\]'),
    'another VAE': (
        lambda d: (d / 'encode.json').write_text(
            (d / 'encode.json').read_text().replace('"vae": "', '"vae": "0')
        ),
        {},
        'was encoded with another VAE',
    ),
    'frames': (
        lambda d: (d / 'encode.json').write_text(
            (d / 'encode.json').read_text().replace('"store": "moments"', '"store": "frames"')
        ),
        {},
        'holds frames: encode the videos again',
    ),
}


@pytest.mark.parametrize('case', BAD_DATA)
def test_bad_data_sets_are_named(case, encoded, folder, tmp_path):
    spoil, changes, message = BAD_DATA[case]
    shutil.copytree(encoded / 'stories', tmp_path / 'data')
    cfg = config_of(folder, tmp_path / 'data')
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **changes))
    if spoil:
        spoil(tmp_path / 'data')
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        batches = batches_of(cfg)
        [batches(step, range(4)) for step in range(4)]


def test_training_on_clips_leaves_sheets_and_losses(encoded, folder, tmp_path):
    cfg = config_of(folder, encoded / 'stories')
    cfg = dataclasses.replace(
        cfg,
        optimizer=config_lib.OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
        train=config_lib.TrainConfig(
            batch_size=8, steps=3, conditional_probability=0.5, given='any', log_every_steps=1
        ),
        sample=config_lib.SampleConfig(steps=2, sheet_stories=4),
        eval=config_lib.EvalConfig(stories=8, batch_size=8),
        mesh=mesh_lib.MeshConfig(data=8, cpu_devices=8),
    )

    rows = trainer.train_and_evaluate(cfg, tmp_path / 'run')
    assert [(r['task'], r['frames']) for r in rows] == [('generated', '5+5'), ('extended', '5+5')]
    assert all(np.isfinite(r['loss']) for r in rows)
    assert rows[0]['loss'] != rows[1]['loss']
    assert len(list((tmp_path / 'run/sheets').glob('*.png'))) == 2

    # A finished run is scored again, at the same noise.
    assert trainer.train_and_evaluate(cfg, tmp_path / 'run') == rows


def test_held_out_losses_are_those_of_the_stories_whatever_the_batches(encoded, folder, tmp_path):
    """Batches of 1 to 4, on one and two devices: always the mean over four stories, each at
    its own noise and timestep."""
    cfg = config_of(folder, encoded / 'stories')
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype='float32'))
    codec = latent_codec.for_run(cfg, tmp_path)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: rng.normal(0, 0.2, p.shape).astype(np.float32), names.abstract_params(cfg.model)
    )

    def losses(batch_size, *axes):
        mesh = mesh_of(*axes)
        placed = jax.device_put(params, partitioning.shardings(params, mesh))
        config = dataclasses.replace(cfg, eval=config_lib.EvalConfig(4, batch_size))
        return [row['loss'] for row in validation.held_out_losses(config, placed, codec)]

    # Each story by itself.
    clips_of = encoded_clips.EncodedClips(cfg, codec.latent_shape, encoded / 'stories')
    frames = codec.latent_frames((5, 5))

    @jax.jit
    def story_loss(params, *inputs):
        return loss_lib.denoising_loss(dit.DiT(cfg.model), params, cfg.schedule, *inputs, frames)

    expected = []
    for num_given in (0, 1):
        errors = []
        for index, records in enumerate(clips_of.fixed((5, 5), 4)):
            example = clips_of.example(records, None)
            latents = example['latents'][None]
            noise = np.random.default_rng([cfg.seed, index]).standard_normal(
                latents.shape, np.float32
            )
            batch = {'latents': latents, 'text': example['text'][None]}
            given = np.arange(2)[None] < num_given
            total, count = story_loss(params, batch, noise, np.array([125 + 250 * index]), given)
            errors.append(total / count)
        expected.append(np.mean(errors))

    for arguments in ((1, 1), (2, 1), (4, 1), (3, 2)):
        np.testing.assert_allclose(losses(*arguments), expected, rtol=2e-5, err_msg=arguments)
