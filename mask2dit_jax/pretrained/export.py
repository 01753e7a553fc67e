"""Writes model folders: released ones to Orbax and back, and the EMA of a training run."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import tqdm
from flax import traverse_util

from mask2dit_jax import checkpoint, tensor_io
from mask2dit_jax import config as config_lib
from mask2dit_jax.pretrained import load as load_lib
from mask2dit_jax.pretrained import lora_files
from mask2dit_jax.pretrained import names as names_lib

_COPIED = ('tokenizer', 'scheduler', 'model_index.json')


def export_params(kind: str, cfg, params) -> dict[str, tensor_io.Tensor]:
    """Tensors under the reference's names and in its shapes, read when asked for; also maps
    gradients.

    Args:
      kind: one of NETWORKS.
      cfg: its configuration.
      params: nested dict of arrays, or of weights.open_orbax's.
    """
    flat = {
        tuple(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    tensors = {}
    for e in names_lib.parameter_entries(kind, cfg):
        leaf = flat[e.path]
        dtype = (
            leaf.dtype.numpy_dtype if hasattr(leaf.dtype, 'numpy_dtype') else np.dtype(leaf.dtype)
        )
        for i, name in enumerate(e.names):
            read = functools.partial(_read_layer, e, leaf, i)
            tensors[name] = tensor_io.Tensor(e.shape, dtype, read)
    return tensors


def _read_layer(entry: names_lib.Entry, leaf, i: int) -> np.ndarray:
    return entry.theirs(leaf[i] if entry.stacked else leaf)


def _to_orbax(kind: str, source: pathlib.Path, target: pathlib.Path) -> int:
    """One network from safetensors to target/config.json and target/params; returns the number of
    parameters."""
    cfg = load_lib.read_config(kind, source)
    entries, tensors = names_lib.matched_tensors(kind, cfg, tensor_io.open_safetensors(source))
    count = sum(int(np.prod(e.shape)) * len(e.names) for e in entries)
    with tqdm.tqdm(total=count, desc=kind, unit='parameter', unit_scale=True) as bar:

        def read(entry, name):
            bar.update(int(np.prod(entry.shape)))
            return entry.ours(tensors[name])

        def leaf(entry):
            dtypes = sorted({np.dtype(tensors[n].dtype).name for n in entry.names})
            if len(dtypes) > 1:
                raise ValueError(
                    f'{source} holds layers of one tensor in different dtypes ({", ".join(dtypes)}): '
                    f'{entry.names[0]} and its like.'
                )
            layer = tuple(entry.flat[i] for i in entry.axes)
            shape = (len(entry.names), *layer) if entry.stacked else layer
            parts = tuple(functools.partial(read, entry, n) for n in entry.names)
            return tensor_io.Leaf(
                shape, np.dtype(tensors[entry.names[0]].dtype), parts, entry.stacked
            )

        tensor_io.write_orbax(
            target / 'params', traverse_util.unflatten_dict({e.path: leaf(e) for e in entries})
        )
    shutil.copyfile(source / 'config.json', target / 'config.json')
    return count


def _to_safetensors(kind: str, tensors: dict[str, tensor_io.Tensor], target: pathlib.Path) -> int:
    """One network's tensors to .safetensors in `target`; returns the number of parameters."""
    count = sum(int(np.prod(t.shape)) for t in tensors.values())
    with tqdm.tqdm(total=count, desc=kind, unit='parameter', unit_scale=True) as bar:

        def read(tensor):
            bar.update(int(np.prod(tensor.shape)))
            return tensor.read()

        tensor_io.write_safetensors(
            target,
            names_lib.NETWORKS[kind].stem,
            {
                n: dataclasses.replace(t, read=functools.partial(read, t))
                for n, t in tensors.items()
            },
        )
    return count


def _orbax_tensors(kind: str, cfg, params: pathlib.Path) -> dict[str, tensor_io.Tensor]:
    """The tensors of an Orbax item, under the reference's names."""
    return export_params(kind, cfg, traverse_util.unflatten_dict(tensor_io.open_orbax(params)))


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
        base = names_lib.matched_tensors(
            'transformer', cfg.model, tensor_io.open_safetensors(folder / 'transformer')
        )[1]
    tree = traverse_util.unflatten_dict(tensor_io.open_orbax(run / 'ema'))
    return lora_files.merge_tensors(
        base, tree, cfg.lora, names_lib.parameter_entries('transformer', cfg.model)
    )


def _export_run(run: pathlib.Path, target: pathlib.Path) -> dict[str, int]:
    """The EMA of a training run's checkpoint as target/transformer and target/scheduler, LoRA also
    on its own."""
    cfg = config_lib.load_run(run)
    config, folder = names_lib.transformer_json(cfg.model), target / 'transformer'
    counts = {'transformer': _to_safetensors('transformer', _run_tensors(run, cfg), folder)}
    if cfg.lora.rank:
        counts['LoRA'] = lora_files.write_lora(
            target,
            cfg.model,
            traverse_util.unflatten_dict(tensor_io.open_orbax(run / 'ema')),
            cfg.lora,
        )
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    (target / 'scheduler').mkdir(exist_ok=True)
    (target / 'scheduler/scheduler_config.json').write_text(
        json.dumps(names_lib.schedule_json(cfg.schedule), indent=2) + '\n'
    )
    return counts


def convert_folder(source, target) -> dict[str, int]:
    """Converts a model folder to Orbax, a converted one back, or exports a training run.

    Args:
      source: folder with transformer/, vae/, text_encoder/ (any of them), or a workdir or
        checkpoint of mask2dit_jax.main.
      target: new folder.

    Returns:
      Number of parameters by network, and of the LoRA of a run that has one.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f'{target} is not empty: give --to a new folder.')
    found = [k for k in names_lib.NETWORKS if (source / k / 'config.json').is_file()]
    run = source if (source / 'ema').is_dir() else None
    if not found and run is None:
        if not checkpoint.folders(source):
            raise FileNotFoundError(
                f'{source} holds neither {", ".join(k + "/" for k in names_lib.NETWORKS)} nor checkpoints.'
            )
        run = checkpoint.folders(source)[-1]
    if run is not None:
        return _export_run(run, target)
    counts = {}
    for kind in found:
        folder = target / kind
        folder.mkdir(parents=True)
        if (source / kind / 'params').is_dir():
            tensors = _orbax_tensors(
                kind, load_lib.read_config(kind, source / kind), source / kind / 'params'
            )
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
