"""The configuration files of released folders: config.json and scheduler_config.json.

Every network of a released folder has a config.json beside its weights, and the noise schedule has
a scheduler_config.json. The functions here read them into our configurations and write them for
exported models.

Reading is strict. A key that is not known here is an error, because leaving it out might change
what is computed. There are three tables for every file: the keys whose value is FIXED, because we
implement no other, the keys that are UNUSED where captions become videos, and the DEFAULTS that the
reference's classes take where a file leaves a key out, if they differ from ours.
"""

import dataclasses
import json
import pathlib

from mask2dit_jax import paths
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.models import dit, t5, vae

# Keys that DiTConfig has under the same name.
_DIT_SAME = (
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
# The reference's key: our field.
_DIT_RENAMED = {
    'use_rotary_positional_embeddings': 'rotary',
    'use_learned_positional_embeddings': 'learned_positions',
}
# The reference's attn_msk_version: our attention pattern.
_PATTERNS = {2: 'dual', 5: 'full'}

_DIT_FIXED = {
    'activation_fn': 'gelu-approximate',
    'timestep_activation_fn': 'silu',
    'ofs_embed_dim': None,
}
_DIT_UNUSED = {'dropout', 'add_noise_in_inpaint_model'}
_DIT_DEFAULTS = {
    'num_attention_heads': 30,
    'num_layers': 30,
    'use_rotary_positional_embeddings': False,
}

_VAE_FIXED = {
    'act_fn': 'silu',
    'shift_factor': None,
    'latents_mean': None,
    'latents_std': None,
    'use_quant_conv': False,
    'use_post_quant_conv': False,
}
# invert_scale_latents (true in 1.5) is about the picture that an image-to-video model starts from.
_VAE_UNUSED = {'force_upcast', 'invert_scale_latents'}
_VAE_DEFAULTS = {'scaling_factor': 1.15258426}

# A T5 config.json also describes decoding and tasks, so that its unknown keys are not refused.
# The class derives the last two from feed_forward_proj, and then takes those of the file.
_T5_FIXED = {
    'model_type': 't5',
    'feed_forward_proj': 'gated-gelu',
    'dense_act_fn': 'gelu_new',
    'is_gated_act': True,
}
_T5_DEFAULTS = {
    'd_model': 512,
    'd_ff': 2048,
    'num_layers': 6,
    'num_heads': 8,
    'feed_forward_proj': 'relu',
}

# Both classes have the same noise schedule; they differ in how they step through it.
_SCHEDULE_CLASSES = ('CogVideoXDDIMScheduler', 'CogVideoXDPMScheduler')
_SCHEDULE_FIXED = {
    'beta_schedule': 'scaled_linear',
    'prediction_type': 'v_prediction',
    'trained_betas': None,
    'clip_sample': False,
    'set_alpha_to_one': True,
    'thresholding': False,
}
# They say how far to clip, which nothing here does.
_SCHEDULE_UNUSED = {'clip_sample_range', 'sample_max_value', 'dynamic_thresholding_ratio'}
_SCHEDULE_DEFAULTS = {
    'num_train_timesteps': 1000,
    'beta_start': 0.00085,
    'beta_end': 0.012,
    'beta_schedule': 'scaled_linear',
    'trained_betas': None,
    'clip_sample': True,
    'set_alpha_to_one': True,
    'steps_offset': 0,
    'prediction_type': 'epsilon',
    'timestep_spacing': 'leading',
    'rescale_betas_zero_snr': False,
    'snr_shift_scale': 3.0,
}


def _with_defaults(config: dict, defaults: dict) -> dict:
    """A copy with the reference's defaults, and without private keys such as _class_name."""
    public = {key: value for key, value in config.items() if not key.startswith('_')}
    return defaults | public


def _refuse_other(config: dict, fixed: dict, what: str) -> None:
    """Takes the keys of `fixed` out of `config`; a value other than the fixed one is an error."""
    for key, value in fixed.items():
        if config.pop(key, value) != value:
            raise ValueError(
                f'{what} config.json sets {key} to something other than {value!r}, which is all we '
                'implement.'
            )


def _refuse_unknown(config: dict, unused: set, what: str) -> None:
    """Raises for the keys that are left in `config`, except those in `unused`."""
    unknown = sorted(set(config) - unused)
    if unknown:
        raise ValueError(
            f'{what} config.json has keys that are not known here: {", ".join(unknown)}.'
        )


def transformer_config(config: dict, **overrides) -> dit.DiTConfig:
    """Reads the configuration of a released transformer.

    Its position_rule is 'reference', because released weights were trained under that rule.

    Args:
      config: the content of config.json.
      **overrides: DiTConfig fields to set, e.g. dtype='float32'.

    Returns:
      The configuration.

    Raises:
      ValueError: for a key that is not known here, or a value this transformer does not implement.
    """
    config = _with_defaults(config, _DIT_DEFAULTS)
    fields = {key: config.pop(key) for key in _DIT_SAME if key in config}
    for theirs, ours in _DIT_RENAMED.items():
        if theirs in config:
            fields[ours] = config.pop(theirs)

    version = config.pop('attn_msk_version', 2)
    if version not in _PATTERNS:
        raise ValueError(
            f'attn_msk_version {version} is not implemented: 2 is the dual mask, 5 full attention.'
        )
    fields['pattern'] = _PATTERNS[version]
    fields['position_rule'] = 'reference'

    _refuse_other(config, _DIT_FIXED, 'Transformer')
    _refuse_unknown(config, _DIT_UNUSED, 'Transformer')
    return dit.DiTConfig(**(fields | overrides))


def transformer_json(cfg: dit.DiTConfig) -> dict:
    """Makes the content of config.json for an exported transformer.

    Args:
      cfg: the transformer's configuration.

    Returns:
      The content, to be written as JSON.

    Raises:
      ValueError: if the reference has no such model: it lacks the mask, or it would compute the
        positions differently.
    """
    versions = {pattern: version for version, pattern in _PATTERNS.items()}
    if cfg.pattern not in versions:
        raise ValueError(
            f'The reference has no {cfg.pattern!r} mask: only {", ".join(versions)} can be '
            'exported.'
        )

    # Rotary positions are the same under both rules; added ones are not.
    added_positions = cfg.learned_positions or not cfg.rotary
    if cfg.scene_offset_frames or cfg.scene_phase:
        raise ValueError(
            'This model was trained with positions that jump at cuts (scene_offset_frames, '
            'scene_phase), which the reference would compute differently: it cannot be exported.'
        )
    if cfg.lead_frames:
        raise ValueError(
            f'The reference has no lead_frames, of which this model has {cfg.lead_frames}: it '
            'cannot be exported.'
        )
    if cfg.position_rule != 'reference' and added_positions:
        raise ValueError(
            "This model was trained with position_rule 'continuous' and added positions, which the "
            'reference would compute differently: only rotary models, or those of position_rule '
            "'reference', can be exported."
        )

    config = {'_class_name': 'CogVideoXTransformer3DModel'}
    config |= {key: getattr(cfg, key) for key in _DIT_SAME}
    config |= {key: value for key, value in _DIT_FIXED.items() if value is not None}
    config |= {theirs: getattr(cfg, ours) for theirs, ours in _DIT_RENAMED.items()}
    config['attn_msk_version'] = versions[cfg.pattern]
    return config


def vae_config(config: dict, **overrides) -> vae.VAEConfig:
    """Reads the configuration of a released VAE.

    Args:
      config: the content of config.json.
      **overrides: VAEConfig fields to set.

    Returns:
      The configuration.

    Raises:
      ValueError: for a key that is not known here, or a value this VAE does not implement.
    """
    config = _with_defaults(config, _VAE_DEFAULTS)
    names = [field.name for field in dataclasses.fields(vae.VAEConfig)]
    fields = {name: config.pop(name) for name in names if name in config}

    widths = tuple(fields.get('block_out_channels', vae.VAEConfig.block_out_channels))
    fields['block_out_channels'] = widths
    block_types = {
        'down_block_types': ['CogVideoXDownBlock3D'] * len(widths),
        'up_block_types': ['CogVideoXUpBlock3D'] * len(widths),
    }
    _refuse_other(config, block_types, 'VAE')

    _refuse_other(config, _VAE_FIXED, 'VAE')
    _refuse_unknown(config, _VAE_UNUSED, 'VAE')

    # diffusers declares this field as a float.
    if 'temporal_compression_ratio' in fields:
        fields['temporal_compression_ratio'] = int(fields['temporal_compression_ratio'])
    return vae.VAEConfig(**(fields | overrides))


def t5_config(config: dict, **overrides) -> t5.T5Config:
    """Reads the configuration of a released text encoder.

    Args:
      config: the content of config.json, which may also describe decoding and tasks.
      **overrides: T5Config fields to set.

    Returns:
      The configuration.

    Raises:
      ValueError: if it does not describe a T5 v1.1.
    """
    config = _with_defaults(config, _T5_DEFAULTS)
    _refuse_other(config, _T5_FIXED, 'Text encoder')
    names = [field.name for field in dataclasses.fields(t5.T5Config)]
    fields = {name: config[name] for name in names if name in config}
    return t5.T5Config(**(fields | overrides))


# The folder of a network: the function that reads its config.json.
PARSERS = {
    'transformer': transformer_config,
    'vae': vae_config,
    'text_encoder': t5_config,
}


def read_config(kind: str, folder, **overrides):
    """Reads the configuration of the network in a folder, released or converted.

    Args:
      kind: 'transformer', 'vae' or 'text_encoder'.
      folder: the network's folder, which holds config.json.
      **overrides: fields of the configuration to set.

    Returns:
      DiTConfig, VAEConfig or T5Config.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    paths.check_local(folder=folder)
    path = pathlib.Path(folder) / 'config.json'
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        return PARSERS[kind](content, **overrides)
    except OSError as error:
        raise FileNotFoundError(
            f'{path} cannot be read ({error.strerror}): {folder} must be a {kind} folder.'
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not a {kind} configuration ({error}).') from error


def load_schedule(file) -> schedule_lib.Schedule:
    """Reads a scheduler_config.json.

    Args:
      file: path of the file.

    Returns:
      The noise schedule. Where the file leaves a key out, it has the value that diffusers' class
      takes.

    Raises:
      ValueError: naming the file, if it cannot be read, is of another class, has a key that is not
        known here, or a value that is not implemented.
    """
    try:
        content = dict(json.loads(pathlib.Path(file).read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f'{file} is not a scheduler configuration ({error}).') from error

    class_name = content.get('_class_name', _SCHEDULE_CLASSES[0])
    if class_name not in _SCHEDULE_CLASSES:
        raise ValueError(
            f'{file} is of class {class_name}: only {" and ".join(_SCHEDULE_CLASSES)} are '
            'implemented.'
        )

    config = _with_defaults(content, _SCHEDULE_DEFAULTS)
    for key, value in _SCHEDULE_FIXED.items():
        found = config.pop(key, value)
        if found != value:
            says = f'sets {key} to' if key in content else f'leaves out {key}, which then is'
            raise ValueError(f'{file} {says} {found!r}: only {value!r} is implemented.')

    fields = {}
    for field in dataclasses.fields(schedule_lib.Schedule):
        value = config.pop(field.name)
        if not _is_like(value, field.default):
            raise ValueError(
                f'{file} sets {field.name} to {value!r}: it must be like {field.default!r}.'
            )
        fields[field.name] = value

    unknown = sorted(set(config) - _SCHEDULE_UNUSED)
    if unknown:
        raise ValueError(f'{file} has keys that are not known here: {", ".join(unknown)}.')

    schedule = schedule_lib.Schedule(**fields)
    try:
        schedule.timesteps(1)  # which a spacing that is not implemented does not have
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from error
    return schedule


def _is_like(value, example) -> bool:
    """Whether a value of a file is of an example's type; whole numbers are numbers, too."""
    if type(example) is float:
        return type(value) in (int, float)
    return type(value) is type(example)


def schedule_json(schedule: schedule_lib.Schedule) -> dict:
    """The content of scheduler_config.json for an exported model."""
    config = {'_class_name': 'CogVideoXDDIMScheduler'}
    config |= dataclasses.asdict(schedule)
    # The class does not know the others.
    config |= {key: _SCHEDULE_FIXED[key] for key in _SCHEDULE_FIXED if key in _SCHEDULE_DEFAULTS}
    return config
