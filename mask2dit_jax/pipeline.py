"""Captions (and given scenes) to videos, for Python, for `sample`, and for training's sample grids
and scores.

    model = mask2dit_jax.load('runs/tiny')
    video = model.generate(['red ring on gray moves left', 'it grows', 'it blinks'])
    video.save('samples')

`load` opens whatever holds a model. Below it stand the steps that it is made of: `encode_inputs`,
`sample_latents`, and both with decoding, `generate`.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging

from mask2dit_jax import config as config_lib
from mask2dit_jax import paths, ranges
from mask2dit_jax.data import clips, latent_codec, manifest, sheets, story_file
from mask2dit_jax.data import video as video_lib
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.models import dit, lora, vae
from mask2dit_jax.pretrained import config_json, lora_files, names, runs
from mask2dit_jax.pretrained import load as load_lib

# The size at which small videos are written: their pixels become squares.
_WRITTEN_SIZE_PX = 256


# Functions that hear of every denoising step that is done. The compiled loops call them through
# `_report_step`, so that a loop need not be compiled anew for each of them.
_step_listeners: list[Callable[[], None]] = []


def _report_step(timestep) -> None:
    del timestep  # listeners count
    for listener in _step_listeners:
        listener()


@functools.cache
def jit_sample(
    config: config_lib.Config,
    frames: tuple[int, ...],
    mesh: jax.sharding.Mesh,
    reports_steps: bool = False,
):
    """The jitted sampling loop for these latent frames per scene; it compiles once for each batch
    size and number of steps.

    The two halves of classifier-free guidance are rows of one batch, spread over the batch axes of
    the mesh; tokens are spread over context. Everything but the parameters comes in whole on every
    device. With `reports_steps` the loop tells `_step_listeners` of every step that is done.
    """
    model = dit.DiT(config.model)

    def run(params, noise, text, null_text, given, given_scenes, timesteps, table, guidance):
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
            )
        return out.reshape(-1, *shape)

    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = partitioning.shardings(names.abstract_params(config.model), mesh)
    return jax.jit(run, in_shardings=(params, *[whole] * 8), out_shardings=whole)


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
) -> Inputs:
    """Encodes captions and given scenes.

    Args:
      codec: text and video codec.
      captions: per story a list of S strings, those of given scenes included.
      frames: pixel frames per scene.
      given_videos: None, or pixels [B, F', H, W, 3] of the leading scenes, which are given; B may
        be 1 where all stories share them.
      negative_caption: what classifier-free guidance leads away from, in every scene.

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
    listener: Callable[[], None] | None = None,
) -> np.ndarray:
    """Denoises the stories of `inputs`, on the mesh that `params` lie on.

    Args:
      config, params, seed, first_index, sampler, steps, guidance: as in `generate`.
      inputs: of `encode_inputs`.
      listener: called after every denoising step.

    Returns:
      Latents float32 [B, T, h, w, C].

    Raises:
      ValueError: if guidance is neither one number nor one number for each scene.
    """
    num_scenes = len(inputs.latent_frames)
    guidance = config.sample.guidance if guidance is None else guidance
    if np.size(guidance) not in (1, num_scenes):
        raise ValueError(
            f'Guidance must be one number or one per scene ({num_scenes}), got {guidance}.'
        )
    noise = jnp.stack(
        [story_noise(seed, first_index + i, x.shape) for i, x in enumerate(inputs.given)]
    )
    timesteps, table = samplers.sampler_table(
        sampler or config.sample.sampler, config.schedule, steps or config.sample.steps
    )
    scale = np.broadcast_to(np.asarray(guidance, np.float32), num_scenes)
    mesh = mesh_lib.mesh_of(params)
    run = jit_sample(config, inputs.latent_frames, mesh, reports_steps=listener is not None)
    if listener is not None:
        _step_listeners.append(listener)
    try:
        latents = run(
            params,
            noise,
            inputs.text,
            inputs.null_text,
            inputs.given,
            inputs.given_scenes,
            timesteps,
            table,
            scale,
        )
        latents = np.asarray(latents)
    finally:
        if listener is not None:
            jax.effects_barrier()  # the last calls may come after the result
            _step_listeners.remove(listener)
    return latents


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
) -> np.ndarray:
    """Generates a batch of stories of one layout.

    Args:
      config: the model's configuration, which also holds the default sampler settings.
      params: parameters, on one device or spread over a mesh by partitioning.shardings.
      codec, captions, frames, given_videos: as in `encode_inputs`.
      seed: story i gets the noise of (seed, first_index + i).
      first_index: see above.
      sampler, steps, guidance: overrides of config.sample; guidance may be one number per scene.

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
    )
    return codec.decode_video(latents, inputs.latent_frames)


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


def plan_frames(
    frames: Sequence[int | None], given: Sequence[np.ndarray], default: int
) -> tuple[int, ...]:
    """Pixel frames of each scene: those of its given clip, else those asked for, else the default.

    Raises:
      ValueError: if there are as many given clips as scenes, or a clip contradicts what is asked.
    """
    if len(given) >= len(frames):
        raise ValueError(
            f'{len(given)} given clips and {len(frames)} captions leave no scene to generate: give '
            'one caption per clip and at least one more.'
        )
    planned = []
    for i, asked in enumerate(frames):
        length = len(given[i]) if i < len(given) else None
        if asked and length and asked != length:
            raise ValueError(
                f'Scene {i + 1} has {asked} frames in the story but its given clip has {length}.'
            )
        planned.append(length or asked or default)
    return tuple(planned)


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
class Video:
    """One generated video.

    Attributes:
      scenes: pixels of each scene, float32 in [0, 1], [F, H, W, 3]; the given ones come first.
      captions: one for each scene.
      num_given: how many leading scenes were given.
      fps: frames per second.
      record: everything that it takes to make the video again, as story.json holds it.
    """

    scenes: list[np.ndarray]
    captions: list[str]
    num_given: int
    fps: float
    record: dict

    def save(self, folder) -> None:
        """Writes what `sample` writes: video_0.mp4, video_0.gif, sheet_0.png and story.json."""
        save([self], folder)


def save(videos: Sequence[Video], folder) -> None:
    """Writes videos of one story to a folder: an mp4, a gif and a contact sheet of each, and one
    story.json."""
    paths.check_local(folder=folder)
    folder = pathlib.Path(folder)
    for i, video in enumerate(videos):
        pixels = np.concatenate(video.scenes)  # [F, H, W, 3]
        scale = max(1, _WRITTEN_SIZE_PX // pixels.shape[1])
        video_lib.write_mp4(folder / f'video_{i}.mp4', pixels, video.fps, scale)
        video_lib.write_gif(folder / f'video_{i}.gif', pixels, video.fps, scale)

        given = [s < video.num_given for s in range(len(video.scenes))]
        sheet = sheets.contact_sheet(video.scenes, video.captions, given=given)
        video_lib.write_png(folder / f'sheet_{i}.png', sheet)

    record = videos[0].record | {'num_videos': len(videos)}
    (folder / 'story.json').write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')


class Model:
    """A transformer with its codec, as `load` opens it. Nothing is read before it is needed.

    Attributes:
      config: config.Config.
      codec: latent_codec.LatentCodec, between captions or pixels and latents.
      settings: what `load` was told, for story.json.
    """

    def __init__(self, config, codec, read_params, settings: dict, keep_params: bool):
        self.config = config
        self.codec = codec
        self.settings = settings
        self._read_params = read_params
        self._keep_params = keep_params
        self._params = None

    def params(self):
        """Where the parameters come from, and the parameters; they are read at the first call."""
        if self._params is None:
            self._params = self._read_params()
        return self._params

    def generate(
        self,
        captions: Sequence[str] | Sequence[Sequence[str]],
        *,
        frames: Sequence[int | None] | int | None = None,
        given: Sequence = (),
        given_frames: int | None = None,
        seed: int = 0,
        sampler: str | None = None,
        steps: int | None = None,
        guidance=None,
        negative_caption: str = '',
        callback: Callable[[int, int], None] | None = None,
    ):
        """Generates one video, or several whose scenes have the same lengths.

        Args:
          captions: one for each scene, those of given scenes included; or a list of such lists, for
            several videos. Equal lists give different videos: each has noise of its own.
          frames: pixel frames of a scene, or of each; None takes those that the model was trained
            with. A given scene has the frames of its clip.
          given: leading scenes, which all the videos continue: files, or pixels [F, H, W, 3], uint8
            or float32 in [0, 1], of the size in `codec.size_px`.
          given_frames: cut so many frames from each given file; None takes the whole file.
          seed: the same seed gives the same videos; video i has the noise of (seed, i).
          sampler, steps, guidance: None takes the settings of the model; guidance is one number, or
            one for each scene.
          negative_caption: what guidance leads away from, in every scene.
          callback: called after every denoising step with its number, from 1, and the number of all
            steps of all the videos.

        Returns:
          Video, or a list of them if captions is a list of lists.

        Raises:
          FileNotFoundError, ValueError: naming what is missing or does not fit.
        """
        if not captions or not captions[0]:
            raise ValueError('There is no caption: give one for each scene.')
        stories = [captions] if isinstance(captions[0], str) else list(captions)
        num_scenes = len(stories[0])
        asked = list(frames) if isinstance(frames, Sequence) else [frames] * num_scenes
        guidance = self.config.sample.guidance if guidance is None else guidance
        sampling = {
            'seed': seed,
            'sampler': self.config.sample.sampler if sampler is None else sampler,
            'steps': self.config.sample.steps if steps is None else steps,
            'guidance': np.asarray(guidance, float).tolist(),
        }
        check_sampling(self.config, num_scenes, [*asked, given_frames], **sampling)

        height_px, width_px = self.codec.size_px
        given_clips = []
        for clip in given:
            if not isinstance(clip, np.ndarray):
                clip = read_given(clip, height_px, width_px, given_frames, seed)
            if clip.ndim != 4 or clip.shape[1:] != (height_px, width_px, 3):
                raise ValueError(
                    f'Given pixels have shape {clip.shape}, not [F, {height_px}, {width_px}, 3]: '
                    'scale and crop them to codec.size_px, or give a file.'
                )
            given_clips.append(clip)
        planned = plan_frames(asked, given_clips, self.config.data.layouts[0][0])
        logging.info(
            'Sampling %d video(s) of %s frames.', len(stories), '+'.join(map(str, planned))
        )

        # One network is in memory at a time: the text encoder and the VAE in here, ...
        given_videos = None
        if given_clips:
            given_videos = np.concatenate(given_clips)[None]  # [1, F, H, W, 3]
        inputs = encode_inputs(self.codec, stories, planned, given_videos, negative_caption)

        # ... then the transformer, ...
        path, params = self.params()
        listener = None
        if callback is not None:
            listener = _step_counter(callback, len(stories) * sampling['steps'])
        latents = np.concatenate(
            [
                sample_latents(
                    self.config,
                    params,
                    inputs.story(i),
                    first_index=i,
                    listener=listener,
                    **sampling,
                )
                for i in tqdm.trange(len(stories), desc='sampling', unit='video')
            ]
        )
        del params
        if not self._keep_params:
            self._params = None

        # ... and the VAE again.
        pixels = self.codec.decode_video(latents, inputs.latent_frames)  # [B, F, H, W, 3]
        how = {
            'checkpoint': str(path),
            'given': [_given_record(clip) for clip in given],
            'given_frames': given_frames,
            'num_videos': 1,
            'negative_prompt': negative_caption,
            **sampling,
            'model': dataclasses.asdict(self.config.model),
            'jax': jax.__version__,
            **self.settings,
        }
        videos = [
            self._video(list(story), planned, video, len(given_clips), how)
            for story, video in zip(stories, pixels)
        ]
        return videos[0] if isinstance(captions[0], str) else videos

    def _video(self, captions: list[str], frames: tuple[int, ...], pixels, num_given: int, how):
        """One video, from its pixels [F, H, W, 3] and a record of how it was made."""
        scenes = [{'caption': c, 'frames': f} for c, f in zip(captions, frames)]
        record = {'scenes': scenes} | how
        parts = story_file.split_scenes(pixels, frames)
        return Video(parts, captions, num_given, self.config.data.fps, record)


def _step_counter(callback: Callable[[int, int], None], total: int) -> Callable[[], None]:
    """A listener that counts the steps of all videos."""
    done = 0

    def listener():
        nonlocal done
        done += 1
        callback(done, total)

    return listener


def _given_record(clip) -> dict:
    """What story.json says of a given clip."""
    if isinstance(clip, np.ndarray):
        return {'file': None, 'sha256': hashlib.sha256(clip.tobytes()).hexdigest()}
    content = pathlib.Path(clip).read_bytes()
    return {'file': str(clip), 'sha256': hashlib.sha256(content).hexdigest()}


def default_mesh(axes: tuple[int, int] | None = None) -> jax.sharding.Mesh:
    """The mesh that videos are generated on.

    Args:
      axes: over how many devices the parameters and the halves of guidance are spread (fsdp), and
        over how many the tokens (context); None takes all accelerators, two of them for the halves,
        or one CPU.

    Raises:
      ValueError: if there are not so many devices.
    """
    count = 1
    if axes or jax.default_backend() != 'cpu':
        count = jax.device_count()
    fsdp, context = axes or ((1, 1) if count == 1 else (2, count // 2))
    config = mesh_lib.MeshConfig(fsdp=fsdp, context=context)
    return mesh_lib.make_mesh(config, jax.devices()[:count])


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
      mesh: the devices to use; None is `default_mesh()`.
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
    mesh = mesh or default_mesh()
    if (path / 'transformer').is_dir():
        settings = ModelFolder(**folder_settings)
        config, codec, read = _open_folder(path, mesh, settings)
        height_px, width_px = codec.size_px
        record = dataclasses.asdict(settings) | {'height': height_px, 'width': width_px}
    elif folder_settings:
        raise ValueError(
            f'{path} is not a model folder, for which alone there is {", ".join(folder_settings)}.'
        )
    else:
        config, codec, read = _open_run(path, mesh)
        record = {}

    record['lora'] = str(lora_file) if lora_file else None
    low_rank = lora_files.read_lora(lora_file, config.model) if lora_file else None

    def read_params():
        source, params = read()
        if low_rank is not None:
            params = lora.merge_placed(params, *low_rank)
        return source, params

    return Model(config, codec, read_params, record, keep_params)


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


def _open_folder(folder: pathlib.Path, mesh: jax.sharding.Mesh, settings: ModelFolder):
    """Configuration, codec, and a function that reads the transformer and says from where."""
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
    target = partitioning.abstract_arrays(abstract, mesh, config.model.dtype)

    def read():
        return folder, load_lib.read_params(
            'transformer', folder / 'transformer', config.model, target
        )

    return config, codec, read


def _open_run(path: pathlib.Path, mesh: jax.sharding.Mesh):
    """As `_open_folder`, of a workdir or of one checkpoint in it."""
    is_checkpoint = (path / 'ema').is_dir()
    workdir = path.absolute().parent.parent if is_checkpoint else path.absolute()
    config = config_lib.load(workdir / 'config.json')
    target = partitioning.abstract_arrays(names.abstract_params(config.model), mesh)

    def read():
        if is_checkpoint:
            return path, runs.restore(path, config, target)
        return runs.newest(path, config, target)

    return config, latent_codec.for_run(config, workdir), read
