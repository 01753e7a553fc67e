"""Videos become data sets and batches, on a tiny random model folder.

The tests say what is kept, what is refused, and what continues after a kill.
"""

import collections
import csv
import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import wave

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import (
    child_environment,
    damage,
    mesh_of,
    moving,
    panned,
    turn,
    unlike_the_umask,
    write_times,
)
from PIL import Image

from mask2dit_jax import checkpoint, storage
from mask2dit_jax import config as config_lib
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import clips, encoded_clips, latent_codec, precompute, video
from mask2dit_jax.data import manifest as manifest_lib
from mask2dit_jax.data import records as records_lib
from mask2dit_jax.diffusion import loss as loss_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.layout import frame_scenes
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


def test_a_run_continues_on_the_same_data_alone(encoded, folder, tmp_path):
    """Another layout or another data set is named by its settings; a data set may move."""

    def meta(where, **kwargs):
        cfg = config_of(folder, where, **kwargs)
        return trainer._run_meta(cfg, batches_of(cfg))

    before = json.loads(json.dumps(meta(encoded / 'stories')))
    checkpoint_folder = tmp_path / 'checkpoints/6'
    shutil.copytree(encoded / 'stories', tmp_path / 'moved')
    checkpoint._check_same_run(checkpoint_folder, before, meta(tmp_path / 'moved'))

    for now, named in (
        (meta(encoded / 'stories', layouts=((5,),)), ['data.layouts ([[5, 5]], now [[5]])']),
        (
            meta(encoded / 'clips', scenes='unrelated'),
            ['data.scenes (consecutive, now unrelated)', 'encoded.kind (multi_scene, now single'],
        ),
    ):
        with pytest.raises(checkpoint.OtherRunError) as raised:
            checkpoint._check_same_run(checkpoint_folder, before, now)
        assert all(name in str(raised.value) for name in named)


def test_data_sets_are_as_readable_as_new_files(encoded):
    assert unlike_the_umask(encoded) == {}


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


# What another value of each field of a job is called in the settings. Places do not count.
SETTINGS = {
    'manifest': ('manifest', lambda work: changed_manifest(work)),
    'root': ('root', lambda work: {'root': '/elsewhere'}),
    'folder': ('vae_weights', lambda work: changed_weights(work)),
    'frames': ('frames', lambda work: {'frames': 9}),
    'height_px': ('height_px', lambda work: {'height_px': 64}),
    'width_px': ('width_px', lambda work: {'width_px': 64}),
    'stride': ('stride', lambda work: {'stride': 2}),
    'windows': ('windows', lambda work: {'windows': 2}),
    'seed': ('seed', lambda work: {'seed': 1}),
    'store': ('store', lambda work: {'store': 'frames'}),
    'tiling': ('tiling', lambda work: {'tiling': True}),
    'dtype': ('dtype', lambda work: {'dtype': 'bfloat16'}),
    'part_clips': ('part_clips', lambda work: {'part_clips': 4}),
}


def changed_manifest(work):
    path = work / 'clips.csv'
    path.write_text(path.read_text().replace('shot 3', 'another caption'))
    return {}


def changed_weights(work, network='vae'):
    """The same network with another number in its weights."""
    path = next((work / 'tiny' / network).glob('*.safetensors'))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return {}


@pytest.fixture
def work(folder, videos, encoded, tmp_path):
    """A copy of a manifest, its networks and its data set, in one folder."""
    for source in (folder, encoded / 'clips'):
        shutil.copytree(source, tmp_path / source.name)
    shutil.copy(videos / 'clips.csv', tmp_path)
    return tmp_path


@pytest.mark.parametrize('field', [field.name for field in dataclasses.fields(precompute.Job)])
def test_every_setting_must_stay(field, work, videos):
    setting, change = SETTINGS[field]
    before = records_lib.read_settings(work / 'clips').get(setting)
    own = {'root': str(videos)} | change(work)
    changed = job(work / 'clips.csv', work / 'tiny', **own)
    now = precompute.plan(changed).settings.get(setting)

    message = (
        rf'begun with another .*\b{setting}\b.*: use the same to continue it, or another --out'
    )
    with pytest.raises(ValueError, match=message) as caught:
        precompute.precompute(changed, work / 'clips')
    assert before != now
    assert f'{setting} was {before} and is {now} now' in str(caught.value)
    assert 'manifest was' not in str(caught.value) or field == 'manifest'


@pytest.mark.parametrize('network', ['text_encoder', 'tokenizer'])
def test_other_networks_do_not_go_on(network, work, videos):
    if network == 'tokenizer':
        (work / 'tiny/tokenizer/more.json').write_text('{}')
    else:
        changed_weights(work, network)
    same = job(work / 'clips.csv', work / 'tiny', root=str(videos))
    with pytest.raises(ValueError, match=f'begun with another {network}[a-z_]*: use the same'):
        precompute.precompute(same, work / 'clips')


def test_networks_may_be_mounted_elsewhere(work, videos):
    assert precompute.precompute(
        job(work / 'clips.csv', work / 'tiny', root=str(videos)), work / 'clips'
    )


def test_parts_by_default_are_neither_many_nor_huge(folder, videos):
    clip_bytes = 2 * 13 * 60 * 90 * 32
    assert precompute._default_part_clips(7, clip_bytes) == 1
    assert precompute._default_part_clips(640, clip_bytes) == 10
    assert 1e9 < precompute._default_part_clips(10**7, clip_bytes) * clip_bytes < 2e9
    assert precompute._default_part_clips(10**7, 10**10) == 1
    settings = precompute.plan(job(videos / 'clips.csv', folder, part_clips=None)).settings
    assert (settings['part_clips'], settings['parts']) == (1, 7)


# Clips that come later.


def test_a_mended_clip_gets_its_place(folder, videos, tmp_path):
    """The same command makes what it would have made, had all clips been there from the start."""
    shutil.copytree(videos, tmp_path / 'videos')
    work, out = job(tmp_path / 'videos/stories.json', folder), tmp_path / 'out'
    missing, broken = tmp_path / 'videos/4.mp4', tmp_path / 'videos/0.mp4'
    missing.unlink()
    damage(broken, broken, 0.3)
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])

    assert precompute.precompute(work, out)
    before = records_lib.Records(out)
    assert len(before) == 5
    kept = next(out.glob('*-00002-of-00003'))
    untouched = kept.stat().st_mtime_ns

    # Nothing is mended: nothing changes, but what is wrong is told as it is now.
    missing.write_text('no video')
    index = next(out.glob('*-00001-of-00003')).stat().st_mtime_ns
    assert precompute.precompute(work, out)
    assert records_lib.Records(out).fingerprint == before.fingerprint
    assert next(out.glob('*-00001-of-00003')).stat().st_mtime_ns == index
    report = (out / 'report.md').read_text()
    assert 'unreadable' in report and 'missing' not in report

    for path in (missing, broken):
        shutil.copy(videos / path.name, path)
    assert precompute.precompute(work, out)
    mended = records_lib.Records(out)
    assert mended.fingerprint != before.fingerprint
    assert kept.stat().st_mtime_ns == untouched
    assert '7 of 7 clips are in the data set; 0 are not' in (out / 'report.md').read_text()
    assert 'unreadable' not in (out / 'report.md').read_text()

    assert precompute.precompute(work, tmp_path / 'at_once')
    assert_same_records(mended, records_lib.Records(tmp_path / 'at_once'))


def assert_same_records(found, expected):
    np.testing.assert_array_equal(found.rows, expected.rows)
    assert found.fingerprint == expected.fingerprint
    for i in range(len(expected)):
        for key in expected[i]:
            np.testing.assert_array_equal(found[i][key], expected[i][key])


def test_a_clip_that_is_usable_in_part_is_not_encoded_again_and_again(tmp_path):
    """The damage lies in some of its windows, and stays."""
    good = tmp_path / 'good.mp4'
    video._encode(str(good), panned(40, 64), 25, 'libx264', REPEATABLE)
    damage(good, tmp_path / '0.mp4', 0.6)
    (tmp_path / 'clips.csv').write_text('caption,path\na,0.mp4\n')
    work = job(tmp_path / 'clips.csv', None, windows=12, stride=1)
    assert precompute.precompute(work, tmp_path / 'out')
    before = records_lib.Records(tmp_path / 'out')
    assert 0 < len(before) < 12

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').glob('*-of-*')}
    assert precompute.precompute(work, tmp_path / 'out')
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_all_clips_missing(folder, videos, tmp_path):
    shutil.copy(videos / 'clips.csv', tmp_path)
    work = job(tmp_path / 'clips.csv', None, windows=2)
    assert precompute.precompute(work, tmp_path / 'out')
    with pytest.raises(ValueError, match=r'is empty: see report\.md'):
        records_lib.Records(tmp_path / 'out')
    assert '0 of 14 clips are in the data set' in (tmp_path / 'out/report.md').read_text()

    for i in (2, 6):
        shutil.copy(videos / f'{i}.mp4', tmp_path)
    assert precompute.precompute(work, tmp_path / 'out')
    assert records_lib.Records(tmp_path / 'out').rows['story'].tolist() == [4, 5, 12, 13]


def test_an_index_that_was_damaged_has_its_part_encoded_anew(encoded, folder, videos, tmp_path):
    shutil.copytree(encoded / 'stories', tmp_path / 'out')
    (tmp_path / 'out/index-00001.json').write_text('{"rows": [[')
    (tmp_path / 'out/index.npy').unlink()
    assert precompute.precompute(job(videos / 'stories.json', folder), tmp_path / 'out')
    assert_same_records(
        records_lib.Records(tmp_path / 'out'), records_lib.Records(encoded / 'stories')
    )


NO_DESCRIPTORS = """
import resource, sys
from mask2dit_jax.data import clips, precompute
job = precompute.Job(sys.argv[1], None, None, 5, 32, 32, store='frames')
planned = precompute.plan(job)
item = planned.windows[0]
clips.cut(item.clip, item.window, job, 'single_scene', int)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
held = []
try:
    while True:
        held.append(open('/dev/null'))
except OSError:
    pass
try:
    clips.cut(item.clip, item.window, job, 'single_scene', int)
except OSError as error:
    assert 'Too many open files' in str(error)
else:
    raise AssertionError('a whole video was left out')
"""


def test_no_file_left_to_open_is_no_fault_of_a_video(videos):
    done = subprocess.run(
        [sys.executable, '-c', NO_DESCRIPTORS, str(videos / 'clips.csv')],
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# One process for every share.


def test_a_share_has_one_process(videos, tmp_path):
    work, out = job(videos / 'clips.csv', None), tmp_path / 'out'
    for share in ('0-of-2', '0-of-1', '2-of-3'):
        refused = pytest.raises(storage.ClaimedError, match='is being written by process')
        with storage.claim(out / 'workers' / share), refused:
            precompute.precompute(work, out, 0, 2)
        assert not list(out.glob('*array_record*'))

    with storage.claim(out / 'workers/1-of-2'):
        assert not precompute.precompute(work, out, 0, 2)
    assert precompute.precompute(work, out, 1, 2)
    assert not (out / 'workers').exists()


def test_what_a_killed_process_left_of_its_share_does_not_stop_others(videos, tmp_path):
    owner = {'host': socket.gethostname(), 'pid': 1, 'started': 'x 1', 'token': 'a'}
    for share in ('workers/0-of-1', 'workers/5-of-8', '.'):
        (tmp_path / share).mkdir(parents=True, exist_ok=True)
        (tmp_path / share / storage.OWNER_FILE).write_text(json.dumps(owner))
    assert precompute.precompute(job(videos / 'clips.csv', None), tmp_path)
    assert not (tmp_path / 'workers').exists()


def test_nothing_else_is_left(encoded):
    for data in ('clips', 'stories'):
        names = {path.name for path in (encoded / data).iterdir()}
        kind = {'clips': 'single_scene', 'stories': 'multi_scene'}[data]
        parts = {f'{kind}-train.array_record-0000{i}-of-00003' for i in range(3)}
        assert names == parts | {
            'dataset_info.json',
            'encode.json',
            'features.json',
            'index-00000.json',
            'index-00001.json',
            'index-00002.json',
            'index.npy',
            'null_text.safetensors',
            'report.md',
        }


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
            for batch in (batches(step, range(4))[1] for step in range(350))
            for x, t in zip(batch['latents'], batch['text'])
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
    'index lost': (lambda d: (d / 'index.npy').unlink(), {}, r'index.npy is damaged'),
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

    # Other data would not continue the run.
    changes = {'encoded': str(encoded / 'clips'), 'scenes': 'unrelated'}
    other = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **changes))
    with pytest.raises(checkpoint.OtherRunError, match='was trained with another data'):
        trainer.train_and_evaluate(other, tmp_path / 'run')


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
            given = (frame_scenes(frames) < num_given)[None]  # [B, T]
            t = np.where(given, 0, 125 + 250 * index)
            total, count = story_loss(params, batch, noise, t, given)
            errors.append(total / count)
        expected.append(np.mean(errors))

    for arguments in ((1, 1), (2, 1), (4, 1), (3, 2)):
        np.testing.assert_allclose(losses(*arguments), expected, rtol=2e-5, err_msg=arguments)
