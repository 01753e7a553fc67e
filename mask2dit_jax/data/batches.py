"""Batches as a pure function of the step: of rendered stories, encoded at the start, or of clips that encode has coded.

And the coders between captions or pixels and what the model sees.
"""
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable

import grain
import jax
import numpy as np
from absl import logging
from safetensors.numpy import load_file

from mask2dit_jax import config as config_lib
from mask2dit_jax import stories
from mask2dit_jax.data import records as records_lib
from mask2dit_jax.models import dit, t5, vae
from mask2dit_jax.pretrained import load


@dataclasses.dataclass(frozen=True)
class Coders:
    """What stands between files and the transformer.

    Attributes:
      encode_text: list of N captions to float32 [N, M, E]; '' is the unconditional caption.
      encode_video: videos in [0, 1] or uint8 [B, F, H, W, 3] and the frames of their scenes to latents float32
        [B, T, h, w, C].
      decode_video: latents and the latent frames of their scenes to pixels float32 in [0, 1].
      scene_latents: pixel frames of one scene to latent frames; raises ValueError for a number that it cannot code.
      latent_shape: (h, w, C).
      size_px: (H, W).
    """
    encode_text: Callable
    encode_video: Callable
    decode_video: Callable
    scene_latents: Callable[[int], int]
    latent_shape: tuple[int, int, int]
    size_px: tuple[int, int]

    def latent_frames(self, frames: tuple[int, ...]) -> tuple[int, ...]:
        """Latent frames per scene.

        Raises:
          ValueError: if a scene cannot be coded.
        """
        return tuple(self.scene_latents(f) for f in frames)


def pretrained_folder(config: config_lib.Config) -> pathlib.Path | None:
    """The released (or converted) folder that a run descends from through init_from, or None for one from scratch.

    Raises:
      FileNotFoundError: if init_from is neither such a folder nor a workdir.
    """
    while config.init_from:
        folder = pathlib.Path(config.init_from)
        if (folder / 'transformer').is_dir():
            return folder
        config = config_lib.load_run(folder)
    return None


def model_folder(config: config_lib.Config) -> pathlib.Path | None:
    """Where the VAE and the text encoder of a run are: the folder that it descends from, or that its clips were encoded
    with, or None for the codec and word vectors of the stories."""
    folder = pretrained_folder(config)
    if folder is None and config.data.encoded:
        folder = pathlib.Path(records_lib.read_settings(config.data.encoded)['folder'])
    return folder


def coders(config: config_lib.Config, workdir) -> Coders:
    """VAE and T5 of model_folder, or the codec and word vectors of the stories.

    Raises:
      ValueError: if the configuration says 'vae' and there is no such folder, or the other way round.
    """
    folder = model_folder(config)
    if (folder is None) != (config.data.codec == 'stories'):
        raise ValueError(f'config.data.codec is {config.data.codec!r}, but the run descends from '
                         f'{folder or "no model folder"}: give one by --checkpoint, which sets the codec.')
    if folder is None:
        return stories_coders(config, workdir)
    return pretrained_coders(folder, config.model, (config.data.height_px, config.data.width_px))


def network_digest(folder) -> str:
    """Of the configuration of a network, to tell one VAE from another."""
    return hashlib.sha256((pathlib.Path(folder) / 'config.json').read_bytes()).hexdigest()[:16]


def adopt(config: config_lib.Config) -> config_lib.Config:
    """`config` with the size of the clips that it is to train on."""
    made = records_lib.read_settings(config.data.encoded)
    return dataclasses.replace(config, data=dataclasses.replace(
        config.data, codec='vae', height_px=made['height_px'], width_px=made['width_px']))


def _square(data: config_lib.DataConfig) -> int:
    if data.height_px != data.width_px:
        raise ValueError(f'Stories are square, and config.data asks for {data.height_px}x{data.width_px}: set '
                         'height_px and width_px alike.')
    return data.height_px


def latent_shape(config: config_lib.Config, frames: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Latent frames per scene and (h, w, C), from the configuration alone, without coders."""
    data, channels = config.data, config.model.in_channels
    if data.codec == 'stories':
        factor, latent = stories.Codec.patch_px, tuple(f // data.codec_patch_frames for f in frames)
    else:  # CogVideoX's VAE
        factor, latent = 8, tuple((f - 1) // config.model.temporal_compression_ratio + 1 for f in frames)
    return latent, (data.height_px // factor, data.width_px // factor, channels)


def stories_coders(config: config_lib.Config, workdir) -> Coders:
    """The fixed word vectors and linear codec of the stories; the codec is kept in the workdir for good."""
    path, data = pathlib.Path(workdir) / 'codec.safetensors', config.data
    side_px = _square(data)
    if path.exists():
        codec = stories.load_codec(path)
    else:
        codec = stories.default_codec(side_px, data.codec_patch_frames, data.codec_components)
        if jax.process_index() == 0:
            stories.save_codec(path, codec)
    side, channels = side_px // codec.patch_px, codec.basis.shape[1]
    if (config.model.in_channels, config.model.out_channels) != (channels, channels):
        raise ValueError(f'config.model.in_channels and out_channels must be {channels}, the channels of the codec.')

    def scene_latents(frames):
        if frames < 1 or frames % codec.patch_frames:
            raise ValueError(f'A scene of {frames} frames cannot be coded: use a positive multiple of '
                             f'{codec.patch_frames}.')
        return frames // codec.patch_frames

    return Coders(
        encode_text=functools.partial(stories.embed_captions, tokens=config.model.max_text_seq_length,
                                      dim=config.model.text_embed_dim),
        # Patches of frames do not cross scenes, so that scenes are coded apart anyway.
        encode_video=lambda videos, frames: stories.encode(codec, videos),
        decode_video=lambda latents, latent_frames: stories.decode(codec, latents),
        scene_latents=scene_latents, latent_shape=(side, side, channels), size_px=(side_px, side_px))


def _to_float(video):
    """Pixels float32 in [0, 1]."""
    return video.astype(np.float32) / 255 if video.dtype == np.uint8 else np.asarray(video, np.float32)


def pretrained_coders(folder, model: dit.DiTConfig, size_px: tuple[int, int], *, tiling: bool = False,
                      decode_rule: str = 'reference', mask_padding: bool = False) -> Coders:
    """T5 and VAE of a model folder, released or converted.

    Each network is loaded when it is called and let go when it returns, so that at most one is in memory; captions
    once encoded are kept. Videos are coded scene by scene; latents are posterior means times the scaling factor.

    Args:
      folder: holds text_encoder/, tokenizer/ and vae/.
      model: the transformer that they serve; its dtype is also theirs for T5, while the VAE computes in float32.
      size_px: height and width of the videos.
      tiling, decode_rule: see vae.decode.
      mask_padding: hide padding tokens from T5's attention; the reference does not.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit the transformer.
    """
    folder = pathlib.Path(folder)
    tokenize = t5.load_tokenizer(folder / 'tokenizer')
    vae_cfg, t5_cfg = (load.read_config(kind, folder / kind) for kind in ('vae', 'text_encoder'))
    factor = vae_cfg.spatial_factor
    if tiling:
        vae.check_tiling(vae_cfg)
    if (vae_cfg.latent_channels, t5_cfg.d_model) != (model.in_channels, model.text_embed_dim):
        raise ValueError(f'{folder}: a VAE of {vae_cfg.latent_channels} channels and a text encoder of width '
                         f'{t5_cfg.d_model} do not fit a transformer of {model.in_channels} and '
                         f'{model.text_embed_dim}.')
    if size_px[0] % (factor * model.patch_size) or size_px[1] % (factor * model.patch_size):
        raise ValueError(f'Videos of {size_px[0]}x{size_px[1]} pixels do not divide into tokens: use multiples of '
                         f'{factor * model.patch_size}.')
    known = {}

    def encode_text(captions):
        new = [c for c in dict.fromkeys(captions) if c not in known]
        if new:
            network, params = load.load_t5(folder / 'text_encoder', param_dtype=model.dtype, dtype=model.dtype)
            for caption, ids in zip(new, tokenize(new, model.max_text_seq_length)[:, None]):
                mask = ids != t5.PAD if mask_padding else None
                known[caption] = np.asarray(t5.encode(network.cfg, params, ids, mask), np.float32)[0]
        return np.stack([known[c] for c in captions])

    def encode_video(videos, frames):
        _, params = load.load_vae(folder / 'vae')
        means = []
        for video in videos:
            x = _to_float(video)[None] * 2 - 1
            scenes = np.split(x, np.cumsum(frames)[:-1], axis=1)
            means.append(np.concatenate([vae.encode(vae_cfg, params, s, tiling)[0] for s in scenes], axis=1))
        return np.concatenate(means) * np.float32(vae_cfg.scaling_factor)

    def decode_video(latents, latent_frames):
        _, params = load.load_vae(folder / 'vae')
        videos = []
        for story in np.split(np.asarray(latents, np.float32) / np.float32(vae_cfg.scaling_factor), len(latents)):
            scenes = np.split(story, np.cumsum(latent_frames)[:-1], axis=1)
            pixels = [vae.decode(vae_cfg, params, s, tiling, decode_rule) for s in scenes]
            videos.append(np.clip(np.concatenate(pixels, axis=1) / 2 + 0.5, 0, 1))
        return np.concatenate(videos)

    def scene_latents(frames):
        ratio = vae_cfg.temporal_compression_ratio
        if frames < 1 or (frames - 1) % ratio:
            raise ValueError(f'A scene of {frames} frames cannot be coded: the VAE needs one more than a multiple of '
                             f'{ratio}, e.g. {max(frames - 1, 0) // ratio * ratio + 1}.')
        return (frames - 1) // ratio + 1

    return Coders(encode_text, encode_video, decode_video, scene_latents,
                  (size_px[0] // factor, size_px[1] // factor, vae_cfg.latent_channels), size_px)


class EncodedStories:
    """Random access to the latents and text of a split, encoded once and held in memory."""

    def __init__(self, source: stories.StorySource, coders: Coders, frames: tuple[int, ...], caption_style: str):
        examples = [source[i] for i in range(len(source))]
        self._latents = coders.encode_video(np.stack([e['video'] for e in examples]), frames)
        # Captions repeat: each distinct one is encoded once.
        captions = [stories.captions(e['story'], caption_style) for e in examples]
        distinct = sorted({c for story in captions for c in story})
        text = dict(zip(distinct, coders.encode_text(distinct)))
        self._text = [[text[c] for c in story] for story in captions]

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
      null_text: of the empty caption, float32 [M, E].
      fingerprint: of the data, to be checked on resuming.
    """
    layouts: tuple[tuple[int, ...], ...]
    datasets: dict[tuple[int, ...], grain.MapDataset]
    batch_size: int
    null_text: np.ndarray
    fingerprint: str

    def __call__(self, step: int, rows):
        """Layout of a step, and the examples at `rows` of its global batch."""
        turn, cycle = step % len(self.layouts), step // len(self.layouts)
        layout = self.layouts[turn]
        seen = cycle * self.layouts.count(layout) + self.layouts[:turn].count(layout)
        examples = [self.datasets[layout][seen * self.batch_size + row] for row in rows]
        return layout, {k: np.stack([e[k] for e in examples]) for k in examples[0]}


def open_stories(config: config_lib.Config, workdir, frames: tuple[int, ...], split: str) -> stories.StorySource:
    """One split of the stories, rendered on first use; process 0 renders, the others wait."""
    data = config.data
    folder = data.dir or os.path.join(os.path.dirname(os.path.abspath(workdir)), 'data')
    opened = functools.partial(stories.load, folder, frames, split, size_px=_square(data), num_train=data.num_train,
                               num_test=data.num_test)
    if jax.process_count() == 1:
        return opened()
    from jax.experimental import multihost_utils
    if jax.process_index() == 0:
        opened()
    multihost_utils.sync_global_devices('stories')
    return opened()


def train_batches(config: config_lib.Config, workdir, coders: Coders) -> Batches:
    """Training batches of every layout in the configuration.

    Raises:
      FileNotFoundError, ValueError: naming what the data lacks.
    """
    layouts, size = config.data.layouts, config.train.batch_size
    if config.data.encoded:
        encoded = EncodedClips(config, coders.latent_shape, config.data.encoded)
        datasets = {f: encoded.endless(f) for f in dict.fromkeys(layouts)}
        return Batches(layouts, datasets, size, encoded.null_text, encoded.fingerprint)
    sources = {f: open_stories(config, workdir, f, 'train') for f in dict.fromkeys(layouts)}
    datasets = {f: grain.MapDataset.source(EncodedStories(s, coders, f, config.data.caption_style))
                .seed(config.seed).shuffle().repeat() for f, s in sources.items()}
    digest = hashlib.sha256(repr([(f, s.fingerprint) for f, s in sources.items()]).encode()).hexdigest()
    return Batches(layouts, datasets, size, coders.encode_text([''])[0], digest)


class EncodedClips:
    """Stories made of the clips of a data set that encode wrote.

    Attributes:
      null_text: of the empty caption, float32 [M, E].
      fingerprint: of the data and of how stories are made of it.
    """

    def __init__(self, config: config_lib.Config, latent_shape: tuple[int, int, int], folder):
        """Opens the data set in a folder.

        Args:
          config: the configuration.
          latent_shape: (h, w, C) of the VAE.
          folder: that encode wrote.

        Raises:
          FileNotFoundError, ValueError: if it is none, or does not fit the model or the VAE.
        """
        self._records, self._config = records_lib.Records(folder), config
        self._folder, made = self._records.folder, self._records.settings
        if made['store'] != 'moments':
            raise ValueError(f'{self._folder} holds {made["store"]}: encode the videos again with --store=moments.')
        model, (h, w, channels) = config.model, latent_shape
        want = [h, w, 2 * channels], [model.max_text_seq_length, model.text_embed_dim]
        have = made['moments_shape'], made['text_shape']
        if have != want:
            raise ValueError(f'{self._folder} has moments {have[0]} and text {have[1]}, and the configuration asks for '
                             f'{want[0]} and {want[1]}: check config.data.height_px, width_px, the model and the data.')
        vae_folder = model_folder(config) / 'vae'
        if network_digest(vae_folder) != made['vae']:
            raise ValueError(f'{self._folder} was encoded with another VAE than {vae_folder}: encode the videos again '
                             'with it.')
        self._scale = np.float32(made['scaling_factor'])
        self.null_text = load_file(self._folder / 'null_text.safetensors')['text'].astype(np.float32)
        self.fingerprint = hashlib.sha256(f'{self._records.fingerprint} {config.data.scenes}'.encode()).hexdigest()

    def candidates(self, layout: tuple[int, ...]) -> list[np.ndarray]:
        """What an example of this layout may start from: per story the records of first scenes of windows that fit, or
        per clip that fits the first scene itself.

        Raises:
          ValueError: if nothing fits, naming what there is.
        """
        rows, need = self._records.rows, len(layout)
        if self._config.data.scenes == 'unrelated':
            found = [np.array([i]) for i in np.flatnonzero(rows[:, 2] == layout[0])]
            fits = [int(np.sum(rows[:, 2] == n)) >= layout.count(n) for n in layout]
            found = found if all(fits) else []
        else:
            # Windows of neighbouring records: the same story, scenes in a row, frames as the layout has them.
            starts = np.arange(len(rows) - need + 1)
            for i, frames in enumerate(layout):
                here = rows[starts + i]
                same = (here[:, 0] == rows[starts, 0]) & (here[:, 1] == rows[starts, 1] + i) & (here[:, 2] == frames)
                starts = starts[same]
            groups = np.unique(rows[starts, 0])
            found = [starts[rows[starts, 0] == story] for story in groups]
        if not found:
            lengths, counts = np.unique(rows[:, 2], return_counts=True)
            listed = ', '.join(f'{n} of {f} frames' for f, n in zip(lengths, counts))
            raise ValueError(f'{self._folder} has no {self._config.data.scenes} scenes of {layout} frames; its clips '
                             f'are {listed} in {len(np.unique(rows[:, 0]))} stories: change config.data.layouts or '
                             'config.data.scenes, or encode other clips.')
        return found

    def _story(self, starts: np.ndarray, rng: np.random.Generator, layout: tuple[int, ...]) -> np.ndarray:
        """Records of one example."""
        first = int(rng.choice(starts))
        if self._config.data.scenes == 'consecutive':
            return first + np.arange(len(layout))
        lengths, picked = self._records.rows[:, 2], [first]
        for frames in layout[1:]:
            picked.append(int(rng.choice(np.setdiff1d(np.flatnonzero(lengths == frames), picked))))
        return np.array(picked)

    def example(self, records, rng: np.random.Generator | None) -> dict:
        """Latents [T, h, w, C], drawn from the posterior, or its mean without rng, and text [S, M, E], float32."""
        read = [self._records[i] for i in records]
        latents = []
        for r in read:
            mean, logvar = np.split(r['moments'].astype(np.float32), 2, axis=-1)
            if rng is not None:
                mean = mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape, np.float32)
            latents.append(mean * self._scale)
        return {'latents': np.concatenate(latents), 'text': np.stack([r['text'].astype(np.float32) for r in read])}

    def captions(self, records) -> list[str]:
        """Of these records."""
        return [self._records[i]['caption'].decode() for i in records]

    def endless(self, layout: tuple[int, ...]) -> grain.MapDataset:
        """Shuffled examples without end; windows, companions and the posterior are drawn anew every time."""
        found = self.candidates(layout)
        used = len(np.unique(np.concatenate(found)))
        logging.info('%s: %d examples of %s frames per epoch; %d of %d clips begin one.', self._folder, len(found),
                     '+'.join(map(str, layout)), used, len(self._records))

        def draw(starts, rng):
            return self.example(self._story(starts, rng, layout), rng)

        return grain.MapDataset.source(found).seed(self._config.seed).shuffle().repeat().random_map(draw)

    def fixed(self, layout: tuple[int, ...], count: int) -> list[np.ndarray]:
        """Records of `count` stories, always the same ones; they come again if there are fewer."""
        found = self.candidates(layout)
        return [self._story(found[i % len(found)], np.random.default_rng([1, i]), layout) for i in range(count)]


@contextlib.contextmanager
def prefetched(function: Callable, items: Iterable, ahead: int = 2):
    """An iterator over function(item) in the order of items, made by one thread while the last one is in use.

    What the function raises is raised where its item's turn comes. Leaving the context waits for the item in work.
    """
    items = iter(items)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = collections.deque(pool.submit(function, item) for item in itertools.islice(items, ahead))

        def results():
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
                yield result

        try:
            yield results()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
