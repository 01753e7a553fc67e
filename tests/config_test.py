"""Every configuration loads, validates and abstract-evaluates its training step; wrong ones are
refused."""

import dataclasses
import importlib.util
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from mask2dit_jax import config as config_lib
from mask2dit_jax import presets
from mask2dit_jax.data import latent_codec
from mask2dit_jax.distributed import context_parallel
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.models import lora
from mask2dit_jax.pretrained import config_json, export, names
from mask2dit_jax.training import train_step

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / 'configs').glob('*.py'))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(slices):
    for path in CONFIGS:
        for variant in load(path).VARIANTS:
            if bool(load(path).get_config(variant).mesh.slice) == slices:
                yield pytest.param(path, variant, id=f'{path.stem}:{variant}')


@pytest.mark.parametrize('path, variant', cases(slices=True))
def test_slice_fits_its_mesh(path, variant):
    cfg = config_lib.parse(load(path).get_config(variant))
    axes = {a: getattr(cfg.mesh, a) for a in mesh_lib.AXES}
    assert math.prod(axes.values()) == presets.SLICES[cfg.mesh.slice].chips * axes['data']
    frames, latent = latent_codec.latent_shape(cfg, cfg.data.layouts[0])
    tokens = cfg.model.layout(frames, *latent[:2]).num_tokens
    for batch in (cfg.train.batch_size, 2 * cfg.eval.batch_size, 2 * cfg.sample.sheet_stories):
        context_parallel.check(axes, batch, tokens, cfg.model.num_attention_heads)


@pytest.mark.parametrize('path, variant', cases(slices=False))
def test_configuration_evaluates(path, variant):
    cfg = config_lib.parse(load(path).get_config(variant))
    b, m = cfg.train.batch_size, cfg.model
    frames, latent = latent_codec.latent_shape(cfg, cfg.data.layouts[0])
    shape = jax.ShapeDtypeStruct
    latents = shape((b, sum(frames), *latent), jnp.float32)
    text = shape((b, len(frames), m.max_text_seq_length, m.text_embed_dim), jnp.float32)
    state = jax.eval_shape(
        lambda x, y: train_step.init_state(cfg, (x[0], y[0], frames)), latents, text
    )
    after, metrics = jax.eval_shape(
        lambda s, x, y: train_step.train_step(
            s, {'latents': x, 'text': y}, y[0, 0], config=cfg, frames=frames
        ),
        state,
        latents,
        text,
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics.keys() == {'loss', 'grad_norm'}


@pytest.mark.parametrize(
    'variant, parameters, tensors',
    [('5b', 5_570_283_072, 1024), ('2b', 1_693_783_872, 736), ('1.5-5b', None, 1024)],
)
def test_released_sizes(variant, parameters, tensors):
    """Counts of the released checkpoints; the description of 1.5 has none."""
    model = config_lib.parse(load(CONFIGS[0].with_name('sft.py')).get_config(variant)).model
    exported = export.export_params('transformer', model, names.abstract_params(model))
    assert len(exported) == tensors
    assert parameters in (None, sum(math.prod(t.shape) for t in exported.values()))
    released = config_json.transformer_json(model)
    assert config_json.transformer_config(released, remat='full') == model


def test_unknown_variant_is_refused():
    for path in CONFIGS:
        with pytest.raises(ValueError, match="'nonsense'"):
            load(path).get_config('nonsense')


def test_round_trip(tmp_path):
    cfg = config_lib.parse(config_lib.default())
    assert cfg == config_lib.Config()
    config_lib.save(cfg, tmp_path / 'config.json')
    assert config_lib.load(tmp_path / 'config.json') == cfg


@pytest.mark.parametrize(
    'change, message',
    [
        ({'model': {'num_layrs': 2}}, 'config.model has unknown keys num_layrs'),
        ({'colour': 1}, 'config has unknown keys colour'),
        ({'model': {'pattern': 'both'}}, "model.pattern is 'both': use one of dual"),
        ({'optimizer': {'name': 'sgd'}}, "optimizer.name is 'sgd'"),
        ({'train': {'batch_size': 6, 'grad_accumulation': 4}}, 'batch_size 6 does not divide'),
        ({'train': {'caption_dropout': 2.0}}, 'caption_dropout must lie in 0...1'),
        ({'eval': {'stories': 10, 'batch_size': 4}}, 'eval.stories 10 is not a multiple'),
        ({'lora': {'rank': -1}}, 'config.lora.rank must not be negative, got -1'),
        ({'data': {'layouts': ()}}, 'layouts is empty'),
        ({'data': {'layouts': ((4, 0),)}}, 'a scene frames'),
    ],
)
def test_errors_name_the_key(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_lib.parse(change)


def test_every_field_is_documented():
    for cls in (
        config_lib.DataConfig,
        config_lib.OptimizerConfig,
        lora.LoraConfig,
        config_lib.TrainConfig,
        mesh_lib.MeshConfig,
    ):
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in cls.__doc__]
        assert set(missing) <= {
            'steps',
            'b1',
            'b2',
            'eps',
            'weight_decay',
            'log_every_steps',
            'checkpoint_every_steps',
            'sample_every_steps',
        }, (cls, missing)
