"""How fast checkpoints are saved and restored."""

import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mask2dit_jax import checkpoint
from mask2dit_jax.training import train_step

_SIDE = 4096
_ARRAY_BYTES = 4 * _SIDE**2  # 64 MiB in float32


def _random_state(arrays: int) -> train_step.TrainState:
    """Parameters, EMA and two moments, each a tree of `arrays` arrays."""
    trees = []
    for i in range(4):
        keys = [jax.random.key(arrays * i + j) for j in range(arrays)]
        trees.append({str(j): jax.random.normal(key, (_SIDE, _SIDE)) for j, key in enumerate(keys)})
    params, ema, *moments = trees
    return train_step.TrainState(jnp.int32(0), params, ema, moments)


def bench_checkpoint(gb: float, runs: int, folder) -> list[dict]:
    """Measures saving and restoring a state of random values by the trainer's functions.

    Args:
      gb: size of the state in 10^9 bytes, rounded to whole arrays of 64 MiB, at least four.
      runs: timed runs, after a first one that is not counted.
      folder: where the checkpoints are written; None for the system's temporary folder.

    Returns:
      Rows for the time that the training loop waits for a save, for the whole save, and for a
      restore.
    """
    arrays = max(1, round(gb * 1e9 / (4 * _ARRAY_BYTES)))
    gb = 4 * arrays * _ARRAY_BYTES / 1e9
    state = _random_state(arrays)

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    targets = {
        item: jax.tree.map(abstract, getattr(state, field))
        for item, field in checkpoint.ITEMS.items()
    }

    seconds = {'save: the loop waits': [], 'save: all': [], 'restore': []}
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        manager = checkpoint.manager(workdir, keep=1, keep_every=0, start=0)
        for run in tqdm.trange(runs + 1, desc='checkpoint', unit='run'):
            start = time.perf_counter()
            checkpoint.save(manager, run, state, {})
            loop_continues = time.perf_counter()
            manager.wait_until_finished()
            written = time.perf_counter()
            jax.block_until_ready(checkpoint.latest(workdir, targets)[1])
            restored = time.perf_counter()

            if run > 0:
                seconds['save: the loop waits'].append(loop_continues - start)
                seconds['save: all'].append(written - start)
                seconds['restore'].append(restored - written)
        checkpoint.finish(manager)

    rows = []
    for what, values in seconds.items():
        rows.append(
            {
                'what': what,
                'GB': gb,
                's/GB': float(np.median(values)) / gb,
                'spread s/GB': f'{min(values) / gb:.3g}...{max(values) / gb:.3g}',
            }
        )
    return rows
