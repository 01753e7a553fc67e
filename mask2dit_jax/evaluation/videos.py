"""The videos that `sample` wrote, with their captions and scenes."""

import dataclasses
import pathlib
import re

from mask2dit_jax.data import story_file


@dataclasses.dataclass(frozen=True)
class Video:
    """A video file and its story: a caption and a number of frames per scene."""

    name: str
    path: pathlib.Path
    captions: tuple[str, ...]
    frames: tuple[int, ...]


def find_videos(folder, story=None) -> list[Video]:
    """All mp4 files of a folder with one story, or, without it, beside the story.json files in and
    below the folder.

    Raises:
      FileNotFoundError, ValueError: naming the file that is missing, or the story that has no
        frames or one scene.
    """
    folder = pathlib.Path(folder)
    stories = [pathlib.Path(story)] if story else sorted(folder.rglob('story.json'))
    if not stories:
        raise FileNotFoundError(
            f'{folder} holds no story.json: give --story, {{"scenes": [{{"caption": "...", '
            '"frames": 8}, ...]}.'
        )
    videos = []
    for path in stories:
        captions, frames = story_file.read_story(path)
        if not all(f and f > 0 for f in frames) or len(frames) < 2:
            raise ValueError(f'{path} must have two scenes or more, and "frames" in each.')
        files = (folder if story else path.parent).glob('*.mp4')
        files = sorted(
            files, key=lambda p: [int(n) if n.isdigit() else n for n in re.split(r'(\d+)', p.name)]
        )
        if not files:
            raise FileNotFoundError(f'{folder if story else path.parent} holds no mp4 file.')
        videos += [
            Video(
                p.relative_to(folder).with_suffix('').as_posix(), p, tuple(captions), tuple(frames)
            )
            for p in files
        ]
    return videos
