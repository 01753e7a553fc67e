"""Rules, meshes, and the same numbers on one device and on eight."""

import dataclasses
import math
import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import mesh_of, tiny_config, train_on

from mask2dit_jax import config as config_lib
from mask2dit_jax import presets
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.models import lora
from mask2dit_jax.pretrained import names
from mask2dit_jax.training import optimizer

GOLDEN = pathlib.Path(__file__).with_name('shardings_5b.md')


@pytest.fixture(scope='module')
def reference():
    return train_on(tiny_config(), mesh_of(1))


@pytest.mark.parametrize(
    'axes, grad_accumulation',
    [
        ((8,), 2),
        ((2, 2, 2), 1),
        ((1, 2, 2, 2), 2),
        *(
            pytest.param(axes, 1, marks=pytest.mark.slow)
            for axes in ((1, 8), (2, 4), (1, 1, 8), (1, 1, 2, 4))
        ),
    ],
    ids=str,
)
def test_eight_devices_and_micro_batches_give_the_numbers_of_one(
    axes, grad_accumulation, reference
):
    expected_curve, expected_state = reference
    config = tiny_config(grad_accumulation=grad_accumulation)
    curve, state = train_on(config, mesh_of(*axes))

    np.testing.assert_allclose(curve, expected_curve, rtol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected_state.ema)):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)

    # Every axis but data shares the kernel, and the optimizer's moments lie as the kernel does.
    kernel = state.params['blocks']['attn']['to_q']['kernel']
    assert kernel.addressable_shards[0].data.size == kernel.size // math.prod(axes[1:])
    moments = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if partitioning.path_name(path).endswith('attn/to_q/kernel')
    ]
    assert moments
    assert all(moment.sharding == kernel.sharding for moment in moments)


def test_paths_of_all_kinds_of_containers():
    """Dicts, lists, NamedTuples and dataclasses are all named alike, since RULES match on names."""

    class Pair(NamedTuple):
        mu: dict
        nu: list

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class State:
        opt_state: Pair

    tree = State(Pair({'to_q': {'kernel': 1}}, [2, {3: 4}]))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert [partitioning.path_name(path) for path in paths] == [
        'opt_state/mu/to_q/kernel',
        'opt_state/nu/0',
        'opt_state/nu/1/3',
    ]


def lora_of(params):
    """Shapes of LoRA tensors of rank 64 for every kernel."""
    config = lora.LoraConfig(64, layers='kernel$')
    return jax.eval_shape(lambda: lora.init(jax.random.key(0), params, config))


def golden_table():
    """Markdown: how every parameter and LoRA tensor of 5B lies on every slice.

    The last line names the large ones that are whole on every chip.
    """
    meshes = {}
    for name in presets.SLICES:
        config = config_lib.parse(presets.pod(name))
        axes = tuple(getattr(config.mesh, axis) for axis in mesh_lib.AXES)
        meshes[name] = jax.sharding.AbstractMesh(axes, mesh_lib.AXES)

    params = names.abstract_params(config_lib.Config().model)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    leaves += jax.tree_util.tree_leaves_with_path(lora_of(params))

    lines = [
        f'| parameter | shape | spec | {" | ".join(meshes)} |',
        '|---' * (3 + len(meshes)) + '|',
    ]
    whole = []
    for path, x in leaves:
        name = partitioning.path_name(path)
        megabytes = []
        for mesh in meshes.values():
            spec = partitioning.partition_spec(name, x.shape, mesh)
            shard = jax.sharding.NamedSharding(mesh, spec).shard_shape(x.shape)
            megabytes.append(math.prod(shard) * 4 / 1e6)

        shape = 'x'.join(map(str, x.shape))
        sizes = ' | '.join(f'{size:.3f}' for size in megabytes)
        lines.append(f'| {name} | {shape} | {tuple(spec)} | {sizes} |')
        if not any(spec) and megabytes[0] > 1:
            whole.append(f'{name} {megabytes[0]:.1f}')

    end = f'Over 1 MB and whole on every chip: {", ".join(whole)}.'
    return '\n'.join(['MB of float32 per chip.', '', *lines, '', end, ''])


def test_golden_table_of_5b_shardings():
    """After a wanted change: python tests/distributed/partitioning_test.py"""
    assert golden_table() == GOLDEN.read_text()


def test_every_array_of_a_5b_state_matches_one_rule():
    config = config_lib.Config()
    init = optimizer.make_optimizer(config.optimizer, 10).init
    params = names.abstract_params(config.model)
    assert sum(p.size for p in jax.tree.leaves(params)) == 5_570_283_072

    low_rank = lora_of(params)
    states = [
        {'params': params, 'opt': jax.eval_shape(init, params)},
        {'params': low_rank, 'opt': jax.eval_shape(init, low_rank)},
    ]
    for path, _ in jax.tree_util.tree_leaves_with_path(states):
        name = partitioning.path_name(path)
        matches = [p for p, _ in partitioning.RULES if re.search(p, f'/{name}')]
        assert len(matches) == 1, name


def test_slices_are_on_the_data_axis():
    """With devices of two slices, only data runs between the slices."""

    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        slice_index: int
        process_index: int = 0
        platform: str = 'cpu'
        device_kind: str = 'cpu'

    devices = [Device(i, i // 4) for i in range(8)]
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(2, 2, 2), devices)
    for i in range(2):
        assert {d.slice_index for d in mesh.devices[i].flat} == {i}
    with pytest.raises(ValueError, match='data 1 does not divide over 2 slices'):
        mesh_lib.make_mesh(mesh_lib.MeshConfig(1, 4, 2), devices)


def test_errors_say_what_to_change():
    with pytest.raises(ValueError, match='= 3 devices, but there are 8'):
        mesh_lib.make_mesh(mesh_lib.MeshConfig(data=3))
    with pytest.raises(ValueError, match=r'matches params/mystery .*partitioning\.RULES'):
        partitioning.partition_spec('params/mystery', (3,), mesh_of(1, 8))
    with pytest.raises(ValueError, match=r'to_q/kernel \(30, 30\) does not divide over fsdp=8'):
        partitioning.partition_spec('params/blocks/attn/to_q/kernel', (30, 30), mesh_of(1, 8))


if __name__ == '__main__':
    GOLDEN.write_text(golden_table())
