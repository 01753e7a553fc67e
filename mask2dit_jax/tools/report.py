"""A page of a training run, of samples or of scores, to be read in any browser without server,
network or scripts.

Required flags: --out, the folder to write, and at least one of --run, --samples, --evaluation.

  python -m mask2dit_jax.tools.report --run=runs/tiny --samples=samples --out=report
  python -m mask2dit_jax.tools.report --samples=samples --evaluation=scores --out=report

--run is a workdir, finished or not; --samples is a folder that sample wrote, or a folder of such
folders; --evaluation is a folder that evaluate wrote. --out gets index.html, and pictures and
videos in media/: it can be moved, zipped or put on a server.
"""

import contextlib
import html
import io
import json
import pathlib
import re
import shutil
import urllib.parse
from typing import NamedTuple

import matplotlib
import numpy as np
import PIL.Image
from absl import app, flags
from flax import traverse_util
from matplotlib import figure, ticker

from mask2dit_jax import logs, paths, storage
from mask2dit_jax.data import story_file, video
from mask2dit_jax.evaluation import report_table
from mask2dit_jax.evaluation import videos as videos_lib
from mask2dit_jax.training import validation

# Titles of the curves, by the name of the metric; these come first, in this order.
_CURVES = {
    'loss': 'Loss',
    'grad_norm': 'Gradient norm',
    'steps_per_second': 'Steps per second',
    'data_wait': 'Share of time waiting for data',
    'mfu': 'Model FLOPs utilisation',
}

# The meaning of the columns of scores.json.
_SCORE_NOTES = {
    'action': 'action: the scene does what its caption says.',
    'identity': 'identity: the character has the right colour and shape.',
    'background': 'background: it is the right one.',
    'consistency': (
        'consistency: each character has one colour and shape and each place one background in all '
        'scenes, whatever the story says.'
    ),
    'story': 'story: action, identity and background are right in all scored scenes.',
    'leak': 'leak: the action is wrong and that of another scene, lower is better.',
    'cut_deviation': 'cut_deviation: frames from each cut to where it should be.',
} | validation.SCORE_NOTES

# The metrics of evaluation.json in words.
_METRICS = {
    'visual': 'visual consistency, all pairs of scenes',
    'visual_adjacent': 'visual consistency, adjacent scenes',
    'semantic': 'semantic consistency',
    'sequence': 'sequence consistency, all pairs of scenes',
    'sequence_adjacent': 'sequence consistency, adjacent scenes',
    'subject_within': 'subject consistency within scenes',
    'subject_between': 'subject consistency between scenes',
    'matches': 'scenes that match their own caption best',
    'margin': 'cosine with own caption minus cosine with others',
    'sharpness': 'cut sharpness',
    'placed': 'cuts placed',
    'transition_deviation': 'transition deviation, frames',
}

# matplotlib draws in these colours, and the page puts its own in their place.
_TEXT_COLOR = '#010101'
_LINE_COLOR = '#020202'
_CURVE_COLOR = '#030303'
_PAGE_COLORS = {
    _TEXT_COLOR: 'var(--muted)',
    _LINE_COLOR: 'var(--line)',
    _CURVE_COLOR: 'var(--accent)',
}

# With fewer points than this a curve marks each of them.
_MAX_MARKED_POINTS = 40

_CSS = """
:root { color-scheme: light dark;
  --paper: #fff; --ink: #1b1f24; --muted: #57606a; --line: #d0d7de; --accent: #0b5cad; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --ink: #e6e8ea; --muted: #a3adb7; --line: #3d454d; --accent: #6cb2ff; } }
* { box-sizing: border-box; }
body { max-width: 76rem; margin: 0 auto; padding: 1rem 1.5rem 4rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1.5rem; }
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; padding: 0; list-style: none; }
.note, figcaption, caption { color: var(--muted); } ul.note { padding-left: 1.2rem; }
.curves { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
figure { margin: 0 0 1.5rem; } figcaption { margin-top: .35rem; }
img, video, svg { display: block; max-width: 100%; height: auto; }
svg { width: 100%; } svg text { fill: var(--muted); font-family: inherit !important; }
figure img { border-radius: 4px; border: 1px solid var(--line); }
.story { display: grid; grid-template-columns: minmax(0, 22rem) 1fr; gap: 0 1.5rem;
  margin-bottom: 1.5rem; }
@media (max-width: 45rem) { .story { grid-template-columns: 1fr; } }
.story video { width: 100%; background: #000; border-radius: 4px; }
.story ol { margin: 0; padding-left: 1.5rem; }
.story li { margin-bottom: .75rem; } .story small { display: block; color: var(--muted); }
mark { padding: 0 .4em; border-radius: 3px; background: var(--accent); color: var(--paper);
  font-size: .85em; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .25rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; white-space: nowrap; }
th:first-child, .words :is(td, th) { text-align: left; }
summary { cursor: pointer; padding: .25rem 0; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Mask²DiT: {title}</title>
<style>{css}</style></head>
<body>
<a class="skip" href="#content">Skip to content</a>
<header><h1>Mask²DiT: {title}</h1>
<p>Videos of several scenes, each following its own caption, with characters and places staying \
the same.</p>
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main id="content" tabindex="-1">
{body}</main>
</body>
</html>
"""


class _Story(NamedTuple):
    """The part of a story.json that the page shows.

    Attributes:
      captions: one per scene.
      frames: frames of each scene.
      given: number of leading scenes that were given, not generated.
    """

    captions: list[str]
    frames: list[int]
    given: int


class _SampleGrid(NamedTuple):
    """A picture of held-out stories that training drew: its file, its task, and its captions."""

    path: pathlib.Path
    task: str
    told: str


@contextlib.contextmanager
def _reading(path):
    """Turns any error that comes from a file's content into one that names the file."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} is damaged ({error!r}): have it written again, or leave it out.'
        ) from error


def _load(path: pathlib.Path, flag: str, maker: str) -> dict:
    """The content of a JSON file that the command `maker` wrote."""
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} does not exist: --{flag} must be a folder that mask2dit_jax.{maker} wrote.'
        )
    with _reading(path):
        return json.loads(path.read_text(encoding='utf-8'))


# Pieces of HTML.


def _text(value) -> str:
    """A value as text in HTML."""
    return html.escape(f'{value:.4g}' if isinstance(value, float) else str(value))


def _percent(value) -> str:
    return f'{100 * value:.2f}'


def table(caption: str, columns, rows, kind: str = 'numbers') -> str:
    """A table.

    Args:
      caption: of the table.
      columns: names of the columns.
      rows: rows of values, of which the first names the row.
      kind: 'numbers', or 'words' to align all columns to the left.

    Returns:
      HTML.
    """
    caption = _text(caption)
    head = ''.join(f'<th scope="col">{_text(column)}</th>' for column in columns)
    body = ''.join(_table_row(row) for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
        f'<table class="{kind}"><caption>{caption}</caption>\n'
        f'<thead><tr>{head}</tr></thead>\n'
        f'<tbody>{body}</tbody></table></div>\n'
    )


def _table_row(row) -> str:
    """A row, named by its first value."""
    name, *values = row
    cells = ''.join(f'<td>{_text(value)}</td>' for value in values)
    return f'<tr><th scope="row">{_text(name)}</th>{cells}</tr>\n'


def _details(summary: str, body: str) -> str:
    """A part that is closed until the reader opens it."""
    return f'<details><summary>{_text(summary)}</summary>\n{body}</details>\n'


def _settings(caption: str, record: dict) -> str:
    """A closed table of nested settings, a row per leaf."""
    rows = []
    for key, value in traverse_util.flatten_dict(record, sep='.').items():
        rows.append((key, json.dumps(value, ensure_ascii=False)))
    return _details(caption, table(caption, ('key', 'value'), rows, 'words'))


def _link(path: pathlib.Path, out: pathlib.Path, name: str) -> str:
    """Copies a file to out/media/NAME; returns the address for the page."""
    target = out / 'media' / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not (target.exists() and target.samefile(path)):
        shutil.copyfile(path, target)
    return urllib.parse.quote(f'media/{name}')


def _picture(path: pathlib.Path, out: pathlib.Path, name: str, alt: str, caption: str) -> str:
    """A figure of a picture, which is copied to out/media/NAME."""
    try:
        with PIL.Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f'{path} is not a whole picture ({error}): have it written again, or remove it.'
        ) from error

    url = _link(path, out, name)
    return (
        f'<figure><a href="{url}"><img src="{url}" alt="{_text(alt)}" loading="lazy" '
        f'width="{image.width}" height="{image.height}"></a>\n'
        f'<figcaption>{_text(caption)}</figcaption></figure>\n'
    )


# Curves.


def curve(name: str, steps, values) -> str:
    """A figure of one metric over steps, in the colours of the page.

    Args:
      name: of the metric.
      steps: the steps at which it was logged.
      values: its values; where one is not finite, the curve has a gap, and the caption says so.

    Returns:
      HTML.
    """
    title = _CURVES.get(name, name)
    steps = np.asarray(steps)
    values = np.asarray(values, np.float64)
    said = _text(_say_curve(title, steps, values))

    svg = _draw_curve(name, steps, values)
    for color, page_color in _PAGE_COLORS.items():
        svg = svg.replace(color, page_color)

    # One page holds several pictures, and matplotlib's ids are unique in each of them only.
    scope = re.sub(r'\W', '_', name)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{scope}-', svg)

    svg = svg.replace('<svg ', f'<svg role="img" aria-label="{said}" ', 1)
    return f'<figure><h3>{_text(title)}</h3>\n{svg}<figcaption>{said}</figcaption></figure>\n'


def _say_curve(title: str, steps, values) -> str:
    """A curve in words: where it begins and ends, and its lowest value."""
    finite = np.isfinite(values)
    if not finite.any():
        return f'{title}: nothing finite in {len(values)} records.'

    def at(i):
        return f'{values[i]:.4g} at step {steps[i]}'

    first, last = np.flatnonzero(finite)[[0, -1]]
    lowest = int(np.nanargmin(np.where(finite, values, np.nan)))
    said = f'{title}: from {at(first)} to {at(last)}; lowest {at(lowest)}.'
    if not finite.all():
        said += f' Not finite: {(~finite).sum()}.'
    return said


def _draw_curve(name: str, steps, values) -> str:
    """The <svg> element of a curve, the same for equal values."""
    style = {
        'svg.fonttype': 'none',
        'svg.hashsalt': name,
        'axes.edgecolor': _LINE_COLOR,
        'grid.color': _LINE_COLOR,
        'xtick.color': _LINE_COLOR,
        'ytick.color': _LINE_COLOR,
        'axes.spines.top': False,
        'axes.spines.right': False,
    }
    with matplotlib.rc_context(style):
        drawn = figure.Figure(figsize=(4.4, 2.6), layout='constrained')
        axes = drawn.add_subplot()
        axes.plot(
            steps,
            np.where(np.isfinite(values), values, np.nan),
            color=_CURVE_COLOR,
            linewidth=1.5,
            marker='o' if len(values) < _MAX_MARKED_POINTS else None,
            markersize=3,
        )
        axes.set_xlabel('step', color=_TEXT_COLOR)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
        axes.tick_params(labelcolor=_TEXT_COLOR)
        axes.grid(linewidth=0.5)

        file = io.StringIO()
        no_metadata = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
        drawn.savefig(file, format='svg', transparent=True, metadata=no_metadata)

    # Without the XML declaration before it.
    svg = file.getvalue()
    return svg[svg.index('<svg') :]


# A run.


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
    """Reads metrics.jsonl.

    Args:
      path: of the file.

    Returns:
      A record per line, with 'step'; none if there is no file. A last line that is still being
      written is left out.

    Raises:
      ValueError: naming the file, if another line is not a record.
    """
    if not path.is_file():
        return []

    records = []
    with _reading(path):
        for line in path.read_text(encoding='utf-8').splitlines(keepends=True):
            if not line.endswith('\n'):
                continue
            record = json.loads(line)
            step = int(record.pop('step'))
            records.append({'step': step} | {name: float(x) for name, x in record.items()})
    return records


def _curves(records: list[dict]) -> str:
    """Figures of all metrics that were logged, those of _CURVES first."""
    logged = dict.fromkeys(name for record in records for name in record)
    drawn = []
    for name in {**_CURVES, **logged}:
        known = [record for record in records if name in record]
        if name == 'step' or not known:
            continue
        steps = [record['step'] for record in known]
        values = [record[name] for record in known]
        drawn.append(curve(name, steps, values))
    return f'<div class="curves">\n{"".join(drawn)}</div>\n'


def _find_sample_grids(folder: pathlib.Path) -> dict[int, list[_SampleGrid]]:
    """Sample grids of a workdir by step, the last step first."""
    grids = {}
    for path in sorted(folder.glob('sheets/[0-9]*_*.png'), reverse=True):
        captions_path = path.with_suffix('.json')
        known = _load(captions_path, 'run', 'main')
        with _reading(captions_path):
            stories = enumerate(known['stories'], 1)
            told = ' '.join(f'{i}: {"; ".join(captions)}.' for i, captions in stories)

        with _reading(path):
            step, task = path.stem.split('_', 1)
            grids.setdefault(int(step), []).append(_SampleGrid(path, task, told))
    return grids


def _sample_grids(folder: pathlib.Path, out: pathlib.Path) -> str:
    """Sample grids of a workdir; those of the last step are open."""
    blocks = []
    for step, grids in _find_sample_grids(folder).items():
        pictures = ''
        for grid in grids:
            alt = (
                f'Frames of held-out stories, {grid.task}, at step {step}; a row is a story. '
                f'{grid.told}'
            )
            caption = f'{grid.task}, step {step}'
            pictures += _picture(grid.path, out, f'run/{grid.path.name}', alt, caption)
        blocks.append((f'Step {step}', pictures))
    if not blocks:
        return '<p>No sample grid is drawn yet.</p>\n'

    (title, pictures), *earlier = blocks
    return f'<h3>{title}</h3>\n{pictures}' + ''.join(_details(*block) for block in earlier)


def _scores(path: pathlib.Path) -> str:
    """Tables of scores.json."""
    with _reading(path):
        rows = json.loads(path.read_text(encoding='utf-8'))
        columns = [column for column in validation.SCORE_COLUMNS if column in rows[0]]
        values = [[_score(row.get(column, '–')) for column in columns] for row in rows]
        noted = [_SCORE_NOTES[column] for column in columns if column in _SCORE_NOTES]
        notes = ''.join(f'<li>{_text(note)}</li>' for note in noted)

        return (
            table('Scores by task and frames of the scenes', columns, values)
            + f'<ul class="note">{notes}</ul>\n'
            + _scene_scores(rows)
            + _gap_scores(rows)
        )


def _score(value):
    """A score in three decimals, and anything else as it is."""
    return f'{value:.3f}' if isinstance(value, float) else value


def _scene_scores(rows: list[dict]) -> str:
    """A closed table of the scores named 'action/1', ..., or nothing if there are none."""
    found = [{key: row[key] for key in row if re.fullmatch(r'\w+/\d+', key)} for row in rows]
    names = sorted({key.split('/')[0] for scores in found for key in scores})
    if not names:
        return ''

    lines = []
    for row, scores in zip(rows, found):
        for scene in sorted({int(key.split('/')[1]) for key in scores}):
            values = [scores.get(f'{name}/{scene}', '–') for name in names]
            lines.append([f'{row["task"]} {row["frames"]}, scene {scene}', *map(_score, values)])
    return _details('Scores of each scene', table('Scores by scene', ['scene', *names], lines))


def _gap_scores(rows: list[dict]) -> str:
    """A closed table of the scores named 'identity/gap 2', ..., or nothing if there are none."""
    lines = []
    for row in rows:
        for key, value in row.items():
            if re.fullmatch(r'\w+/gap \w+', key):
                name, gap = key.split('/gap ')
                task = f'{row["task"]} {row["frames"]}'
                lines.append([task, name, gap, _score(value), row[f'{key}/count']])
    if not lines:
        return ''
    caption = 'Scores by the scenes since the character, or the place, was last shown'
    return _details(
        'Scores of each gap', table(caption, ['task', 'score', 'gap', 'mean', 'scenes'], lines)
    )


def run_sections(folder: pathlib.Path, out: pathlib.Path) -> dict[str, str]:
    """Sample grids, scores, and curves with the configuration, of a workdir.

    Args:
      folder: the workdir. The page says so where something is not there yet.
      out: folder of the page, which gets the pictures.

    Returns:
      HTML by title.

    Raises:
      FileNotFoundError, ValueError: naming the file that is missing or damaged.
    """
    config_path = folder / 'config.json'
    config = _load(config_path, 'run', 'main')
    with _reading(config_path):
        total = int(config['train']['steps'])

    records = read_metrics(folder / 'metrics.jsonl')
    done = records[-1]['step'] if records else 0

    storyboards = (
        '<p>Held-out stories as the averaged parameters make them: generated from captions alone, '
        'and extended from all scenes but the last, which are marked as given.</p>\n'
    )
    storyboards += _sample_grids(folder, out)

    scores_path = folder / 'scores.json'
    if scores_path.is_file():
        scores = _scores(scores_path)
        if done != total:
            scores += '<p>These scores are of an earlier end of the run, which continues.</p>\n'
    else:
        scores = f'<p>No scores yet: they are written at the end, step {total}.</p>\n'

    training = f'<p>{done} of {total} steps are logged.</p>\n'
    if records:
        training += _curves(records)
    training += _settings('Configuration', config)

    return {'Storyboards': storyboards, 'Scores': scores, 'Training': training}


# Samples.


def sample_sections(folder: pathlib.Path, out: pathlib.Path) -> dict[str, str]:
    """Videos with captions of all stories in and below a folder.

    Args:
      folder: a folder that mask2dit_jax.sample wrote, or a folder of such folders.
      out: folder of the page, which gets the videos and pictures.

    Returns:
      HTML by title.

    Raises:
      FileNotFoundError, ValueError: naming the file that is missing or damaged.
    """
    story_paths = sorted(folder.rglob('story.json'))
    if not story_paths:
        raise FileNotFoundError(
            f'{folder} holds no story.json: --samples must be a folder that mask2dit_jax.sample '
            'wrote.'
        )

    body = ''
    for path in story_paths:
        captions, frames = story_file.read_story(path)
        record = _load(path, 'samples', 'sample')
        with _reading(path):
            frames = [int(count) for count in frames]
            story = _Story(captions, frames, len(record.get('given', ())))

        videos = sorted(path.parent.glob('*.mp4'), key=videos_lib.by_number)
        if not videos:
            raise FileNotFoundError(f'{path.parent} holds no mp4 file: have sample write it again.')
        for video_path in videos:
            name = f'samples/{video_path.relative_to(folder).as_posix()}'
            body += _video(video_path, story, out, name)
        body += _settings(f'How {path.parent.resolve().name} was made', record)
    return {'Videos': body}


def _video(path: pathlib.Path, story: _Story, out: pathlib.Path, name: str) -> str:
    """A video with its scenes beside it, and its storyboard, if there is one."""
    info = video.probe(path)
    if sum(story.frames) != len(info.times):
        raise ValueError(
            f'{path} has {len(info.times)} frames, its story {sum(story.frames)}: they must agree.'
        )
    url = _link(path, out, name)

    # The first frame stands in until the reader plays the video.
    poster = pathlib.PurePath(name).with_suffix('.png').as_posix()
    size = {'height_px': info.height_px, 'width_px': info.width_px}
    video.write_png(out / 'media' / poster, video.read_frames(path, info, [0], **size)[0])
    poster_url = urllib.parse.quote(f'media/{poster}')

    title = _text(name.removeprefix('samples/').removesuffix('.mp4'))
    return (
        f'<h3>{title}</h3>\n'
        '<div class="story"><div>'
        f'<video controls loop muted playsinline preload="metadata" src="{url}" '
        f'width="{info.width_px}" height="{info.height_px}" poster="{poster_url}" '
        f'aria-label="Video {title} of {len(story.frames)} scenes, listed beside it"></video>\n'
        f'<p><a href="{url}">{_text(path.name)}</a></p></div>\n'
        f'<div><ol>{_scene_list(story, info.fps)}</ol>\n'
        f'{_storyboard(path, story, out, name)}</div></div>\n'
    )


def _scene_list(story: _Story, fps: float) -> str:
    """The scenes of a video: captions, times and lengths."""
    ends = np.cumsum(story.frames) / fps  # in seconds
    items = ''
    for i, (caption, count, end) in enumerate(zip(story.captions, story.frames, ends)):
        mark = '<mark>given</mark> ' if i < story.given else ''
        start = end - count / fps
        items += (
            f'<li>{mark}{_text(caption)} '
            f'<small>{start:.2f} to {end:.2f} s, {count} frames</small></li>\n'
        )
    return items


def _storyboard(path: pathlib.Path, story: _Story, out: pathlib.Path, name: str) -> str:
    """The storyboard that sample drew beside a video, or nothing if there is none."""
    sheet = path.with_name(f'sheet_{path.stem.removeprefix("video_")}.png')
    if not sheet.is_file():
        return ''

    told = []
    for i, caption in enumerate(story.captions):
        mark = ' (given)' if i < story.given else ''
        told.append(f'scene {i + 1}{mark}: {caption}')
    return _picture(
        sheet,
        out,
        pathlib.PurePath(name).with_name(sheet.name).as_posix(),
        f'Storyboard: {"; ".join(told)}',
        'Storyboard, a row per scene',
    )


# Scores of videos.


def evaluation_sections(folder: pathlib.Path) -> dict[str, str]:
    """Tables of evaluation.json, in percent.

    Args:
      folder: a folder that mask2dit_jax.evaluate wrote.

    Returns:
      HTML by title.

    Raises:
      FileNotFoundError, ValueError: naming the file that is missing or damaged.
    """
    path = folder / 'evaluation.json'
    result = _load(path, 'evaluation', 'evaluate')
    with _reading(path):
        body = _summary(result) + _distance(result['frechet'])
        body += (
            '<p class="note">Without cuts, consistency is worth little, and captions that leak '
            'into other scenes raise it: read the sharpness of the cuts and the matches beside it, '
            'and compare numbers of one protocol only.</p>\n'
        )
        for count, matrix in result['confusion'].items():
            body += _confusion(count, matrix)
        body += _video_scores(result)
        body += _settings('How it was evaluated', {**result['settings'], 'seed': result['seed']})
    return {'Evaluation': body}


def _summary(result: dict) -> str:
    """A table of the means, with intervals where there are any."""
    rows = []
    for name, value in result['summary'].items():
        ends = [report_table.format_score(name, end) for end in value['interval'] or ()]
        mean = report_table.format_score(name, value['mean'])
        rows.append([_METRICS.get(name, name), mean, ' to '.join(ends) or '–'])
    caption = f'Means over {len(result["videos"])} video(s), in percent unless in frames'
    return table(caption, ['metric', 'mean', '95 % interval'], rows)


def _distance(frechet: dict | None) -> str:
    """The Fréchet distance in a sentence."""
    if not frechet:
        return '<p>No Fréchet distance: there was no reference.</p>\n'
    return (
        f'<p>Fréchet distance {_text(frechet["distance"])}: {_text(frechet["videos"])} videos '
        f'against {_text(frechet["references"])} of the reference, features of size '
        f'{_text(frechet["size"])}.</p>\n'
    )


def _confusion(count: str, matrix) -> str:
    """A table of scenes (rows) and captions (columns)."""
    captions = [f'caption {i}' for i in range(1, len(matrix) + 1)]
    rows = [[i, *map(_percent, row)] for i, row in enumerate(matrix, 1)]
    return table(
        f'Cosine of scenes with captions in percent, stories of {count} scenes',
        ['scene', *captions],
        rows,
    )


def _video_scores(result: dict) -> str:
    """A closed table of the scores of each video."""
    names = list(result['summary'])
    rows = []
    for scores in result['videos']:
        values = [report_table.format_score(name, scores[name]) for name in names]
        rows.append([scores['name'], *values])
    scores_table = table('Scores by video, in percent unless in frames', ['video', *names], rows)
    return _details('Scores of each video', scores_table)


def write(out, run=None, samples=None, evaluation=None) -> pathlib.Path:
    """Writes index.html and its media.

    Args:
      out: folder for the page.
      run: workdir of a run, or None.
      samples: folder that sample wrote, or of such folders, or None.
      evaluation: folder that evaluate wrote, or None.

    Returns:
      The path of the page.

    Raises:
      FileNotFoundError, ValueError: naming the file and what to do.
      storage.OutputError: if `out` cannot be written.
    """
    paths.check_local(out=out, run=run, samples=samples, evaluation=evaluation)
    out = pathlib.Path(out)
    storage.try_output(out)

    # An older page must not show the media of this one.
    page = out / 'index.html'
    older = _media_of(page)
    page.unlink(missing_ok=True)

    sections = {}
    if samples:
        sections |= sample_sections(pathlib.Path(samples), out)
    if run:
        sections |= run_sections(pathlib.Path(run), out)
    if evaluation:
        sections |= evaluation_sections(pathlib.Path(evaluation))

    titles = []
    for kind, folder in {'run': run, 'samples': samples, 'evaluation': evaluation}.items():
        if folder:
            titles.append(f'{kind} {pathlib.Path(folder).resolve().name}')

    links = ''
    body = ''
    for name, content in sections.items():
        anchor = name.lower()
        links += f'<li><a href="#{anchor}">{name}</a></li>'
        body += (
            f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{name}</h2>\n'
            f'{content}</section>\n'
        )

    content = _PAGE.format(title=_text(', '.join(titles)), css=_CSS, links=links, body=body)
    with storage.writing(out):
        storage.write_text(page, content)
        for path in older - _media_of(page):
            path.unlink(missing_ok=True)
    return page


def _media_of(page: pathlib.Path) -> set[pathlib.Path]:
    """The files that a page shows; none if there is no page."""
    if not page.is_file():
        return set()
    addresses = re.findall(r'(?:src|href|poster)="(media/[^"]+)"', page.read_text('utf-8'))
    return {page.parent / urllib.parse.unquote(address) for address in addresses}


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')

    given = {name: flags.FLAGS[name].value for name in ('run', 'samples', 'evaluation')}
    if not any(given.values()):
        raise app.UsageError('Give --run, --samples or --evaluation, or more than one of them.')

    logs.quiet_libraries()
    print(f'Wrote {write(flags.FLAGS.out, **given)}.')


if __name__ == '__main__':
    flags.DEFINE_string('run', None, 'Workdir of mask2dit_jax.main, finished or not.')
    flags.DEFINE_string(
        'samples', None, 'Folder that mask2dit_jax.sample wrote, or a folder of such folders.'
    )
    flags.DEFINE_string('evaluation', None, 'Folder that mask2dit_jax.evaluate wrote.')
    flags.DEFINE_string('out', None, 'Folder for index.html and media/.', required=True)
    paths.check_flags_local('run', 'samples', 'evaluation', 'out')
    app.run(main)
