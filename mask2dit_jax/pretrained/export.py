"""Writes model folders: released ones as Orbax, converted ones and training runs as safetensors.

`convert_folder` decides by what the source holds; `mask2dit_jax.convert` is its command. Every
network is written tensor by tensor, so that the host never holds a whole one.
"""

import dataclasses
import functools
import json
import pathlib
import shutil

import numpy as np
import tqdm
from flax import traverse_util

from mask2dit_jax import checkpoint, paths, tensor_io
from mask2dit_jax import config as config_lib
from mask2dit_jax.pretrained import config_json, lora_files, runs
from mask2dit_jax.pretrained import names as names_lib

_COPIED = ('tokenizer', 'scheduler', 'model_index.json')


def export_params(kind: str, cfg, params) -> dict[str, tensor_io.Tensor]:
    """Names and lays out parameters, or gradients, as the reference does.

    Args:
      kind: one of names.NETWORKS.
      cfg: the network's configuration.
      params: nested dict of arrays, or of the TensorStores of tensor_io.open_orbax.

    Returns:
      Tensors by the reference's names; np.asarray(tensor) reads one.
    """
    leaves = traverse_util.flatten_dict(params)
    tensors = {}
    for entry in names_lib.parameter_entries(kind, cfg):
        leaf = leaves[entry.path]
        dtype = _numpy_dtype(leaf)
        for i, name in enumerate(entry.names):
            read = functools.partial(_read_layer, entry, leaf, i)
            tensors[name] = tensor_io.Tensor(entry.shape, dtype, read)
    return tensors


def _numpy_dtype(leaf) -> np.dtype:
    # TensorStore has dtypes of its own.
    if hasattr(leaf.dtype, 'numpy_dtype'):
        return leaf.dtype.numpy_dtype
    return np.dtype(leaf.dtype)


def _read_layer(entry: names_lib.Entry, leaf, i: int) -> np.ndarray:
    return entry.theirs(leaf[i] if entry.stacked else leaf)


def _num_elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _progress(kind: str, num_parameters: int) -> tqdm.tqdm:
    return tqdm.tqdm(total=num_parameters, desc=kind, unit='parameter', unit_scale=True)


def _to_orbax(kind: str, source: pathlib.Path, target: pathlib.Path) -> int:
    """Writes target/config.json and target/params from safetensors; returns the number of
    parameters."""
    network_config = config_json.read_config(kind, source)
    entries, tensors = names_lib.matched_tensors(
        kind, network_config, tensor_io.open_safetensors(source)
    )
    num_parameters = sum(_num_elements(e.shape) * len(e.names) for e in entries)

    with _progress(kind, num_parameters) as bar:

        def read(entry, name):
            bar.update(_num_elements(entry.shape))
            return entry.ours(tensors[name])

        def leaf(entry):
            dtypes = sorted({np.dtype(tensors[name].dtype).name for name in entry.names})
            if len(dtypes) > 1:
                raise ValueError(
                    f'{source} holds layers of one tensor in different dtypes '
                    f'({", ".join(dtypes)}): {entry.names[0]} and its like.'
                )

            layer_shape = tuple(entry.flat[axis] for axis in entry.axes)
            shape = (len(entry.names), *layer_shape) if entry.stacked else layer_shape
            dtype = np.dtype(tensors[entry.names[0]].dtype)
            parts = tuple(functools.partial(read, entry, name) for name in entry.names)
            return tensor_io.Leaf(shape, dtype, parts, entry.stacked)

        leaves = {entry.path: leaf(entry) for entry in entries}
        tensor_io.write_orbax(target / 'params', traverse_util.unflatten_dict(leaves))

    shutil.copyfile(source / 'config.json', target / 'config.json')
    return num_parameters


def _to_safetensors(kind: str, tensors: dict[str, tensor_io.Tensor], target: pathlib.Path) -> int:
    """Writes tensors as .safetensors files in `target`; returns the number of parameters."""
    num_parameters = sum(_num_elements(tensor.shape) for tensor in tensors.values())

    with _progress(kind, num_parameters) as bar:

        def read(tensor):
            bar.update(_num_elements(tensor.shape))
            return tensor.read()

        counted = {}
        for name, tensor in tensors.items():
            counted[name] = dataclasses.replace(tensor, read=functools.partial(read, tensor))
        tensor_io.write_safetensors(target, names_lib.NETWORKS[kind].stem, counted)

    return num_parameters


def _orbax_tensors(kind: str, network_config, item: pathlib.Path) -> dict[str, tensor_io.Tensor]:
    """The tensors of an Orbax item, under the reference's names."""
    return export_params(kind, network_config, _open_tree(item))


def _open_tree(item: pathlib.Path) -> dict:
    """The arrays of an Orbax item as a nested dict; they are read when they are asked for."""
    return traverse_util.unflatten_dict(tensor_io.open_orbax(item))


def _base_tensors(config: config_lib.Config) -> dict[str, tensor_io.Tensor]:
    """The tensors that a run with LoRA started from, under the reference's names."""
    folder = pathlib.Path(config.init_from)
    transformer = folder / 'transformer'
    if not transformer.is_dir():
        return _run_tensors(runs.good_checkpoint(folder), config_lib.load_run(folder))

    if (transformer / 'params').is_dir():
        return _orbax_tensors('transformer', config.model, transformer / 'params')

    files = tensor_io.open_safetensors(transformer)
    _, tensors = names_lib.matched_tensors('transformer', config.model, files)
    return tensors


def _run_tensors(run: pathlib.Path, config: config_lib.Config) -> dict[str, tensor_io.Tensor]:
    """The EMA of a run's checkpoint, under the reference's names; LoRA is merged into its base."""
    if not config.lora.rank:
        return _orbax_tensors('transformer', config.model, run / 'ema')

    base = _base_tensors(config)
    lora_tree = _open_tree(run / 'ema')
    entries = names_lib.parameter_entries('transformer', config.model)
    return lora_files.merge_tensors(base, lora_tree, config.lora, entries)


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + '\n')


def _export_run(run: pathlib.Path, target: pathlib.Path) -> dict[str, int]:
    """Writes the EMA of a run's checkpoint as target/transformer and target/scheduler; LoRA tensors
    are also written alone."""
    config = config_lib.load_run(run)
    # First, because it raises for models that cannot be exported.
    transformer_json = config_json.transformer_json(config.model)

    transformer = target / 'transformer'
    tensors = _run_tensors(run, config)
    counts = {'transformer': _to_safetensors('transformer', tensors, transformer)}
    if config.lora.rank:
        lora_tree = _open_tree(run / 'ema')
        counts['LoRA'] = lora_files.write_lora(target, config.model, lora_tree, config.lora)
    _write_json(transformer / 'config.json', transformer_json)

    scheduler = target / 'scheduler'
    scheduler.mkdir(exist_ok=True)
    schedule_json = config_json.schedule_json(config.schedule)
    _write_json(scheduler / 'scheduler_config.json', schedule_json)
    return counts


def _convert_network(kind: str, source: pathlib.Path, target: pathlib.Path) -> int:
    """Writes one network in the other format; returns the number of parameters."""
    target.mkdir(parents=True)
    if not (source / 'params').is_dir():
        return _to_orbax(kind, source, target)

    network_config = config_json.read_config(kind, source)
    tensors = _orbax_tensors(kind, network_config, source / 'params')
    num_parameters = _to_safetensors(kind, tensors, target)
    shutil.copyfile(source / 'config.json', target / 'config.json')
    return num_parameters


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file or a folder; unlike shutil.copytree, it makes new ones with new ones' modes."""
    if source.is_file():
        shutil.copyfile(source, target)
        return
    target.mkdir()
    for path in source.iterdir():
        _copy(path, target / path.name)


def convert_folder(source, target) -> dict[str, int]:
    """Converts a model folder to Orbax, a converted one back, or exports a training run.

    Args:
      source: folder with transformer/, vae/, text_encoder/ (any of them), or a workdir or
        checkpoint of mask2dit_jax.main.
      target: new folder.

    Returns:
      The number of parameters by network, and that of the LoRA of a run that has one.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    paths.check_local(source=source, target=target)
    source = pathlib.Path(source)
    target = pathlib.Path(target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f'{target} is not empty: give --to a new folder.')

    if source.absolute().parent.name == checkpoint.FOLDER:
        return _export_run(runs.good_checkpoint(source), target)
    kinds = [kind for kind in names_lib.NETWORKS if (source / kind / 'config.json').is_file()]
    if not kinds:
        if not checkpoint.folders(source):
            networks = ', '.join(f'{kind}/' for kind in names_lib.NETWORKS)
            raise FileNotFoundError(f'{source} holds neither {networks} nor checkpoints.')
        return _export_run(runs.good_checkpoint(source), target)

    counts = {}
    for kind in kinds:
        counts[kind] = _convert_network(kind, source / kind, target / kind)

    for name in _COPIED:
        if (source / name).exists():
            _copy(source / name, target / name)
    return counts
