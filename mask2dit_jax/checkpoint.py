"""Checkpoints of a training run, written by Orbax and protected by checksums.

The folder of a run holds one folder for each checkpoint, named by the step:

    WORKDIR/checkpoints/
      1000/
        params/           what is trained: the model's parameters, or LoRA tensors
        ema/              their moving average, which is all that sampling reads
        opt/              the optimizer's state
        meta/metadata     JSON: what the run is (data, seed, ...), and under 'checksums' one number
                          for each of the items params, ema and opt
      2000.damaged/       a checkpoint that could not be read, set aside by `manager`
      3000.orbax-checkpoint-tmp/
                          what a killed run was saving; `manager` deletes it

ITEMS says which field of train_step.TrainState each item holds. Every item can be restored alone.

Damage is noticed in three ways, of which each finds what the ones before do not:

  1. A checkpoint that is not whole is never taken for one, because Orbax writes it to a temporary
     folder and renames the folder when everything is written.
  2. Files that are missing, cut off or garbled make tensorstore raise an error.
  3. Changed bytes inside compressed array data raise no error when they are read. Therefore `save`
     computes a checksum of the arrays on the devices, and `restore` computes it again and compares
     the two. The checksum is the same on every mesh.

`restore` then raises a DamagedError, `latest` takes the checkpoint before with a warning, and
`manager` renames the damaged folder, so that its step can be saved again.

An error that says nothing about the files (too many open files, no memory, a server that does not
answer) is no damage: reading is tried again a few times, and then the error is raised.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from flax import traverse_util

from mask2dit_jax import tensor_io
from mask2dit_jax.distributed import multihost

FOLDER = 'checkpoints'
# The folder of an item: the field of train_step.TrainState that it holds.
ITEMS = {
    'params': 'params',
    'ema': 'ema',
    'opt': 'opt_state',
}


# Waits before the other tries to read a checkpoint.
RETRY_SECONDS = (1, 5, 20)


class OtherRunError(ValueError):
    """The checkpoint is whole, but belongs to another run."""


class DamagedError(ValueError):
    """The checkpoint's files are not what was written."""


def folders(workdir) -> list[pathlib.Path]:
    """Lists the finished checkpoints of a workdir, good or damaged.

    Args:
      workdir: the folder of a run.

    Returns:
      Their folders, the newest last.
    """
    paths = (pathlib.Path(workdir).absolute() / FOLDER).glob('*')
    finished = [path for path in paths if path.name.isdigit()]
    return sorted(finished, key=lambda path: int(path.name))


# Saving.


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never, because distributed/multihost.py is what notices preemption.

        Orbax asks JAX about past steps, from the thread that saves, and JAX would take such a step
        for the one that the process has come to.
        """
        return False


def _set_aside(path: pathlib.Path, keep: int) -> None:
    """Renames a checkpoint to STEP.damaged, or to the next free STEP.damaged1, ...

    Of all that were set aside only the `keep` of the latest steps stay.
    """
    for number in itertools.count():
        aside = path.with_name(f'{path.name}.damaged{number or ""}')
        if not aside.exists():
            break
    path.rename(aside)
    logging.warning(
        '%s is now %s: delete it once you have looked at it. The newest %d of such folders stay.',
        path,
        aside.name,
        keep,
    )

    places = {}
    for folder in path.parent.iterdir():
        if found := re.fullmatch(r'(\d+)\.damaged(\d*)', folder.name):
            places[folder] = int(found[1]), int(found[2] or 0)
    for old in sorted(places, key=places.get)[:-keep]:
        shutil.rmtree(old)
        logging.warning('%s is deleted.', old)


def manager(workdir, keep: int, keep_every: int, start: int) -> ocp.CheckpointManager:
    """Makes what saves the checkpoints of a run that continues at a step.

    What a killed run was saving is deleted. Folders of later steps, which `latest` has found
    damaged, are renamed to STEP.damaged, so that these steps can be saved again. The caller decides
    when to `save`, and calls `finish` at the end.

    Args:
      workdir: the folder of the run.
      keep: how many of the newest checkpoints are kept, and how many of the damaged ones.
      keep_every: checkpoints of steps that are multiples of it are kept, too; 0 for none.
      start: the step that was restored, or 0.

    Returns:
      Orbax's manager, for `save`, `check` and `finish`.
    """
    if jax.process_index() == 0:
        for path in folders(workdir):
            if int(path.name) > start:
                _set_aside(path, keep)

    policies = ocp.checkpoint_managers
    kept = [policies.LatestN(keep)]
    if keep_every:
        kept.append(policies.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        create=True,
        cleanup_tmp_directories=True,
    )
    return _Manager(pathlib.Path(workdir).absolute() / FOLDER, options=options)


@jax.jit  # so that it is traced once for each shape, not for each array
def _array_checksum(x):
    """The checksum of one array, a uint32; see `_item_checksums`."""
    bits_dtype = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
    bits = jax.lax.bitcast_convert_type(x, bits_dtype).astype(jnp.uint32)

    # The number of each element in the flattened array.
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


@jax.jit
def _item_checksums(items: dict) -> dict:
    """The checksum of each item: the sum of its bits times odd numbers that differ by place.

    It is taken modulo 2^32. Any single bit that changes alters it, because an odd number times a
    power of two is not 0 modulo 2^32. A sum of integers does not depend on the order of its terms,
    and hence not on the mesh.
    """
    totals = {}
    for name, tree in items.items():
        leaves = jax.tree.leaves(tree)
        totals[name] = sum((2 * i + 1) * _array_checksum(x) for i, x in enumerate(leaves))
    return totals


def checksums(items: dict) -> dict[str, int]:
    """Computes the checksum of each item on the devices.

    Args:
      items: trees of arrays by name.

    Returns:
      Numbers below 2^32 by name.
    """
    on_host = jax.device_get(_item_checksums(items))
    return {name: int(value) for name, value in on_host.items()}


def _brief(error: Exception) -> str:
    """The cause of an error in one short line; tensorstore's messages have many."""
    while type(error) is Exception and error.__cause__ is not None:  # Orbax's; it names no cause
        error = error.__cause__
    text = ' '.join(f'{type(error).__name__}: {error}'.split())
    if found := re.search(r"os_error_code='(\d+)'", text):  # tensorstore's; the first is the cause
        return os.strerror(int(found[1]))
    return text if len(text) <= 300 else text[:300] + '...'


@contextlib.contextmanager
def _saving(checkpoints: ocp.CheckpointManager):
    """Turns any error of saving into one RuntimeError that says what to do."""
    try:
        yield
    except Exception as error:  # Orbax and tensorstore raise many kinds
        raise RuntimeError(
            f'Saving to {checkpoints.directory} failed ({_brief(error)}): the checkpoints there '
            'before are whole; make room or mend the disk, and the same command resumes.'
        ) from error


def save(checkpoints: ocp.CheckpointManager, step: int, state, meta: dict) -> None:
    """Starts saving in the background; the arrays are copied before it returns.

    Args:
      checkpoints: see `manager`.
      step: the checkpoint's name.
      state: the train_step.TrainState, whose ITEMS are saved.
      meta: what the run is, as JSON values; `restore` can ask for the same.

    Raises:
      RuntimeError: if the state cannot be written, or if writing the one before failed.
    """
    items = {item: getattr(state, field) for item, field in ITEMS.items()}
    meta = meta | {'checksums': checksums(items)}
    save_args = {'meta': ocp.args.JsonSave(meta)}
    save_args |= {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    with _saving(checkpoints):
        if not checkpoints.save(step, args=ocp.args.Composite(**save_args)):
            raise ValueError(f'step {step} was refused')


def check(checkpoints: ocp.CheckpointManager) -> None:
    """Raises what went wrong in the background, as `save` does."""
    with _saving(checkpoints):
        checkpoints.check_for_errors()


def finish(checkpoints: ocp.CheckpointManager) -> None:
    """Waits for the last save; raises as `save` does."""
    with _saving(checkpoints):
        checkpoints.wait_until_finished()
        checkpoints.close()


# Restoring.


def read_meta(path) -> dict:
    """What `save` was told about the run, and the checksums.

    Args:
      path: the checkpoint's folder.

    Raises:
      OSError, ValueError: if the file cannot be read, or does not hold this.
    """
    saved = ocp.JsonCheckpointHandler().restore(pathlib.Path(path).absolute() / 'meta')
    if not isinstance(saved, dict) or not isinstance(saved.get('checksums'), dict):
        raise ValueError('meta is not what was saved')
    return saved


# Keys of metadata that earlier versions wrote, and what they are called now.
_RENAMED_KEYS = {
    'optimizer': 'optimizer.name',
    'batch_size': 'train.batch_size',
    'caption_style': 'data.caption_style',
}


def flat(tree: dict, prefix: str = '') -> dict:
    """A nested dict as one whose keys are paths, such as 'schedule.beta_start'."""
    values = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            values |= flat(value, f'{prefix}{key}.')
        else:
            values[prefix + key] = value
    return values


def _check_same_run(path: pathlib.Path, saved: dict, meta: dict) -> None:
    """Raises an OtherRunError for values that differ; an old checkpoint may lack some of them."""
    before = {_RENAMED_KEYS.get(key, key): value for key, value in flat(saved).items()}
    now = json.loads(json.dumps(flat(meta)))  # tuples become lists, as in the file

    # Earlier versions wrote where the base was, not what it was.
    if before.get('init_from') and isinstance(before['init_from'], str):
        del before['init_from']

    changed = []
    for key in sorted(now.keys() & before.keys()):
        if before[key] != now[key]:
            changed.append(f'{key} ({str(before[key])[:40]}, now {str(now[key])[:40]})')
    if changed:
        raise OtherRunError(
            f'{path.parent} was trained with another {", ".join(changed)}: use the same '
            'configuration to resume it, or another --workdir.'
        )


def _read(path: pathlib.Path, targets: dict, meta: dict) -> tuple[dict, dict]:
    """Items of one checkpoint, and the checksums that they had when they were saved.

    Orbax's handlers are used without its Checkpointer, in which processes wait for each other: one
    that cannot read the files would leave the others waiting.
    """
    saved = read_meta(path)
    if not targets.keys() <= saved['checksums'].keys():
        raise ValueError(
            f'meta lacks checksums of {", ".join(targets.keys() - saved["checksums"])}'
        )
    _check_same_run(path, saved, meta)

    # Without the optimizer's state, whose tree has lists and which open_orbax cannot name.
    problems = []
    for name, target in targets.items():
        if name != 'opt':
            problems += tensor_io.misshapen(path / name, target)
    if problems:
        raise OtherRunError(f'{path} does not fit the configuration: {"; ".join(problems)}.')

    reader = ocp.StandardCheckpointHandler()
    items = {}
    for name, target in targets.items():
        items[name] = reader.restore(path / name, args=ocp.args.StandardRestore(target))
    return items, saved['checksums']


def _patiently(path: pathlib.Path, read: Callable):
    """Reads a checkpoint, and tries again after errors that are no damage.

    Args:
      path: the checkpoint's folder.
      read: function of the folder.

    Returns:
      What `read` returns.

    Raises:
      DamagedError: with the reason alone.
      OtherRunError: of `read`.
      RuntimeError: if it still fails, for a reason that is no damage.
    """
    waits = list(RETRY_SECONDS)
    while True:
        try:
            return read(path)
        except OtherRunError:
            raise
        except Exception as error:  # Orbax and tensorstore raise many kinds, also Exception itself
            reason = _brief(error)
            if tensor_io.is_damage(error):
                raise DamagedError(reason) from error
            if not waits:
                raise RuntimeError(
                    f'{path} cannot be read ({reason}). This is no damage, and nothing was '
                    'changed: once the cause is mended, the same command goes on.'
                ) from error

        # Here the error, which may hold arrays, is gone.
        logging.warning('%s cannot be read (%s): again in %d s.', path, reason, waits[0])
        time.sleep(waits.pop(0))


def restore(path, targets: dict, meta: dict | None = None) -> dict:
    """Reads items of one checkpoint and compares their checksums.

    Args:
      path: the checkpoint's folder (WORKDIR/checkpoints/STEP).
      targets: for each item to read, a name of ITEMS, its tree of ShapeDtypeStructs with shardings.
      meta: values that the checkpoint must have been written with (data, seed), as of `save`; those
        that it does not know are not compared.

    Returns:
      Trees of arrays by item, laid out like the targets.

    Raises:
      FileNotFoundError: if there is no such folder.
      OtherRunError: if it was written with another `meta`, or has arrays of other shapes: resuming
        would not continue that run.
      DamagedError: if it is damaged. Where several processes read it, all of them raise.
      RuntimeError: if it cannot be read for another reason, after some more tries.
    """
    path = pathlib.Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(
            f'{path} is not a checkpoint: give a folder like WORKDIR/{FOLDER}/1000.'
        )

    items = None
    reason = 'another process cannot read it'
    try:
        items, saved_checksums = _patiently(path, lambda path: _read(path, targets, meta or {}))
    except DamagedError as error:
        reason = str(error)

    # The checksums are computed by all processes together, or by none.
    if multihost.all_agree(items is not None):
        found = checksums(items)
        wrong = [name for name in items if found[name] != saved_checksums[name]]
        if not wrong:
            return items
        reason = f'checksum of {", ".join(wrong)}'
    raise DamagedError(f'{path} is damaged ({reason}).')


def verify(path, item: str = 'ema') -> None:
    """Compares the checksum of an item with that in the checkpoint, without a device.

    It holds one chunk of one array at a time, for readers of models that fit in no memory.

    Args:
      path: the checkpoint's folder (WORKDIR/checkpoints/STEP).
      item: 'params' or 'ema'.

    Raises:
      FileNotFoundError: if there is no such folder.
      DamagedError: if it is damaged.
      RuntimeError: see `restore`.
    """
    path = pathlib.Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(
            f'{path} is not a checkpoint: give a folder like WORKDIR/{FOLDER}/1000.'
        )

    try:
        saved, found = _patiently(path, lambda path: _saved_and_stored(path, item))
    except DamagedError as error:
        raise DamagedError(f'{path} is damaged ({error}).') from error
    if found != saved:
        raise DamagedError(f'{path} is damaged (checksum of {item}).')


def _saved_and_stored(path: pathlib.Path, item: str) -> tuple[int, int]:
    """The checksum of an item when it was saved, and that of the item's files."""
    saved = read_meta(path)['checksums'][item]
    # The order of the arrays is that of jax.tree.leaves.
    stores = traverse_util.unflatten_dict(tensor_io.open_orbax(path / item))
    total = 0
    for i, store in enumerate(jax.tree.leaves(stores)):
        total += (2 * i + 1) * _stored_checksum(store)
    return saved, total % 2**32


def _stored_checksum(store: ts.TensorStore) -> int:
    """As `_array_checksum`, of an array in a file."""
    chunk_shape = store.chunk_layout.read_chunk.shape or ()
    starts = [range(0, size, step) for size, step in zip(store.shape, chunk_shape)]

    total = 0
    for corner in itertools.product(*starts):
        slices = tuple(
            slice(a, min(a + b, size)) for a, b, size in zip(corner, chunk_shape, store.shape)
        )
        block = np.ascontiguousarray(store[slices].read().result())
        bits = block.view(f'uint{8 * block.itemsize}').astype(np.uint32)

        # The number of each element in the flattened array, modulo 2^32.
        place = np.zeros(block.shape, np.uint32)
        for axis, (part, size) in enumerate(zip(slices, store.shape)):
            index = np.arange(part.start, part.stop, dtype=np.uint32)
            place = place * np.uint32(size) + index.reshape(-1, *[1] * (block.ndim - axis - 1))
        total += int(np.sum(bits * (2 * place + np.uint32(1)), dtype=np.uint32))
    return total


def latest(workdir, targets: dict, meta: dict | None = None) -> tuple[pathlib.Path, dict]:
    """Reads the newest good checkpoint of a workdir; damaged ones are skipped with a warning.

    Args:
      workdir: the folder of a run.
      targets: see `restore`.
      meta: see `restore`.

    Returns:
      (folder of the checkpoint, items as of `restore`).

    Raises:
      FileNotFoundError: if there is no checkpoint.
      OtherRunError: see `restore`.
      DamagedError: if all are damaged.
      RuntimeError: see `restore`.
    """
    return newest_good(workdir, lambda path: restore(path, targets, meta))


def newest_good(workdir, read: Callable[[pathlib.Path], Any]) -> tuple[pathlib.Path, Any]:
    """Finds the newest checkpoint of a workdir that can be read; others give a warning.

    Args:
      workdir: the folder of a run.
      read: function of a checkpoint's folder that raises a DamagedError if it is damaged, such as
        `restore` or `verify` with their other arguments.

    Returns:
      (folder of the checkpoint, what `read` returns for it).

    Raises:
      FileNotFoundError, OtherRunError, DamagedError, RuntimeError: as `latest`.
    """
    found = folders(workdir)
    if not found:
        raise FileNotFoundError(
            f'{pathlib.Path(workdir) / FOLDER} holds no checkpoint: train first with '
            f'mask2dit_jax.main --workdir={workdir}.'
        )

    for path in reversed(found):
        try:
            return path, read(path)
        except DamagedError as error:
            logging.warning('%s It is skipped.', error)

    names = ', '.join(path.name for path in found)
    raise DamagedError(
        f'All checkpoints of {workdir} are damaged ({names}): put back a copy of one, or delete '
        f'{found[0].parent} to train from the start.'
    )
