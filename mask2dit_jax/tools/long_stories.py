"""Tells long stories with a model of the stories' world, and scores every scene exactly.

Required flags: --run, the workdir of a finished run, and --out, the folder to write.

  python -m mask2dit_jax.tools.long_stories --run=runs/tiny --out=drift
  python -m mask2dit_jax.tools.long_stories --run=runs/tiny --out=drift --scenes=50 \\
    --window=2,3 --sinks=0,1 --given_timestep=0,20

The first scenes are generated together, as many as the run was trained on, and their first caption
says who and where. Every later scene is generated from a window and the sinks, as `sample` does it.
All combinations of the lists are tried, on the same stories with the same noise.

With --captions=unnamed (the default) no caption that a later scene is given says who and where: the
first one, where it is given again, is replaced by one that says only what happens. Character and
place can then come from the given pixels alone. --captions=named keeps the first caption.

--carry=pixels takes given scenes through pixels and the codec each time, where --carry=latents
gives their latents as they were generated.

--out receives curves.json, curves.md and curves.png: for every combination the share of scenes that
are right (action, character and place), by the number of the scene. Rows that show more scenes to
the model than it was trained on say so.
"""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import tqdm
from absl import app, flags
from matplotlib import figure

from mask2dit_jax import config as config_lib
from mask2dit_jax import generation, logs, paths, ranges, storage, tables
from mask2dit_jax.data import latent_codec
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.pretrained import names as names_lib
from mask2dit_jax.pretrained import runs
from mask2dit_jax.stories import scores, world

# The seed of the stories that are told.
STORIES_SEED = 5

SHOWN = ('right', 'action', 'identity', 'background')
# Scenes, counted from 1, that the table has columns for.
COLUMNS = (3, 4, 5, 8, 12, 16, 24, 32, 50)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One combination that is tried.

    Attributes:
      window: scenes right before a new one that are given.
      sinks: first scenes of the story that are given on top.
      given_timestep: timestep of given scenes, with its noise.
      captions: 'named' or 'unnamed'.
      carry: 'latents' or 'pixels'.
    """

    window: int
    sinks: int
    given_timestep: int
    captions: str
    carry: str


def tell_and_score(
    config: config_lib.Config,
    params,
    codec: latent_codec.LatentCodec,
    setting: Setting,
    *,
    num_scenes: int,
    num_stories: int,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """Tells stories and scores them.

    Args:
      config, params, codec: of the run.
      setting: how later scenes are generated.
      num_scenes: S, scenes of a story; all have the frames of the run's first scene.
      num_stories: B, the stories; none of them is in the training split.
      seed: of the noise.
      batch_size: stories that are told at once.

    Returns:
      The shares of scenes that are right, float [S] each: SHOWN, and 'residual'.
    """
    sample = dataclasses.replace(config.sample, given_timestep=setting.given_timestep)
    config = dataclasses.replace(config, sample=sample)
    layout = config.data.layouts[0]
    frames = layout[:1] * num_scenes
    rng = np.random.default_rng(STORIES_SEED)
    size_px = latent_codec.square(config.data)
    stories = [
        world.sample_story(rng, frames, split='test', size_px=size_px) for _ in range(num_stories)
    ]
    blocks = generation.plan_blocks(
        num_scenes, 0, joint=len(layout), window=setting.window, sinks=setting.sinks
    )

    parts = []
    starts = range(0, num_stories, batch_size)
    with tqdm.tqdm(total=len(blocks) * len(starts), desc=str(setting), unit='block') as bar:
        for first in starts:
            part = stories[first : first + batch_size]
            named, later = (
                generation.encode_inputs(
                    codec, [world.captions(story, style) for story in part], frames
                )
                for style in ('first', 'first' if setting.captions == 'named' else 'never')
            )
            told, pixels = [], []
            for block in blocks:
                inputs = later if block.start else named
                new = generation.tell(
                    config, params, inputs, block, told, seed=seed, first_index=first
                )
                for scene, latents in zip(range(block.start, block.stop), new):
                    length = (inputs.latent_frames[scene],)
                    pixels.append(codec.decode_video(latents, length))  # [B, F, H, W, 3]
                    if setting.carry == 'pixels':
                        latents = codec.encode_video(pixels[-1], frames[scene : scene + 1])
                    told.append(latents)
                bar.update()
            parts.append(scores.score(np.concatenate(pixels, axis=1), part))

    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}  # [B, S]
    found['right'] = found['action'] & found['identity'] & found['background']
    return {name: found[name].mean(0) for name in (*SHOWN, 'residual')}


def _rows(results: list[tuple[Setting, dict]], trained: int, num_scenes: int) -> list[dict]:
    """Rows of the table: two for each setting, scenes that are right and characters."""
    rows = []
    for setting, curves in results:
        seen = setting.window + setting.sinks + 1
        row = dataclasses.asdict(setting)
        row['note'] = f'longer than trained ({seen}, not {trained})' if seen > trained else ''
        for score in ('right', 'identity'):
            shown = [number for number in COLUMNS if number <= num_scenes]
            values = {str(number): round(float(curves[score][number - 1]), 3) for number in shown}
            rows.append(row | {'score': score} | values)
    return rows


def _draw(path: pathlib.Path, results: list[tuple[Setting, dict]]) -> None:
    """The share of scenes that are right by their number, a line for each setting."""
    picture = figure.Figure(figsize=(9, 5), layout='constrained')
    axes = picture.subplots()
    for setting, curves in results:
        label = (
            f'window {setting.window}, sinks {setting.sinks}, t {setting.given_timestep}, '
            f'{setting.captions}, {setting.carry}'
        )
        axes.plot(np.arange(1, len(curves['right']) + 1), curves['right'], label=label)
    axes.set(xlabel='scene', ylabel='share of scenes that are right', ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    with storage.whole_file(path) as temporary:
        picture.savefig(temporary, format='png', dpi=120)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    logs.quiet_libraries()
    chosen = flags.FLAGS
    workdir = pathlib.Path(chosen.run)
    config = config_lib.load_run(workdir)
    if config.data.encoded:
        raise ValueError(f'{workdir} was trained on encoded videos: only stories are scored.')
    sample = {'sampler': 'ddim', 'steps': chosen.steps or config.sample.steps}
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, **sample))
    trained = max(map(len, config.data.layouts))
    numbers = {
        name: [_whole(name, text) for text in chosen[name].value]
        for name in ('window', 'sinks', 'given_timestep')
    }
    settings = [
        Setting(*values)
        for values in itertools.product(*numbers.values(), chosen.captions, chosen.carry)
    ]
    storage.try_output(chosen.out)

    abstract = names_lib.abstract_params(config.model)
    target = partitioning.abstract_arrays(abstract, mesh_lib.make_mesh(config.mesh))
    _, params = runs.newest(workdir, config, target)
    codec = latent_codec.for_run(config, workdir)

    out = pathlib.Path(chosen.out)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for setting in settings:
        curves = tell_and_score(
            config,
            params,
            codec,
            setting,
            num_scenes=chosen.scenes,
            num_stories=chosen.stories,
            seed=chosen.seed,
        )
        results.append((setting, curves))
        found = [
            dataclasses.asdict(setting) | {name: curve.tolist() for name, curve in curves.items()}
            for setting, curves in results
        ]
        storage.write_text(out / 'curves.json', json.dumps(found, indent=2) + '\n')
        rows = _rows(results, trained, chosen.scenes)
        table = tables.format_table(rows, list(rows[0]))
        storage.write_text(out / 'curves.md', table + '\n')
        _draw(out / 'curves.png', results)
    print(f'{table}\n\nCurves: {out}/curves.png, curves.md and curves.json')


def _whole(name: str, text: str) -> int:
    least = 1 if name == 'window' else 0
    if not text.isdigit() or int(text) < least:
        raise app.UsageError(f'--{name} has {text!r}: give whole numbers from {least} on.')
    return int(text)


if __name__ == '__main__':
    flags.DEFINE_string('run', None, 'Workdir of a finished run on stories.')
    flags.DEFINE_string('out', None, 'Folder for curves.json, curves.md and curves.png.')
    flags.DEFINE_integer('scenes', 16, 'Scenes of a story.', lower_bound=2)
    flags.DEFINE_integer('stories', 64, 'Stories that are told.', lower_bound=1)
    flags.DEFINE_integer('seed', 0, 'Seed of the noise.', lower_bound=0)
    flags.DEFINE_integer('steps', None, 'DDIM steps; default: those of the run.', lower_bound=1)
    flags.DEFINE_list('window', ['2'], 'Scenes right before a new one that are given.')
    flags.DEFINE_list('sinks', ['0'], 'First scenes of the story that are given on top.')
    flags.DEFINE_list('given_timestep', ['0'], 'Timestep of given scenes, with its noise.')
    flags.DEFINE_multi_enum(
        'captions', ['unnamed'], ['named', 'unnamed'], 'What captions of given scenes say.'
    )
    flags.DEFINE_multi_enum(
        'carry', ['latents'], ['latents', 'pixels'], 'How given scenes are carried on.'
    )
    ranges.check_flag('seed', config_lib.Config, 'seed')
    paths.check_flags_local('run', 'out')
    flags.mark_flags_as_required(['run', 'out'])
    app.run(main)
