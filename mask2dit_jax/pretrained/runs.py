"""The parameters of a run: the EMA in its checkpoints, and the base that it starts from.

Checkpoints of a run with LoRA hold the LoRA tensors alone. The whole model is made of them and of
the base, which is read again from the folder that config.init_from names.
"""

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
    """The target of a checkpoint's EMA, given that of the whole model's parameters."""
    if not config.lora.rank:
        return {'ema': target}
    lora_tree = jax.eval_shape(lambda: lora.init(jax.random.key(0), target, config.lora))
    return {'ema': partitioning.abstract_arrays(lora_tree, mesh_lib.mesh_of(target))}


def _whole_model(config: config_lib.Config, ema, target):
    """The whole model's parameters, given a checkpoint's EMA."""
    if not config.lora.rank:
        return ema
    return lora.merge_placed(load_base(config, target), ema, config.lora)


def restore(path, config: config_lib.Config, target):
    """Reads the whole model's EMA parameters of one checkpoint; LoRA is merged into its base.

    Args:
      path: the checkpoint folder (WORKDIR/checkpoints/STEP).
      config: the run's configuration.
      target: ShapeDtypeStructs of the model's parameters, with shardings.

    Returns:
      The parameters, laid out like `target`.

    Raises:
      FileNotFoundError, ValueError: as checkpoint.restore.
    """
    items = checkpoint.restore(path, _ema_target(config, target))
    return _whole_model(config, items['ema'], target)


def newest(workdir, config: config_lib.Config, target):
    """As `restore`, of the newest good checkpoint of a workdir.

    Returns:
      (folder of the checkpoint, parameters).

    Raises:
      FileNotFoundError, ValueError: as checkpoint.latest.
    """
    path, items = checkpoint.latest(workdir, _ema_target(config, target))
    return path, _whole_model(config, items['ema'], target)


def good_checkpoint(folder) -> pathlib.Path:
    """The checkpoint that a folder of a run stands for, whose EMA is whole by its checksum.

    Whoever reads a run's checkpoint follows this rule: one that is named must be good; of a workdir
    it is the newest good one, and damaged ones are passed over with a warning. `restore` and
    `newest` follow it while they read.

    Args:
      folder: a workdir, or one checkpoint in it.

    Returns:
      The checkpoint's folder.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if the checkpoint, or every checkpoint of the workdir, is damaged.
    """
    folder = pathlib.Path(folder)
    if folder.absolute().parent.name == checkpoint.FOLDER:
        checkpoint.verify(folder)
        return folder
    path, _ = checkpoint.newest_good(folder, checkpoint.verify)
    return path


def load_base(config: config_lib.Config, target):
    """Reads the parameters that config.init_from names.

    Args:
      config: the run's configuration; init_from is a model folder, or the workdir or a checkpoint
        of another run, whose EMA is taken.
      target: ShapeDtypeStructs of the model's parameters, with shardings.

    Returns:
      The parameters, laid out like `target`.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    folder = pathlib.Path(config.init_from)
    transformer = folder / 'transformer'
    if transformer.is_dir():
        logging.info('Parameters from %s.', transformer)
        return load_lib.read_params('transformer', transformer, config.model, target)

    base_config = config_lib.load_run(folder)
    if folder.parent.name == checkpoint.FOLDER:
        path = folder
        params = restore(folder, base_config, target)
    else:
        path, params = newest(folder, base_config, target)
    logging.info('Parameters from the EMA of %s.', path)
    return params


def base_checksum(params) -> int:
    """What tells the parameters that a run starts from from others, wherever they lie."""
    return checkpoint.checksums({'base': params})['base']


def pinned_base(workdir) -> str:
    """init_from in the configuration of a run that goes on; empty for a new run, or if the file
    cannot tell."""
    if not checkpoint.folders(workdir):
        return ''
    try:
        return config_lib.load_run(workdir).init_from
    except (FileNotFoundError, ValueError) as error:
        logging.warning('%s', error)
        return ''


def resolve_base_checkpoint(config: config_lib.Config, pinned: str = '') -> config_lib.Config:
    """Makes init_from of a run with LoRA name one checkpoint instead of a workdir.

    The base is read again whenever the run is resumed or sampled. A workdir would then mean its
    newest good checkpoint, which may be another one by that time.

    Args:
      config: the run's configuration.
      pinned: of `pinned_base`. If it is a checkpoint, the one of this step is taken of a workdir,
        which may have moved.

    Returns:
      `config` with the checkpoint in init_from; unchanged without LoRA.

    Raises:
      ValueError: if init_from is empty, or all its checkpoints are damaged.
      FileNotFoundError: if there is nothing at init_from.
    """
    if not config.lora.rank:
        return config
    if not config.init_from:
        raise ValueError(
            f'config.lora.rank is {config.lora.rank}, but there is no base: give a workdir by '
            '--config.init_from or a model folder by --checkpoint.'
        )

    folder = pathlib.Path(config.init_from)
    is_model_folder = (folder / 'transformer').is_dir()
    is_checkpoint = folder.parent.name == checkpoint.FOLDER
    if not is_model_folder and not is_checkpoint:
        if not checkpoint.folders(folder):
            raise FileNotFoundError(
                f'{folder}, the base of LoRA, holds no checkpoint: train it first, or give another '
                'by --config.init_from.'
            )
        if pathlib.Path(pinned).parent.name == checkpoint.FOLDER:
            folder = checkpoint.folders(folder)[-1].with_name(pathlib.Path(pinned).name)
        else:
            folder = good_checkpoint(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f'{folder}, the base of LoRA, does not exist: '
            + ('put it back, or say where it is' if pinned else 'give another one')
            + ' by --config.init_from.'
        )
    return dataclasses.replace(config, init_from=str(folder))
