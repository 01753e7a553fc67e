"""The parameters of a run: its EMA, and what a run starts from. Of LoRA runs only LoRA tensors are
in checkpoints; the base is read from where init_from says."""

import dataclasses
import pathlib

import jax
from absl import logging

from mask2dit_jax import checkpoint
from mask2dit_jax import config as config_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.models import lora
from mask2dit_jax.pretrained import load as load_lib


def _ema_target(config: config_lib.Config, target):
    """What a checkpoint's EMA is laid out like, given the whole model's parameters."""
    if not config.lora.rank:
        return {'ema': target}
    tree = jax.eval_shape(lambda: lora.init(jax.random.key(0), target, config.lora))
    return {'ema': partitioning.abstract_arrays(tree, mesh_lib.mesh_of(target))}


def _whole(config: config_lib.Config, ema, target):
    return (
        lora.merge_placed(load_base(config, target), ema, config.lora) if config.lora.rank else ema
    )


def restore(path, config: config_lib.Config, target):
    """The whole model's EMA parameters of one checkpoint; LoRA merged into its base.

    Args:
      path: the checkpoint folder (WORKDIR/checkpoints/STEP).
      config: the run's.
      target: ShapeDtypeStructs of the model's parameters, with shardings.

    Raises:
      FileNotFoundError, ValueError: as checkpoint.restore.
    """
    return _whole(config, checkpoint.restore(path, _ema_target(config, target))['ema'], target)


def newest(workdir, config: config_lib.Config, target):
    """As `restore`, of the newest good checkpoint of a workdir: (folder, parameters)."""
    path, items = checkpoint.latest(workdir, _ema_target(config, target))
    return path, _whole(config, items['ema'], target)


def load_base(config: config_lib.Config, target):
    """The parameters that config.init_from names, laid out like `target`.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    folder = pathlib.Path(config.init_from)
    if (folder / 'transformer').is_dir():
        logging.info('Parameters from %s.', folder / 'transformer')
        return load_lib.read_params('transformer', folder / 'transformer', config.model, target)
    run = config_lib.load_run(folder)
    if folder.parent.name == checkpoint.FOLDER:
        path, params = folder, restore(folder, run, target)
    else:
        path, params = newest(folder, run, target)
    logging.info('Parameters from the EMA of %s.', path)
    return params


def resolve_base_checkpoint(config: config_lib.Config) -> config_lib.Config:
    """`config` with the very checkpoint in init_from that a run with LoRA starts from: it will be
    read again and again.

    Raises:
      ValueError, FileNotFoundError: if init_from is empty or there is nothing.
    """
    if not config.lora.rank:
        return config
    if not config.init_from:
        raise ValueError(
            f'config.lora.rank is {config.lora.rank}, but there is no base: give a workdir by '
            '--config.init_from or a model folder by --checkpoint.'
        )
    folder = pathlib.Path(config.init_from)
    if not (folder / 'transformer').is_dir() and folder.parent.name != checkpoint.FOLDER:
        found = checkpoint.folders(folder)
        if not found:
            raise FileNotFoundError(
                f'{folder}, the base of LoRA, holds no checkpoint: train it first, or give another '
                'by --config.init_from.'
            )
        folder = found[-1]
    if not folder.is_dir():
        raise FileNotFoundError(
            f'{folder}, the base of LoRA, does not exist: give another one by --config.init_from.'
        )
    return dataclasses.replace(config, init_from=str(folder))
