"""Damaged checkpoints are noticed, named and passed over; checksums do not depend on the mesh; the
right checkpoints are kept."""

import json
import logging
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TESTS, child_environment
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from mask2dit_jax import checkpoint
from mask2dit_jax.training import train_step


def state_of(step):
    rng = np.random.default_rng(step)
    params = {
        'a': {'kernel': jnp.asarray(rng.standard_normal((64, 8, 16)), jnp.float32)},
        'b': jnp.asarray(rng.standard_normal(40), jnp.float32),
    }
    ema = jax.tree.map(lambda x: x + 1, params)
    opt_state = [jnp.int32(step), jax.tree.map(lambda x: x * 2, params)]
    return train_step.TrainState(jnp.int32(step), params, ema, opt_state)


def targets(*items):
    """Targets on one device for these items, or for all."""
    sharding = SingleDeviceSharding(jax.devices()[0])

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    found = {}
    for item in items or checkpoint.ITEMS:
        tree = getattr(state_of(0), checkpoint.ITEMS[item])
        found[item] = jax.tree.map(abstract, tree)
    return found


def save(workdir, *steps, start=0, keep=10, keep_every=0):
    manager = checkpoint.manager(workdir, keep, keep_every, start)
    for step in steps:
        checkpoint.save(manager, step, state_of(step), {'seed': 1})
    checkpoint.finish(manager)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('saved')
    save(workdir, 2, 4, 6)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(saved, tmp_path / 'run')
    return tmp_path / 'run'


def largest(folder):
    files = (path for path in folder.rglob('*') if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def empty(folder):
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


DAMAGES = {
    'truncated': lambda folder: truncate(largest(folder / 'opt')),
    'file missing': lambda folder: largest(folder / 'ema').unlink(),
    'item missing': lambda folder: shutil.rmtree(folder / 'params'),
    'empty': empty,
    'meta is garbage': lambda folder: (folder / 'meta/metadata').write_text('{"seed": 1, "chec'),
    'meta has no checksums': lambda folder: (folder / 'meta/metadata').write_text('{"seed": 1}'),
    'meta is not an object': lambda folder: (folder / 'meta/metadata').write_text('[]'),
    'structure is garbage': lambda folder: (folder / 'params/_METADATA').write_text('nonsense'),
    'bit of the parameters': lambda folder: flip_a_bit(largest(folder / 'params')),
    'bit of the optimizer': lambda folder: flip_a_bit(largest(folder / 'opt')),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_saved_again(workdir, damage, caplog):
    broken = workdir / 'checkpoints/6'
    DAMAGES[damage](broken)

    # The checkpoint before is read, and the log says why.
    with caplog.at_level(logging.WARNING, logger='absl'):
        path, items = checkpoint.latest(workdir, targets(), {'seed': 1})
    assert path == workdir / 'checkpoints/4'
    for item, field in checkpoint.ITEMS.items():
        expected = getattr(state_of(4), field)
        jax.tree.map(np.testing.assert_array_equal, items[item], expected)
    messages = [record.getMessage() for record in caplog.records]
    assert any(str(broken) in message and 'is damaged' in message for message in messages)

    # Its step is free again.
    save(workdir, 6, start=4)
    assert checkpoint.latest(workdir, targets(), {'seed': 1})[0] == broken
    assert (workdir / 'checkpoints/6.damaged').is_dir()
    assert [int(path.name) for path in checkpoint.folders(workdir)] == [2, 4, 6]


def test_damaged_folders_are_kept_boundedly(tmp_path):
    for _ in range(4):
        save(tmp_path, 2, 4, keep=2)  # start=0: what is there has been found damaged
    names = sorted(path.name for path in (tmp_path / 'checkpoints').iterdir())
    assert names == ['2', '4', '4.damaged1', '4.damaged2']


# Who reads the link's target gets EIO; a link to itself is ELOOP.
@pytest.mark.parametrize(
    'name, target, message',
    [
        ('meta/metadata', '/proc/self/mem', 'Input/output error'),
        ('params/_METADATA', '/proc/self/mem', 'Input/output error'),
        ('ema/manifest.ocdbt', 'manifest.ocdbt', 'Too many levels of symbolic links'),
    ],
)
def test_an_error_that_may_pass_is_no_damage(workdir, name, target, message, monkeypatch, caplog):
    """The newest checkpoint lies on a disk that gives errors, once or for good."""
    monkeypatch.setattr(checkpoint, 'RETRY_SECONDS', (0.2, 0.2))
    file = workdir / 'checkpoints/6' / name
    whole = file.rename(file.with_name('whole'))
    file.symlink_to(target)

    with pytest.raises(RuntimeError, match=rf'6 cannot be read \(.*{message}.*no damage'):
        checkpoint.latest(workdir, targets(), {'seed': 1})
    assert [path.name for path in checkpoint.folders(workdir)] == ['2', '4', '6']
    assert 'damaged' not in caplog.text

    monkeypatch.setattr(checkpoint.time, 'sleep', lambda _: whole.replace(file))
    assert checkpoint.latest(workdir, targets(), {'seed': 1})[0].name == '6'


# Restores when no file can be opened, and again when that passes.
FEW_DESCRIPTORS = """
import os, resource, sys, threading
import checkpoint_test
from mask2dit_jax import checkpoint

checkpoint.RETRY_SECONDS = (0.3, 0.3)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
path = sys.argv[1] + '/checkpoints/6'
targets = checkpoint_test.targets()
checkpoint.restore(path, targets)  # what is opened once and stays open

for free in range(4):
    lowered = len(os.listdir('/proc/self/fd')) - 1 + free
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowered, hard))
    try:
        found = ' '.join(checkpoint.restore(path, targets))
    except RuntimeError as error:
        found = str(error)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print('FOUND', found)

resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 1, hard))
threading.Timer(0.1, resource.setrlimit, [resource.RLIMIT_NOFILE, (soft, hard)]).start()
print('FOUND', *checkpoint.restore(path, targets))
"""


def test_too_few_descriptors_are_no_damage(saved):
    ended = subprocess.run(
        [sys.executable, '-c', FEW_DESCRIPTORS, saved],
        env=child_environment() | {'PYTHONPATH': f'{ROOT}:{TESTS}'},
        capture_output=True,
        text=True,
    )
    found = re.findall('FOUND (.*)', ended.stdout)
    assert len(found) == 5, ended.stderr
    assert 'cannot be read (OSError: [Errno 24] Too many open files' in found[0]
    assert all(line == 'params ema opt' or 'Too many open files' in line for line in found)
    assert found[-1] == 'params ema opt'
    assert 'damaged' not in ended.stderr


def test_damage_before_the_newest_does_not_matter(workdir):
    for name in ('2', '4'):
        shutil.rmtree(workdir / 'checkpoints' / name / 'meta')
        (workdir / 'checkpoints' / name / '_CHECKPOINT_METADATA').write_text('nonsense')
    assert checkpoint.latest(workdir, targets())[0].name == '6'
    save(workdir, 8, start=6)
    assert checkpoint.latest(workdir, targets())[0].name == '8'


def test_damage_that_does_not_concern_what_is_asked_for(workdir):
    shutil.rmtree(workdir / 'checkpoints/6/opt')
    assert checkpoint.latest(workdir, targets('ema'))[0].name == '6'


def test_when_all_are_damaged_nothing_starts_from_zero(workdir):
    for path in checkpoint.folders(workdir):
        largest(path / 'ema').unlink()
    message = re.escape(f'All checkpoints of {workdir} are damaged (2, 4, 6)')
    with pytest.raises(ValueError, match=message):
        checkpoint.latest(workdir, targets())
    assert [path.name for path in checkpoint.folders(workdir)] == ['2', '4', '6']


def test_one_checkpoint_that_is_asked_for_must_be_good(workdir):
    flip_a_bit(largest(workdir / 'checkpoints/6/ema'))
    with pytest.raises(ValueError, match=r'checkpoints/6 is damaged \(checksum of ema\)'):
        checkpoint.restore(workdir / 'checkpoints/6', targets('ema'))
    with pytest.raises(FileNotFoundError, match='is not a checkpoint'):
        checkpoint.restore(workdir / 'checkpoints/5', targets('ema'))


@pytest.mark.parametrize('damage', [name for name in DAMAGES if 'opt' not in name])
def test_verifying_an_item_on_the_host_finds_the_same_damage(workdir, damage):
    """Of what belongs to the item, without its arrays in memory."""
    for item in ('params', 'ema'):
        checkpoint.verify(workdir / 'checkpoints/6', item)
    path, _ = checkpoint.newest_good(workdir, checkpoint.verify)
    assert path == workdir / 'checkpoints/6'

    DAMAGES[damage](workdir / 'checkpoints/6')
    item = 'ema' if damage == 'file missing' else 'params'
    if damage == 'truncated':  # of the optimizer's item
        checkpoint.verify(workdir / 'checkpoints/6', item)
        return
    with pytest.raises(ValueError, match='checkpoints/6 is damaged'):
        checkpoint.verify(workdir / 'checkpoints/6', item)
    path, _ = checkpoint.newest_good(workdir, lambda path: checkpoint.verify(path, item))
    assert path == workdir / 'checkpoints/4'


def test_a_flipped_bit_is_found_in_chunks_of_any_shape(tmp_path):
    """Arrays that lay on a mesh are stored in the chunks that their devices had."""
    mesh = jax.make_mesh((2, 4), ('x', 'y'))
    params = state_of(0).params
    kernel = jax.device_put(params['a']['kernel'], NamedSharding(mesh, P('x', None, 'y')))
    spread = {
        'a': {'kernel': kernel},
        'b': jax.device_put(params['b'], NamedSharding(mesh, P('y'))),
    }
    state = state_of(0).replace(params=spread, ema=jax.tree.map(lambda x: x + 1, spread))
    manager = checkpoint.manager(tmp_path, 1, 0, 0)
    checkpoint.save(manager, 1, state, {})
    checkpoint.finish(manager)

    folder = tmp_path / 'checkpoints/1'
    checkpoint.verify(folder, 'params')
    checkpoint.verify(folder)
    flip_a_bit(largest(folder / 'ema'))
    checkpoint.verify(folder, 'params')
    with pytest.raises(ValueError, match='checkpoints/1 is damaged'):
        checkpoint.verify(folder)


def test_a_checkpoint_of_another_run_is_not_called_damaged(workdir):
    with pytest.raises(checkpoint.OtherRunError, match=r'trained with another seed \(1, now 2\)'):
        checkpoint.latest(workdir, targets(), {'seed': 2})
    checkpoint.latest(workdir, targets(), {'seed': 1, 'unheard_of': 2})


def test_what_a_killed_save_left_is_removed(workdir):
    left = workdir / 'checkpoints/7.orbax-checkpoint-tmp'  # of a step that is not saved again
    shutil.copytree(workdir / 'checkpoints/6', left)
    assert checkpoint.latest(workdir, targets())[0].name == '6'
    save(workdir, 8, start=6)
    assert not left.exists()
    assert checkpoint.latest(workdir, targets())[0].name == '8'


def test_the_newest_and_multiples_of_keep_every_stay(tmp_path):
    save(tmp_path, *range(1, 10), keep=2, keep_every=3)
    assert [int(path.name) for path in checkpoint.folders(tmp_path)] == [3, 6, 8, 9]

    # Without keep_every, the older ones are deleted.
    save(tmp_path, 10, 11, keep=2, start=9)
    assert [int(path.name) for path in checkpoint.folders(tmp_path)] == [10, 11]


def test_saving_a_step_twice_is_an_error(workdir):
    manager = checkpoint.manager(workdir, 10, 0, 6)
    with pytest.raises(RuntimeError, match=re.escape(f'Saving to {workdir}/checkpoints failed')):
        checkpoint.save(manager, 6, state_of(6), {})


def test_arrays_of_another_shape_are_another_run_not_damage(workdir):
    other = targets('params')
    kernel = other['params']['a']['kernel']
    other['params']['a']['kernel'] = jax.ShapeDtypeStruct(
        (64, 8, 17), jnp.float32, sharding=kernel.sharding
    )
    with pytest.raises(checkpoint.OtherRunError, match=r'does not fit the configuration: .*kernel'):
        checkpoint.latest(workdir, other)


def test_causes_are_told_in_one_short_line():
    error = ValueError("Error opening: [os_error_code='28'] and then\nmuch " + 1000 * 'x')
    assert checkpoint._brief(error) == 'No space left on device'
    assert checkpoint._brief(KeyError('a\n b')) == r"KeyError: 'a\n b'"
    long = checkpoint._brief(ValueError(400 * 'x'))
    assert len(long) == 303
    assert long.endswith('x...')
    assert checkpoint._brief(ValueError(288 * 'x')) == f'ValueError: {288 * "x"}'


def test_orbax_hears_of_no_preemption(tmp_path):
    """It would save by itself, and ask JAX about steps that are past."""
    manager = checkpoint.manager(tmp_path, 1, 0, 0)
    assert not manager.reached_preemption(1)
    checkpoint.finish(manager)


def brute_force(tree):
    """The checksum as its definition says, element by element."""
    total = 0
    for i, x in enumerate(jax.tree.leaves(tree)):
        bits = np.asarray(x).reshape(-1).view(np.uint32)
        of_array = sum(int(b) * (2 * place + 1) for place, b in enumerate(bits))
        total += (2 * i + 1) * of_array
    return total % 2**32


def test_checksums_do_not_depend_on_the_mesh():
    count, moments = state_of(0).opt_state
    expected = brute_force([count, moments])
    assert checkpoint.checksums({'opt': [count, moments]}) == {'opt': expected}

    mesh = jax.make_mesh((2, 4), ('x', 'y'))
    kernel = jax.device_put(moments['a']['kernel'], NamedSharding(mesh, P('x', None, 'y')))
    bias = jax.device_put(moments['b'], NamedSharding(mesh, P('y')))
    spread = [count, {'a': {'kernel': kernel}, 'b': bias}]
    assert checkpoint.checksums({'opt': spread}) == {'opt': expected}


def test_checksums_see_any_bit():
    count, moments = state_of(0).opt_state
    expected = checkpoint.checksums({'opt': [count, moments]})
    rng = np.random.default_rng(0)
    for bit in range(32):
        kernel = np.array(moments['a']['kernel'])
        kernel.view(np.uint32).reshape(-1)[rng.integers(kernel.size)] ^= np.uint32(1 << bit)
        changed = [count, {'a': {'kernel': jnp.asarray(kernel)}, 'b': moments['b']}]
        assert checkpoint.checksums({'opt': changed}) != expected


def test_meta_is_json(saved):
    meta = json.loads((saved / 'checkpoints/6/meta/metadata').read_text())
    assert meta['seed'] == 1
    assert meta['checksums'].keys() == set(checkpoint.ITEMS)
