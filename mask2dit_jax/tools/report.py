"""A page of a training run, of samples or of scores, to be read in any browser without server,
network or scripts.

  python -m mask2dit_jax.tools.report --run=runs/tiny --samples=samples --out=report
  python -m mask2dit_jax.tools.report --samples=samples --evaluation=scores --out=report

--run is a workdir, finished or not; --samples what sample wrote, in the folder or in folders in it;
--evaluation what evaluate wrote. --out gets index.html, and pictures and videos in media/: it can
be moved, zipped or put on a server.
"""

import contextlib
import html
import io
import json
import pathlib
import re
import shutil
import urllib.parse

import matplotlib
import numpy as np
import PIL.Image
from absl import app, flags
from matplotlib import figure, ticker

from mask2dit_jax import logs
from mask2dit_jax.data import story_file, video
from mask2dit_jax.training import validation

_CURVES = {
    'loss': 'Loss',
    'grad_norm': 'Gradient norm',
    'steps_per_second': 'Steps per second',
    'data_wait': 'Share of time waiting for data',
    'mfu': 'Model FLOPs utilisation',
}
_SCORE_NOTES = {
    'action': 'action: the scene does what its caption says.',
    'identity': 'identity: the character has the right colour and shape.',
    'background': 'background: it is the right one.',
    'consistency': 'consistency: colour, shape and background are the same in all scenes, whatever the story says.',
    'story': 'story: action, identity and background are right in all scored scenes.',
    'leak': 'leak: the action is wrong and that of another scene, lower is better.',
} | validation.SCORE_NOTES
_METRICS = {
    'visual': 'visual consistency, all pairs of scenes',
    'visual_adjacent': 'visual consistency, adjacent scenes',
    'semantic': 'semantic consistency',
    'sequence': 'sequence consistency, all pairs of scenes',
    'sequence_adjacent': 'sequence consistency, adjacent scenes',
    'subject_within': 'subject consistency within scenes',
    'subject_between': 'subject consistency between scenes',
    'matches': 'scenes that match their own caption best',
    'margin': 'cosine with own caption less with others',
    'sharpness': 'cut sharpness',
    'placed': 'cuts placed',
}
_COLORS = {
    '#010101': 'var(--muted)',
    '#020202': 'var(--line)',
    '#030303': 'var(--accent)',
}  # matplotlib's: the page's
_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --muted: #57606a; --line: #d0d7de; --accent: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e6e8ea; --muted: #a3adb7; --line: #3d454d; --accent: #6cb2ff; } }
* { box-sizing: border-box; }
body { max-width: 76rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1.5rem; }
a { color: var(--accent); } :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; padding: 0; list-style: none; }
.note, figcaption, caption { color: var(--muted); } ul.note { padding-left: 1.2rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0 0 1.5rem; } figcaption { margin-top: .35rem; }
img, video, svg { display: block; max-width: 100%; height: auto; }
svg { width: 100%; } svg text { fill: var(--muted); font-family: inherit !important; }
figure img { border-radius: 4px; border: 1px solid var(--line); }
.story { display: grid; grid-template-columns: minmax(0, 22rem) 1fr; gap: 0 1.5rem; margin-bottom: 1.5rem; }
@media (max-width: 45rem) { .story { grid-template-columns: 1fr; } }
.story video { width: 100%; background: #000; border-radius: 4px; } .story ol { margin: 0; padding-left: 1.5rem; }
.story li { margin-bottom: .75rem; } .story small { display: block; color: var(--muted); }
mark { padding: 0 .4em; border-radius: 3px; background: var(--accent); color: var(--paper); font-size: .85em; }
.scroll { overflow-x: auto; margin: 1rem 0; } table { border-collapse: collapse; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .25rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; white-space: nowrap; } th:first-child, .words :is(td, th) { text-align: left; }
summary { cursor: pointer; padding: .25rem 0; }
"""


@contextlib.contextmanager
def _reading(path):
    """Makes of anything that a file's content breaks an error that names the file."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} is damaged ({error!r}): have it written again, or leave it out.'
        ) from error


def _load(path: pathlib.Path, flag: str, maker: str) -> dict:
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} does not exist: --{flag} must be a folder that mask2dit_jax.{maker} wrote.'
        )
    with _reading(path):
        return json.loads(path.read_text(encoding='utf-8'))


def _text(value) -> str:
    return html.escape(f'{value:.4g}' if isinstance(value, float) else str(value))


def _percent(value) -> str:
    return f'{100 * value:.2f}'


def table(caption: str, columns, rows, kind: str = 'numbers') -> str:
    """A table of which the first column names the rows; `kind` 'words' aligns the others to the
    left."""
    head = ''.join(f'<th scope="col">{_text(c)}</th>' for c in columns)
    body = ''.join(
        '<tr><th scope="row">'
        + '<td>'.join(f'{_text(c)}</t{"d" if i else "h"}>' for i, c in enumerate(row))
        + '</tr>\n'
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(caption)}"><table class="{kind}">'
        f'<caption>{_text(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
    )


def _details(summary: str, body: str) -> str:
    return f'<details><summary>{_text(summary)}</summary>\n{body}</details>\n'


def _settings(caption: str, record) -> str:
    def flat(value, name=''):
        if not isinstance(value, dict):
            return [(name, json.dumps(value, ensure_ascii=False))]
        return [row for k, v in value.items() for row in flat(v, f'{name}.{k}' if name else k)]

    return _details(caption, table(caption, ('key', 'value'), flat(record), 'words'))


def curve(name: str, steps, values) -> str:
    """A figure of one metric over steps, in the colours of the page; what is not finite is a gap,
    and said."""
    title, values = _CURVES.get(name, name), np.asarray(values, np.float64)
    finite = np.isfinite(values)
    said = f'{title}: nothing finite in {len(values)} records.'
    if finite.any():
        steps, lowest = np.asarray(steps), int(np.nanargmin(np.where(finite, values, np.nan)))
        first, last = np.flatnonzero(finite)[[0, -1]]
        ends = ' to '.join(f'{values[i]:.4g} at step {steps[i]}' for i in (first, last))
        said = f'{title}: from {ends}; lowest {values[lowest]:.4g} at step {steps[lowest]}.' + (
            '' if finite.all() else f' Not finite: {(~finite).sum()}.'
        )
    text, line, accent = _COLORS
    style = {
        'svg.fonttype': 'none',
        'svg.hashsalt': name,
        'axes.edgecolor': line,
        'grid.color': line,
        'xtick.color': line,
        'ytick.color': line,
        'axes.spines.top': False,
        'axes.spines.right': False,
    }
    with matplotlib.rc_context(style):
        drawn = figure.Figure(figsize=(4.4, 2.6), layout='constrained')
        axes = drawn.add_subplot()
        axes.plot(
            steps,
            np.where(finite, values, np.nan),
            color=accent,
            linewidth=1.5,
            marker='o' if len(values) < 40 else None,
            markersize=3,
        )
        axes.set_xlabel('step', color=text)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
        axes.tick_params(labelcolor=text)
        axes.grid(linewidth=0.5)
        file = io.StringIO()
        drawn.savefig(
            file,
            format='svg',
            transparent=True,
            metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')),
        )
    svg = file.getvalue()
    for color, variable in _COLORS.items():
        svg = svg.replace(color, variable)
    scope = re.sub(r'\W', '_', name)  # several pictures are in one page
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{scope}-', svg[svg.index('<svg') :])
    svg = svg.replace('<svg ', f'<svg role="img" aria-label="{_text(said)}" ', 1)
    return (
        f'<figure><h3>{_text(title)}</h3>\n{svg}<figcaption>{_text(said)}</figcaption></figure>\n'
    )


def _link(path: pathlib.Path, out: pathlib.Path, name: str) -> str:
    """Copies a file to out/media/NAME; returns the address for the page."""
    target = out / 'media' / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not (target.exists() and target.samefile(path)):
        shutil.copyfile(path, target)
    return urllib.parse.quote(f'media/{name}')


def _picture(path: pathlib.Path, out: pathlib.Path, name: str, alt: str, caption: str) -> str:
    try:
        with PIL.Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f'{path} is no whole picture ({error}): have it written again, or remove it.'
        ) from error
    url = _link(path, out, name)
    return (
        f'<figure><a href="{url}"><img src="{url}" alt="{_text(alt)}" loading="lazy" width="{image.width}" '
        f'height="{image.height}"></a>\n<figcaption>{_text(caption)}</figcaption></figure>\n'
    )


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
    """Records of metrics.jsonl, none without the file; a last line that is still being written is
    left out.

    Raises:
      ValueError: naming the file if another line is no record.
    """
    with _reading(path):
        lines = path.read_text(encoding='utf-8').splitlines(keepends=True) if path.is_file() else []
        records = [json.loads(line) for line in lines if line.endswith('\n')]
        return [
            {'step': int(r['step'])} | {k: float(v) for k, v in r.items() if k != 'step'}
            for r in records
        ]


def _curves(records: list[dict]) -> str:
    names = [
        name
        for name in {**_CURVES, **dict.fromkeys(n for r in records for n in r)}
        if name != 'step'
    ]
    known = {name: [(r['step'], r[name]) for r in records if name in r] for name in names}
    drawn = [curve(name, *zip(*points)) for name, points in known.items() if points]
    return f'<div class="curves">\n{"".join(drawn)}</div>\n'


def _sheets(folder: pathlib.Path, out: pathlib.Path) -> str:
    by_step = {}
    for path in sorted(folder.glob('sheets/[0-9]*_*.png'), reverse=True):
        known = path.with_suffix('.json')
        stories = _load(known, 'run', 'main')
        with _reading(known):
            told = ' '.join(
                f'{i}: {"; ".join(captions)}.' for i, captions in enumerate(stories['stories'], 1)
            )
        with _reading(path):
            step, task = path.stem.split('_', 1)
            by_step.setdefault(int(step), []).append((path, task, told))
    if not by_step:
        return '<p>No sheet is drawn yet.</p>\n'
    blocks = [
        (
            f'Step {step}',
            ''.join(
                _picture(
                    path,
                    out,
                    f'run/{path.name}',
                    f'Frames of held-out stories, {task}, at step {step}; a row is a story. {told}',
                    f'{task}, step {step}',
                )
                for path, task, told in sheets
            ),
        )
        for step, sheets in by_step.items()
    ]
    return f'<h3>{blocks[0][0]}</h3>\n{blocks[0][1]}' + ''.join(
        _details(*block) for block in blocks[1:]
    )


def _scores(path: pathlib.Path) -> str:
    with _reading(path):
        rows = json.loads(path.read_text(encoding='utf-8'))
        columns = [c for c in validation.SCORE_COLUMNS if c in rows[0]]
        body = table(
            'Scores by task and frames of the scenes',
            columns,
            [
                [f'{row[c]:.3f}' if isinstance(row[c], float) else row[c] for c in columns]
                for row in rows
            ],
        )
        notes = ''.join(f'<li>{_text(_SCORE_NOTES[c])}</li>' for c in columns if c in _SCORE_NOTES)
        parts = sorted({k.split('/')[0] for row in rows for k in row if '/' in k})
        scenes = [
            [
                f'{row["task"]} {row["frames"]}, scene {i}',
                *(f'{row[f"{part}/{i}"]:.3f}' for part in parts),
            ]
            for row in rows
            for i in sorted({int(k.split('/')[1]) for k in row if '/' in k})
        ]
        return (
            body
            + f'<ul class="note">{notes}</ul>\n'
            + (
                _details(
                    'Scores of each scene', table('Scores by scene', ['scene', *parts], scenes)
                )
                if parts
                else ''
            )
        )


def run_sections(folder: pathlib.Path, out: pathlib.Path) -> dict[str, str]:
    """Sheets, scores, and curves with the configuration, of a workdir; what there is not yet is
    said."""
    path = folder / 'config.json'
    config, records = _load(path, 'run', 'main'), read_metrics(folder / 'metrics.jsonl')
    with _reading(path):
        total = int(config['train']['steps'])
    done = records[-1]['step'] if records else 0
    scores = f'<p>No scores yet: they are written at the end, step {total}.</p>\n'
    if (folder / 'scores.json').is_file():
        scores = _scores(folder / 'scores.json') + (
            ''
            if done == total
            else '<p>These scores are of an earlier end of the run, which goes on.</p>\n'
        )
    held_out = (
        '<p>Held-out stories as the averaged parameters make them: generated from captions alone, and extended '
        'from all scenes but the last, which are marked as given.</p>\n'
    )
    progress = f'<p>{done} of {total} steps are logged.</p>\n'
    return {
        'Storyboards': held_out + _sheets(folder, out),
        'Scores': scores,
        'Training': progress
        + (_curves(records) if records else '')
        + _settings('Configuration', config),
    }


def _story(path: pathlib.Path, story: tuple, out: pathlib.Path, name: str) -> str:
    """A video of (captions, frames, given scenes) with its scenes beside it, and its sheet, if
    there is one."""
    (captions, frames, given), info = story, video.probe(path)
    if sum(frames) != len(info.times):
        raise ValueError(
            f'{path} has {len(info.times)} frames, its story {sum(frames)}: they must agree.'
        )
    first = video.read_frames(path, info, [0], height_px=info.height_px, width_px=info.width_px)[0]
    url, poster = _link(path, out, name), pathlib.PurePath(name).with_suffix('.png').as_posix()
    video.write_png(out / 'media' / poster, first)
    ends = np.cumsum(frames) / info.fps
    scenes = ''.join(
        f'<li>{"<mark>given</mark> " * (i < given)}{_text(caption)} <small>{end - count / info.fps:.2f} '
        f'to {end:.2f} s, {count} frames</small></li>\n'
        for i, (caption, count, end) in enumerate(zip(captions, frames, ends))
    )
    told = '; '.join(
        f'scene {i + 1}{" (given)" * (i < given)}: {caption}' for i, caption in enumerate(captions)
    )
    sheet = path.with_name(f'sheet_{path.stem.removeprefix("video_")}.png')
    drawn = (
        _picture(
            sheet,
            out,
            pathlib.PurePath(name).with_name(sheet.name).as_posix(),
            f'Storyboard: {told}',
            'Storyboard, a row per scene',
        )
        if sheet.is_file()
        else ''
    )
    title = _text(name.removeprefix('samples/').removesuffix('.mp4'))
    return (
        f'<h3>{title}</h3>\n<div class="story"><div>'
        f'<video controls loop muted playsinline preload="metadata" src="{url}" width="{info.width_px}" '
        f'height="{info.height_px}" poster="{urllib.parse.quote(f"media/{poster}")}" '
        f'aria-label="Video {title} of {len(frames)} scenes, listed beside it"></video>\n'
        f'<p><a href="{url}">{_text(path.name)}</a></p></div>\n<div><ol>{scenes}</ol>\n{drawn}</div></div>\n'
    )


def sample_sections(folder: pathlib.Path, out: pathlib.Path) -> dict[str, str]:
    """Videos with captions of all stories in and below a folder."""
    paths, body = sorted(folder.rglob('story.json')), ''
    if not paths:
        raise FileNotFoundError(
            f'{folder} holds no story.json: --samples must be a folder that mask2dit_jax.sample '
            'wrote.'
        )
    for path in paths:
        captions, frames = story_file.read_story(path)
        record = _load(path, 'samples', 'sample')
        with _reading(path):
            story = captions, [int(f) for f in frames], len(record.get('given', ()))
        videos = sorted(
            path.parent.glob('*.mp4'),
            key=lambda p: [int(n) if n.isdigit() else n for n in re.split(r'(\d+)', p.name)],
        )
        if not videos:
            raise FileNotFoundError(f'{path.parent} holds no mp4 file: have sample write it again.')
        body += ''.join(
            _story(p, story, out, f'samples/{p.relative_to(folder).as_posix()}') for p in videos
        )
        body += _settings(f'How {path.parent.resolve().name} was made', record)
    return {'Videos': body}


def evaluation_sections(folder: pathlib.Path) -> dict[str, str]:
    """Tables of evaluation.json, in percent."""
    path = folder / 'evaluation.json'
    result = _load(path, 'evaluation', 'evaluate')
    with _reading(path):
        names, distance = list(result['summary']), result['frechet']
        body = table(
            f'Means over {len(result["videos"])} video(s), in percent',
            ['metric', 'mean', '95 % interval'],
            [
                [
                    _METRICS.get(k, k),
                    _percent(v['mean']),
                    ' to '.join(map(_percent, v['interval'] or ())) or '–',
                ]
                for k, v in result['summary'].items()
            ],
        )
        body += (
            f'<p>Fréchet distance {_text(distance["distance"])}: {_text(distance["videos"])} videos against '
            f'{_text(distance["references"])} of the reference, features of size {_text(distance["size"])}.</p>\n'
            if distance
            else '<p>No Fréchet distance: there was no reference.</p>\n'
        )
        body += (
            '<p class="note">Without cuts, consistency is worth little, and captions that leak into other scenes '
            'raise it: read the sharpness of the cuts and the matches beside it, and compare numbers of one '
            'protocol only.</p>\n'
        )
        for count, matrix in result['confusion'].items():
            body += table(
                f'Cosine of scenes with captions in percent, stories of {count} scenes',
                ['scene', *(f'caption {j + 1}' for j in range(len(matrix)))],
                [[i + 1, *map(_percent, row)] for i, row in enumerate(matrix)],
            )
        body += _details(
            'Scores of each video',
            table(
                'Scores by video, in percent',
                ['video', *names],
                [
                    [row['name'], *(_percent(row[name]) for name in names)]
                    for row in result['videos']
                ],
            ),
        )
        return {
            'Evaluation': body
            + _settings('How it was evaluated', {**result['settings'], 'seed': result['seed']})
        }


def write(out, run=None, samples=None, evaluation=None) -> pathlib.Path:
    """Writes index.html and its media; arguments are the flags of the command; returns the page's
    path.

    Raises:
      FileNotFoundError, ValueError: naming the file and what to do.
    """
    out, sections = pathlib.Path(out), {}
    if samples:
        sections |= sample_sections(pathlib.Path(samples), out)
    if run:
        sections |= run_sections(pathlib.Path(run), out)
    if evaluation:
        sections |= evaluation_sections(pathlib.Path(evaluation))
    given = {'run': run, 'samples': samples, 'evaluation': evaluation}
    title = _text(
        ', '.join(f'{kind} {pathlib.Path(p).resolve().name}' for kind, p in given.items() if p)
    )
    links = ''.join(f'<li><a href="#{name.lower()}">{name}</a></li>' for name in sections)
    body = ''.join(
        f'<section aria-labelledby="{name.lower()}">\n<h2 id="{name.lower()}">{name}</h2>\n{content}'
        '</section>\n'
        for name, content in sections.items()
    )
    out.mkdir(parents=True, exist_ok=True)
    page = out / 'index.html'
    page.write_text(
        f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Mask²DiT: {title}</title>
<style>{_CSS}</style></head>
<body>
<a class="skip" href="#content">Skip to content</a>
<header><h1>Mask²DiT: {title}</h1>
<p>Videos of several scenes, each following its own caption, with characters and places staying the same.</p>
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main id="content" tabindex="-1">
{body}</main>
</body>
</html>
""",
        encoding='utf-8',
    )
    return page


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
        'samples', None, 'Folder that mask2dit_jax.sample wrote, or of such folders.'
    )
    flags.DEFINE_string('evaluation', None, 'Folder that mask2dit_jax.evaluate wrote.')
    flags.DEFINE_string('out', None, 'Folder for index.html and media/.', required=True)
    app.run(main)
