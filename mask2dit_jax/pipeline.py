"""Captions (and given scenes) to videos, for Python, for `sample`, and for training's sample grids
and scores.

    model = mask2dit_jax.load('runs/tiny')
    video = model.generate(['red ring on gray moves left', 'it grows', 'it blinks'])
    video.save('samples')

`load` opens whatever holds a model. Below it stand the steps that it is made of: `encode_inputs`,
`sample_latents`, and both with decoding, `generate`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging

from mask2dit_jax import checkpoint, paths, ranges
from mask2dit_jax import config as config_lib
from mask2dit_jax.data import clips, latent_codec, latent_file, manifest, samples, story_file
from mask2dit_jax.data import video as video_lib
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.distributed import context_parallel, partitioning
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.models import dit, lora, vae
from mask2dit_jax.pretrained import config_json, lora_files, names, runs
from mask2dit_jax.pretrained import load as load_lib

# Functions that hear of every denoising step that is done, by a number of their own. The compiled
# loops get the number as an input and call `_report_step` with it, so that a loop need not be
# compiled anew for each of them.
_step_listeners: dict[int, Callable[[], None]] = {}
_listener_numbers = itertools.count()


def _report_step(timestep, number) -> None:
    del timestep  # listeners count
    _step_listeners[int(number)]()


@contextlib.contextmanager
def _listening(listener: Callable[[], None]) -> Iterator[int]:
    """Yields the number under which a listener hears of steps; what it raises, this raises.

    The loop calls from inside of XLA, in whose hands an exception becomes another one or ends the
    process; and where the main thread runs the loop, Ctrl-C is such an exception.
    """
    raised = []

    def safe_listener():
        if raised:
            return
        try:
            listener()
        except BaseException as error:
            raised.append(error)

    number = next(_listener_numbers)
    _step_listeners[number] = safe_listener
    try:
        yield number
    finally:
        jax.effects_barrier()  # the last calls may come after the result
        del _step_listeners[number]
    if raised:
        raise raised[0]


@functools.cache
def jit_sample(
    config: config_lib.Config,
    frames: tuple[int, ...],
    mesh: jax.sharding.Mesh,
    reports_steps: bool = False,
):
    """The jitted sampling loop for these latent frames per scene; it compiles once for each batch
    size and number of steps.

    Stories lie on the mesh as mesh.row_sharding says. The two halves of classifier-free guidance
    are rows of one batch, spread over the batch axes; tokens are spread over context. With
    `reports_steps` the loop gets the number of one of `_step_listeners` as its last input, and
    tells it of every step that is done.
    """
    model = dit.DiT(config.model)

    def by_rows(x):
        return jax.lax.with_sharding_constraint(x, mesh_lib.row_sharding(mesh, len(x)))

    def run(
        params,
        noise,
        text,
        null_text,
        given,
        given_scenes,
        timesteps,
        table,
        guidance,
        listener=None,
    ):
        noise, text, given, given_scenes = map(by_rows, (noise, text, given, given_scenes))
        layout = config.model.layout(frames, *noise.shape[2:4])
        both = jnp.concatenate([jnp.broadcast_to(null_text, text.shape), text])

        # Between forward passes width and channels are one axis: alone, 16 channels would fill an
        # eighth of the TPU's lanes, and every copy of the latents eight times their size.
        shape = noise.shape[1:]

        def velocity(x, t):
            v = model.apply({'params': params}, x.reshape(-1, *shape), both, t, frames=frames)
            return v.reshape(x.shape)

        noise, given = (x.reshape(*x.shape[:3], -1) for x in (noise, given))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out = samplers.sample(
                velocity,
                noise,
                layout,
                timesteps,
                table,
                guidance,
                given,
                given_scenes,
                callback=_report_step if reports_steps else None,
                callback_data=listener,
            )
        return by_rows(out.reshape(-1, *shape))

    # Stories come in and go out as they lie: how they are spread depends on their number.
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = partitioning.shardings(names.abstract_params(config.model), mesh)
    inputs = (None, None, whole, None, None, *[whole] * (3 + reports_steps))
    return jax.jit(run, in_shardings=(params, *inputs))


def story_noise(seed: int, index: int, shape: tuple[int, ...]):
    """Initial noise of one story, float32; a function of seed and index alone, whatever the
    batch."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), index)
    return jax.random.normal(key, shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the transformer gets for a batch of stories of one layout, besides noise.

    Attributes:
      latent_frames: per scene.
      text: [B, S, M, E].
      null_text: [M, E], the negative caption.
      given: latents [B, T, h, w, C], zero where nothing is given.
      given_scenes: bool [B, S].
    """

    latent_frames: tuple[int, ...]
    text: np.ndarray
    null_text: np.ndarray
    given: np.ndarray
    given_scenes: np.ndarray

    def story(self, index: int) -> 'Inputs':
        """The inputs of one story, as a batch of one."""
        rows = slice(index, index + 1)
        return dataclasses.replace(
            self,
            text=self.text[rows],
            given=self.given[rows],
            given_scenes=self.given_scenes[rows],
        )


def encode_inputs(
    codec: latent_codec.LatentCodec,
    captions,
    frames: tuple[int, ...],
    given_videos=None,
    negative_caption: str = '',
    given_latents: Sequence[np.ndarray] = (),
) -> Inputs:
    """Encodes captions and given scenes.

    Args:
      codec: text and video codec.
      captions: per story a list of S strings, those of given scenes included.
      frames: pixel frames per scene.
      given_videos: None, or pixels [B, F', H, W, 3] of the leading scenes, which are given; B may
        be 1 where all stories share them.
      negative_caption: what classifier-free guidance leads away from, in every scene.
      given_latents: instead of given_videos, latents [T', h, w, C] of each leading scene that is
        given, which all stories share.

    Raises:
      ValueError: if captions, frames and given scenes do not fit each other.
    """
    num_scenes, batch = len(frames), len(captions)
    if any(len(c) != num_scenes for c in captions):
        raise ValueError(
            f'Every story needs one caption for each of its {num_scenes} scenes, got {captions[0]}.'
        )
    latent_frames = codec.latent_frames(frames)
    given = np.zeros((batch, sum(latent_frames), *codec.latent_shape), np.float32)
    given_scenes = np.zeros((batch, num_scenes), bool)
    count = 0 if given_videos is None else _given_count(frames, given_videos.shape[1])
    # One call: the text encoder may be loaded for it.
    *text, null_text = codec.encode_text(
        [c for story in captions for c in story] + [negative_caption]
    )
    if count:
        latents = codec.encode_video(given_videos, frames[:count])
        given[:, : latents.shape[1]] = latents
        given_scenes[:, :count] = True
    elif len(given_latents):
        latents = np.concatenate(given_latents)  # [T', h, w, C]
        given[:, : len(latents)] = latents
        given_scenes[:, : len(given_latents)] = True
    text = np.reshape(text, (batch, num_scenes, *null_text.shape))
    return Inputs(latent_frames, text, null_text, given, given_scenes)


def sample_latents(
    config: config_lib.Config,
    params,
    inputs: Inputs,
    *,
    seed: int,
    first_index: int = 0,
    sampler: str | None = None,
    steps: int | None = None,
    guidance=None,
    batch_size: int | None = None,
    listener: Callable[[], None] | None = None,
) -> np.ndarray:
    """Denoises stories, on the mesh that `params` lie on.

    Args:
      config, params, seed, first_index, sampler, steps, guidance, batch_size: as in `generate`.
      inputs: of `encode_inputs`, for the stories that this process needs (mesh.local_rows).
      listener: called after every denoising step.

    Returns:
      Latents float32 [B, T, h, w, C] of these stories.

    Raises:
      ValueError: if guidance is neither one number nor one number for each scene.
    """
    num_scenes = len(inputs.latent_frames)
    guidance = config.sample.guidance if guidance is None else guidance
    _check_guidance(guidance, num_scenes)
    mesh = mesh_lib.mesh_of(params)
    batch_size = batch_size or len(inputs.given)
    rows = mesh_lib.local_rows(mesh, batch_size)
    whole = config.model.whole_patches(inputs.latent_frames)
    given = inputs.given[:, whole.source]
    noise = [story_noise(seed, first_index + row, given.shape[1:]) for row in rows]
    stories = {
        'noise': np.stack(noise),
        'text': inputs.text,
        'given': given,
        'given_scenes': inputs.given_scenes,
    }
    stories = mesh_lib.global_batch(stories, mesh, batch_size)

    timesteps, table = samplers.sampler_table(
        sampler or config.sample.sampler, config.schedule, steps or config.sample.steps
    )
    scale = np.broadcast_to(np.asarray(guidance, np.float32), num_scenes)
    run = jit_sample(config, whole.frames, mesh, reports_steps=listener is not None)
    arguments = (
        params,
        stories['noise'],
        stories['text'],
        inputs.null_text,
        stories['given'],
        stories['given_scenes'],
        timesteps,
        table,
        scale,
    )
    if listener is None:
        latents = mesh_lib.local_batch(run(*arguments))
    else:
        with _listening(listener) as number:
            latents = mesh_lib.local_batch(run(*arguments, number))
    return latents[:, whole.kept]


def _check_guidance(guidance, num_scenes: int) -> None:
    if np.size(guidance) not in (1, num_scenes):
        raise ValueError(
            f'Guidance must be one number or one per scene ({num_scenes}), got {guidance}.'
        )


def generate(
    config: config_lib.Config,
    params,
    codec: latent_codec.LatentCodec,
    captions,
    frames: tuple[int, ...],
    *,
    seed: int,
    first_index: int = 0,
    given_videos=None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance=None,
    batch_size: int | None = None,
) -> np.ndarray:
    """Generates a batch of stories of one layout.

    With several processes each takes the stories that its devices need (mesh.local_rows), and
    returns those that it owns (mesh.owned_rows). With one process, both are all stories.

    Args:
      config: the model's configuration, which also holds the default sampler settings.
      params: parameters, on one device or spread over a mesh by partitioning.shardings.
      codec, captions, frames, given_videos: as in `encode_inputs`.
      seed: story i gets the noise of (seed, first_index + i).
      first_index: see above.
      sampler, steps, guidance: overrides of config.sample; guidance may be one number per scene.
      batch_size: stories of the whole batch; None if `captions` are all of it.

    Returns:
      Pixels float32 in [0, 1], [B, F, H, W, 3]; given scenes come back as their codec sees them.

    Raises:
      ValueError: if captions, frames, guidance and given scenes do not fit each other.
    """
    inputs = encode_inputs(codec, captions, frames, given_videos)
    latents = sample_latents(
        config,
        params,
        inputs,
        seed=seed,
        first_index=first_index,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        batch_size=batch_size,
    )
    mesh = mesh_lib.mesh_of(params)
    return decode_owned(codec, latents, inputs.latent_frames, mesh, batch_size or len(captions))


def decode_owned(
    codec: latent_codec.LatentCodec, latents, latent_frames: tuple[int, ...], mesh, batch_size: int
) -> np.ndarray:
    """Decodes the stories that this process owns.

    Args:
      codec: video codec.
      latents: of `sample_latents`.
      latent_frames: per scene.
      mesh: the mesh that the stories were sampled on.
      batch_size: stories of the whole batch.

    Returns:
      Pixels float32 in [0, 1], [B, F, H, W, 3], of the stories of mesh.owned_rows.
    """
    owned = mesh_lib.owned_rows(mesh, batch_size)
    if not owned:
        return np.zeros((0, 1, *codec.size_px, 3), np.float32)
    rows = mesh_lib.local_rows(mesh, batch_size)
    return codec.decode_video(latents[[rows.index(row) for row in owned]], latent_frames)


def _given_count(frames: tuple[int, ...], given_frames: int) -> int:
    """How many leading scenes these frames fill."""
    ends = list(np.cumsum(frames))
    if given_frames not in ends[:-1]:
        raise ValueError(
            f'Given clips have {given_frames} frames in all, which fills no number of leading '
            f'scenes of {frames} and leaves one to generate.'
        )
    return ends.index(given_frames) + 1


def read_given(path, height_px: int, width_px: int, frames: int | None, seed: int) -> np.ndarray:
    """Reads a given clip.

    Args:
      path: of a video file.
      height_px, width_px: the size to which it is scaled and cropped.
      frames: None for the whole video; otherwise so many frames are cut from it as `encode` cuts
        the scenes of a story, at most every third, from a start that the seed draws.
      seed: see above.

    Returns:
      uint8 [F, H, W, 3].

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    if frames is None:
        return video_lib.read_video(path, height_px=height_px, width_px=width_px)[0]
    info = video_lib.probe(path)
    rng = np.random.default_rng(seed)
    try:
        indices = clips.choose_frames(manifest.MULTI_SCENE, len(info.times), frames, 3, rng)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return video_lib.read_frames(path, info, indices, height_px=height_px, width_px=width_px)


@dataclasses.dataclass(frozen=True)
class _GivenScene:
    """A given scene: pixels that are still to be encoded, or latents.

    Attributes:
      frames: number of pixel frames.
      record: what story.json says of it.
      pixels: [F, H, W, 3], uint8 or float32 in [0, 1].
      latents: float32 [T, h, w, C].
    """

    frames: int
    record: dict
    pixels: np.ndarray | None = None
    latents: np.ndarray | None = None


def _open_given(
    item, codec: latent_codec.LatentCodec, given_frames: int | None, seed: int
) -> list[_GivenScene]:
    """The scenes of one item of `given`; see `Model.generate`."""
    height_px, width_px = codec.size_px
    if isinstance(item, np.ndarray):
        if item.ndim != 4 or item.shape[1:] != (height_px, width_px, 3):
            raise ValueError(
                f'Given pixels have shape {item.shape}, not [F, {height_px}, {width_px}, 3]: '
                'scale and crop them to codec.size_px, or give a file.'
            )
        record = {'file': None, 'sha256': hashlib.sha256(item.tobytes()).hexdigest()}
        return [_GivenScene(len(item), record, pixels=item)]
    if isinstance(item, latent_file.Latents):
        return _given_latents('What is given', item, codec)

    path = item
    entry = item if isinstance(item, Mapping) else {}
    if entry:
        path = entry['file']
    if path is None:
        raise ValueError(
            'A given scene was pixels or latents from Python, which story.json does not hold: give '
            'it again by --given.'
        )

    path = pathlib.Path(path)
    if path.is_dir():
        path = path / latent_file.NAME
    if path.suffix == '.safetensors':
        scenes = _given_latents(path, latent_file.read(path), codec)
    else:
        pixels = read_given(path, height_px, width_px, given_frames, seed)
        scenes = [_GivenScene(len(pixels), {}, pixels=pixels)]

    digest = story_file.file_digest(path)
    if entry.get('sha256', digest) != digest:
        raise ValueError(
            f'{path} has changed since the story was made from it (sha256 {digest[:16]}, not '
            f'{entry["sha256"][:16]}): put it back, or give another by --given.'
        )
    told = {'file': str(path.absolute()), 'sha256': digest}
    scenes = [dataclasses.replace(s, record=told | _number_of(s.record)) for s in scenes]
    if 'scene' not in entry:
        return scenes
    if entry['scene'] >= len(scenes):
        raise ValueError(
            f'{path} has {len(scenes)} scenes, and none with the number {entry["scene"]}.'
        )
    return [scenes[entry['scene']]]


def _number_of(record: dict) -> dict:
    """What a record says of the number of the scene in its file of several."""
    return {key: record[key] for key in record if key == 'scene'}


def _given_latents(
    name, latents: latent_file.Latents, codec: latent_codec.LatentCodec
) -> list[_GivenScene]:
    """The scenes of latents that fit the codec."""
    if latents.codec != codec.fingerprint:
        raise ValueError(
            f'{name} holds latents of the codec {latents.codec}, and the model has '
            f'{codec.fingerprint}: give the video instead.'
        )
    if tuple(latents.size_px) != tuple(codec.size_px):
        ours, theirs = ('x'.join(map(str, size)) for size in (codec.size_px, latents.size_px))
        raise ValueError(
            f'{name} holds latents of {theirs} pixels, and the model makes {ours}: give the video, '
            'or sample with that --height and --width.'
        )

    scenes = []
    lengths = codec.latent_frames(tuple(latents.frames))
    for number, (scene, frames) in enumerate(zip(latents.scenes, latents.frames)):
        expected = (lengths[number], *codec.latent_shape)
        if scene.shape != expected:
            raise ValueError(
                f'{name}: scene {number} has latents {scene.shape}, not {expected}: have it '
                'written again.'
            )
        digest = hashlib.sha256(scene.tobytes()).hexdigest()
        record = {'file': None, 'sha256': digest, 'scene': number}
        scenes.append(_GivenScene(frames, record, latents=scene))
    return scenes


def _encode_given(
    codec: latent_codec.LatentCodec, given: Sequence[_GivenScene]
) -> list[np.ndarray]:
    """Latents [T', h, w, C] of each given scene; the codec is called once."""
    clips_px = [scene.pixels for scene in given if scene.pixels is not None]
    encoded = iter(())
    if clips_px:
        frames = tuple(len(clip) for clip in clips_px)
        latents = codec.encode_video(_joined(clips_px)[None], frames)[0]
        encoded = iter(story_file.split_scenes(latents, codec.latent_frames(frames)))
    return [next(encoded) if scene.latents is None else scene.latents for scene in given]


def _joined(clips_px: list[np.ndarray]) -> np.ndarray:
    """Clips one after another, [F, H, W, 3]; uint8 only if all are."""
    if len({clip.dtype for clip in clips_px}) > 1:
        clips_px = [
            clip / np.float32(255) if clip.dtype == np.uint8 else np.asarray(clip, np.float32)
            for clip in clips_px
        ]
    return np.concatenate(clips_px)


def plan_frames(
    frames: Sequence[int | None], given_frames: Sequence[int], default: int
) -> tuple[int, ...]:
    """Pixel frames of each scene: those of its given clip, else those asked for, else the default.

    Args:
      frames: those asked for, None where nothing is.
      given_frames: those of each given scene.
      default: for all others.

    Raises:
      ValueError: if as many scenes are given as there are, or one contradicts what is asked.
    """
    if len(given_frames) >= len(frames):
        raise ValueError(
            f'{len(given_frames)} given clips and {len(frames)} captions leave no scene to '
            'generate: give one caption per clip and at least one more.'
        )
    planned = []
    for i, asked in enumerate(frames):
        length = given_frames[i] if i < len(given_frames) else None
        if asked and length and asked != length:
            raise ValueError(
                f'Scene {i + 1} has {asked} frames in the story but its given clip has {length}.'
            )
        planned.append(length or asked or default)
    return tuple(planned)


Video = samples.Video
save = samples.save


def check_sampling(
    config: config_lib.Config,
    num_scenes: int,
    frames: Sequence[int | None],
    *,
    seed: int,
    sampler: str,
    steps: int,
    guidance,
) -> None:
    """Refuses what cannot be sampled, before anything is loaded.

    Args:
      config: the model's configuration, whose fields have the ranges.
      num_scenes: scenes of a story.
      frames: numbers of frames that are asked for; None for those that are not.
      seed, sampler, steps, guidance: as in `generate`.

    Raises:
      ValueError: naming all that is wrong, and what is allowed.
    """
    found = ranges.problems(config_lib.Config, {'seed': seed}, '')
    found += ranges.problems(config_lib.SampleConfig, {'sampler': sampler, 'steps': steps}, '')
    for scale in np.ravel(guidance).tolist():
        found += ranges.problems(config_lib.SampleConfig, {'guidance': scale}, '')
    for number in frames:
        if number is not None and (not ranges.is_whole(number) or number < 1):
            found.append(f'frames is {number!r}: use a whole number of at least 1.')
    if np.size(guidance) not in (1, num_scenes):
        found.append(
            f'Guidance must be one number or one per scene ({num_scenes}), got {guidance}.'
        )
    ranges.refuse(found or config_lib.step_conflicts(steps, config.schedule))


@dataclasses.dataclass(frozen=True)
class Request:
    """Videos that are to be made, after everything has been checked that is cheap to check.

    Attributes:
      stories: captions of each video.
      frames: pixel frames per scene.
      given: the given scenes.
      mesh: the devices that the videos are sampled on.
      negative_caption: what guidance leads away from.
      sampling: seed, sampler, steps and guidance.
      record: what story.json holds. Its `weights`, a checksum, and its `checkpoint` are certain
        once `inputs` are there: before, the latter is the newest of a workdir, whole or not.
      inputs: what the transformer gets, after `Model.start`.
    """

    stories: list[list[str]]
    frames: tuple[int, ...]
    given: list[_GivenScene]
    mesh: jax.sharding.Mesh
    negative_caption: str
    sampling: dict
    record: dict
    inputs: Inputs | None = None


class Model:
    """A transformer with its codec, as `load` opens it. Nothing is read before it is needed.

    Attributes:
      config: config.Config.
      codec: latent_codec.LatentCodec, between captions or pixels and latents.
      settings: what `load` was told, for story.json.
      source: where the parameters come from, as far as that is known before they are read: of a
        workdir it is the newest checkpoint, whole or not.
    """

    def __init__(
        self, config, codec, read_params, settings: dict, source: str, keep_params: bool, mesh=None
    ):
        self.config = config
        self.codec = codec
        self.settings = settings
        self.source = source
        self._read_params = read_params
        self._keep_params = keep_params
        self._mesh = mesh
        self._params = None

    def params(self, mesh: jax.sharding.Mesh | None = None):
        """Where the parameters come from, and the parameters.

        They are read at the first call, and again when they are needed on another mesh.

        Args:
          mesh: where they are needed; None for where they are, or where any story is served.
        """
        lies_on = mesh_lib.mesh_of(self._params[1]) if self._params is not None else None
        if mesh is not None and lies_on != mesh:
            self._params = None  # both would not fit into the devices' memory
        if self._params is None:
            self._params = self._read_params(mesh or self._mesh_for(num_tokens=0))

        path, params = self._params
        if jax.tree.leaves(params)[0].sharding.memory_kind == 'pinned_host':
            self._params = path, _in_memory(params, 'device')
        return self._params

    def generate(
        self,
        captions: Sequence[str] | Sequence[Sequence[str]],
        *,
        callback: Callable[[int, int], None] | None = None,
        **settings,
    ):
        """Generates one video, or several whose scenes have the same lengths.

        Args:
          captions: one for each scene, those of given scenes included; or a list of such lists, for
            several videos. Equal lists give different videos: each has noise of its own.
          callback: called after every denoising step with its number, from 1, and the number of all
            steps of all the videos. What it raises ends the call, after the present video.
          **settings: those of `request`: frames, given, given_frames, seed, first_index, sampler,
            steps, guidance, negative_caption.

        Returns:
          Video, or a list of them if captions is a list of lists.

        Raises:
          FileNotFoundError, ValueError: naming what is missing or does not fit.
        """
        request = self.start(self.request(captions, **settings))
        videos = list(self.videos(request, range(len(request.stories)), callback))
        is_one = isinstance(captions[0], str)
        return videos[0] if is_one else videos

    def request(
        self,
        captions: Sequence[str] | Sequence[Sequence[str]],
        *,
        frames: Sequence[int | None] | int | None = None,
        given: Sequence = (),
        given_frames: int | None = None,
        seed: int = 0,
        first_index: int = 0,
        sampler: str | None = None,
        steps: int | None = None,
        guidance=None,
        negative_caption: str = '',
    ) -> Request:
        """Checks what `generate` is asked for, and reads the given files; no network is loaded.

        Args:
          captions: as in `generate`.
          frames: pixel frames of a scene, or of each; None takes those that the model was trained
            with. A given scene has the frames of its clip.
          given: leading scenes, which all the videos continue. Each is one of these: a video file;
            pixels [F, H, W, 3], uint8 or float32 in [0, 1], of the size in `codec.size_px`; the
            latents of a video that this codec made (`Video.latents`), a file of them, or the folder
            of that file, which give as many scenes as they hold; or what a story.json says of a
            given scene.
          given_frames: cut so many frames from each given video file; None takes the whole file.
          seed: the same seed gives the same videos; video i has the noise of (seed, first_index +
            i).
          first_index: see above.
          sampler, steps, guidance: None takes the settings of the model; guidance is one number, or
            one for each scene.
          negative_caption: what guidance leads away from, in every scene.

        Raises:
          FileNotFoundError, ValueError: naming what is missing or does not fit.
        """
        if not captions or not captions[0]:
            raise ValueError('There is no caption: give one for each scene.')
        stories = [captions] if isinstance(captions[0], str) else list(captions)
        stories = [list(story) for story in stories]

        asked = list(frames) if isinstance(frames, Sequence) else [frames] * len(stories[0])
        guidance = self.config.sample.guidance if guidance is None else guidance
        sampling = {
            'seed': seed,
            'sampler': self.config.sample.sampler if sampler is None else sampler,
            'steps': self.config.sample.steps if steps is None else steps,
            'guidance': np.asarray(guidance, float).tolist(),
        }
        check_sampling(self.config, len(stories[0]), [*asked, given_frames], **sampling)

        scenes = []
        for item in given:
            scenes += _open_given(item, self.codec, given_frames, seed)
        lengths = [scene.frames for scene in scenes]
        planned = plan_frames(asked, lengths, self.config.data.layouts[0][0])
        mesh = self._mesh_for(self._num_tokens(planned))
        record = {
            'scenes': _scene_records(stories[0], planned),
            'checkpoint': self.source,
            'weights': None,
            'given': [scene.record for scene in scenes],
            'given_frames': given_frames,
            'num_videos': len(stories),
            'first_index': first_index,
            'negative_prompt': negative_caption,
            **sampling,
            'fps': self.config.data.fps,
            'model': dataclasses.asdict(self.config.model),
            'jax': jax.__version__,
            **self.settings,
            'device': mesh.devices.flat[0].device_kind,
            'mesh': [mesh.shape['fsdp'], mesh.shape['context']],
        }
        return Request(stories, planned, scenes, mesh, negative_caption, sampling, record)

    def start(self, request: Request) -> Request:
        """Encodes the captions and given scenes of a request, then reads the transformer.

        One network is in memory at a time: the text encoder, the VAE, the transformer.
        """
        logging.info(
            'Sampling %d video(s) of %s frames.',
            len(request.stories),
            '+'.join(map(str, request.frames)),
        )
        inputs = encode_inputs(
            self.codec,
            request.stories,
            request.frames,
            negative_caption=request.negative_caption,
            given_latents=_encode_given(self.codec, request.given),
        )
        path, params = self.params(request.mesh)
        weights = checkpoint.checksums({'params': params})['params']
        record = request.record | {'checkpoint': str(path), 'weights': weights}
        return dataclasses.replace(request, record=record, inputs=inputs)

    def videos(
        self,
        request: Request,
        indices: Sequence[int],
        callback: Callable[[int, int], None] | None = None,
    ) -> Iterator[Video]:
        """Makes some videos of a request that was started, one after the other.

        The transformer waits in the memory of the host while the VAE decodes, if the model does not
        keep its parameters.

        Args:
          request: of `start`.
          indices: which of its stories.
          callback: as in `generate`.

        Yields:
          Each video, as soon as it is decoded.
        """
        listener = None
        if callback is not None:
            listener = _step_counter(callback, len(indices) * request.sampling['steps'])
        first = request.record['first_index']

        for index in tqdm.tqdm(indices, desc='sampling', unit='video'):
            _, params = self.params(request.mesh)
            latents = sample_latents(
                self.config,
                params,
                request.inputs.story(index),
                first_index=first + index,
                listener=listener,
                **request.sampling,
            )
            del params
            self._put_away(is_last=index == indices[-1])
            pixels = self.codec.decode_video(latents, request.inputs.latent_frames)
            yield self._video(request, index, latents[0], pixels[0])

    def _put_away(self, is_last: bool) -> None:
        """Makes room for the VAE where parameters are not kept."""
        if self._keep_params:
            return
        if is_last:
            self._params = None
        else:
            path, params = self._params
            self._params = path, _in_memory(params, 'pinned_host')

    def _video(self, request: Request, index: int, latents, pixels) -> Video:
        """One video, from its latents [T, h, w, C] and its pixels [F, H, W, 3]."""
        captions = request.stories[index]
        record = request.record | {
            'scenes': _scene_records(captions, request.frames),
            'num_videos': 1,
            'first_index': request.record['first_index'] + index,
        }
        return Video(
            story_file.split_scenes(pixels, request.frames),
            captions,
            len(request.given),
            self.config.data.fps,
            record,
            latent_file.Latents(
                story_file.split_scenes(latents, request.inputs.latent_frames),
                list(request.frames),
                self.codec.fingerprint,
                self.codec.size_px,
                record['checkpoint'],
            ),
        )

    def _mesh_for(self, num_tokens: int) -> jax.sharding.Mesh:
        """The mesh on which stories of so many tokens are generated; 0 stands for any.

        Raises:
          ValueError: if the mesh that was asked for does not divide them.
        """
        heads = self.config.model.num_attention_heads
        if self._mesh is None:
            return default_mesh(num_heads=heads, num_tokens=num_tokens)
        if num_tokens:
            # Stories are generated one by one, each as the two halves of guidance.
            context_parallel.check(self._mesh.shape, 2, num_tokens, heads)
        return self._mesh

    def _num_tokens(self, frames: tuple[int, ...]) -> int:
        """Tokens of a story of these pixel frames."""
        latent_frames = self.codec.latent_frames(frames)
        return self.config.model.layout(latent_frames, *self.codec.latent_shape[:2]).num_tokens


def _in_memory(params, kind: str):
    """Parameters in a memory of their devices, 'device' or 'pinned_host'."""
    return jax.device_put(params, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), params))


def _scene_records(captions: Sequence[str], frames: Sequence[int]) -> list[dict]:
    return [{'caption': c, 'frames': f} for c, f in zip(captions, frames)]


def _step_counter(callback: Callable[[int, int], None], total: int) -> Callable[[], None]:
    """A listener that counts the steps of all videos."""
    done = 0

    def listener():
        nonlocal done
        done += 1
        callback(done, total)

    return listener


def default_mesh(
    axes: tuple[int, int] | None = None, *, num_heads: int | None = None, num_tokens: int = 0
) -> jax.sharding.Mesh:
    """The mesh that videos are generated on.

    Args:
      axes: over how many devices the parameters and the halves of guidance are spread (fsdp), and
        over how many the tokens (context). None takes one CPU, or as many accelerators as divide
        the heads and tokens, two of them for the halves. Devices that stay idle are logged.
      num_heads: attention heads of the model; None for any.
      num_tokens: tokens of the stories; 0 for any.

    Raises:
      ValueError: if there are not so many devices.
    """
    count = jax.device_count()
    if axes is None and jax.default_backend() == 'cpu':
        axes = (1, 1)
        count = 1
    fsdp, context = axes or _default_axes(count, num_heads, num_tokens)

    used = fsdp * context
    if not 0 < used <= count:
        raise ValueError(
            f'A mesh of {fsdp} x {context} (FSDP,CONTEXT) needs {used} devices, and there are '
            f'{count}: let the product be 1 to {count}.'
        )

    config = mesh_lib.MeshConfig(fsdp=fsdp, context=context)
    devices = jax.devices()[:used]
    if used == count:
        return mesh_lib.make_mesh(config, devices)

    reason = ''
    if num_heads is not None:
        reason = f', because {num_heads} heads and {num_tokens} tokens do not divide over more'
    logging.warning(
        'Generating on %d of %d devices (fsdp %d x context %d); %d stay idle%s.',
        used,
        count,
        fsdp,
        context,
        count - used,
        reason,
    )
    return mesh_lib.partial_mesh(config, devices)


def _default_axes(count: int, num_heads: int | None, num_tokens: int) -> tuple[int, int]:
    """The sizes of fsdp and context that use most of the devices; of equals that with fsdp 2."""
    sizes = context_parallel.sizes_for_heads(num_heads) if num_heads else range(1, count + 1)
    choices = [
        (fsdp, context)
        for fsdp in (1, 2)
        for context in sizes
        if fsdp * context <= count and num_tokens % context == 0
    ]
    return max(choices, key=lambda axes: (axes[0] * axes[1], axes))


def load(
    path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    lora_file=None,
    keep_params: bool = True,
    **folder_settings,
) -> Model:
    """Opens a model for generation.

    Args:
      path: a workdir of `main` (its newest good checkpoint is used), one checkpoint in it
        (WORKDIR/checkpoints/STEP), or a model folder, released or converted to Orbax.
      mesh: the devices to use; None is `default_mesh` for the scenes that are generated first.
      lora_file: LoRA tensors of diffusers' CogVideoX (.safetensors) to merge into the transformer.
      keep_params: keep the transformer in memory between calls of `generate`; without that it is
        let go before the VAE decodes.
      **folder_settings: of model folders only: those of `ModelFolder`.

    Returns:
      Model.

    Raises:
      FileNotFoundError: if there is no model at that path.
      ValueError: naming what does not fit.
    """
    paths.check_local(path=path, lora_file=lora_file)
    path = pathlib.Path(path)
    if (path / 'transformer').is_dir():
        settings = ModelFolder(**folder_settings)
        config, codec, read = _open_folder(path, settings)
        height_px, width_px = codec.size_px
        record = dataclasses.asdict(settings) | {'height': height_px, 'width': width_px}
    elif folder_settings:
        raise ValueError(
            f'{path} is not a model folder, for which alone there is {", ".join(folder_settings)}.'
        )
    else:
        config, codec, read = _open_run(path)
        record = {}

    if mesh is not None:
        copies = mesh.shape['data'] * mesh.shape['fsdp']
        tokens = mesh.shape['context']  # their number is known when the scenes are
        context_parallel.check(mesh.shape, copies, tokens, config.model.num_attention_heads)

    record['lora'] = str(pathlib.Path(lora_file).absolute()) if lora_file else None
    low_rank = lora_files.read_lora(lora_file, config.model) if lora_file else None

    def read_params(mesh):
        source, params = read(mesh)
        if low_rank is not None:
            params = lora.merge_placed(params, *low_rank)
        return source, params

    source = path.absolute()
    if (path / checkpoint.FOLDER).is_dir():
        source = next(reversed(checkpoint.folders(path)), None)
    return Model(config, codec, read_params, record, str(source), keep_params, mesh)


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """How a model folder is used.

    Attributes:
      height, width: pixels; None is the size that the model was trained with.
      dtype: for computing and holding parameters; the VAE always computes in float32.
      tiling: run the VAE in overlapping tiles, for less memory.
      decode_rule: how the VAE batches frames, one of vae.DECODE_RULES.
      mask_padding: hide padding from the text encoder; the reference does not.
    """

    height: int | None = ranges.whole(None, least=1, or_none=True)
    width: int | None = ranges.whole(None, least=1, or_none=True)
    dtype: str = ranges.word('bfloat16', dit.DTYPES)
    tiling: bool = ranges.switch(False)
    decode_rule: str = ranges.word('reference', vae.DECODE_RULES)
    mask_padding: bool = ranges.switch(False)

    def __post_init__(self):
        ranges.refuse(ranges.problems(ModelFolder, vars(self), ''))


def _open_folder(folder: pathlib.Path, settings: ModelFolder):
    """Configuration, codec, and a function that reads the transformer onto a mesh and says from
    where."""
    config = config_lib.Config(
        data=config_lib.DataConfig(fps=8.0), model=dit.DiTConfig(dtype=settings.dtype)
    )
    config = load_lib.with_model_from(config, folder)
    layouts = ((config.model.sample_frames,),)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, layouts=layouts))

    factor = config_json.read_config('vae', folder / 'vae').spatial_factor
    height_px = settings.height or config.model.sample_height * factor
    width_px = settings.width or config.model.sample_width * factor
    codec = latent_codec.PretrainedCodec(
        folder,
        config.model,
        (height_px, width_px),
        tiling=settings.tiling,
        decode_rule=settings.decode_rule,
        mask_padding=settings.mask_padding,
    )
    abstract = names.abstract_params(config.model)

    def read(mesh):
        target = partitioning.abstract_arrays(abstract, mesh, config.model.dtype)
        return folder.absolute(), load_lib.read_params(
            'transformer', folder / 'transformer', config.model, target
        )

    return config, codec, read


def _open_run(path: pathlib.Path):
    """As `_open_folder`, of a workdir or of one checkpoint in it."""
    is_checkpoint = (path / 'ema').is_dir()
    workdir = path.absolute().parent.parent if is_checkpoint else path.absolute()
    config = config_lib.load(workdir / 'config.json')

    def read(mesh):
        target = partitioning.abstract_arrays(names.abstract_params(config.model), mesh)
        if is_checkpoint:
            return path.absolute(), runs.restore(path, config, target)
        return runs.newest(path, config, target)

    return config, latent_codec.for_run(config, workdir), read
