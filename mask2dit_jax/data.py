"""Batches as a pure function of the step, and the coders between captions or pixels and what the model sees."""
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable

import grain
import jax
import numpy as np

from mask2dit_jax import config as config_lib
from mask2dit_jax.datasets import stories


@dataclasses.dataclass(frozen=True)
class Coders:
    """What stands between files and the transformer.

    Attributes:
      encode_text: captions of one story, list of S strings, to float32 [S, M, E]; '' is the unconditional caption.
      encode_video: pixels in [0, 1] or uint8 [..., F, H, W, 3] to latents float32 [..., T, h, w, C].
      decode_video: latents to pixels float32 in [0, 1].
      latent_shape: (h, w, C).
      patch_frames: pixel frames per latent frame.
    """
    encode_text: Callable
    encode_video: Callable
    decode_video: Callable
    latent_shape: tuple[int, int, int]
    patch_frames: int

    def latent_frames(self, frames: tuple[int, ...]) -> tuple[int, ...]:
        """Latent frames per scene.

        Raises:
          ValueError: if a scene's frames are not a positive multiple of patch_frames.
        """
        bad = [f for f in frames if f < 1 or f % self.patch_frames]
        if bad:
            raise ValueError(f'A scene of {bad[0]} frames cannot be coded: use a positive multiple of '
                             f'{self.patch_frames}.')
        return tuple(f // self.patch_frames for f in frames)


def stories_coders(config: config_lib.Config, workdir) -> Coders:
    """The fixed word vectors and linear codec of the stories; the codec is kept in the workdir for good."""
    path, data = pathlib.Path(workdir) / 'codec.safetensors', config.data
    if path.exists():
        codec = stories.load_codec(path)
    else:
        codec = stories.default_codec(data.size_px, data.codec_patch_frames, data.codec_components)
        if jax.process_index() == 0:
            stories.save_codec(path, codec)
    side, channels = data.size_px // codec.patch_px, codec.basis.shape[1]
    if (config.model.in_channels, config.model.out_channels) != (channels, channels):
        raise ValueError(f'config.model.in_channels and out_channels must be {channels}, the channels of the codec.')
    text = functools.partial(stories.embed_captions, tokens=config.model.max_text_seq_length,
                             dim=config.model.text_embed_dim)
    return Coders(text, functools.partial(stories.encode, codec), functools.partial(stories.decode, codec),
                  (side, side, channels), codec.patch_frames)


class EncodedStories:
    """Random access to the latents and text of a split, encoded once and held in memory."""

    def __init__(self, source: stories.StorySource, coders: Coders, caption_style: str):
        examples = [source[i] for i in range(len(source))]
        self._latents = coders.encode_video(np.stack([e['video'] for e in examples]))
        # Captions repeat: each distinct one is encoded once.
        encode = functools.cache(lambda caption: coders.encode_text([caption])[0])
        self._text = [[encode(c) for c in stories.captions(e['story'], caption_style)] for e in examples]

    def __len__(self):
        return len(self._latents)

    def __getitem__(self, index):
        return {'latents': self._latents[index], 'text': np.stack(self._text[index])}


@dataclasses.dataclass(frozen=True)
class Batches:
    """Endless shuffled batches.

    Attributes:
      layouts: frames per scene of each kind of story, in the order in which steps take turns.
      datasets: an endless, shuffled grain data set per distinct layout.
      batch_size: global.
      fingerprint: of the data, to be checked on resuming.
    """
    layouts: tuple[tuple[int, ...], ...]
    datasets: dict[tuple[int, ...], grain.MapDataset]
    batch_size: int
    fingerprint: str

    def __call__(self, step: int):
        """Layout of a step and this process's share of its global batch, in process order."""
        turn, cycle = step % len(self.layouts), step // len(self.layouts)
        layout = self.layouts[turn]
        seen = cycle * self.layouts.count(layout) + self.layouts[:turn].count(layout)
        share = self.batch_size // jax.process_count()
        first = seen * self.batch_size + jax.process_index() * share
        examples = [self.datasets[layout][i] for i in range(first, first + share)]
        return layout, {k: np.stack([e[k] for e in examples]) for k in examples[0]}


def open_stories(config: config_lib.Config, workdir, frames: tuple[int, ...], split: str) -> stories.StorySource:
    """One split of the stories, rendered on first use; process 0 renders, the others wait."""
    data = config.data
    folder = data.dir or os.path.join(os.path.dirname(os.path.abspath(workdir)), 'data')
    opened = functools.partial(stories.load, folder, frames, split, size_px=data.size_px, num_train=data.num_train,
                               num_test=data.num_test)
    if jax.process_count() == 1:
        return opened()
    from jax.experimental import multihost_utils
    if jax.process_index() == 0:
        opened()
    multihost_utils.sync_global_devices('stories')
    return opened()


def train_batches(config: config_lib.Config, workdir, coders: Coders) -> Batches:
    """Training batches of the stories of every layout in the configuration."""
    sources = {f: open_stories(config, workdir, f, 'train') for f in dict.fromkeys(config.data.layouts)}
    datasets = {f: grain.MapDataset.source(EncodedStories(s, coders, config.data.caption_style))
                .seed(config.seed).shuffle().repeat() for f, s in sources.items()}
    digest = hashlib.sha256(repr([(f, s.fingerprint) for f, s in sources.items()]).encode()).hexdigest()
    return Batches(config.data.layouts, datasets, config.train.batch_size, digest)
