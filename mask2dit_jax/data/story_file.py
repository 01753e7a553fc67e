"""Story files, and the scenes of a video.

A story file says what a video shows and, if `sample` wrote it, everything else that it takes to
make the same video again:

    {"scenes": [{"caption": "red ring on gray moves left", "frames": 8}, {"caption": "it grows"}],
     "seed": 0, "steps": 50, ...}

One written by hand may have any of these settings; SETTINGS lists them.
"""

import hashlib
import json
import pathlib

import numpy as np

from mask2dit_jax import config as config_lib
from mask2dit_jax import paths, ranges

_SCENE = ('caption', 'frames')
_FORM = '{"scenes": [{"caption": "...", "frames": 8}, ...]}'


def split_scenes(video, frames: tuple[int, ...]) -> list[np.ndarray]:
    """Splits a video [F, H, W, 3] into its scenes.

    Args:
      video: the scenes, one after another.
      frames: pixel frames of each scene.
    """
    borders = np.cumsum(frames)[:-1]
    return np.split(video, borders)


def read_story(path) -> tuple[list[str], list[int | None]]:
    """Reads the scenes of a story file.

    Returns:
      The caption of each scene, and its number of frames, None where the file does not say.

    Raises:
      ValueError: naming the file, the scene and what is wrong in it.
    """
    return _scenes(path, _load(path))


def read_record(path) -> dict:
    """Reads a story file with all its settings.

    Returns:
      What the file holds. Files of given scenes that it names relatively are found from its own
      folder.

    Raises:
      ValueError: naming the file, the setting or scene and what is wrong in it.
    """
    record = _load(path)
    _scenes(path, record)

    for key, value in record.items():
        if key == 'scenes':
            continue
        if key not in SETTINGS:
            raise ValueError(f'{path} has an unknown setting "{key}"{_nearest(key, SETTINGS)}.')
        allowed = SETTINGS[key]
        if not allowed.allows(value):
            raise ValueError(f'{path} has "{key}": {json.dumps(value)}: use {allowed.says}.')

    given = record.get('given', [])
    folder = pathlib.Path(path).absolute().parent
    found = [e | {'file': str(folder / e['file'])} if e['file'] else e for e in given]
    return record | ({'given': found} if given else {})


def file_digest(path) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _load(path) -> dict:
    paths.check_local(story=path)
    try:
        record = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror}): check --story.') from error
    except ValueError as error:  # also of text that is not UTF-8
        raise ValueError(f'{path} is not a story file ({error}): write {_FORM}.') from error
    if not isinstance(record, dict) or not isinstance(record.get('scenes'), list):
        raise ValueError(f'{path} is not a story file, as it has no "scenes": write {_FORM}.')
    return record


def _scenes(path, record: dict) -> tuple[list[str], list[int | None]]:
    """Captions and frames."""
    scenes = record['scenes']
    if not scenes:
        raise ValueError(f'{path} has no scenes: write {_FORM}.')

    for number, scene in enumerate(scenes, 1):
        wrong = _wrong_in_scene(scene)
        if wrong:
            raise ValueError(f'{path}: scene {number} {wrong}: write {_FORM}.')
    return [scene['caption'] for scene in scenes], [scene.get('frames') for scene in scenes]


def _wrong_in_scene(scene) -> str | None:
    if not isinstance(scene, dict):
        return f'is {json.dumps(scene)}, not an object with a caption'
    unknown = sorted(set(scene) - set(_SCENE))
    if unknown:
        return f'has an unknown key "{unknown[0]}"{_nearest(unknown[0], _SCENE)}'
    if 'caption' not in scene:
        return 'has no caption'
    if not isinstance(scene['caption'], str):
        return f'has the caption {json.dumps(scene["caption"])}, which is not a text'
    frames = scene.get('frames')
    if frames is not None and not _is_whole(frames, 1):
        return f'has {json.dumps(frames)} frames, not a whole number from 1 on'
    return None


def _nearest(name: str, known) -> str:
    return ranges.nearest(name, known) or f'; there are {", ".join(known)}'


def _is_whole(value, least: int) -> bool:
    return ranges.is_whole(value) and value >= least


_SCALE = ranges.of(config_lib.SampleConfig, 'guidance')


def _is_guidance(value) -> bool:
    return all(map(_SCALE.allows, value if isinstance(value, list) and value else [value]))


def _is_given(value) -> bool:
    """Whether it is a list of {"file": text or null, "sha256": text, "scene": number}."""
    if not isinstance(value, list):
        return False
    for entry in value:
        if not isinstance(entry, dict) or set(entry) - {'file', 'sha256', 'scene'}:
            return False
        if 'file' not in entry or not isinstance(entry['file'], str | None):
            return False
        if not isinstance(entry.get('sha256', ''), str) or not _is_whole(entry.get('scene', 0), 0):
            return False
    return True


def _whole(least: int) -> ranges.Range:
    return ranges.Range(f'a whole number from {least} on', lambda value: _is_whole(value, least))


def _kind(kind, says: str) -> ranges.Range:
    return ranges.Range(says, lambda value: isinstance(value, kind))


def _or_null(allowed: ranges.Range) -> ranges.Range:
    return ranges.Range(
        f'{allowed.says}, or null', lambda value: value is None or allowed.allows(value)
    )


_TEXT = _kind(str, 'a text')
_FLAG = _kind(bool, 'true or false')

# What a story file may have besides scenes.
SETTINGS = {
    'checkpoint': _TEXT,
    'given': ranges.Range('a list of {"file": "a.mp4", "sha256": "..."}', _is_given),
    'given_frames': _or_null(_whole(1)),
    'num_videos': _whole(1),
    'first_index': _whole(0),
    'negative_prompt': _TEXT,
    'seed': ranges.of(config_lib.Config, 'seed'),
    'sampler': ranges.of(config_lib.SampleConfig, 'sampler'),
    'steps': ranges.of(config_lib.SampleConfig, 'steps'),
    'guidance': ranges.Range(f'{_SCALE.says}, or a list of one for each scene', _is_guidance),
    'joint': _whole(1),
    'window': _whole(1),
    'sinks': _whole(0),
    'fps': ranges.of(config_lib.DataConfig, 'fps'),
    'model': _kind(dict, 'an object'),
    'jax': _TEXT,
    'device': _TEXT,
    'mesh': ranges.Range(
        'a list of numbers of devices',
        lambda value: isinstance(value, list) and all(_is_whole(size, 1) for size in value),
    ),
    'height': _or_null(_whole(1)),
    'width': _or_null(_whole(1)),
    'dtype': _TEXT,
    'tiling': _FLAG,
    'decode_rule': _TEXT,
    'mask_padding': _FLAG,
    'lora': _or_null(_TEXT),
    'weights': _whole(0),
}
