"""LoRA: what is trained and what is not, merging, resuming, files, meshes."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl.testing import flagsaver
from conftest import FRAMES, batch_of, mesh_of, tiny_config
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from mask2dit_jax import checkpoint, sample, tensor_io
from mask2dit_jax import config as config_lib
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import latent_codec, video
from mask2dit_jax.diffusion import loss as loss_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.models import dit, lora
from mask2dit_jax.pretrained import config_json, export, lora_files, names, runs
from mask2dit_jax.pretrained import load as load_lib
from mask2dit_jax.training import ema, train_step, trainer
from mask2dit_jax.training import optimizer as optimizer_lib

MODEL = dit.DiTConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=48,
    out_channels=48,
    text_embed_dim=16,
    time_embed_dim=16,
    max_text_seq_length=6,
    patch_size=1,
    sample_height=4,
    sample_width=4,
    sample_frames=4,
    dtype='float32',
    learned_positions=True,
    position_rule='reference',
    attention_backend='dense',
)
LORA = lora.LoraConfig(8, alpha=12.0)
PAIRS = {
    ('blocks', 'attn', name, f'lora_{kind}')
    for name in ('to_q', 'to_k', 'to_v', 'to_out')
    for kind in 'AB'
}
ENTRIES = names.parameter_entries('transformer', MODEL)


def run_config(steps=6, **kwargs):
    cfg = config_lib.Config(
        model=MODEL,
        optimizer=config_lib.OptimizerConfig('adamw', 1e-2, warmup_steps=1),
        data=config_lib.DataConfig(layouts=((4, 4),), num_train=32, num_test=16),
        train=config_lib.TrainConfig(
            steps=steps,
            batch_size=8,
            conditional_probability=0.5,
            ema_decay=0.5,
            log_every_steps=1,
            checkpoint_every_steps=3,
            sample_every_steps=100,
        ),
        sample=config_lib.SampleConfig(steps=1, guidance=1.5, sheet_stories=4),
        eval=config_lib.EvalConfig(stories=8, batch_size=8),
        mesh=mesh_lib.MeshConfig(data=8),
    )
    return dataclasses.replace(cfg, **kwargs)


def random_tree(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), tree)


def random_lora(cfg=LORA, seed=1):
    params = names.abstract_params(MODEL)
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, cfg))
    return random_tree(shapes, seed)


def target(cfg):
    """Shapes of the whole model's parameters, with their shardings."""
    mesh = mesh_lib.make_mesh(cfg.mesh)
    return partitioning.abstract_arrays(names.abstract_params(cfg.model), mesh)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), a, b)


def write_run(workdir, cfg, params):
    """Workdir as a run of 3 steps would leave it."""
    workdir.mkdir()
    config_lib.save(cfg, workdir / 'config.json')

    state = train_step.TrainState(np.int32(3), params, params, {'unused': np.ones(1)})
    checkpoints = checkpoint.manager(workdir, 1, 0, 0)
    checkpoint.save(checkpoints, 3, state, {})
    checkpoint.finish(checkpoints)
    return workdir


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """Workdir of a run of the whole model, with random parameters."""
    params = random_tree(names.abstract_params(MODEL))
    return write_run(tmp_path_factory.mktemp('runs') / 'base', run_config(), params)


@pytest.fixture(scope='module')
def finished(base):
    """Workdir of a finished run of LoRA on `base`, and its rows of scores."""
    workdir = base.with_name('lora')
    return workdir, trainer.train_and_evaluate(run_config(init_from=str(base), lora=LORA), workdir)


def test_only_lora_is_trained_and_the_loss_falls(base):
    """The base stays as it is, bit for bit; neither the optimizer nor the EMA has a copy of it."""
    cfg = run_config(steps=40, init_from=str(base), lora=LORA)
    codec = latent_codec.for_run(cfg, base)
    batches = batches_lib.train_batches(cfg, base, codec)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    state, shardings = trainer._initial_state(cfg, codec, mesh)
    _, whole = runs.newest(base, run_config(), target(cfg))
    assert_equal(ema.model_ema(cfg, state), whole)  # B is zero

    # The loss on one batch, with fixed noise and timesteps.
    layout, batch = batches(0, range(8))
    null = codec.encode_text([''])[0]
    frames = codec.latent_frames(layout)
    noise = np.random.default_rng(0).standard_normal(batch['latents'].shape, np.float32)
    timesteps = np.repeat(np.arange(0, 1000, 125)[:, None], sum(frames), axis=1)  # [B, T]
    given = np.zeros(timesteps.shape, bool)

    @jax.jit
    def loss(params):
        total, count = loss_lib.denoising_loss(
            dit.DiT(MODEL), params, cfg.schedule, batch, noise, timesteps, given, frames
        )
        return total / count

    before = loss(whole)

    # Training on that batch.
    step = train_step.jit_train_step(cfg, frames, shardings, mesh_lib.batch_sharding(mesh))
    first = jax.tree.map(np.array, state.params)
    for _ in range(cfg.train.steps):
        # One at a time: steps in flight would wait for each other's threads on a small host.
        state, _ = jax.block_until_ready(step(state, mesh_lib.global_batch(batch, mesh, 8), null))

    assert_equal(state.frozen_params, whole)
    assert set(traverse_util.flatten_dict(state.params)) == PAIRS
    for old, new in zip(jax.tree.leaves(first), jax.tree.leaves(state.params)):
        assert (np.abs(old - new) > 1e-3).mean() > 0.9
    shapes = {x.shape for x in jax.tree.leaves((state.params, state.ema, state.opt_state))}
    assert shapes == {(), (2, 32, 8), (2, 8, 32)}

    merged = lora.merge_placed(state.frozen_params, state.params, LORA)
    assert loss(merged) < 0.9 * before


def test_initialisation_is_pefts():
    tree = lora.init(
        jax.random.key(0), names.abstract_params(MODEL), dataclasses.replace(LORA, layers='kernel$')
    )
    flat = traverse_util.flatten_dict(tree)
    kernels = {entry.path[:-1] for entry in ENTRIES if entry.path[-1] == 'kernel'}
    assert {path[:-1] for path in flat} == kernels

    # A is uniform, and other values in every layer and kernel.
    a = np.asarray(flat['blocks', 'ff_out', 'lora_A'])
    assert a.shape == (2, 128, 8)
    assert (a[0] != a[1]).all()
    to_q = flat['blocks', 'attn', 'to_q', 'lora_A']
    to_k = flat['blocks', 'attn', 'to_k', 'lora_A']
    assert (to_q != to_k).all()
    assert 0.95 * 128**-0.5 < np.abs(a).max() <= 128**-0.5
    assert abs(a.mean()) < 0.01

    # B is zero.
    assert not any(np.any(x) for p, x in flat.items() if p[-1] == 'lora_B')
    assert flat['proj_out', 'lora_B'].shape == (8, 48)


def test_muon_leaves_lora_to_its_adamw():
    tree = random_lora()
    muon_config = config_lib.OptimizerConfig('muon', 1e-2, warmup_steps=0, clip_norm=1e9)
    optimizer = optimizer_lib.make_optimizer(muon_config, 10)
    adamw = optax.adamw(1e-2, nesterov=True, weight_decay=0.0)
    ours, _ = optimizer.update(tree, optimizer.init(tree), tree)
    theirs, _ = adamw.update(tree, adamw.init(tree), tree)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), ours, theirs)


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_merging_adds_the_scaled_product_of_each_layer(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), random_tree(names.abstract_params(MODEL)))
    tree = random_lora()
    merged = traverse_util.flatten_dict(lora.merge(params, tree, LORA))

    for path, value in traverse_util.flatten_dict(params).items():
        if (*path[:-1], 'lora_A') in PAIRS and path[-1] == 'kernel':
            pair = tree['blocks']['attn'][path[2]]
            a = pair['lora_A'].astype(np.float64)
            b = pair['lora_B'].astype(np.float64)
            product = np.stack([a[0] @ b[0], a[1] @ b[1]])
            want = value.astype(np.float64) + 12 / 8 * product
            rounding = 0 if dtype == np.float32 else 2**-8
            np.testing.assert_allclose(
                np.asarray(merged[path], np.float64), want, atol=2e-6, rtol=rounding
            )
        else:
            np.testing.assert_array_equal(merged[path], value)
        assert merged[path].dtype == dtype


def test_the_scale_is_one_without_alpha():
    assert lora.scale(lora.LoraConfig(4)) == 1


@pytest.mark.parametrize(
    'layers, message',
    [
        ('to_p/kernel$', "config.lora.layers 'to_p/kernel$' matches no parameter"),
        (
            'attn/to_q',
            'matches blocks/attn/to_q/bias, which is not a matrix: let it match kernels only',
        ),
        ('positions', 'matches positions, which is not a matrix'),
        ('(', "'(' is not a regular expression"),
    ],
)
def test_layers_that_cannot_be(layers, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lora.matched(names.abstract_params(MODEL), lora.LoraConfig(8, layers=layers))


MESH_CONFIG = dataclasses.replace(
    tiny_config(),
    lora=lora.LoraConfig(4, layers='kernel$'),
    optimizer=config_lib.OptimizerConfig('adamw', 1e-2, warmup_steps=1, eps=1e-3),
)


def mesh_run(axes, grad_accumulation=1):
    """Three steps of LoRA on a random base.

    At the base's own initialisation nothing but proj_out has a gradient.
    """
    cfg = dataclasses.replace(
        MESH_CONFIG,
        train=dataclasses.replace(MESH_CONFIG.train, grad_accumulation=grad_accumulation),
    )
    mesh = mesh_of(*axes)
    example = batch_of(0)
    inputs = (example['latents'][0], example['text'][0], FRAMES)
    make = lambda: train_step.init_state(cfg, inputs)  # noqa: E731
    shardings = partitioning.shardings(jax.eval_shape(make), mesh)
    state = jax.jit(make, out_shardings=shardings)()
    start = jax.tree.map(np.array, state.frozen_params)
    state = state.replace(frozen_params=jax.device_put(random_tree(start), shardings.frozen_params))

    step = train_step.jit_train_step(cfg, FRAMES, shardings, mesh_lib.batch_sharding(mesh))
    null = np.zeros((2, 8), np.float32)
    for i in range(3):
        batch = mesh_lib.global_batch(batch_of(i), mesh, 16)
        state, metrics = jax.block_until_ready(step(state, batch, null))
    return metrics, state


def test_eight_devices_and_micro_batches_give_the_numbers_of_one():
    one_metrics, one_state = mesh_run((1,))
    metrics, state = mesh_run((1, 2, 2, 2), grad_accumulation=2)

    for name, value in one_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=5e-5)
    for ours, ref in zip(jax.tree.leaves(state.params), jax.tree.leaves(one_state.params)):
        assert np.abs(ref).max() > 1e-3
        np.testing.assert_allclose(ours, ref, atol=1e-4)
    assert_equal(state.frozen_params, one_state.frozen_params)

    def sharding(tree):
        return jax.tree.map(lambda x: x.sharding, tree)

    merged = ema.model_ema(MESH_CONFIG, state)
    assert sharding(merged) == sharding(state.frozen_params)


def read_items(workdir):
    """Everything but meta in the last checkpoint, read without the package's own functions."""
    folder = (workdir / 'checkpoints/6').absolute()
    with ocp.StandardCheckpointer() as reader:
        return {item: reader.restore(folder / item) for item in ('params', 'ema', 'opt')}


def test_checkpoints_hold_lora_alone(finished, base):
    workdir, _ = finished
    items = read_items(workdir)
    assert set(traverse_util.flatten_dict(items['params'])) == PAIRS
    assert set(traverse_util.flatten_dict(items['ema'])) == PAIRS
    assert {x.shape for x in jax.tree.leaves(items)} == {(), (2, 32, 8), (2, 8, 32)}

    # The configuration names the checkpoint that was the base, not only its workdir.
    cfg = config_lib.load(workdir / 'config.json')
    assert cfg.init_from == str(checkpoint.folders(base)[-1])


def test_resume_is_bit_equal_though_the_base_moved_and_trained_on(finished, base, tmp_path):
    workdir, rows = finished
    moved = tmp_path / 'moved'
    shutil.copytree(base, moved)
    newest = checkpoint.folders(moved)[-1]
    shutil.copytree(checkpoint.folders(moved)[0], newest.with_name('1000'))

    other = tmp_path / 'lora'
    shutil.copytree(workdir, other)
    shutil.copytree(workdir.parent / 'data', tmp_path / 'data')
    shutil.rmtree(other / 'checkpoints/6')  # as if killed after the checkpoint of step 3

    cfg = dataclasses.replace(config_lib.load(workdir / 'config.json'), init_from=str(moved))
    assert trainer.train_and_evaluate(cfg, other) == rows
    assert config_lib.load(other / 'config.json').init_from == str(newest)
    assert_equal(read_items(other), read_items(workdir))


def ema_of(workdir):
    """LoRA tensors of a run's last EMA."""
    flat = tensor_io.open_orbax(checkpoint.folders(workdir)[-1] / 'ema')
    arrays = {path: array.read().result() for path, array in flat.items()}
    return traverse_util.unflatten_dict(arrays)


def test_lora_on_lora(finished, base, tmp_path):
    """The base of a run may be a run of LoRA, merged into its own base."""
    cfg = run_config(init_from=str(finished[0]), lora=lora.LoraConfig(2, layers='ff_in/kernel$'))
    workdir = write_run(
        tmp_path / 'second', runs.resolve_base_checkpoint(cfg), random_lora(cfg.lora)
    )
    path = checkpoint.folders(workdir)[-1]
    whole = runs.restore(path, config_lib.load_run(path), target(cfg))

    _, base_params = runs.newest(base, run_config(), target(cfg))
    first = lora.merge(base_params, ema_of(finished[0]), LORA)
    want = lora.merge(first, ema_of(workdir), cfg.lora)
    assert_close(whole, want)

    export.convert_folder(workdir, tmp_path / 'out')
    exported = load_lib.load_transformer(tmp_path / 'out/transformer')[1]
    assert_close(exported, want)


@pytest.mark.parametrize('converted', [False, True])
def test_lora_on_a_model_folder(converted, tmp_path):
    """The base as released, in bfloat16, and as Orbax."""
    params = random_tree(names.abstract_params(MODEL))
    params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    folder = tmp_path / 'released/transformer'
    tensor_io.write_safetensors(folder, 'model', export.export_params('transformer', MODEL, params))
    (folder / 'config.json').write_text(json.dumps(config_json.transformer_json(MODEL)))
    if converted:
        export.convert_folder(tmp_path / 'released', tmp_path / 'orbax')
        folder = tmp_path / 'orbax/transformer'

    cfg = run_config(init_from=str(folder.parent), lora=LORA)
    tree = random_lora()
    workdir = write_run(tmp_path / 'run', runs.resolve_base_checkpoint(cfg), tree)
    want = lora.merge(jax.tree.map(lambda x: x.astype(np.float32), params), tree, LORA)
    path = checkpoint.folders(workdir)[-1]
    whole = runs.restore(path, config_lib.load_run(path), target(cfg))
    assert_close(whole, want)

    export.convert_folder(workdir, tmp_path / 'out')
    exported = load_lib.load_transformer(tmp_path / 'out/transformer')[1]
    assert_close(exported, want)


def test_export_is_merged_and_alone(finished, base, tmp_path):
    """An export holds the merged transformer, and the LoRA tensors in a file of their own."""
    workdir, _ = finished
    counts = export.convert_folder(workdir, tmp_path / 'out')
    model, params = load_lib.load_transformer(tmp_path / 'out/transformer')
    assert counts == {
        'transformer': sum(x.size for x in jax.tree.leaves(params)),
        'LoRA': 2 * 2 * 4 * 32 * 8,
    }
    path = checkpoint.folders(workdir)[-1]
    merged = runs.restore(path, config_lib.load(workdir / 'config.json'), target(run_config()))
    assert_close(params, merged)

    # The exported model computes what base and LoRA compute, and not what the base does.
    rng = np.random.default_rng(0)
    inputs = (
        rng.standard_normal((1, 2, 4, 4, 48), np.float32),
        rng.standard_normal((1, 2, 6, 16), np.float32),
        np.array([[300, 0]]),
    )
    apply = jax.jit(model.apply, static_argnums=4)
    _, whole = runs.newest(base, run_config(), load_lib.on_one_device(names.abstract_params(MODEL)))
    trained = apply({'params': lora.merge(whole, ema_of(workdir), LORA)}, *inputs, (1, 1))
    np.testing.assert_allclose(apply({'params': params}, *inputs, (1, 1)), trained, atol=2e-5)
    assert np.abs(apply({'params': whole}, *inputs, (1, 1)) - trained).max() > 1e-3

    tree, cfg = lora_files.read_lora(tmp_path / 'out/pytorch_lora_weights.safetensors', MODEL)
    assert_equal(tree, ema_of(workdir))
    assert lora.scale(cfg) == lora.scale(LORA)


@pytest.fixture
def damaged(tmp_path):
    """Workdir of a run of the whole model with the checkpoints 3 and 6, of which 6 is damaged."""
    params = random_tree(names.abstract_params(MODEL))
    workdir = write_run(tmp_path / 'damaged', run_config(), params)
    state = train_step.TrainState(np.int32(6), params, params, {'unused': np.ones(1)})
    checkpoints = checkpoint.manager(workdir, 2, 0, 3)
    checkpoint.save(checkpoints, 6, state, {})
    checkpoint.finish(checkpoints)

    files = (path for path in (workdir / 'checkpoints/6/ema').rglob('*') if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
    return workdir


def test_every_reader_of_a_run_passes_over_a_damaged_checkpoint(damaged, tmp_path):
    good = damaged / 'checkpoints/3'
    want = random_tree(names.abstract_params(MODEL))
    path, _ = runs.newest(damaged, run_config(), target(run_config()))
    assert path == good

    # The base of LoRA.
    cfg = runs.resolve_base_checkpoint(run_config(init_from=str(damaged), lora=LORA))
    assert cfg.init_from == str(good)

    # Export, also of LoRA on it.
    export.convert_folder(damaged, tmp_path / 'out')
    assert_equal(load_lib.load_transformer(tmp_path / 'out/transformer')[1], want)
    low_rank = write_run(tmp_path / 'lora', cfg, random_lora())
    export.convert_folder(low_rank, tmp_path / 'out_lora')


def test_a_damaged_checkpoint_that_is_named_is_refused_by_every_reader(damaged, tmp_path):
    bad = damaged / 'checkpoints/6'
    cfg = run_config(init_from=str(bad), lora=LORA)
    low_rank = write_run(tmp_path / 'lora', cfg, random_lora())
    readers = (
        lambda: runs.restore(bad, run_config(), target(run_config())),
        lambda: runs.load_base(cfg, target(cfg)),
        lambda: export.convert_folder(bad, tmp_path / 'out'),
        lambda: export.convert_folder(low_rank, tmp_path / 'out'),
    )
    for read in readers:
        with pytest.raises(ValueError, match='checkpoints/6 is damaged'):
            read()
    assert not list(tmp_path.glob('out/**/*.safetensors'))


def run_sample(out, **flags):
    """Frames of the video that the command `sample` writes with these flags."""
    prompt = ['red ring on gray moves left', 'it grows']
    with flagsaver.flagsaver(**({'out': str(out), 'prompt': prompt} | flags)):
        sample.main(['sample'])
    return video.read_video(out / 'video_0.mp4')[0]


def test_sampling_merges(finished, base, tmp_path):
    """A run of LoRA gives the frames of its base with its LoRA file, not those of the base."""
    workdir, _ = finished
    file = tmp_path / 'pytorch_lora_weights.safetensors'
    lora_files.write_lora(tmp_path, MODEL, ema_of(workdir), LORA)

    run = run_sample(tmp_path / 'run', workdir=str(workdir))
    alone = run_sample(tmp_path / 'alone', workdir=str(base))
    named = run_sample(tmp_path / 'file', workdir=str(base), lora=str(file))
    np.testing.assert_array_equal(named, run)
    assert np.abs(alone.astype(int) - run).max() > 10

    story = json.loads((tmp_path / 'file/story.json').read_text())
    assert story['lora'].endswith('weights.safetensors')


@pytest.mark.parametrize('cfg', [LORA, lora.LoraConfig(3, layers='kernel$')])
def test_files_come_back_bit_equal(cfg, tmp_path):
    tree = random_lora(cfg)
    file = tmp_path / 'pytorch_lora_weights.safetensors'
    count = lora_files.write_lora(tmp_path, MODEL, tree, cfg)
    back, found = lora_files.read_lora(file, MODEL)
    assert_equal(back, tree)
    assert (found.rank, lora.scale(found)) == (cfg.rank, lora.scale(cfg))

    # In the file every layer has tensors of its own, transposed as PyTorch's.
    tensors = load_file(file)
    assert count == sum(t.size for t in tensors.values())
    a = tensors['transformer.transformer_blocks.1.attn1.to_out.0.lora_A.weight']
    np.testing.assert_array_equal(a, tree['blocks']['attn']['to_out']['lora_A'][1].T)


Q1 = 'transformer.transformer_blocks.1.attn1.to_q'


def edited(tmp_path, change, metadata=None):
    """A good LoRA file, to whose tensors `change` was applied."""
    lora_files.write_lora(tmp_path, MODEL, random_lora(), LORA)
    file = tmp_path / 'pytorch_lora_weights.safetensors'
    tensors = load_file(file)
    change(tensors)
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, file, metadata)
    return file


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda t: t.pop(f'{Q1}.lora_B.weight'), f'missing {Q1[12:]}.lora_B.weight'),
        (
            lambda t: t.update({f'{Q1}.lora_B.bias': np.ones(2)}),
            f'unexpected {Q1[12:]}.lora_B.bias',
        ),
        (lambda t: t.update({f'{Q1}.alpha': np.float32([2])}), f'unexpected {Q1[12:]}.alpha'),
        (
            lambda t: t.update(
                {'transformer.transformer_blocks.2.attn1.to_q.lora_A.weight': np.ones((8, 32))}
            ),
            'unexpected transformer_blocks.2.attn1.to_q.lora_A.weight',
        ),
        (
            lambda t: t.update({f'{Q1}.lora_A.weight': np.ones((4, 32))}),
            f'{Q1[12:]}.lora_A.weight has shape (4, 32), expected (8, 32)',
        ),
        (lambda t: t.clear(), 'holds no LoRA tensors of this transformer'),
    ],
)
def test_wrong_tensors_are_named(change, message, tmp_path):
    file = edited(tmp_path, change)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        lora_files.read_lora(file, MODEL)
    assert 'pytorch_lora_weights.safetensors' in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'peft, message',
    [
        ('{', 'has damaged lora_adapter_metadata'),
        ('[]', 'has damaged'),
        ('{"lora_alpha": "x"}', 'has damaged'),
        ('{"lora_alpha": 0}', 'lora_alpha 0.0: it must be positive'),
        ('{"lora_alpha": 1e999}', 'lora_alpha inf: it must be positive and finite'),
        ('{"transformer.r": 4}', 'was made with r 4: only 8 is implemented'),
        ('{"use_rslora": true}', 'was made with use_rslora True: only False is implemented'),
        ('{"transformer.alpha_pattern": {"to_q": 2}}', "was made with alpha_pattern {'to_q': 2}"),
        ('{"init_lora_weights": "pissa"}', "was made with init_lora_weights 'pissa'"),
    ],
)
def test_settings_of_peft_that_are_not_implemented_are_named(peft, message, tmp_path):
    file = edited(tmp_path, lambda t: None, {'lora_adapter_metadata': peft})
    with pytest.raises(ValueError, match=re.escape(message)):
        lora_files.read_lora(file, MODEL)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing is not a file: give a LoRA file'):
        lora_files.read_lora(tmp_path / 'nothing', MODEL)


def test_without_metadata_the_scale_is_one(tmp_path):
    _, cfg = lora_files.read_lora(edited(tmp_path, lambda t: None), MODEL)
    assert lora.scale(cfg) == 1


def test_bases_that_cannot_be_are_named(finished, base, tmp_path):
    def start(workdir=tmp_path / 'run', **kwargs):
        cfg = run_config(**({'lora': LORA, 'init_from': str(base)} | kwargs))
        trainer.train_and_evaluate(cfg, workdir)

    with pytest.raises(
        ValueError, match=r'config\.lora\.rank is 8, but there is no base: give a workdir by'
    ):
        start(init_from='')
    with pytest.raises(FileNotFoundError, match='nowhere, the base of LoRA, holds no checkpoint'):
        start(init_from='nowhere')
    with pytest.raises(
        FileNotFoundError, match=r'checkpoints/77, the base of LoRA, does not exist'
    ):
        start(init_from=str(base / 'checkpoints/77'))
    with pytest.raises(
        ValueError, match=r'blocks/ff_in/kernel has shape \(2, 32, 128\), expected \(3, 32, 128\)'
    ):
        start(model=dataclasses.replace(MODEL, num_layers=3))

    # A run that continues keeps its settings.
    with pytest.raises(
        ValueError, match=r'trained with another lora\.alpha .* lora\.rank \(8, now 4'
    ):
        start(finished[0], lora=lora.LoraConfig(4))
    with pytest.raises(ValueError, match='trained with another init_from'):
        start(finished[0], init_from=str(finished[0]))

    # A base that is gone after training.
    moved = tmp_path / 'moved'
    shutil.copytree(finished[0], moved)
    text = (moved / 'config.json').read_text()
    (moved / 'config.json').write_text(text.replace(str(base), str(tmp_path / 'gone')))
    path = checkpoint.folders(moved)[-1]
    with pytest.raises(FileNotFoundError, match=r'gone/config\.json does not exist'):
        runs.restore(path, config_lib.load_run(path), target(run_config()))
