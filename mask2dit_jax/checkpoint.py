"""Checkpoints with Orbax: params, ema, opt and meta as separate items, so that sampling restores only what it needs.

Those of a run with LoRA hold LoRA tensors only; the base is read from where the run's init_from says.
"""
import dataclasses
import pathlib

import jax
import orbax.checkpoint as ocp
from absl import logging

from mask2dit_jax import config as config_lib
from mask2dit_jax import convert, lora, sharding, weights
from mask2dit_jax.train_step import TrainState

FOLDER = 'checkpoints'


def manager(workdir, keep: int) -> ocp.CheckpointManager:
    """The checkpoints of a workdir; the newest `keep` stay. The caller decides when to save, and closes it."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(pathlib.Path(workdir).absolute() / FOLDER, options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: TrainState, meta: dict) -> None:
    """Starts saving in the background; the arrays are copied before it returns."""
    arrays = {name: ocp.args.StandardSave(getattr(state, name)) for name in ('params', 'ema', 'opt')}
    checkpoints.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **arrays))


def restore(checkpoints: ocp.CheckpointManager, step: int, target: TrainState, meta: dict) -> TrainState:
    """`target` (ShapeDtypeStructs with shardings) with params, ema and opt of a step.

    Raises:
      ValueError: if the checkpoint was written with other `meta` (data, seed): resuming would not continue that run.
    """
    saved = checkpoints.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    changed = sorted(k for k in meta if saved.get(k) != meta[k])
    if changed:
        raise ValueError(f'{checkpoints.directory} was trained with another {", ".join(changed)}: use the same '
                         'configuration to resume it, or another --workdir.')
    items = {name: ocp.args.StandardRestore(getattr(target, name)) for name in ('params', 'ema', 'opt')}
    restored = checkpoints.restore(step, args=ocp.args.Composite(**items))
    logging.info('Resuming %s at step %d.', checkpoints.directory, step)
    return target.replace(params=restored.params, ema=restored.ema, opt=restored.opt)


def restore_ema(path, target):
    """The EMA parameters of one checkpoint folder (WORKDIR/checkpoints/STEP), laid out like `target`.

    Raises:
      FileNotFoundError: if that is no checkpoint.
      ValueError: naming arrays that are missing, unexpected or of another shape.
    """
    path = pathlib.Path(path).absolute() / 'ema'
    if not path.is_dir():
        raise FileNotFoundError(f'{path.parent} is no checkpoint: give a folder like WORKDIR/{FOLDER}/1000.')
    return weights.restore_orbax(path, target)


def restore_run(path, config: config_lib.Config, target):
    """As `restore_ema`, but always the whole model's parameters: those of a run with LoRA are merged into its base.

    Args:
      path: the checkpoint folder.
      config: the run's.
      target: ShapeDtypeStructs of the model's parameters, with shardings.
    """
    if not config.lora.rank:
        return restore_ema(path, target)
    tree = jax.eval_shape(lambda: lora.init(jax.random.key(0), target, config.lora))
    tree = restore_ema(path, sharding.targets(tree, sharding.mesh_of(target)))
    return lora.merge_placed(load_base(config, target), tree, config.lora)


def load_base(config: config_lib.Config, target):
    """The parameters that config.init_from names, laid out like `target`.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    folder = pathlib.Path(config.init_from)
    if (folder / 'transformer').is_dir():
        logging.info('Parameters from %s.', folder / 'transformer')
        return convert.read_params('transformer', folder / 'transformer', config.model, target)
    path = _checkpoint_of(folder)
    logging.info('Parameters from the EMA of %s.', path)
    return restore_run(path, config_lib.load_run(path), target)


def _checkpoint_of(folder: pathlib.Path) -> pathlib.Path:
    return folder if folder.parent.name == FOLDER else latest(folder)


def pin_base(config: config_lib.Config) -> config_lib.Config:
    """`config` with the very checkpoint in init_from that a run with LoRA starts from: it will be read again and again.

    Raises:
      ValueError, FileNotFoundError: if init_from is empty or there is nothing.
    """
    if not config.lora.rank:
        return config
    if not config.init_from:
        raise ValueError(f'config.lora.rank is {config.lora.rank}, but there is no base: give a workdir by '
                         '--config.init_from or a model folder by --checkpoint.')
    folder = pathlib.Path(config.init_from)
    folder = folder if (folder / 'transformer').is_dir() else _checkpoint_of(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder}, the base of LoRA, does not exist: give another one by --config.init_from.')
    return dataclasses.replace(config, init_from=str(folder))


def latest(workdir) -> pathlib.Path:
    """Folder of the newest finished checkpoint of a workdir.

    Raises:
      FileNotFoundError: if there is none.
    """
    folder = pathlib.Path(workdir) / FOLDER
    steps = sorted((p for p in folder.glob('*') if p.name.isdigit()), key=lambda p: int(p.name))
    if not steps:
        raise FileNotFoundError(f'{folder} holds no checkpoint: train first with mask2dit_jax.main '
                                f'--workdir={workdir}.')
    return steps[-1]
