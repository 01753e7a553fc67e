"""Files of latents: what a video was decoded from, scene by scene.

`sample` writes one beside each video, OUT/video_0/latents.safetensors. Given to a later `sample`,
its scenes are extended without another way through mp4 and the VAE. It holds scene_0, scene_1, ...,
float32 [T, h, w, C] each, and what they belong to in its metadata.
"""

import dataclasses
import json
import pathlib

import numpy as np
import safetensors.numpy

from mask2dit_jax import storage, tensor_io

NAME = 'latents.safetensors'


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """Scenes as the transformer sees them.

    Attributes:
      scenes: float32 [T, h, w, C] of each scene.
      frames: pixel frames of each scene.
      codec: the fingerprint of the codec that they belong to.
      size_px: (H, W), height and width of the videos.
      model: where the transformer came from that made them.
    """

    scenes: list[np.ndarray]
    frames: list[int]
    codec: str
    size_px: tuple[int, int]
    model: str


def write(path, latents: Latents) -> None:
    """Writes a file of latents; its folder is made if needed."""
    path = pathlib.Path(path)
    tensors = {}
    for number, scene in enumerate(latents.scenes):
        tensors[f'scene_{number}'] = np.ascontiguousarray(scene, np.float32)

    described = {
        'latent_frames': [len(scene) for scene in latents.scenes],
        'frames': list(latents.frames),
        'codec': latents.codec,
        'size_px': list(latents.size_px),
        'model': latents.model,
    }
    # One entry: safetensors writes several in another order every time.
    content = safetensors.numpy.save(tensors, metadata={'latents': json.dumps(described)})

    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.whole_file(path) as temporary:
        temporary.write_bytes(content)


def read(path) -> Latents:
    """Reads a file of latents.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file, if it is damaged or something else.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} is not a file: give a video, or OUT/video_0 with the {NAME} that sample wrote.'
        )
    tensors, metadata = tensor_io.open_file(path)
    try:
        described = json.loads(metadata['latents'])
        names = [f'scene_{number}' for number in range(len(described['frames']))]
        scenes = [np.asarray(tensors[name]) for name in names]
        height_px, width_px = described['size_px']
        return Latents(
            scenes,
            described['frames'],
            described['codec'],
            (height_px, width_px),
            described['model'],
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f'{path} does not hold the latents of a video ({error!r}): give the {NAME} that sample '
            'wrote.'
        ) from error
