"""The page of a run is well-formed, complete and readable, and says what is missing; a browser
plays its videos."""

import collections
import html.parser
import json
import re
import shutil
import subprocess
import sys
import urllib.parse

import numpy as np
import pytest

from mask2dit_jax import config as config_lib
from mask2dit_jax import storage
from mask2dit_jax.data import sheets, video
from mask2dit_jax.tools import report
from mask2dit_jax.training import metric_writer

NASTY = '<b onclick="alert(1)">red & "blue" ring\'s</b>'
VOID = {'meta', 'img', 'br', 'hr', 'input', 'link'}
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')


def pixels(scenes, size=32):
    ramp = np.linspace(0, 255, sum(scenes)).astype(np.uint8)
    return np.broadcast_to(ramp[:, None, None, None], (sum(scenes), size, size, 3))


def write_json(path, content):
    path.write_text(json.dumps(content))


def write_run(folder, steps=60):
    """A workdir as train writes it, without checkpoints; sample grids of two steps."""
    folder.mkdir()
    base = f'{NASTY}/{"long" * 40}'
    config = config_lib.parse({'train': {'steps': steps}, 'init_from': base})
    config_lib.save(config, folder / 'config.json')

    writer = metric_writer.MetricWriter(folder, steps)
    for step in range(10, 61, 10):
        loss = float('nan') if step == 30 else 1 / step
        writer.write(step, {'loss': loss, 'grad_norm': 0.5, 'data_wait': 0.01})
    writer.close()

    story = np.split(pixels((4, 4)), 2)
    captions = [['a ball', NASTY]]
    grid = sheets.story_grid([story], captions)
    for name in '00000030_generated', '00000060_extended', '00000060_generated':
        video.write_png(folder / f'sheets/{name}.png', grid)
        write_json(folder / f'sheets/{name}.json', {'stories': captions, 'given_scenes': 0})

    scores = {'action': 1.0, 'leak': 0.25, 'residual': 0.3, 'action/2': 1.0, 'leak/2': 0.25}
    scores |= {'leak/1': 0.125, 'identity/gap 2': 0.75, 'identity/gap 2/count': 44}
    scores |= {'character_kept/gap 2/count': 0}  # and no mean
    tasks = ('generate', 'extend 1 given')
    rows = [{'task': task, 'frames': '4+4'} | scores for task in tasks]
    write_json(folder / 'scores.json', rows)
    return folder


def write_samples(folder, frames=(4, 8, 3)):
    """Three scenes, of which the first is given, in a folder whose name needs quoting."""
    captions = (NASTY, 'it grows', 'it grows')
    parts = np.split(pixels(frames), np.cumsum(frames)[:-1])
    for i in range(2):
        video.write_mp4(folder / f'video_{i}.mp4', pixels(frames), 8)
        video.write_png(folder / f'sheet_{i}.png', sheets.contact_sheet(parts, captions))

    scenes = [{'caption': text, 'frames': count} for text, count in zip(captions, frames)]
    story = {'scenes': scenes, 'given': [{'file': NASTY}], 'seed': 3}
    write_json(folder / 'story.json', story)
    return folder


def write_evaluation(folder):
    """An evaluation.json of one video of two scenes."""
    folder.mkdir()
    confusion = [[0.3, 0.1], [0.2, 0.25]]
    result = {
        'settings': {'encoder': NASTY},
        'seed': 0,
        'summary': {
            'visual': {'mean': 0.9, 'interval': [0.8, 0.95]},
            'matches': {'mean': 0.5, 'interval': None},
            'transition_deviation': {'mean': 1.25, 'interval': [0.5, 2.0]},
        },
        'confusion': {'2': confusion},
        'frechet': {'distance': 12.5, 'videos': 1, 'references': 9, 'size': 16},
        'videos': [
            {
                'name': NASTY,
                'visual': 0.9,
                'matches': 0.5,
                'transition_deviation': 1.25,
                'confusion': confusion,
            }
        ],
    }
    write_json(folder / 'evaluation.json', result)
    return folder


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp('report')
    made = report.write(
        root / 'out',
        run=write_run(root / 'run'),
        samples=write_samples(root / 'samples & more/<a>').parent,
        evaluation=write_evaluation(root / 'scores'),
    )
    # Moved, as its links are relative.
    return shutil.move(root / 'out', root / 'moved') / made.name


class Reader(html.parser.HTMLParser):
    """All elements, in order, as (tag, attributes, text directly in them); unbalanced tags are an
    error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f'{tag} has an attribute twice'
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, f'</{tag}> at {self.getpos()}'

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)

    def all(self, tag):
        return [(attrs, ''.join(text)) for t, attrs, text in self.elements if t == tag]


def read(page):
    return Reader(page.read_text(encoding='utf-8'))


def test_well_formed_and_every_link_leads_somewhere(page):
    reader = read(page)
    ids = collections.Counter(attrs['id'] for _, attrs, _ in reader.elements if 'id' in attrs)
    assert not [i for i, count in ids.items() if count > 1]

    seen = set()
    for _, attrs, _ in reader.elements:
        for url in filter(None, map(attrs.get, ('src', 'href', 'poster', 'xlink:href'))):
            assert not urllib.parse.urlsplit(url).scheme
            assert not url.startswith('/')
            if url.startswith('#'):
                assert url[1:] in ids, url
            else:
                assert (page.parent / urllib.parse.unquote(url)).is_file(), url
                seen.add(urllib.parse.unquote(url))

        for local in re.findall(r'url\(#([^)]+)\)', ' '.join(filter(None, attrs.values()))):
            assert local in ids
        assert attrs.get('aria-labelledby', 'content') in ids

    files = {path.relative_to(page.parent).as_posix() for path in page.parent.rglob('*.*')}
    assert seen == files - {'index.html'}
    assert len(seen) == 3 + 2 * 3
    assert not reader.all('script')
    assert not reader.all('link')


def test_readable_without_seeing_it(page):
    reader = read(page)
    assert len(reader.all('img')) == 5
    assert all(attrs['alt'] for attrs, _ in reader.all('img'))
    assert all(attrs['aria-label'] and 'controls' in attrs for attrs, _ in reader.all('video'))
    assert all(attrs['scope'] in ('row', 'col') for attrs, _ in reader.all('th'))
    assert len(reader.all('table')) == len(reader.all('caption')) > 5

    levels = [int(tag[1]) for tag, _, _ in reader.elements if re.fullmatch('h[1-6]', tag)]
    assert levels[0] == levels.count(1) == 1
    assert max(np.diff(levels)) <= 1

    assert [len(reader.all(tag)) for tag in ('main', 'header', 'nav')] == [1, 1, 1]
    skip, _ = reader.all('a')[0]
    content, _ = reader.all('main')[0]
    assert skip['href'] == f'#{content["id"]}'

    assert reader.all('html')[0][0]['lang'] == 'en'
    assert reader.all('title')[0][1]


def test_captions_are_text_and_given_scenes_marked(page):
    reader = read(page)
    text = page.read_text(encoding='utf-8')
    assert '<b onclick' not in text
    assert 'onclick="' not in text

    scenes = [text.strip() for _, text in reader.all('li') if 'grows' in text or 'red' in text]
    assert scenes == [NASTY, 'it grows', 'it grows'] * 2
    assert [text for _, text in reader.all('mark')] == ['given'] * 2
    assert '0.50 to 1.50 s, 8 frames' in text  # the second scene, at 8 frames per second

    alts = [attrs['alt'] for attrs, _ in reader.all('img')]
    grids = [alt for alt in alts if 'held-out' in alt]
    assert len(grids) == 3
    assert all(f'1: a ball; {NASTY}.' in alt for alt in grids)
    boards = [alt for alt in alts if 'Storyboard' in alt]
    told = f'scene 1 (given): {NASTY}; scene 2: it grows; scene 3: it grows'
    assert boards == [f'Storyboard: {told}'] * 2


def test_curves_of_every_metric(page):
    reader = read(page)
    said = [attrs['aria-label'] for attrs, _ in reader.all('svg')]
    assert [s.split(':')[0] for s in said] == [
        'Loss',
        'Gradient norm',
        'Steps per second',
        'Share of time waiting for data',
    ]
    assert said[0] == (
        'Loss: from 0.1 at step 10 to 0.01667 at step 60; lowest 0.01667 at step 60. Not finite: 1.'
    )

    # Everything is drawn in the colours of the page.
    styles = [attrs.get('style', '') for _, attrs, _ in reader.elements]
    assert sum('var(--accent)' in style and 'fill: none' in style for style in styles) == 4
    assert not re.search(r'#[0-9a-f]{6}', ' '.join(styles))

    # The loss has a gap.
    paths = [attrs for attrs, _ in reader.all('path')]
    drawn = [attrs['d'] for attrs in paths if 'var(--accent)' in attrs.get('style', '')]
    assert any(path.count('M') == 2 for path in drawn)


def test_tables(page):
    cells = [text for _, text in read(page).all('td')]
    for value in '0.250', '0.300', '90.00', '80.00 to 95.00', '30.00', '3', '"adamw"':
        assert value in cells
    for value in '1.25', '0.50 to 2.00', '0.125', '–':  # frames; a scene without all scores
        assert value in cells
    start = cells.index('identity')
    assert cells[start : start + 4] == ['identity', '2', '0.750', '44']


def test_unfinished_run(tmp_path):
    """The page says what is not there yet, also while the run writes its records."""
    run = write_run(tmp_path / 'run', steps=100)
    with (run / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 7')
    assert 'earlier end of the run' in report.write(tmp_path / 'out', run).read_text()

    (run / 'scores.json').unlink()
    shutil.rmtree(run / 'sheets')
    text = report.write(tmp_path / 'out', run).read_text()
    assert '60 of 100 steps' in text
    assert 'No scores yet' in text
    assert 'No sample grid is drawn yet' in text

    (run / 'metrics.jsonl').unlink()
    text = report.write(tmp_path / 'out', run).read_text()
    assert '<p>0 of 100 steps' in text
    assert '<svg' not in text


@pytest.mark.parametrize(
    'name, content, message',
    [
        ('run/config.json', None, '--run must be'),
        ('run/config.json', '{}', 'damaged'),
        ('run/config.json', '{', 'damaged'),
        ('run/metrics.jsonl', '{"loss": 1}\n', 'damaged'),
        ('run/metrics.jsonl', 'x\n', 'damaged'),
        ('run/scores.json', '{"task": 1}', 'damaged'),
        ('run/sheets/00000060_generated.png', 'x', 'not a whole picture'),
        ('run/sheets/00000060_generated.json', '[]', 'damaged'),
        ('run/sheets/00000060_generated.json', None, 'main wrote'),
        ('samples/story.json', None, 'holds no story.json'),
        ('samples/story.json', '{}', 'not a story file'),
        ('samples/story.json', '{"scenes": [{"caption": "a"}]}', 'damaged'),
        (
            'samples/story.json',
            '{"scenes": [{"caption": "a", "frames": 14}]}',
            'has 15 frames, its story 14',
        ),
        ('samples/video_1.mp4', 'x', 'cannot be decoded'),
        ('samples/video_1.mp4', 1200, 'is cut off'),
        ('samples/sheet_0.png', 'x', 'not a whole picture'),
        ('samples/sheet_0.png', 1200, 'not a whole picture'),
        ('scores/evaluation.json', None, '--evaluation must be'),
        ('scores/evaluation.json', '[]', 'damaged'),
        ('scores/evaluation.json', '{"videos": []}', 'damaged'),
    ],
)
def test_errors_name_the_file(tmp_path, name, content, message):
    make = {'run': write_run, 'samples': write_samples, 'scores': write_evaluation}
    kind = name.split('/')[0]
    folder = make[kind](tmp_path / kind)
    path = tmp_path / name
    if content is None:
        path.unlink()
    elif isinstance(content, int):  # the file's own first bytes
        path.write_bytes(path.read_bytes()[:content])
    else:
        path.write_text(content)

    argument = 'evaluation' if kind == 'scores' else kind
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(message)) as raised:
        report.write(tmp_path / 'out', **{argument: folder})
    assert str(folder) in str(raised.value)
    assert not (tmp_path / 'out/index.html').exists()


def test_command(tmp_path):
    command = [sys.executable, '-m', 'mask2dit_jax.tools.report', f'--out={tmp_path}/out']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode
    assert 'Give --run, --samples or --evaluation' in done.stderr + done.stdout

    command.append(f'--run={write_run(tmp_path / "run")}')
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f'Wrote {tmp_path}/out/index.html.\n'


@pytest.mark.skipif(CHROMIUM is None, reason='needs chromium')
def test_in_a_browser(page, tmp_path):
    """Chromium decodes all videos and pictures, for which its load event waits, follows dark and
    light, and reports no errors."""
    probe = """<script>addEventListener('load', () => {
      const paint = (element, name) => getComputedStyle(document.querySelector(element))[name];
      document.body.textContent = 'SEEN' + JSON.stringify({
        videos: [...document.querySelectorAll('video')].map(
          v => [v.error, v.readyState, v.videoWidth, v.duration]),
        pictures: [...document.images].map(
          i => i.complete && i.naturalWidth == i.getAttribute('width')),
        colors: [paint('svg text', 'fill'), paint('path[style*=accent]', 'stroke'),
                 paint('body', 'color'), paint('body', 'backgroundColor')],
        width: document.documentElement.scrollWidth}) + 'END'; });</script>"""
    text = page.read_text(encoding='utf-8')
    for old, new in (
        ('</body>', probe + '</body>'),
        ('preload="metadata"', 'preload="auto"'),
        ('loading="lazy"', ''),
        ('<details>', '<details open>'),
    ):
        text = text.replace(old, new)
    probed = page.with_name('probed.html')
    probed.write_text(text, encoding='utf-8')
    seen = {}
    for name, scheme in ('dark', 0), ('light', 1):
        done = subprocess.run(
            [
                CHROMIUM,
                '--headless',
                '--no-sandbox',
                '--disable-gpu',
                '--disable-background-networking',
                f'--blink-settings=preferredColorScheme={scheme}',
                f'--user-data-dir={tmp_path}',
                '--window-size=500,900',
                '--enable-logging=stderr',
                '--v=0',
                '--dump-dom',
                probed.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not [line for line in done.stderr.splitlines() if ':CONSOLE' in line]
        seen[name] = json.loads(re.search('SEEN(.*)END', done.stdout)[1])
    probed.unlink()

    for state in seen.values():
        assert [(error, width, seconds) for error, _, width, seconds in state['videos']] == [
            (None, 32, 15 / 8)
        ] * 2
        assert min(ready for _, ready, *_ in state['videos']) >= 2  # the first frame is decoded
        assert state['pictures'] == [True] * 5
        assert state['width'] <= 500  # nothing but tables scrolls sideways
    assert not set(seen['dark']['colors']) & set(seen['light']['colors'])


def test_an_older_report_leaves_nothing_in_a_newer_one(tmp_path):
    """Its pictures and videos go, but nothing that it did not make."""
    out = tmp_path / 'out'
    (tmp_path / 'samples').mkdir()
    report.write(out, samples=write_samples(tmp_path / 'samples'))
    assert list(out.glob('media/samples/*.mp4'))
    (out / 'media/mine.mp4').write_text('mine')

    report.write(out, run=write_run(tmp_path / 'run'))
    assert not list(out.glob('media/samples/*'))
    assert (out / 'media/mine.mp4').exists()
    assert list(out.glob('media/run/*.png'))


def test_an_older_page_does_not_show_newer_media(tmp_path):
    out = tmp_path / 'out'
    (tmp_path / 'samples').mkdir()
    samples = write_samples(tmp_path / 'samples')
    report.write(out, samples=samples)

    # The second video cannot be read when the first one is in its place.
    video.write_mp4(samples / 'video_0.mp4', pixels((15,), size=64), 8)
    (samples / 'video_1.mp4').write_bytes(b'no')
    with pytest.raises(ValueError, match='video_1'):
        report.write(out, samples=samples)
    assert not (out / 'index.html').exists()


def test_samples_may_be_the_media_of_an_older_report(tmp_path):
    (tmp_path / 'samples').mkdir()
    report.write(tmp_path / 'out', samples=write_samples(tmp_path / 'samples'))
    media = tmp_path / 'out/media/samples'
    shutil.copy(tmp_path / 'samples/story.json', media)
    videos = {path.name: path.read_bytes() for path in media.glob('*.mp4')}

    report.write(tmp_path / 'out', samples=media)
    assert {path.name: path.read_bytes() for path in media.glob('*.mp4')} == videos


def test_out_is_tried_before_anything_is_read(tmp_path):
    (tmp_path / 'out').write_text('')
    with pytest.raises(storage.OutputError, match=r'out cannot be written .*it is a file'):
        report.write(tmp_path / 'out', run=tmp_path / 'no_run')
    with pytest.raises(storage.OutputError, match=r'below cannot be written .*by --out'):
        report.write(tmp_path / 'out/below', run=tmp_path / 'no_run')
