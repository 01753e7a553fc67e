"""A tiny random model folder in the released layout is sampled, extended, converted, fine-tuned and
exported again."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from absl.testing import flagsaver
from conftest import unlike_the_umask
from safetensors.numpy import load_file

from mask2dit_jax import checkpoint, sample, tensor_io
from mask2dit_jax import config as config_lib
from mask2dit_jax.data import latent_codec, video
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.models import dit, lora, t5, vae
from mask2dit_jax.pretrained import config_json, export, lora_files, names
from mask2dit_jax.pretrained import load as load_lib
from mask2dit_jax.tools import random_model
from mask2dit_jax.training import trainer

TRANSFORMER = random_model.TRANSFORMER
VAE = random_model.VAE
CAPTIONS = ('red ring on gray moves left', 'it grows')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """transformer/ (bf16, in several files), vae/, text_encoder/, tokenizer/, scheduler/."""
    folder = tmp_path_factory.mktemp('models') / 'released'
    random_model.write(folder, dtype=ml_dtypes.bfloat16, shard_bytes=20_000)
    return folder


@pytest.fixture(scope='module')
def converted(folder):
    target = folder.parent / 'converted'
    export.convert_folder(folder, target)
    return target


def run_sample(out, source, **chosen):
    """Frames of the one video that `sample` makes with the chosen flags."""
    flags = {
        'checkpoint': str(source),
        'out': str(out),
        'prompt': list(CAPTIONS),
        'dtype': 'float32',
        'steps': 2,
    }
    with flagsaver.flagsaver(**(flags | chosen)):
        sample.main(['sample'])
    return video.read_video(out / 'video_0.mp4')[0]


@pytest.fixture(scope='module')
def sampled(folder):
    return run_sample(folder.parent / 'sampled', folder)


def test_sampling_writes_playable_video(sampled):
    assert sampled.shape == (10, 256, 256, 3)
    assert sampled.std() > 5


def test_converted_folder_gives_the_same_frames(sampled, converted, tmp_path):
    assert not list(converted.rglob('*.safetensors'))
    np.testing.assert_array_equal(run_sample(tmp_path, converted), sampled)


def test_given_clips_are_extended(folder, tmp_path):
    clip = np.random.default_rng(0).random((9, 32, 32, 3), np.float32)
    video.write_mp4(tmp_path / 'given.mp4', clip, 8, scale=8)
    made = run_sample(tmp_path / 'out', folder, given=[str(tmp_path / 'given.mp4')])
    assert made.shape[0] == 9 + 5

    # The video begins with the given clip, as it comes back from the codec.
    codec = latent_codec.PretrainedCodec(folder, TRANSFORMER, (32, 32))
    seen = video.read_video(tmp_path / 'given.mp4', height_px=32, width_px=32)[0][None]
    through = codec.decode_video(codec.encode_video(seen, (9,)), (3,))[0]
    frames = video.read_video(tmp_path / 'out/video_0.mp4', height_px=32, width_px=32)[0]
    assert np.abs(through - frames[:9] / 255).mean() < 0.05

    # The clip changes the scene that is sampled.
    other = run_sample(tmp_path / 'free', folder)
    assert np.abs(made[9:].astype(int) - other[5:]).max() > 20


def test_size_frames_tiling_and_negative_prompt(folder, sampled, tmp_path):
    made = run_sample(tmp_path / 'a', folder, height=32, width=48, frames=9, tiling=True)
    num_frames, height, width, _ = made.shape
    assert num_frames == 18
    assert height * 3 == width * 2
    record = json.loads((tmp_path / 'a/story.json').read_text())
    assert (record['width'], record['tiling'], record['dtype']) == (48, True, 'float32')

    guided = run_sample(tmp_path / 'b', folder, negative_prompt='blue ball on white stays')
    assert (guided != sampled).any()


@pytest.mark.parametrize(
    'chosen, message',
    [
        ({'height': 30}, '30x32 pixels do not divide into tokens: use multiples of 16'),
        ({'frames': 6}, r'one more than a multiple of 4, e\.g\. 5'),
    ],
)
def test_sampling_errors_name_the_input(folder, tmp_path, chosen, message):
    with pytest.raises(ValueError, match=message):
        run_sample(tmp_path, folder, **chosen)


def test_a_lora_file_gives_the_frames_of_the_merged_folder(folder, sampled, tmp_path):
    def random(x):
        return np.random.default_rng(x.size).normal(0, 0.3, x.shape).astype(np.float32)

    model, params = load_lib.load_transformer(folder / 'transformer')
    lora_config = lora.LoraConfig(2, alpha=3.0)
    tree = jax.tree.map(random, lora.init(jax.random.key(0), params, lora_config))
    lora_files.write_lora(tmp_path, model.cfg, tree, lora_config)
    file = tmp_path / 'pytorch_lora_weights.safetensors'
    made = run_sample(tmp_path / 'a', folder, lora=str(file))

    merged = tmp_path / 'merged'
    shutil.copytree(folder, merged, ignore=shutil.ignore_patterns('transformer'))
    merged_params = lora.merge(params, tree, lora_config)
    tensors = export.export_params('transformer', model.cfg, merged_params)
    tensor_io.write_safetensors(merged / 'transformer', 'model', tensors)
    shutil.copyfile(folder / 'transformer/config.json', merged / 'transformer/config.json')
    np.testing.assert_array_equal(made, run_sample(tmp_path / 'b', merged))

    # The LoRA is not too small to be seen.
    assert np.abs(made.astype(int) - sampled).max() > 10


def all_tensors(folder):
    tensors = {}
    for file in folder.glob('*.safetensors'):
        tensors |= load_file(file)
    return tensors


def test_round_trip_of_the_folder_is_bit_equal(folder, converted, tmp_path):
    back = tmp_path / 'back'
    counts = export.convert_folder(converted, back)
    for kind in names.NETWORKS:
        expected = all_tensors(folder / kind)
        found = all_tensors(back / kind)
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        assert counts[kind] == sum(value.size for value in expected.values())

    networks = [f'{kind}/config.json' for kind in names.NETWORKS]
    for name in (*networks, 'tokenizer/spiece.model', 'scheduler/scheduler_config.json'):
        assert (back / name).read_bytes() == (folder / name).read_bytes()

    with pytest.raises(ValueError, match='is not empty'):
        export.convert_folder(converted, back)


def test_converted_files_are_as_readable_as_new_ones(folder, tmp_path):
    """Whatever the modes of the source, e.g. of a download that only its owner may read."""
    source = tmp_path / 'source'
    shutil.copytree(folder, source)
    for path in [*source.rglob('*'), source]:
        path.chmod(0o700 if path.is_dir() else 0o400)
    export.convert_folder(source, tmp_path / 'out/orbax')
    export.convert_folder(tmp_path / 'out/orbax', tmp_path / 'out/back')
    assert unlike_the_umask(tmp_path / 'out') == {}


def test_loading_follows_the_sharding(folder):
    mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'fsdp'))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(x):
        sharding = spread if x.ndim == 3 else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    model_config = config_json.read_config('transformer', folder / 'transformer')
    target = jax.tree.map(placed, names.abstract_params(model_config))
    params = load_lib.read_params('transformer', folder / 'transformer', model_config, target)

    _, on_one_device = load_lib.load_transformer(folder / 'transformer')
    jax.tree.map(np.testing.assert_array_equal, params, on_one_device)
    assert params['blocks']['ff_in']['kernel'].sharding == spread


def test_a_fine_tuned_folder_is_sampled_exported_and_loaded_again(folder, tmp_path):
    """Training on stories goes through the folder's VAE and T5."""
    config = config_lib.Config(
        data=config_lib.DataConfig(
            layouts=((5, 5),), height_px=32, width_px=32, num_train=8, num_test=4
        ),
        model=dataclasses.replace(TRANSFORMER, remat='full'),
        optimizer=config_lib.OptimizerConfig('adamw', 1e-3, warmup_steps=1),
        train=config_lib.TrainConfig(
            steps=2, batch_size=8, conditional_probability=0.5, log_every_steps=1
        ),
        sample=config_lib.SampleConfig(steps=1, sheet_stories=4),
        eval=config_lib.EvalConfig(4, 4),
        mesh=mesh_lib.MeshConfig(data=4, fsdp=2, cpu_devices=8),
    )
    config = load_lib.with_model_from(config, folder)
    assert config.model.remat == 'full'
    assert config.schedule.snr_shift_scale == 3.0
    workdir = tmp_path / 'runs/tuned'
    trainer.train_and_evaluate(config, workdir)

    out = tmp_path / 'out'
    with flagsaver.flagsaver(workdir=str(workdir), out=str(out), prompt=list(CAPTIONS)):
        sample.main(['sample'])
    assert len(video.read_video(out / 'video_0.mp4')[0]) == 10

    exported = tmp_path / 'exported'
    export.convert_folder(workdir, exported)
    model, params = load_lib.load_transformer(exported / 'transformer')
    backend = model.cfg.attention_backend
    assert model.cfg == dataclasses.replace(TRANSFORMER, attention_backend=backend)
    target = load_lib.on_one_device(names.abstract_params(model.cfg))
    _, items = checkpoint.latest(workdir, {'ema': target})
    jax.tree.map(np.testing.assert_array_equal, params, items['ema'])
    schedule = config_json.load_schedule(exported / 'scheduler/scheduler_config.json')
    assert schedule == config.schedule


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'pattern': 'causal'}, "no 'causal' mask"),
        ({'lead_frames': 1}, 'no lead_frames, of which this model has 1'),
        (
            {'scene_offset_frames': 4.0},
            'positions that jump at cuts',
        ),
        (
            {'position_rule': 'continuous', 'learned_positions': True},
            "position_rule 'continuous'",
        ),
    ],
)
def test_models_without_a_counterpart_are_not_exported(changes, message):
    with pytest.raises(ValueError, match=message):
        config_json.transformer_json(dataclasses.replace(TRANSFORMER, **changes))


@pytest.mark.parametrize(
    'content, message',
    [
        ({'num_layer': 2}, 'Transformer config.json has keys that are not known here: num_layer'),
        ({'activation_fn': 'relu'}, "activation_fn to something other than 'gelu-approximate'"),
        ({'attn_msk_version': 3}, 'attn_msk_version 3 is not implemented'),
        ([], r'config\.json is not a transformer configuration'),
    ],
)
def test_configurations_that_cannot_be_read_are_named(content, message, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        config_json.read_config('transformer', tmp_path)


@pytest.mark.parametrize(
    'kind, content, message',
    [
        (
            'text_encoder',
            {'dense_act_fn': 'relu'},
            "dense_act_fn to something other than 'gelu_new'",
        ),
        ('text_encoder', {'is_gated_act': False}, 'is_gated_act to something other than True'),
        ('vae', {'down_block_types': ['DownBlock3D']}, 'down_block_types to something other than'),
        ('vae', {'use_quant_conv': True}, 'use_quant_conv to something other than False'),
    ],
)
def test_what_no_network_here_computes_is_refused(kind, content, message, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'feed_forward_proj': 'gated-gelu'} | content))
    if kind == 'vae':
        (tmp_path / 'config.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        config_json.read_config(kind, tmp_path)


# What stands in the released folders' files beside sizes, under the names that they have there.
RELEASED_VAE = {
    '_class_name': 'AutoencoderKLCogVideoX',
    '_diffusers_version': '0.32.0.dev0',
    'act_fn': 'silu',
    'block_out_channels': [128, 256, 256, 512],
    'down_block_types': ['CogVideoXDownBlock3D'] * 4,
    'force_upcast': True,
    'in_channels': 3,
    'latent_channels': 16,
    'latents_mean': None,
    'latents_std': None,
    'layers_per_block': 3,
    'norm_eps': 1e-06,
    'norm_num_groups': 32,
    'out_channels': 3,
    'sample_height': 480,
    'sample_width': 720,
    'scaling_factor': 0.7,
    'shift_factor': None,
    'temporal_compression_ratio': 4,
    'up_block_types': ['CogVideoXUpBlock3D'] * 4,
    'use_post_quant_conv': False,
    'use_quant_conv': False,
}
RELEASED_TRANSFORMER = {
    '_class_name': 'CogVideoXTransformer3DModel',
    '_diffusers_version': '0.32.0.dev0',
    'activation_fn': 'gelu-approximate',
    'attention_bias': True,
    'attention_head_dim': 64,
    'dropout': 0.0,
    'flip_sin_to_cos': True,
    'freq_shift': 0,
    'in_channels': 16,
    'max_text_seq_length': 226,
    'norm_elementwise_affine': True,
    'norm_eps': 1e-05,
    'num_attention_heads': 48,
    'num_layers': 42,
    'out_channels': 16,
    'patch_size': 2,
    'sample_frames': 49,
    'sample_height': 60,
    'sample_width': 90,
    'spatial_interpolation_scale': 1.875,
    'temporal_compression_ratio': 4,
    'temporal_interpolation_scale': 1.0,
    'text_embed_dim': 4096,
    'time_embed_dim': 512,
    'timestep_activation_fn': 'silu',
    'use_rotary_positional_embeddings': True,
}
LATER_KEYS = {'ofs_embed_dim': None, 'use_learned_positional_embeddings': False}


@pytest.mark.parametrize(
    'changes, expected',
    [
        ({}, {}),
        (
            {
                'num_attention_heads': 30,
                'num_layers': 30,
                'use_rotary_positional_embeddings': False,
            },
            {'num_attention_heads': 30, 'num_layers': 30, 'rotary': False},
        ),
        (
            LATER_KEYS | {'patch_size_t': 2, 'patch_bias': False, 'sample_frames': 81},
            {'patch_size_t': 2, 'patch_bias': False, 'sample_frames': 81},
        ),
    ],
    ids=['5B', '2B', '1.5-5B'],
)
def test_released_transformers_are_read(changes, expected):
    ours = config_json.transformer_config(RELEASED_TRANSFORMER | changes)
    sizes = dataclasses.replace(dit.DiTConfig(), position_rule='reference', **expected)
    assert ours == sizes


@pytest.mark.parametrize('inverted', [None, False, True])
def test_released_vaes_are_read(inverted):
    """invert_scale_latents, true in 1.5, says nothing about text to video."""
    content = dict(RELEASED_VAE)
    if inverted is not None:
        content['invert_scale_latents'] = inverted
    assert config_json.vae_config(content) == vae.VAEConfig()


@pytest.mark.parametrize(
    'content, message',
    [
        ({}, 'leaves out clip_sample, which then is True: only False is implemented'),
        ({'clip_sample': True}, 'sets clip_sample to True: only False'),
        ({'prediction_type': 'epsilon'}, "sets prediction_type to 'epsilon': only 'v_prediction'"),
        ({'beta_schedule': 'linear'}, "sets beta_schedule to 'linear': only 'scaled_linear'"),
        ({'trained_betas': [0.1, 0.2]}, r'sets trained_betas to \[0\.1, 0\.2\]: only None'),
        ({'set_alpha_to_one': False}, 'sets set_alpha_to_one to False: only True'),
        ({'thresholding': True}, 'sets thresholding to True: only False is implemented'),
        ({'timestep_spacing': 'random'}, "json: Unknown timestep_spacing 'random': use trailing"),
        ({'snr_shift_scale': '3'}, "sets snr_shift_scale to '3': it must be like 1.0"),
        ({'steps_offset': None}, 'sets steps_offset to None: it must be like 0'),
        ({'rescale_betas_zero_snr': 1}, 'sets rescale_betas_zero_snr to 1: it must be like True'),
        ({'snr_shift': 3.0, 'shift': 1}, 'keys that are not known here: shift, snr_shift'),
        (
            {'_class_name': 'DDIMScheduler'},
            'is of class DDIMScheduler: only CogVideoXDDIMScheduler',
        ),
    ],
)
def test_schedules_that_are_not_implemented_are_refused(content, message, tmp_path):
    whole = config_json.schedule_json(schedule_lib.Schedule())
    if not content:
        del whole['clip_sample']
    file = tmp_path / 'scheduler_config.json'
    file.write_text(json.dumps(whole | content))
    with pytest.raises(ValueError, match=message) as raised:
        config_json.load_schedule(file)
    assert str(file) in str(raised.value)

    # What only says how far something would be clipped that is not clipped changes nothing.
    file.write_text(
        json.dumps(
            config_json.schedule_json(schedule_lib.Schedule())
            | {'thresholding': False, 'clip_sample_range': 2.0, 'dynamic_thresholding_ratio': 0.9}
        )
    )
    assert config_json.load_schedule(file) == schedule_lib.Schedule()


def test_a_token_without_an_embedding_is_named(folder):
    codec = latent_codec.PretrainedCodec(folder, TRANSFORMER, (32, 32))
    with pytest.raises(ValueError, match=r'has token \d+, and the text encoder knows 384'):
        codec.encode_text(['it grows <extra_id_0>'])


def test_tokenizer(folder, tmp_path):
    import tokenizers

    # A caption ends with EOS; a short one is padded, and a long one is cut.
    tokenize = t5.load_tokenizer(folder / 'tokenizer')
    ids = tokenize(['it grows', '', 'red ring on gray moves left ' * 4], 12)
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / 'tokenizer/spiece.model')
    )
    words = processor.encode('it grows')
    assert list(ids[0]) == [*words, t5.EOS] + [t5.PAD] * (11 - len(words))
    assert list(ids[1]) == [t5.EOS] + [t5.PAD] * 11
    assert ids[2, -1] == t5.EOS
    assert t5.PAD not in ids[2]

    # The same vocabulary as tokenizer.json, as newer folders have it.
    size = processor.get_piece_size()
    vocab = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(size)]
    fast = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=2))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    fast.save(str(tmp_path / 'tokenizer.json'))
    captions = ['it grows', 'red ring on gray']
    tokenize_json = t5.load_tokenizer(tmp_path)
    np.testing.assert_array_equal(tokenize_json(captions, 12), tokenize(captions, 12))


def test_damaged_and_missing_tokenizers_are_named(folder, tmp_path):
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(ValueError, match=r'tokenizer\.json is damaged'):
        t5.load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'neither spiece\.model nor tokenizer\.json'):
        t5.load_tokenizer(folder)

    (tmp_path / 'tokenizer_config.json').write_text('{"legacy": false}')
    with pytest.raises(ValueError, match=r'json sets legacy to False: only True is implemented'):
        t5.load_tokenizer(tmp_path)
    (tmp_path / 'tokenizer_config.json').write_text('{"added_tokens_decoder": {"a": {}}}')
    with pytest.raises(ValueError, match=r'tokenizer_config\.json is damaged'):
        t5.load_tokenizer(tmp_path)


def test_padding_can_be_hidden_from_the_text_encoder(folder):
    def states(mask_padding):
        codec = latent_codec.PretrainedCodec(
            folder, TRANSFORMER, (32, 32), mask_padding=mask_padding
        )
        return codec.encode_text(['it grows'])  # [1, M, E]

    seen = states(mask_padding=False)
    hidden = states(mask_padding=True)
    assert seen.shape == (1, 12, 24)
    first_token = 0, 0
    assert np.abs(seen - hidden)[first_token].max() > 1e-3


def test_tiles_must_fit():
    vae.check_tiling(vae.VAEConfig())
    with pytest.raises(ValueError, match='half of its sample_width, 24 pixels'):
        vae.check_tiling(dataclasses.replace(VAE, sample_width=48))


def test_networks_that_do_not_fit_together(folder):
    wider = dataclasses.replace(TRANSFORMER, text_embed_dim=25)
    with pytest.raises(ValueError, match='do not fit a transformer of 4 and 25'):
        latent_codec.PretrainedCodec(folder, wider, (32, 32))


def test_folders_that_hold_no_model_are_named(tmp_path):
    message = 'holds neither transformer/, vae/, text_encoder/ nor checkpoints'
    with pytest.raises(FileNotFoundError, match=message):
        export.convert_folder(tmp_path, tmp_path / 'out')

    message = r'neither a checkpoint of a workdir .* nor a model folder'
    with pytest.raises(FileNotFoundError, match=message):
        run_sample(tmp_path, tmp_path / 'nothing')
