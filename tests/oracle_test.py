"""Random tiny models of diffusers' and transformers' own classes give the same numbers.

Weights travel in both directions. The tests need the `oracle` extra and are skipped without it.
Stock diffusers has no dual mask: here the transformer is compared under full attention, and under
the mask by the goldens.
"""

import dataclasses
import inspect
import json
import sys

import jax
import numpy as np
import pytest

from mask2dit_jax import generation, pipeline, tensor_io
from mask2dit_jax.attention import masks
from mask2dit_jax.benchmark import worker
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models import embeddings, lora, t5, vae
from mask2dit_jax.pretrained import config_json, export, lora_files, names
from mask2dit_jax.pretrained import load as load_lib
from mask2dit_jax.tools import random_model

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')
transformers = pytest.importorskip('transformers')

BASE = {
    'attention_head_dim': 16,
    'in_channels': 4,
    'text_embed_dim': 20,
    'time_embed_dim': 24,
    'sample_width': 12,
    'sample_height': 8,
    'sample_frames': 9,
    'max_text_seq_length': 7,
}


def random_transformer(seed):
    """A configuration drawn from everything that the class takes, and its model."""
    rng = np.random.default_rng(seed)
    kind = ('sincos', 'rotary', 'learned', 'patch_t')[seed % 4]
    config = BASE | {
        'num_attention_heads': int(rng.integers(1, 4)),
        'num_layers': int(rng.integers(1, 4)),
        'out_channels': int(rng.choice([4, 8])),
        'flip_sin_to_cos': bool(rng.integers(2)),
        'freq_shift': int(rng.integers(2)),
        'attention_bias': bool(rng.integers(2)),
        'norm_elementwise_affine': bool(rng.integers(2)),
        'norm_eps': float(rng.choice([1e-5, 1e-3])),
        'patch_bias': bool(rng.integers(2)),
        'use_rotary_positional_embeddings': kind != 'sincos',
        'use_learned_positional_embeddings': kind == 'learned',
        'patch_size_t': 2 if kind == 'patch_t' else None,
        'spatial_interpolation_scale': float(rng.choice([1.0, 1.875])),
    }
    if kind == 'patch_t':
        config['sample_frames'] = 13
    torch.manual_seed(seed)
    return config, randomised(diffusers.CogVideoXTransformer3DModel(**config))


def randomised(model):
    """All parameters random, so that no zero hides an error."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    return model.eval()


def forward(model, config, x, text, t):
    """Output of the oracle's transformer, whose caller makes the rotary tables."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    rotary = None
    if config['use_rotary_positional_embeddings']:
        frames = x.shape[1] // (config['patch_size_t'] or 1)
        grid = (config['sample_height'] // 2, config['sample_width'] // 2)
        rule = {'grid_type': 'slice', 'max_size': grid} if config['patch_size_t'] else {}
        rotary = get_3d_rotary_pos_embed(
            config['attention_head_dim'], ((0, 0), grid), grid, frames, **rule
        )

    with torch.no_grad():
        out = model(torch.tensor(x), torch.tensor(text), torch.tensor([t]), image_rotary_emb=rotary)
    return out.sample.numpy()


def close(ours, theirs, tolerance):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max()))


def save_ours(kind, folder, cfg, params, config_json):
    tensor_io.write_safetensors(
        folder,
        names.NETWORKS[kind].stem,
        export.export_params(kind, cfg, params),
        shard_bytes=100_000,
    )
    (folder / 'config.json').write_text(json.dumps(config_json))


def other_params(params, seed):
    """Random values in the shapes of params."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.normal(0, 0.2, p.shape).astype(np.float32), params)


def load_theirs(cls, folder):
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    problems = ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs')
    assert not any(info[problem] for problem in problems), info
    return model.eval()


@pytest.mark.parametrize('seed', range(8))
def test_transformer(seed, tmp_path):
    config, theirs = random_transformer(seed)
    theirs.save_pretrained(tmp_path / 'theirs', max_shard_size='50KB')
    model, params = load_lib.load_transformer(tmp_path / 'theirs', pattern='full')
    rng = np.random.default_rng(seed)
    frames = (config['sample_frames'] - 1) // 4 + 1
    x = rng.normal(size=(1, frames, 4, 8, 12)).astype(np.float32)
    text = rng.normal(size=(1, 7, 20)).astype(np.float32)

    apply = jax.jit(model.apply, static_argnames='frames')

    def ours(params):
        out = apply(
            {'params': params},
            np.moveaxis(x, 2, -1),
            text[:, None],
            np.full((1, 1), 437),
            frames=(frames,),
        )
        return np.moveaxis(out, -1, 2)

    # Theirs in ours.
    close(ours(params), forward(theirs, config, x, text, 437), 5e-6)

    # Ours in theirs.
    params = other_params(params, seed)
    save_ours(
        'transformer', tmp_path / 'ours', model.cfg, params, config_json.transformer_json(model.cfg)
    )
    theirs = load_theirs(diffusers.CogVideoXTransformer3DModel, tmp_path / 'ours')
    close(ours(params), forward(theirs, config, x, text, 437), 5e-6)


@pytest.mark.parametrize('seed', range(4))
def test_lora(seed, tmp_path):
    """Our LoRA in diffusers, and PEFT's in ours, at scales that are not 1.

    PEFT's file is read with and without the pipeline's prefix.
    """
    peft = pytest.importorskip('peft')
    config, theirs = random_transformer(seed)
    theirs.save_pretrained(tmp_path / 'base')
    model, params = load_lib.load_transformer(tmp_path / 'base', pattern='full')
    rng = np.random.default_rng(seed)
    frames = (config['sample_frames'] - 1) // 4 + 1
    x = rng.normal(size=(1, frames, 4, 8, 12)).astype(np.float32)
    text = rng.normal(size=(1, 7, 20)).astype(np.float32)

    def compare(tree, cfg):
        out = jax.jit(model.apply, static_argnames='frames')(
            {'params': lora.merge(params, tree, cfg)},
            np.moveaxis(x, 2, -1),
            text[:, None],
            np.full((1, 1), 437),
            frames=(frames,),
        )
        close(np.moveaxis(out, -1, 2), forward(theirs, config, x, text, 437), 1e-5)

    # Ours in theirs.
    pipeline = diffusers.CogVideoXPipeline
    cfg = lora.LoraConfig(3, alpha=4.5, layers='kernel$')
    tree = other_params(lora.init(jax.random.key(0), params, cfg), seed)
    lora_files.write_lora(tmp_path / 'ours', model.cfg, tree, cfg)
    # The two steps of pipeline.load_lora_weights.
    state, metadata = pipeline.lora_state_dict(str(tmp_path / 'ours'), return_lora_metadata=True)
    assert all('lora' in name for name in state)
    pipeline.load_lora_into_transformer(state, theirs, metadata=metadata, adapter_name='ours')
    compare(tree, cfg)

    # Theirs in ours.
    theirs.delete_adapters('ours')
    theirs.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=5, target_modules=['to_k', 'to_q', 'to_v', 'to_out.0']),
        'peft',
    )
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if 'lora_' in name:
                p.normal_(0, 0.2)
    theirs.save_lora_adapter(tmp_path / 'bare', 'peft')
    pipeline.save_lora_weights(
        tmp_path / 'named',
        peft.get_peft_model_state_dict(theirs, adapter_name='peft'),
        transformer_lora_adapter_metadata=theirs.peft_config['peft'].to_dict(),
    )

    for folder in ('bare', 'named'):
        file = tmp_path / folder / 'pytorch_lora_weights.safetensors'
        tree, cfg = lora_files.read_lora(file, model.cfg)
        assert (cfg.rank, lora.scale(cfg)) == (2, 2.5)
        compare(tree, cfg)


@pytest.mark.parametrize(
    'num_frames', [9, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 13))]
)
def test_a_scene_of_a_model_with_temporal_patches_is_sampled_as_in_the_pipeline(
    num_frames, tmp_path
):
    """9 frames are 3 latents, to which the pipeline adds one in front; 13 frames are 4, 1 is 1."""
    transformer = dataclasses.replace(
        random_model.TRANSFORMER, patch_size_t=2, sample_frames=num_frames
    )
    random_model.write(tmp_path, transformer)

    # Ours.
    model = pipeline.load(tmp_path, dtype='float32', decode_rule='diffusers')
    inputs = generation.encode_inputs(model.codec, [['it grows']], (num_frames,))
    settings = {'seed': 0, 'steps': 4, 'guidance': 3.0}
    _, params = model.params()
    latents = generation.sample_latents(model.config, params, inputs, **settings)
    assert latents.shape == inputs.given.shape
    ours = model.codec.decode_video(latents, inputs.latent_frames)

    # Theirs, from the same noise and text states.
    theirs = diffusers.CogVideoXPipeline(
        tokenizer=transformers.T5Tokenizer(str(tmp_path / 'tokenizer/spiece.model'), legacy=True),
        text_encoder=transformers.T5EncoderModel.from_pretrained(tmp_path / 'text_encoder'),
        vae=diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path / 'vae'),
        transformer=diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / 'transformer'),
        scheduler=diffusers.CogVideoXDDIMScheduler.from_pretrained(tmp_path / 'scheduler'),
    )
    theirs.set_progress_bar_config(disable=True)
    noise = generation.story_noise(0, 0, (4, *inputs.given.shape[2:]))  # [T, H, W, C]
    video = theirs(
        height=32,
        width=32,
        num_frames=num_frames,
        num_inference_steps=settings['steps'],
        guidance_scale=settings['guidance'],
        latents=torch.tensor(np.moveaxis(noise, -1, 1)[None]),
        prompt_embeds=torch.tensor(inputs.text[0]),
        negative_prompt_embeds=torch.tensor(inputs.null_text[None]),
        max_sequence_length=12,
        output_type='np',
    ).frames
    assert video.shape == ours.shape
    assert video.std() > 0.05
    close(ours, video, 1e-4)


@pytest.mark.parametrize('seed', range(2))
def test_vae(seed, tmp_path):
    rng = np.random.default_rng(seed)
    config = {
        'block_out_channels': ((4, 8, 8, 12), (6, 6, 12, 12))[seed],
        'latent_channels': (4, 3)[seed],
        'layers_per_block': (1, 2)[seed],
        'norm_num_groups': 2,
        'norm_eps': (1e-4, 1e-2)[seed],
        'sample_height': 96,
        'sample_width': 80,
    }
    torch.manual_seed(seed)
    theirs = randomised(diffusers.AutoencoderKLCogVideoX(**config))
    theirs.save_pretrained(tmp_path / 'theirs')
    model, params = load_lib.load_vae(tmp_path / 'theirs')

    def compare(theirs, params, frames, height, width):
        x = rng.uniform(-1, 1, (1, 3, frames, height, width)).astype(np.float32)
        latent_size = ((frames + 3) // 4, height // 8, width // 8)
        z = rng.normal(size=(1, config['latent_channels'], *latent_size)).astype(np.float32)
        with torch.no_grad():
            posterior = theirs.encode(torch.tensor(x)).latent_dist
            video = theirs.decode(torch.tensor(z)).sample

        tiling = theirs.use_tiling
        mean, logvar = vae.encode(model.cfg, params, np.moveaxis(x, 1, -1), tiling)
        close(np.moveaxis(mean, -1, 1), posterior.mean.numpy(), 1e-5)
        close(np.moveaxis(logvar, -1, 1), posterior.logvar.numpy(), 1e-5)

        decoded = vae.decode(model.cfg, params, np.moveaxis(z, 1, -1), tiling, rule='diffusers')
        close(np.moveaxis(decoded, -1, 1), video.numpy(), 1e-5)

    compare(theirs, params, 9, 16, 24)

    params = other_params(params, seed)
    config_json = json.loads((tmp_path / 'theirs/config.json').read_text())
    save_ours('vae', tmp_path / 'ours', model.cfg, params, config_json)
    theirs = load_theirs(diffusers.AutoencoderKLCogVideoX, tmp_path / 'ours')
    compare(theirs, params, 9, 16, 24)

    if seed == 0:
        vae.check_tiling(model.cfg)
        theirs.enable_tiling()
        compare(theirs, params, 1, 56, 48)


@pytest.mark.parametrize('seed', range(2))
def test_t5(seed, tmp_path):
    config = transformers.T5Config(
        vocab_size=50,
        d_model=24,
        d_kv=(6, 8)[seed],
        d_ff=40,
        num_layers=2,
        num_heads=3,
        relative_attention_num_buckets=(32, 16)[seed],
        relative_attention_max_distance=(128, 60)[seed],
        layer_norm_epsilon=(1e-6, 1e-2)[seed],
        feed_forward_proj='gated-gelu',
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    theirs = randomised(transformers.T5EncoderModel(config))
    theirs.save_pretrained(tmp_path / 'theirs')
    model, params = load_lib.load_t5(tmp_path / 'theirs')
    ids = np.random.default_rng(seed).integers(2, 50, (2, 226)).astype(np.int32)
    ids[:, 150:] = t5.PAD
    mask = ids != t5.PAD

    def compare(theirs, params):
        # No mask is a mask of ones.
        for seen in (None, mask):
            their_mask = np.ones_like(ids) if seen is None else seen * 1
            with torch.no_grad():
                out = theirs(torch.tensor(ids), attention_mask=torch.tensor(their_mask))
            close(t5.encode(model.cfg, params, ids, seen), out.last_hidden_state.numpy(), 1e-5)

    compare(theirs, params)

    params = other_params(params, seed)
    save_ours('text_encoder', tmp_path / 'ours', model.cfg, params, config.to_dict())
    compare(load_theirs(transformers.T5EncoderModel, tmp_path / 'ours'), params)


@pytest.fixture(scope='module')
def spiece(tmp_path_factory):
    """A folder with a small spiece.model, with the released one's numbers of special tokens."""
    import sentencepiece

    folder = tmp_path_factory.mktemp('tokenizer')
    text = 'the quick brown fox jumps over a lazy dog; Straße, naïve café — 12,345 & "quoted" ﬁne'
    words = text.split()
    rng = np.random.default_rng(0)
    sentences = [' '.join(rng.choice(words, 12)) for _ in range(300)]
    (folder / 'text').write_text('\n'.join(sentences), encoding='utf-8')
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / 'text'),
        model_prefix=str(folder / 'spiece'),
        vocab_size=120,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder


def random_captions(seed, count):
    """Captions of words, special tokens and parts of them, white space, and other scripts."""
    rng = np.random.default_rng(seed)
    parts = (
        *('the', 'fox', 'Straße', 'ﬁne', '12,345', 'Ω', '雪', '🦊', 'e\u0301', '\u2581', '\u200b'),
        *(' ', '  ', '\n', '\t', '\u00a0', '\u3000', '.', '<', '>', '/s>', '<extra_id_', '&'),
        *(
            '</s>',
            '<pad>',
            '<unk>',
            '<s>',
            '</S>',
            '<extra_id_0>',
            '<extra_id_10>',
            '<extra_id_99>',
        ),
        *('<extra_id_100>', '<new>'),
    )
    return [''.join(rng.choice(parts, rng.integers(12))) for _ in range(count)]


PLAIN_CAPTIONS = ['', '  spaced   out ', 'unseen Ω symbols \n and lines', 'fox ' * 400, 'a fox</s>']
ADDED = {
    'added_tokens_decoder': {
        '0': {'content': '<pad>', 'lstrip': False, 'rstrip': False, 'special': True},
        '1': {'content': '</s>', 'lstrip': False, 'rstrip': True, 'special': True},
        '400': {'content': '<new>', 'lstrip': True, 'rstrip': False, 'special': True},
    },
    'extra_ids': 20,
    'legacy': True,
}


@pytest.mark.parametrize('settings', [None, ADDED])
@pytest.mark.parametrize('kind', ['T5Tokenizer', 'T5TokenizerFast'])
def test_tokenizer(kind, settings, spiece, tmp_path):
    """Ids equal those of transformers, special tokens in the caption included."""
    theirs = getattr(transformers, kind)
    if kind == 'T5Tokenizer':
        (tmp_path / 'spiece.model').write_bytes((spiece / 'spiece.model').read_bytes())
    else:
        fast = theirs(str(spiece / 'spiece.model'), extra_ids=0)
        fast.backend_tokenizer.save(str(tmp_path / 'tokenizer.json'))
    if settings:
        content = settings | {'tokenizer_class': kind}
        (tmp_path / 'tokenizer_config.json').write_text(json.dumps(content))

    captions = [*PLAIN_CAPTIONS, *random_captions(0, 600)]
    expected = theirs.from_pretrained(tmp_path)(
        captions, padding='max_length', max_length=20, truncation=True, return_tensors='np'
    )
    ids = t5.load_tokenizer(tmp_path)(captions, 20)
    np.testing.assert_array_equal(ids, expected.input_ids)
    np.testing.assert_array_equal(t5.caption_tokens(ids), expected.attention_mask)


def test_rotary_tables_of_other_sizes():
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    for rows, cols in ((4, 6), (3, 6), (4, 5), (2, 3)):
        region = get_resize_crop_region_for_grid((rows, cols), 6, 4)
        cos, sin = get_3d_rotary_pos_embed(16, region, (rows, cols), 3)
        ours = embeddings.rope_table(SceneLayout((3,), rows, cols, 1), 16, 'linspace', (4, 6))
        close(ours[0], cos.numpy(), 5e-6)
        close(ours[1], sin.numpy(), 5e-6)


def test_the_package_never_imports_the_oracle():
    import subprocess

    code = (
        'import sys, mask2dit_jax.training.trainer, mask2dit_jax.sample; '
        'sys.exit(bool({"torch", "diffusers", "transformers", "tensorflow"} & set(sys.modules)))'
    )
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0


@pytest.mark.parametrize(
    'kind, cls',
    [
        ('transformer', 'diffusers.CogVideoXTransformer3DModel'),
        ('vae', 'diffusers.AutoencoderKLCogVideoX'),
        ('text_encoder', 'transformers.T5Config'),
    ],
)
def test_a_key_that_config_json_leaves_out_means_the_default_of_the_oracle(kind, cls):
    package, name = cls.split('.')
    oracle = getattr(pytest.importorskip(package), name)
    parse = config_json.PARSERS[kind]
    given = {'feed_forward_proj': 'gated-gelu'} if kind == 'text_encoder' else {}
    ours = dataclasses.asdict(parse(given))

    # config.json with all defaults of the oracle written out; tuples are lists in JSON.
    defaults = {}
    for key, parameter in inspect.signature(oracle.__init__).parameters.items():
        value = parameter.default
        if value is inspect.Parameter.empty or key == 'feed_forward_proj':
            continue
        if kind == 'text_encoder' and key not in ours:
            continue
        defaults[key] = list(value) if isinstance(value, tuple) else value

    assert ours == dataclasses.asdict(parse(given | defaults))


@pytest.mark.parametrize('what', ['forward', 'forward + backward', 'sampling'])
def test_the_dual_mask_is_the_references_two_attention_calls(what, monkeypatch):
    """Outputs, gradients and guided sampling equal those of diffusers' transformer with two calls.

    The cases are the benchmark's, so the test also shows that it compares equal work.
    """

    def small(*args, usual=worker.model_config):
        return dataclasses.replace(usual(*args), num_layers=2, num_attention_heads=2)

    for name, value in (('FRAMES', 2), ('HEIGHT', 4), ('WIDTH', 6), ('model_config', small)):
        monkeypatch.setattr(worker, name, value)

    case = {'formulation': 'blockwise', 'remat': 'save_matmuls', 'scenes': 2, 'what': what}
    ours = worker.ours(case)[0]()
    theirs = worker.diffusers_with_two_calls(case)[0]()
    np.testing.assert_allclose(ours(), theirs(), rtol=2e-5)
    if what != 'forward':
        return

    # Under another mask the numbers differ, so the comparison can fail.
    monkeypatch.setattr(
        masks, 'may_attend', lambda *args, usual=masks.may_attend: usual('full', *args[1:])
    )
    other = worker.ours(case | {'formulation': 'dense'})[0]()
    assert abs(other() - theirs()) > 1e-3 * abs(theirs())


# A scheduler_config.json that has every key, with values that are not the class's defaults.
SCHEDULE = {
    'num_train_timesteps': 500,
    'beta_start': 0.001,
    'beta_end': 0.02,
    'beta_schedule': 'scaled_linear',
    'trained_betas': None,
    'clip_sample': False,
    'set_alpha_to_one': True,
    'steps_offset': 1,
    'prediction_type': 'v_prediction',
    'clip_sample_range': 2.0,
    'sample_max_value': 3.0,
    'timestep_spacing': 'linspace',
    'rescale_betas_zero_snr': True,
    'snr_shift_scale': 1.5,
}


@pytest.mark.parametrize('name', ['CogVideoXDDIMScheduler', 'CogVideoXDPMScheduler'])
def test_every_key_of_a_schedule_may_be_left_out_as_in_the_oracle(name, tmp_path):
    """The schedule is that of diffusers, or the key's default is refused by name."""
    oracle = getattr(diffusers, name)
    parameters = inspect.signature(oracle.__init__).parameters
    assert set(SCHEDULE) == set(parameters) - {'self', 'kwargs'}
    file = tmp_path / 'scheduler_config.json'

    refused = set()
    for left_out in (None, *SCHEDULE):
        content = {key: value for key, value in SCHEDULE.items() if key != left_out}
        file.write_text(json.dumps({'_class_name': name, '_diffusers_version': '0'} | content))
        try:
            ours = config_json.load_schedule(file)
        except ValueError as error:
            default = parameters[left_out].default
            assert f'leaves out {left_out}, which then is {default!r}' in str(error)
            refused.add(left_out)
            continue

        theirs = oracle.from_pretrained(tmp_path)
        close(ours.alphas_bar(), theirs.alphas_cumprod.numpy(), 1e-12)
        for steps in (1, 7, 50):
            theirs.set_timesteps(steps)
            np.testing.assert_array_equal(ours.timesteps(steps), theirs.timesteps.numpy())
    assert refused == {'prediction_type', 'clip_sample'}


def test_exported_schedules_are_those_of_the_oracle(tmp_path):
    """Nothing is lost, and no key is unknown to the class."""
    ours = schedule_lib.Schedule(beta_end=0.02, snr_shift_scale=2.0, timestep_spacing='linspace')
    content = config_json.schedule_json(ours)
    (tmp_path / 'scheduler_config.json').write_text(json.dumps(content))
    assert config_json.load_schedule(tmp_path / 'scheduler_config.json') == ours

    theirs, unused = diffusers.CogVideoXDDIMScheduler.from_pretrained(
        tmp_path, return_unused_kwargs=True
    )
    assert set(unused) <= {'_class_name'}
    assert set(content) - {'_class_name'} <= set(SCHEDULE)
    close(ours.alphas_bar(), theirs.alphas_cumprod.numpy(), 1e-12)
