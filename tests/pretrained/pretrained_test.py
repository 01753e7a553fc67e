"""A model folder in the released layout, tiny and random: sampled, extended, converted, fine-tuned,
handed back."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from absl.testing import flagsaver
from safetensors.numpy import load_file

from mask2dit_jax import checkpoint, sample, tensor_io
from mask2dit_jax import config as config_lib
from mask2dit_jax.data import latent_codec, video
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.models import lora, t5, vae
from mask2dit_jax.pretrained import export, lora_files, names
from mask2dit_jax.pretrained import load as load_lib
from mask2dit_jax.tools import random_model
from mask2dit_jax.training import trainer

TRANSFORMER, VAE = random_model.TRANSFORMER, random_model.VAE
CAPTIONS = 'red ring on gray moves left', 'it grows'


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
    usual = {
        'checkpoint': str(source),
        'out': str(out),
        'prompt': list(CAPTIONS),
        'dtype': 'float32',
        'steps': 2,
    }
    with flagsaver.flagsaver(**(usual | chosen)):
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
    codec = latent_codec.PretrainedCodec(folder, TRANSFORMER, (32, 32))
    seen = video.read_video(tmp_path / 'given.mp4', height_px=32, width_px=32)[0][None]
    through = codec.decode_video(codec.encode_video(seen, (9,)), (3,))[0]
    shown = video.read_video(tmp_path / 'out/video_0.mp4', height_px=32, width_px=32)[0][:9] / 255
    assert np.abs(through - shown).mean() < 0.05
    other = run_sample(tmp_path / 'free', folder)
    assert np.abs(made[9:].astype(int) - other[5:]).max() > 20


def test_size_frames_tiling_and_negative_prompt(folder, sampled, tmp_path):
    made = run_sample(tmp_path / 'a', folder, height=32, width=48, frames=9, tiling=True)
    assert made.shape[0] == 18 and made.shape[1] * 3 == made.shape[2] * 2
    assert (
        run_sample(tmp_path / 'b', folder, negative_prompt='blue ball on white stays') != sampled
    ).any()
    record = json.loads((tmp_path / 'a/story.json').read_text())
    assert (record['width'], record['tiling'], record['dtype']) == (48, True, 'float32')


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
    model, params = load_lib.load_transformer(folder / 'transformer')
    cfg = lora.LoraConfig(2, alpha=3.0)
    tree = jax.tree.map(
        lambda x: np.random.default_rng(x.size).normal(0, 0.3, x.shape).astype(np.float32),
        lora.init(jax.random.key(0), params, cfg),
    )
    lora_files.write_lora(tmp_path, model.cfg, tree, cfg)
    made = run_sample(
        tmp_path / 'a', folder, lora=str(tmp_path / 'pytorch_lora_weights.safetensors')
    )
    shutil.copytree(folder, tmp_path / 'merged', ignore=shutil.ignore_patterns('transformer'))
    tensors = export.export_params('transformer', model.cfg, lora.merge(params, tree, cfg))
    tensor_io.write_safetensors(tmp_path / 'merged/transformer', 'model', tensors)
    shutil.copyfile(folder / 'transformer/config.json', tmp_path / 'merged/transformer/config.json')
    np.testing.assert_array_equal(made, run_sample(tmp_path / 'b', tmp_path / 'merged'))
    assert np.abs(made.astype(int) - sampled).max() > 10


def all_tensors(folder):
    return {n: v for f in folder.glob('*.safetensors') for n, v in load_file(f).items()}


def test_round_trip_of_the_folder_is_bit_equal(folder, converted, tmp_path):
    back = tmp_path / 'back'
    counts = export.convert_folder(converted, back)
    for kind in names.NETWORKS:
        want, have = all_tensors(folder / kind), all_tensors(back / kind)
        assert have.keys() == want.keys()
        for name in want:
            assert have[name].dtype == want[name].dtype
            np.testing.assert_array_equal(have[name], want[name], err_msg=name)
        assert counts[kind] == sum(v.size for v in want.values())
        assert (back / kind / 'config.json').read_text() == (
            folder / kind / 'config.json'
        ).read_text()
    assert (back / 'tokenizer/spiece.model').exists() and (
        back / 'scheduler/scheduler_config.json'
    ).exists()
    with pytest.raises(ValueError, match='is not empty'):
        export.convert_folder(converted, back)


def test_loading_follows_the_sharding(folder):
    mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))
    cfg = load_lib.read_config('transformer', folder / 'transformer')
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'fsdp'))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread if x.ndim == 3 else whole),
        names.abstract_params(cfg),
    )
    params = load_lib.read_params('transformer', folder / 'transformer', cfg, target)
    one = load_lib.load_transformer(folder / 'transformer')[1]
    jax.tree.map(np.testing.assert_array_equal, params, one)
    assert params['blocks']['ff_in']['kernel'].sharding == spread


def test_fine_tuning_and_handing_back(folder, tmp_path):
    """main on a model folder: trained on stories through its VAE and T5, sampled, exported, loaded
    again."""
    cfg = config_lib.Config(
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
    cfg = load_lib.with_model_from(cfg, folder)
    assert cfg.model.remat == 'full' and cfg.schedule.snr_shift_scale == 3.0
    workdir = tmp_path / 'runs/tuned'
    trainer.train_and_evaluate(cfg, workdir)
    with flagsaver.flagsaver(
        workdir=str(workdir), out=str(tmp_path / 'out'), prompt=list(CAPTIONS)
    ):
        sample.main(['sample'])
    assert len(video.read_video(tmp_path / 'out/video_0.mp4')[0]) == 10
    export.convert_folder(workdir, tmp_path / 'exported')
    model, params = load_lib.load_transformer(tmp_path / 'exported/transformer')
    assert model.cfg == dataclasses.replace(
        TRANSFORMER, attention_backend=model.cfg.attention_backend
    )
    target = load_lib.on_one_device(names.abstract_params(model.cfg))
    ema = checkpoint.latest(workdir, {'ema': target})[1]['ema']
    jax.tree.map(np.testing.assert_array_equal, params, ema)
    assert (
        load_lib.load_schedule(tmp_path / 'exported/scheduler/scheduler_config.json')
        == cfg.schedule
    )


def test_models_without_a_counterpart_are_not_exported():
    tiny = dataclasses.replace(TRANSFORMER, position_rule='continuous', learned_positions=True)
    for cfg, message in (
        (dataclasses.replace(TRANSFORMER, pattern='causal'), "no 'causal' mask"),
        (tiny, "position_rule 'continuous'"),
    ):
        with pytest.raises(ValueError, match=message):
            names.transformer_json(cfg)


def test_tokenizer(folder, tmp_path):
    import tokenizers

    tokenize = t5.load_tokenizer(folder / 'tokenizer')
    ids = tokenize(['it grows', '', 'red ring on gray moves left ' * 4], 12)
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / 'tokenizer/spiece.model')
    )
    words = processor.encode('it grows')
    assert list(ids[0]) == [*words, t5.EOS] + [t5.PAD] * (11 - len(words))
    assert list(ids[1]) == [t5.EOS] + [t5.PAD] * 11
    assert ids[2, -1] == t5.EOS and t5.PAD not in ids[2]
    # The same vocabulary as tokenizer.json, as newer folders have it.
    vocab = [
        (processor.id_to_piece(i), processor.get_score(i))
        for i in range(processor.get_piece_size())
    ]
    fast = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=2))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    fast.save(str(tmp_path / 'tokenizer.json'))
    np.testing.assert_array_equal(
        t5.load_tokenizer(tmp_path)(['it grows', 'red ring on gray'], 12),
        tokenize(['it grows', 'red ring on gray'], 12),
    )
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(ValueError, match=r'tokenizer\.json is damaged'):
        t5.load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'neither spiece\.model nor tokenizer\.json'):
        t5.load_tokenizer(folder)


def test_padding_can_be_hidden_from_the_text_encoder(folder):
    seen, hidden = (
        latent_codec.PretrainedCodec(folder, TRANSFORMER, (32, 32), mask_padding=m).encode_text(
            ['it grows']
        )
        for m in (False, True)
    )
    assert seen.shape == (1, 12, 24) and np.abs(seen - hidden)[0, 0].max() > 1e-3


def test_tiles_must_fit():
    vae.check_tiling(vae.VAEConfig())
    with pytest.raises(ValueError, match='half of its sample_width, 24 pixels'):
        vae.check_tiling(dataclasses.replace(VAE, sample_width=48))


def test_networks_that_do_not_fit_together(folder):
    with pytest.raises(ValueError, match='do not fit a transformer of 4 and 25'):
        latent_codec.PretrainedCodec(
            folder, dataclasses.replace(TRANSFORMER, text_embed_dim=25), (32, 32)
        )


def test_command_lines_are_checked(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match='holds neither transformer/, vae/, text_encoder/ nor checkpoints'
    ):
        export.convert_folder(tmp_path, tmp_path / 'out')
    with pytest.raises(
        FileNotFoundError, match=r'neither a checkpoint of a workdir .* nor a model folder'
    ):
        run_sample(tmp_path, tmp_path / 'nothing')
