"""Encoders of frames, clips and captions give the same numbers as those of transformers.

The models are tiny and random. Most tests need the `oracle` extra, and are skipped without it.
"""

import json

import numpy as np
import pytest
import safetensors.numpy

from mask2dit_jax import tensor_io
from mask2dit_jax.evaluation import feature_encoders
from mask2dit_jax.models import vit
from mask2dit_jax.tools import random_model


def saved(folder, model):
    """Saves a model whose parameters are all random, so that no zero or one hides an error."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    model.eval().save_pretrained(folder)
    return model


def processor_of(folder, name, **kwargs):
    transformers = pytest.importorskip('transformers')
    processor = getattr(transformers, name)(**kwargs)
    processor.save_pretrained(folder)
    return processor


def frames(count, height=30, width=44, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def clip(folder):
    """Writes a tiny CLIP and its processor to a folder."""
    transformers = pytest.importorskip('transformers')
    size = random_model.write_vocabulary(folder)
    config = transformers.CLIPConfig(
        text_config={
            **random_model.BLOCK,
            'vocab_size': size,
            'max_position_embeddings': 12,
            'eos_token_id': size - 1,
        },
        vision_config={**random_model.BLOCK, 'image_size': 20, 'patch_size': 5},
        projection_dim=16,
    )
    model = saved(folder, transformers.CLIPModel(config))
    processor = processor_of(folder, 'CLIPImageProcessor', size={'shortest_edge': 20}, crop_size=20)
    return model, processor


@pytest.mark.parametrize('fast', [False, True])
def test_clip_is_that_of_transformers(tmp_path, fast):
    """Pixels and captions, also too long and beyond ASCII, with either form of the tokenizer."""
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    model, processor = clip(tmp_path)
    tokenizer = transformers.CLIPTokenizerFast(
        str(tmp_path / 'vocab.json'), str(tmp_path / 'merges.txt')
    )
    if fast:
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / 'vocab.json').unlink()
    encoder = feature_encoders.load(tmp_path)

    pixels = frames(19)
    with torch.no_grad():
        theirs = model.get_image_features(**processor(list(pixels), return_tensors='pt'))
    close(feature_encoders.encode_clips(encoder, pixels[:, None]), theirs)

    captions = [
        "A red ball's",
        'moves\n 12 \t times!',
        'é RED cafe\u0301',
        '',
        'a' * 30 + ' red ball',
    ]
    inputs = tokenizer(
        captions, padding='max_length', truncation=True, max_length=12, return_tensors='pt'
    )
    with torch.no_grad():
        theirs = model.get_text_features(**inputs)
    features, was_cut = feature_encoders.encode_captions(encoder, captions)
    close(features, theirs)
    assert was_cut == [False, True, False, False, True]


@pytest.mark.parametrize('registers', [False, True])
@pytest.mark.parametrize('changes', [{}, {'use_swiglu_ffn': True, 'qkv_bias': False}])
def test_dino_is_that_of_transformers(tmp_path, registers, changes):
    """At the size of the position table, and at sizes to which the table is shrunk or enlarged."""
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    name = 'Dinov2WithRegisters' if registers else 'Dinov2'
    settings = {**random_model.BLOCK, 'image_size': 35, 'patch_size': 5, 'mlp_ratio': 2, **changes}
    del settings['intermediate_size']
    config = getattr(transformers, f'{name}Config')(**settings)
    model = saved(tmp_path, getattr(transformers, f'{name}Model')(config))

    for size, crop in (35, (35, 35)), (20, (20, 25)), (60, (45, 60)):
        processor = processor_of(
            tmp_path,
            'BitImageProcessor',
            size={'shortest_edge': size},
            crop_size={'height': crop[0], 'width': crop[1]},
        )
        with torch.no_grad():
            theirs = model(**processor(list(frames(3)), return_tensors='pt')).pooler_output
        encoder = feature_encoders.load(tmp_path)
        close(feature_encoders.encode_clips(encoder, frames(3)[:, None]), theirs)


@pytest.mark.parametrize('kind', ['Model', 'ForPreTraining', 'ForVideoClassification'])
def test_videomae_is_that_of_transformers(tmp_path, kind):
    """The encoder alone, and that of a model before and after fine-tuning, with its own norm."""
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    config = transformers.VideoMAEConfig(
        **random_model.BLOCK,
        image_size=20,
        patch_size=10,
        num_frames=6,
        tubelet_size=2,
        decoder_hidden_size=12,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        use_mean_pooling=kind != 'ForPreTraining',
    )
    model = saved(tmp_path, getattr(transformers, f'VideoMAE{kind}')(config))
    processor = processor_of(
        tmp_path,
        'VideoMAEImageProcessor',
        size={'shortest_edge': 20},
        crop_size={'height': 20, 'width': 20},
    )

    clips = frames(18).reshape(3, 6, 30, 44, 3)
    with torch.no_grad():
        pixels = processor([list(c) for c in clips], return_tensors='pt')['pixel_values']
        theirs = (model if kind == 'Model' else model.videomae)(pixels)[0].mean(1)
        if kind == 'ForVideoClassification':
            theirs = model.fc_norm(theirs)
    encoder = feature_encoders.load(tmp_path)
    close(feature_encoders.encode_clips(encoder, clips), theirs)

    with pytest.raises(ValueError, match='5 frames, the encoder takes 6'):
        feature_encoders.encode_clips(encoder, clips[:, :5])


@pytest.mark.parametrize(
    'how',
    [
        {'size': {'height': 17, 'width': 40}, 'do_center_crop': False},
        {'size': 21, 'crop_size': 20, 'resample': 2},
        {'do_resize': False, 'crop_size': 23, 'do_normalize': False},
        {
            'size': {'shortest_edge': 33},
            'crop_size': {'height': 20, 'width': 31},
            'do_rescale': False,
        },
    ],
)
@pytest.mark.parametrize('shape', [(30, 44), (51, 30)])
def test_pictures_are_prepared_as_by_transformers(tmp_path, how, shape):
    processor = processor_of(tmp_path, 'CLIPImageProcessor', **how)
    pictures = frames(2, *shape)
    theirs = processor(list(pictures), return_tensors='np')['pixel_values'].transpose(0, 2, 3, 1)

    config = json.loads((tmp_path / 'preprocessor_config.json').read_text())
    ours = feature_encoders.prepare(feature_encoders.parse_preprocess(config), pictures)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-5)


def test_reading_names_every_wrong_tensor_and_skips_unused_ones(tmp_path):
    """A float16 file with the position_ids of old checkpoints is read."""
    folder = random_model.write_encoder(tmp_path / 'clip', 'clip')
    file = folder / 'model.safetensors'
    tensors = {n: t.astype(np.float16) for n, t in safetensors.numpy.load_file(file).items()}
    ids = {f'{k}_model.embeddings.position_ids': np.arange(12)[None] for k in ('text', 'vision')}
    safetensors.numpy.save_file(tensors | ids, file)
    encoder = feature_encoders.load(folder)
    assert np.isfinite(feature_encoders.encode_clips(encoder, frames(1)[:, None])).all()

    lost = tensors.pop('text_projection.weight')
    wrong = 'vision_model.encoder.layers.1.mlp.fc1.bias'
    safetensors.numpy.save_file(tensors | {'new': lost, wrong: np.zeros(3, np.float16)}, file)
    with pytest.raises(ValueError, match='does not fit its config') as error:
        feature_encoders.load(folder)
    for problem in (
        'missing text_projection.weight',
        f'{wrong} has shape (3,), expected (40,)',
        'unexpected new',
    ):
        assert problem in str(error.value)


def broken(folder, name, text=None):
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    'name, text, message',
    [
        ('config.json', None, r'config\.json cannot be read'),
        ('config.json', '[', r'config\.json is not a JSON'),
        ('config.json', '{"model_type": "llama"}', "'llama' model: only clip, dinov2"),
        (
            'config.json',
            '{"model_type": "clip", "vision_config": {"hidden_act": "relu"}}',
            "config.json: .*'relu'",
        ),
        ('preprocessor_config.json', None, r'preprocessor_config\.json cannot be read'),
        (
            'preprocessor_config.json',
            '{"size": {"longest_edge": 3}}',
            r'preprocessor_config\.json.*longest_edge',
        ),
        ('preprocessor_config.json', '{"size": 20}', r'preprocessor_config\.json.*image_mean'),
        ('vocab.json', None, 'neither tokenizer.json nor vocab.json'),
        ('vocab.json', '{', r'vocab\.json .*damaged'),
        ('vocab.json', '{"a": 0}', r'vocab\.json .*damaged|lacks <.startoftext'),
        ('tokenizer.json', '{', r'tokenizer\.json .*damaged'),
        ('model.safetensors', None, 'lacks a .safetensors file'),
    ],
)
def test_damaged_folders_are_errors_that_name_the_file(tmp_path, name, text, message):
    folder = random_model.write_encoder(tmp_path / 'clip', 'clip')
    broken(folder, name, text)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        feature_encoders.load(folder)
    assert '\n' not in str(error.value)


def test_a_crop_that_is_not_the_position_table_of_clip_is_an_error(tmp_path):
    folder = random_model.write_encoder(tmp_path / 'clip', 'clip')
    path = folder / 'preprocessor_config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {'crop_size': 10}))
    encoder = feature_encoders.load(folder)
    with pytest.raises(ValueError, match='does not fit the 2 x 2'):
        feature_encoders.encode_clips(encoder, frames(1)[:, None])


def test_a_crop_that_is_larger_than_the_frame_is_an_error():
    how = feature_encoders.Preprocess(10, 3, (20, 20), 1, (0,), (1,))
    with pytest.raises(ValueError, match='crop of'):
        feature_encoders.prepare(how, frames(1))


@pytest.mark.parametrize('antialias', [False, True])
def test_bicubic_weights_keep_constants_and_mirror(antialias):
    for size, new in (7, 7), (7, 16), (37, 16), (5, 2):
        matrix = vit.bicubic_matrix(size, new, antialias)
        np.testing.assert_allclose(matrix.sum(1), 1)
        np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)
    np.testing.assert_allclose(vit.bicubic_matrix(6, 6, antialias), np.eye(6), atol=1e-12)


def test_tensors_without_use_may_hold_anything(tmp_path):
    safetensors.numpy.save_file(
        {'a': np.ones(2, np.float32), 'ids': np.arange(3)}, tmp_path / 'model.safetensors'
    )
    assert set(tensor_io.open_safetensors(tmp_path, 'ids|b.*')) == {'a'}
    with pytest.raises(ValueError, match='ids as I64'):
        tensor_io.open_safetensors(tmp_path)
