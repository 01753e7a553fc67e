"""Buckets and URLs are refused wherever a path is given, and no folder appears in their place."""

import ast
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import mask2dit_jax
from mask2dit_jax import config as config_lib
from mask2dit_jax import paths, pipeline
from mask2dit_jax.data import manifest, precompute, story_file, video
from mask2dit_jax.evaluation import evaluator
from mask2dit_jax.pretrained import export, load, lora_files
from mask2dit_jax.tools import report
from mask2dit_jax.training import trainer

ROOT = pathlib.Path(__file__).parents[1]
BUCKET = 'gs://bucket/run'
FIX = 'mount it|copy it|mount or copy'

# Flags of text that are no paths.
NOT_PATHS = {
    'prompt',
    'global_prompt',
    'negative_prompt',
    'guidance',
    'mesh',
    'coordinator',
    'topology',
    'what',
    'category',
    'window',
    'sinks',
    'given_timestep',
}


@pytest.mark.parametrize(
    'path', ['gs://b/c', 's3://b', 'file:///tmp/x', 'https://h/x.mp4', 'gs:/b/c', 'a/gs://b']
)
def test_remote(path):
    assert paths.is_remote(path) and paths.is_remote(pathlib.Path(path)) == (path != 'a/gs://b')
    with pytest.raises(ValueError, match=f'--out is .*{FIX}'):
        paths.check_local(**{'--out': path})


@pytest.mark.parametrize(
    'path',
    ['runs/tiny', '/a/b', './gs:/b', 'a:b', 'configs/sft.py:5b', '', None, pathlib.Path('x')],
)
def test_local(path):
    assert not paths.is_remote(path)
    paths.check_local(out=path)


def flag_definitions(path):
    """The flags of text that a file defines, and those that it has checked."""
    defined, checked = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        values = [each.value for each in node.args if isinstance(each, ast.Constant)]
        if node.func.attr in ('DEFINE_string', 'DEFINE_multi_string', 'DEFINE_list'):
            defined.add(values[0])
        if node.func.attr == 'check_flags_local':
            checked |= set(values)
    return defined, checked


def test_every_flag_that_is_a_path_is_checked():
    commands = 0
    for path in (ROOT / 'mask2dit_jax').rglob('*.py'):
        defined, checked = flag_definitions(path)
        assert defined - NOT_PATHS == checked, path
        commands += bool(defined)
    assert commands > 10


def started(folder, *command):
    """What a command that fails in this folder says."""
    done = subprocess.run(
        [sys.executable, '-m', *command],
        cwd=folder,
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode, done.stdout
    assert not list(folder.iterdir())
    return done.stderr


@pytest.mark.parametrize(
    'command, named',
    [
        (
            (
                'mask2dit_jax.main',
                f'--config={ROOT}/configs/tiny.py:smoke',
                f'--workdir={BUCKET}',
            ),
            '--workdir',
        ),
        (
            ('mask2dit_jax.sample', '--workdir=x', '--prompt=a', '--given=a', f'--given={BUCKET}'),
            '--given',
        ),
    ],
)
def test_commands(command, named, tmp_path):
    said = started(tmp_path, *command)
    assert f'{named} is {BUCKET}, which is not on this machine' in said
    assert 'Traceback' not in said


def a_video():
    return pipeline.Video([np.zeros((4, 16, 16, 3), np.float32)], ['a'], 0, 4.0, {}, None)


JOB = precompute.Job(
    manifest='a.csv', root=None, folder=BUCKET, frames=9, height_px=8, width_px=8, stride=1,
    windows=1, seed=0, store='moments', tiling=False, dtype='float32', part_clips=1,
)  # fmt: skip


@pytest.mark.parametrize(
    'use',
    [
        lambda: mask2dit_jax.load(BUCKET),
        lambda: mask2dit_jax.load(pathlib.Path(BUCKET)),
        lambda: mask2dit_jax.load('runs/tiny', lora_file=BUCKET),
        lambda: a_video().save(BUCKET),
        lambda: trainer.train_and_evaluate(config_lib.Config(), BUCKET),
        lambda: trainer.train_and_evaluate(config_lib.Config(init_from=BUCKET), 'run'),
        lambda: trainer.train_and_evaluate(
            config_lib.Config(data=config_lib.DataConfig(dir=BUCKET)), 'run'
        ),
        lambda: config_lib.parse({'data': {'encoded': BUCKET}}),
        lambda: config_lib.parse({'data': {'held_out': BUCKET, 'encoded': 'x'}}),
        lambda: config_lib.load_run(BUCKET),
        lambda: pipeline.read_given(BUCKET, 16, 16, None, 0),
        lambda: video.read_video(BUCKET),
        lambda: video.probe(BUCKET),
        lambda: video.write_mp4(f'{BUCKET}/a.mp4', np.zeros((4, 16, 16, 3), np.uint8), 4.0),
        lambda: manifest.read(BUCKET),
        lambda: manifest.read('a.csv', BUCKET),
        lambda: story_file.read_story(BUCKET),
        lambda: precompute.precompute(JOB, 'out'),
        lambda: precompute.precompute(dataclasses.replace(JOB, folder='m'), BUCKET),
        lambda: export.convert_folder('m', BUCKET),
        lambda: export.convert_folder(BUCKET, 'm'),
        lambda: load.load_transformer(BUCKET),
        lambda: load.with_model_from(config_lib.Config(), BUCKET),
        lambda: lora_files.read_lora(BUCKET, None),
        lambda: evaluator.evaluate('videos', BUCKET, encoder='clip'),
        lambda: report.write(BUCKET, run='run'),
    ],
)
def test_from_python(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=FIX):
        use()
    assert not list(tmp_path.iterdir())


def test_rows_of_manifests(tmp_path):
    scenes = [{'video': BUCKET, 'caption': 'a'}, {'video': 'b.mp4', 'caption': 'b'}]
    path = tmp_path / 'stories.json'
    path.write_text(json.dumps({'stories': [{'scenes': scenes}]}))

    found = manifest.read(path)
    assert [clip.caption for clip in found.clips] == ['b']
    assert 'not on this machine' in found.problems[0].message
    assert found.problems[0].path == BUCKET
