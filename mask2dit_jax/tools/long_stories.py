"""Tells long stories with a model of the stories' world, and scores every scene exactly.

Required flags: --run, the workdir of a finished run, and --out, the folder to write.

  python -m mask2dit_jax.tools.long_stories --run=runs/tiny --out=drift
  python -m mask2dit_jax.tools.long_stories --run=runs/seed_0,runs/seed_1,runs/causal --out=drift \\
    --scenes=50 --window=2,3 --sinks=0,1 --given_timestep=0,20

The first scenes are generated together, as many as the run was trained on, and their first caption
says who and where. Every later scene is generated from a window and the sinks, as `sample` does it.
All combinations of the lists are tried, on the same stories with the same noise.

With --captions=unnamed (the default) no caption of a given scene says who or where: the first one,
where it is given again, is replaced by one that says only what happens. Character and place can
then come from the given pixels alone. --captions=named keeps the captions as they are. In stories
with a cast (a run of configs/tiny.py:memory) a scene that shows somebody new always says who it is.

--carry=pixels takes given scenes through pixels and the codec each time, where --carry=latents
gives their latents as they were generated. --carry=keys, of a causal model, keeps their keys and
values as they were computed when each was made (`sample --context=carried`).

--out receives curves.json, curves.md and curves.png: for every combination the share of scenes that
are right (action, character and place), by the number of the scene. Rows that show more scenes to
the model than it was trained on say so. Several runs are set beside each other; those that differ
only by their seed share a row and a line, with a band from the lowest to the highest. A later
command with the same --out adds to what is there. Of stories with a cast a second table tells how
often a character, or a place, is right that was last shown so many scenes ago.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tqdm
from absl import app, flags
from matplotlib import figure

from mask2dit_jax import config as config_lib
from mask2dit_jax import generation, logs, paths, pipeline, ranges, storage, tables
from mask2dit_jax.data import latent_codec
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.pretrained import names as names_lib
from mask2dit_jax.pretrained import runs
from mask2dit_jax.stories import cast, scores, world

# The seed of the stories that are told.
STORIES_SEED = 5

SHOWN = ('right', 'action', 'identity', 'background')
# Scenes, counted from 1, that the table has columns for.
COLUMNS = (3, 4, 5, 8, 12, 16, 24, 32, 50)
# Numbers of scenes since a look was shown that have a column together.
OCTAVES = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63))


@dataclasses.dataclass(frozen=True)
class Setting:
    """One combination that is tried.

    Attributes:
      window: scenes right before a new one that are given.
      sinks: first scenes of the story that are given on top.
      given_timestep: timestep of given scenes, with its noise.
      captions: 'named' or 'unnamed'.
      carry: 'latents', 'pixels' or 'keys'.
    """

    window: int
    sinks: int
    given_timestep: int
    captions: str
    carry: str


def sample_stories(config: config_lib.Config, num_stories: int, num_scenes: int) -> list:
    """The stories that are told, the same on every call; none is in the training split."""
    rng = np.random.default_rng(STORIES_SEED)
    frames = config.data.layouts[0][:1] * num_scenes
    size_px = latent_codec.square(config.data)
    sample = cast.sample_cast_story if config.data.world == 'cast' else world.sample_story
    return [sample(rng, frames, split='test', size_px=size_px) for _ in range(num_stories)]


def encode_block(
    codec: latent_codec.LatentCodec,
    stories: list[world.AnyStory],
    block: generation.Block,
    captions: str,
) -> generation.Inputs:
    """What the transformer is told when it generates a block: under 'unnamed' captions the given
    scenes' ones describe nothing."""
    frames = stories[0].frames
    texts = []
    for story in stories:
        own = world.captions(story)
        if captions == 'unnamed':
            bare = world.captions(story, 'never', given=len(frames))
            own = [bare[i] if i in block.given else text for i, text in enumerate(own)]
        texts.append(own)
    return generation.encode_inputs(codec, texts, frames)


def tell(
    config: config_lib.Config,
    params,
    codec: latent_codec.LatentCodec,
    setting: Setting,
    stories: list[world.AnyStory],
    *,
    seed: int = 0,
    first_index: int = 0,
) -> np.ndarray:
    """Tells a batch of stories.

    Args:
      config, params, codec: of the run.
      setting: how later scenes are generated.
      stories: B stories of equal scenes.
      seed: of the noise.
      first_index: number of the first story, on which its noise depends, too.

    Returns:
      Pixels float32 in [0, 1], [B, F, H, W, 3].
    """
    context = 'carried' if setting.carry == 'keys' else 'anew'
    config = pipeline.with_sample(config, given_timestep=setting.given_timestep, context=context)
    frames = stories[0].frames
    blocks = generation.plan_blocks(
        len(frames),
        0,
        joint=pipeline.default_joint(config),
        window=setting.window,
        sinks=setting.sinks,
    )
    told, pixels = [], []
    carried = generation.NOTHING
    for block in tqdm.tqdm(blocks, desc=_name(setting), unit='block'):
        inputs = encode_block(codec, stories, block, setting.captions)
        new = generation.tell(
            config, params, inputs, block, told, carried, seed=seed, first_index=first_index
        )
        # Its scenes are given from now on, with the captions of given scenes.
        done = generation.Block(block.scenes, block.stop, block.stop)
        inputs = encode_block(codec, stories, done, setting.captions)
        carried = generation.carry(config, params, inputs, block, new, carried)
        for scene, latents in zip(range(block.start, block.stop), new):
            pixels.append(codec.decode_video(latents, inputs.latent_frames[scene : scene + 1]))
            if setting.carry == 'pixels':
                latents = codec.encode_video(pixels[-1], frames[scene : scene + 1])
            told.append(latents)
    return np.concatenate(pixels, axis=1)


def tell_and_score(
    config: config_lib.Config,
    params,
    codec: latent_codec.LatentCodec,
    setting: Setting,
    stories: list[world.AnyStory],
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Tells stories and scores them.

    Args:
      config, params, codec, setting, stories, seed: as in `tell`.
      batch_size: stories that are told at once.

    Returns:
      The shares of scenes that are right, float [S] each: SHOWN, and 'residual'; and, of stories
      with a cast, scores.by_gap.
    """
    parts = []
    for first in range(0, len(stories), batch_size):
        part = stories[first : first + batch_size]
        pixels = tell(config, params, codec, setting, part, seed=seed, first_index=first)
        parts.append(scores.score(pixels, part))

    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}  # [B, S]
    found['right'] = found['action'] & found['identity'] & found['background']
    recall = scores.by_gap(found, stories) if config.data.world == 'cast' else {}
    return {name: found[name].mean(0) for name in (*SHOWN, 'residual')}, recall


def _name(setting: Setting) -> str:
    return (
        f'window {setting.window}, sinks {setting.sinks}, t {setting.given_timestep}, '
        f'{setting.captions}, {setting.carry}'
    )


def _cell(values: np.ndarray) -> float | str:
    """The mean of the runs, with their standard deviation if there are several."""
    mean = round(float(values.mean()), 3)
    return mean if len(values) == 1 else f'{mean:.3f} ± {values.std():.3f}'


class Result(NamedTuple):
    """What a setting gave.

    Attributes:
      runs: workdirs of runs that differ only by their seed.
      trained: scenes of the longest stories that they were trained on.
      setting: the setting.
      curves: by score, one list per run with a value per scene.
      recall: scores.by_gap of each run, of stories with a cast.
    """

    runs: list[str]
    trained: int
    setting: Setting
    curves: dict[str, list[list[float]]]
    recall: list[dict[str, float]]

    @property
    def group(self) -> str:
        """The name of the first of the runs."""
        return pathlib.Path(self.runs[0]).name


def _rows(results: list[Result]) -> list[dict]:
    """Rows of the table: two for each result, scenes that are right and characters."""
    rows = []
    for result in results:
        setting = result.setting
        seen = setting.window + setting.sinks + 1
        longer = seen > result.trained
        row = {'run': result.group, 'seeds': len(result.curves['right'])}
        row |= dataclasses.asdict(setting)
        row['note'] = f'longer than trained ({seen}, not {result.trained})' if longer else ''
        for score in ('right', 'identity'):
            curves = np.array(result.curves[score])  # [runs, S]
            shown = [number for number in COLUMNS if number <= curves.shape[1]]
            cells = {str(number): _cell(curves[:, number - 1]) for number in shown}
            rows.append(row | {'score': score} | cells)
    return rows


def _recall_rows(results: list[Result]) -> list[dict]:
    """Rows of the second table: how often a look that comes back is right, by octaves of gaps."""
    rows = []
    for result in results:
        for score in ('identity', 'background'):
            row = {'run': result.group} | dataclasses.asdict(result.setting) | {'score': score}
            for low, high in OCTAVES:
                shares, counts = [], []
                for recall, gap in itertools.product(result.recall, range(low, high + 1)):
                    key = f'{score}/gap {gap}'
                    if key in recall:
                        shares.append(recall[key])
                        counts.append(recall[f'{key}/count'])
                if counts:
                    name = f'gap {low}' if low == high else f'gap {low} to {high}'
                    row[name] = round(float(np.average(shares, weights=counts)), 3)
                    row[f'{name}, scenes'] = sum(counts)
            rows.append(row)
    return rows


def _draw(path: pathlib.Path, results: list[Result]) -> None:
    """The share of scenes that are right by their number: a line for the mean of the runs of a
    result, and their range as a band."""
    picture = figure.Figure(figsize=(9, 5), layout='constrained')
    axes = picture.subplots()
    several = len({result.group for result in results}) > 1
    for result in results:
        curves = np.array(result.curves['right'])  # [runs, S]
        numbers = np.arange(1, curves.shape[1] + 1)
        label = f'{result.group}: {_name(result.setting)}' if several else _name(result.setting)
        axes.plot(numbers, curves.mean(0), label=label)
        axes.fill_between(numbers, curves.min(0), curves.max(0), alpha=0.2)
    axes.set(xlabel='scene', ylabel='share of scenes that are right', ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    with storage.whole_file(path) as temporary:
        picture.savefig(temporary, format='png', dpi=120)


def _write(out: pathlib.Path, told: dict, results: list[Result]) -> str:
    """Writes curves.json, curves.md and curves.png; returns the table."""
    found = told | {
        'results': [
            result._asdict() | {'setting': dataclasses.asdict(result.setting)} for result in results
        ]
    }
    storage.write_text(out / 'curves.json', json.dumps(found, indent=2) + '\n')
    rows = _rows(results)
    table = tables.format_table(rows, list(rows[0]))
    if any(result.recall for result in results):
        rows = _recall_rows(results)
        columns = list(dict.fromkeys(itertools.chain(*rows)))
        table += '\n\n' + tables.format_table(rows, columns)
    storage.write_text(out / 'curves.md', table + '\n')
    _draw(out / 'curves.png', results)
    return table


def _read(out: pathlib.Path, told: dict) -> list[Result]:
    """The results that a folder has already.

    Raises:
      ValueError: if they are of other stories than `told` says.
    """
    path = out / 'curves.json'
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding='utf-8'))
    others = [name for name in told if found.get(name) != told[name]]
    if others:
        raise ValueError(
            f'{path} has curves of other stories: {others[0]} is {found.get(others[0])} there and '
            f'{told[others[0]]} here; give another folder.'
        )
    return [
        Result(**result | {'setting': Setting(**result['setting'])}) for result in found['results']
    ]


def _without_seed(config: config_lib.Config) -> config_lib.Config:
    """What the runs of a row share."""
    return dataclasses.replace(config, seed=0)


def _config_of(workdir) -> config_lib.Config:
    """The configuration of a run.

    Raises:
      ValueError: if the run is not one on stories.
    """
    config = config_lib.load_run(workdir)
    if config.data.encoded:
        raise ValueError(f'{workdir} was trained on encoded videos: only stories are scored.')
    return config


def sweep(
    workdirs: Sequence,
    out,
    settings: list[Setting],
    *,
    num_scenes: int,
    num_stories: int,
    steps: int | None = None,
    seed: int = 0,
) -> str:
    """Tries settings on runs, and writes what is found after each.

    What the folder holds already stays, and is not computed again.

    Args:
      workdirs: of the runs. Those whose configurations differ only by the seed share a row.
      out: folder for curves.json, curves.md and curves.png.
      settings: what is tried.
      num_scenes: scenes of a story.
      num_stories: stories that are told.
      steps: DDIM steps; None for those of the run.
      seed: of the noise.

    Returns:
      The table of curves.md.

    Raises:
      ValueError: if a run is not one on stories, or the folder has curves of other stories.
    """
    configs = {workdir: _config_of(workdir) for workdir in workdirs}
    storage.try_output(out)
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)

    told = {'scenes': num_scenes, 'stories': num_stories, 'steps': steps, 'seed': seed}
    results = _read(out, told)
    shared = [_without_seed(_config_of(result.runs[0])) for result in results]
    for workdir, config in configs.items():
        same = [result for result, one in zip(results, shared) if one == _without_seed(config)]
        missing = list(settings)
        for result in same:
            if str(workdir) in result.runs and result.setting in missing:
                missing.remove(result.setting)
        if not missing:
            continue

        sample = {'sampler': 'ddim', 'steps': steps or config.sample.steps}
        sampled = dataclasses.replace(config, sample=dataclasses.replace(config.sample, **sample))
        stories = sample_stories(sampled, num_stories, num_scenes)
        abstract = names_lib.abstract_params(config.model)
        target = partitioning.abstract_arrays(abstract, pipeline.default_mesh())
        _, params = runs.newest(workdir, config, target)
        codec = latent_codec.for_run(config, workdir)
        for setting in missing:
            curves, recall = tell_and_score(sampled, params, codec, setting, stories, seed=seed)
            found = [result for result in same if result.setting == setting]
            if not found:
                trained = max(map(len, config.data.layouts))
                found = [Result([], trained, setting, {name: [] for name in curves}, [])]
                results += found
                shared.append(_without_seed(config))
            (result,) = found
            result.runs.append(str(workdir))
            for name, curve in curves.items():
                result.curves[name].append(curve.tolist())
            if recall:
                result.recall.append(recall)
            _write(out, told, results)
    return _write(out, told, results)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    logs.quiet_libraries()
    chosen = flags.FLAGS
    numbers = [
        [_whole(name, text) for text in chosen[name].value]
        for name in ('window', 'sinks', 'given_timestep')
    ]
    combinations = itertools.product(*numbers, chosen.captions, chosen.carry)
    table = sweep(
        chosen.run,
        chosen.out,
        [Setting(*values) for values in combinations],
        num_scenes=chosen.scenes,
        num_stories=chosen.stories,
        steps=chosen.steps,
        seed=chosen.seed,
    )
    print(f'{table}\n\nCurves: {chosen.out}/curves.png, curves.md and curves.json')


def _whole(name: str, text: str) -> int:
    least = 1 if name == 'window' else 0
    if not text.isdigit() or int(text) < least:
        raise app.UsageError(f'--{name} has {text!r}: give whole numbers from {least} on.')
    return int(text)


if __name__ == '__main__':
    flags.DEFINE_list(
        'run',
        None,
        'Workdirs of finished runs on stories. Runs that differ only by their seed share a row, '
        'the mean of them with its standard deviation.',
    )
    flags.DEFINE_string('out', None, 'Folder for curves.json, curves.md and curves.png.')
    flags.DEFINE_integer('scenes', 16, 'Scenes of a story.', lower_bound=2)
    flags.DEFINE_integer('stories', 64, 'Stories that are told.', lower_bound=1)
    flags.DEFINE_integer('seed', 0, 'Seed of the noise.', lower_bound=0)
    flags.DEFINE_integer('steps', None, 'DDIM steps; default: those of the run.', lower_bound=1)
    flags.DEFINE_list('window', ['1'], 'Scenes right before a new one that are given.')
    flags.DEFINE_list('sinks', ['1'], 'First scenes of the story that are given on top.')
    flags.DEFINE_list('given_timestep', ['0'], 'Timestep of given scenes, with its noise.')
    flags.DEFINE_multi_enum(
        'captions', ['unnamed'], ['named', 'unnamed'], 'What captions of given scenes say.'
    )
    flags.DEFINE_multi_enum(
        'carry', ['latents'], ['latents', 'pixels', 'keys'], 'How given scenes are carried on.'
    )
    ranges.check_flag('seed', config_lib.Config, 'seed')
    paths.check_flags_local('run', 'out')
    flags.mark_flags_as_required(['run', 'out'])
    app.run(main)
