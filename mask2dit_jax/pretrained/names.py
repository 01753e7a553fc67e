"""The parameters of the three networks: the reference's names, shapes and axes beside ours.

Two things differ. The reference keeps a tensor for each layer, where we stack the layers along the
first axis; and PyTorch keeps a kernel as [out, in, ...], where Flax keeps it as [..., in, out].
`parameter_entries` lists what corresponds to what, `matched_tensors` compares the list with the
tensors of a file, and `Entry` changes the layout of one tensor.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax.models import dit, t5, vae

# Our module path: the reference's module. '*' is the layer; layers are stacked along axis 0 here.
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


def _vae_name(module: str) -> str:
    """The VAE's modules are named alike; only the numbers of lists are joined differently."""
    return re.sub(r'_(\d+)', r'.\1', module.replace('/', '.'))


def _dit_inputs(cfg: dit.DiTConfig):
    """One scene of one latent frame at the trained size, which every configuration accepts."""
    _, grid_height, grid_width = cfg.base_grid
    height = cfg.patch_size * grid_height
    width = cfg.patch_size * grid_width
    latents = jnp.zeros((1, 1, height, width, cfg.in_channels), jnp.float32)  # [B, T, H, W, C]
    text_shape = (1, 1, cfg.max_text_seq_length, cfg.text_embed_dim)
    text = jnp.zeros(text_shape, jnp.float32)  # [B, S, M, E]
    timesteps = jnp.zeros((1, 1), jnp.float32)  # [B, T]
    frames = (1,)
    return latents, text, timesteps, frames


def _vae_inputs(cfg: vae.VAEConfig):
    size = cfg.spatial_factor
    return (jnp.zeros((1, 1, size, size, cfg.in_channels), jnp.float32),)  # [B, F, H, W, C]


def _t5_inputs(cfg: t5.T5Config):
    del cfg  # token ids have the same shape in every T5
    return (jnp.zeros((1, 1), jnp.int32),)  # [B, M]


@dataclasses.dataclass(frozen=True)
class _Network:
    """What loading and exporting have to know about a network.

    Attributes:
      module: the Flax module, a class whose one field is the configuration.
      inputs: makes example inputs of the module from the configuration.
      name: turns our module path into the reference's.
      stem: file name of the weights in a released folder, without its suffix.
      tied: pairs of reference names (copy, name). A file may hold the tensor under both; we use
        the second.
    """

    module: Any
    inputs: Callable
    name: Callable[[str], str]
    stem: str = 'diffusion_pytorch_model'
    tied: tuple[tuple[str, str], ...] = ()


# The folder of a network, which is also its `kind` below: the network.
NETWORKS = {
    'transformer': _Network(dit.DiT, _dit_inputs, _DIT_NAMES.__getitem__),
    'vae': _Network(vae.VAE, _vae_inputs, _vae_name),
    'text_encoder': _Network(
        t5.T5Encoder,
        _t5_inputs,
        _T5_NAMES.__getitem__,
        stem='model',
        tied=(('encoder.embed_tokens.weight', 'shared.weight'),),
    ),
}


@functools.cache  # tracing takes seconds
def abstract_params(cfg, kind: str = 'transformer'):
    """Shapes and dtypes of a network's parameters; nothing is allocated.

    Args:
      cfg: the network's configuration.
      kind: one of NETWORKS.

    Returns:
      Nested dict of ShapeDtypeStructs.
    """
    network = NETWORKS[kind]
    model = network.module(cfg)

    def init():
        return model.init(jax.random.key(0), *network.inputs(cfg))['params']

    return jax.eval_shape(init)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter of ours and the reference's tensors for it: one, or one for each layer.

    `theirs.reshape(flat).transpose(axes)` is ours; of stacked parameters, it is one layer of ours.

    Attributes:
      path: our path in the nested dict of parameters.
      names: the reference's names, in the order of the layers.
      stacked: whether ours has the layers along its first axis.
      shape: shape of each of their tensors.
      flat: their shape after axes of size one are dropped or patches are flattened.
      axes: the axis of `flat` that becomes each axis of ours.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    flat: tuple[int, ...]
    axes: tuple[int, ...]

    def ours(self, value):
        """One tensor of theirs in our layout."""
        return np.asarray(value).reshape(self.flat).transpose(self.axes)

    def theirs(self, value):
        """Our parameter, or one layer of it, in their layout."""
        return np.asarray(value).transpose(np.argsort(self.axes)).reshape(self.shape)


def _entry(kind: str, cfg, path: tuple[str, ...], shape: tuple[int, ...]) -> Entry:
    """The entry of our parameter at `path`, which has `shape`."""
    stacked = path[0] == 'blocks'
    layer_shape = shape[1:] if stacked else shape

    # A kernel is [..., in, out] here and [out, in, ...] there.
    axes = tuple(range(len(layer_shape)))
    if path[-1] == 'kernel':
        axes = (*axes[2:], 1, 0)
    flat = tuple(layer_shape[axis] for axis in np.argsort(axes))

    their_shape = flat
    if path == ('positions',):
        their_shape = (1, *layer_shape)
    if path == ('patch', 'kernel') and cfg.patch_size_t is None:
        # Without patches in time, theirs is a convolution over images.
        their_shape = (flat[0], cfg.in_channels, cfg.patch_size, cfg.patch_size)

    # The table of positions is a buffer there, and a parameter outside of any module here.
    if path == ('positions',):
        name = NETWORKS[kind].name('positions')
    else:
        suffix = 'bias' if path[-1] == 'bias' else 'weight'
        module = '/'.join(path[:-1])
        name = f'{NETWORKS[kind].name(module)}.{suffix}'

    names = (name,)
    if stacked:
        num_layers = shape[0]
        names = tuple(name.replace('*', str(layer)) for layer in range(num_layers))
    return Entry(path, names, stacked, their_shape, flat, axes)


def parameter_entries(kind: str, cfg) -> list[Entry]:
    """All parameters of a network, with the reference's tensors for them.

    Args:
      kind: one of NETWORKS.
      cfg: the network's configuration.

    Returns:
      One entry for each of our parameters.
    """
    entries = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(cfg, kind)):
        path = tuple(key.key for key in key_path)
        entries.append(_entry(kind, cfg, path, leaf.shape))
    return entries


def matched_tensors(kind: str, cfg, tensors: dict) -> tuple[list[Entry], dict]:
    """Checks that the tensors of a file are exactly those of a network.

    A tied copy is dropped; a file that holds the copy alone has it taken for the tensor itself.

    Args:
      kind: one of NETWORKS.
      cfg: the network's configuration.
      tensors: the file's tensors by the reference's names.

    Returns:
      The network's entries, and the tensors by the names that stand in the entries.

    Raises:
      ValueError: naming every missing, unexpected or wrongly shaped tensor, and tied ones that
        differ.
    """
    tensors = dict(tensors)
    problems = []
    for copy, name in NETWORKS[kind].tied:
        if copy in tensors:
            value = tensors.pop(copy)
            kept = tensors.setdefault(name, value)
            if not np.array_equal(value, kept):
                problems.append(f'{copy} differs from {name}')

    entries = parameter_entries(kind, cfg)
    expected = {name: entry.shape for entry in entries for name in entry.names}
    problems += [f'missing {name}' for name in expected if name not in tensors]
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape)
            problems.append(f'{name} has shape {found}, expected {shape}')
    problems += [f'unexpected {name}' for name in sorted(set(tensors) - set(expected))]

    if problems:
        raise ValueError(f'Checkpoint does not fit its config.json: {"; ".join(problems)}.')
    return entries, tensors
