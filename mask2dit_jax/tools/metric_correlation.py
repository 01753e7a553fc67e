"""Compares the metrics of evaluate with the exact scores of stories: do they rank runs alike?

Required flags: --runs, workdirs of finished runs, and --out, the folder to write.

  python -m mask2dit_jax.tools.metric_correlation --runs=runs/dual,runs/full,runs/isolated \\
    --out=rank

Every run generates the same held-out stories (as many as its config.eval.stories, of its first
layout). They are scored exactly, and by the metrics on the features of two encoders:

  measured  What the exact scores see in a scene, one-hot: background, colour, shape and action. The
            features of frames leave out the action, and those of captions are what the story says
            of the scene. This shows how good the metrics are with an encoder that sees everything.
  pixels    The colours of 4 x 4 blocks of four frames. Captions are encoded as the rendering of the
            scene with the character in the middle. This encoder knows nothing of characters and
            actions.

--out receives rank.md and rank.json. They hold the means with 95 % bootstrap intervals, and for
every exact score and each metric that should follow it: Spearman's correlation over all videos, and
the number of pairs of runs that the metric orders like the exact score, leaves open or reverses.
Only pairs that the exact score tells apart count, because their intervals do not meet; the metric
leaves a pair open where its own intervals meet.
"""

import itertools
import json
import pathlib
from typing import NamedTuple

import numpy as np
import scipy.stats
from absl import app, flags

from mask2dit_jax import config as config_lib
from mask2dit_jax import logs, paths, storage
from mask2dit_jax.data import batches, latent_codec
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.evaluation import cuts, evaluator, metrics
from mask2dit_jax.evaluation import videos as videos_lib
from mask2dit_jax.pretrained import names as names_lib
from mask2dit_jax.pretrained import runs
from mask2dit_jax.stories import rendering, scores, world
from mask2dit_jax.training import validation


class Pair(NamedTuple):
    """An exact score and a metric that should follow it."""

    exact: str
    metric: str


FOLLOWS = (
    Pair('action', 'matches'),
    Pair('action', 'margin'),
    Pair('action', 'semantic'),
    Pair('consistency', 'subject_between'),
    Pair('consistency', 'visual'),
    Pair('story', 'sequence'),
)

# Attributes of a scene and their values. The subject is what all scenes of a story share.
_SUBJECT = {'background': world.BACKGROUNDS, 'color': world.COLORS, 'shape': world.SHAPES}
_ATTRIBUTES = {**_SUBJECT, 'action': world.ACTIONS}

# ------------------------------------------------------------------------------------------------
# Encoders


class SceneFeatures(NamedTuple):
    """Features of one scene of n stories.

    Attributes:
      scene: [n, D].
      caption: [n, D].
      frames: [n, F, E].
    """

    scene: np.ndarray
    caption: np.ndarray
    frames: np.ndarray


def _one_hot(indices: dict[str, np.ndarray], attributes) -> np.ndarray:
    """Encodes the indices [n] of some attributes as [n, D]; -1 is a class of its own."""
    parts = []
    for name in attributes:
        classes = np.eye(len(_ATTRIBUTES[name]) + 1)
        parts.append(classes[indices[name]])  # -1 takes the last row
    return np.concatenate(parts, axis=-1)


def _measured(clips, told, story_clips) -> SceneFeatures:
    """Encodes one scene of n stories as the exact scores see it.

    Args:
      clips: generated, float [n, F, H, W, 3] in [0, 1].
      told: indices [n] of every attribute that the story names.
      story_clips: renderings of the scene, as clips.
    """
    del story_clips
    seen = scores.measure(clips)
    frame = _one_hot(seen, _SUBJECT)  # [n, E]
    frames = np.repeat(frame[:, None], clips.shape[1], axis=1)
    return SceneFeatures(_one_hot(seen, _ATTRIBUTES), _one_hot(told, _ATTRIBUTES), frames)


def _pixels(clips, told, story_clips) -> SceneFeatures:
    """Encodes one scene of n stories by colours; the arguments are those of _measured."""
    del told
    frames = _block_colors(clips)
    story_frames = _block_colors(story_clips)
    num_stories = len(clips)
    return SceneFeatures(
        frames.reshape(num_stories, -1), story_frames.reshape(num_stories, -1), frames
    )


def _block_colors(clips) -> np.ndarray:
    """Mean colours of the 4 x 4 blocks of four frames, [n, 4, E]."""
    # Four frames of every scene, since scenes differ in length.
    picked = np.linspace(0, clips.shape[1] - 1, 4).round().astype(int)
    clips = clips[:, picked]

    num_stories, num_frames, height, width, _ = clips.shape
    blocks = clips.reshape(num_stories, num_frames, height // 4, 4, width // 4, 4, 3)
    colors = blocks.mean((3, 5)).reshape(num_stories, num_frames, -1)
    return colors - 0.5  # so that gray has no direction


ENCODERS = {'measured': _measured, 'pixels': _pixels}

# ------------------------------------------------------------------------------------------------
# Scores of one run


def _render_centred(story: world.AnyStory, scene: int) -> np.ndarray:
    """Renders one scene, with the middle of the character's path in the middle of the frame.

    Returns:
      [F, H, W, 3] in [0, 1].
    """
    travel, _ = world.MOTIONS[story.actions[scene]]
    start = tuple((8 - distance / 2) * story.size_px / 16 for distance in travel)
    centred = world.Story(
        story.shapes[scene],
        story.colors[scene],
        story.backgrounds[scene],
        (story.actions[scene],),
        (story.frames[scene],),
        (start,),
        story.size_px,
    )
    return rendering.render(centred) / 255


def _told(stories: list[world.AnyStory], scene: int) -> dict[str, np.ndarray]:
    """What the stories say of a scene: an index [n] for every attribute."""
    told = {}
    for name, values in _SUBJECT.items():
        shown = [getattr(story, f'{name}s')[scene] for story in stories]
        told[name] = np.array([values.index(value) for value in shown])
    told['action'] = np.array([world.ACTIONS.index(story.actions[scene]) for story in stories])
    return told


def _exact_scores(videos, stories: list[world.AnyStory]) -> dict[str, list[float]]:
    """Exact scores of every video; scores of scenes are averaged over the scenes, and those that
    some scenes do not have are left out."""
    exact = {}
    for name, values in scores.score(videos, stories).items():
        per_video = np.asarray(values, float).reshape(len(stories), -1)
        if not np.isnan(per_video).any():
            exact[name] = per_video.mean(1).tolist()
    return exact


def _metric_scores(
    videos, scene_features: list[SceneFeatures], frames: tuple[int, ...]
) -> dict[str, list[float]]:
    """Metrics of every video on these features, one entry of scene_features per scene."""
    rows = []
    for index, video in enumerate(videos):
        name = str(index)
        item = videos_lib.Video(name, pathlib.Path(name), captions=(), frames=frames)
        features = {
            f'{name}/scenes': np.stack([part.scene[index] for part in scene_features]),
            f'{name}/captions': np.stack([part.caption[index] for part in scene_features]),
        }
        for scene, part in enumerate(scene_features):
            features[f'{name}/frames/{scene}'] = part.frames[index]

        pixels = (video * 255).round().astype(np.uint8)
        rows.append(evaluator.score(item, features, cuts.transitions(pixels)))
    return {pair.metric: [row[pair.metric] for row in rows] for pair in FOLLOWS}


def score(videos, known: list[world.AnyStory]) -> dict[str, dict[str, list[float]]]:
    """Computes exact scores and metrics of every video.

    Args:
      videos: float [n, F, H, W, 3] in [0, 1].
      known: their stories, of one layout.

    Returns:
      'exact' and each of ENCODERS: values by name, one per video. Exact scores of scenes are means
      over the scenes.
    """
    frames = known[0].frames
    clips = np.split(videos, np.cumsum(frames)[:-1], axis=1)  # per scene [n, F, H, W, 3]
    told = [_told(known, scene) for scene in range(len(frames))]
    rendered = [
        np.stack([_render_centred(story, scene) for story in known]) for scene in range(len(frames))
    ]

    found = {'exact': _exact_scores(videos, known)}
    for name, encode in ENCODERS.items():
        features = [encode(*scene) for scene in zip(clips, told, rendered)]
        found[name] = _metric_scores(videos, features, frames)
    return found


# ------------------------------------------------------------------------------------------------
# Comparison of runs


def _order(first, second, seed: int) -> int:
    """1 if the interval of the first values is above that of the second, -1 if below, else 0."""
    first_low, first_high = metrics.bootstrap(first, seed)
    second_low, second_high = metrics.bootstrap(second, seed)
    return int(first_low > second_high) - int(second_low > first_high)


def compare(exact: list[list[float]], metric: list[list[float]], seed: int = 0) -> dict:
    """Compares a metric with the exact score that it should follow.

    Args:
      exact: for every run the exact scores of its videos.
      metric: for every run the metric of its videos.
      seed: of the bootstrap.

    Returns:
      'correlation': Spearman's, over all videos of all runs; None if either is constant.
      'alike', 'open', 'reversed': number of pairs of runs that the exact score tells apart, by what
        the metric says of their order.
    """
    all_exact = np.concatenate(exact)
    all_metric = np.concatenate(metric)
    correlation = None
    if np.ptp(all_exact) and np.ptp(all_metric):
        correlation = float(scipy.stats.spearmanr(all_exact, all_metric).statistic)

    counts = {'alike': 0, 'open': 0, 'reversed': 0}
    for first, second in itertools.combinations(range(len(exact)), 2):
        exact_order = _order(exact[first], exact[second], seed)
        if exact_order == 0:
            continue
        metric_order = _order(metric[first], metric[second], seed)
        verdict = {1: 'alike', 0: 'open', -1: 'reversed'}[exact_order * metric_order]
        counts[verdict] += 1
    return {'correlation': correlation, **counts}


def _comparisons(found: dict[str, dict], seed: int) -> list[dict]:
    """`compare` for every encoder and pair of FOLLOWS."""
    rows = []
    for encoder in ENCODERS:
        for pair in FOLLOWS:
            exact = [run['exact'][pair.exact] for run in found.values()]
            metric = [run[encoder][pair.metric] for run in found.values()]
            row = {'encoder': encoder, **pair._asdict()}
            rows.append(row | compare(exact, metric, seed))
    return rows


def report(found: dict[str, dict], seed: int = 0) -> tuple[str, list[dict]]:
    """Writes the page.

    Args:
      found: what `score` returned, for every run.
      seed: of the bootstrap.

    Returns:
      Markdown, and its comparisons: 'encoder', 'exact', 'metric' and what `compare` returns.
    """
    first_run = next(iter(found.values()))
    num_stories = len(first_run['exact']['story'])
    comparisons = _comparisons(found, seed)
    lines = [
        '# Metrics beside exact scores',
        '',
        f'{num_stories} stories of every run; percent, mean [95 % bootstrap interval].',
        '',
        *_score_table(found, seed),
        '',
        'Rank correlation over all videos, and the number of pairs of runs that the exact score '
        'tells apart, by what the metric says of their order:',
        '',
        *_comparison_table(comparisons),
    ]
    return '\n'.join(lines) + '\n', comparisons


def _score_table(found: dict[str, dict], seed: int) -> list[str]:
    """A row for every run and kind of scores, a column for every score of FOLLOWS."""
    columns = list(dict.fromkeys(name for pair in FOLLOWS for name in pair))
    lines = [
        f'| run | encoder | {" | ".join(columns)} |',
        '|---|---' + '|---:' * len(columns) + '|',
    ]
    for run, kinds in found.items():
        for kind, values in kinds.items():
            cells = [_cell(values[name], seed) if name in values else '' for name in columns]
            lines.append(f'| {run} | {kind} | {" | ".join(cells)} |')
    return lines


def _cell(values: list[float], seed: int) -> str:
    low, high = metrics.bootstrap(values, seed)
    return f'{100 * np.mean(values):.1f} [{100 * low:.1f}, {100 * high:.1f}]'


def _comparison_table(comparisons: list[dict]) -> list[str]:
    lines = [
        '| encoder | exact score | metric | Spearman | alike | open | reversed |',
        '|---|---|---|---:|---:|---:|---:|',
    ]
    for row in comparisons:
        correlation = '–' if row['correlation'] is None else f'{row["correlation"]:.2f}'
        lines.append(
            f'| {row["encoder"]} | {row["exact"]} | {row["metric"]} | {correlation} | '
            f'{row["alike"]} | {row["open"]} | {row["reversed"]} |'
        )
    return lines


# ------------------------------------------------------------------------------------------------
# The command


def _generate(workdir: pathlib.Path) -> tuple[np.ndarray, list[world.AnyStory]]:
    """Generates the held-out videos of a run; returns them and their stories."""
    config = config_lib.load_run(workdir)
    if config.data.encoded:
        raise ValueError(
            f'{workdir} was trained on encoded videos, not on the stories: only these have exact '
            'scores.'
        )

    abstract_params = names_lib.abstract_params(config.model)
    target = partitioning.abstract_arrays(abstract_params, mesh_lib.make_mesh(config.mesh))
    _, params = runs.newest(workdir, config, target)

    codec = latent_codec.for_run(config, workdir)
    frames = config.data.layouts[0]
    source = batches.open_stories(config, workdir, frames, 'test')
    return validation.generate_held_out(
        config,
        params,
        codec,
        source,
        frames,
        given_scenes=0,
        caption_style=config.data.caption_style,
        desc=f'generating {workdir}',
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    logs.quiet_libraries()

    workdirs = [pathlib.Path(workdir) for workdir in flags.FLAGS.runs]
    names = {workdir.name for workdir in workdirs}
    if len(names) < max(2, len(workdirs)):
        raise app.UsageError(
            '--runs needs two workdirs or more, whose last folders have different names.'
        )
    out = pathlib.Path(flags.FLAGS.out)
    storage.try_output(out)
    found = {workdir.name: score(*_generate(workdir)) for workdir in workdirs}
    text, comparisons = report(found)

    result = {'runs': found, 'comparisons': comparisons}
    with storage.writing(out):
        (out / 'rank.md').unlink(missing_ok=True)  # an older one must not stand beside a new json
        storage.write_text(out / 'rank.json', json.dumps(result, indent=2) + '\n')
        storage.write_text(out / 'rank.md', text)
    print(text, end='')


if __name__ == '__main__':
    flags.DEFINE_list(
        'runs', None, 'Workdirs of runs on the stories, separated by commas.', required=True
    )
    flags.DEFINE_string('out', None, 'Folder for rank.md and rank.json.', required=True)
    paths.check_flags_local('runs', 'out')
    app.run(main)
