"""Checkpoints with Orbax: params, ema, opt and meta as separate items, so that sampling restores
only what it needs.

A checkpoint is written to a temporary folder and renamed when it is whole, so that a killed run
leaves none in halves. What happens to it on disk afterwards is noticed when it is read: tensorstore
finds missing, truncated and garbled files, but not changed bytes in compressed array data. Hence
meta holds a checksum of the arrays of each item, computed on the devices before saving and after
restoring; it is the same on every mesh.
"""

import contextlib
import itertools
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from mask2dit_jax import tensor_io
from mask2dit_jax.distributed import multihost

FOLDER = 'checkpoints'
ITEMS = {
    'params': 'params',
    'ema': 'ema',
    'opt': 'opt_state',
}  # folder of an item: field of the state


class OtherRunError(ValueError):
    """The checkpoint is whole, but of another run."""


def folders(workdir) -> list[pathlib.Path]:
    """Folders of the finished checkpoints of a workdir, good or damaged, the newest last."""
    found = (p for p in (pathlib.Path(workdir).absolute() / FOLDER).glob('*') if p.name.isdigit())
    return sorted(found, key=lambda p: int(p.name))


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: Orbax asks for past steps in its saving thread, which JAX would take for where the
        process is."""
        return False


def manager(workdir, keep: int, keep_every: int, start: int) -> ocp.CheckpointManager:
    """What saves the checkpoints of a run that goes on at a step. The caller decides when, and
    calls `finish`.

    What a killed run was saving is deleted. Folders of later steps, which `latest` has found
    damaged, are renamed to STEP.damaged, so that these steps can be saved again.

    Args:
      workdir: the folder.
      keep: how many of the newest stay.
      keep_every: those of steps that this divides stay, too; 0 for none.
      start: the step that was restored, or 0.
    """
    if jax.process_index() == 0:
        for path in folders(workdir):
            if int(path.name) > start:
                names = (f'{path.name}.damaged{n or ""}' for n in itertools.count())
                aside = next(p for p in map(path.with_name, names) if not p.exists())
                path.rename(aside)
                logging.warning('%s is now %s.', path, aside.name)
    policies = ocp.checkpoint_managers
    kept = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        create=True,
        cleanup_tmp_directories=True,
    )
    return _Manager(pathlib.Path(workdir).absolute() / FOLDER, options=options)


@jax.jit  # traced once for each shape, not for each array
def _checksum(x):
    """Of one array, see `_checksums`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}')).astype(
        jnp.uint32
    )
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


@jax.jit
def _checksums(items: dict) -> dict:
    """A uint32 for each item: its arrays' bits times odd numbers that differ by place, summed
    modulo 2^32.

    Any one changed bit changes it. Sums of integers do not depend on their order, hence not on the
    mesh.
    """
    return {
        name: sum((2 * i + 1) * _checksum(x) for i, x in enumerate(jax.tree.leaves(tree)))
        for name, tree in items.items()
    }


def checksums(items: dict) -> dict[str, int]:
    """The checksum of each item (a tree of arrays), by its name."""
    return {name: int(value) for name, value in jax.device_get(_checksums(items)).items()}


@contextlib.contextmanager
def _saving(checkpoints: ocp.CheckpointManager):
    try:
        yield
    except Exception as error:  # Orbax and tensorstore raise many kinds
        raise RuntimeError(
            f'Saving to {checkpoints.directory} failed ({_brief(error)}): the checkpoints there before '
            'are whole; make room or mend the disk, and the same command resumes.'
        ) from error


def _brief(error: Exception) -> str:
    """What happened, of messages that go on with specifications of many lines."""
    text = ' '.join(f'{type(error).__name__}: {error}'.split())
    if found := re.search(r"os_error_code='(\d+)'", text):  # tensorstore's; the first cause
        return os.strerror(int(found[1]))
    return text if len(text) <= 300 else text[:300] + '...'


def save(checkpoints: ocp.CheckpointManager, step: int, state, meta: dict) -> None:
    """Starts saving ITEMS of a train_step.TrainState in the background; the arrays are copied
    before it returns.

    Raises:
      RuntimeError: if this cannot be written, or the one before could not.
    """
    items = {item: getattr(state, field) for item, field in ITEMS.items()}
    meta = meta | {'checksums': checksums(items)}
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    with _saving(checkpoints):
        if not checkpoints.save(
            step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **arrays)
        ):
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


def _read(path: pathlib.Path, targets: dict, meta: dict) -> tuple[dict, dict]:
    """Items of one checkpoint, and the checksums that they should have. Processes do not wait for
    each other here."""
    saved = ocp.JsonCheckpointHandler().restore(path / 'meta')
    changed = sorted(k for k in meta if saved.get(k) != meta[k])
    if changed:
        raise OtherRunError(
            f'{path.parent} was trained with another {", ".join(changed)}: use the same configuration '
            'to resume it, or another --workdir.'
        )
    problems = [
        p
        for name in targets
        if name != 'opt'
        for p in tensor_io.misshapen(path / name, targets[name])
    ]
    if problems:
        raise OtherRunError(f'{path} does not fit the configuration: {"; ".join(problems)}.')
    reader = ocp.StandardCheckpointHandler()
    return {
        name: reader.restore(path / name, args=ocp.args.StandardRestore(target))
        for name, target in targets.items()
    }, saved['checksums']


def restore(path, targets: dict, meta: dict | None = None) -> dict:
    """Items of one checkpoint folder (WORKDIR/checkpoints/STEP).

    Args:
      path: the folder.
      targets: ShapeDtypeStructs with shardings by item, of ITEMS.
      meta: what it must have been written with (data, seed).

    Returns:
      Trees of arrays laid out like the targets.

    Raises:
      FileNotFoundError: if that is no checkpoint.
      OtherRunError: if it was written with other `meta`: resuming would not continue that run.
      ValueError: if it is damaged, with several processes on all of them.
    """
    path = pathlib.Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(
            f'{path} is no checkpoint: give a folder like WORKDIR/{FOLDER}/1000.'
        )
    items, reason = None, 'another process cannot read it'
    try:
        items, expected = _read(path, targets, meta or {})
    except OtherRunError:
        raise
    except (
        Exception
    ) as error:  # Orbax and tensorstore raise many kinds, Exception itself among them
        reason = _brief(error)
    if multihost.all_agree(items is not None):
        found = checksums(items)
        wrong = [name for name in items if found[name] != expected[name]]
        if not wrong:
            return items
        reason = f'checksum of {", ".join(wrong)}'
    raise ValueError(f'{path} is damaged ({reason}).')


def latest(workdir, targets: dict, meta: dict | None = None) -> tuple[pathlib.Path, dict]:
    """The newest good checkpoint of a workdir, as (folder, items); damaged ones are skipped with a
    warning.

    Args:
      workdir: the folder of a run.
      targets, meta: see `restore`.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      OtherRunError: see `restore`.
      ValueError: if all are damaged.
    """
    found = folders(workdir)
    if not found:
        raise FileNotFoundError(
            f'{pathlib.Path(workdir) / FOLDER} holds no checkpoint: train first with '
            f'mask2dit_jax.main --workdir={workdir}.'
        )
    for path in reversed(found):
        try:
            return path, restore(path, targets, meta)
        except OtherRunError:
            raise
        except ValueError as error:
            logging.warning('%s It is skipped.', error)
    raise ValueError(
        f'All checkpoints of {workdir} are damaged ({", ".join(p.name for p in found)}): put back a copy '
        f'of one, or delete {found[0].parent} to train from the start.'
    )
