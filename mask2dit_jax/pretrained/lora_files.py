"""LoRA tensors in files, as diffusers and PEFT write them.

A file holds one tensor A and one tensor B for each kernel and layer, under the reference's name of
the kernel:

    transformer.transformer_blocks.0.attn1.to_q.lora_A.weight    [rank, in]
    transformer.transformer_blocks.0.attn1.to_q.lora_B.weight    [out, rank]

Ours are the transposed ones, lora_A [in, rank] and lora_B [rank, out], with the layers stacked
along the first axis (see models/lora.py). The scale alpha / rank is in the metadata of the file.
"""

import functools
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from mask2dit_jax import paths, tensor_io
from mask2dit_jax.models import dit, lora
from mask2dit_jax.pretrained import names as names_lib

STEM = 'pytorch_lora_weights'  # of the file that diffusers looks for
_PREFIX = 'transformer.'
_METADATA = 'lora_adapter_metadata'
_FLOAT32 = np.dtype(np.float32)
# Settings of PEFT that would change the numbers, with the values that do not; others are refused.
_PEFT_FIXED = {
    'rank_pattern': ({}, None),
    'alpha_pattern': ({}, None),
    'use_dora': (False,),
    'use_rslora': (False,),
    'lora_bias': (False,),
    'bias': ('none',),
    'use_qalora': (False,),
    'layer_replication': (None,),
    'modules_to_save': (None, []),
    'target_parameters': (None, []),
    'trainable_token_indices': (None,),
    'init_lora_weights': (True, False, 'gaussian'),
}


class _Adapter(NamedTuple):
    """The LoRA tensors of one kernel; of stacked kernels, with the layers along the first axis."""

    entry: names_lib.Entry
    a: Any  # [(layers,) in, rank]
    b: Any  # [(layers,) rank, out]


def _adapters(tree, entries: list[names_lib.Entry]) -> Iterator[_Adapter]:
    """The kernels that have LoRA tensors in `tree`."""
    flat = traverse_util.flatten_dict(tree)
    for entry in entries:
        *module, leaf_name = entry.path
        if leaf_name == 'kernel' and (*module, 'lora_A') in flat:
            yield _Adapter(entry, flat[*module, 'lora_A'], flat[*module, 'lora_B'])


def merge_tensors(
    base: dict, tree, cfg: lora.LoraConfig, entries: list[names_lib.Entry]
) -> dict[str, tensor_io.Tensor]:
    """As lora.merge, for tensors in files, in float32; each is read and computed when asked for.

    Args:
      base: the base's tensors by the reference's names.
      tree: LoRA tensors as arrays, or the TensorStores of tensor_io.open_orbax.
      cfg: rank and alpha.
      entries: names.parameter_entries of the transformer.

    Returns:
      The merged tensors by the reference's names.
    """

    def merged(adapter, name, layer):
        entry = adapter.entry
        a = np.asarray(adapter.a[layer] if entry.stacked else adapter.a)
        b = np.asarray(adapter.b[layer] if entry.stacked else adapter.b)
        kernel = entry.ours(np.asarray(base[name], np.float32))
        return entry.theirs(lora.merge_kernel(kernel, a, b, lora.scale(cfg)))

    tensors = {}
    for name, tensor in base.items():
        read = functools.partial(np.asarray, tensor, _FLOAT32)
        tensors[name] = tensor_io.Tensor(tensor.shape, _FLOAT32, read)

    for adapter in _adapters(tree, entries):
        for layer, name in enumerate(adapter.entry.names):
            read = functools.partial(merged, adapter, name, layer)
            tensors[name] = tensor_io.Tensor(adapter.entry.shape, _FLOAT32, read)
    return tensors


def _shapes(entry: names_lib.Entry, rank: int) -> dict[str, tuple[int, ...]]:
    """PEFT's shapes of A and B for one layer."""
    features_out, *inner = entry.shape
    # Of a convolution [out, in, h, w], A keeps the window, and B's window is one pixel.
    window_of_one = (1,) * len(inner[1:])
    return {'A': (rank, *inner), 'B': (features_out, rank, *window_of_one)}


def _module(name: str) -> str:
    """The reference's module that holds the kernel `name`."""
    return name.removesuffix('.weight')


def _file_name(name: str, kind: str) -> str:
    """The name in a file, without prefix, of the A or B (`kind`) that belongs to a kernel."""
    return f'{_module(name)}.lora_{kind}.weight'


def _theirs(value, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(value).T.reshape(shape)


def write_lora(folder, cfg: dit.DiTConfig, tree, lora_cfg: lora.LoraConfig) -> int:
    """Writes FOLDER/pytorch_lora_weights.safetensors for diffusers' load_lora_weights.

    The scale goes into the file's metadata, as diffusers writes it; readers that ignore it take a
    scale of 1.

    Args:
      folder: where the file is written.
      cfg: the transformer's configuration.
      tree: LoRA tensors as arrays, or the TensorStores of tensor_io.open_orbax.
      lora_cfg: rank and alpha.

    Returns:
      The number of parameters in the file.
    """
    entries = names_lib.parameter_entries('transformer', cfg)
    tensors = {}
    modules = []
    for adapter in _adapters(tree, entries):
        entry = adapter.entry
        shapes = _shapes(entry, lora_cfg.rank)
        for layer, name in enumerate(entry.names):
            modules.append(_module(name))
            for kind, ours in (('A', adapter.a), ('B', adapter.b)):
                value = ours[layer] if entry.stacked else ours
                read = functools.partial(_theirs, value, shapes[kind])
                tensor = tensor_io.Tensor(shapes[kind], _FLOAT32, read)
                tensors[_PREFIX + _file_name(name, kind)] = tensor

    peft = {
        'r': lora_cfg.rank,
        'lora_alpha': lora_cfg.alpha or lora_cfg.rank,
        'target_modules': modules,
        'rank_pattern': {},
        'alpha_pattern': {},
        'use_dora': False,
        'lora_bias': False,
    }
    prefixed = {_PREFIX + key: value for key, value in peft.items()}
    metadata = {_METADATA: json.dumps(prefixed)}

    # All in one file, because diffusers reads one.
    num_parameters = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    tensor_io.write_safetensors(
        folder,
        STEM,
        tensors,
        shard_bytes=_FLOAT32.itemsize * num_parameters,
        metadata=metadata,
    )
    return num_parameters


def read_lora(path, cfg: dit.DiTConfig):
    """Reads the LoRA tensors of a file of diffusers.

    Args:
      path: .safetensors with PEFT's names, with or without 'transformer.' before them. The scale is
        that of the file's metadata, and 1 without them.
      cfg: configuration of the transformer that the tensors are for.

    Returns:
      (LoRA tensors as a nested dict of float32 arrays, the LoraConfig that merges them).

    Raises:
      FileNotFoundError: if there is no file at `path`.
      ValueError: naming every missing, unexpected or wrongly shaped tensor, or settings that are
        not implemented.
    """
    paths.check_local(file=path)
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(
            f'{path} is not a file: give a LoRA file such as {STEM}.safetensors.'
        )
    file = tensor_io.open_file(path)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in file.tensors.items()}

    # Which kernels the file has tensors for.
    known = {}
    for entry in names_lib.parameter_entries('transformer', cfg):
        if entry.path[-1] == 'kernel':
            known |= {_module(name): entry for name in entry.names}
    problems = []
    used = {}
    for name in tensors:
        match = re.fullmatch(r'(.+)\.lora_([AB])\.weight', name)
        if match and match[1] in known:
            entry = known[match[1]]
            used[entry.path] = entry
        else:
            problems.append(f'unexpected {name}')

    ranks = (t.shape[0] for name, t in tensors.items() if '.lora_A.' in name and t.shape)
    rank = next(ranks, 0)
    if not used or not rank:
        example = _PREFIX + _file_name(next(iter(known)), 'A')
        raise ValueError(f'{path} holds no LoRA tensors of this transformer, e.g. {example}.')

    # One layer after the other, in our layout; a kernel must have all of its layers.
    tree = {}
    for entry in used.values():
        for kind, shape in _shapes(entry, rank).items():
            names = [_file_name(name, kind) for name in entry.names]
            problems += [f'missing {name}' for name in names if name not in tensors]
            for name in names:
                if name in tensors and tuple(tensors[name].shape) != shape:
                    found = tuple(tensors[name].shape)
                    problems.append(f'{name} has shape {found}, expected {shape}')
            if problems:
                continue

            layers = []
            for name in names:
                value = np.asarray(tensors[name], np.float32)
                layers.append(value.reshape(shape[0], -1).T)
            stacked = np.stack(layers) if entry.stacked else layers[0]
            tree[*entry.path[:-1], f'lora_{kind}'] = stacked

    if problems:
        raise ValueError(f'{path} does not fit the transformer: {"; ".join(problems)}.')
    alpha = _alpha(path, file.metadata, rank)
    return traverse_util.unflatten_dict(tree), lora.LoraConfig(rank, alpha)


def _alpha(path, metadata: dict[str, str], rank: int) -> float:
    """The alpha in a file's metadata, whose other settings must be ones that are implemented."""
    try:
        saved = json.loads(metadata.get(_METADATA, '{}'))
        peft = {key.removeprefix(_PREFIX): value for key, value in saved.items()}
        alpha = float(peft.get('lora_alpha', rank))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} has damaged {_METADATA} ({error}): save it again.') from error

    allowed_values = {'r': (rank,)} | _PEFT_FIXED
    for key, allowed in allowed_values.items():
        if key in peft and peft[key] not in allowed:
            raise ValueError(
                f'{path} was made with {key} {peft[key]!r}: only {allowed[0]!r} is implemented.'
            )
    if not 0 < alpha < np.inf:
        raise ValueError(f'{path} has lora_alpha {alpha}: it must be positive and finite.')
    return alpha
