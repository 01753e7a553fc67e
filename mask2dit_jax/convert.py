"""Released checkpoints in and out: safetensors under the reference's tensor names <-> Flax parameters.

A folder holds config.json (diffusers keys) and one .safetensors file. Loading is strict: a missing, unexpected or
wrongly shaped tensor is an error that names it.

    model, params = load_transformer('folder')
    v = model.apply({'params': params}, latents, text, t, frames=(13, 13, 13))

with latents [B, T, H, W, C] (the reference's (B, F, C, h, w) with channels moved last), text [B, S, M, E], one
timestep per scene t [B, S], and frames, the latent frames of each scene. Where the reference sets clip_idx=i, t is
the timestep in column i and 0 elsewhere. attn_msk_version becomes
`model.cfg.pattern`.
"""
import dataclasses
import json
import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file

from mask2dit_jax import diffusion
from mask2dit_jax.models import dit

# config.json keys that DiTConfig takes over under the same name.
_SAME = ('num_layers', 'num_attention_heads', 'attention_head_dim', 'in_channels', 'out_channels', 'text_embed_dim',
         'time_embed_dim', 'max_text_seq_length', 'patch_size', 'patch_size_t', 'patch_bias', 'sample_height',
         'sample_width', 'sample_frames', 'temporal_compression_ratio', 'flip_sin_to_cos', 'freq_shift',
         'attention_bias', 'norm_elementwise_affine', 'norm_eps', 'spatial_interpolation_scale',
         'temporal_interpolation_scale')
_RENAMED = {'use_rotary_positional_embeddings': 'rotary', 'use_learned_positional_embeddings': 'learned_positions'}
# What the transformer is built for; any other value is refused.
_FIXED = {'activation_fn': 'gelu-approximate', 'timestep_activation_fn': 'silu'}
# Keys without meaning for the forward pass.
_UNUSED = {'dropout', 'add_noise_in_inpaint_model'}
_PATTERNS = {2: 'dual', 5: 'full'}

# (reference name, our path); '*' is the layer, stacked on axis 0 here. A name ending in .linear is weight and bias.
_TRANSFORMER = (
    ('patch_embed.proj', 'patch'),
    ('patch_embed.text_proj', 'text'),
    ('patch_embed.pos_embedding', 'positions'),
    ('time_embedding.linear_1', 'time_in'),
    ('time_embedding.linear_2', 'time_out'),
    ('transformer_blocks.*.norm1.linear', 'blocks/norm1/linear'),
    ('transformer_blocks.*.norm1.norm', 'blocks/norm1/norm'),
    ('transformer_blocks.*.attn1.norm_q', 'blocks/attn/norm_q'),
    ('transformer_blocks.*.attn1.norm_k', 'blocks/attn/norm_k'),
    ('transformer_blocks.*.attn1.to_q', 'blocks/attn/to_q'),
    ('transformer_blocks.*.attn1.to_k', 'blocks/attn/to_k'),
    ('transformer_blocks.*.attn1.to_v', 'blocks/attn/to_v'),
    ('transformer_blocks.*.attn1.to_out.0', 'blocks/attn/to_out'),
    ('transformer_blocks.*.norm2.linear', 'blocks/norm2/linear'),
    ('transformer_blocks.*.norm2.norm', 'blocks/norm2/norm'),
    ('transformer_blocks.*.ff.net.0.proj', 'blocks/ff_in'),
    ('transformer_blocks.*.ff.net.2', 'blocks/ff_out'),
    ('norm_final', 'norm_final'),
    ('norm_out.linear', 'norm_out/linear'),
    ('norm_out.norm', 'norm_out/norm'),
    ('proj_out', 'proj_out'),
)


def transformer_config(config: dict, **overrides) -> dit.DiTConfig:
    """DiTConfig from a released config.json; `overrides` are DiTConfig fields, e.g. dtype='float32'.

    Released weights know the reference's position rule, so that is what they get.

    Raises:
      ValueError: for a key that is not known here, or a value this transformer does not implement.
    """
    config = {k: v for k, v in config.items() if not k.startswith('_')}
    fields = {k: config.pop(k) for k in _SAME if k in config}
    fields |= {ours: config.pop(theirs) for theirs, ours in _RENAMED.items() if theirs in config}
    version = config.pop('attn_msk_version', 2)
    if version not in _PATTERNS:
        raise ValueError(f'attn_msk_version {version} is not implemented: 2 is the dual mask, 5 full attention.')
    for key, value in _FIXED.items():
        if config.pop(key, value) != value:
            raise ValueError(f'config.json sets {key} to something other than {value!r}, which is all we implement.')
    unknown = sorted(set(config) - _UNUSED)
    if unknown:
        raise ValueError(f'config.json has keys that the transformer does not know: {", ".join(unknown)}.')
    return dit.DiTConfig(**(fields | {'pattern': _PATTERNS[version], 'position_rule': 'reference'} | overrides))


def abstract_params(cfg: dit.DiTConfig):
    """Shapes and dtypes of the parameters, nothing allocated."""
    s, (_, h, w), p = 1, cfg.base_grid, cfg.patch_size
    frames = cfg.patch_size_t or 1
    inputs = (jax.ShapeDtypeStruct((1, frames, h * p, w * p, cfg.in_channels), np.float32),
              jax.ShapeDtypeStruct((1, s, cfg.max_text_seq_length, cfg.text_embed_dim), np.float32),
              jax.ShapeDtypeStruct((1, s), np.float32))
    model = dit.DiT(cfg)
    return jax.eval_shape(lambda x, y, t: model.init(jax.random.key(0), x, y, t, (frames,)), *inputs)['params']


def _entries(cfg: dit.DiTConfig):
    """Yields (our path as a tuple, reference names in layer order, stacked?, shape there, shape here)."""
    table = {ours: theirs for theirs, ours in _TRANSFORMER}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(cfg)):
        keys = tuple(k.key for k in path)
        stacked = keys[0] == 'blocks'
        module, kind = ('/'.join(keys), '') if keys == ('positions',) else ('/'.join(keys[:-1]), keys[-1])
        name = table[module] + {'kernel': '.weight', 'scale': '.weight', 'bias': '.bias', '': ''}[kind]
        names = [name.replace('*', str(i)) for i in range(cfg.num_layers)] if stacked else [name]
        shape = leaf.shape[1:] if stacked else leaf.shape
        theirs = shape[::-1] if kind == 'kernel' else shape
        if module == 'patch' and kind == 'kernel' and cfg.patch_size_t is None:
            theirs = (shape[1], cfg.in_channels, cfg.patch_size, cfg.patch_size)
        if module == 'positions':
            theirs = (1, *shape)
        yield keys, names, stacked, theirs, shape


def import_transformer(cfg: dit.DiTConfig, tensors: dict):
    """Flax parameters (float32 numpy) from tensors under the reference's names.

    Raises:
      ValueError: naming every missing, unexpected or wrongly shaped tensor.
    """
    params, problems, seen = {}, [], set()
    for keys, names, stacked, theirs, ours in _entries(cfg):
        seen.update(names)
        problems += [f'missing {n}' for n in names if n not in tensors]
        problems += [f'{n} has shape {tensors[n].shape}, expected {theirs}'
                     for n in names if n in tensors and tensors[n].shape != theirs]
        if problems:
            continue
        values = [np.asarray(tensors[n], np.float32) for n in names]
        values = [v.reshape(v.shape[0], -1).T if keys[-1] == 'kernel' else v.reshape(ours) for v in values]
        node = params
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = np.stack(values) if stacked else values[0]
    problems += [f'unexpected {n}' for n in sorted(set(tensors) - seen)]
    if problems:
        raise ValueError(f'Checkpoint does not fit its config.json: {"; ".join(problems)}.')
    return params


def export_transformer(cfg: dit.DiTConfig, params) -> dict[str, np.ndarray]:
    """Tensors under the reference's names and in its shapes; also maps gradients."""
    tensors = {}
    for keys, names, stacked, theirs, _ in _entries(cfg):
        value = params
        for key in keys:
            value = value[key]
        for name, v in zip(names, value if stacked else [value]):
            v = np.asarray(v)
            tensors[name] = np.ascontiguousarray(v.T if keys[-1] == 'kernel' else v).reshape(theirs)
    return tensors


def load_transformer(folder, **overrides):
    """Model and float32 parameters from a folder with config.json and one .safetensors file.

    Args:
      folder: holds config.json and weights.safetensors (or any one file of that ending).
      **overrides: DiTConfig fields to set, e.g. dtype='float32' or attention_backend='dense'.

    Returns:
      (DiT module, parameters as nested dicts of float32 numpy arrays).

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    folder = pathlib.Path(folder)
    files = sorted(folder.glob('*.safetensors'))
    if len(files) != 1 or not (folder / 'config.json').is_file():
        raise FileNotFoundError(f'{folder} must hold config.json and exactly one .safetensors file, found '
                                f'{sorted(p.name for p in folder.glob("*"))}.')
    cfg = transformer_config(json.loads((folder / 'config.json').read_text()), **({'dtype': 'float32'} | overrides))
    return dit.DiT(cfg), import_transformer(cfg, load_file(files[0]))


def load_schedule(file) -> diffusion.Schedule:
    """Schedule from a scheduler_config.json.

    Raises:
      ValueError: for settings other than scaled-linear betas and v-prediction.
    """
    config = json.loads(pathlib.Path(file).read_text())
    for key, value in {'beta_schedule': 'scaled_linear', 'prediction_type': 'v_prediction', 'trained_betas': None,
                       'clip_sample': False, 'set_alpha_to_one': True}.items():
        if config.get(key, value) != value:
            raise ValueError(f'{file} sets {key} to {config[key]!r}: only {value!r} is implemented.')
    names = {f.name for f in dataclasses.fields(diffusion.Schedule)}
    return diffusion.Schedule(**{k: v for k, v in config.items() if k in names})
