"""What many clips cost a host before it reads any: opening their index, and drawing from it."""

import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
import tempfile
import time

import numpy as np

from mask2dit_jax import config as config_lib
from mask2dit_jax import tensor_io
from mask2dit_jax.benchmark import loader, worker
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import encoded_clips, latent_codec, records

_PART_CLIPS = 300  # about 2 GB of clips of 49 frames at 480x720, as encode writes them
_STEPS = 100


def write_index(folder: pathlib.Path, clips: int) -> config_lib.Config:
    """Writes a data set whose records are not there: only their index, and empty files of parts.

    Args:
      folder: where to write.
      clips: number of clips, three to a story.

    Returns:
      A configuration that trains on the data set.
    """
    numbers = np.arange(clips)
    part_lengths = np.bincount(numbers // _PART_CLIPS).tolist()
    config, settings = loader.begin_data_set(folder, len(part_lengths))

    null_text = np.zeros(settings['text_shape'], np.float32)
    tensor_io.write_file(folder / 'data/null_text.safetensors', {'text': null_text})
    for part in range(len(part_lengths)):
        records.part_path(folder / 'data', settings, part).touch()

    rows = np.zeros(clips, records.ROW_DTYPE)
    rows['story'], rows['scene'] = np.divmod(numbers, loader.SCENES)
    rows['frames'] = loader.FRAMES
    records.write_index(folder / 'data', settings, rows, part_lengths)
    return config


def _measure(config: config_lib.Config) -> dict:
    """Seconds and memory of this process, which must be new."""
    base = worker.status_mb('VmRSS')
    (layout,) = config.data.layouts
    _, latent_shape = latent_codec.latent_shape(config, layout)

    start = time.perf_counter()
    encoded = encoded_clips.EncodedClips(config, latent_shape, config.data.encoded)
    opened = time.perf_counter()
    encoded.example = lambda scenes, rng: {'records': scenes}  # nothing is there to be read
    datasets = {layout: encoded.endless(layout)}
    listed = time.perf_counter()

    batches = batches_lib.Batches(
        config.data.layouts, datasets, loader.BATCH_SIZE, encoded.null_text, encoded.fingerprint
    )
    for step in range(_STEPS):
        batches(step, range(loader.BATCH_SIZE))
    drawn = time.perf_counter()
    return {
        'open s': opened - start,
        'list s': listed - opened,
        'ms/batch': 1e3 * (drawn - listed) / _STEPS,
        'MB': worker.status_mb('VmHWM') - base,
    }


def bench_index(clips: int, folder) -> list[dict]:
    """Measures opening an index, listing what examples may begin with, and drawing batches.

    Args:
      clips: number of clips.
      folder: where the index is written; None for the system's temporary folder.

    Returns:
      A row for each way to make stories of clips.
    """
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as work:
        config = write_index(pathlib.Path(work), clips)
        for scenes in config_lib.SCENES:
            data = dataclasses.replace(config.data, scenes=scenes)
            case = dataclasses.replace(config, data=data)
            # A process of its own, whose memory is that of this case alone.
            new_process = multiprocessing.get_context('spawn')
            with concurrent.futures.ProcessPoolExecutor(1, new_process) as pool:
                measured = pool.submit(_measure, case).result()
            rows.append({'clips': clips, 'scenes': scenes} | measured)
    return rows
