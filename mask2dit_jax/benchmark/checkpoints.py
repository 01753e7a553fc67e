"""How fast checkpoints are saved and restored."""

import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mask2dit_jax import checkpoint
from mask2dit_jax.training import train_step


def bench_checkpoint(gb: float, runs: int, folder) -> list[dict]:
    """One row for what saving holds up, saving, and restoring; parameters, EMA and two moments of
    equal size."""
    arrays = max(1, round(gb * 1e9 / 4 / 2**26))  # of 64 MiB, in each of the four
    gb = 4 * arrays * 2**26 / 1e9
    trees = [
        {
            str(j): jax.random.normal(jax.random.key(arrays * i + j), (4096, 4096))
            for j in range(arrays)
        }
        for i in range(4)
    ]
    state = train_step.TrainState(jnp.int32(0), trees[0], trees[1], trees[2:])
    targets = {
        item: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            getattr(state, field),
        )
        for item, field in checkpoint.ITEMS.items()
    }
    times = {'save: the loop waits': [], 'save: all': [], 'restore': []}
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        manager = checkpoint.manager(workdir, keep=1, keep_every=0, start=0)
        for run in tqdm.trange(runs + 1, desc='checkpoint', unit='run'):
            marks = [time.perf_counter()]
            checkpoint.save(manager, run, state, {})
            marks.append(time.perf_counter())
            manager.wait_until_finished()
            marks.append(time.perf_counter())
            jax.block_until_ready(checkpoint.latest(workdir, targets)[1])
            marks.append(time.perf_counter())
            for values, (a, b) in zip(times.values(), ((0, 1), (0, 2), (2, 3))):
                values.append((marks[b] - marks[a]) / gb)
        checkpoint.finish(manager)
    return [
        {
            'what': what,
            'GB': gb,
            's/GB': float(np.median(values[1:])),
            'spread s/GB': f'{min(values[1:]):.3g}...{max(values[1:]):.3g}',
        }
        for what, values in times.items()
    ]
