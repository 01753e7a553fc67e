"""Looking at a model during and after training.

Three parts: sample grids (pictures of held-out stories), exact scores (of rendered stories, whose
right answer is known), and held-out losses (of encoded clips, which have no exact scores). The last
part of the file writes scores or losses as tables.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mask2dit_jax import config as config_lib
from mask2dit_jax import generation, logs, storage, tables
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import encoded_clips, latent_codec, sheets, story_file, video
from mask2dit_jax.diffusion import loss as loss_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import multihost, watchdog
from mask2dit_jax.layout import frame_scenes
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
    'cut_deviation',
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

    paths = []
    for task, given_scenes in _given_scenes_by_task(frames).items():
        grid = _sample_grid(config, params, codec, workdir, frames, given_scenes)

        path = _grid_path(workdir, step, task)
        paths.append(path)

        # All processes take part in sampling, but one is enough to draw.
        if jax.process_index() == 0:
            _write_grid(path, grid, given_scenes)

    return paths


class _Story(NamedTuple):
    """What a sample grid shows of one story.

    Attributes:
      captions: one for each scene.
      scenes: sheets.thumbnails of each scene.
    """

    captions: list[str]
    scenes: list[np.ndarray]


def _sample_grid(
    config: config_lib.Config,
    params,
    codec: latent_codec.LatentCodec,
    workdir,
    frames: tuple[int, ...],
    given_scenes: int,
) -> list[_Story]:
    """Samples the stories of a grid. Each process holds the videos of its own stories alone, and
    gives the others no more than what the grid shows."""
    mesh = mesh_lib.mesh_of(params)
    num_stories = config.sample.sheet_stories
    rows = mesh_lib.local_rows(mesh, num_stories)

    captions, inputs = _sample_inputs(config, workdir, codec, frames, rows, given_scenes)
    latents = generation.sample_latents(
        config, params, inputs, seed=config.seed, batch_size=num_stories
    )
    videos = generation.decode_owned(codec, latents, inputs.latent_frames, mesh, num_stories)

    own = {}
    for row, pixels in zip(mesh_lib.owned_rows(mesh, num_stories), videos):
        text = json.dumps(list(captions[rows.index(row)])).encode()
        own[f'{row}/captions'] = np.frombuffer(text, np.uint8)
        for scene, clip in enumerate(story_file.split_scenes(pixels, frames)):
            own[f'{row}/{scene}'] = sheets.thumbnails(clip)

    shown = {}
    for arrays in multihost.gather(own):
        shown |= arrays

    stories = []
    for row in range(num_stories):
        text = shown[f'{row}/captions'].tobytes()
        scenes = [shown[f'{row}/{scene}'] for scene in range(len(frames))]
        stories.append(_Story(json.loads(text), scenes))
    return stories


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
    rows: list[int],
    given_scenes: int,
) -> tuple[list[list[str]], generation.Inputs]:
    """Captions of some rows of the grid, and what the transformer gets for them."""
    if config.data.encoded:
        return _clip_inputs(config, codec, frames, rows, given_scenes)

    source = batches_lib.open_stories(config, workdir, frames, 'test')
    examples = [source[row] for row in rows]
    captions = [world.captions(example['story'], config.data.caption_style) for example in examples]
    given_videos = _given_videos(examples, frames, given_scenes)
    return captions, generation.encode_inputs(codec, captions, frames, given_videos)


def _clip_inputs(
    config: config_lib.Config,
    codec: latent_codec.LatentCodec,
    frames: tuple[int, ...],
    rows: list[int],
    given_scenes: int,
) -> tuple[list[list[str]], generation.Inputs]:
    """`_sample_inputs` from encoded clips, whose latents and text are there already."""
    encoded = _open_held_out_clips(config, codec)
    fixed = encoded.fixed(frames, config.sample.sheet_stories)
    stories = [fixed[row] for row in rows]

    # Without a random generator the latents are the posterior's mean, the same every time.
    examples = [encoded.example(records, None) for records in stories]
    captions = [encoded.captions(records) for records in stories]

    # The latents of the scenes that are to be generated are not shown.
    latent_frames = codec.latent_frames(frames)
    given = np.stack([example['latents'] for example in examples])  # [B, T, H, W, C]
    given[:, sum(latent_frames[:given_scenes]) :] = 0

    is_given = np.arange(len(frames)) < given_scenes
    inputs = generation.Inputs(
        latent_frames=latent_frames,
        text=np.stack([example['text'] for example in examples]),
        null_text=encoded.null_text,
        given=given,
        given_scenes=np.tile(is_given, (len(rows), 1)),
    )
    return captions, inputs


def _write_grid(path: pathlib.Path, stories: list[_Story], given_scenes: int) -> None:
    """The picture, and its captions beside it."""
    captions = [story.captions for story in stories]
    given = [[scene < given_scenes for scene in range(len(story.scenes))] for story in stories]
    grid = sheets.story_grid([story.scenes for story in stories], captions, given=given)

    # The picture comes last: where it is, the captions are.
    description = {'stories': captions, 'given_scenes': given_scenes}
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_text(path.with_suffix('.json'), json.dumps(description) + '\n')
    with storage.whole_file(path) as temporary:
        video.write_png(temporary, grid)


# 2. Exact scores of rendered stories.


class _Generated(NamedTuple):
    """The stories of one batch that this process owns.

    Attributes:
      indices: of each story among the held-out stories.
      videos: float32 [B, F, H, W, 3].
      stories: what the videos should show.
    """

    indices: list[int]
    videos: np.ndarray
    stories: list[world.AnyStory]


def _generated_batches(
    config: config_lib.Config,
    params,
    codec: latent_codec.LatentCodec,
    source: builder.StorySource,
    frames: tuple[int, ...],
    given_scenes: int,
    caption_style: str,
    desc: str,
) -> Iterator[_Generated]:
    """Generates videos of held-out stories, batch by batch; arguments as `generate_held_out`."""
    mesh = mesh_lib.mesh_of(params)
    batch_size = config.eval.batch_size
    rows = mesh_lib.local_rows(mesh, batch_size)
    owned = mesh_lib.owned_rows(mesh, batch_size)

    starts = range(0, config.eval.stories, batch_size)
    for first in tqdm.tqdm(starts, desc=desc, unit='batch', disable=jax.process_index() != 0):
        watchdog.enter('score')
        examples = [source[(first + row) % len(source)] for row in rows]
        stories = [example['story'] for example in examples]

        captions = [world.captions(story, caption_style, given_scenes) for story in stories]
        videos = generation.generate(
            config,
            params,
            codec,
            captions,
            frames,
            seed=config.seed,
            first_index=first,
            given_videos=_given_videos(examples, frames, given_scenes),
            batch_size=batch_size,
        )
        own_stories = [stories[rows.index(row)] for row in owned]
        yield _Generated([first + row for row in owned], videos, own_stories)


def generate_held_out(
    config: config_lib.Config,
    params,
    codec: latent_codec.LatentCodec,
    source: builder.StorySource,
    frames: tuple[int, ...],
    given_scenes: int,
    caption_style: str,
    desc: str,
) -> tuple[np.ndarray, list[world.AnyStory]]:
    """Generates videos of held-out stories, in a single process.

    Args:
      config: the configuration; config.eval says how many stories, and how many per batch.
      params: the model's parameters on the mesh.
      codec: the codec of the run.
      source: the held-out stories, which come again if there are fewer.
      frames: frames per scene.
      given_scenes: the number of leading scenes that are given.
      caption_style: how captions are worded; see world.captions.
      desc: the text before the progress bar.

    Returns:
      Videos float32 [config.eval.stories, F, H, W, 3], and the stories that they should show.
    """
    batches = list(
        _generated_batches(config, params, codec, source, frames, given_scenes, caption_style, desc)
    )
    videos = np.concatenate([batch.videos for batch in batches])
    return videos, [story for batch in batches for story in batch.stories]


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
      One row per layout and task, with the keys of SCORE_COLUMNS, scores per scene, and scores by
      gap.
    """
    rows = []
    for frames in dict.fromkeys(config.data.layouts):
        source = batches_lib.open_stories(config, workdir, frames, 'test')
        stories = [source[i % len(source)]['story'] for i in range(config.eval.stories)]
        layout_name = _layout_name(frames)

        # The names say how many scenes are given: layouts of several lengths stand in one table.
        style = config.data.caption_style
        tasks = {'generate': (0, style)}
        if len(frames) > 1:
            given_scenes = len(frames) - 1
            tasks[f'extend {given_scenes} given'] = given_scenes, style
            # Only the pixels of the given scenes say who and where, if they show it.
            tasks[f'extend {given_scenes} given, unnamed'] = given_scenes, 'never'

        for task, (given_scenes, style) in tasks.items():
            batches = _generated_batches(
                config,
                params,
                codec,
                source,
                frames,
                given_scenes,
                style,
                f'scoring {task} {layout_name}',
            )
            # Given scenes would be right without the model.
            scored = tuple(range(given_scenes, len(frames)))
            scores = _score_batches(batches, scored)
            summary = scores_lib.summarize(scores, scenes=scored)
            recall = scores_lib.by_gap(scores, stories, scenes=scored)
            rows.append({'task': task, 'frames': layout_name} | summary | recall)

    return rows


def _score_batches(batches: Iterable[_Generated], scenes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Scores every batch when it is generated, and gathers the scores of all processes.

    Returns:
      What scores.score returns for all stories, in their order.
    """
    own = []
    for batch in batches:
        if batch.stories:
            scores = scores_lib.score(batch.videos, batch.stories, scenes=scenes)
            own.append({'index': np.array(batch.indices)} | scores)

    parts = [part for part in multihost.gather(_joined(own)) if part]
    scores = _joined(parts)
    order = np.argsort(scores.pop('index'))
    return {name: values[order] for name, values in scores.items()}


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of the same names, concatenated along axis 0."""
    if not parts:
        return {}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# 3. Held-out losses of encoded clips.


def held_out_losses(
    config: config_lib.Config, params, codec: latent_codec.LatentCodec
) -> list[dict]:
    """Computes the denoising loss of held-out clips, for generation and extension of every layout.

    The noise and the timestep of a story are the same every time, whatever the batches and the
    devices, so that the losses of two runs can be compared.

    Args:
      config: the configuration; config.eval says how many stories, and how many per batch.
      params: the model's parameters on the mesh.
      codec: the codec of the run.

    Returns:
      One row per layout and task: 'task', 'frames', 'loss'.
    """
    mesh = mesh_lib.mesh_of(params)
    encoded = _open_held_out_clips(config, codec)

    rows = []
    for frames in dict.fromkeys(config.data.layouts):
        stories = encoded.fixed(frames, config.eval.stories)
        whole = config.model.whole_patches(codec.latent_frames(frames))
        jitted_loss = _jit_loss(config, whole.frames, mesh)

        for task, given_scenes in _given_scenes_by_task(frames).items():
            is_given = np.arange(len(frames)) < given_scenes
            error = 0.0
            count = 0.0
            for first in range(0, len(stories), config.eval.batch_size):
                watchdog.enter('score')
                batch = _loss_batch(config, encoded, stories, whole.source, is_given, first, mesh)
                sums = jitted_loss(params, batch)
                error += float(sums[0])
                count += float(sums[1])

            row = {'task': task, 'frames': _layout_name(frames), 'loss': error / count}
            rows.append(row)

    return rows


def _jit_loss(config: config_lib.Config, latent_frames: tuple[int, ...], mesh: jax.sharding.Mesh):
    """The sum of squared errors of a batch of one layout and the number of its terms, compiled."""

    scenes = frame_scenes(latent_frames)  # [T]

    def loss(params, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return loss_lib.denoising_loss(
                dit.DiT(config.model),
                params,
                config.schedule,
                {'latents': batch['latents'], 'text': batch['text']},
                batch['noise'],
                jnp.where(batch['given'], 0, batch['timesteps'][:, None])[:, scenes],
                batch['given'][:, scenes],
                latent_frames,
            )

    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(loss, out_shardings=replicated)


def _loss_batch(
    config: config_lib.Config,
    encoded: encoded_clips.EncodedClips,
    stories: list[np.ndarray],
    source: np.ndarray,
    is_given: np.ndarray,
    first: int,
    mesh: jax.sharding.Mesh,
) -> dict[str, jax.Array]:
    """The batch that begins with story `first`, on the mesh, with everything that its loss needs.

    A batch that the mesh does not divide is filled up with stories all of whose scenes are given:
    they count nothing. `source` is that of the model's whole_patches.
    """
    groups = mesh.shape['data'] * mesh.shape['fsdp']
    stop = min(first + config.eval.batch_size, len(stories))
    batch_size = -(-(stop - first) // groups) * groups

    examples = []
    for row in mesh_lib.local_rows(mesh, batch_size):
        index = min(first + row, stop - 1)
        # The posterior's mean, as in sample grids.
        example = encoded.example(stories[index], None)
        example['latents'] = example['latents'][source]
        example |= _fixed_draws(config, index, len(stories), example['latents'].shape)
        example['given'] = is_given | (first + row >= stop)  # [S]
        examples.append(example)

    batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
    return mesh_lib.global_batch(batch, mesh, batch_size)


def _fixed_draws(
    config: config_lib.Config, index: int, num_stories: int, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Noise [T, H, W, C] and timestep of a held-out story: functions of the seed and of its place
    among all held-out stories, however these are batched."""
    rng = np.random.default_rng([config.seed, index])

    # The middle of one of equal parts of the range, of which there is one for each story.
    fraction = (index + 0.5) / num_stories
    return {
        'noise': rng.standard_normal(shape, np.float32),
        'timesteps': np.array(fraction * config.schedule.num_train_timesteps, np.int32),
    }


# The table at the end of a run.


# What the end of a run proposes to sample, in captions of its world; others are the user's.
_PROPOSED = {
    'one': ('red ring on gray moves left', 'it grows', 'it blinks'),
    'cast': (
        'ann red ring at home gray moves left',
        'bob blue bar at park white grows',
        'ann at home blinks',
    ),
    '': ('...', '...', '...'),
}


def write_scores(
    config: config_lib.Config, rows: list[dict], workdir: pathlib.Path, seconds: float
) -> None:
    """Writes scores.json and scores.md on process 0, and prints the table and what to do next.

    Args:
      config: of the run.
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

    captions = _PROPOSED['' if config.data.encoded else config.data.world]
    prompts = ' '.join(f'--prompt="{caption}"' for caption in captions)
    print(
        f'\n{table}\n\n'
        f'{SCORE_NOTES[columns[-1]]} Total time {logs.format_eta(seconds)}.\n'
        f'Scores: {workdir}/scores.md and scores.json   Pictures: {workdir}/sheets   '
        f'Curves: {workdir}/metrics.jsonl\n'
        f'Next: python -m mask2dit_jax.sample --workdir={workdir} {prompts}'
    )


def _rounded(row: dict) -> dict:
    """A row with its floats rounded to three decimals, for the table."""
    return {
        key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()
    }
