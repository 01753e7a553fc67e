"""Story files, and the scenes of a video.

A story file says what a video shows and, if `sample` wrote it, everything else that it takes to
make the same video again:

    {"scenes": [{"caption": "red ring on gray moves left", "frames": 8}, {"caption": "it grows"}],
     "seed": 0, "steps": 50, ...}

One written by hand may have any of these settings; SETTINGS lists them. A scene may say "seconds"
in the place of "frames".

Two other forms are read, of which the scenes are all that is used:

* text, in a file that ends in .txt: captions between " | ", each with its seconds or without,
  "red ring on gray moves left [5s] | it grows [10s]". [5s#] says that the scene begins with a cut,
  as Infinity-RoPE has it; every scene here does;
* the JSON of StoryMem's ST-Bench and of EntityBench: {"scenes": [{"video_prompts": ["...", ...],
  "cut": [true, ...]}, ...]}, or "action_descriptions" in the place of "video_prompts". Every prompt
  is a scene here.
"""

import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable

import numpy as np
from absl import logging

from mask2dit_jax import config as config_lib
from mask2dit_jax import paths, ranges

_SCENE = ('caption', 'frames', 'seconds')
_FORM = '{"scenes": [{"caption": "...", "frames": 8}, ...]}'

# Keys of the prompts in the files of others; where a scene has both, the first counts.
_PROMPTS = ('video_prompts', 'action_descriptions')
_PROMPTS_FORM = '{"scenes": [{"video_prompts": ["...", ...], "cut": [true, ...]}, ...]}'
_TEXT_FORM = 'caption [5s] | caption [10s]'
_FORMS = (
    f'{_FORM}, the JSON of ST-Bench or EntityBench ({_PROMPTS_FORM}), or, in a .txt file, '
    f'{_TEXT_FORM}'
)


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


def lengths(
    scenes: list[dict], fps: float, nearest_frames: Callable[[float], int]
) -> list[int | None]:
    """Pixel frames of each scene of a record, None where it says nothing of its length.

    Args:
      scenes: the record's scenes.
      fps: frames per second of the model, which make frames of seconds.
      nearest_frames: a codec's, the nearest length that it can code.
    """
    frames = [scene.get('frames') for scene in scenes]
    timed = [i for i, scene in enumerate(scenes) if 'seconds' in scene]
    for i in timed:
        frames[i] = nearest_frames(scenes[i]['seconds'] * fps)
    if timed:
        made = [f'{scenes[i]["seconds"]:g} s to {frames[i]} frames' for i in timed]
        logging.info('Seconds at %g frames per second: %s.', fps, ', '.join(dict.fromkeys(made)))
    return frames


def _load(path) -> dict:
    paths.check_local(story=path)
    try:
        text = pathlib.Path(path).read_text(encoding='utf-8')
        if pathlib.Path(path).suffix == '.txt':
            return {'scenes': _scenes_of_text(path, text)}
        record = json.loads(text)
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror}): check --story.') from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f'{path} is not a story file ({error}): write {_FORMS}.') from error
    if not isinstance(record, dict) or not isinstance(record.get('scenes'), list):
        raise ValueError(f'{path} is not a story file, as it has no "scenes": write {_FORMS}.')
    if any(isinstance(scene, dict) and _prompts_key(scene) for scene in record['scenes']):
        return {'scenes': _scenes_of_prompts(path, record)}
    return record


def _scenes_of_text(path, text: str) -> list[dict]:
    """Scenes of "caption [5s] | caption [10s]"."""
    if len(text.split('|')) == 1 and len(text.strip().splitlines()) > 1:
        raise ValueError(
            f'{path} has several lines and no | between scenes: write {_TEXT_FORM}, on one line or '
            'several.'
        )

    scenes = []
    continued = []
    for number, part in enumerate(_unquoted(text).split('|'), 1):
        match = re.fullmatch(r'(.*?)(?:\[\s*(\d+\.?\d*)\s*s(#?)\s*\])?', part.strip(), re.DOTALL)
        words, seconds, cut = match.groups()
        caption = ' '.join(_unquoted(words).split())
        wrong = re.search(r'\[\s*[-+.\d][^\]]*(\]|$)', caption)
        if seconds and float(seconds) == 0:
            wrong = match
        if wrong:
            raise ValueError(
                f'{path}: scene {number} has "{wrong[0]}": give seconds above 0 at the end of a '
                f'caption, as in {_TEXT_FORM}.'
            )
        if not caption:
            raise ValueError(f'{path}: scene {number} has no caption: write {_TEXT_FORM}.')
        scenes.append({'caption': caption} | ({'seconds': float(seconds)} if seconds else {}))
        if number > 1 and not cut:
            continued.append(number)

    has_cuts = len(continued) < len(scenes) - 1
    _tell(path, scenes, continued if has_cuts else [], unused=[])
    return scenes


def _unquoted(text: str) -> str:
    """Text without one pair of quotes around all of it."""
    text = text.strip()
    is_quoted = len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]
    return text[1:-1] if is_quoted else text


def _prompts_key(scene: dict) -> str | None:
    return next((key for key in _PROMPTS if key in scene), None)


def _scenes_of_prompts(path, record: dict) -> list[dict]:
    """Scenes of ST-Bench's and EntityBench's JSON, one for each prompt."""
    scenes = []
    continued = []
    unused = [key for key in record if key != 'scenes']
    for number, scene in enumerate(record['scenes'], 1):
        wrong = _wrong_in_prompts(scene)
        if wrong:
            raise ValueError(f'{path}: scene {number} {wrong}: write {_PROMPTS_FORM}.')
        prompts = scene[_prompts_key(scene)]
        for caption, cut in zip(prompts, scene.get('cut', [True] * len(prompts))):
            scenes.append({'caption': caption})
            if len(scenes) > 1 and not _CUTS[cut]:
                continued.append(len(scenes))
        unused += [key for key in scene if key not in (_prompts_key(scene), 'cut', 'scene_num')]
    _tell(path, scenes, continued, unused)
    return scenes


# ST-Bench's instructions write texts, its program reads true and false.
_CUTS = {True: True, False: False, 'True': True, 'False': False}


def _wrong_in_prompts(scene) -> str | None:
    key = isinstance(scene, dict) and _prompts_key(scene)
    if not key:
        return f'has none of {", ".join(_PROMPTS)}'
    prompts = scene[key]
    if not isinstance(prompts, list) or not prompts:
        return f'has "{key}" that are not a list of texts'
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            return f'has the prompt {json.dumps(prompt)}, which is not a text'
    cuts = scene.get('cut', [True] * len(prompts))
    if not isinstance(cuts, list) or len(cuts) != len(prompts):
        return f'has a "cut" that is not a list of {len(prompts)}, one for each prompt'
    for cut in cuts:
        if not isinstance(cut, bool | str) or cut not in _CUTS:
            return f'has the cut {json.dumps(cut)}, which is neither true nor false'
    return None


def _tell(path, scenes: list[dict], continued: list[int], unused: list[str]) -> None:
    """Says what was made of a file of another form."""
    said = [f'{path} has {len(scenes)} scene(s)']
    if continued:
        numbers = ', '.join(map(str, continued))
        said.append(f'{numbers} should go on without a cut, but every scene begins with one here')
    if unused:
        said.append(f'not used: {", ".join(dict.fromkeys(unused))}')
    logging.info('%s.', '; '.join(said))


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


_SECONDS = ranges.Range(
    'a number above 0',
    lambda value: (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    ),
)


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
    if 'seconds' in scene and frames is not None:
        return 'has frames and seconds, of which one is enough'
    if 'seconds' in scene and not _SECONDS.allows(scene['seconds']):
        return f'has {json.dumps(scene["seconds"])} seconds, not {_SECONDS.says}'
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
    'global_prompt': _TEXT,
    'negative_prompt': _TEXT,
    'seed': ranges.of(config_lib.Config, 'seed'),
    'sampler': ranges.of(config_lib.SampleConfig, 'sampler'),
    'steps': ranges.of(config_lib.SampleConfig, 'steps'),
    'guidance': ranges.Range(f'{_SCALE.says}, or a list of one for each scene', _is_guidance),
    **{name: ranges.of(config_lib.SampleConfig, name) for name in config_lib.HOW},
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
