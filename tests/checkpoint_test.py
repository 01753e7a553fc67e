"""Damaged checkpoints are noticed, named and passed over; checksums do not depend on the mesh; the
right ones stay."""

import json
import logging
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from mask2dit_jax import checkpoint
from mask2dit_jax.training import train_step


def state_of(step):
    rng = np.random.default_rng(step)
    tree = {
        'a': {'kernel': jnp.asarray(rng.standard_normal((64, 8, 16)), jnp.float32)},
        'b': jnp.asarray(rng.standard_normal(40), jnp.float32),
    }
    opt = [jnp.int32(step), jax.tree.map(lambda x: x * 2, tree)]
    return train_step.TrainState(jnp.int32(step), tree, jax.tree.map(lambda x: x + 1, tree), opt)


def targets(*items):
    one = SingleDeviceSharding(jax.devices()[0])
    return {
        k: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
            getattr(state_of(0), checkpoint.ITEMS[k]),
        )
        for k in items or checkpoint.ITEMS
    }


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
    shutil.copytree(saved, tmp_path / 'run')
    return tmp_path / 'run'


def largest(folder):
    return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGES = {
    'truncated': lambda p: (f := largest(p / 'opt')).write_bytes(f.read_bytes()[:-1000]),
    'file missing': lambda p: largest(p / 'ema').unlink(),
    'item missing': lambda p: shutil.rmtree(p / 'params'),
    'empty': lambda p: [shutil.rmtree(c) for c in p.iterdir() if c.is_dir()],
    'meta is garbage': lambda p: (p / 'meta/metadata').write_text('{"seed": 1, "chec'),
    'meta is no object': lambda p: (p / 'meta/metadata').write_text('[]'),
    'structure is garbage': lambda p: (p / 'params/_METADATA').write_text('nonsense'),
    'bit of the parameters': lambda p: flip(largest(p / 'params')),
    'bit of the optimizer': lambda p: flip(largest(p / 'opt')),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_saved_again(workdir, damage, caplog):
    broken = workdir / 'checkpoints/6'
    DAMAGES[damage](broken)
    with caplog.at_level(logging.WARNING, logger='absl'):
        path, items = checkpoint.latest(workdir, targets(), {'seed': 1})
    assert path == workdir / 'checkpoints/4'
    for name in checkpoint.ITEMS:
        jax.tree.map(
            np.testing.assert_array_equal, items[name], getattr(state_of(4), checkpoint.ITEMS[name])
        )
    assert any(
        str(broken) in r.getMessage() and 'is damaged' in r.getMessage() for r in caplog.records
    )
    save(workdir, 6, start=4)
    assert checkpoint.latest(workdir, targets(), {'seed': 1})[0] == broken
    assert (workdir / 'checkpoints/6.damaged').is_dir()
    assert [int(p.name) for p in checkpoint.folders(workdir)] == [2, 4, 6]


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
    with pytest.raises(
        ValueError, match=re.escape(f'All checkpoints of {workdir} are damaged (2, 4, 6)')
    ):
        checkpoint.latest(workdir, targets())
    assert [p.name for p in checkpoint.folders(workdir)] == ['2', '4', '6']


def test_one_checkpoint_that_is_asked_for_must_be_good(workdir):
    flip(largest(workdir / 'checkpoints/6/ema'))
    with pytest.raises(ValueError, match=r'checkpoints/6 is damaged \(checksum of ema\)'):
        checkpoint.restore(workdir / 'checkpoints/6', targets('ema'))
    with pytest.raises(FileNotFoundError, match='is no checkpoint'):
        checkpoint.restore(workdir / 'checkpoints/5', targets('ema'))


def test_another_run_is_no_damage(workdir):
    with pytest.raises(checkpoint.OtherRunError, match='trained with another seed'):
        checkpoint.latest(workdir, targets(), {'seed': 2})


def test_what_a_killed_save_left_is_removed(workdir):
    left = workdir / 'checkpoints/7.orbax-checkpoint-tmp'  # a step that is not saved again
    shutil.copytree(workdir / 'checkpoints/6', left)
    assert checkpoint.latest(workdir, targets())[0].name == '6'
    save(workdir, 8, start=6)
    assert not left.exists() and checkpoint.latest(workdir, targets())[0].name == '8'


def test_the_newest_and_every_so_many_stay(tmp_path):
    save(tmp_path, *range(1, 10), keep=2, keep_every=3)
    assert [int(p.name) for p in checkpoint.folders(tmp_path)] == [3, 6, 8, 9]
    save(tmp_path, 10, 11, keep=2, start=9)  # without it, the older ones go
    assert [int(p.name) for p in checkpoint.folders(tmp_path)] == [10, 11]


def test_saving_a_step_twice_is_an_error(workdir):
    manager = checkpoint.manager(workdir, 10, 0, 6)
    with pytest.raises(RuntimeError, match=re.escape(f'Saving to {workdir}/checkpoints failed')):
        checkpoint.save(manager, 6, state_of(6), {})


def test_checksums_do_not_depend_on_the_mesh_and_see_any_bit():
    tree = state_of(0).opt_state
    expected = checkpoint.checksums({'opt': tree})
    mesh = jax.make_mesh((2, 4), ('x', 'y'))
    spread = [
        tree[0],
        {
            'a': {
                'kernel': jax.device_put(
                    tree[1]['a']['kernel'], NamedSharding(mesh, P('x', None, 'y'))
                )
            },
            'b': jax.device_put(tree[1]['b'], NamedSharding(mesh, P('y'))),
        },
    ]
    assert checkpoint.checksums({'opt': spread}) == expected
    assert expected['opt'] == brute_force(tree)
    rng = np.random.default_rng(0)
    for bit in range(32):
        kernel = np.array(tree[1]['a']['kernel'])
        kernel.view(np.uint32).reshape(-1)[rng.integers(kernel.size)] ^= np.uint32(1 << bit)
        assert (
            checkpoint.checksums(
                {'opt': [tree[0], {'a': {'kernel': jnp.asarray(kernel)}, 'b': tree[1]['b']}]}
            )
            != expected
        )


def brute_force(tree):
    total = 0
    for i, x in enumerate(jax.tree.leaves(tree)):
        bits = np.asarray(x).reshape(-1).view(np.uint32)
        total += (2 * i + 1) * sum(int(b) * (2 * n + 1) for n, b in enumerate(bits))
    return total % 2**32


def test_meta_is_json(saved):
    meta = json.loads((saved / 'checkpoints/6/meta/metadata').read_text())
    assert meta['seed'] == 1 and meta['checksums'].keys() == set(checkpoint.ITEMS)
