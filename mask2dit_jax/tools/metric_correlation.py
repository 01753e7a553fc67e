"""Do the metrics of evaluate rank runs on the stories as their exact scores do?

  python -m mask2dit_jax.tools.metric_correlation --runs=runs/dual,runs/full,runs/isolated --out=rank

Every run generates the same held-out stories (its config.eval.stories, of its first layout). They
are scored exactly, and by the metrics on features of two encoders:

  measured  what the exact scores see in a scene, one-hot: background, colour, shape and action; for
  frames, the
            subject, without the action. Captions are all that the story says of a scene. How good
            the metrics are with an encoder that sees everything.
  pixels    colours of 4 x 4 blocks of four frames, and captions as their rendering with the
  character in the middle:
            an encoder that knows nothing of characters and actions.

--out gets rank.md and rank.json: means with 95 % bootstrap intervals, and for every exact score and
the metrics that should follow it Spearman's correlation over all videos, and how many pairs of runs
that the exact score tells apart (their intervals do not meet) the metric orders alike, leaves open
(its intervals meet), or reverses.
"""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import scipy.stats
from absl import app, flags

from mask2dit_jax import config as config_lib
from mask2dit_jax import logs
from mask2dit_jax.data import batches, latent_codec
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.evaluation import cuts, evaluator, metrics
from mask2dit_jax.evaluation import videos as videos_lib
from mask2dit_jax.pretrained import names as names_lib
from mask2dit_jax.pretrained import runs
from mask2dit_jax.stories import rendering, scores, world
from mask2dit_jax.training import validation

FOLLOWS = (
    ('action', 'matches'),
    ('action', 'margin'),
    ('action', 'semantic'),
    ('consistency', 'subject_between'),
    ('consistency', 'visual'),
    ('story', 'sequence'),
)  # (exact score, metric)
_SUBJECT = {'background': world.BACKGROUNDS, 'color': world.COLORS, 'shape': world.SHAPES}
_NAMES = _SUBJECT | {'action': world.ACTIONS}


def _one_hot(indices: dict, names) -> np.ndarray:
    """Indices by attribute, each [n], to [n, D]; -1 is a class of its own."""
    return np.concatenate([np.eye(len(_NAMES[name]) + 1)[indices[name]] for name in names], axis=-1)


def _measured(clips, told, story_clips):
    """Features of one scene of n stories, (scene [n, D], caption [n, D], frames [n, F, E]); see
    above."""
    del story_clips
    seen = scores.measure(clips)
    frames = np.repeat(_one_hot(seen, _SUBJECT)[:, None], clips.shape[1], axis=1)
    return _one_hot(seen, _NAMES), _one_hot(told, _NAMES), frames


def _pixels(clips, told, story_clips):
    """As _measured."""
    del told

    def blocks(clips):
        clips = clips[
            :, np.linspace(0, clips.shape[1] - 1, 4).round().astype(int)
        ]  # scenes differ in length
        n, frames, height, width, _ = clips.shape
        mean = clips.reshape(n, frames, height // 4, 4, width // 4, 4, 3).mean((3, 5))
        return mean.reshape(n, frames, -1) - 0.5  # gray has no direction

    frames = blocks(clips)
    return frames.reshape(len(clips), -1), blocks(story_clips).reshape(len(clips), -1), frames


ENCODERS = {'measured': _measured, 'pixels': _pixels}


def _centred(story: world.Story, scene: int) -> np.ndarray:
    """A rendering of one scene [F, H, W, 3] in [0, 1] with the middle of the path in the middle of
    the frame."""
    travel, _ = world.MOTIONS[story.actions[scene]]
    start = tuple((8 - t / 2) * story.size_px / 16 for t in travel)
    return (
        rendering.render(
            dataclasses.replace(
                story,
                actions=(story.actions[scene],),
                frames=(story.frames[scene],),
                starts=(start,),
            )
        )
        / 255
    )


def score(videos, known: list[world.Story]) -> dict[str, dict[str, list[float]]]:
    """Exact scores and metrics of every video.

    Args:
      videos: float [n, F, H, W, 3] in [0, 1].
      known: their stories, of one layout.

    Returns:
      'exact' and each of ENCODERS: values by name, one per video; exact scores of scenes are means
      over them.
    """
    frames = known[0].frames
    exact = {
        name: np.asarray(x, float).reshape(len(known), -1).mean(1).tolist()
        for name, x in scores.score(videos, known).items()
    }
    told = [
        {
            name: np.array([names.index(getattr(s, name)) for s in known])
            for name, names in _SUBJECT.items()
        }
        | {'action': np.array([world.ACTIONS.index(s.actions[i]) for s in known])}
        for i in range(len(frames))
    ]
    scenes = np.split(videos, np.cumsum(frames)[:-1], axis=1)
    out = {'exact': exact}
    for name, encode in ENCODERS.items():
        features = [
            encode(clips, told[i], np.stack([_centred(s, i) for s in known]))
            for i, clips in enumerate(scenes)
        ]
        rows = []
        for n, video in enumerate(videos):
            item = videos_lib.Video(str(n), pathlib.Path(str(n)), (), frames)
            own = {
                f'{n}/scenes': np.stack([scene[n] for scene, _, _ in features]),
                f'{n}/captions': np.stack([caption[n] for _, caption, _ in features]),
            }
            own |= {f'{n}/frames/{i}': x[n] for i, (_, _, x) in enumerate(features)}
            rows.append(
                evaluator.score(item, own, cuts.transitions((video * 255).round().astype(np.uint8)))
            )
        out[name] = {metric: [row[metric] for row in rows] for _, metric in FOLLOWS}
    return out


def compare(exact: list[list[float]], metric: list[list[float]], seed: int = 0) -> dict:
    """How a metric follows an exact score; values of every video, run by run.

    Returns:
      'correlation': Spearman's, over all videos of all runs; None if either is the same for all of
      them. 'alike', 'open', 'reversed': pairs of runs that the exact score tells apart, by the
      metric's order.
    """
    x, y = np.concatenate(exact), np.concatenate(metric)
    out = {
        'correlation': float(scipy.stats.spearmanr(x, y).statistic)
        if np.ptp(x) and np.ptp(y)
        else None,
        'alike': 0,
        'open': 0,
        'reversed': 0,
    }

    def order(values, a, b):
        (low_a, high_a), (low_b, high_b) = (metrics.bootstrap(values[i], seed) for i in (a, b))
        return int(low_a > high_b) - int(low_b > high_a)

    for a, b in itertools.combinations(range(len(exact)), 2):
        if truth := order(exact, a, b):
            out[{1: 'alike', 0: 'open', -1: 'reversed'}[truth * order(metric, a, b)]] += 1
    return out


def _generated(workdir):
    """Held-out videos of a run, and their stories."""
    config = config_lib.load_run(workdir)
    if config.data.encoded:
        raise ValueError(
            f'{workdir} was trained on encoded videos, not on the stories: only these have exact scores.'
        )
    codec, frames = latent_codec.for_run(config, workdir), config.data.layouts[0]
    target = partitioning.abstract_arrays(
        names_lib.abstract_params(config.model), mesh_lib.make_mesh(config.mesh)
    )
    _, params = runs.newest(workdir, config, target)
    source = batches.open_stories(config, workdir, frames, 'test')
    return validation.generate_held_out(
        config, params, codec, source, frames, 0, f'generating {workdir}'
    )


def report(found: dict[str, dict], seed: int = 0) -> tuple[str, list[dict]]:
    """Markdown, and the comparisons, of what `score` returned for every run."""

    def cell(values):
        low, high = metrics.bootstrap(values, seed)
        return f'{100 * np.mean(values):.1f} [{100 * low:.1f}, {100 * high:.1f}]'

    count = len(next(iter(found.values()))['exact']['story'])
    columns = list(dict.fromkeys(name for pair in FOLLOWS for name in pair))
    lines = [
        '# Metrics beside exact scores',
        '',
        f'{count} stories of every run; percent, mean [95 % bootstrap interval].',
        '',
        f'| run | encoder | {" | ".join(columns)} |',
        '|---|---' + '|---:' * len(columns) + '|',
    ]
    for run, kinds in found.items():
        lines += [
            f'| {run} | {kind} | '
            + ' | '.join(cell(values[c]) if c in values else '' for c in columns)
            + ' |'
            for kind, values in kinds.items()
        ]
    rows = [
        {'encoder': kind, 'exact': exact, 'metric': metric}
        | compare(
            [kinds['exact'][exact] for kinds in found.values()],
            [kinds[kind][metric] for kinds in found.values()],
            seed,
        )
        for kind in ENCODERS
        for exact, metric in FOLLOWS
    ]
    lines += [
        '',
        'Rank correlation over all videos, and pairs of runs that the exact score tells apart, by what the '
        'metric says of them:',
        '',
        '| encoder | exact score | metric | Spearman | alike | open | reversed |',
        '|---|---|---|---:|---:|---:|---:|',
    ]
    lines += [
        f'| {r["encoder"]} | {r["exact"]} | {r["metric"]} | '
        f'{"–" if r["correlation"] is None else format(r["correlation"], ".2f")} | {r["alike"]} | {r["open"]} | '
        f'{r["reversed"]} |'
        for r in rows
    ]
    return '\n'.join(lines) + '\n', rows


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    logs.quiet_libraries()
    workdirs, out = [pathlib.Path(w) for w in flags.FLAGS.runs], pathlib.Path(flags.FLAGS.out)
    if len({w.name for w in workdirs}) < max(2, len(workdirs)):
        raise app.UsageError(
            '--runs needs two workdirs or more, whose last folders have different names.'
        )
    found = {w.name: score(*_generated(w)) for w in workdirs}
    text, rows = report(found)
    out.mkdir(parents=True, exist_ok=True)
    (out / 'rank.json').write_text(
        json.dumps({'runs': found, 'comparisons': rows}, indent=2) + '\n', encoding='utf-8'
    )
    (out / 'rank.md').write_text(text, encoding='utf-8')
    print(text, end='')


if __name__ == '__main__':
    flags.DEFINE_list(
        'runs', None, 'Workdirs of runs on the stories, separated by commas.', required=True
    )
    flags.DEFINE_string('out', None, 'Folder for rank.md and rank.json.', required=True)
    app.run(main)
