"""The three networks of a released folder: reference names, shapes and configs <-> Flax parameters.

A model folder in diffusers' layout has transformer/, vae/, text_encoder/ (each config.json and .safetensors),
tokenizer/ and scheduler/. Loading is strict: a missing, unexpected or wrongly shaped tensor is an error that names it.

    model, params = load_transformer('folder/transformer')
    v = model.apply({'params': params}, latents, text, t, frames=(13, 13, 13))

with latents [B, T, H, W, C] (the reference's (B, F, C, h, w) with channels moved last), text [B, S, M, E], one
timestep per scene t [B, S], and frames, the latent frames of each scene. Where the reference sets clip_idx=i, t is
the timestep in column i and 0 elsewhere. attn_msk_version becomes `model.cfg.pattern`.

    model, params = load_vae('folder/vae')             # vae.encode(model.cfg, params, pixels), vae.decode(...)
    model, params = load_t5('folder/text_encoder')     # t5.encode(model.cfg, params, ids)

As a command it converts a whole model folder to Orbax, which loads faster, and back:

  python -m mask2dit_jax.convert --from=CogVideoX-5b --to=cogvideox-orbax
  python -m mask2dit_jax.convert --from=cogvideox-orbax --to=exported
  python -m mask2dit_jax.convert --from=runs/mine --to=exported      # EMA of a training run, for PyTorch users

A run with LoRA gives both: transformer/ with LoRA merged into its base, and pytorch_lora_weights.safetensors, the LoRA
alone, for diffusers' load_lora_weights and for `sample --lora`.
"""
import dataclasses
import functools
import json
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mask2dit_jax import checkpoint, tensor_io
from mask2dit_jax import config as config_lib
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.models import dit, lora, t5, vae

# config.json keys that DiTConfig takes over under the same name.
_SAME = ('num_layers', 'num_attention_heads', 'attention_head_dim', 'in_channels', 'out_channels', 'text_embed_dim',
         'time_embed_dim', 'max_text_seq_length', 'patch_size', 'patch_size_t', 'patch_bias', 'sample_height',
         'sample_width', 'sample_frames', 'temporal_compression_ratio', 'flip_sin_to_cos', 'freq_shift',
         'attention_bias', 'norm_elementwise_affine', 'norm_eps', 'spatial_interpolation_scale',
         'temporal_interpolation_scale')
_RENAMED = {'use_rotary_positional_embeddings': 'rotary', 'use_learned_positional_embeddings': 'learned_positions'}
_PATTERNS = {2: 'dual', 5: 'full'}
# What the networks are built for; any other value is refused. Then keys without meaning for the forward pass.
_DIT_FIXED = {'activation_fn': 'gelu-approximate', 'timestep_activation_fn': 'silu', 'ofs_embed_dim': None}
_DIT_UNUSED = {'dropout', 'add_noise_in_inpaint_model'}
_VAE_FIXED = {'act_fn': 'silu', 'shift_factor': None, 'latents_mean': None, 'latents_std': None,
              'use_quant_conv': False, 'use_post_quant_conv': False, 'invert_scale_latents': False}
_VAE_UNUSED = {'force_upcast'}
_T5_FIXED = {'model_type': 't5', 'feed_forward_proj': 'gated-gelu'}
# What the reference's classes take for a key that config.json leaves out, where our own default differs.
_DIT_OMITTED = {'num_attention_heads': 30, 'num_layers': 30, 'use_rotary_positional_embeddings': False}
_VAE_OMITTED = {'scaling_factor': 1.15258426}
_T5_OMITTED = {'d_model': 512, 'd_ff': 2048, 'num_layers': 6, 'num_heads': 8, 'feed_forward_proj': 'relu'}


def _refuse_other(config: dict, fixed: dict, what: str) -> None:
    """Takes the keys of `fixed` out of config; any other value than the one there is an error."""
    for key, value in fixed.items():
        if config.pop(key, value) != value:
            raise ValueError(f'{what} config.json sets {key} to something other than {value!r}, which is all we '
                             'implement.')


def _refuse_unknown(config: dict, unused: set, what: str) -> None:
    unknown = sorted(set(config) - unused)
    if unknown:
        raise ValueError(f'{what} config.json has keys that are not known here: {", ".join(unknown)}.')


def _public(config: dict, omitted: dict) -> dict:
    return omitted | {k: v for k, v in config.items() if not k.startswith('_')}


def transformer_config(config: dict, **overrides) -> dit.DiTConfig:
    """DiTConfig from a released config.json; `overrides` are DiTConfig fields, e.g. dtype='float32'.

    Released weights know the reference's position rule, so that is what they get.

    Raises:
      ValueError: for a key that is not known here, or a value this transformer does not implement.
    """
    config = _public(config, _DIT_OMITTED)
    fields = {k: config.pop(k) for k in _SAME if k in config}
    fields |= {ours: config.pop(theirs) for theirs, ours in _RENAMED.items() if theirs in config}
    version = config.pop('attn_msk_version', 2)
    if version not in _PATTERNS:
        raise ValueError(f'attn_msk_version {version} is not implemented: 2 is the dual mask, 5 full attention.')
    _refuse_other(config, _DIT_FIXED, 'Transformer')
    _refuse_unknown(config, _DIT_UNUSED, 'Transformer')
    return dit.DiTConfig(**(fields | {'pattern': _PATTERNS[version], 'position_rule': 'reference'} | overrides))


def transformer_json(cfg: dit.DiTConfig) -> dict:
    """The config.json of an exported transformer.

    Raises:
      ValueError: if the reference has no such model: another mask, or positions that count on through the scenes.
    """
    versions = {pattern: version for version, pattern in _PATTERNS.items()}
    if cfg.pattern not in versions:
        raise ValueError(f'The reference has no {cfg.pattern!r} mask: only {", ".join(versions)} can be exported.')
    if cfg.position_rule != 'reference' and (cfg.learned_positions or not cfg.rotary):
        raise ValueError("This model was trained with position_rule 'continuous' and added positions, which the "
                         "reference would compute differently: only rotary models, or those of position_rule "
                         "'reference', can be exported.")
    fixed = {k: v for k, v in _DIT_FIXED.items() if v is not None}
    return ({'_class_name': 'CogVideoXTransformer3DModel'} | {k: getattr(cfg, k) for k in _SAME} | fixed
            | {theirs: getattr(cfg, ours) for theirs, ours in _RENAMED.items()}
            | {'attn_msk_version': versions[cfg.pattern]})


def vae_config(config: dict, **overrides) -> vae.VAEConfig:
    """VAEConfig from a released config.json; `overrides` are its fields.

    Raises:
      ValueError: for a key that is not known here, or a value this VAE does not implement.
    """
    config = _public(config, _VAE_OMITTED)
    fields = {f.name: config.pop(f.name) for f in dataclasses.fields(vae.VAEConfig) if f.name in config}
    if 'block_out_channels' in fields:
        fields['block_out_channels'] = tuple(fields['block_out_channels'])
        levels = len(fields['block_out_channels'])
        _refuse_other(config, {'down_block_types': ['CogVideoXDownBlock3D'] * levels,
                               'up_block_types': ['CogVideoXUpBlock3D'] * levels}, 'VAE')
    _refuse_other(config, _VAE_FIXED, 'VAE')
    _refuse_unknown(config, _VAE_UNUSED, 'VAE')
    if 'temporal_compression_ratio' in fields:
        fields['temporal_compression_ratio'] = int(fields['temporal_compression_ratio'])
    return vae.VAEConfig(**(fields | overrides))


def t5_config(config: dict, **overrides) -> t5.T5Config:
    """T5Config from a released config.json, which also describes decoding and tasks; `overrides` are its fields.

    Raises:
      ValueError: if it is not a T5 v1.1.
    """
    config = _public(config, _T5_OMITTED)
    _refuse_other(config, _T5_FIXED, 'Text encoder')
    fields = {f.name: config[f.name] for f in dataclasses.fields(t5.T5Config) if f.name in config}
    return t5.T5Config(**(fields | overrides))


# (our module path, reference name); '*' is the layer, stacked on axis 0 here.
_DIT_NAMES = {
    'patch': 'patch_embed.proj',
    'text': 'patch_embed.text_proj',
    'positions': 'patch_embed.pos_embedding',
    'time_in': 'time_embedding.linear_1',
    'time_out': 'time_embedding.linear_2',
    'blocks/norm1/linear': 'transformer_blocks.*.norm1.linear',
    'blocks/norm1/norm': 'transformer_blocks.*.norm1.norm',
    'blocks/attn/norm_q': 'transformer_blocks.*.attn1.norm_q',
    'blocks/attn/norm_k': 'transformer_blocks.*.attn1.norm_k',
    'blocks/attn/to_q': 'transformer_blocks.*.attn1.to_q',
    'blocks/attn/to_k': 'transformer_blocks.*.attn1.to_k',
    'blocks/attn/to_v': 'transformer_blocks.*.attn1.to_v',
    'blocks/attn/to_out': 'transformer_blocks.*.attn1.to_out.0',
    'blocks/norm2/linear': 'transformer_blocks.*.norm2.linear',
    'blocks/norm2/norm': 'transformer_blocks.*.norm2.norm',
    'blocks/ff_in': 'transformer_blocks.*.ff.net.0.proj',
    'blocks/ff_out': 'transformer_blocks.*.ff.net.2',
    'norm_final': 'norm_final',
    'norm_out/linear': 'norm_out.linear',
    'norm_out/norm': 'norm_out.norm',
    'proj_out': 'proj_out',
}
_T5_NAMES = {
    'embed': 'shared',
    'relative_bias': 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias',
    'blocks/attn_norm': 'encoder.block.*.layer.0.layer_norm',
    'blocks/q': 'encoder.block.*.layer.0.SelfAttention.q',
    'blocks/k': 'encoder.block.*.layer.0.SelfAttention.k',
    'blocks/v': 'encoder.block.*.layer.0.SelfAttention.v',
    'blocks/o': 'encoder.block.*.layer.0.SelfAttention.o',
    'blocks/ff_norm': 'encoder.block.*.layer.1.layer_norm',
    'blocks/wi_0': 'encoder.block.*.layer.1.DenseReluDense.wi_0',
    'blocks/wi_1': 'encoder.block.*.layer.1.DenseReluDense.wi_1',
    'blocks/wo': 'encoder.block.*.layer.1.DenseReluDense.wo',
    'final_norm': 'encoder.final_layer_norm',
}


def _dit_inputs(cfg: dit.DiTConfig):
    p, f32 = cfg.patch_size, jnp.float32
    return (jnp.zeros((1, 1, p * cfg.base_grid[1], p * cfg.base_grid[2], cfg.in_channels), f32),
            jnp.zeros((1, 1, cfg.max_text_seq_length, cfg.text_embed_dim), f32), jnp.zeros((1, 1), f32), (1,))


def _vae_inputs(cfg: vae.VAEConfig):
    return (jnp.zeros((1, 1, cfg.spatial_factor, cfg.spatial_factor, cfg.in_channels), jnp.float32),)


@dataclasses.dataclass(frozen=True)
class _Network:
    """What conversion has to know of a network.

    Attributes:
      module: class of one field, the configuration.
      parse: config.json and overrides to the configuration.
      inputs: configuration to example inputs.
      name: our module path to the reference's.
      stem: file name of the weights in a released folder.
      tied: reference names of tensors that a file may hold a second time, with the name that we use.
    """
    module: Any
    parse: Callable
    inputs: Callable
    name: Callable[[str], str]
    stem: str = 'diffusion_pytorch_model'
    tied: tuple[tuple[str, str], ...] = ()


# By the name of the folder that holds it.
NETWORKS = {
    'transformer': _Network(dit.DiT, transformer_config, _dit_inputs, _DIT_NAMES.__getitem__),
    'vae': _Network(vae.VAE, vae_config, _vae_inputs,
                    lambda module: re.sub(r'_(\d+)', r'.\1', module.replace('/', '.'))),
    'text_encoder': _Network(t5.T5Encoder, t5_config, lambda cfg: (jnp.zeros((1, 1), jnp.int32),),
                             _T5_NAMES.__getitem__, 'model', (('encoder.embed_tokens.weight', 'shared.weight'),)),
}
_COPIED = ('tokenizer', 'scheduler', 'model_index.json')


@functools.cache
def abstract_params(cfg, kind: str = 'transformer'):
    """Shapes and dtypes of a network's parameters, nothing allocated; tracing is slow, so results are kept."""
    network = NETWORKS[kind]
    model = network.module(cfg)

    def init():
        *arrays, last = network.inputs(cfg)
        return model.init(jax.random.key(0), *arrays, last)['params']

    return jax.eval_shape(init)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One Flax parameter and the reference's tensors for it, one or one per layer.

    theirs.reshape(flat).transpose(axes) is ours, per layer if stacked.
    """
    path: tuple[str, ...]
    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    flat: tuple[int, ...]
    axes: tuple[int, ...]

    def ours(self, value):
        """Our layout of one tensor of theirs."""
        return np.asarray(value).reshape(self.flat).transpose(self.axes)

    def theirs(self, value):
        """Their layout of (one layer of) ours."""
        return np.asarray(value).transpose(np.argsort(self.axes)).reshape(self.shape)


def _entries(kind: str, cfg) -> list[_Entry]:
    entries = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(cfg, kind)):
        keys = tuple(k.key for k in path)
        stacked = keys[0] == 'blocks'
        shape = leaf.shape[1:] if stacked else leaf.shape
        axes = tuple(range(len(shape)))
        if keys[-1] == 'kernel':  # (..., in, out) here, (out, in, ...) there
            axes = (*axes[2:], 1, 0)
        flat = theirs = tuple(shape[i] for i in np.argsort(axes))
        suffix = {'bias': '.bias', 'positions': ''}.get(keys[-1], '.weight')
        module = keys if keys == ('positions',) else keys[:-1]
        if keys == ('positions',):
            theirs = (1, *shape)
        if keys == ('patch', 'kernel') and cfg.patch_size_t is None:
            theirs = (flat[0], cfg.in_channels, cfg.patch_size, cfg.patch_size)
        name = NETWORKS[kind].name('/'.join(module)) + suffix
        names = tuple(name.replace('*', str(i)) for i in range(leaf.shape[0])) if stacked else (name,)
        entries.append(_Entry(keys, names, stacked, theirs, flat, axes))
    return entries


def _matched(kind: str, cfg, tensors: dict) -> tuple[list[_Entry], dict]:
    """The entries and exactly their tensors; a tied copy is dropped, or taken where it stands alone.

    Raises:
      ValueError: naming every missing, unexpected or wrongly shaped tensor, and tied ones that differ.
    """
    tensors, problems = dict(tensors), []
    for copy, name in NETWORKS[kind].tied:
        if copy in tensors:
            value = tensors.pop(copy)
            if not np.array_equal(value, tensors.setdefault(name, value)):
                problems.append(f'{copy} differs from {name}')
    entries = _entries(kind, cfg)
    want = {n: e.shape for e in entries for n in e.names}
    problems += [f'missing {n}' for n in want if n not in tensors]
    problems += [f'{n} has shape {tuple(tensors[n].shape)}, expected {shape}' for n, shape in want.items()
                 if n in tensors and tuple(tensors[n].shape) != shape]
    problems += [f'unexpected {n}' for n in sorted(set(tensors) - set(want))]
    if problems:
        raise ValueError(f'Checkpoint does not fit its config.json: {"; ".join(problems)}.')
    return entries, tensors


def _nested(flat: dict) -> dict:
    tree = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack, layer, i):
    # As integers: XLA's CPU backend copies bfloat16 twenty times slower.
    bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=f'uint{8 * stack.dtype.itemsize}')
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_index_in_dim(bits(stack), bits(layer), i, 0),
                                        stack.dtype)


def _place(entry: _Entry, tensors: dict, target):
    """One parameter on its devices; the host holds one tensor at a time."""
    def put(name, sharding):
        value = entry.ours(tensors[name]).astype(target.dtype)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    if not entry.stacked:
        return put(entry.names[0], target.sharding)
    sharding = target.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    stack = jnp.zeros(target.shape, target.dtype, device=target.sharding)
    for i, name in enumerate(entry.names):
        stack = _set_layer(stack, put(name, sharding), i)
    return stack


def import_params(kind: str, cfg, tensors: dict, target):
    """Flax parameters from tensors (arrays, or weights.Tensor) under the reference's names.

    Args:
      kind: one of NETWORKS.
      cfg: its configuration.
      tensors: all of the network's tensors by name.
      target: ShapeDtypeStructs with shardings; gives dtype and placement.

    Raises:
      ValueError: naming every missing, unexpected or wrongly shaped tensor.
    """
    entries, tensors = _matched(kind, cfg, tensors)
    targets = {tuple(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(target)}
    return _nested({e.path: _place(e, tensors, targets[e.path])
                    for e in tqdm.tqdm(entries, desc=f'loading {kind}', unit='parameter', delay=3)})


def export_params(kind: str, cfg, params) -> dict[str, tensor_io.Tensor]:
    """Tensors under the reference's names and in its shapes, read when asked for; also maps gradients.

    Args:
      kind: one of NETWORKS.
      cfg: its configuration.
      params: nested dict of arrays, or of weights.open_orbax's.
    """
    flat = {tuple(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    tensors = {}
    for e in _entries(kind, cfg):
        leaf = flat[e.path]
        dtype = leaf.dtype.numpy_dtype if hasattr(leaf.dtype, 'numpy_dtype') else np.dtype(leaf.dtype)
        for i, name in enumerate(e.names):
            read = functools.partial(_read_layer, e, leaf, i)
            tensors[name] = tensor_io.Tensor(e.shape, dtype, read)
    return tensors


def _read_layer(entry: _Entry, leaf, i: int) -> np.ndarray:
    return entry.theirs(leaf[i] if entry.stacked else leaf)


def on_one_device(tree, dtype: str | None = None):
    """`tree` of ShapeDtypeStructs as a target on the first device, optionally in another dtype."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding), tree)


def read_config(kind: str, folder, **overrides):
    """Configuration of the network in a folder, released or converted.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    path = pathlib.Path(folder) / 'config.json'
    try:
        return NETWORKS[kind].parse(json.loads(path.read_text(encoding='utf-8')), **overrides)
    except OSError as error:
        raise FileNotFoundError(f'{path} cannot be read ({error.strerror}): {folder} must be a {kind} folder.'
                                ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is no {kind} configuration ({error}).') from error


def read_params(kind: str, folder, cfg, target):
    """Parameters of a released or converted folder, cast and laid out like `target`.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    converted = pathlib.Path(folder) / 'params'
    if converted.is_dir():
        return tensor_io.restore_orbax(converted, target)
    return import_params(kind, cfg, tensor_io.open_safetensors(folder), target)


def _load(kind: str, folder, param_dtype: str, overrides: dict):
    cfg = read_config(kind, folder, **({'dtype': 'float32'} | overrides))
    target = on_one_device(abstract_params(cfg, kind), param_dtype)
    return NETWORKS[kind].module(cfg), read_params(kind, folder, cfg, target)


def load_transformer(folder, param_dtype: str = 'float32', **overrides):
    """Model and parameters from a folder with config.json and .safetensors files, or a converted one.

    Args:
      folder: holds config.json and one or more .safetensors files of any name, or Orbax params/.
      param_dtype: dtype of the parameters.
      **overrides: DiTConfig fields to set, e.g. dtype='bfloat16' or attention_backend='dense'; dtype is 'float32'
        unless set here.

    Returns:
      (DiT module, parameters as nested dicts of arrays on the first device).

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    return _load('transformer', folder, param_dtype, overrides)


def load_vae(folder, param_dtype: str = 'float32', **overrides):
    """As load_transformer; `vae.encode(model.cfg, params, pixels)` and `vae.decode(...)` run it."""
    return _load('vae', folder, param_dtype, overrides)


def load_t5(folder, param_dtype: str = 'float32', **overrides):
    """As load_transformer; `t5.encode(model.cfg, params, ids)` gives the last hidden state."""
    return _load('text_encoder', folder, param_dtype, overrides)


def write_lora(folder, cfg: dit.DiTConfig, tree, lora_cfg: config_lib.LoraConfig) -> int:
    """Writes a transformer's LoRA tensors as diffusers does (see lora.write_file)."""
    return lora.write_file(folder, tree, lora_cfg, _entries('transformer', cfg))


def read_lora(path, cfg: dit.DiTConfig):
    """LoRA tensors for a transformer, and the LoraConfig to merge them by, from a file: see lora.read_file."""
    return lora.read_file(path, _entries('transformer', cfg))


_SCHEDULE_FIXED = {'beta_schedule': 'scaled_linear', 'prediction_type': 'v_prediction', 'trained_betas': None,
                   'clip_sample': False, 'set_alpha_to_one': True}


def load_schedule(file) -> schedule_lib.Schedule:
    """Schedule from a scheduler_config.json.

    Raises:
      ValueError: for settings other than scaled-linear betas and v-prediction.
    """
    try:
        config = dict(json.loads(pathlib.Path(file).read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f'{file} is no scheduler configuration ({error}).') from error
    for key, value in _SCHEDULE_FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f'{file} sets {key} to {config[key]!r}: only {value!r} is implemented.')
    names = {f.name for f in dataclasses.fields(schedule_lib.Schedule)}
    return schedule_lib.Schedule(**{k: v for k, v in config.items() if k in names})


def schedule_json(schedule: schedule_lib.Schedule) -> dict:
    """The scheduler_config.json of an exported model."""
    return {'_class_name': 'CogVideoXDDIMScheduler'} | dataclasses.asdict(schedule) | _SCHEDULE_FIXED


def adopt(config: config_lib.Config, folder) -> config_lib.Config:
    """`config` with init_from, transformer, schedule and codec of a model folder or of the run in a workdir; dtype,
    remat and attention stay."""
    folder = pathlib.Path(folder)
    kept = {name: getattr(config.model, name) for name in ('dtype', 'remat', 'attention_backend')}
    if (folder / 'transformer').is_dir():
        model = read_config('transformer', folder / 'transformer', **kept)
        schedule, codec = load_schedule(folder / 'scheduler/scheduler_config.json'), 'vae'
    else:
        run = config_lib.load_run(folder)
        model, schedule, codec = dataclasses.replace(run.model, **kept), run.schedule, run.data.codec
    return dataclasses.replace(config, init_from=str(folder), model=model, schedule=schedule,
                               data=dataclasses.replace(config.data, codec=codec))


def _to_orbax(kind: str, source: pathlib.Path, target: pathlib.Path) -> int:
    """One network from safetensors to target/config.json and target/params; returns the number of parameters."""
    cfg = read_config(kind, source)
    entries, tensors = _matched(kind, cfg, tensor_io.open_safetensors(source))
    count = sum(int(np.prod(e.shape)) * len(e.names) for e in entries)
    with tqdm.tqdm(total=count, desc=kind, unit='parameter', unit_scale=True) as bar:
        def read(entry, name):
            bar.update(int(np.prod(entry.shape)))
            return entry.ours(tensors[name])

        def leaf(entry):
            dtypes = sorted({np.dtype(tensors[n].dtype).name for n in entry.names})
            if len(dtypes) > 1:
                raise ValueError(f'{source} holds layers of one tensor in different dtypes ({", ".join(dtypes)}): '
                                 f'{entry.names[0]} and its like.')
            layer = tuple(entry.flat[i] for i in entry.axes)
            shape = (len(entry.names), *layer) if entry.stacked else layer
            parts = tuple(functools.partial(read, entry, n) for n in entry.names)
            return tensor_io.Leaf(shape, np.dtype(tensors[entry.names[0]].dtype), parts, entry.stacked)

        tensor_io.write_orbax(target / 'params', _nested({e.path: leaf(e) for e in entries}))
    shutil.copyfile(source / 'config.json', target / 'config.json')
    return count


def _to_safetensors(kind: str, tensors: dict[str, tensor_io.Tensor], target: pathlib.Path) -> int:
    """One network's tensors to .safetensors in `target`; returns the number of parameters."""
    count = sum(int(np.prod(t.shape)) for t in tensors.values())
    with tqdm.tqdm(total=count, desc=kind, unit='parameter', unit_scale=True) as bar:
        def read(tensor):
            bar.update(int(np.prod(tensor.shape)))
            return tensor.read()

        tensor_io.write_safetensors(target, NETWORKS[kind].stem, {
            n: dataclasses.replace(t, read=functools.partial(read, t)) for n, t in tensors.items()})
    return count


def _orbax_tensors(kind: str, cfg, params: pathlib.Path) -> dict[str, tensor_io.Tensor]:
    """The tensors of an Orbax item, under the reference's names."""
    return export_params(kind, cfg, _nested(tensor_io.open_orbax(params)))


def _run_tensors(run: pathlib.Path, cfg: config_lib.Config) -> dict[str, tensor_io.Tensor]:
    """The EMA of a run's checkpoint, under the reference's names; LoRA merged into its base."""
    if not cfg.lora.rank:
        return _orbax_tensors('transformer', cfg.model, run / 'ema')
    folder = pathlib.Path(cfg.init_from)
    if not (folder / 'transformer').is_dir():
        base = _run_tensors(folder, config_lib.load_run(folder))
    elif (folder / 'transformer/params').is_dir():
        base = _orbax_tensors('transformer', cfg.model, folder / 'transformer/params')
    else:
        base = _matched('transformer', cfg.model, tensor_io.open_safetensors(folder / 'transformer'))[1]
    tree = _nested(tensor_io.open_orbax(run / 'ema'))
    return lora.merge_tensors(base, tree, cfg.lora, _entries('transformer', cfg.model))


def _export_run(run: pathlib.Path, target: pathlib.Path) -> dict[str, int]:
    """The EMA of a training run's checkpoint as target/transformer and target/scheduler, LoRA also on its own."""
    cfg = config_lib.load_run(run)
    config, folder = transformer_json(cfg.model), target / 'transformer'
    counts = {'transformer': _to_safetensors('transformer', _run_tensors(run, cfg), folder)}
    if cfg.lora.rank:
        counts['LoRA'] = write_lora(target, cfg.model, _nested(tensor_io.open_orbax(run / 'ema')), cfg.lora)
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    (target / 'scheduler').mkdir(exist_ok=True)
    (target / 'scheduler/scheduler_config.json').write_text(json.dumps(schedule_json(cfg.schedule), indent=2) + '\n')
    return counts


def convert_folder(source, target) -> dict[str, int]:
    """Converts a model folder to Orbax, a converted one back, or exports a training run.

    Args:
      source: folder with transformer/, vae/, text_encoder/ (any of them), or a workdir or checkpoint of
        mask2dit_jax.main.
      target: new folder.

    Returns:
      Number of parameters by network, and of the LoRA of a run that has one.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f'{target} is not empty: give --to a new folder.')
    found = [k for k in NETWORKS if (source / k / 'config.json').is_file()]
    run = source if (source / 'ema').is_dir() else None
    if not found and run is None:
        if not checkpoint.folders(source):
            raise FileNotFoundError(f'{source} holds neither {", ".join(k + "/" for k in NETWORKS)} nor checkpoints.')
        run = checkpoint.folders(source)[-1]
    if run is not None:
        return _export_run(run, target)
    counts = {}
    for kind in found:
        folder = target / kind
        folder.mkdir(parents=True)
        if (source / kind / 'params').is_dir():
            tensors = _orbax_tensors(kind, read_config(kind, source / kind), source / kind / 'params')
            counts[kind] = _to_safetensors(kind, tensors, folder)
            shutil.copyfile(source / kind / 'config.json', folder / 'config.json')
        else:
            counts[kind] = _to_orbax(kind, source / kind, folder)
    for name in _COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return counts
