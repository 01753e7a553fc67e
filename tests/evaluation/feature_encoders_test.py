"""Encoders of frames, clips and captions: random tiny models of transformers' own classes give the
same numbers.

Most need the `oracle` extra, and are skipped without it.
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
    """The folder of a model whose parameters are all random, so that no zero or one hides an
    error."""
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


def clip(folder, dtype=None, **changes):
    """A tiny CLIP and its processor, in a folder."""
    transformers = pytest.importorskip('transformers')
    size = random_model.write_vocabulary(folder)
    config = {
        'text_config': random_model.BLOCK
        | {'vocab_size': size, 'max_position_embeddings': 12, 'eos_token_id': size - 1},
        'vision_config': random_model.BLOCK | {'image_size': 20, 'patch_size': 5},
        'projection_dim': 16,
    } | changes
    model = saved(folder, transformers.CLIPModel(transformers.CLIPConfig(**config)))
    return model, processor_of(
        folder, 'CLIPImageProcessor', size={'shortest_edge': 20}, crop_size=20
    )


@pytest.mark.parametrize('fast', [False, True])
def test_clip_is_that_of_transformers(tmp_path, fast):
    """Pixels and captions to features, also captions too long and beyond ASCII, from either form of
    the tokenizer."""
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
        features, cut = feature_encoders.encode_captions(encoder, captions)
        close(features, model.get_text_features(**inputs))
    assert cut == [False, True, False, False, True]


@pytest.mark.parametrize('registers', [False, True])
@pytest.mark.parametrize('changes', [{}, {'use_swiglu_ffn': True, 'qkv_bias': False}])
def test_dino_is_that_of_transformers(tmp_path, registers, changes):
    """At the size of its position table, and enlarged and shrunk to a frame that is not square."""
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    name = 'Dinov2WithRegisters' if registers else 'Dinov2'
    config = (
        {k: v for k, v in random_model.BLOCK.items() if k != 'intermediate_size'}
        | {'image_size': 35, 'patch_size': 5, 'mlp_ratio': 2}
        | changes
    )
    model = getattr(transformers, f'{name}Model')(getattr(transformers, f'{name}Config')(**config))
    saved(tmp_path, model)
    for size, crop in (35, (35, 35)), (20, (20, 25)), (60, (45, 60)):
        processor = processor_of(
            tmp_path,
            'BitImageProcessor',
            size={'shortest_edge': size},
            crop_size={'height': crop[0], 'width': crop[1]},
        )
        with torch.no_grad():
            theirs = model(**processor(list(frames(3)), return_tensors='pt')).pooler_output
        close(
            feature_encoders.encode_clips(feature_encoders.load(tmp_path), frames(3)[:, None]),
            theirs,
        )


@pytest.mark.parametrize('kind', ['Model', 'ForPreTraining', 'ForVideoClassification'])
def test_videomae_is_that_of_transformers(tmp_path, kind):
    """Encoders alone, before and after fine-tuning: means of tokens, under the norm that there
    is."""
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
    close(feature_encoders.encode_clips(feature_encoders.load(tmp_path), clips), theirs)
    with pytest.raises(ValueError, match='5 frames, the encoder takes 6'):
        feature_encoders.encode_clips(feature_encoders.load(tmp_path), clips[:, :5])


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
    np.testing.assert_allclose(
        feature_encoders.prepare(feature_encoders.parse_preprocess(config), pictures),
        theirs,
        rtol=1e-6,
        atol=1e-5,
    )


def test_reading_is_strict_and_leaves_integers_of_no_use(tmp_path):
    """A float16 file with the position_ids of old checkpoints is read; then every wrong tensor is
    named at once."""
    folder = random_model.write_encoder(tmp_path / 'clip', 'clip')
    file = folder / 'model.safetensors'
    tensors = {n: t.astype(np.float16) for n, t in safetensors.numpy.load_file(file).items()}
    ids = {f'{k}_model.embeddings.position_ids': np.arange(12)[None] for k in ('text', 'vision')}
    safetensors.numpy.save_file(tensors | ids, file)
    assert np.isfinite(
        feature_encoders.encode_clips(feature_encoders.load(folder), frames(1)[:, None])
    ).all()
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
    path.write_text(json.dumps(json.loads(path.read_text()) | {'crop_size': 10}))
    with pytest.raises(ValueError, match='does not fit the 2 x 2'):
        feature_encoders.encode_clips(feature_encoders.load(folder), frames(1)[:, None])
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
