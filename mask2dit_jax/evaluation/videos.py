"""The videos that `sample` wrote, with their captions and scenes."""

import dataclasses
import pathlib
import re

from mask2dit_jax.data import story_file


@dataclasses.dataclass(frozen=True)
class Video:
    """A video file and its story.

    Attributes:
      name: path of the file below the folder of all videos, without .mp4.
      path: of the file.
      captions: one per scene.
      frames: number of frames of each scene.
    """

    name: str
    path: pathlib.Path
    captions: tuple[str, ...]
    frames: tuple[int, ...]


def find_videos(folder, story=None) -> list[Video]:
    """Finds the videos of a folder and the story of each.

    Args:
      folder: with `story`, its own mp4 files are taken. Without, the mp4 files beside each
        story.json in it and in the folders below it.
      story: path of a story file for all videos.

    Raises:
      FileNotFoundError: if there is no story, or no mp4 file of a story.
      ValueError: naming the story that has only one scene, or a scene without a number of frames.
    """
    folder = pathlib.Path(folder)
    stories = [pathlib.Path(story)] if story else sorted(folder.rglob('story.json'))
    if not stories:
        raise FileNotFoundError(
            f'{folder} holds no story.json: give --story, {{"scenes": [{{"caption": "...", '
            '"frames": 8}, ...]}.'
        )

    videos = []
    for story_path in stories:
        captions, frames = story_file.read_story(story_path)
        if len(frames) < 2 or not all(count and count > 0 for count in frames):
            raise ValueError(f'{story_path} must have two scenes or more, and "frames" in each.')

        video_folder = folder if story else story_path.parent
        paths = sorted(video_folder.glob('*.mp4'), key=by_number)
        if not paths:
            raise FileNotFoundError(f'{video_folder} holds no mp4 file.')

        for path in paths:
            name = path.relative_to(folder).with_suffix('').as_posix()
            videos.append(Video(name, path, tuple(captions), tuple(frames)))
    return videos


def whole_videos(folder) -> list[pathlib.Path]:
    """All mp4 files in and below a folder, without the clips of single scenes that `sample` wrote
    in the folder of each video."""
    paths = []
    for path in sorted(pathlib.Path(folder).rglob('*.mp4')):
        is_scene = re.fullmatch(r'scene_\d+\.mp4', path.name)
        if not (is_scene and path.parent.with_name(f'{path.parent.name}.mp4').is_file()):
            paths.append(path)
    return paths


def by_number(path: pathlib.Path) -> list[int | str]:
    """Sort key that puts video_2.mp4 before video_10.mp4."""
    parts = re.split(r'(\d+)', path.name)
    return [int(part) if part.isdigit() else part for part in parts]
