"""A fixed linear codec in the place of a VAE: space-time patches to principal components of
rendered stories.

Component i is scaled by std_i^(-1/2), half way between raw (colours are learnt early, actions late)
and whitened (the other way round), and all of them by one factor for unit variance overall.
"""

import dataclasses
import functools
import os

import numpy as np
import safetensors.numpy

from mask2dit_jax.stories import world

FIT_STORIES = 512
FIT_FRAMES = (4, 4, 8)  # fast and slow actions, so that the codec serves scenes of all lengths


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """A linear codec of patches of P = patch_frames * patch_px * patch_px * 3 values.

    Attributes:
        mean: [P] float32 mean patch.
        basis: [P, C] float32 orthonormal principal components, the largest first.
        scale: [C] float32 factor on each component.
        patch_px: height and width of a patch.
        patch_frames: frames of a patch.
    """

    mean: np.ndarray
    basis: np.ndarray
    scale: np.ndarray
    patch_px: int = 4
    patch_frames: int = 4


def _to_patches(video, patch_px, patch_frames):
    """[..., F, H, W, 3] -> [..., F/pf, H/p, W/p, P]."""
    *batch, frames, height, width, channels = video.shape
    if frames % patch_frames or height % patch_px or width % patch_px:
        raise ValueError(
            f'a video of {frames} frames of {height} x {width} px does not divide into patches of '
            f'{patch_frames} frames of {patch_px} x {patch_px} px; use multiples.'
        )
    grid = (
        frames // patch_frames,
        patch_frames,
        height // patch_px,
        patch_px,
        width // patch_px,
        patch_px,
        channels,
    )
    n = len(batch)
    order = (*range(n), n, n + 2, n + 4, n + 1, n + 3, n + 5, n + 6)
    blocks = video.reshape(*batch, *grid).transpose(order)  # [..., F/pf, H/p, W/p, pf, p, p, 3]
    return blocks.reshape(*blocks.shape[: n + 3], -1)


def _to_video(patches, patch_px, patch_frames):
    """Inverse of `_to_patches`."""
    *batch, t, h, w, _ = patches.shape
    n = len(batch)
    blocks = patches.reshape(*batch, t, h, w, patch_frames, patch_px, patch_px, -1)
    order = (*range(n), n, n + 3, n + 1, n + 4, n + 2, n + 5, n + 6)
    return blocks.transpose(order).reshape(*batch, t * patch_frames, h * patch_px, w * patch_px, -1)


def _to_float(video):
    """uint8 or float video as float32 in [0, 1]."""
    video = np.asarray(video)
    return video.astype(np.float32) / (255 if video.dtype == np.uint8 else 1)


def fit_codec(videos, components: int = 48, patch_px: int = 4, patch_frames: int = 4) -> Codec:
    """Principal components of the patches of `videos`.

    Args:
        videos: uint8 or float-in-[0, 1] videos [F, H, W, 3], a list or an array.
        components: channels of the latents, at most the values of a patch.
        patch_px: height and width of a patch.
        patch_frames: frames of a patch.

    Raises:
        ValueError: if a video does not divide into patches, or `components` is not in 1 to P.
    """
    size = patch_frames * patch_px * patch_px * 3
    if not 1 <= components <= size:
        raise ValueError(
            f'{components} components asked of patches of {size} values; use 1 to {size}.'
        )
    patches = np.concatenate(
        [_to_patches(_to_float(v), patch_px, patch_frames).reshape(-1, size) for v in videos]
    )
    mean = patches.mean(0, dtype=np.float64)
    centered = patches - mean
    variance, basis = np.linalg.eigh(centered.T @ centered / len(patches))
    variance, basis = variance[::-1][:components], basis[:, ::-1][:, :components]
    # eigh leaves the sign open: make the largest entry of each component positive
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(components)])
    std = np.sqrt(np.maximum(variance, 1e-12))
    scale = std**-0.5 / np.sqrt(std.mean())  # variance of component i: std_i / mean(std)
    return Codec(
        mean.astype(np.float32),
        basis.astype(np.float32),
        scale.astype(np.float32),
        patch_px,
        patch_frames,
    )


@functools.cache
def default_codec(size_px: int = 16, patch_frames: int = 4, components: int | None = None) -> Codec:
    """The codec of stories of `size_px`, fitted on a fixed set of them; the same on every call.

    Args:
        size_px: height and width of the frame, a multiple of 4.
        patch_frames: frames of a patch, 4 or 2.
        components: channels of the latents; a quarter of the values of a patch if None.
    """
    rng = np.random.default_rng(0)
    stories = [
        world.sample_story(rng, FIT_FRAMES, split='train', size_px=size_px)
        for _ in range(FIT_STORIES)
    ]
    return fit_codec(
        [world.render(story) for story in stories],
        components or 12 * patch_frames,
        patch_frames=patch_frames,
    )


def encode(codec: Codec, video: np.ndarray) -> np.ndarray:
    """Video to latents.

    Args:
        codec: the codec.
        video: [..., F, H, W, 3], float in [0, 1] or uint8.

    Returns:
        float32 [..., F/patch_frames, H/patch_px, W/patch_px, C].

    Raises:
        ValueError: if the video does not divide into patches.
    """
    patches = _to_patches(_to_float(video), codec.patch_px, codec.patch_frames)
    return (patches - codec.mean) @ codec.basis * codec.scale


def decode(codec: Codec, latents: np.ndarray) -> np.ndarray:
    """Latents [..., T, H, W, C] to float32 video [..., F, H * patch_px, W * patch_px, 3], clipped
    to [0, 1]."""
    patches = np.asarray(latents, np.float32) / codec.scale @ codec.basis.T + codec.mean
    return np.clip(_to_video(patches, codec.patch_px, codec.patch_frames), 0, 1)


def save_codec(path, codec: Codec) -> None:
    """Writes the codec as a safetensors file, at once, so that a kill leaves no half of it."""
    arrays = {
        name: np.ascontiguousarray(getattr(codec, name)) for name in ('mean', 'basis', 'scale')
    }
    patch = np.array([codec.patch_px, codec.patch_frames], np.int32)
    whole = f'{path}.tmp'
    safetensors.numpy.save_file(arrays | {'patch': patch}, whole)
    os.replace(whole, path)


def load_codec(path) -> Codec:
    """Reads a codec written by `save_codec`."""
    arrays = safetensors.numpy.load_file(path)
    patch_px, patch_frames = arrays.pop('patch').tolist()
    return Codec(**arrays, patch_px=patch_px, patch_frames=patch_frames)
