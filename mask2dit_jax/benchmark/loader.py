"""How fast training data is read."""

import pathlib
import tempfile
import time
import types

import ml_dtypes
import numpy as np
import tqdm

from mask2dit_jax import config as config_lib
from mask2dit_jax import tensor_io
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import latent_codec, manifest, records

FRAMES = 49  # pixel frames of a clip
SCENES = 3  # clips of a story
BATCH_SIZE = 8  # stories
CLIPS = 48


def begin_data_set(folder: pathlib.Path, parts: int) -> tuple[config_lib.Config, dict]:
    """Begins a data set of clips that have the size of CogVideoX-5B's, 49 frames at 480x720.

    Args:
      folder: the data set becomes the folder `data` in it.
      parts: number of its parts.

    Returns:
      A configuration that trains on the data set, and the data set's settings.
    """
    # The data set refers to the VAE that encoded it.
    (folder / 'vae').mkdir(parents=True)
    (folder / 'vae/config.json').write_text('{}')

    config = config_lib.Config(
        data=config_lib.DataConfig(
            encoded=str(folder / 'data'),
            codec='vae',
            layouts=((FRAMES,) * SCENES,),
            height_px=480,
            width_px=720,
        )
    )
    _, (height, width, channels) = latent_codec.latent_shape(config, (FRAMES,))
    settings = {
        'kind': manifest.MULTI_SCENE,
        'store': 'moments',
        'parts': parts,
        'moments_shape': [height, width, 2 * channels],
        'text_shape': [config.model.max_text_seq_length, config.model.text_embed_dim],
        'scaling_factor': 0.7,
        'folder': str(folder),
        'vae': latent_codec.network_digest(folder / 'vae'),
    }
    records.write_settings(folder / 'data', settings)
    return config, settings


def write_random_clips(folder: pathlib.Path, count: int) -> config_lib.Config:
    """Writes a data set of random values.

    Clips and captions have the shapes that 49 frames at 480x720 have with CogVideoX-5B.

    Args:
      folder: where to write.
      count: number of clips, three to a story.

    Returns:
      A configuration that trains on the data set.
    """
    config, settings = begin_data_set(folder, 1)
    latent_frames, _ = latent_codec.latent_shape(config, (FRAMES,))
    moments_shape, text_shape = settings['moments_shape'], settings['text_shape']
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    null_text = {'text': random(*text_shape)}
    tensor_io.write_file(folder / 'data/null_text.safetensors', null_text)

    def examples():
        for i in tqdm.trange(count, desc='writing', unit='clip'):
            yield {
                'story': i // SCENES,
                'scene': i % SCENES,
                'frames': FRAMES,
                'caption': '',
                'path': '',
                'moments': random(*latent_frames, *moments_shape),
                'text': random(*text_shape),
            }

    records.write_part(folder / 'data', settings, 0, examples(), [])
    records.write_info(folder / 'data', settings)
    return config


def bench_loader(runs: int, folder) -> list[dict]:
    """Measures how fast one thread reads batches as the trainer does.

    Args:
      runs: timed batches, after a first one that is not counted.
      folder: where the data set is written; None for the system's temporary folder.

    Returns:
      One row.
    """
    scenes = BATCH_SIZE * SCENES
    with tempfile.TemporaryDirectory(dir=folder) as work:
        config = write_random_clips(pathlib.Path(work), CLIPS)
        _, shape = latent_codec.latent_shape(config, (FRAMES,))
        codec = types.SimpleNamespace(latent_shape=shape)
        batches = batches_lib.train_batches(config, work, codec)

        speeds = []
        for step in tqdm.trange(runs + 1, desc='loader', unit='batch'):
            start = time.perf_counter()
            _, batch = batches(step, range(BATCH_SIZE))
            elapsed = time.perf_counter() - start
            if step > 0:
                speeds.append(scenes / elapsed)

    # In bfloat16 stand the latents' mean and log-variance, and the text.
    stored_bytes = 2 * (2 * batch['latents'].size + batch['text'].size)
    speed = float(np.median(speeds))
    return [
        {
            'scenes/s': speed,
            'spread scenes/s': f'{min(speeds):.3g}...{max(speeds):.3g}',
            'MB/s': speed * stored_bytes / scenes / 1e6,
        }
    ]
