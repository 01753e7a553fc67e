"""The three networks of a released folder: reference names, shapes and configs <-> Flax parameters.

A model folder in diffusers' layout has transformer/, vae/, text_encoder/ (each config.json and
.safetensors), tokenizer/ and scheduler/. Loading is strict: a missing, unexpected or wrongly shaped
tensor is an error that names it.

    model, params = load_transformer('folder/transformer')
    v = model.apply({'params': params}, latents, text, t, frames=(13, 13, 13))

with latents [B, T, H, W, C] (the reference's (B, F, C, h, w) with channels moved last), text [B, S,
M, E], one timestep per scene t [B, S], and frames, the latent frames of each scene. Where the
reference sets clip_idx=i, t is the timestep in column i and 0 elsewhere. attn_msk_version becomes
`model.cfg.pattern`.

    model, params = load_vae('folder/vae')             # vae.encode(model.cfg, params, pixels),
    vae.decode(...) model, params = load_t5('folder/text_encoder')     # t5.encode(model.cfg,
    params, ids)

As a command it converts a whole model folder to Orbax, which loads faster, and back:

  python -m mask2dit_jax.convert --from=CogVideoX-5b --to=cogvideox-orbax
  python -m mask2dit_jax.convert --from=cogvideox-orbax --to=exported
  python -m mask2dit_jax.convert --from=runs/mine --to=exported      # EMA of a training run, for PyTorch users

A run with LoRA gives both: transformer/ with LoRA merged into its base, and
pytorch_lora_weights.safetensors, the LoRA alone, for diffusers' load_lora_weights and for `sample
--lora`.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import tqdm
from flax import traverse_util

from mask2dit_jax import config as config_lib
from mask2dit_jax import tensor_io
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.pretrained import names as names_lib


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack, layer, i):
    # As integers: XLA's CPU backend copies bfloat16 twenty times slower.
    bits = functools.partial(
        jax.lax.bitcast_convert_type, new_dtype=f'uint{8 * stack.dtype.itemsize}'
    )
    return jax.lax.bitcast_convert_type(
        jax.lax.dynamic_update_index_in_dim(bits(stack), bits(layer), i, 0), stack.dtype
    )


def _place(entry: names_lib.Entry, tensors: dict, target):
    """One parameter on its devices; the host holds one tensor at a time."""

    def put(name, sharding):
        value = entry.ours(tensors[name]).astype(target.dtype)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    if not entry.stacked:
        return put(entry.names[0], target.sharding)
    sharding = target.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(
            sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:])
        )
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
    entries, tensors = names_lib.matched_tensors(kind, cfg, tensors)
    targets = {
        tuple(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(target)
    }
    return traverse_util.unflatten_dict(
        {
            e.path: _place(e, tensors, targets[e.path])
            for e in tqdm.tqdm(entries, desc=f'loading {kind}', unit='parameter', delay=3)
        }
    )


def on_one_device(tree, dtype: str | None = None):
    """`tree` of ShapeDtypeStructs as a target on the first device, optionally in another dtype."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding), tree
    )


def read_config(kind: str, folder, **overrides):
    """Configuration of the network in a folder, released or converted.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    path = pathlib.Path(folder) / 'config.json'
    try:
        return names_lib.NETWORKS[kind].parse(
            json.loads(path.read_text(encoding='utf-8')), **overrides
        )
    except OSError as error:
        raise FileNotFoundError(
            f'{path} cannot be read ({error.strerror}): {folder} must be a {kind} folder.'
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
    target = on_one_device(names_lib.abstract_params(cfg, kind), param_dtype)
    return names_lib.NETWORKS[kind].module(cfg), read_params(kind, folder, cfg, target)


def load_transformer(folder, param_dtype: str = 'float32', **overrides):
    """Model and parameters from a folder with config.json and .safetensors files, or a converted
    one.

    Args:
      folder: holds config.json and one or more .safetensors files of any name, or Orbax params/.
      param_dtype: dtype of the parameters.
      **overrides: DiTConfig fields to set, e.g. dtype='bfloat16' or attention_backend='dense';
        dtype is 'float32' unless set here.

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


def load_schedule(file) -> schedule_lib.Schedule:
    """Schedule from a scheduler_config.json.

    Raises:
      ValueError: for settings other than scaled-linear betas and v-prediction.
    """
    try:
        config = dict(json.loads(pathlib.Path(file).read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f'{file} is no scheduler configuration ({error}).') from error
    for key, value in names_lib._SCHEDULE_FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(
                f'{file} sets {key} to {config[key]!r}: only {value!r} is implemented.'
            )
    names = {f.name for f in dataclasses.fields(schedule_lib.Schedule)}
    return schedule_lib.Schedule(**{k: v for k, v in config.items() if k in names})


def with_model_from(config: config_lib.Config, folder) -> config_lib.Config:
    """`config` with init_from, transformer, schedule and codec of a model folder or of the run in a
    workdir; dtype, remat and attention stay."""
    folder = pathlib.Path(folder)
    kept = {name: getattr(config.model, name) for name in ('dtype', 'remat', 'attention_backend')}
    if (folder / 'transformer').is_dir():
        model = read_config('transformer', folder / 'transformer', **kept)
        schedule, codec = load_schedule(folder / 'scheduler/scheduler_config.json'), 'vae'
    else:
        run = config_lib.load_run(folder)
        model, schedule, codec = (
            dataclasses.replace(run.model, **kept),
            run.schedule,
            run.data.codec,
        )
    return dataclasses.replace(
        config,
        init_from=str(folder),
        model=model,
        schedule=schedule,
        data=dataclasses.replace(config.data, codec=codec),
    )
