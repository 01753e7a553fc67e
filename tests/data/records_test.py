"""Data sets are opened by their index alone, read with few open files, and damage is told from
errors of the system."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import child_environment

from mask2dit_jax.data import records as records_lib


def settings_of(parts):
    return {
        'kind': 'multi_scene',
        'store': 'frames',
        'height_px': 2,
        'width_px': 2,
        'folder': 'models/a',
        'parts': parts,
    }


def write(folder, parts, clips_per_part=1):
    """A data set whose clip i is one frame of the colour i."""
    settings = settings_of(parts)
    records_lib.write_settings(folder, settings)
    for part in range(parts):
        numbers = range(part * clips_per_part, (part + 1) * clips_per_part)
        records_lib.write_part(folder, settings, part, map(example, numbers), [])
    records_lib.write_info(folder, settings)
    return folder


def example(number):
    video = np.full((1, 2, 2, 3), number % 256, np.uint8)
    return {
        'story': number // 3,
        'scene': number % 3,
        'frames': 1,
        'caption': f'clip {number}',
        'path': '',
        'video': video,
    }


def run(code, *args):
    """Runs Python code in a process of its own, whose limits it may lower."""
    done = subprocess.run(
        [sys.executable, '-c', code, *map(str, args)],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope='module')
def many_parts(tmp_path_factory):
    return write(tmp_path_factory.mktemp('data') / 'many', 150)


FEW_DESCRIPTORS = """
import os, resource, sys
import numpy as np
from mask2dit_jax.data import records
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))

before = len(os.listdir('/proc/self/fd'))
train, held_out = records.Records(sys.argv[1]), records.Records(sys.argv[1])
for i in np.random.default_rng(0).permutation(300) % 150:
    for data in (train, held_out):
        assert data[i]['caption'] == f'clip {i}'.encode()
left = len(os.listdir('/proc/self/fd')) - before
assert left <= 55, left
"""


def test_more_parts_than_the_process_may_open_files(many_parts):
    run(FEW_DESCRIPTORS, many_parts)


NO_DESCRIPTORS = """
import resource, sys, threading
from mask2dit_jax.data import records
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))

def use_all():
    held = []
    try:
        while True:
            held.append(open('/dev/null'))
    except OSError:
        return held

def refused(action):
    try:
        action()
    except OSError as error:
        assert 'Too many open files' in str(error), error
        assert 'damaged' not in str(error) and 'delete' not in str(error), error
    else:
        raise AssertionError('not refused')

data = records.Records(sys.argv[1])
held = use_all()
refused(lambda: data[3])
refused(lambda: records.Records(sys.argv[1]))

# It passes: a later try of the same read succeeds.
threading.Timer(0.05, held.clear).start()
assert data[3]['caption'] == b'clip 3'

# Parts that were open make room for the one that is needed.
[data[i] for i in range(10)]
held = use_all()
assert data[20]['caption'] == b'clip 20'
"""


def test_no_file_left_to_open_is_no_damage(many_parts):
    run(NO_DESCRIPTORS, many_parts)


OPENED = """
import sys
from mask2dit_jax.data import records
opened = []
sys.addaudithook(lambda event, args: event == 'open' and opened.append(args[0]))
records.Records(sys.argv[1])
ours = [path for path in opened if str(path).startswith(sys.argv[1])]
assert 0 < len(ours) < 10, ours
"""


def test_opening_reads_no_file_per_part(many_parts):
    run(OPENED, many_parts)


def test_commands_may_open_as_many_files_as_the_system_allows():
    run("""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 500))
from mask2dit_jax import logs
logs.quiet_libraries()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (500, 500)
""")


def test_tfds_reads_what_is_there(tmp_path):
    write(tmp_path, 3, 4)
    source = tfds.builder_from_directory(str(tmp_path)).as_data_source('train')
    data = records_lib.Records(tmp_path)
    assert len(source) == len(data) == 12
    for i in range(12):
        assert source[i]['caption'] == data[i]['caption'] == f'clip {i}'.encode()
        np.testing.assert_array_equal(source[i]['video'], data[i]['video'])
        assert data.rows[i].item() == (i // 3, i % 3, 1)


def test_parts_without_records(tmp_path):
    settings = settings_of(4)
    records_lib.write_settings(tmp_path, settings)
    for part, numbers in enumerate([[], [0, 1], [], [2]]):
        records_lib.write_part(tmp_path, settings, part, map(example, numbers), [])
    records_lib.write_info(tmp_path, settings)
    data = records_lib.Records(tmp_path)
    assert [data[i]['caption'] for i in range(3)] == [b'clip 0', b'clip 1', b'clip 2']


def test_a_data_set_without_records_says_so(tmp_path):
    settings = settings_of(2)
    records_lib.write_settings(tmp_path, settings)
    for part in range(2):
        records_lib.write_part(tmp_path, settings, part, [], [])
    records_lib.write_info(tmp_path, settings)
    with pytest.raises(ValueError, match=r'is empty: see report\.md'):
        records_lib.Records(tmp_path)


# Fingerprints.


def as_before_index_npy(folder):
    """Makes a data set what it was when the index of its parts was all there was."""
    (folder / 'index.npy').unlink()
    path = folder / 'dataset_info.json'
    info = json.loads(path.read_text())
    description = json.loads(info['description'])
    del description['index']
    path.write_text(json.dumps(info | {'description': json.dumps(description)}))


def test_an_old_data_set_keeps_the_fingerprint_that_its_runs_know(tmp_path):
    settings = settings_of(2)
    records_lib.write_settings(tmp_path, settings)
    for part, count in enumerate([3, 1]):
        records_lib.write_part(tmp_path, settings, part, map(example, range(count)), [])
    records_lib.write_info(tmp_path, settings)
    as_before_index_npy(tmp_path)

    rows = [[0, 0, 1], [0, 1, 1], [0, 2, 1], [0, 0, 1]]
    text = json.dumps([settings | {'folder': ''}, rows])
    data = records_lib.Records(tmp_path)
    assert data.fingerprint == hashlib.sha256(text.encode()).hexdigest()
    assert data[3]['caption'] == b'clip 0'


def test_an_old_fingerprint_of_many_rows(tmp_path):
    settings = settings_of(1)
    records_lib.write_settings(tmp_path, settings)
    records_lib.write_part(tmp_path, settings, 0, [], [])
    rows = np.zeros(140_000, records_lib.ROW_DTYPE)
    rows['story'] = np.arange(len(rows))
    (tmp_path / 'index-00000.json').write_text(json.dumps({'rows': rows.tolist(), 'problems': []}))
    records_lib.write_info(tmp_path, settings)
    as_before_index_npy(tmp_path)

    text = json.dumps([settings | {'folder': ''}, rows.tolist()])
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert records_lib.Records(tmp_path).fingerprint == expected


def test_the_fingerprint_is_that_of_settings_and_rows(tmp_path):
    def fingerprint(name, count=3, first=0, **settings):
        settings = settings_of(1) | settings
        folder = tmp_path / name
        records_lib.write_settings(folder, settings)
        records_lib.write_part(folder, settings, 0, map(example, range(first, count)), [])
        records_lib.write_info(folder, settings)
        return records_lib.Records(folder).fingerprint

    same = fingerprint('a')
    assert fingerprint('b') == same
    assert fingerprint('c', folder='models/mounted/elsewhere') == same
    others = [fingerprint('d', 4), fingerprint('e', 4, 1), fingerprint('f', seed=1)]
    assert len({same, *others}) == 4


# Damage.


def overwrite(path, at, content):
    with path.open('r+b') as file:
        file.seek(at)
        file.write(content)


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


DAMAGE = {
    'index lost': (lambda d: (d / 'index.npy').unlink(), r'index\.npy is damaged'),
    'index cut off': (lambda d: cut(d / 'index.npy', 150), r'index\.npy is damaged'),
    'index empty': (lambda d: cut(d / 'index.npy', 0), r'index\.npy is damaged'),
    'index changed': (
        lambda d: overwrite(d / 'index.npy', 200, b'x'),
        r'index\.npy is damaged \(checksum\): delete it, and run the same',
    ),
    'description cut off': (
        lambda d: cut(d / 'dataset_info.json', 100),
        r'dataset_info\.json is damaged',
    ),
    'settings cut off': (
        lambda d: cut(d / 'encode.json', 20),
        r'encode\.json is damaged .* put back a copy',
    ),
    'records cut off': (
        lambda d: cut(next(d.glob('*-00001-of-*')), 900),
        r'-00001-of-00003 is damaged .*: delete it, and run the same',
    ),
    'records empty': (lambda d: cut(next(d.glob('*-00001-of-*')), 0), '-00001-of-00003 is damaged'),
    'records lost at the end': (
        lambda d: overwrite(next(d.glob('*-00001-of-*')), 65560, b'\0' * 40),
        '-00001-of-00003 is damaged',
    ),
    'records changed': (
        lambda d: overwrite(next(d.glob('*-00001-of-*')), 110, b'\xff\0\xff'),
        '-00001-of-00003 is damaged .*hash mismatch',
    ),
    'other records': (
        lambda d: (
            records_lib.write_part(d, settings_of(3), 1, map(example, (8, 9)), [])
            and records_lib.write_index(
                d, settings_of(3), records_lib.Records(d.parent / 'a').rows, [2] * 3
            )
        ),
        'holds another record than the index',
    ),
}


@pytest.mark.parametrize('case', DAMAGE)
def test_damage_is_named(case, tmp_path):
    spoil, message = DAMAGE[case]
    write(tmp_path / 'a', 3, 2)
    write(tmp_path / 'b', 3, 2)
    spoil(tmp_path / 'b')
    with pytest.raises(ValueError, match=message):
        data = records_lib.Records(tmp_path / 'b')
        [data[i] for i in range(6)]


def test_a_part_that_is_replaced_leaves_the_data_set_unfinished(tmp_path):
    write(tmp_path, 3, 2)
    opened = records_lib.Records(tmp_path)
    records_lib.write_part(tmp_path, settings_of(3), 1, map(example, (7, 8)), [])
    with pytest.raises(ValueError, match=r'is not finished \(0 of 3 parts are missing\)'):
        records_lib.Records(tmp_path)
    with pytest.raises(ValueError, match='if encode has written to it meanwhile, start again'):
        opened[2]


def test_records_of_unknown_settings_are_not_continued(tmp_path):
    write(tmp_path, 2)
    (tmp_path / 'encode.json').unlink()
    with pytest.raises(ValueError, match=r'no encode\.json that says how they were made'):
        records_lib.write_settings(tmp_path, settings_of(2))
