"""LoRA files of diffusers and PEFT."""

import functools
import json
import pathlib
import re

import numpy as np
from flax import traverse_util

from mask2dit_jax import tensor_io
from mask2dit_jax.models import dit, lora
from mask2dit_jax.pretrained import names as names_lib

STEM = 'pytorch_lora_weights'  # of the file that diffusers looks for
_PREFIX = 'transformer.'
_METADATA = 'lora_adapter_metadata'
# Settings of PEFT that would change the numbers: any value but these is refused.
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


def _pairs(tree, entries):
    """(entry, A, B) of every kernel with LoRA tensors; `entries` are convert's of the
    transformer."""
    flat = traverse_util.flatten_dict(tree)
    for e in entries:
        *path, last = e.path
        if last == 'kernel' and (*path, 'lora_A') in flat:
            yield e, flat[*path, 'lora_A'], flat[*path, 'lora_B']


def merge_tensors(base: dict, tree, cfg: lora.LoraConfig, entries) -> dict[str, tensor_io.Tensor]:
    """`merge` for tensors in files, under the reference's names, in float32: read and computed one
    at a time.

    Args:
      base: the base's tensors by name.
      tree: LoRA tensors, arrays or weights.open_orbax's.
      cfg: rank and alpha.
      entries: convert's entries of the transformer.
    """

    def read(entry, name, a, b, i):
        a, b = (np.asarray(x[i] if entry.stacked else x) for x in (a, b))
        return entry.theirs(
            lora.merge_kernel(entry.ours(np.asarray(base[name], np.float32)), a, b, lora.scale(cfg))
        )

    f32 = np.dtype(np.float32)
    tensors = {
        n: tensor_io.Tensor(t.shape, f32, functools.partial(np.asarray, t, f32))
        for n, t in base.items()
    }
    for e, a, b in _pairs(tree, entries):
        for i, name in enumerate(e.names):
            tensors[name] = tensor_io.Tensor(
                e.shape, f32, functools.partial(read, e, name, a, b, i)
            )
    return tensors


def _shapes(entry, rank: int) -> dict[str, tuple[int, ...]]:
    """PEFT's shapes of A and B; of a convolution, the kernel stays with A."""
    out, *inner = entry.shape
    return {'A': (rank, *inner), 'B': (out, rank, *(1 for _ in inner[1:]))}


def _module(name: str) -> str:
    return name.removesuffix('.weight')


def write_file(folder, tree, cfg: lora.LoraConfig, entries) -> int:
    """Writes FOLDER/pytorch_lora_weights.safetensors for diffusers' load_lora_weights; returns how
    many parameters.

    The scale goes into the file's metadata, as diffusers writes it; readers that ignore it take a
    scale of 1.
    """
    tensors, modules = {}, []
    for e, *pair in _pairs(tree, entries):
        shapes = _shapes(e, cfg.rank)
        for i, name in enumerate(e.names):
            modules.append(_module(name))
            for (kind, shape), x in zip(shapes.items(), pair):
                tensors[f'{_PREFIX}{_module(name)}.lora_{kind}.weight'] = tensor_io.Tensor(
                    shape,
                    np.dtype(np.float32),
                    functools.partial(_theirs, x[i] if e.stacked else x, shape),
                )
    peft = {
        'r': cfg.rank,
        'lora_alpha': cfg.alpha or cfg.rank,
        'target_modules': modules,
        'rank_pattern': {},
        'alpha_pattern': {},
        'use_dora': False,
        'lora_bias': False,
    }
    metadata = {_METADATA: json.dumps({_PREFIX + k: v for k, v in peft.items()})}
    size = sum(int(np.prod(t.shape)) for t in tensors.values())
    # In one part: diffusers reads one file.
    tensor_io.write_safetensors(folder, STEM, tensors, shard_bytes=4 * size, metadata=metadata)
    return size


def _theirs(value, shape) -> np.ndarray:
    return np.asarray(value).T.reshape(shape)


def read_file(path, entries):
    """LoRA tensors from a file of diffusers, and the LoraConfig that merges them.

    Args:
      path: .safetensors with PEFT's names, with or without 'transformer.' before them; the scale is
        that of the file's metadata, and 1 without.
      entries: convert's entries of the transformer that it is for.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: naming every missing, unexpected or wrongly shaped tensor, or settings that are
        not implemented.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f'{path} is no file: give a LoRA file such as {STEM}.safetensors.')
    tensors, metadata = tensor_io.open_file(path)
    tensors = {n.removeprefix(_PREFIX): t for n, t in tensors.items()}
    known = {_module(n): e for e in entries if e.path[-1] == 'kernel' for n in e.names}
    parts = {n: re.fullmatch(r'(.+)\.lora_([AB])\.weight', n) for n in tensors}
    problems = [f'unexpected {n}' for n, m in parts.items() if not m or m[1] not in known]
    used = {known[m[1]].path: known[m[1]] for m in parts.values() if m and m[1] in known}
    rank = next((t.shape[0] for n, t in tensors.items() if '.lora_A.' in n and t.shape), 0)
    if not used or not rank:
        raise ValueError(
            f'{path} holds no LoRA tensors of this transformer, e.g. '
            f'{_PREFIX}{next(iter(known))}.lora_A.weight.'
        )
    tree = {}
    for e in used.values():
        for kind, shape in _shapes(e, rank).items():
            names = [f'{_module(n)}.lora_{kind}.weight' for n in e.names]
            problems += [f'missing {n}' for n in names if n not in tensors]
            problems += [
                f'{n} has shape {tuple(tensors[n].shape)}, expected {shape}'
                for n in names
                if n in tensors and tuple(tensors[n].shape) != shape
            ]
            if not problems:
                values = [np.asarray(tensors[n], np.float32).reshape(shape[0], -1).T for n in names]
                tree[*e.path[:-1], f'lora_{kind}'] = np.stack(values) if e.stacked else values[0]
    if problems:
        raise ValueError(f'{path} does not fit the transformer: {"; ".join(problems)}.')
    return traverse_util.unflatten_dict(tree), lora.LoraConfig(rank, _alpha(path, metadata, rank))


def _alpha(path, metadata: dict, rank: int) -> float:
    try:
        peft = {
            k.removeprefix(_PREFIX): v for k, v in json.loads(metadata.get(_METADATA, '{}')).items()
        }
        alpha = float(peft.get('lora_alpha', rank))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} has damaged {_METADATA} ({error}): save it again.') from error
    for key, allowed in ({'r': (rank,)} | _PEFT_FIXED).items():
        if key in peft and peft[key] not in allowed:
            raise ValueError(
                f'{path} was made with {key} {peft[key]!r}: only {allowed[0]!r} is implemented.'
            )
    if not 0 < alpha < np.inf:
        raise ValueError(f'{path} has lora_alpha {alpha}: it must be positive and finite.')
    return alpha


def write_lora(folder, cfg: dit.DiTConfig, tree, lora_cfg: lora.LoraConfig) -> int:
    """Writes a transformer's LoRA tensors as diffusers does (see lora.write_file)."""
    return write_file(folder, tree, lora_cfg, names_lib.parameter_entries('transformer', cfg))


def read_lora(path, cfg: dit.DiTConfig):
    """LoRA tensors for a transformer, and the LoraConfig to merge them by, from a file: see
    lora.read_file."""
    return read_file(path, names_lib.parameter_entries('transformer', cfg))
