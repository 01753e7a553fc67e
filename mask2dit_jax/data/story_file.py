"""Story files, and the scenes of a video."""

import json
import pathlib

import numpy as np


def split_scenes(video, frames: tuple[int, ...]) -> list[np.ndarray]:
    """[F, H, W, 3] into its scenes."""
    return np.split(video, np.cumsum(frames)[:-1])


def read_story(path) -> tuple[list[str], list[int | None]]:
    """Captions and frames (None where not said) of a story file.

    Raises:
      ValueError: naming the file and what is wrong in it.
    """
    form = '{"scenes": [{"caption": "...", "frames": 8}, ...]}'
    try:
        scenes = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))['scenes']
        captions, frames = [s['caption'] for s in scenes], [s.get('frames') for s in scenes]
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror}): check --story.') from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is no story file ({error!r}): write {form}.') from error
    extra = sorted({k for s in scenes for k in s} - {'caption', 'frames'})
    if (
        not captions
        or extra
        or not all(isinstance(c, str) for c in captions)
        or not all(f is None or isinstance(f, int) for f in frames)
    ):
        raise ValueError(
            f'{path} needs a text caption and whole frames per scene and nothing else '
            f'{extra or ""}: write {form}.'
        )
    return captions, frames
