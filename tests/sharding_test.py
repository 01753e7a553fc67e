"""Rules, meshes, and the same numbers on one device and on eight."""
import math
import re

import jax
import numpy as np
import pytest

from mask2dit_jax import config, convert, sharding, train_step
from mask2dit_jax.models import dit

FRAMES = (1, 2)


def tiny_config(**train):
    model = dit.DiTConfig(num_layers=2, num_attention_heads=8, attention_head_dim=16, in_channels=8, out_channels=8,
                          text_embed_dim=8, time_embed_dim=16, max_text_seq_length=2, patch_size=1, sample_height=2,
                          sample_width=2, sample_frames=5, dtype='float32', learned_positions=True)
    train = config.TrainConfig(**({'batch_size': 16, 'conditional_probability': 0.5, 'ema_decay': 0.9} | train))
    return config.Config(model=model, train=train, optimizer=config.OptimizerConfig('muon', 1e-2, warmup_steps=1))


def batch_of(step):
    rng = np.random.default_rng(step)
    return {'latents': rng.standard_normal((16, 3, 2, 2, 8), np.float32),
            'text': rng.standard_normal((16, 2, 2, 8), np.float32)}


def mesh_of(*axes):
    return sharding.make_mesh(config.MeshConfig(*axes), jax.devices()[:math.prod(axes)])


def run(cfg, mesh, steps=3):
    batch = batch_of(0)
    make = lambda: train_step.init_state(cfg, (batch['latents'][0], batch['text'][0], FRAMES))  # noqa: E731
    shardings = sharding.shardings(jax.eval_shape(make), mesh)
    state = jax.jit(make, out_shardings=shardings)()
    step = train_step.jit_train_step(cfg, FRAMES, shardings, sharding.batch_sharding(mesh))
    null, curve = np.zeros((2, 8), np.float32), []
    for i in range(steps):
        state, metrics = step(state, sharding.global_batch(batch_of(i), mesh, 16), null)
        curve.append([float(metrics['loss']), float(metrics['grad_norm'])])
    return np.array(curve), state


@pytest.fixture(scope='module')
def reference():
    return run(tiny_config(), mesh_of(1))


@pytest.mark.parametrize('axes, grad_accumulation', [
    ((8,), 2), ((1, 8), 1), ((2, 4), 1), ((1, 1, 8), 1), ((2, 2, 2), 1), ((1, 2, 2, 2), 2), ((1, 1, 2, 4), 1)], ids=str)
def test_eight_devices_and_micro_batches_give_the_numbers_of_one(axes, grad_accumulation, reference):
    curve, state = run(tiny_config(grad_accumulation=grad_accumulation), mesh_of(*axes))
    np.testing.assert_allclose(curve, reference[0], rtol=2e-5)
    for ours, ref in zip(jax.tree.leaves(state.ema), jax.tree.leaves(reference[1].ema)):
        np.testing.assert_allclose(ours, ref, atol=2e-4)
    kernel = state.params['blocks']['attn']['to_q']['kernel']
    assert kernel.addressable_shards[0].data.size == kernel.size // math.prod(axes[1:])
    moments = [x for path, x in jax.tree_util.tree_leaves_with_path(state.opt)
               if sharding.path_name(path).endswith('attn/to_q/kernel')]
    assert moments and all(m.sharding == kernel.sharding for m in moments)


def test_every_array_of_a_5b_state_matches_one_rule_and_nothing_large_is_replicated():
    cfg = config.Config()
    params = convert.abstract_params(cfg.model)
    assert sum(p.size for p in jax.tree.leaves(params)) == 5_570_283_072
    opt = jax.eval_shape(train_step.make_optimizer(cfg.optimizer, 10).init, params)
    mesh = jax.sharding.AbstractMesh((1, 16, 4, 1), sharding.AXES)
    for path, x in jax.tree_util.tree_leaves_with_path({'params': params, 'opt': opt}):
        name = sharding.path_name(path)
        assert sum(bool(re.search(pattern, f'/{name}')) for pattern, _ in sharding.RULES) == 1, name
        spec = sharding.spec_of(name, x.shape, mesh)
        assert x.size * 4 < 2 ** 20 * cfg.model.num_layers or 'fsdp' in spec, (name, x.shape)


def test_errors_say_what_to_change():
    with pytest.raises(ValueError, match='= 3 devices, but there are 8'):
        sharding.make_mesh(config.MeshConfig(data=3))
    with pytest.raises(ValueError, match='No sharding rule matches params/mystery'):
        sharding.spec_of('params/mystery', (3,), mesh_of(1, 8))
    with pytest.raises(ValueError, match=r'to_q/kernel \(30, 30\) does not divide over fsdp=8'):
        sharding.spec_of('params/blocks/attn/to_q/kernel', (30, 30), mesh_of(1, 8))
