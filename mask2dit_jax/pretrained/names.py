"""The names, shapes and configurations of released networks, beside ours."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.models import dit, t5, vae

# config.json keys that DiTConfig takes over under the same name.
_SAME = (
    'num_layers',
    'num_attention_heads',
    'attention_head_dim',
    'in_channels',
    'out_channels',
    'text_embed_dim',
    'time_embed_dim',
    'max_text_seq_length',
    'patch_size',
    'patch_size_t',
    'patch_bias',
    'sample_height',
    'sample_width',
    'sample_frames',
    'temporal_compression_ratio',
    'flip_sin_to_cos',
    'freq_shift',
    'attention_bias',
    'norm_elementwise_affine',
    'norm_eps',
    'spatial_interpolation_scale',
    'temporal_interpolation_scale',
)
_RENAMED = {
    'use_rotary_positional_embeddings': 'rotary',
    'use_learned_positional_embeddings': 'learned_positions',
}
_PATTERNS = {2: 'dual', 5: 'full'}
# What the networks are built for; any other value is refused. Then keys without meaning for the
# forward pass.
_DIT_FIXED = {
    'activation_fn': 'gelu-approximate',
    'timestep_activation_fn': 'silu',
    'ofs_embed_dim': None,
}
_DIT_UNUSED = {'dropout', 'add_noise_in_inpaint_model'}
_VAE_FIXED = {
    'act_fn': 'silu',
    'shift_factor': None,
    'latents_mean': None,
    'latents_std': None,
    'use_quant_conv': False,
    'use_post_quant_conv': False,
    'invert_scale_latents': False,
}
_VAE_UNUSED = {'force_upcast'}
_T5_FIXED = {'model_type': 't5', 'feed_forward_proj': 'gated-gelu'}
# What the reference's classes take for a key that config.json leaves out, where our own default
# differs.
_DIT_OMITTED = {
    'num_attention_heads': 30,
    'num_layers': 30,
    'use_rotary_positional_embeddings': False,
}
_VAE_OMITTED = {'scaling_factor': 1.15258426}
_T5_OMITTED = {
    'd_model': 512,
    'd_ff': 2048,
    'num_layers': 6,
    'num_heads': 8,
    'feed_forward_proj': 'relu',
}


def _refuse_other(config: dict, fixed: dict, what: str) -> None:
    """Takes the keys of `fixed` out of config; any other value than the one there is an error."""
    for key, value in fixed.items():
        if config.pop(key, value) != value:
            raise ValueError(
                f'{what} config.json sets {key} to something other than {value!r}, which is all we '
                'implement.'
            )


def _refuse_unknown(config: dict, unused: set, what: str) -> None:
    unknown = sorted(set(config) - unused)
    if unknown:
        raise ValueError(
            f'{what} config.json has keys that are not known here: {", ".join(unknown)}.'
        )


def _public(config: dict, omitted: dict) -> dict:
    return omitted | {k: v for k, v in config.items() if not k.startswith('_')}


def transformer_config(config: dict, **overrides) -> dit.DiTConfig:
    """DiTConfig from a released config.json; `overrides` are DiTConfig fields, e.g.
    dtype='float32'.

    Released weights know the reference's position rule, so that is what they get.

    Raises:
      ValueError: for a key that is not known here, or a value this transformer does not implement.
    """
    config = _public(config, _DIT_OMITTED)
    fields = {k: config.pop(k) for k in _SAME if k in config}
    fields |= {ours: config.pop(theirs) for theirs, ours in _RENAMED.items() if theirs in config}
    version = config.pop('attn_msk_version', 2)
    if version not in _PATTERNS:
        raise ValueError(
            f'attn_msk_version {version} is not implemented: 2 is the dual mask, 5 full attention.'
        )
    _refuse_other(config, _DIT_FIXED, 'Transformer')
    _refuse_unknown(config, _DIT_UNUSED, 'Transformer')
    return dit.DiTConfig(
        **(fields | {'pattern': _PATTERNS[version], 'position_rule': 'reference'} | overrides)
    )


def transformer_json(cfg: dit.DiTConfig) -> dict:
    """The config.json of an exported transformer.

    Raises:
      ValueError: if the reference has no such model: another mask, or positions that count on
        through the scenes.
    """
    versions = {pattern: version for version, pattern in _PATTERNS.items()}
    if cfg.pattern not in versions:
        raise ValueError(
            f'The reference has no {cfg.pattern!r} mask: only {", ".join(versions)} can be exported.'
        )
    if cfg.position_rule != 'reference' and (cfg.learned_positions or not cfg.rotary):
        raise ValueError(
            "This model was trained with position_rule 'continuous' and added positions, which the "
            'reference would compute differently: only rotary models, or those of position_rule '
            "'reference', can be exported."
        )
    fixed = {k: v for k, v in _DIT_FIXED.items() if v is not None}
    return (
        {'_class_name': 'CogVideoXTransformer3DModel'}
        | {k: getattr(cfg, k) for k in _SAME}
        | fixed
        | {theirs: getattr(cfg, ours) for theirs, ours in _RENAMED.items()}
        | {'attn_msk_version': versions[cfg.pattern]}
    )


def vae_config(config: dict, **overrides) -> vae.VAEConfig:
    """VAEConfig from a released config.json; `overrides` are its fields.

    Raises:
      ValueError: for a key that is not known here, or a value this VAE does not implement.
    """
    config = _public(config, _VAE_OMITTED)
    fields = {
        f.name: config.pop(f.name) for f in dataclasses.fields(vae.VAEConfig) if f.name in config
    }
    if 'block_out_channels' in fields:
        fields['block_out_channels'] = tuple(fields['block_out_channels'])
        levels = len(fields['block_out_channels'])
        _refuse_other(
            config,
            {
                'down_block_types': ['CogVideoXDownBlock3D'] * levels,
                'up_block_types': ['CogVideoXUpBlock3D'] * levels,
            },
            'VAE',
        )
    _refuse_other(config, _VAE_FIXED, 'VAE')
    _refuse_unknown(config, _VAE_UNUSED, 'VAE')
    if 'temporal_compression_ratio' in fields:
        fields['temporal_compression_ratio'] = int(fields['temporal_compression_ratio'])
    return vae.VAEConfig(**(fields | overrides))


def t5_config(config: dict, **overrides) -> t5.T5Config:
    """T5Config from a released config.json, which also describes decoding and tasks; `overrides`
    are its fields.

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
    return (
        jnp.zeros((1, 1, p * cfg.base_grid[1], p * cfg.base_grid[2], cfg.in_channels), f32),
        jnp.zeros((1, 1, cfg.max_text_seq_length, cfg.text_embed_dim), f32),
        jnp.zeros((1, 1), f32),
        (1,),
    )


def _vae_inputs(cfg: vae.VAEConfig):
    return (
        jnp.zeros((1, 1, cfg.spatial_factor, cfg.spatial_factor, cfg.in_channels), jnp.float32),
    )


@dataclasses.dataclass(frozen=True)
class _Network:
    """What conversion has to know of a network.

    Attributes:
      module: class of one field, the configuration.
      parse: config.json and overrides to the configuration.
      inputs: configuration to example inputs.
      name: our module path to the reference's.
      stem: file name of the weights in a released folder.
      tied: reference names of tensors that a file may hold a second time, with the name that we
        use.
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
    'vae': _Network(
        vae.VAE,
        vae_config,
        _vae_inputs,
        lambda module: re.sub(r'_(\d+)', r'.\1', module.replace('/', '.')),
    ),
    'text_encoder': _Network(
        t5.T5Encoder,
        t5_config,
        lambda cfg: (jnp.zeros((1, 1), jnp.int32),),
        _T5_NAMES.__getitem__,
        'model',
        (('encoder.embed_tokens.weight', 'shared.weight'),),
    ),
}


@functools.cache
def abstract_params(cfg, kind: str = 'transformer'):
    """Shapes and dtypes of a network's parameters, nothing allocated; tracing is slow, so results
    are kept."""
    network = NETWORKS[kind]
    model = network.module(cfg)

    def init():
        *arrays, last = network.inputs(cfg)
        return model.init(jax.random.key(0), *arrays, last)['params']

    return jax.eval_shape(init)


@dataclasses.dataclass(frozen=True)
class Entry:
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


def parameter_entries(kind: str, cfg) -> list[Entry]:
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
        names = (
            tuple(name.replace('*', str(i)) for i in range(leaf.shape[0])) if stacked else (name,)
        )
        entries.append(Entry(keys, names, stacked, theirs, flat, axes))
    return entries


def matched_tensors(kind: str, cfg, tensors: dict) -> tuple[list[Entry], dict]:
    """The entries and exactly their tensors; a tied copy is dropped, or taken where it stands
    alone.

    Raises:
      ValueError: naming every missing, unexpected or wrongly shaped tensor, and tied ones that
        differ.
    """
    tensors, problems = dict(tensors), []
    for copy, name in NETWORKS[kind].tied:
        if copy in tensors:
            value = tensors.pop(copy)
            if not np.array_equal(value, tensors.setdefault(name, value)):
                problems.append(f'{copy} differs from {name}')
    entries = parameter_entries(kind, cfg)
    want = {n: e.shape for e in entries for n in e.names}
    problems += [f'missing {n}' for n in want if n not in tensors]
    problems += [
        f'{n} has shape {tuple(tensors[n].shape)}, expected {shape}'
        for n, shape in want.items()
        if n in tensors and tuple(tensors[n].shape) != shape
    ]
    problems += [f'unexpected {n}' for n in sorted(set(tensors) - set(want))]
    if problems:
        raise ValueError(f'Checkpoint does not fit its config.json: {"; ".join(problems)}.')
    return entries, tensors


_SCHEDULE_FIXED = {
    'beta_schedule': 'scaled_linear',
    'prediction_type': 'v_prediction',
    'trained_betas': None,
    'clip_sample': False,
    'set_alpha_to_one': True,
}


def schedule_json(schedule: schedule_lib.Schedule) -> dict:
    """The scheduler_config.json of an exported model."""
    return (
        {'_class_name': 'CogVideoXDDIMScheduler'} | dataclasses.asdict(schedule) | _SCHEDULE_FIXED
    )
