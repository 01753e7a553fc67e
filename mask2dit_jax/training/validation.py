"""Looking at a model during and after training.

Three parts: sample grids (pictures of held-out stories), exact scores (of rendered stories, whose
right answer is known), and held-out losses (of encoded clips, which have no exact scores). The last
part of the file writes scores or losses as tables.
"""

import json
import pathlib

import jax
import numpy as np
import tqdm

from mask2dit_jax import config as config_lib
from mask2dit_jax import logs, pipeline, storage, tables
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import encoded_clips, latent_codec, sheets, story_file, video
from mask2dit_jax.diffusion import loss as loss_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import watchdog
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
    'loss': 'loss: error of the predicted v at fixed noise, over the scenes that are not given.',
}


def _layout_name(frames: tuple[int, ...]) -> str:
    """Frames per scene as in '4+4+8'."""
    return '+'.join(map(str, frames))


def _given_scenes_by_task(frames: tuple[int, ...]) -> dict[str, int]:
    """The number of leading scenes that are given in each task: in generation none, in extension
    all but the last."""
    if len(frames) == 1:
        return {'generated': 0}
    return {'generated': 0, 'extended': len(frames) - 1}


def _given_videos(examples: list[dict], frames: tuple[int, ...], given_scenes: int):
    """Pixels of the leading scenes, [B, F, H, W, 3]; None if no scene is given."""
    if not given_scenes:
        return None
    given_frames = sum(frames[:given_scenes])
    return np.stack([example['video'][:given_frames] for example in examples])


def _open_held_out_clips(
    config: config_lib.Config, codec: latent_codec.LatentCodec
) -> encoded_clips.EncodedClips:
    """The held-out clips; those of training where the configuration names no others."""
    folder = config.data.held_out or config.data.encoded
    return encoded_clips.EncodedClips(config, codec.latent_shape, folder)


# 1. Sample grids.


def write_sample_grids(
    config: config_lib.Config, params, codec: latent_codec.LatentCodec, workdir, step: int
) -> list[pathlib.Path]:
    """Draws sample grids of held-out stories, one row per story, for generation and extension.

    Generation starts from captions alone; in extension all scenes but the last are given. The
    stories are those of the configuration's first layout.

    Args:
      config: the configuration.
      params: the model's parameters on the mesh.
      codec: the codec of the run.
      workdir: pictures are <workdir>/sheets/<step>_<task>.png. Beside each is a .json of its
        captions: {"stories": [[caption, ...], ...], "given_scenes": 0}.
      step: the number of steps done.

    Returns:
      The paths of the pictures, which process 0 alone writes.
    """
    frames = config.data.layouts[0]
    num_stories = config.sample.sheet_stories

    paths = []
    for task, given_scenes in _given_scenes_by_task(frames).items():
        captions, inputs = _sample_inputs(config, workdir, codec, frames, num_stories, given_scenes)
        latents = pipeline.sample_latents(config, params, inputs, seed=config.seed)
        videos = codec.decode_video(latents, inputs.latent_frames)

        path = _grid_path(workdir, step, task)
        paths.append(path)

        # All processes take part in sampling, but one is enough to draw.
        if jax.process_index() == 0:
            _write_grid(path, videos, frames, captions, given_scenes)

    return paths


def _grid_path(workdir, step: int, task: str) -> pathlib.Path:
    return pathlib.Path(workdir) / 'sheets' / f'{step:08d}_{task}.png'


def has_sample_grids(config: config_lib.Config, workdir, step: int) -> bool:
    """Whether all sample grids of a step are in the workdir."""
    tasks = _given_scenes_by_task(config.data.layouts[0])
    return all(_grid_path(workdir, step, task).exists() for task in tasks)


def by_task(paths: list[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Sample grids by task, 'generated' or 'extended', as their file names have it."""
    return {path.stem.split('_', maxsplit=1)[1]: path for path in paths}


def _sample_inputs(
    config: config_lib.Config,
    workdir,
    codec: latent_codec.LatentCodec,
    frames: tuple[int, ...],
    num_stories: int,
    given_scenes: int,
) -> tuple[list[list[str]], pipeline.Inputs]:
    """Captions of held-out stories, and what the transformer gets for them."""
    if config.data.encoded:
        return _clip_inputs(config, codec, frames, num_stories, given_scenes)

    source = batches_lib.open_stories(config, workdir, frames, 'test')
    examples = [source[i] for i in range(num_stories)]
    captions = [world.captions(example['story'], config.data.caption_style) for example in examples]
    given_videos = _given_videos(examples, frames, given_scenes)
    return captions, pipeline.encode_inputs(codec, captions, frames, given_videos)


def _clip_inputs(
    config: config_lib.Config,
    codec: latent_codec.LatentCodec,
    frames: tuple[int, ...],
    num_stories: int,
    given_scenes: int,
) -> tuple[list[list[str]], pipeline.Inputs]:
    """`_sample_inputs` from encoded clips, whose latents and text are there already."""
    encoded = _open_held_out_clips(config, codec)
    stories = encoded.fixed(frames, num_stories)

    # Without a random generator the latents are the posterior's mean, the same every time.
    examples = [encoded.example(records, None) for records in stories]
    captions = [encoded.captions(records) for records in stories]

    # The latents of the scenes that are to be generated are not shown.
    latent_frames = codec.latent_frames(frames)
    given = np.stack([example['latents'] for example in examples])  # [B, T, H, W, C]
    given[:, sum(latent_frames[:given_scenes]) :] = 0

    is_given = np.arange(len(frames)) < given_scenes
    inputs = pipeline.Inputs(
        latent_frames=latent_frames,
        text=np.stack([example['text'] for example in examples]),
        null_text=encoded.null_text,
        given=given,
        given_scenes=np.tile(is_given, (num_stories, 1)),
    )
    return captions, inputs


def _write_grid(
    path: pathlib.Path,
    videos,
    frames: tuple[int, ...],
    captions: list[list[str]],
    given_scenes: int,
) -> None:
    """The picture, and its captions beside it."""
    stories = [story_file.split_scenes(story, frames) for story in videos]
    is_given = [scene < given_scenes for scene in range(len(frames))]
    grid = sheets.story_grid(stories, captions, given=[is_given] * len(stories))

    description = {
        'stories': [list(story_captions) for story_captions in captions],
        'given_scenes': given_scenes,
    }
    # The picture comes last: where it is, the captions are.
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_text(path.with_suffix('.json'), json.dumps(description) + '\n')
    with storage.whole_file(path) as temporary:
        video.write_png(temporary, grid)


# 2. Exact scores of rendered stories.


def generate_held_out(
    config: config_lib.Config,
    params,
    codec: latent_codec.LatentCodec,
    source: builder.StorySource,
    frames: tuple[int, ...],
    given_scenes: int,
    desc: str,
) -> tuple[np.ndarray, list[world.Story]]:
    """Generates videos of held-out stories.

    Args:
      config: the configuration; config.eval says how many stories, and how many per batch.
      params: the model's parameters on the mesh.
      codec: the codec of the run.
      source: the held-out stories, which come again if there are fewer.
      frames: frames per scene.
      given_scenes: the number of leading scenes that are given.
      desc: the text before the progress bar.

    Returns:
      Videos float32 [config.eval.stories, F, H, W, 3], and the stories that they should show.
    """
    batch_size = config.eval.batch_size
    num_stories = config.eval.stories

    videos = []
    stories = []
    starts = range(0, num_stories, batch_size)
    for first in tqdm.tqdm(starts, desc=desc, unit='batch', disable=jax.process_index() != 0):
        watchdog.enter('score')
        examples = [source[i % len(source)] for i in range(first, first + batch_size)]
        batch_stories = [example['story'] for example in examples]
        stories += batch_stories

        captions = [world.captions(story, config.data.caption_style) for story in batch_stories]
        generated = pipeline.generate(
            config,
            params,
            codec,
            captions,
            frames,
            seed=config.seed,
            first_index=first,
            given_videos=_given_videos(examples, frames, given_scenes),
        )
        videos.append(generated)

    return np.concatenate(videos)[:num_stories], stories[:num_stories]


def score_stories(
    config: config_lib.Config, params, codec: latent_codec.LatentCodec, workdir
) -> list[dict]:
    """Computes exact scores on held-out stories, for generation and extension of every layout.

    Args:
      config: the configuration.
      params: the model's parameters on the mesh.
      codec: the codec of the run.
      workdir: the run's folder, beside which the stories are kept.

    Returns:
      One row per layout and task, with the keys of SCORE_COLUMNS and scores per scene.
    """
    rows = []
    for frames in dict.fromkeys(config.data.layouts):
        source = batches_lib.open_stories(config, workdir, frames, 'test')
        layout_name = _layout_name(frames)

        # The names say how many scenes are given: layouts of several lengths stand in one table.
        given_scenes_by_task = {'generate': 0}
        if len(frames) > 1:
            given_scenes_by_task[f'extend {len(frames) - 1} given'] = len(frames) - 1

        for task, given_scenes in given_scenes_by_task.items():
            videos, stories = generate_held_out(
                config, params, codec, source, frames, given_scenes, f'scoring {task} {layout_name}'
            )
            # Given scenes would be right without the model.
            scored = tuple(range(given_scenes, len(frames)))
            scores = scores_lib.score(videos, stories, scenes=scored)
            summary = scores_lib.summarize(scores, scenes=scored)
            rows.append({'task': task, 'frames': layout_name} | summary)

    return rows


# 3. Held-out losses of encoded clips.


def held_out_losses(
    config: config_lib.Config, params, codec: latent_codec.LatentCodec
) -> list[dict]:
    """Computes the denoising loss of held-out clips, for generation and extension of every layout.

    Noise and timesteps are the same every time, so that the losses of two runs can be compared.

    Args:
      config: the configuration; config.eval says how many stories, and how many per batch.
      params: the model's parameters on the mesh.
      codec: the codec of the run.

    Returns:
      One row per layout and task: 'task', 'frames', 'loss'.
    """
    mesh = mesh_lib.mesh_of(params)
    encoded = _open_held_out_clips(config, codec)
    batch_size = config.eval.batch_size
    num_stories = config.eval.stories

    rows = []
    for frames in dict.fromkeys(config.data.layouts):
        stories = encoded.fixed(frames, num_stories)
        jitted_loss = _jit_loss(config, codec.latent_frames(frames), mesh)

        for task, given_scenes in _given_scenes_by_task(frames).items():
            is_given = np.arange(len(frames)) < given_scenes
            losses = []
            for first in range(0, num_stories, batch_size):
                watchdog.enter('score')
                # The posterior's mean, as in sample grids.
                records_of_batch = stories[first : first + batch_size]
                examples = [encoded.example(records, None) for records in records_of_batch]
                arguments = _loss_arguments(config, examples, is_given, first)
                losses.append(float(jitted_loss(params, *_spread(arguments, mesh))))

            row = {'task': task, 'frames': _layout_name(frames), 'loss': float(np.mean(losses))}
            rows.append(row)

    return rows


def _jit_loss(config: config_lib.Config, latent_frames: tuple[int, ...], mesh: jax.sharding.Mesh):
    """The mean loss of a batch of one layout, compiled."""

    def loss(params, batch, noise, timesteps, given):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            error, count = loss_lib.denoising_loss(
                dit.DiT(config.model),
                params,
                config.schedule,
                batch,
                noise,
                timesteps,
                given,
                latent_frames,
            )
            return error / count

    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(loss, out_shardings=replicated)


def _loss_arguments(
    config: config_lib.Config, examples: list[dict], is_given: np.ndarray, first: int
):
    """(batch, noise, timesteps, given) of one batch; the noise depends on the seed and on the
    index of the first story alone."""
    batch_size = config.eval.batch_size
    batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}

    rng = np.random.default_rng([config.seed, first])
    noise = rng.standard_normal(batch['latents'].shape, np.float32)  # [B, T, H, W, C]

    # The middles of B equal parts of the range.
    fractions = (np.arange(batch_size) + 0.5) / batch_size
    timesteps = fractions * config.schedule.num_train_timesteps

    given = np.tile(is_given, (batch_size, 1))  # [B, S]
    return batch, noise, timesteps.astype(np.int32), given


def _spread(arrays, mesh: jax.sharding.Mesh):
    """Arrays [B, ...] that every process has, on the mesh by rows."""
    sharding = mesh_lib.batch_sharding(mesh)

    def spread(array):
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(spread, arrays)


# The table at the end of a run.


def write_scores(rows: list[dict], workdir: pathlib.Path, seconds: float) -> None:
    """Writes scores.json and scores.md on process 0, and prints the table and what to do next.

    Args:
      rows: of `score_stories` or `held_out_losses`.
      workdir: the run's folder.
      seconds: the time that the whole run took.
    """
    if jax.process_index() != 0:
        return

    storage.write_text(workdir / 'scores.json', json.dumps(rows, indent=2) + '\n')

    columns = [column for column in SCORE_COLUMNS if column in rows[0]]
    table = tables.format_table([_rounded(row) for row in rows], columns)
    storage.write_text(workdir / 'scores.md', table + '\n')

    print(
        f'\n{table}\n\n'
        f'{SCORE_NOTES[columns[-1]]} Total time {logs.format_eta(seconds)}.\n'
        f'Scores: {workdir}/scores.md and scores.json   Pictures: {workdir}/sheets   '
        f'Curves: {workdir}/metrics.jsonl\n'
        f'Next: python -m mask2dit_jax.sample --workdir={workdir} '
        '--prompt="red ring on gray moves left" --prompt="it grows" --prompt="it blinks"'
    )


def _rounded(row: dict) -> dict:
    """A row with its floats rounded to three decimals, for the table."""
    return {
        key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()
    }
