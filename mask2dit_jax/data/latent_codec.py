"""Latent codecs: captions to text states, and videos to the transformer's latents and back.

`StoriesCodec` codes the rendered stories. `PretrainedCodec` codes real videos with the networks of
a model folder. Both have the same methods and attributes: a `LatentCodec` is either of them.
"""

import hashlib
import math
import pathlib

import jax
import numpy as np

from mask2dit_jax import config as config_lib
from mask2dit_jax.data import records as records_lib
from mask2dit_jax.models import dit, t5, vae
from mask2dit_jax.pretrained import config_json
from mask2dit_jax.pretrained import load as load_lib
from mask2dit_jax.stories import codec as codec_lib
from mask2dit_jax.stories import world


class StoriesCodec:
    """The fixed word vectors and the fixed linear codec of the stories.

    Attributes:
      latent_shape: (h, w, C), height and width of the latent grid and its channels.
      size_px: (H, W), height and width of the videos.
      fingerprint: tells codecs apart whose latents do not fit each other.
    """

    def __init__(self, config: config_lib.Config, workdir):
        """Reads the linear codec from the workdir, or fits it and writes it there on first use.

        Args:
          config: the configuration of the run.
          workdir: the folder of the run, which keeps its codec for good.

        Raises:
          ValueError: if the videos are not square, or the transformer has other channels.
        """
        data = config.data
        side_px = square(data)

        path = pathlib.Path(workdir) / 'codec.safetensors'
        if path.exists():
            codec = codec_lib.load_codec(path)
        else:
            codec = codec_lib.default_codec(
                side_px,
                data.codec_patch_frames,
                data.codec_components,
                data.codec_patch_px,
                data.codec_first_frame,
            )
            if jax.process_index() == 0:
                codec_lib.save_codec(path, codec)

        channels = codec.basis.shape[1]
        if (config.model.in_channels, config.model.out_channels) != (channels, channels):
            raise ValueError(
                f'config.model.in_channels and out_channels must be {channels}, the channels of '
                'the codec.'
            )

        side = side_px // codec.patch_px
        self._codec = codec
        self._num_tokens = config.model.max_text_seq_length
        self._text_width = config.model.text_embed_dim
        self.latent_shape = (side, side, channels)
        self.size_px = (side_px, side_px)

        content = hashlib.sha256(repr((codec.patch_px, codec.patch_frames)).encode())
        for part in (codec, codec.first):
            for array in (part.mean, part.basis, part.scale) if part else ():
                content.update(np.ascontiguousarray(array).tobytes())
        self.fingerprint = content.hexdigest()[:16]

    def encode_text(self, captions: list[str]) -> np.ndarray:
        """Encodes captions.

        Args:
          captions: N captions; '' is the caption of unconditional generation.

        Returns:
          float32 [N, M, E].
        """
        return world.embed_captions(captions, tokens=self._num_tokens, dim=self._text_width)

    def encode_video(self, videos, frames: tuple[int, ...]) -> np.ndarray:
        """Encodes videos.

        Args:
          videos: [B, F, H, W, 3], uint8 or float in [0, 1].
          frames: pixel frames of each scene.

        Returns:
          Latents float32 [B, T, h, w, C].
        """
        return codec_lib.encode(self._codec, videos, frames)

    def decode_video(self, latents, latent_frames: tuple[int, ...]) -> np.ndarray:
        """Decodes latents.

        Args:
          latents: [B, T, h, w, C].
          latent_frames: latent frames of each scene.

        Returns:
          Videos float32 [B, F, H, W, 3] in [0, 1].
        """
        return codec_lib.decode(self._codec, latents, latent_frames)

    def scene_latents(self, frames: int) -> int:
        """Number of latent frames of a scene of `frames` pixel frames.

        Raises:
          ValueError: if a scene of so many frames cannot be coded.
        """
        patch_frames = self._codec.patch_frames
        alone = int(self._codec.first is not None)
        if frames < 1 or (frames - alone) % patch_frames:
            rule = 'one more than a' if alone else 'a positive'
            raise ValueError(
                f'A scene of {frames} frames cannot be coded: use {rule} multiple of '
                f'{patch_frames}, e.g. {self.nearest_frames(frames)}.'
            )
        return (frames - alone) // patch_frames + alone

    def nearest_frames(self, frames: float) -> int:
        """The length that can be coded and is the nearest to `frames` pixel frames."""
        return _nearest_frames(frames, self._codec.patch_frames, self._codec.first is not None)

    def latent_frames(self, frames: tuple[int, ...]) -> tuple[int, ...]:
        """Latent frames of each scene, from its pixel frames.

        Raises:
          ValueError: if a scene cannot be coded.
        """
        return tuple(self.scene_latents(f) for f in frames)


class PretrainedCodec:
    """T5 and VAE of a model folder, released or converted.

    Each network is loaded when it is called and released when the call returns, so that at most one
    is in memory. Captions are encoded once: their states are kept. Videos are coded scene by scene;
    latents are posterior means times the scaling factor.

    Attributes:
      latent_shape: (h, w, C), height and width of the latent grid and its channels.
      size_px: (H, W), height and width of the videos.
      fingerprint: tells codecs apart whose latents do not fit each other.
    """

    def __init__(
        self,
        folder,
        model: dit.DiTConfig,
        size_px: tuple[int, int],
        *,
        tiling: bool = False,
        decode_rule: str = 'reference',
        mask_padding: bool = False,
    ):
        """Reads the configurations of the networks and checks that they fit the transformer.

        Args:
          folder: the model folder, which holds text_encoder/, tokenizer/ and vae/.
          model: configuration of the transformer. T5 computes in its dtype; the VAE always computes
            in float32.
          size_px: height and width of the videos.
          tiling: whether the VAE codes overlapping tiles; see vae.encode.
          decode_rule: how latent frames are grouped for decoding; see vae.decode.
          mask_padding: whether padding tokens are hidden from T5's attention. The reference does
            not hide them.

        Raises:
          FileNotFoundError, ValueError: naming what is missing or does not fit the transformer.
        """
        folder = pathlib.Path(folder)
        self._tokenize = t5.load_tokenizer(folder / 'tokenizer')
        vae_config = config_json.read_config('vae', folder / 'vae')
        t5_config = config_json.read_config('text_encoder', folder / 'text_encoder')

        if tiling:
            vae.check_tiling(vae_config)

        network_widths = (vae_config.latent_channels, t5_config.d_model)
        if network_widths != (model.in_channels, model.text_embed_dim):
            raise ValueError(
                f'{folder}: a VAE of {vae_config.latent_channels} channels and a text encoder of '
                f'width {t5_config.d_model} do not fit a transformer of {model.in_channels} and '
                f'{model.text_embed_dim}.'
            )

        height_px, width_px = size_px
        factor = vae_config.spatial_factor
        token_px = factor * model.patch_size
        if height_px % token_px or width_px % token_px:
            raise ValueError(
                f'Videos of {height_px}x{width_px} pixels do not divide into tokens: use '
                f'multiples of {token_px}.'
            )

        self._folder = folder
        self._model = model
        self._vae_config = vae_config
        self._tiling = tiling
        self._decode_rule = decode_rule
        self._mask_padding = mask_padding
        self._text_states = {}  # by caption
        self.latent_shape = (height_px // factor, width_px // factor, vae_config.latent_channels)
        self.size_px = size_px
        self.fingerprint = network_digest(folder / 'vae')

    def encode_text(self, captions: list[str]) -> np.ndarray:
        """Encodes captions; T5 is loaded only if one of them is new.

        Args:
          captions: N captions; '' is the caption of unconditional generation.

        Returns:
          float32 [N, M, E].
        """
        new = [c for c in dict.fromkeys(captions) if c not in self._text_states]
        if new:
            self._encode_new(new)
        return np.stack([self._text_states[c] for c in captions])

    def _encode_new(self, captions: list[str]) -> None:
        """Keeps the states of these captions, encoded one by one."""
        dtype = self._model.dtype
        network, params = load_lib.load_t5(
            self._folder / 'text_encoder', param_dtype=dtype, dtype=dtype
        )

        token_ids = self._tokenize(captions, self._model.max_text_seq_length)  # [N, M]
        for caption, ids in zip(captions, token_ids[:, None]):
            mask = t5.caption_tokens(ids) if self._mask_padding else None
            states = t5.encode(network.cfg, params, ids, mask)  # [1, M, E]
            self._text_states[caption] = np.asarray(states, np.float32)[0]

    def encode_video(self, videos, frames: tuple[int, ...]) -> np.ndarray:
        """Encodes videos, every scene apart.

        Args:
          videos: [B, F, H, W, 3], uint8 or float in [0, 1].
          frames: pixel frames of each scene.

        Returns:
          Latents float32 [B, T, h, w, C].
        """
        _, params = load_lib.load_vae(self._folder / 'vae')
        borders = np.cumsum(frames)[:-1]

        videos_latents = []
        for video in videos:
            pixels = _to_float(video)[None] * 2 - 1  # [1, F, H, W, 3] in -1...1
            means = []
            for scene in np.split(pixels, borders, axis=1):
                mean, _ = vae.encode(self._vae_config, params, scene, self._tiling)
                means.append(mean)
            videos_latents.append(np.concatenate(means, axis=1))
        return np.concatenate(videos_latents) * np.float32(self._vae_config.scaling_factor)

    def decode_video(self, latents, latent_frames: tuple[int, ...]) -> np.ndarray:
        """Decodes latents, every scene apart.

        Args:
          latents: [B, T, h, w, C].
          latent_frames: latent frames of each scene.

        Returns:
          Videos float32 [B, F, H, W, 3] in [0, 1].
        """
        _, params = load_lib.load_vae(self._folder / 'vae')
        scaling_factor = np.float32(self._vae_config.scaling_factor)
        unscaled = np.asarray(latents, np.float32) / scaling_factor
        borders = np.cumsum(latent_frames)[:-1]

        videos = []
        for story in np.split(unscaled, len(latents)):
            scenes = [
                vae.decode(self._vae_config, params, scene, self._tiling, self._decode_rule)
                for scene in np.split(story, borders, axis=1)
            ]
            pixels = np.concatenate(scenes, axis=1)  # [1, F, H, W, 3] in -1...1
            videos.append(np.clip(pixels / 2 + 0.5, 0, 1))
        return np.concatenate(videos)

    def scene_latents(self, frames: int) -> int:
        """Number of latent frames of a scene of `frames` pixel frames.

        Raises:
          ValueError: if a scene of so many frames cannot be coded.
        """
        ratio = self._vae_config.temporal_compression_ratio
        if frames < 1 or (frames - 1) % ratio:
            raise ValueError(
                f'A scene of {frames} frames cannot be coded: the VAE needs one more than a '
                f'multiple of {ratio}, e.g. {self.nearest_frames(frames)}.'
            )
        return (frames - 1) // ratio + 1

    def nearest_frames(self, frames: float) -> int:
        """The length that can be coded and is the nearest to `frames` pixel frames."""
        return _nearest_frames(frames, self._vae_config.temporal_compression_ratio, True)

    def latent_frames(self, frames: tuple[int, ...]) -> tuple[int, ...]:
        """Latent frames of each scene, from its pixel frames.

        Raises:
          ValueError: if a scene cannot be coded.
        """
        return tuple(self.scene_latents(f) for f in frames)


LatentCodec = StoriesCodec | PretrainedCodec


def for_run(config: config_lib.Config, workdir) -> LatentCodec:
    """The codec of a run.

    Args:
      config: the configuration of the run.
      workdir: the folder of the run.

    Returns:
      PretrainedCodec if the run has a model folder (see model_folder), StoriesCodec otherwise.

    Raises:
      FileNotFoundError: if init_from or the model folder lacks a file.
      ValueError: if config.data.codec asks for the other codec, or the codec does not fit the
        transformer.
    """
    if config.data.codec == 'stories' and (pathlib.Path(workdir) / 'codec.safetensors').exists():
        return StoriesCodec(
            config, workdir
        )  # of a run that goes on, whose base may have moved away

    folder = model_folder(config)
    if (folder is None) != (config.data.codec == 'stories'):
        raise ValueError(
            f'config.data.codec is {config.data.codec!r}, but the run descends from '
            f'{folder or "no model folder"}: give one by --checkpoint, which sets the codec.'
        )

    if folder is None:
        return StoriesCodec(config, workdir)
    return PretrainedCodec(folder, config.model, (config.data.height_px, config.data.width_px))


def model_folder(config: config_lib.Config) -> pathlib.Path | None:
    """The folder that holds the VAE and the text encoder of a run.

    Returns:
      The model folder that the run descends from, else the one that encoded its clips, else None:
      a run on stories needs no such networks.

    Raises:
      FileNotFoundError: if init_from is neither a model folder nor a workdir, or
        config.data.encoded is not a data set.
    """
    try:
        folder = pretrained_folder(config)
    except FileNotFoundError:  # a run that goes on does not need its base
        if not config.data.encoded:
            raise
        folder = None
    if folder is None and config.data.encoded:
        settings = records_lib.read_settings(config.data.encoded)
        folder = pathlib.Path(settings['folder'])
    return folder


def pretrained_folder(config: config_lib.Config) -> pathlib.Path | None:
    """The model folder, released or converted, that a run descends from through init_from.

    Returns:
      The folder, or None for a run from scratch.

    Raises:
      FileNotFoundError: if init_from is neither a model folder nor a workdir.
    """
    while config.init_from:
        folder = pathlib.Path(config.init_from)
        if (folder / 'transformer').is_dir():
            return folder
        config = config_lib.load_run(folder)
    return None


def network_digest(folder) -> str:
    """Digest of a network's configuration file, which tells one VAE from another."""
    content = (pathlib.Path(folder) / 'config.json').read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def square(data: config_lib.DataConfig) -> int:
    """The side of the stories' square frames, in pixels.

    Raises:
      ValueError: if the configured height and width differ.
    """
    if data.height_px != data.width_px:
        raise ValueError(
            f'Stories are square, and config.data asks for {data.height_px}x{data.width_px}: set '
            'height_px and width_px alike.'
        )
    return data.height_px


def latent_shape(
    config: config_lib.Config, frames: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Shape of the latents, from the configuration alone, without a codec.

    Args:
      config: the configuration of the run.
      frames: pixel frames of each scene.

    Returns:
      Latent frames of each scene, and (h, w, C).
    """
    data = config.data
    if data.codec == 'stories':
        factor = data.codec_patch_px
        alone = int(data.codec_first_frame)
        latent_frames = tuple((f - alone) // data.codec_patch_frames + alone for f in frames)
    else:
        factor = 8  # of CogVideoX's VAE
        ratio = config.model.temporal_compression_ratio
        latent_frames = tuple((f - 1) // ratio + 1 for f in frames)

    grid = (data.height_px // factor, data.width_px // factor)
    return latent_frames, (*grid, config.model.in_channels)


def _nearest_frames(frames: float, ratio: int, first_frame: bool) -> int:
    """The nearest multiple of `ratio` from 1 on; with a first frame alone, one more than one from 0
    on. Of two that are as near, the longer."""
    alone = int(first_frame)
    groups = math.floor((frames - alone) / ratio + 0.5)
    return max(groups, 1 - alone) * ratio + alone


def _to_float(video) -> np.ndarray:
    """Pixels as float32 in [0, 1], from uint8 or from floats in [0, 1]."""
    if video.dtype == np.uint8:
        return video.astype(np.float32) / 255
    return np.asarray(video, np.float32)
