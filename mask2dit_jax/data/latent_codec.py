"""What stands between captions or pixels and what the transformer sees."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from mask2dit_jax import config as config_lib
from mask2dit_jax.data import records as records_lib
from mask2dit_jax.models import dit, t5, vae
from mask2dit_jax.pretrained import config_json
from mask2dit_jax.pretrained import load as load_lib
from mask2dit_jax.stories import codec as codec_lib
from mask2dit_jax.stories import world


@dataclasses.dataclass(frozen=True)
class LatentCodec:
    """What stands between files and the transformer.

    Attributes:
      encode_text: list of N captions to float32 [N, M, E]; '' is the unconditional caption.
      encode_video: videos in [0, 1] or uint8 [B, F, H, W, 3] and the frames of their scenes to
        latents float32 [B, T, h, w, C].
      decode_video: latents and the latent frames of their scenes to pixels float32 in [0, 1].
      scene_latents: pixel frames of one scene to latent frames; raises ValueError for a number that
        it cannot code.
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
    """The released (or converted) folder that a run descends from through init_from, or None for
    one from scratch.

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
    """Where the VAE and the text encoder of a run are: the folder that it descends from, or that
    its clips were encoded with, or None for the codec and word vectors of the stories."""
    folder = pretrained_folder(config)
    if folder is None and config.data.encoded:
        folder = pathlib.Path(records_lib.read_settings(config.data.encoded)['folder'])
    return folder


def for_run(config: config_lib.Config, workdir) -> LatentCodec:
    """VAE and T5 of model_folder, or the codec and word vectors of the stories.

    Raises:
      ValueError: if the configuration says 'vae' and there is no such folder, or the other way
        round.
    """
    folder = model_folder(config)
    if (folder is None) != (config.data.codec == 'stories'):
        raise ValueError(
            f'config.data.codec is {config.data.codec!r}, but the run descends from '
            f'{folder or "no model folder"}: give one by --checkpoint, which sets the codec.'
        )
    if folder is None:
        return stories_codec(config, workdir)
    return pretrained_codec(folder, config.model, (config.data.height_px, config.data.width_px))


def network_digest(folder) -> str:
    """Of the configuration of a network, to tell one VAE from another."""
    return hashlib.sha256((pathlib.Path(folder) / 'config.json').read_bytes()).hexdigest()[:16]


def square(data: config_lib.DataConfig) -> int:
    if data.height_px != data.width_px:
        raise ValueError(
            f'Stories are square, and config.data asks for {data.height_px}x{data.width_px}: set '
            'height_px and width_px alike.'
        )
    return data.height_px


def latent_shape(
    config: config_lib.Config, frames: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Latent frames per scene and (h, w, C), from the configuration alone, without codec."""
    data, channels = config.data, config.model.in_channels
    if data.codec == 'stories':
        factor, latent = (
            codec_lib.Codec.patch_px,
            tuple(f // data.codec_patch_frames for f in frames),
        )
    else:  # CogVideoX's VAE
        factor, latent = (
            8,
            tuple((f - 1) // config.model.temporal_compression_ratio + 1 for f in frames),
        )
    return latent, (data.height_px // factor, data.width_px // factor, channels)


def stories_codec(config: config_lib.Config, workdir) -> LatentCodec:
    """The fixed word vectors and linear codec of the stories; the codec is kept in the workdir for
    good."""
    path, data = pathlib.Path(workdir) / 'codec.safetensors', config.data
    side_px = square(data)
    if path.exists():
        codec = codec_lib.load_codec(path)
    else:
        codec = codec_lib.default_codec(side_px, data.codec_patch_frames, data.codec_components)
        if jax.process_index() == 0:
            codec_lib.save_codec(path, codec)
    side, channels = side_px // codec.patch_px, codec.basis.shape[1]
    if (config.model.in_channels, config.model.out_channels) != (channels, channels):
        raise ValueError(
            f'config.model.in_channels and out_channels must be {channels}, the channels of the codec.'
        )

    def scene_latents(frames):
        if frames < 1 or frames % codec.patch_frames:
            raise ValueError(
                f'A scene of {frames} frames cannot be coded: use a positive multiple of '
                f'{codec.patch_frames}.'
            )
        return frames // codec.patch_frames

    return LatentCodec(
        encode_text=functools.partial(
            world.embed_captions,
            tokens=config.model.max_text_seq_length,
            dim=config.model.text_embed_dim,
        ),
        # Patches of frames do not cross scenes, so that scenes are coded apart anyway.
        encode_video=lambda videos, frames: codec_lib.encode(codec, videos),
        decode_video=lambda latents, latent_frames: codec_lib.decode(codec, latents),
        scene_latents=scene_latents,
        latent_shape=(side, side, channels),
        size_px=(side_px, side_px),
    )


def _to_float(video):
    """Pixels float32 in [0, 1]."""
    return (
        video.astype(np.float32) / 255 if video.dtype == np.uint8 else np.asarray(video, np.float32)
    )


def pretrained_codec(
    folder,
    model: dit.DiTConfig,
    size_px: tuple[int, int],
    *,
    tiling: bool = False,
    decode_rule: str = 'reference',
    mask_padding: bool = False,
) -> LatentCodec:
    """T5 and VAE of a model folder, released or converted.

    Each network is loaded when it is called and let go when it returns, so that at most one is in
    memory; captions once encoded are kept. Videos are coded scene by scene; latents are posterior
    means times the scaling factor.

    Args:
      folder: holds text_encoder/, tokenizer/ and vae/.
      model: the transformer that they serve; its dtype is also theirs for T5, while the VAE
        computes in float32.
      size_px: height and width of the videos.
      tiling, decode_rule: see vae.decode.
      mask_padding: hide padding tokens from T5's attention; the reference does not.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit the transformer.
    """
    folder = pathlib.Path(folder)
    tokenize = t5.load_tokenizer(folder / 'tokenizer')
    vae_cfg, t5_cfg = (
        config_json.read_config(kind, folder / kind) for kind in ('vae', 'text_encoder')
    )
    factor = vae_cfg.spatial_factor
    if tiling:
        vae.check_tiling(vae_cfg)
    if (vae_cfg.latent_channels, t5_cfg.d_model) != (model.in_channels, model.text_embed_dim):
        raise ValueError(
            f'{folder}: a VAE of {vae_cfg.latent_channels} channels and a text encoder of width '
            f'{t5_cfg.d_model} do not fit a transformer of {model.in_channels} and '
            f'{model.text_embed_dim}.'
        )
    if size_px[0] % (factor * model.patch_size) or size_px[1] % (factor * model.patch_size):
        raise ValueError(
            f'Videos of {size_px[0]}x{size_px[1]} pixels do not divide into tokens: use multiples of '
            f'{factor * model.patch_size}.'
        )
    known = {}

    def encode_text(captions):
        new = [c for c in dict.fromkeys(captions) if c not in known]
        if new:
            network, params = load_lib.load_t5(
                folder / 'text_encoder', param_dtype=model.dtype, dtype=model.dtype
            )
            for caption, ids in zip(new, tokenize(new, model.max_text_seq_length)[:, None]):
                mask = ids != t5.PAD if mask_padding else None
                known[caption] = np.asarray(t5.encode(network.cfg, params, ids, mask), np.float32)[
                    0
                ]
        return np.stack([known[c] for c in captions])

    def encode_video(videos, frames):
        _, params = load_lib.load_vae(folder / 'vae')
        means = []
        for video in videos:
            x = _to_float(video)[None] * 2 - 1
            scenes = np.split(x, np.cumsum(frames)[:-1], axis=1)
            means.append(
                np.concatenate([vae.encode(vae_cfg, params, s, tiling)[0] for s in scenes], axis=1)
            )
        return np.concatenate(means) * np.float32(vae_cfg.scaling_factor)

    def decode_video(latents, latent_frames):
        _, params = load_lib.load_vae(folder / 'vae')
        videos = []
        for story in np.split(
            np.asarray(latents, np.float32) / np.float32(vae_cfg.scaling_factor), len(latents)
        ):
            scenes = np.split(story, np.cumsum(latent_frames)[:-1], axis=1)
            pixels = [vae.decode(vae_cfg, params, s, tiling, decode_rule) for s in scenes]
            videos.append(np.clip(np.concatenate(pixels, axis=1) / 2 + 0.5, 0, 1))
        return np.concatenate(videos)

    def scene_latents(frames):
        ratio = vae_cfg.temporal_compression_ratio
        if frames < 1 or (frames - 1) % ratio:
            raise ValueError(
                f'A scene of {frames} frames cannot be coded: the VAE needs one more than a multiple of '
                f'{ratio}, e.g. {max(frames - 1, 0) // ratio * ratio + 1}.'
            )
        return (frames - 1) // ratio + 1

    return LatentCodec(
        encode_text,
        encode_video,
        decode_video,
        scene_latents,
        (size_px[0] // factor, size_px[1] // factor, vae_cfg.latent_channels),
        size_px,
    )
