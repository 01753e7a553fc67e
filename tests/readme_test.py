"""The commands of README.md and of the pages that it links, as they stand there, on tiny models;
those of one heading after the other in one folder.

What is too large for a test is replaced as MINIATURE says, and what is not run here is run where
ELSEWHERE says.
"""

import ast
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from mask2dit_jax.data import video
from mask2dit_jax.tools import random_model, report

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    ROOT / 'README.md',
    ROOT / 'launch/README.md',
    # The stories' page describes them to TFDS.
    *sorted(p for p in (ROOT / 'mask2dit_jax').glob('*/README.md') if p.parent.name != 'stories'),
]
README = PAGES[0].read_text(encoding='utf-8')
# All pages as one; no two have the same heading.
TEXT = '\n## End of a page\n'.join(page.read_text(encoding='utf-8') for page in PAGES)

_SHORT = ' '.join(
    f'--config.{value}'
    for value in (
        'data.num_train=64',
        'data.num_test=16',
        'train.steps=2',
        'train.conditional_from_step=0',
        'sample.steps=1',
        'sample.sheet_stories=2',
        'eval.stories=4',
        'eval.batch_size=4',
    )
)
MINIATURE = {  # regular expressions
    r'configs/tiny.py(?= )': 'configs/tiny.py:smoke',
    r'configs/tiny.py:lora': f'configs/tiny.py:lora {_SHORT}',
    r'configs/tiny.py:extend': f'configs/tiny.py:extend {_SHORT}',
    r'--scenes=50 --stories=128 --steps=10': '--scenes=4 --stories=2 --steps=1',
    r'runs/unconditional|runs/dual': 'runs/tiny',
    r'runs/full,runs/isolated': 'runs/lora',
    r'configs/sft.py:5b': 'configs/sft.py:tiny --config.train.steps=2 '
    '--config.train.conditional_from_step=0',
    r'--config.lora.rank=64': '--config.lora.rank=4',
    r'hf download .*': 'test -d models/tiny',
    r'\bDIR\b|CogVideoX-5b': 'models/tiny',
    r'clip\.mp4': 'data/videos/carphone_pristine_0.mp4',
    r'_frames=49': '_frames=9',
    r'--frames=49': '--frames=9',
    r'clip-vit-large-patch14': 'models/encoders/clip',
    r'dinov2-base': 'models/encoders/dinov2',
    r'videomae-base-finetuned-kinetics': 'models/encoders/videomae',
    r'real_videos': 'data/videos',
    r'viclip.safetensors': 'features.safetensors',
}
QUICK = (
    'First light, on a laptop',
    'Train on your own videos',
    'Scoring videos',
    'Reports',
)
# These have tests of what they do, and take minutes as commands.
HEADINGS = (
    *QUICK[:2],
    'Generate with released weights',
    'Released weights, in and out',
    'LoRA',
    'What the masks do, measured',
    *QUICK[2:],
    'Figures',
)
ELSEWHERE = {  # the start of a command: the file that runs it, and what stands there
    'pip install': ('.ci/run', 'pip install'),
    'ruff check': ('.ci/run', 'ruff check .'),
    'ruff format': ('.ci/run', 'ruff format --check .'),
    'pytest': ('.ci/run', 'pytest -n 2 --dist loadfile'),
    'python -m mask2dit_jax.main --config=configs/tiny.py --config.mesh.data=2': (
        'tests/training/survival_test.py',
        '--coordinator=localhost:',
    ),
    'python -m mask2dit_jax.aot': ('tests/readme_test.py', 'def test_it_fits'),
    'python -m mask2dit_jax.benchmark': ('tests/readme_test.py', 'def test_benchmarks'),
    'launch/local.sh': ('tests/launch_test.py', 'def test_two_local_processes_train'),
    'launch/': ('tests/readme_test.py', 'def test_pods'),
}


def blocks(heading: str, language: str = 'bash') -> list[str]:
    """The code blocks under a heading."""
    section = re.split(r'\n## ', TEXT.split(f'\n## {heading}\n')[1])[0]
    return re.findall(rf'```{language}\n(.*?)```', section, re.DOTALL)


def commands(heading: str) -> list[str]:
    """One line per command, without comments."""
    text = '\n'.join(blocks(heading)).replace('\\\n', ' ')
    lines = [re.sub(r'\s+#.*', '', line).strip() for line in text.splitlines()]
    # ssh-add takes the user's own key, which a test has not.
    return [
        re.sub(' +', ' ', line) for line in lines if line and not line.startswith(('#', 'ssh-add'))
    ]


def elsewhere(command: str) -> tuple[str, str] | None:
    return next((where for start, where in ELSEWHERE.items() if command.startswith(start)), None)


def shell(lines, folder, timeout=900) -> str:
    # tensorboardX imports torch where it can, which takes as long as everything else that is
    # imported.
    (folder / 'without').mkdir(exist_ok=True)
    (folder / 'without/torch.py').write_text('raise ImportError("left out")')
    # Compiled as in conftest.py: quickly, to slower code.
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'PYTHONPATH': f'{ROOT}:{folder}/without',
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}',
    }
    done = subprocess.run(
        ['bash', '-euxc', '\n'.join(lines)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return done.stdout


def miniature(heading: str) -> list[str]:
    lines = [line for line in commands(heading) if not elsewhere(line)]
    for pattern, small in MINIATURE.items():
        lines = [re.sub(pattern, small, line) for line in lines]
    return lines


def test_every_command_is_run():
    """Under headings that are run here, or where ELSEWHERE says."""
    headings = [h for h in re.findall(r'^## (.*)$', TEXT, re.MULTILINE) if h != 'End of a page']
    assert len(set(headings)) == len(headings), 'two pages have the same heading'
    for heading in headings:
        for line in commands(heading):
            where = elsewhere(line)
            assert heading in HEADINGS or where, f'{heading}: nothing runs {line}'
            if where:
                assert where[1] in (ROOT / where[0]).read_text(encoding='utf-8')


def was_trained(folder, out):
    assert 'Next: python -m mask2dit_jax.sample' in out
    assert len(video.read_video(folder / 'samples/video_0.mp4')[0]) == 12
    (python,) = blocks('From Python', 'python')
    (folder / 'five_lines.py').write_text(python)
    assert '(4, 16, 16, 3)' in shell(['python five_lines.py'], folder)
    assert (folder / 'samples/python/video_0.mp4').is_file()


def was_encoded_and_tuned(folder, out):
    assert (
        '14 of 14 clips are in the data set' in out and '11 of 11 clips are in the data set' in out
    )
    assert len(video.read_video(folder / 'samples/made/video_0.mp4')[0]) == 27
    assert len(video.read_video(folder / 'samples/extended/video_0.mp4')[0]) == 18
    for stage in 'pretrained', 'finetuned':
        assert len(list((folder / 'runs' / stage / 'sheets').glob('*.png'))) == 2


def was_generated(folder, out):
    # Scenes of 5 frames, for which the tiny networks are made, and a given one of 9.
    assert len(video.read_video(folder / 'samples/5b/video_0.mp4')[0]) == 3 * 5
    assert len(video.read_video(folder / 'samples/5b_extended/video_0.mp4')[0]) == 9 + 5


def was_converted(folder, out):
    for network in 'transformer', 'vae', 'text_encoder':
        assert (folder / 'back' / network / 'config.json').is_file()
    assert (folder / 'exported/transformer/config.json').is_file()


def was_adapted(folder, out):
    assert (folder / 'lora/pytorch_lora_weights.safetensors').is_file()
    assert (folder / 'samples/lora_file/video_0.mp4').is_file()


def was_ranked(folder, out):
    assert json.loads((folder / 'rank/rank.json').read_text())['comparisons']


def was_scored(folder, out):
    scores = json.loads((folder / 'scores/evaluation.json').read_text())
    assert {'video_0', 'made/video_0', 'extended/video_0'} <= {v['name'] for v in scores['videos']}
    assert 'visual' in scores['summary']
    assert len(list((folder / 'vbench/videos').glob('a man talks in a car-?.mp4'))) == 5
    assert (folder / 'vbench_long/clips.json').is_file()


def was_reported(folder, out):
    page = (folder / 'report/index.html').read_text(encoding='utf-8')
    assert 'red ring on gray moves left' in page and report._METRICS['visual'] in page


def was_drawn(folder, out):
    assert (folder / 'masks.png').is_file()


CHECKS = dict(
    zip(
        HEADINGS,
        (
            was_trained,
            was_encoded_and_tuned,
            was_generated,
            was_converted,
            was_adapted,
            was_ranked,
            was_scored,
            was_reported,
            was_drawn,
        ),
        strict=True,
    )
)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    return tmp_path


@pytest.mark.skipif(
    importlib.util.find_spec('skvideo') is None, reason='needs scikit-video (test extra)'
)
@pytest.mark.parametrize(
    'headings', [QUICK, pytest.param(HEADINGS, marks=pytest.mark.slow)], ids=['quick', 'all']
)
def test_from_the_top(headings, folder):
    """The commands of one heading after the other, and what they leave."""
    entry = {'prompt_en': 'a man talks in a car', 'dimension': ['subject_consistency']}
    (folder / 'VBench_full_info.json').write_text(json.dumps([entry]))
    for heading in headings:
        lines = miniature(heading)
        assert lines, heading
        if heading == 'Scoring videos':  # features and encoders that the README takes as given
            first = next(i for i, line in enumerate(lines) if '--features' in line)
            lines = [
                'python -m mask2dit_jax.tools.random_model --encoders --out=models/encoders',
                *lines[:first],
                'cp scores/features.safetensors .',
                *lines[first:],
            ]
        CHECKS[heading](folder, shell(lines, folder))


def test_from_python(folder):
    """The block of Python under 'Released weights', on the folder of tiny networks."""
    (python,) = blocks('Released weights, in and out', 'python')
    code = python.replace('DIR', 'models/tiny').replace('(13, 13, 13)', '(2, 2, 2)')
    before = (
        'import numpy as np\nlatents, text = np.ones((1, 6, 4, 4, 4)), np.ones((1, 3, 12, 24))\n'
        't, ids = np.zeros((1, 3), int), np.ones((1, 12), int)\n'
        'pixels = np.zeros((1, 9, 32, 32, 3))\n'
    )
    after = 'print(v.shape, mean.shape, pixels.shape, states.shape, len(tensors) > 20)\n'
    (folder / 'block.py').write_text(before + code + after)
    random_model.write(folder / 'models/tiny')
    assert (
        shell(['python block.py'], folder)
        == '(1, 6, 4, 4, 4) (1, 3, 4, 4, 4) (1, 9, 32, 32, 3) (1, 12, 24) True\n'
    )


def test_pods(tmp_path):
    """Every command prints what it would run; gcloud and xpk are not called."""
    lines = [
        line
        for line in commands('TPU slices')
        if line.startswith('launch/') and 'local.sh' not in line
    ]
    assert len(lines) == 4
    out = [
        shell(
            [
                re.sub('(--slice=)', r'--project=p --zone=z --dry-run \1', line, count=1).replace(
                    'launch/', f'{ROOT}/launch/'
                )
            ],
            tmp_path,
        )
        for line in lines
    ]
    assert 'queued-resources create' in out[0] or 'tpu-vm create' in out[0]
    assert all(text.strip() for text in out)


@pytest.mark.slow
@pytest.mark.parametrize('line', commands('Will it fit?'))
def test_it_fits(line, tmp_path):
    """Minutes each."""
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    assert 'DOES NOT FIT' not in shell([line], tmp_path, timeout=3600)


@pytest.mark.slow
@pytest.mark.parametrize('line', commands('Speed'))
def test_benchmarks(line, tmp_path):
    """Minutes each."""
    assert '|' in shell([line], tmp_path, timeout=3600)


def test_messages_of_troubleshooting_are_in_the_code():
    """… stands for what differs; words of the table that are no message are listed here."""
    rows = re.findall(
        r'^\| (.*?) \| .* \|$',
        README.split('\n## Troubleshooting\n')[1].split('\n## ')[0],
        re.MULTILINE,
    )
    quoted = [row.strip('`') for row in rows if row.startswith('`')]
    assert len(quoted) >= 10
    known = []
    for path in (ROOT / 'mask2dit_jax').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.JoinedStr):
                known.append(
                    ''.join(v.value if isinstance(v, ast.Constant) else '…' for v in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                known.append(node.value)
    for message in quoted:
        parts = [re.escape(part) for part in message.split('…')]
        assert any(re.search('.*'.join(parts), text) for text in known), message


def anchors(page: pathlib.Path) -> set[str]:
    headings = re.findall(r'^#+ (.*)$', page.read_text(encoding='utf-8'), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=[str(p.parent.name) for p in PAGES])
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)]+)\)', page.read_text(encoding='utf-8')):
        if target.startswith('http'):
            continue
        path, _, anchor = target.partition('#')
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_map_names_everything():
    section = README.split('\n## Map\n')[1].split('\n## ')[0]
    cells = re.findall(r'^\| (`[^|]*) \|', section, re.MULTILINE)
    named = {name for cell in cells for name in re.findall('`([^`]+)`', cell)}
    package = ROOT / 'mask2dit_jax'
    for name in named:
        assert any(p.exists() for p in (package / name, package / f'{name}.py', ROOT / name)), name
    there = {p.name for p in package.iterdir() if p.suffix == '.py'} - {'__init__.py'}
    there |= {f'{p.name}/' for p in package.iterdir() if p.is_dir()} - {'__pycache__/'}
    lost = {name for name in there if name not in named and name.removesuffix('.py') not in named}
    assert not lost, lost


def test_the_page_is_short():
    assert len(README.splitlines()) <= 250
