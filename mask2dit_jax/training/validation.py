"""What is looked at during and after training: sample grids, scores and held-out losses."""

import json
import pathlib

import jax
import numpy as np
import tqdm

from mask2dit_jax import config as config_lib
from mask2dit_jax import logs, pipeline, tables
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import clips, latent_codec, sheets, story_file, video
from mask2dit_jax.diffusion import loss as loss_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.models import dit
from mask2dit_jax.stories import builder, world
from mask2dit_jax.stories import scores as scores_lib

SCORE_COLUMNS = (
    'task',
    'frames',
    'action',
    'identity',
    'background',
    'consistency',
    'story',
    'leak',
    'color',
    'shape',
    'residual',
    'loss',
)
SCORE_NOTES = {
    'residual': 'residual: distance to the best rendering, lower is cleaner.',
    'loss': 'loss: of v-prediction at fixed noise, over scenes that are not given.',
}


def generate_held_out(
    config: config_lib.Config,
    params,
    codec: latent_codec.LatentCodec,
    source: builder.StorySource,
    frames: tuple[int, ...],
    given_scenes: int,
    desc: str,
) -> tuple[np.ndarray, list[world.Story]]:
    """Videos float32 [config.eval.stories, F, H, W, 3] of held-out stories, leading scenes given;
    and the stories."""
    size, total = config.eval.batch_size, config.eval.stories
    videos, known = [], []
    for first in tqdm.tqdm(
        range(0, total, size), desc=desc, unit='batch', disable=jax.process_index() != 0
    ):
        examples = [source[i % len(source)] for i in range(first, first + size)]
        known += [e['story'] for e in examples]
        captions = [world.captions(s, config.data.caption_style) for s in known[-size:]]
        given = (
            np.stack([e['video'][: sum(frames[:given_scenes])] for e in examples])
            if given_scenes
            else None
        )
        videos.append(
            pipeline.generate(
                config,
                params,
                codec,
                captions,
                frames,
                seed=config.seed,
                first_index=first,
                given_videos=given,
            )
        )
    return np.concatenate(videos)[:total], known[:total]


def score_stories(
    config: config_lib.Config, params, codec: latent_codec.LatentCodec, workdir
) -> list[dict]:
    """Exact scores on held-out stories: generation and extension, for every layout of the
    configuration.

    Returns:
      One row per task and layout, the keys of SCORE_COLUMNS and scores per scene.
    """
    rows = []
    for frames in dict.fromkeys(config.data.layouts):
        source = batches_lib.open_stories(config, workdir, frames, 'test')
        name = '+'.join(map(str, frames))
        tasks = {'generate': 0, f'extend {len(frames) - 1} given': len(frames) - 1}
        for task, given in tasks.items() if len(frames) > 1 else [('generate', 0)]:
            picked = tuple(range(given, len(frames)))
            videos, known = generate_held_out(
                config, params, codec, source, frames, given, f'scoring {task} {name}'
            )
            scores = scores_lib.summarize(
                scores_lib.score(videos, known, scenes=picked), scenes=picked
            )
            rows.append({'task': task, 'frames': name} | scores)
    return rows


def _held_out(config, workdir, codec, frames, count: int, given_scenes: int):
    """Captions, and what the transformer gets, of `count` stories: held-out ones, with leading
    scenes given."""
    if not config.data.encoded:
        source = batches_lib.open_stories(config, workdir, frames, 'test')
        examples = [source[i] for i in range(count)]
        captions = [world.captions(e['story'], config.data.caption_style) for e in examples]
        given = (
            np.stack([e['video'][: sum(frames[:given_scenes])] for e in examples])
            if given_scenes
            else None
        )
        return captions, pipeline.encode_inputs(codec, captions, frames, given)
    encoded = clips.EncodedClips(
        config, codec.latent_shape, config.data.held_out or config.data.encoded
    )
    picked = encoded.fixed(frames, count)
    examples = [encoded.example(records, None) for records in picked]
    latent_frames = codec.latent_frames(frames)
    given = np.stack([e['latents'] for e in examples])
    given[:, sum(latent_frames[:given_scenes]) :] = 0
    marks = np.tile(np.arange(len(frames)) < given_scenes, (count, 1))
    inputs = pipeline.Inputs(
        latent_frames, np.stack([e['text'] for e in examples]), encoded.null_text, given, marks
    )
    return [encoded.captions(records) for records in picked], inputs


def _tasks(frames) -> dict[str, int]:
    """Given scenes by task: generation, and extension by the last scene."""
    return {'generated': 0, 'extended': len(frames) - 1} if len(frames) > 1 else {'generated': 0}


def write_sample_grids(
    config: config_lib.Config, params, codec: latent_codec.LatentCodec, workdir, step: int
) -> list[pathlib.Path]:
    """Sample sheets of held-out stories: generated from captions, and extended from all scenes but
    the last.

    Beside each picture stands a .json of its captions: {"stories": [[caption, ...], ...],
    "given_scenes": 0}.
    """
    frames, count = config.data.layouts[0], config.sample.sheet_stories
    paths = []
    for name, given in _tasks(frames).items():
        captions, inputs = _held_out(config, workdir, codec, frames, count, given)
        out = codec.decode_video(
            pipeline.sample_latents(config, params, inputs, seed=config.seed), inputs.latent_frames
        )
        paths.append(pathlib.Path(workdir) / 'sheets' / f'{step:08d}_{name}.png')
        if jax.process_index() == 0:
            grid = [story_file.split_scenes(v, frames) for v in out]
            marks = [[i < given for i in range(len(frames))]] * count
            video.write_png(paths[-1], sheets.story_grid(grid, captions, given=marks))
            known = {'stories': [list(c) for c in captions], 'given_scenes': given}
            paths[-1].with_suffix('.json').write_text(json.dumps(known) + '\n', encoding='utf-8')
    return paths


def held_out_losses(
    config: config_lib.Config, params, codec: latent_codec.LatentCodec
) -> list[dict]:
    """Denoising loss of encoded clips, for generation and extension, at the same noise and
    timesteps every time.

    Returns:
      One row per task and layout: 'task', 'frames', 'loss'.
    """
    rows, schedule, mesh = [], config.schedule, mesh_lib.mesh_of(params)
    encoded = clips.EncodedClips(
        config, codec.latent_shape, config.data.held_out or config.data.encoded
    )
    size, total = config.eval.batch_size, config.eval.stories
    spread = mesh_lib.batch_sharding(mesh)
    for frames in dict.fromkeys(config.data.layouts):
        picked, latent_frames = encoded.fixed(frames, total), codec.latent_frames(frames)

        def loss(params, batch, noise, t, given, latent_frames=latent_frames):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                error, count = loss_lib.denoising_loss(
                    dit.DiT(config.model), params, schedule, batch, noise, t, given, latent_frames
                )
                return error / count

        run = jax.jit(
            loss, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        )
        for task, given_scenes in _tasks(frames).items():
            values = []
            for first in range(0, total, size):
                examples = [encoded.example(p, None) for p in picked[first : first + size]]
                batch = {k: np.stack([e[k] for e in examples]) for k in examples[0]}
                rng = np.random.default_rng([config.seed, first])
                t = (np.arange(size) + 0.5) / size * schedule.num_train_timesteps
                given = np.tile(np.arange(len(frames)) < given_scenes, (size, 1))
                noise = rng.standard_normal(batch['latents'].shape, np.float32)
                args = jax.tree.map(
                    lambda x: jax.make_array_from_callback(x.shape, spread, lambda i, x=x: x[i]),
                    (batch, noise, t.astype(np.int32), given),
                )
                values.append(float(run(params, *args)))
            rows.append(
                {'task': task, 'frames': '+'.join(map(str, frames)), 'loss': float(np.mean(values))}
            )
    return rows


def by_task(sheets: list[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Sheets by name, without their steps; only process 0 has drawn them."""
    return {path.stem.split('_', 1)[1]: path for path in sheets}


def write_scores(rows: list[dict], workdir: pathlib.Path, seconds: float) -> None:
    if jax.process_index() != 0:
        return
    (workdir / 'scores.json').write_text(json.dumps(rows, indent=2) + '\n')
    columns = [c for c in SCORE_COLUMNS if c in rows[0]]
    table = tables.format_table(
        [{k: round(v, 3) if isinstance(v, float) else v for k, v in r.items()} for r in rows],
        columns,
    )
    (workdir / 'scores.md').write_text(table + '\n')
    print(
        f'\n{table}\n\n{SCORE_NOTES[columns[-1]]} Total time {logs.format_eta(seconds)}.\n'
        f'Scores: {workdir}/scores.md and scores.json   Pictures: {workdir}/sheets   '
        f'Curves: {workdir}/metrics.jsonl\n'
        f'Next: python -m mask2dit_jax.sample --workdir={workdir} --prompt="red ring on gray moves left" '
        f'--prompt="it grows" --prompt="it blinks"'
    )
