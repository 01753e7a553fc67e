"""Manifests of videos: the reference's CSV and JSON, and story files; and which frames of a video
make a clip."""

import csv
import dataclasses
import io
import json
import pathlib

import numpy as np

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
      story, scene: its place; scenes of a story follow each other.
      path: of the video.
      caption: what it shows.
      frames: of the clip, or None for the default.
      claims: what the manifest says of the file, 'frames', 'height_px' and 'width_px', where it
        does.
      where: its place in the manifest, for messages.
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
      kind: a word to count by.
      where: place in the manifest.
      path: of the video, '' if the row names none.
      message: what, and what to do.
      used: whether the clip is in the data set all the same.
    """

    kind: str
    where: str
    path: str
    message: str
    used: bool = False


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a manifest lists; kind is one of KINDS."""

    kind: str
    clips: list[Clip]
    problems: list[Problem]


def read(path, root=None) -> Manifest:
    """Reads a manifest.

    `.csv` is the reference's list of single clips, with columns caption and path, and num_frame,
    width and height if it likes. `.json` is its list of stories, {"values": [{"url", "caption"},
    ...]}, or {"stories": [{"scenes": [{"video", "caption", "frames"}, ...]}, ...]}, or one such
    story alone; any scene may say its own number of frames. Other keys and columns are ignored.

    Args:
      path: the file.
      root: folder that videos are relative to; the manifest's own by default.

    Returns:
      Its clips, and a problem for each row that names none.

    Raises:
      FileNotFoundError: without the file.
      ValueError: if it is neither kind of manifest.
    """
    path = pathlib.Path(path)
    root = pathlib.Path(root) if root else path.absolute().parent
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not a file: check --manifest.')
    try:
        text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 text ({error}): save it as UTF-8.') from error
    if path.suffix.lower() == '.csv':
        manifest = _read_csv(path, text, root)
    elif path.suffix.lower() == '.json':
        manifest = _read_json(path, text, root)
    else:
        raise ValueError(f'{path} is neither .csv nor .json: name the manifest by its kind.')
    if not manifest.clips:
        told = (
            f'; first of {len(manifest.problems)} problems: {manifest.problems[0].message}'
            if (manifest.problems)
            else ''
        )
        raise ValueError(f'{path} lists no usable clip{told}.')
    return manifest


def _read_csv(path, text, root) -> Manifest:
    rows = csv.reader(io.StringIO(text, newline=''))
    header = [h.strip() for h in next(rows, [])]
    missing = [c for c in _CSV_COLUMNS if c not in header]
    if missing:
        raise ValueError(
            f'{path} has no column {", ".join(missing)} in its first line, which must name the columns: '
            'fps,width,height,caption,path,num_frame.'
        )
    clips, problems = [], []
    try:
        for row in rows:
            where = f'{path.name} line {rows.line_num}'
            if not row:
                continue
            if len(row) != len(header):
                problems.append(
                    Problem(
                        'malformed row',
                        where,
                        '',
                        f'{len(row)} fields instead of {len(header)}: quote captions with commas.',
                    )
                )
                continue
            value = dict(zip(header, row))
            claims = {
                'frames': value.get('num_frame'),
                'height_px': value.get('height'),
                'width_px': value.get('width'),
            }
            _add(
                clips,
                problems,
                len(clips),
                0,
                value['path'],
                value['caption'],
                None,
                claims,
                where,
                root,
            )
    except csv.Error as error:
        raise ValueError(
            f'{path} line {rows.line_num} is no CSV ({error}): repair or quote it.'
        ) from error
    return Manifest(SINGLE_SCENE, clips, problems)


def _read_json(path, text, root) -> Manifest:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f'{path} is no JSON ({error}): write {_JSON_FORM}.') from error
    if isinstance(content, dict):
        content = content['stories'] if isinstance(content.get('stories'), list) else [content]
    if not isinstance(content, list):
        raise ValueError(f'{path} holds neither a list nor an object: write {_JSON_FORM}.')
    clips, problems = [], []
    for number, entry in enumerate(content):
        scenes = entry.get('scenes', entry.get('values')) if isinstance(entry, dict) else None
        if not isinstance(scenes, list) or not scenes:
            problems.append(
                Problem(
                    'malformed row',
                    f'{path.name} story {number}',
                    '',
                    f'no list "values" or "scenes" of clips: write {_JSON_FORM}.',
                )
            )
            continue
        for scene, value in enumerate(scenes):
            where = f'{path.name} story {number} scene {scene}'
            if not isinstance(value, dict):
                problems.append(
                    Problem(
                        'malformed row',
                        where,
                        '',
                        'a scene must be an object with a video and a caption.',
                    )
                )
                continue
            claims = {'height_px': value.get('height'), 'width_px': value.get('width')}
            _add(
                clips,
                problems,
                number,
                scene,
                value.get('video', value.get('url')),
                value.get('caption'),
                value.get('frames'),
                claims,
                where,
                root,
            )
    return Manifest(MULTI_SCENE, clips, problems)


def _add(clips, problems, story, scene, file, caption, frames, claims, where, root) -> None:
    """Appends a clip, or the problem with it."""

    def refuse(message):
        problems.append(
            Problem('malformed row', where, file if isinstance(file, str) else '', message)
        )

    if not isinstance(file, str) or not file.strip():
        return refuse('it names no video.')
    if not isinstance(caption, str) or not caption.strip():
        return refuse('it has no caption.')
    if frames is not None and (
        isinstance(frames, bool) or not isinstance(frames, int) or frames < 1
    ):
        return refuse(f'its number of frames is {frames!r}: write a whole number.')
    whole = {k: int(v) for k, v in claims.items() if v is not None and str(v).strip().isdecimal()}
    strange = [k for k, v in claims.items() if v not in (None, '') and k not in whole]
    if strange:
        problems.append(
            Problem(
                'strange number',
                where,
                file,
                f'{", ".join(strange)} is {claims[strange[0]]!r}: the file was asked instead.',
                used=True,
            )
        )
    clips.append(Clip(story, scene, root / file.strip(), caption.strip(), frames, whole, where))


def choose_frames(
    kind: str, available: int, frames: int, stride: int, rng: np.random.Generator
) -> np.ndarray:
    """Positions of a clip's frames in a video, by the reference's rules for each kind of manifest.

    single_scene: every stride-th frame of the middle nine tenths, from a random start. multi_scene:
      from a random start
    with the largest stride, at most the one asked for, that fits.

    Args:
      kind: one of KINDS.
      available: frames of the video.
      frames: of the clip.
      stride: 3 makes 8 frames per second of 24.
      rng: for the start.

    Returns:
      int [frames], ascending.

    Raises:
      ValueError: if the video is too short.
    """
    span = (frames - 1) * stride + 1
    if kind == SINGLE_SCENE:
        end = int(0.95 * available)
        first, last = int(0.05 * end), end - span
        # The reference's condition, rounding included, and what its own draw of the start needs.
        fits = int(available * (0.95 - 0.05) / stride) >= frames and first <= last
        needed = f'about {int(frames * stride / 0.9) + 2}'
    else:
        stride = next((s for s in range(stride, 0, -1) if (frames - 1) * s <= available - 1), 1)
        span = (frames - 1) * stride + 1
        first, last = 0, available - span
        fits, needed = last >= 0, str(frames)
    if not fits:
        raise ValueError(
            f'it has {available} frames and {frames} were asked for, which needs {needed}: give a longer '
            'video, fewer --frames or a smaller --stride.'
        )
    return int(rng.integers(first, last + 1)) + stride * np.arange(frames)
