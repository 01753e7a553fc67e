"""Tensors in files: whatever is wrong with a file is one ValueError that names it; whatever is
right comes back."""

import json
import os
import pathlib
import struct
import tempfile

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, unlike_the_umask
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mask2dit_jax import tensor_io

SAFE = {'deadline': None, 'max_examples': 60}
TENSORS = {
    'a.weight': np.arange(12, dtype=np.float32).reshape(3, 4),
    'a.bias': np.ones(3, np.float16),
    'b': np.full((2, 2), 0.5, ml_dtypes.bfloat16),
}


def written(folder, tensors=TENSORS):
    save_file(tensors, folder / 'model.safetensors')
    return folder / 'model.safetensors'


def read_all(folder):
    tensors = tensor_io.open_safetensors(folder)
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def as_tensors(arrays):
    """Arrays as tensors that are read when they are asked for."""
    tensors = {}
    for name, value in arrays.items():
        tensors[name] = tensor_io.Tensor(value.shape, value.dtype, lambda value=value: value)
    return tensors


def file_of(header: bytes, data: bytes = b'') -> bytes:
    return struct.pack('<Q', len(header)) + header + data


def one_tensor(**changes) -> bytes:
    entry = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]} | changes
    return file_of(json.dumps({'a': entry}).encode(), bytes(8))


@pytest.mark.parametrize(
    'blob',
    [
        b'',
        b'1234567',
        file_of(b''),
        file_of(b'{'),
        file_of(b'[]'),
        file_of(b'[' * 100_000),
        file_of(b'\xff\xfe{}'),
        struct.pack('<Q', 2**63) + b'{}',
        struct.pack('<Q', 100) + b'{}',
        one_tensor(dtype='I64', shape=[1]),
        one_tensor(dtype='BOOL', shape=[8]),
        one_tensor(dtype='F8_E4M3', shape=[8]),
        one_tensor(dtype='X'),
        one_tensor(dtype='I64'),
        one_tensor(shape=[-2]),
        one_tensor(shape=[2**40, 2**40]),
        one_tensor(shape=[3]),
        one_tensor(data_offsets=[0, 2**62]),
        one_tensor(data_offsets=[8, 0]),
        one_tensor(data_offsets=[4, 12]),
        one_tensor(shape='2'),
        one_tensor(shape=None),
        one_tensor(data_offsets=[0]),
        file_of(  # two tensors that share their bytes
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
        ),
    ],
    ids=lambda blob: repr(blob[:60]),
)
def test_hostile_files_are_one_line_errors(tmp_path, blob):
    (tmp_path / 'bad.safetensors').write_bytes(blob)
    with pytest.raises(ValueError, match=r'bad\.safetensors') as error:
        read_all(tmp_path)
    assert '\n' not in str(error.value)


@settings(**SAFE)
@given(st.binary(max_size=200))
@example(b'\x02\0\0\0\0\0\0\0{}')
def test_random_bytes_are_an_error_that_names_the_file(blob):
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / 'x.safetensors').write_bytes(blob)
        try:
            assert read_all(folder) == {}  # an empty header is a file without tensors
        except ValueError as error:
            assert 'x.safetensors' in str(error)


@settings(**SAFE)
@given(st.data())
def test_damage_to_the_header_or_length_is_found(data):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        path = written(folder)
        blob = path.read_bytes()

        if data.draw(st.booleans(), 'cut'):
            path.write_bytes(blob[: data.draw(st.integers(0, len(blob) - 1), 'length')])
            with pytest.raises(ValueError, match=r'model\.safetensors'):
                read_all(folder)
            return

        (size,) = struct.unpack('<Q', blob[:8])
        place = data.draw(st.integers(0, 7 + size), 'place')
        value = data.draw(st.integers(0, 255), 'value')
        path.write_bytes(blob[:place] + bytes([value]) + blob[place + 1 :])
        try:
            have = read_all(folder)
        except ValueError as error:
            assert 'model.safetensors' in str(error)
            return

        # A header that can still be read is another one in good order, whose names and shapes
        # strict loading compares. No tensor turns to zeros: its bytes are those of the file.
        raw = blob[8 + size :]
        assert all(value.tobytes() in raw for value in have.values())


@settings(**SAFE)
@given(
    st.dictionaries(
        st.text(st.characters(codec='utf-8', exclude_characters='\0'), min_size=1, max_size=20),
        st.tuples(
            st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
            st.lists(st.integers(1, 4), max_size=4),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 200),
)
def test_what_is_written_comes_back(described, shard_bytes):
    described.pop('__metadata__', None)
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (dtype, shape) in described.items():
        arrays[name] = np.asarray(rng.normal(size=shape)).astype(dtype)

    with tempfile.TemporaryDirectory() as folder:
        tensor_io.write_safetensors(folder, 'model', as_tensors(arrays), shard_bytes)
        have = read_all(folder)
    assert have.keys() == arrays.keys()
    for name, value in arrays.items():
        assert have[name].dtype == value.dtype
        np.testing.assert_array_equal(have[name], value)


def test_folders_that_lack_something(tmp_path):
    with pytest.raises(FileNotFoundError, match='is not a folder'):
        tensor_io.open_safetensors(tmp_path / 'none')
    with pytest.raises(FileNotFoundError, match=r'lacks a \.safetensors file'):
        tensor_io.open_safetensors(tmp_path)

    (tmp_path / 'pytorch_model.bin').write_bytes(b'')
    message = r'pickled weights \(pytorch_model.bin\).*safe_serialization=True'
    with pytest.raises(ValueError, match=message):
        tensor_io.open_safetensors(tmp_path)


def test_a_tensor_in_two_files_is_named(tmp_path):
    written(tmp_path)
    (tmp_path / 'pytorch_model.bin').write_bytes(b'')  # pickled weights beside them do not matter
    save_file({'b': np.zeros(1, np.float32)}, tmp_path / 'other.safetensors')
    with pytest.raises(ValueError, match=r'has b in two files, one of them other\.safetensors'):
        tensor_io.open_safetensors(tmp_path)


def test_indexed_files(tmp_path):
    tensor_io.write_safetensors(tmp_path, 'model', as_tensors(TENSORS), shard_bytes=50)
    assert sorted(read_all(tmp_path)) == sorted(TENSORS)

    index = tmp_path / 'model.safetensors.index.json'
    listed = json.loads(index.read_text())
    more = listed['weight_map'] | {'c': 'model-00001-of-00002.safetensors'}
    index.write_text(json.dumps(listed | {'weight_map': more}))
    with pytest.raises(ValueError, match='lacks tensors that its index lists: c'):
        tensor_io.open_safetensors(tmp_path)

    (tmp_path / 'model-00002-of-00002.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match=r'lacks model-00002-of-00002\.safetensors'):
        tensor_io.open_safetensors(tmp_path)

    index.write_text('{')
    with pytest.raises(ValueError, match=r'index\.json is not an index'):
        tensor_io.open_safetensors(tmp_path)


def leaf(value, stacked):
    slices = value if stacked else [value]
    parts = tuple(lambda part=part: part for part in slices)
    return tensor_io.Leaf(value.shape, value.dtype, parts, stacked)


def test_orbax_written_part_by_part_is_an_ordinary_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        'blocks': {'kernel': rng.normal(size=(3, 4, 5)).astype(ml_dtypes.bfloat16)},
        'bias': np.float32([1, 2]),
    }
    leaves = {
        'blocks': {'kernel': leaf(tree['blocks']['kernel'], True)},
        'bias': leaf(tree['bias'], False),
    }
    tensor_io.write_orbax(tmp_path / 'params', leaves)

    # All of it by Orbax, and a slice by TensorStore.
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
    restored = tensor_io.restore_orbax(tmp_path / 'params', target)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)
    stores = tensor_io.open_orbax(tmp_path / 'params')
    layer = stores['blocks', 'kernel'][1].read().result()
    np.testing.assert_array_equal(layer, tree['blocks']['kernel'][1])

    # Another target is refused, with all that differs.
    other = {
        'blocks': {'kernel': jax.ShapeDtypeStruct((3, 4, 4), np.float32, sharding=sharding)},
        'extra': target['bias'],
    }
    message = r'missing extra; unexpected bias; blocks/kernel has shape \(3, 4, 5\)'
    with pytest.raises(ValueError, match=message):
        tensor_io.restore_orbax(tmp_path / 'params', other)


def test_damaged_orbax_is_named(tmp_path):
    with pytest.raises(ValueError, match='params is not a complete Orbax checkpoint'):
        tensor_io.open_orbax(tmp_path / 'params')

    tensor_io.write_orbax(tmp_path / 'params', {'bias': leaf(np.float32([1, 2]), False)})
    (tmp_path / 'params/_METADATA').unlink()
    with pytest.raises(ValueError, match='params is not a complete Orbax checkpoint'):
        tensor_io.open_orbax(tmp_path / 'params')


def test_a_file_that_is_cut_after_it_was_opened_is_named(tmp_path):
    path = written(tmp_path)
    tensors = tensor_io.open_safetensors(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r'model\.safetensors changed while it was read'):
        np.asarray(tensors['a.weight'])


@pytest.mark.parametrize('umask', [0o022, 0o007, 0o077])
def test_files_are_as_readable_as_the_umask_says(umask, tmp_path):
    before = os.umask(umask)
    try:
        tensor_io.write_safetensors(tmp_path / 'one', 'model', TENSORS)
        tensor_io.write_safetensors(tmp_path / 'many', 'model', TENSORS, shard_bytes=1)
        tensor_io.write_file(tmp_path / 'file.safetensors', TENSORS, {'format': 'pt'})
        tensor_io.write_file(tmp_path / 'file.safetensors', TENSORS)  # in the place of the first
        assert unlike_the_umask(tmp_path) == {}
    finally:
        os.umask(before)

    # Nothing temporary is left, and what is there is whole.
    assert all(path.suffix in ('.safetensors', '.json', '') for path in tmp_path.rglob('*'))
    for folder in ('one', 'many'):
        found = read_all(tmp_path / folder)
        assert found.keys() == TENSORS.keys()
        jax.tree.map(np.testing.assert_array_equal, found, TENSORS)


def test_all_of_the_package_writes_tensors_by_the_one_function():
    callers = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / 'mask2dit_jax').rglob('*.py')
        if 'save_file(' in path.read_text(encoding='utf-8')
    }
    assert callers == {'mask2dit_jax/tensor_io.py'}


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    'error, is_damage',
    [
        (FileNotFoundError(2, 'No such file'), True),
        (json.JSONDecodeError('bad', 'x', 0), True),
        (KeyError('checksums'), True),
        (ValueError('DATA_LOSS: checksum mismatch'), True),
        (ValueError("NOT_FOUND: gone [os_error_code='2']"), True),
        (caused(Exception('array'), ValueError('OUT_OF_RANGE: cut off')), True),
        (OSError(24, 'Too many open files'), False),
        (PermissionError(13, 'Permission denied'), False),
        (TimeoutError(110, 'Timed out'), False),
        (OSError(116, 'Stale file handle'), False),
        (OSError('no number'), False),
        (MemoryError(), False),
        (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory'), False),
        (ValueError('RESOURCE_EXHAUSTED: too many requests'), False),
        (ValueError("UNKNOWN: failed to open [os_error_code='5']"), False),
        (caused(Exception('array'), ValueError("UNKNOWN: x [os_error_code='24']")), False),
        (caused(ValueError('not complete'), OSError(5, 'Input/output error')), False),
        (Exception('says nothing'), False),
    ],
)
def test_what_is_damage_and_what_may_pass(error, is_damage):
    assert tensor_io.is_damage(error) == is_damage


def test_a_file_that_cannot_be_opened_now_is_not_called_damaged(tmp_path):
    (tmp_path / 'a.safetensors').symlink_to('a.safetensors')  # too many levels of links
    with pytest.raises(OSError, match='Too many levels'):
        tensor_io.open_file(tmp_path / 'a.safetensors')

    (tmp_path / '_METADATA').symlink_to('/proc/self/mem')  # whoever reads it gets EIO
    with pytest.raises(OSError, match='Input/output error'):
        tensor_io.open_orbax(tmp_path)
