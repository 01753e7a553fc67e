"""The tables of `evaluate`."""

import numpy as np

from mask2dit_jax.evaluation import metrics

_PAPER = {
    'all pairs': ('visual', 'semantic', 'sequence'),
    'adjacent': ('visual_adjacent', 'semantic', 'sequence_adjacent'),
}
_OTHERS = {
    'subject_within': 'subject consistency within scenes',
    'subject_between': 'subject consistency between scenes',
    'matches': 'scenes that match their own caption best (chance: 1 / scenes)',
    'margin': 'cosine with own caption less with others',
}
_CUTS = 'sharpness', 'placed'


def summarize(rows: list[dict], seed: int) -> dict[str, dict]:
    """Mean and 95 % bootstrap interval of every metric over the videos.

    Raises:
      ValueError: if one video has metrics that another has not.
    """
    names = [name for name in rows[0] if name not in ('name', 'confusion')]
    for row in rows:
        if odd := sorted(set(row) ^ set(rows[0])):
            raise ValueError(
                f'{row["name"]} and {rows[0]["name"]} differ in {", ".join(odd)}: give the same kinds of '
                'features for all videos.'
            )
    values = {name: [row[name] for row in rows] for name in names}
    return {
        name: {'mean': float(np.mean(x)), 'interval': metrics.bootstrap(x, seed)}
        for name, x in values.items()
    }


def confusions(rows: list[dict]) -> dict[int, list]:
    """Mean confusion matrix by number of scenes."""
    by_count = {}
    for row in rows:
        if 'confusion' in row:
            by_count.setdefault(len(row['confusion']), []).append(row['confusion'])
    return {count: np.mean(group, axis=0).tolist() for count, group in sorted(by_count.items())}


def _cell(summary: dict, name: str) -> str:
    if name not in summary:
        return '–'
    interval = summary[name]['interval']
    return f'{100 * summary[name]["mean"]:.2f}' + (
        f' [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]' if interval else ''
    )


def report(result: dict) -> str:
    """Markdown of what `evaluate` found."""
    summary, distance = result['summary'], result['frechet']
    cuts = ' | '.join(_cell(summary, name) for name in _CUTS)
    fvd = f'{distance["distance"]:.5g}' if distance else '–'
    lines = [
        '# Scores',
        '',
        f'{len(result["videos"])} video(s), in percent, mean over videos [95 % bootstrap interval]. '
        + ', '.join(f'{key}: {value}' for key, value in result['settings'].items())
        + '.',
        '',
        '| pairs of scenes | visual consistency | semantic consistency | sequence consistency | FVD | cut sharpness | '
        'cuts placed |',
        '|---|---:|---:|---:|---:|---:|---:|',
    ]
    lines += [
        f'| {label} | {" | ".join(_cell(summary, name) for name in names)} | {fvd} | {cuts} |'
        for label, names in _PAPER.items()
    ]
    lines += ['', '| | mean | cut sharpness | cuts placed |', '|---|---:|---:|---:|']
    lines += [f'| {label} | {_cell(summary, name)} | {cuts} |' for name, label in _OTHERS.items()]
    lines += [
        '',
        'Cut sharpness is 100 for hard cuts between still scenes and 0 where borders change no more than '
        'scenes do: without cuts, consistency is worth little. Cuts placed: borders that are among the largest '
        'changes of the video. Captions that leak into other scenes make these alike, which raises consistency '
        'too: only the matches fall.',
    ]
    if distance:
        few = min(distance['videos'], distance['references']) <= distance['size']
        lines += [
            '',
            "FVD is the Fréchet distance of the video encoder's features; papers take I3D's, with which it "
            f'does not compare. {distance["videos"]} videos against {distance["references"]} of the reference, '
            f'features of size {distance["size"]}; no interval, as resampling biases it.'
            + (
                ' Fewer samples than that: compare only numbers of these same counts.'
                if few
                else ''
            ),
        ]
    for count, matrix in result['confusion'].items():
        lines += [
            '',
            f'Cosine of scenes (rows) with captions, stories of {count} scenes:',
            '',
            ' | '.join(['| scene', *(f'caption {j + 1}' for j in range(count))]) + ' |',
            '|---' * (count + 1) + '|',
        ]
        lines += [
            f'| {i + 1} | ' + ' | '.join(f'{100 * x:.2f}' for x in row) + ' |'
            for i, row in enumerate(matrix)
        ]
    return '\n'.join(lines) + '\n'
