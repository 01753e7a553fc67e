"""A fixed linear codec in the place of a VAE.

It projects space-time patches on the principal components of rendered stories. Component i is
scaled by std_i^(-1/2), and all components by one factor that makes the variance of the latents 1.
This lies half way between two worse choices: with raw components a model learns colours early and
actions late, with whitened ones the other way round.
"""

import dataclasses
import functools
import math

import numpy as np
import safetensors.numpy

from mask2dit_jax import tensor_io
from mask2dit_jax.stories import rendering, world

# The stories on which the default codec is fitted. They have fast and slow actions (scenes of 4 and
# of 8 frames), so that the codec serves scenes of all lengths.
FIT_STORIES = 512
FIT_FRAMES = (4, 4, 8)

# The same for a codec whose scenes have a first latent frame of one video frame.
FIT_FRAMES_AFTER_FIRST = (5, 9, 9)


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """A linear codec of patches of P = patch_frames * patch_px * patch_px * 3 values.

    Attributes:
        mean: [P] float32 mean patch.
        basis: [P, C] float32 orthonormal principal components, the largest first.
        scale: [C] float32 factor on each component.
        patch_px: height and width of a patch.
        patch_frames: frames of a patch.
        first: codec of the first frame of a scene, with patches of that frame alone, the same
            patch_px and C; None where the first frame is coded like all others.
    """

    mean: np.ndarray
    basis: np.ndarray
    scale: np.ndarray
    patch_px: int = 4
    patch_frames: int = 4
    first: 'Codec | None' = None


def encode(codec: Codec, video: np.ndarray, frames: tuple[int, ...] | None = None) -> np.ndarray:
    """Video to latents.

    Args:
        codec: the codec.
        video: [..., F, H, W, 3], float in [0, 1] or uint8.
        frames: video frames of each scene; None for one scene. Only a codec with a `first` has to
            know where scenes begin.

    Returns:
        float32 [..., T, H/patch_px, W/patch_px, C]. A scene of F frames has T = F/patch_frames, or
        (F - 1)/patch_frames + 1 where the first frame is coded alone.

    Raises:
        ValueError: if the video does not divide into patches.
    """
    if codec.first is None:
        return _encode_patches(codec, video)

    latents = []
    for scene in _split(video, frames):
        latents.append(_encode_patches(codec.first, scene[..., :1, :, :, :]))
        latents.append(_encode_patches(codec, scene[..., 1:, :, :, :]))
    return np.concatenate(latents, axis=-4)


def decode(
    codec: Codec, latents: np.ndarray, latent_frames: tuple[int, ...] | None = None
) -> np.ndarray:
    """Latents to video.

    Args:
        codec: the codec.
        latents: [..., T, H, W, C].
        latent_frames: latent frames of each scene; None for one scene. Only a codec with a `first`
            has to know where scenes begin.

    Returns:
        float32 [..., F, H * patch_px, W * patch_px, 3], clipped to [0, 1]. A scene of T latent
        frames has F = T * patch_frames, or 1 + (T - 1) * patch_frames where the first frame is
        coded alone.
    """
    if codec.first is None:
        return _decode_patches(codec, latents)

    video = []
    for scene in _split(latents, latent_frames):
        video.append(_decode_patches(codec.first, scene[..., :1, :, :, :]))
        video.append(_decode_patches(codec, scene[..., 1:, :, :, :]))
    return np.concatenate(video, axis=-4)


def _split(sequence, frames):
    """Scenes of [..., F, H, W, C], from the frames of each."""
    return np.split(sequence, np.cumsum(frames or ())[:-1].astype(int), axis=-4)


def _encode_patches(codec, video):
    """`encode` of frames that are all coded alike."""
    patches = _to_patches(_to_float(video), codec.patch_px, codec.patch_frames)
    return (patches - codec.mean) @ codec.basis * codec.scale


def _decode_patches(codec, latents):
    """`decode` of frames that are all coded alike."""
    patches = np.asarray(latents, np.float32) / codec.scale @ codec.basis.T + codec.mean
    video = _to_video(patches, codec.patch_px, codec.patch_frames)
    return np.clip(video, 0, 1)


@functools.cache
def default_codec(
    size_px: int = 16,
    patch_frames: int = 4,
    components: int | None = None,
    patch_px: int = 4,
    first_frame: bool = False,
) -> Codec:
    """The codec of stories of `size_px`, fitted on a fixed set of them; the same on every call.

    Args:
        size_px: height and width of the frame, a multiple of `patch_px`.
        patch_frames: frames of a patch, which divide 4.
        components: channels of the latents; a quarter of the values of a patch if None.
        patch_px: height and width of a patch.
        first_frame: whether the first frame of a scene is a latent frame of its own, as in
            CogVideoX's VAE.

    Returns:
        The codec.
    """
    rng = np.random.default_rng(0)
    videos = []
    fit_frames = FIT_FRAMES_AFTER_FIRST if first_frame else FIT_FRAMES
    for _ in range(FIT_STORIES):
        story = world.sample_story(rng, fit_frames, split='train', size_px=size_px)
        videos.append(rendering.render(story))

    components = components or patch_frames * patch_px**2 * 3 // 4
    if not first_frame:
        return fit_codec(videos, components, patch_px, patch_frames)

    scenes = [scene for video in videos for scene in _split(video, fit_frames)]
    first = fit_codec([scene[:1] for scene in scenes], components, patch_px, patch_frames=1)
    after = fit_codec([scene[1:] for scene in scenes], components, patch_px, patch_frames)
    return dataclasses.replace(after, first=first)


def fit_codec(videos, components: int = 48, patch_px: int = 4, patch_frames: int = 4) -> Codec:
    """Principal components of the patches of `videos`.

    Args:
        videos: uint8 or float-in-[0, 1] videos [F, H, W, 3], a list or an array.
        components: channels of the latents, at most the values of a patch.
        patch_px: height and width of a patch.
        patch_frames: frames of a patch.

    Returns:
        The codec.

    Raises:
        ValueError: if a video does not divide into patches, or `components` is not in 1 to P.
    """
    patch_size = patch_frames * patch_px * patch_px * 3
    if not 1 <= components <= patch_size:
        raise ValueError(
            f'{components} components asked of patches of {patch_size} values; use 1 to '
            f'{patch_size}.'
        )

    patches = []
    for video in videos:
        grid = _to_patches(_to_float(video), patch_px, patch_frames)  # [T, H, W, P]
        patches.append(grid.reshape(-1, patch_size))
    patches = np.concatenate(patches)  # [number of patches, P]

    # Principal components in float64; eigh sorts by variance, the smallest first.
    mean = patches.mean(0, dtype=np.float64)
    centered = patches - mean
    variance, basis = np.linalg.eigh(centered.T @ centered / len(patches))
    variance = variance[::-1][:components]  # [C]
    basis = basis[:, ::-1][:, :components]  # [P, C]

    # eigh leaves the sign open: make the largest entry of each component positive.
    largest = np.abs(basis).argmax(0)
    basis = basis * np.sign(basis[largest, np.arange(components)])

    # With this scale the variance of component i is std_i / mean(std), 1 on average.
    std = np.sqrt(np.maximum(variance, 1e-12))
    scale = std**-0.5 / np.sqrt(std.mean())

    return Codec(
        mean=mean.astype(np.float32),
        basis=basis.astype(np.float32),
        scale=scale.astype(np.float32),
        patch_px=patch_px,
        patch_frames=patch_frames,
    )


def _to_float(video):
    """uint8 or float video as float32 in [0, 1]."""
    video = np.asarray(video)
    if video.dtype == np.uint8:
        return video.astype(np.float32) / 255
    return video.astype(np.float32)


def _to_patches(video, patch_px, patch_frames):
    """[..., F, H, W, 3] to patches [..., F/patch_frames, H/patch_px, W/patch_px, P]."""
    *batch, frames, height, width, channels = video.shape
    if frames % patch_frames or height % patch_px or width % patch_px:
        raise ValueError(
            f'a video of {frames} frames of {height} x {width} px does not divide into patches of '
            f'{patch_frames} frames of {patch_px} x {patch_px} px; use multiples.'
        )
    T = frames // patch_frames
    H = height // patch_px
    W = width // patch_px

    blocks = video.reshape(
        math.prod(batch), T, patch_frames, H, patch_px, W, patch_px, channels
    ).transpose(0, 1, 3, 5, 2, 4, 6, 7)  # [B, T, H, W, patch_frames, patch_px, patch_px, 3]
    return blocks.reshape(*batch, T, H, W, patch_frames * patch_px * patch_px * channels)


def _to_video(patches, patch_px, patch_frames):
    """Inverse of `_to_patches`."""
    *batch, T, H, W, _ = patches.shape

    blocks = patches.reshape(
        math.prod(batch), T, H, W, patch_frames, patch_px, patch_px, 3
    ).transpose(0, 1, 4, 2, 5, 3, 6, 7)  # [B, T, patch_frames, H, patch_px, W, patch_px, 3]
    return blocks.reshape(*batch, T * patch_frames, H * patch_px, W * patch_px, 3)


_ARRAYS = ('mean', 'basis', 'scale')


def save_codec(path, codec: Codec) -> None:
    """Writes the codec as a safetensors file.

    Args:
        path: of the file.
        codec: the codec.
    """
    tensors = _tensors(codec)
    tensors['patch'] = np.array([codec.patch_px, codec.patch_frames], np.int32)
    if codec.first is not None:
        tensors |= {f'first_{name}': value for name, value in _tensors(codec.first).items()}
    tensor_io.write_file(path, tensors)


def _tensors(codec):
    """The arrays of a codec, by name."""
    # safetensors writes the memory of an array as it lies there. That of a basis from eigh is
    # transposed: without a contiguous copy, the loaded codec would be another one.
    return {name: np.ascontiguousarray(getattr(codec, name)) for name in _ARRAYS}


def load_codec(path) -> Codec:
    """Reads a codec that `save_codec` wrote.

    Args:
        path: of the file.

    Returns:
        The codec.
    """
    tensors = safetensors.numpy.load_file(path)
    patch_px, patch_frames = tensors['patch'].tolist()
    codec = Codec(*(tensors[name] for name in _ARRAYS), patch_px, patch_frames)
    if 'first_basis' not in tensors:
        return codec

    first = Codec(*(tensors[f'first_{name}'] for name in _ARRAYS), patch_px, patch_frames=1)
    return dataclasses.replace(codec, first=first)
