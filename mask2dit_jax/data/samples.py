"""A folder of samples: the videos of one story, which its story.json makes again to the byte.

    OUT/
      story.json         the story, and everything else that it takes to make the videos again
      video_0.mp4        the whole video; written last, so that everything else of it is there
      video_0.gif
      sheet_0.png        contact sheet: a row of frames for each scene, with its caption
      video_0/
        scene_0.mp4      each scene as a clip of its own
        latents.safetensors
      video_1.mp4 ...

Whole videos lie beside story.json, and nothing else that ends in .mp4: that is how other commands
find them. story.json comes first. Every file appears whole, so that a video is done when its files
are there, and a killed command goes on with those that are not. While a story is told scene by
scene, the latents are those of the scenes that are done, from which it goes on.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from mask2dit_jax import storage
from mask2dit_jax.data import latent_file, sheets
from mask2dit_jax.data import video as video_lib

STORY = 'story.json'

# The size at which small videos are written: their pixels become squares.
_WRITTEN_SIZE_PX = 256

# What a record does not say for certain before the transformer has been read.
UNCERTAIN = ('checkpoint', 'weights')

# What `overwrite` deletes: nothing but what was written here.
_OURS = r'(video_\d+\.(mp4|gif)|sheet_\d+\.png)(\.unfinished)?|video_\d+|story\.json\.unfinished'
_OURS_WITHIN = r'(scene_\d+\.mp4|latents\.safetensors)(\.unfinished)?'


class OtherStoryError(ValueError):
    """The folder belongs to another story."""


@dataclasses.dataclass(frozen=True)
class Video:
    """One generated video.

    Attributes:
      scenes: pixels of each scene, float32 in [0, 1], [F, H, W, 3]; the given ones come first.
      captions: one for each scene.
      num_given: how many leading scenes were given.
      fps: frames per second.
      record: everything that it takes to make the video again, as story.json holds it.
      latents: latent_file.Latents that the scenes were decoded from.
    """

    scenes: list[np.ndarray]
    captions: list[str]
    num_given: int
    fps: float
    record: dict
    latents: latent_file.Latents

    def save(self, folder, overwrite: bool = False) -> None:
        """Writes what `sample` writes: story.json, video_0.mp4, video_0.gif, sheet_0.png, and in
        video_0/ each scene as a clip, and the latents.

        Args, Raises: as `save`.
        """
        save([self], folder, overwrite)


def save(videos: Sequence[Video], folder, overwrite: bool = False) -> None:
    """Writes videos of one story to a folder, which belongs to that story from then on.

    Args:
      videos: of one call of generate, consecutive, with the same captions.
      folder: made if it is not there. What it has already of the same videos is kept.
      overwrite: delete the samples of another story that the folder holds.

    Raises:
      ValueError: if the videos are not of one story, or the folder belongs to another one.
      storage.ClaimedError, storage.OutputError: if the folder cannot be written.
    """
    storage.try_output(folder, 'the argument folder')
    first = videos[0].record
    for i, video in enumerate(videos):
        if video.record != first | {'first_index': first['first_index'] + i}:
            raise ValueError(
                f'Video {i} does not follow video 0 in the same story: save it in a folder of its '
                'own.'
            )

    with storage.claim(folder) as hold:
        for index in begin(folder, first | {'num_videos': len(videos)}, overwrite):
            hold.check()
            write(folder, index, videos[index])


def read(folder) -> dict | None:
    """What the story.json of a folder holds, or None if there is none that can be read."""
    try:
        return json.loads((pathlib.Path(folder) / STORY).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None


def check(folder, record: dict, but: Iterable[str] = ()) -> None:
    """Checks that a folder may get the videos of a story.

    Args:
      folder: the folder.
      record: of story.json.
      but: keys that are not compared.

    Raises:
      OtherStoryError: if it holds samples of another story, or more of this one.
    """
    folder = pathlib.Path(folder)
    record = json.loads(json.dumps(record))
    expected = {f'video_{i}.mp4' for i in range(record['num_videos'])}
    there = {path.name for path in folder.glob('*.mp4')}
    is_told = (folder / STORY).exists()
    # Latents would be taken for those of this story, and told on.
    orphans = [
        f'{path.parent.name}/{path.name}' for path in folder.glob(f'video_*/{latent_file.NAME}')
    ]

    found = read(folder) if is_told else {}
    if not isinstance(found, dict):
        differences = [f'{STORY} is damaged']
    elif not is_told and (there or orphans):
        differences = [f'{sorted([*there, *orphans])[0]} has no {STORY}']
    elif not is_told:
        return
    else:
        differences = compare(found, record, {'num_videos', *but})
        told = found.get('num_videos', 0)
        if not differences and told > record['num_videos']:
            differences = [f'{told} videos, not {record["num_videos"]}']
        elif not differences and there - expected:
            differences = [f'{sorted(there - expected)[0]} is not of this story']
    if differences:
        raise OtherStoryError(
            f'{folder} holds other samples ({"; ".join(differences)}): choose another folder, or '
            'delete them by --overwrite (overwrite=True in Python).'
        )


def compare(old: dict, new: dict, but: Iterable[str] = ()) -> list[str]:
    """A phrase for each key of two records in which they differ, besides those of `but`."""
    new = json.loads(json.dumps(new))
    phrases = []
    for key in sorted((old.keys() | new.keys()) - set(but)):
        if key in old and key in new and old[key] == new[key]:
            continue
        values = [json.dumps(record.get(key)) for record in (old, new)]
        is_short = max(map(len, values)) <= 80
        phrases.append(f'{key} {values[0]}, not {values[1]}' if is_short else f'other {key}')
    return phrases


def missing(folder, record: dict) -> list[int]:
    """The numbers of the videos that are not there, or not completely."""
    folder = pathlib.Path(folder)
    num_scenes = len(record['scenes'])
    lacking = []
    for index in range(record['num_videos']):
        names = [f'video_{index}.mp4', f'video_{index}.gif', f'sheet_{index}.png']
        names += [f'video_{index}/scene_{number}.mp4' for number in range(num_scenes)]
        names.append(f'video_{index}/{latent_file.NAME}')
        if not all((folder / name).is_file() for name in names):
            lacking.append(index)
    return lacking


def is_done(folder, record: dict) -> bool:
    """Whether a folder has all the videos of a story, as far as that is certain before the
    transformer is read: no file of the model or of LoRA has been touched since."""
    found = read(folder)
    is_same = isinstance(found, dict) and not compare(found, record, ['weights'])
    if not is_same or missing(folder, record):
        return False

    then = (pathlib.Path(folder) / STORY).stat().st_mtime_ns
    sources = [pathlib.Path(record[key]) for key in ('checkpoint', 'lora') if record.get(key)]
    inside = itertools.chain.from_iterable(source.rglob('*') for source in sources)
    return all(path.stat().st_ctime_ns < then for path in (*sources, *inside))


def begun_from(folder, record: dict) -> str | None:
    """The checkpoint from which a part of a story's videos has been made, if others are missing."""
    found = read(folder)
    if not isinstance(found, dict) or compare(found, record, (*UNCERTAIN, 'num_videos')):
        return None
    return found.get('checkpoint') if missing(folder, found) else None


def begin(folder, record: dict, overwrite: bool = False) -> list[int]:
    """Makes a claimed folder one of this story.

    Args:
      folder: the folder.
      record: of story.json.
      overwrite: delete the samples of another story.

    Returns:
      The numbers of the videos that are still to be written.

    Raises:
      OtherStoryError: as `check`; with `overwrite` only for videos that nothing here wrote.
    """
    folder = pathlib.Path(folder)
    try:
        check(folder, record)
    except OtherStoryError:
        if not overwrite:
            raise
        _clear(folder)

    text = json.dumps(record, indent=2) + '\n'
    path = folder / STORY
    with storage.writing(folder):
        if not path.exists() or path.read_text(encoding='utf-8') != text:
            storage.write_text(path, text)
    return missing(folder, record)


def _clear(folder: pathlib.Path) -> None:
    """Deletes what was written here, story.json at the end: a kill leaves other samples, still."""
    foreign = [p.name for p in folder.glob('*.mp4') if not re.fullmatch(_OURS, p.name)]
    if foreign:
        raise OtherStoryError(
            f'{folder} holds {foreign[0]}, which sample did not write and so does not delete: '
            'choose another folder.'
        )
    with storage.writing(folder):
        for path in sorted(folder.iterdir()):
            if re.fullmatch(_OURS, path.name):
                _delete(path)
        with contextlib.suppress(FileNotFoundError):
            (folder / STORY).unlink()


def _delete(path: pathlib.Path) -> None:
    """Deletes a file, or what was written here in the folder of a video."""
    if not path.is_dir():
        path.unlink()
        return
    for inner in path.iterdir():
        if re.fullmatch(_OURS_WITHIN, inner.name):
            inner.unlink()
    if not any(path.iterdir()):
        path.rmdir()


def write(folder, index: int, video: Video) -> None:
    """Writes one video to a folder that `begin` has prepared.

    Raises:
      storage.OutputError: if the disk is full, for example.
    """
    write_latents(folder, index, video.latents)
    for number, scene in enumerate(video.scenes):
        write_scene(folder, index, number, scene, video.fps)
    write_whole(folder, index, video.scenes, video.captions, video.num_given, video.fps)


def write_latents(folder, index: int, latents: latent_file.Latents) -> None:
    """Writes the latents of a video, or of those of its scenes that are done."""
    with storage.writing(folder):
        latent_file.write(latents_path(folder, index), latents)


def latents_path(folder, index: int) -> pathlib.Path:
    """Where the latents of a video are."""
    return pathlib.Path(folder) / f'video_{index}' / latent_file.NAME


def write_scene(folder, index: int, number: int, pixels, fps: float) -> None:
    """Writes a scene [F, H, W, 3] as a clip."""
    path = pathlib.Path(folder) / f'video_{index}' / f'scene_{number}.mp4'
    with storage.writing(folder):
        video_lib.write_mp4(path, pixels, fps, _scale(pixels))


def write_whole(
    folder, index: int, scenes: Sequence[np.ndarray], captions, num_given: int, fps: float
) -> None:
    """Writes the contact sheet, the gif and the mp4 of a video whose scenes are written."""
    folder = pathlib.Path(folder)
    name = f'video_{index}'
    pixels = np.concatenate(scenes)  # [F, H, W, 3]
    given = [s < num_given for s in range(len(scenes))]

    with storage.writing(folder):
        sheet = sheets.contact_sheet(scenes, captions, given=given)
        video_lib.write_png(folder / f'sheet_{index}.png', sheet)
        video_lib.write_gif(folder / f'{name}.gif', pixels, fps, _scale(pixels))
        video_lib.write_mp4(folder / f'{name}.mp4', pixels, fps, _scale(pixels))


def _scale(pixels) -> int:
    return max(1, _WRITTEN_SIZE_PX // pixels.shape[1])
