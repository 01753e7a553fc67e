"""Loads the networks of a released folder as Flax modules and parameters.

A model folder in diffusers' layout looks like this:

    FOLDER/
      transformer/     config.json and .safetensors files
      vae/             config.json and .safetensors files
      text_encoder/    config.json and .safetensors files
      tokenizer/
      scheduler/       scheduler_config.json

A folder that `mask2dit_jax.convert` made has an Orbax item params/ in each network's folder instead
of the .safetensors files, and is loaded by the same functions. Loading is strict: a missing,
unexpected or wrongly shaped tensor is an error that names it.

    model, params = load_transformer('FOLDER/transformer')
    v = model.apply({'params': params}, latents, text, t, frames=(13, 13, 13))

    model, params = load_vae('FOLDER/vae')
    mean, logvar = vae.encode(model.cfg, params, pixels)

    model, params = load_t5('FOLDER/text_encoder')
    states = t5.encode(model.cfg, params, ids)

The transformer takes latents [B, T, H, W, C] (the reference's (B, F, C, h, w) with channels moved
last), text [B, S, M, E], a timestep for each latent frame t [B, T] or for each scene t [B, S], and
frames, the latent frames of each scene. Where the reference sets clip_idx=i, t is the timestep in
scene i and 0 elsewhere. The reference's attn_msk_version becomes `model.cfg.pattern`.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import tqdm
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from mask2dit_jax import config as config_lib
from mask2dit_jax import paths, tensor_io
from mask2dit_jax.pretrained import config_json
from mask2dit_jax.pretrained import names as names_lib


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack, layer, index):
    """`stack` with the layer at `index` replaced, in place."""
    # As integers, because XLA's CPU backend copies bfloat16 twenty times slower.
    bits_dtype = f'uint{8 * stack.dtype.itemsize}'
    stack_bits = jax.lax.bitcast_convert_type(stack, bits_dtype)
    layer_bits = jax.lax.bitcast_convert_type(layer, bits_dtype)
    bits = jax.lax.dynamic_update_index_in_dim(stack_bits, layer_bits, index, 0)
    return jax.lax.bitcast_convert_type(bits, stack.dtype)


def _place(entry: names_lib.Entry, tensors: dict, target):
    """One parameter on its devices; the host holds one tensor at a time."""

    def put(name, sharding):
        value = entry.ours(tensors[name]).astype(target.dtype)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    if not entry.stacked:
        return put(entry.names[0], target.sharding)

    # A layer is spread as the stack is, without the stack's first axis.
    layer_sharding = target.sharding
    if isinstance(layer_sharding, NamedSharding):
        layer_spec = PartitionSpec(*layer_sharding.spec[1:])
        layer_sharding = NamedSharding(layer_sharding.mesh, layer_spec)

    stack = jnp.zeros(target.shape, target.dtype, device=target.sharding)
    for i, name in enumerate(entry.names):
        stack = _set_layer(stack, put(name, layer_sharding), i)
    return stack


def import_params(kind: str, cfg, tensors: dict, target):
    """Makes Flax parameters from tensors under the reference's names.

    Args:
      kind: one of names.NETWORKS.
      cfg: the network's configuration.
      tensors: all tensors of the network by name, as arrays or tensor_io.Tensor.
      target: ShapeDtypeStructs with shardings; they give dtype and placement.

    Returns:
      The parameters, nested dicts of arrays.

    Raises:
      ValueError: naming every missing, unexpected or wrongly shaped tensor.
    """
    entries, tensors = names_lib.matched_tensors(kind, cfg, tensors)
    targets = traverse_util.flatten_dict(target)
    params = {}
    for entry in tqdm.tqdm(entries, desc=f'loading {kind}', unit='parameter', delay=3):
        params[entry.path] = _place(entry, tensors, targets[entry.path])
    return traverse_util.unflatten_dict(params)


def on_one_device(tree, dtype: str | None = None):
    """Makes a target on the first device, for networks of any kind.

    partitioning.abstract_arrays places the transformer's parameters on a mesh by its rules, which
    the VAE and T5 do not match.

    Args:
      tree: ShapeDtypeStructs, e.g. of names.abstract_params.
      dtype: dtype of the parameters; None keeps that of the tree.

    Returns:
      ShapeDtypeStructs with shardings.
    """
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding), tree
    )


def read_params(kind: str, folder, cfg, target):
    """Reads the parameters of a released or converted folder.

    Args:
      kind: one of names.NETWORKS.
      folder: the network's folder, with .safetensors files of any name or an Orbax item params/.
      cfg: the network's configuration.
      target: ShapeDtypeStructs with shardings; the parameters are cast and laid out like them.

    Returns:
      The parameters, nested dicts of arrays.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    converted = pathlib.Path(folder) / 'params'
    if converted.is_dir():
        return tensor_io.restore_orbax(converted, target)
    return import_params(kind, cfg, tensor_io.open_safetensors(folder), target)


def _load(kind: str, folder, param_dtype: str, overrides: dict):
    """Module and parameters of any kind of network."""
    network_config = config_json.read_config(kind, folder, **({'dtype': 'float32'} | overrides))
    shapes = names_lib.abstract_params(network_config, kind)
    target = on_one_device(shapes, param_dtype)
    params = read_params(kind, folder, network_config, target)
    model = names_lib.NETWORKS[kind].module(network_config)
    return model, params


def load_transformer(folder, param_dtype: str = 'float32', **overrides):
    """Loads a transformer from a released or converted folder.

    Args:
      folder: holds config.json, and .safetensors files of any name or an Orbax item params/.
      param_dtype: dtype of the parameters.
      **overrides: DiTConfig fields to set, e.g. dtype='bfloat16' or attention_backend='dense';
        dtype is 'float32' unless it is set here.

    Returns:
      (DiT module, parameters as nested dicts of arrays on the first device).

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    return _load('transformer', folder, param_dtype, overrides)


def load_vae(folder, param_dtype: str = 'float32', **overrides):
    """As `load_transformer`; vae.encode and vae.decode run the network."""
    return _load('vae', folder, param_dtype, overrides)


def load_t5(folder, param_dtype: str = 'float32', **overrides):
    """As `load_transformer`; t5.encode gives the network's last hidden state."""
    return _load('text_encoder', folder, param_dtype, overrides)


def with_model_from(config: config_lib.Config, folder) -> config_lib.Config:
    """Makes the configuration of a run that starts from a trained model.

    Args:
      config: the run's configuration.
      folder: a model folder, or the workdir or checkpoint of a run.

    Returns:
      `config` with the folder as init_from, and with the folder's transformer, schedule and codec.
      How the transformer is computed (dtype, remat and attention_backend) stays as in `config`.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or cannot be read.
    """
    paths.check_local(folder=folder)
    folder = pathlib.Path(folder)
    kept = {
        'dtype': config.model.dtype,
        'remat': config.model.remat,
        'attention_backend': config.model.attention_backend,
    }

    if (folder / 'transformer').is_dir():
        model_config = config_json.read_config('transformer', folder / 'transformer', **kept)
        schedule = config_json.load_schedule(folder / 'scheduler/scheduler_config.json')
        codec = 'vae'
    else:
        run_config = config_lib.load_run(folder)
        model_config = dataclasses.replace(run_config.model, **kept)
        schedule = run_config.schedule
        codec = run_config.data.codec

    return dataclasses.replace(
        config,
        init_from=str(folder),
        model=model_config,
        schedule=schedule,
        data=dataclasses.replace(config.data, codec=codec),
    )
