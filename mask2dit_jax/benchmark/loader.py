"""How fast training data is read."""

import pathlib
import tempfile
import time
import types

import ml_dtypes
import numpy as np
import safetensors.numpy
import tqdm

from mask2dit_jax import config as config_lib
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import latent_codec, manifest, records


def write_random_clips(folder: pathlib.Path, count: int) -> config_lib.Config:
    """A data set of stories of three clips with the shapes of 49 frames at 480x720 and
    CogVideoX-5B's text, and a configuration to train on it."""
    (folder / 'vae').mkdir(parents=True)
    (folder / 'vae/config.json').write_text('{}')
    config = config_lib.Config(
        data=config_lib.DataConfig(
            encoded=str(folder / 'data'),
            codec='vae',
            layouts=((49,) * 3,),
            height_px=480,
            width_px=720,
        )
    )
    latent_frames, (h, w, channels) = latent_codec.latent_shape(config, (49,))
    m, rng = config.model, np.random.default_rng(0)
    settings = {
        'kind': manifest.MULTI_SCENE,
        'store': 'moments',
        'parts': 1,
        'moments_shape': [h, w, 2 * channels],
        'text_shape': [m.max_text_seq_length, m.text_embed_dim],
        'scaling_factor': 0.7,
        'folder': str(folder),
        'vae': latent_codec.network_digest(folder / 'vae'),
    }
    records.write_settings(folder / 'data', settings)

    def random(*shape):
        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    safetensors.numpy.save_file(
        {'text': random(*settings['text_shape'])}, folder / 'data/null_text.safetensors'
    )
    examples = (
        {
            'story': i // 3,
            'scene': i % 3,
            'frames': 49,
            'caption': '',
            'path': '',
            'moments': random(*latent_frames, h, w, 2 * channels),
            'text': random(*settings['text_shape']),
        }
        for i in tqdm.trange(count, desc='writing', unit='clip')
    )
    records.write_part(folder / 'data', settings, 0, examples, [])
    records.write_info(folder / 'data', settings)
    return config


def bench_loader(runs: int, folder) -> list[dict]:
    """One row: what a thread of the trainer reads."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        config = write_random_clips(pathlib.Path(work), 48)
        _, shape = latent_codec.latent_shape(config, (49,))
        batches, speeds = (
            batches_lib.train_batches(config, work, types.SimpleNamespace(latent_shape=shape)),
            [],
        )
        for step in tqdm.trange(runs + 1, desc='loader', unit='batch'):
            start = time.perf_counter()
            _, batch = batches(step, range(8))
            speeds.append(
                batch['text'].shape[0] * batch['text'].shape[1] / (time.perf_counter() - start)
            )
        stored = 2 * (
            2 * batch['latents'].size + batch['text'].size
        )  # bytes: mean and log-variance, and text
    speed = float(np.median(speeds[1:]))
    return [
        {
            'scenes/s': speed,
            'spread scenes/s': f'{min(speeds[1:]):.3g}...{max(speeds[1:]):.3g}',
            'MB/s': speed * stored / batch['text'].shape[0] / batch['text'].shape[1] / 1e6,
        }
    ]
