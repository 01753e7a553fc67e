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
from absl import flags
from ml_collections import config_flags

from mask2dit_jax import config as config_lib
from mask2dit_jax import presets
from mask2dit_jax.data import latent_codec
from mask2dit_jax.distributed import context_parallel
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.models import dit
from mask2dit_jax.pretrained import config_json, export, names
from mask2dit_jax.training import train_step, trainer

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
        batch = {'latents': latents, 'text': text, 'least_given': jnp.zeros(size, int)}
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
        (
            {'model': {'num_layrs': 2}},
            'config.model has unknown keys num_layrs (did you mean num_layers?)',
        ),
        ({'zoo': 1}, 'config has unknown keys zoo; it knows seed'),
        ({'trian': {'steps': 2}}, 'unknown keys trian (did you mean train?)'),
        ({'steps': 2}, 'unknown keys steps (did you mean train.steps or sample.steps?)'),
        ({'train': 5}, 'config.train is 5: give values of its keys'),
        ({'model': {'pattern': 'both'}}, "model.pattern is 'both': use one of dual"),
        ({'optimizer': {'name': 'sgd'}}, "optimizer.name is 'sgd'"),
        ({'train': {'batch_size': 6, 'grad_accumulation': 4}}, 'batch_size 6 does not divide'),
        ({'eval': {'stories': 10, 'batch_size': 4}}, 'eval.stories 10 is not a multiple'),
        (
            {'sample': {'steps': 5000}},
            'config.sample.steps is 5000: use a whole number from 1 to 1000',
        ),
        (
            {'schedule': {'timestep_spacing': 'leading', 'steps_offset': 30}},
            'config.schedule.steps_offset 30 leads 50 sampling steps beyond',
        ),
        ({'schedule': {'beta_start': 0.5}}, 'config.schedule.beta_start 0.5 must not be above'),
        ({'model': {'freq_shift': 2000}}, 'config.model.freq_shift 2000 must be below'),
        ({'train': {'keep_every_steps': 1500}}, 'keep_every_steps 1500 must be a multiple'),
        ({'data': {'story_scenes': 2}}, 'story_scenes 2 is fewer than the 3 scenes of a layout'),
        ({'data': {'story_scenes': 4, 'layouts': ((4, 8, 4),)}}, 'that have one length'),
        ({'data': {'named_once': True}}, 'named_once is about the clips'),
        (
            {'data': {'world': 'cast', 'story_scenes': 8}, 'train': {'given': 'any'}},
            'config.data.story_scenes 8 with config.data.world cast needs config.train.given',
        ),
    ],
)
def test_errors_name_the_key(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_lib.parse(change)


def all_fields():
    """Section (None for none) and field of every setting."""
    for field in dataclasses.fields(config_lib.Config):
        if dataclasses.is_dataclass(field.default):
            for key in dataclasses.fields(field.default):
                yield pytest.param(field.name, key, id=f'{field.name}.{key.name}')
        else:
            yield pytest.param(None, field, id=field.name)


# By the type of the default. None is that of patch_size_t, a whole number; 'gs://(' is no path, no
# known word and no regular expression.
WRONG = {
    bool: (1, 0.0, 'True', None),
    int: (-1, 0.5, 1.0, True, '1', math.nan, math.inf, None, (1,), {'a': 1}),
    float: (math.nan, math.inf, -math.inf, True, '0.5', None, (0.5,)),
    str: ('gs://(', 3, None, True, ('a',)),
    tuple: (3, None, 'abc', (3,), ((),), ((0,),), ((1.0,),), ((True,),), (('a',),)),
    type(None): (-1, 0.5, True, '1', math.nan, (1,)),
}


@pytest.mark.parametrize('section, field', all_fields())
def test_every_field_has_a_range_and_wrong_values_are_refused_by_name(section, field):
    allowed = field.metadata['range']
    assert allowed.allows(field.default)
    name = f'{section}.{field.name}' if section else field.name

    for value in WRONG[type(field.default)]:
        given = {section: {field.name: value}} if section else {field.name: value}
        message = re.escape(f'config.{name} is {value!r}: use {allowed.says}.')
        with pytest.raises(ValueError, match=f'^{message}$'):
            config_lib.parse(given)


@pytest.mark.parametrize(
    'key, value',
    [
        ('train.log_every_steps', 0),
        ('train.checkpoint_every_steps', 0),
        ('train.sample_every_steps', 0),
        ('train.grad_accumulation', 0),
        ('train.keep_checkpoints', 0),
        ('train.batch_size', 0),
        ('train.steps', -5),
        ('train.steps', 0),
        ('train.steps', 2**31),
        ('train.caption_dropout', 2.0),
        ('train.ema_decay', 1.5),
        ('mesh.data', 0),
        ('mesh.fsdp', 0),
        ('mesh.context', 0),
        ('mesh.tensor', 0),
        ('mesh.cpu_devices', 0),
        ('mesh.slice', 'v5p-64'),
        ('eval.stories', 0),
        ('eval.batch_size', 0),
        ('data.layouts', (4, 4, 4)),
        ('data.layouts', ()),
        ('data.layouts', ((4, 0),)),
        ('data.fps', 0),
        ('data.fps', 60),
        ('data.caption_style', 'last'),
        ('data.world', 'two'),
        ('optimizer.learning_rate', -1),
        ('optimizer.learning_rate', 0),
        ('optimizer.b1', 2),
        ('optimizer.b2', 1),
        ('optimizer.eps', 0),
        ('optimizer.clip_norm', 0),
        ('optimizer.weight_decay', -0.1),
        ('optimizer.final_fraction', 1.1),
        ('sample.sampler', 'foo'),
        ('sample.steps', 0),
        ('sample.guidance', math.nan),
        ('sample.sheet_stories', 0),
        ('schedule.timestep_spacing', 'foo'),
        ('schedule.num_train_timesteps', 1),
        ('schedule.beta_end', 1),
        ('schedule.snr_shift_scale', 0),
        ('model.num_layers', 0),
        ('model.norm_eps', 0),
        ('model.dtype', 'float16'),
        ('lora.rank', -1),
        ('lora.layers', 'attn/('),
        ('seed', -1),
        ('seed', 2**32),
        ('requires', ('data.dir',)),
    ],
)
def test_values_out_of_range_are_refused(key, value):
    section, _, name = key.rpartition('.')
    with pytest.raises(ValueError, match=rf'config\.{key} is .*: use '):
        config_lib.parse({section: {name: value}} if section else {name: value})


@pytest.mark.parametrize(
    'change',
    [
        {'train': {'keep_every_steps': 0, 'caption_dropout': 0, 'ema_decay': 1}},
        {
            'train': {'steps': 100, 'conditional_from_step': 2000},
            'optimizer': {'warmup_steps': 500},
        },
        {'optimizer': {'weight_decay': 0, 'b1': 0, 'learning_rate': 1, 'warmup_steps': 0}},
        {'sample': {'guidance': -1, 'steps': 1000}, 'lora': {'rank': 8, 'alpha': 16}},
        {'model': {'patch_size_t': 2}, 'data': {'layouts': [[4], [4, 8]]}, 'seed': 2**32 - 1},
    ],
    ids=str,
)
def test_what_has_a_meaning_is_allowed(change):
    config = config_lib.parse(change)
    hash(config)
    for section, values in change.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            parsed = getattr(getattr(config, section), key)
            if isinstance(value, list):
                value = tuple(tuple(layout) for layout in value)
            assert parsed == value
            default = getattr(getattr(config_lib.Config(), section), key)
            assert default is None or type(parsed) is type(default)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ValueError) as ranges_error:
        config_lib.parse(
            {
                'seed': -1,
                'trian': {},
                'train': {'steps': 0, 'step': 5, 'batch_size': 7},
                'model': {'pattern': 'both', 'num_layers': 0},
            }
        )
    lines = str(ranges_error.value).splitlines()
    assert lines[0] == '6 settings are wrong:'
    for word in 'config.seed', 'trian', 'train.steps', 'step (did', 'model.pattern', 'num_layers':
        assert sum(word in line for line in lines[1:]) == 1, word

    with pytest.raises(ValueError) as conflicts_error:
        config_lib.parse(
            {
                'train': {'batch_size': 7, 'grad_accumulation': 2},
                'eval': {'stories': 10, 'batch_size': 4},
                'model': {'attention_head_dim': 20},
                'sample': {'steps': 1001},
            }
        )
    lines = str(conflicts_error.value).splitlines()
    assert lines[0] == '4 settings are wrong:'
    for word in 'batch_size 7', 'eval.stories 10', 'attention_head_dim', 'sample.steps':
        assert sum(word in line for line in lines[1:]) == 1, word


def test_dataclasses_refuse_what_released_files_may_hold():
    with pytest.raises(ValueError, match=r'model\.num_layers is 0: use a whole number'):
        dit.DiTConfig(num_layers=0, pattern='both')


# What a recipe needs before it makes sense, by file and variant.
NEEDS = {
    'sft': ['init_from', 'data.encoded'],
    'pretrain': ['data.encoded'],
    'tiny:conditional': ['init_from'],
    'tiny:lora': ['init_from'],
}


@pytest.mark.parametrize('path, variant', [*cases(slices=False), *cases(slices=True)])
def test_training_needs_what_its_recipe_needs(path, variant, tmp_path):
    config = config_lib.parse(load(path).get_config(variant))
    needs = NEEDS.get(path.stem, NEEDS.get(f'{path.stem}:{variant}', []))
    workdir = tmp_path / 'run'
    if needs:
        with pytest.raises(ValueError) as error:
            trainer.train_and_evaluate(config, workdir)
        assert not workdir.exists()
        lines = [line for line in str(error.value).splitlines() if 'is empty' in line]
        assert len(lines) == len(needs)
        for line, key in zip(lines, needs):
            assert f'config.{key} is empty' in line and 'give --c' in line

    data = dataclasses.replace(config.data, encoded='clips')
    config_lib.check_training(dataclasses.replace(config, init_from='base', data=data))


@pytest.mark.parametrize(
    'change, message',
    [
        (
            {'mesh': mesh_lib.MeshConfig(context=5)},
            '48 attention heads do not divide over context 5',
        ),
        ({'data': config_lib.DataConfig(num_test=3)}, 'sheet_stories 4 must not be above'),
        ({'train': config_lib.TrainConfig(batch_size=0)}, 'config.train.batch_size is 0'),
        ({'seed': -1}, 'config.seed is -1'),
    ],
)
def test_training_checks_configurations_that_were_not_parsed(change, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer.train_and_evaluate(config_lib.Config(**change), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_configurations_of_earlier_versions_load(tmp_path):
    path = tmp_path / 'config.json'
    config_lib.save(config_lib.Config(), path)
    values = json.loads(path.read_text())
    del values['requires']
    values['sample']['guidance'] = 6
    path.write_text(json.dumps(values))

    config = config_lib.load(path)
    assert config == config_lib.Config() and isinstance(config.sample.guidance, float)


def start_main(*args):
    """What the command says that ends at once."""
    done = subprocess.run(
        [sys.executable, '-m', 'mask2dit_jax.main', '--workdir=/dev/null/run', *args],
        cwd=ROOT,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
    )
    assert done.returncode
    return done.stderr


def test_flags_that_are_wrong_are_told_at_once():
    said = start_main(
        '--config=configs/tiny.py',
        '--config.train.step=5',
        '--config.trian.steps=5',
        '--config.foo.bar.baz=5',
        '--noconfig.model.rotry',
        '--config.train.steps=5.5',
        '--config.train.batch_size=many',
        '--config.model.rotary=maybe',
        '--config.model.patch_size_t=0',
        '--config.sample.guidance=nan',
        '--config.data.layouts=(4,4,4)',
        '--config.optimizer.learning_rate=1e-3',
    )
    last = said[said.index('9 settings are wrong:') :]
    for part in (
        'config has unknown keys foo, trian (did you mean train?)',
        'config.train has unknown keys step (did you mean steps?)',
        'config.model has unknown keys rotry (did you mean rotary?)',
        'config.train.steps is 5.5: use a whole number',
        "config.train.batch_size is 'many': use a whole number",
        "config.model.rotary is 'maybe': use True or False",
        'config.model.patch_size_t is 0: use a whole number',
        'config.sample.guidance is nan: use a finite number',
        'config.data.layouts is (4, 4, 4): use a tuple',
    ):
        assert last.count(part) == 1, said
    assert 'learning_rate' not in last


@pytest.mark.parametrize(
    'path, message',
    [
        ('configs/tinny.py', "'configs/tinny.py' is not a file (did you mean configs/tiny.py?)"),
        ('tiny', "'tiny' is not a file (did you mean configs/tiny.py?)"),
        ('configs/sfft.py:5b', '(did you mean configs/sft.py?)'),
        ('configs', "'configs' is not a file"),
        ('', "'' is not a file"),
        ('README.md', 'README.md is not a configuration file in Python'),
        ('gs://b/tiny.py', 'not on this machine'),
        ('configs/tiny.py:smok', "configs/tiny.py has no variant 'smok' (did you mean smoke?)"),
        ('configs/sft.py:6b', "'6b' is not a variant of this file: give MODEL"),
        ('configs/sft.py:v6e-65', '(did you mean v6e-64?)'),
    ],
)
def test_misspelt_files_and_variants(path, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=[])
    parser = config_lib._FileParser(values['config'].parser)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parser.parse(path)
    assert len(str(error.value).splitlines()) == 1


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
    words = ' '.join(text.split())
    assert words.count(' Takes ') == len(keys)
    assert 'updates of the whole training. Takes a whole number from 1 to' in words


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
