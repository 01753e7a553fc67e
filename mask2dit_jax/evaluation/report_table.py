"""The tables of `evaluate`: means over the videos, and evaluation.md.

The columns of the first table are those of the paper. A metric of metrics.METRICS that is not among
these columns becomes a row of the second table. To give the row a label and a place, add it to
_LABELS; otherwise it stands at the end under its name.
"""

from typing import NamedTuple

import numpy as np

from mask2dit_jax.evaluation import metrics


class _PaperRow(NamedTuple):
    """Metrics in the columns visual, semantic and sequence consistency, for one choice of pairs."""

    label: str
    columns: tuple[str, str, str]


_PAPER_ROWS = (
    _PaperRow('all pairs', ('visual', 'semantic', 'sequence')),
    _PaperRow('adjacent', ('visual_adjacent', 'semantic', 'sequence_adjacent')),
)
# Rows of the second table, in their order. The label of a new metric goes here.
_LABELS = {
    'subject_within': 'subject consistency within scenes',
    'subject_between': 'subject consistency between scenes',
    'matches': 'scenes that match their own caption best (chance: 1 / scenes)',
    'margin': 'cosine with own caption minus cosine with others',
}
# Scores of cuts, which stand beside every consistency.
_CUTS = ('sharpness', 'placed', 'transition_deviation')
# Scores in frames; all others are in percent.
_IN_FRAMES = ('transition_deviation',)
# Entries of a video's scores that are not numbers, so that they have no mean over videos.
_NOT_NUMBERS = ('name', 'confusion')


def summarize(rows: list[dict], seed: int) -> dict[str, dict]:
    """Averages every metric over the videos.

    Args:
      rows: the scores of each video, of evaluator.score.
      seed: of the bootstrap.

    Returns:
      By metric: 'mean', and 'interval', the 95 % bootstrap interval or None.

    Raises:
      ValueError: if one video has metrics that another one lacks.
    """
    first = rows[0]
    for row in rows:
        different = sorted(set(row) ^ set(first))
        if different:
            raise ValueError(
                f'{row["name"]} and {first["name"]} differ in {", ".join(different)}: give the '
                'same kinds of features for all videos.'
            )

    summary = {}
    for name in first:
        if name in _NOT_NUMBERS:
            continue
        values = [row[name] for row in rows]
        summary[name] = {
            'mean': float(np.mean(values)),
            'interval': metrics.bootstrap(values, seed),
        }
    return summary


def confusions(rows: list[dict]) -> dict[int, list]:
    """Mean confusion matrix of the videos with the same number of scenes, by that number."""
    by_num_scenes = {}
    for row in rows:
        if 'confusion' in row:
            matrix = row['confusion']
            by_num_scenes.setdefault(len(matrix), []).append(matrix)
    return {
        num_scenes: np.mean(matrices, axis=0).tolist()
        for num_scenes, matrices in sorted(by_num_scenes.items())
    }


def report(result: dict) -> str:
    """Writes the results of `evaluate` as Markdown.

    Args:
      result: what evaluation.json holds.
    """
    lines = [
        *_introduction(result),
        '',
        *_paper_table(result),
        '',
        *_other_table(result),
        '',
        *_how_to_read_cuts(),
    ]
    if result['frechet']:
        lines += ['', *_how_to_read_fvd(result['frechet'])]
    for num_scenes, matrix in result['confusion'].items():
        lines += ['', *_confusion_table(num_scenes, matrix)]
    return '\n'.join(lines) + '\n'


def _introduction(result: dict) -> list[str]:
    settings = ', '.join(f'{key}: {value}' for key, value in result['settings'].items())
    return [
        '# Scores',
        '',
        f'{len(result["videos"])} video(s), in percent (the transition deviation in frames), mean '
        f'over videos [95 % bootstrap interval]. {settings}.',
    ]


def _percent(value: float) -> str:
    return f'{100 * value:.2f}'


def format_score(name: str, value: float) -> str:
    """A score of evaluation.json in percent, or in frames if it is in frames."""
    return f'{value:.2f}' if name in _IN_FRAMES else _percent(value)


def _cell(summary: dict, name: str) -> str:
    """Mean and interval of a metric, or a dash if it was not computed."""
    if name not in summary:
        return '–'

    mean = format_score(name, summary[name]['mean'])
    interval = summary[name]['interval']
    if interval is None:
        return mean
    low, high = interval
    return f'{mean} [{format_score(name, low)}, {format_score(name, high)}]'


def _cells(summary: dict, names) -> str:
    return ' | '.join(_cell(summary, name) for name in names)


def _paper_table(result: dict) -> list[str]:
    """The table of the paper, with the cuts beside it."""
    summary = result['summary']
    distance = result['frechet']
    fvd = f'{distance["distance"]:.5g}' if distance else '–'

    lines = [
        '| pairs of scenes | visual consistency | semantic consistency | sequence consistency '
        '| FVD | cut sharpness | cuts placed | transition deviation |',
        '|---|---:|---:|---:|---:|---:|---:|---:|',
    ]
    for row in _PAPER_ROWS:
        consistencies = _cells(summary, row.columns)
        lines.append(f'| {row.label} | {consistencies} | {fvd} | {_cells(summary, _CUTS)} |')
    return lines


def _other_table(result: dict) -> list[str]:
    """A row for each metric that is not a column of the paper's table."""
    summary = result['summary']
    in_paper_table = {*_CUTS, *(name for row in _PAPER_ROWS for name in row.columns)}
    unlabelled = [name for name in summary if name not in in_paper_table | _LABELS.keys()]

    lines = [
        '| | mean | cut sharpness | cuts placed | transition deviation |',
        '|---|---:|---:|---:|---:|',
    ]
    for name in (*_LABELS, *unlabelled):
        label = _LABELS.get(name, name)
        lines.append(f'| {label} | {_cell(summary, name)} | {_cells(summary, _CUTS)} |')
    return lines


def _how_to_read_cuts() -> list[str]:
    return [
        'Cut sharpness is 100 for hard cuts between still scenes, and 0 where a border changes no '
        'more than the scenes do. Cuts placed is the share of borders that are among the largest '
        'changes of the video. The transition deviation is the number of frames from a border to '
        'the largest change near it: 0 for cuts in their place, and the largest distance where '
        'nothing changes. A video without cuts is consistent too: read every consistency together '
        'with its cuts. Captions that leak into other scenes make the scenes alike: they raise '
        'consistency, and only the matches fall.'
    ]


def _how_to_read_fvd(distance: dict) -> list[str]:
    text = (
        "FVD is the Fréchet distance between the video encoder's features. It cannot be compared "
        'with the FVD of papers, which takes the features of I3D. It is computed from '
        f'{distance["videos"]} videos and {distance["references"]} of the reference, with features '
        f'of size {distance["size"]}. It has no interval, because resampling biases it.'
    )
    # A covariance of fewer samples than dimensions lacks full rank, which biases the distance.
    if min(distance['videos'], distance['references']) <= distance['size']:
        text += ' So few videos bias it as well: compare only distances with the same counts.'
    return [text]


def _confusion_table(num_scenes: int, matrix: list) -> list[str]:
    captions = ' | '.join(f'caption {number + 1}' for number in range(num_scenes))
    lines = [
        f'Cosine of scenes (rows) with captions, stories of {num_scenes} scenes:',
        '',
        f'| scene | {captions} |',
        '|---' * (num_scenes + 1) + '|',
    ]
    for number, row in enumerate(matrix):
        cells = ' | '.join(_percent(cosine) for cosine in row)
        lines.append(f'| {number + 1} | {cells} |')
    return lines
