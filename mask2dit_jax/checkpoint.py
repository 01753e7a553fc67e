"""Checkpoints with Orbax: params, ema, opt and meta as separate items, so that sampling restores only what it needs."""
import pathlib

import orbax.checkpoint as ocp
from absl import logging

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
    """The state of a step, laid out like `target` (ShapeDtypeStructs with shardings).

    Raises:
      ValueError: if the checkpoint was written with other `meta` (data, seed): resuming would not continue that run.
    """
    items = {name: ocp.args.StandardRestore(getattr(target, name)) for name in ('params', 'ema', 'opt')}
    restored = checkpoints.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **items))
    changed = sorted(k for k in meta if restored.meta.get(k) != meta[k])
    if changed:
        raise ValueError(f'{checkpoints.directory} was trained with another {", ".join(changed)}: use the same '
                         'configuration to resume it, or another --workdir.')
    logging.info('Resuming %s at step %d.', checkpoints.directory, step)
    return TrainState(step=target.step, params=restored.params, ema=restored.ema, opt=restored.opt)


def restore_ema(path, target):
    """The EMA parameters of one checkpoint folder (WORKDIR/checkpoints/STEP), laid out like `target`.

    Raises:
      FileNotFoundError: if that is no checkpoint.
    """
    path = pathlib.Path(path).absolute() / 'ema'
    if not path.is_dir():
        raise FileNotFoundError(f'{path.parent} is no checkpoint: give a folder like WORKDIR/{FOLDER}/1000.')
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


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
