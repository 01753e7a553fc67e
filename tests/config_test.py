"""Every configuration loads, is valid, and its training step has consistent shapes; wrong
configurations are refused, and the help text names every key."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from mask2dit_jax import config as config_lib
from mask2dit_jax import presets
from mask2dit_jax.data import latent_codec
from mask2dit_jax.distributed import context_parallel
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.pretrained import config_json, export, names
from mask2dit_jax.training import train_step

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))


def load(path):
    """The module of a configuration file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(slices):
    """Every variant of every file, with or without a TPU slice."""
    for path in CONFIGS:
        module = load(path)
        for variant in module.VARIANTS:
            has_slice = bool(module.get_config(variant).mesh.slice)
            if has_slice == slices:
                yield pytest.param(path, variant, id=f'{path.stem}:{variant}')


@pytest.mark.parametrize('path, variant', cases(slices=True))
def test_slice_fits_its_mesh(path, variant):
    config = config_lib.parse(load(path).get_config(variant))
    axes = {axis: getattr(config.mesh, axis) for axis in mesh_lib.AXES}
    chips = presets.SLICES[config.mesh.slice].chips
    assert math.prod(axes.values()) == chips * axes['data']

    frames, latent = latent_codec.latent_shape(config, config.data.layouts[0])
    num_tokens = config.model.layout(frames, *latent[:2]).num_tokens
    batches = (
        config.train.batch_size,
        2 * config.eval.batch_size,
        2 * config.sample.sheet_stories,
    )
    for batch in batches:
        context_parallel.check(axes, batch, num_tokens, config.model.num_attention_heads)


@pytest.mark.parametrize('path, variant', cases(slices=False))
def test_configuration_evaluates(path, variant):
    config = config_lib.parse(load(path).get_config(variant))
    frames, latent = latent_codec.latent_shape(config, config.data.layouts[0])
    size = config.train.batch_size
    text_shape = (config.model.max_text_seq_length, config.model.text_embed_dim)
    latents = jax.ShapeDtypeStruct((size, sum(frames), *latent), jnp.float32)
    text = jax.ShapeDtypeStruct((size, len(frames), *text_shape), jnp.float32)

    def init(latents, text):
        return train_step.init_state(config, (latents[0], text[0], frames))

    def update(state, latents, text):
        batch = {'latents': latents, 'text': text}
        return train_step.train_step(state, batch, text[0, 0], config=config, frames=frames)

    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    state = jax.eval_shape(init, latents, text)
    after, metrics = jax.eval_shape(update, state, latents, text)
    assert shapes(after) == shapes(state)
    assert metrics.keys() == {'loss', 'grad_norm'}


@pytest.mark.parametrize(
    'variant, parameters, tensors',
    [('5b', 5_570_283_072, 1024), ('2b', 1_693_783_872, 736), ('1.5-5b', None, 1024)],
)
def test_released_sizes(variant, parameters, tensors):
    """The counts are those of the released checkpoints; for 1.5 the parameters are not known."""
    sft = load(ROOT / 'configs/sft.py')
    model = config_lib.parse(sft.get_config(variant)).model
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
    config = config_lib.parse(config_lib.default())
    assert config == config_lib.Config()

    config_lib.save(config, tmp_path / 'config.json')
    assert config_lib.load(tmp_path / 'config.json') == config


def test_a_backend_of_an_earlier_version_loads_under_its_new_name(tmp_path):
    path = tmp_path / 'config.json'
    config_lib.save(config_lib.Config(), path)
    values = json.loads(path.read_text())
    values['model']['attention_backend'] = 'decomposed'
    path.write_text(json.dumps(values))

    assert config_lib.load(path).model.attention_backend == 'blockwise'


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


def test_help_lists_every_key_with_its_default_and_its_meaning():
    """A key without an Attributes entry in its dataclass's docstring has no line below it."""
    text = config_lib.describe()
    config = config_lib.Config()
    keys = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            for key in dataclasses.fields(value):
                keys[f'{field.name}.{key.name}'] = getattr(value, key.name)
        else:
            keys[field.name] = value

    assert {'seed', 'model.num_layers', 'schedule.beta_start', 'lora.rank', 'mesh.fsdp'} <= set(
        keys
    )
    for key, default in keys.items():
        line = re.escape(f'  --config.{key}={default!r}')
        assert re.search(rf'^{line}\n {{6}}\S', text, re.MULTILINE), f'{key} is not documented'


def test_help_reads_entries_of_several_lines_and_of_several_fields():
    @dataclasses.dataclass(frozen=True)
    class Section:
        """A section.

        Attributes:
          height, width: size: in
            pixels.
          depth: layers.
        """

        height: int = 1
        width: int = 2
        depth: int = 3
        strange: int = 4

    texts = config_lib._attribute_texts(Section)
    assert texts == {'height': 'size: in pixels.', 'width': 'size: in pixels.', 'depth': 'layers.'}


def test_help_of_main_begins_with_the_required_flags():
    done = subprocess.run(
        [sys.executable, '-m', 'mask2dit_jax.main', '--help'],
        cwd=ROOT,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
    )
    first_lines = '\n'.join(done.stdout.splitlines()[:5])
    assert '--config' in first_lines and '--workdir' in first_lines, done.stderr
    assert config_lib.describe() in done.stdout
