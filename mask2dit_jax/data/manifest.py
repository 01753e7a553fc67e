"""Manifests, the lists of videos and captions to encode; and which frames of a video make a clip.

A manifest is one of the reference's two files (a CSV of single clips for pretraining, a JSON of
stories for fine-tuning) or a JSON of story files.
"""

import csv
import dataclasses
import io
import json
import pathlib

from mask2dit_jax import paths

# Kinds of manifest, which are also the names of the data sets made of them.
SINGLE_SCENE, MULTI_SCENE = 'single_scene', 'multi_scene'
KINDS = (SINGLE_SCENE, MULTI_SCENE)
_CSV_COLUMNS = ('caption', 'path')
_JSON_FORM = (
    '[{"values": [{"url": "a.mp4", "caption": "..."}, ...]}, ...] or '
    '{"stories": [{"scenes": [{"video": "a.mp4", "caption": "...", "frames": 49}, ...]}, ...]}'
)


@dataclasses.dataclass(frozen=True)
class Clip:
    """One scene to be cut from a video.

    Attributes:
      story: number of its story; every clip of a CSV is a story of its own.
      scene: position in its story, from 0.
      path: the video.
      caption: what the scene shows.
      frames: frames of the clip, or None for the default of the data set.
      claims: what the manifest says about the video file, under 'frames', 'height_px' and
        'width_px'; a key is missing where the manifest says nothing.
      where: place in the manifest, for messages.
    """

    story: int
    scene: int
    path: pathlib.Path
    caption: str
    frames: int | None
    claims: dict[str, int]
    where: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with a row or a file.

    Attributes:
      kind: a word or two to count by.
      where: place in the manifest.
      path: the video, '' if the row names none.
      message: what is wrong, and what to do about it.
      used: whether the clip is in the data set all the same.
    """

    kind: str
    where: str
    path: str
    message: str
    used: bool = False


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    Attributes:
      kind: one of KINDS.
      clips: the usable rows, in the order of the file.
      problems: the rows that are not usable, and strange numbers in rows that are.
    """

    kind: str
    clips: list[Clip] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)


def read(path, root=None) -> Manifest:
    """Reads a manifest.

    A `.csv` file is the reference's list of single clips. Its columns are caption and path, and
    optionally num_frame, width and height.

    A `.json` file is the reference's list of stories, [{"values": [{"url", "caption"}, ...]}, ...],
    or {"stories": [{"scenes": [{"video", "caption", "frames"}, ...]}, ...]}, or one such story
    alone. Any scene may state its own number of frames.

    Other columns and keys are ignored.

    Args:
      path: the file.
      root: folder that the paths of videos are relative to; the manifest's own folder by default.

    Returns:
      The clips of the manifest, and a problem for each row that is not usable.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is not a manifest of either kind, or has no usable row.
    """
    paths.check_local(manifest=path, root=root)
    path = pathlib.Path(path)
    root = pathlib.Path(root) if root else path.absolute().parent
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not a file: check --manifest.')
    try:
        text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 text ({error}): save it as UTF-8.') from error

    suffix = path.suffix.lower()
    if suffix == '.csv':
        manifest = _read_csv(path, text, root)
    elif suffix == '.json':
        manifest = _read_json(path, text, root)
    else:
        raise ValueError(f'{path} is neither .csv nor .json: name the manifest by its kind.')

    if not manifest.clips:
        problems = manifest.problems
        reason = ''
        if problems:
            reason = f'; first of {len(problems)} problems: {problems[0].message}'
        raise ValueError(f'{path} lists no usable clip{reason}.')
    return manifest


def _read_csv(path: pathlib.Path, text: str, root: pathlib.Path) -> Manifest:
    """Reads the reference's list of single clips."""
    rows = csv.reader(io.StringIO(text, newline=''))
    header = [name.strip() for name in next(rows, [])]
    missing = [name for name in _CSV_COLUMNS if name not in header]
    if missing:
        raise ValueError(
            f'{path} has no column {", ".join(missing)} in its first line, which must name the '
            'columns: fps,width,height,caption,path,num_frame.'
        )

    manifest = Manifest(SINGLE_SCENE)
    try:
        for row in rows:
            where = f'{path.name} line {rows.line_num}'
            if not row:
                continue
            if len(row) != len(header):
                message = f'{len(row)} fields instead of {len(header)}: quote captions with commas.'
                manifest.problems.append(Problem('malformed row', where, '', message))
                continue

            value = dict(zip(header, row))
            claims = {
                'frames': value.get('num_frame'),
                'height_px': value.get('height'),
                'width_px': value.get('width'),
            }
            _add_clip(
                manifest,
                root,
                where,
                story=len(manifest.clips),
                scene=0,
                file=value['path'],
                caption=value['caption'],
                frames=None,
                claims=claims,
            )
    except csv.Error as error:
        raise ValueError(
            f'{path} line {rows.line_num} is not CSV ({error}): repair or quote it.'
        ) from error
    return manifest


def _read_json(path: pathlib.Path, text: str, root: pathlib.Path) -> Manifest:
    """Reads the reference's list of stories, or story files."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f'{path} is not JSON ({error}): write {_JSON_FORM}.') from error

    stories = content
    if isinstance(content, dict):
        several = isinstance(content.get('stories'), list)
        stories = content['stories'] if several else [content]
    if not isinstance(stories, list):
        raise ValueError(f'{path} holds neither a list nor an object: write {_JSON_FORM}.')

    manifest = Manifest(MULTI_SCENE)
    for story, entry in enumerate(stories):
        scenes = None
        if isinstance(entry, dict):
            scenes = entry.get('scenes', entry.get('values'))
        if not isinstance(scenes, list) or not scenes:
            where = f'{path.name} story {story}'
            message = f'no list "values" or "scenes" of clips: write {_JSON_FORM}.'
            manifest.problems.append(Problem('malformed row', where, '', message))
            continue

        for scene, value in enumerate(scenes):
            where = f'{path.name} story {story} scene {scene}'
            if not isinstance(value, dict):
                message = 'a scene must be an object with a video and a caption.'
                manifest.problems.append(Problem('malformed row', where, '', message))
                continue

            # "frames" is not a claim: it says how long the clip is to be, not the video.
            claims = {'height_px': value.get('height'), 'width_px': value.get('width')}
            _add_clip(
                manifest,
                root,
                where,
                story=story,
                scene=scene,
                file=value.get('video', value.get('url')),
                caption=value.get('caption'),
                frames=value.get('frames'),
                claims=claims,
            )
    return manifest


def _add_clip(
    manifest: Manifest,
    root: pathlib.Path,
    where: str,
    *,
    story: int,
    scene: int,
    file,
    caption,
    frames,
    claims: dict,
) -> None:
    """Appends a clip to the manifest, or the problem with it; values are as the file has them."""
    refusal = _refusal(file, caption, frames)
    if refusal:
        named = file if isinstance(file, str) else ''
        manifest.problems.append(Problem('malformed row', where, named, refusal))
        return

    # Claims only serve to be compared with the video: a strange one is noted and dropped.
    numbers = {
        key: int(value)
        for key, value in claims.items()
        if value is not None and str(value).strip().isdecimal()
    }
    given = [key for key, value in claims.items() if value not in (None, '')]
    strange = [key for key in given if key not in numbers]
    if strange:
        message = (
            f'{", ".join(strange)} is {claims[strange[0]]!r}, which is not a whole number: the '
            'video file was asked instead.'
        )
        manifest.problems.append(Problem('strange number', where, file, message, used=True))

    video = root / file.strip()
    manifest.clips.append(Clip(story, scene, video, caption.strip(), frames, numbers, where))


def _refusal(file, caption, frames) -> str | None:
    """The reason why a row is not usable, or None if it is."""
    if not isinstance(file, str) or not file.strip():
        return 'it names no video.'
    if paths.is_remote(file.strip()):
        return 'its video is not on this machine: copy it, or mount its bucket.'
    if not isinstance(caption, str) or not caption.strip():
        return 'it has no caption.'
    if frames is None:
        return None
    # bool is a subclass of int.
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        return f'its number of frames is {frames!r}: write a whole number.'
    return None
