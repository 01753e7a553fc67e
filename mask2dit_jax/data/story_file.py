"""Story files, and the scenes of a video."""

import json
import pathlib

import numpy as np

from mask2dit_jax import paths, ranges


def split_scenes(video, frames: tuple[int, ...]) -> list[np.ndarray]:
    """Splits a video [F, H, W, 3] into its scenes.

    Args:
      video: the scenes, one after another.
      frames: pixel frames of each scene.
    """
    borders = np.cumsum(frames)[:-1]
    return np.split(video, borders)


def read_story(path) -> tuple[list[str], list[int | None]]:
    """Reads a story file.

    Returns:
      The caption of each scene, and its number of frames, None where the file does not say.

    Raises:
      ValueError: naming the file and what is wrong in it.
    """
    paths.check_local(story=path)
    form = '{"scenes": [{"caption": "...", "frames": 8}, ...]}'
    try:
        scenes = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))['scenes']
        captions = [scene['caption'] for scene in scenes]
        frames = [scene.get('frames') for scene in scenes]
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror}): check --story.') from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not a story file ({error!r}): write {form}.') from error

    texts_fit = all(isinstance(caption, str) for caption in captions)
    frames_fit = all(
        number is None or (ranges.is_whole(number) and number > 0) for number in frames
    )
    extra = sorted({key for scene in scenes for key in scene} - {'caption', 'frames'})
    if not captions or extra or not texts_fit or not frames_fit:
        raise ValueError(
            f'{path} needs a text caption and whole frames per scene and nothing else '
            f'{extra or ""}: write {form}.'
        )
    return captions, frames
