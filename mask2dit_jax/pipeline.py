"""Captions (and given scenes) to videos, for Python, for `sample`, and for training's sample grids
and scores.

    model = mask2dit_jax.load('runs/tiny')
    video = model.generate(['red ring on gray moves left', 'it grows', 'it blinks'])
    video.save('samples')

`load` opens whatever holds a model. Stories of many scenes are told one scene after another, and
`Model.tell` yields each as soon as it is done.
"""

import dataclasses
import hashlib
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import tqdm
from absl import logging

from mask2dit_jax import checkpoint, generation, paths, ranges
from mask2dit_jax import config as config_lib
from mask2dit_jax.data import clips, latent_codec, latent_file, manifest, samples, story_file
from mask2dit_jax.data import video as video_lib
from mask2dit_jax.distributed import context_parallel, partitioning
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.models import dit, lora, vae
from mask2dit_jax.pretrained import config_json, lora_files, names, runs
from mask2dit_jax.pretrained import load as load_lib

# Scenes of the published setting, in which the released weights were trained; their folder does not
# say.
_RELEASED_SCENES = 3


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


def default_joint(config: config_lib.Config) -> int:
    """Scenes that are generated together unless something else is asked for: as many as the model
    was trained on, or one, where it was trained to generate each from finished ones."""
    if config.train.objective == 'teacher_forcing':
        return 1
    return max(map(len, config.data.layouts))


def plan_telling(
    config: config_lib.Config,
    frames: tuple[int, ...],
    num_given: int,
    *,
    joint: int | None,
    window: int | None,
    sinks: int | None,
) -> tuple[list[generation.Block], dict]:
    """Plans which scenes are generated together, and says where that is beyond the training.

    Args:
      config: the model's configuration, whose layouts it was trained on.
      frames: pixel frames of each scene.
      num_given: leading scenes that are given.
      joint, window, sinks: as in `Model.request`.

    Returns:
      The blocks, and what story.json holds of them.

    Raises:
      ValueError: if a number is out of its range.
    """
    found = []
    for name, value, least in (('joint', joint, 1), ('window', window, 1), ('sinks', sinks, 0)):
        if value is not None and not (ranges.is_whole(value) and value >= least):
            found.append(f'{name} is {value!r}: use a whole number of at least {least}.')
    ranges.refuse(found)

    trained = max(map(len, config.data.layouts))
    joint = default_joint(config) if joint is None else joint
    # On the stories the first scene is what keeps characters and places the same.
    sinks = min(1, max(0, trained - 2)) if sinks is None else sinks
    window = max(1, trained - 1 - sinks) if window is None else window
    blocks = generation.plan_blocks(len(frames), num_given, joint=joint, window=window, sinks=sinks)
    joint = blocks[0].stop

    longest = max(len(block.scenes) for block in blocks if block.stop > num_given)
    if longest > trained:
        logging.warning(
            '%d scenes are in one pass, and the model was trained on %d: a smaller --window, '
            '--sinks or --joint keeps to that.',
            longest,
            trained,
        )
    lengths = {length for layout in config.data.layouts for length in layout}
    unseen = sorted(set(frames) - lengths)
    if unseen:
        logging.warning(
            'A scene has %d frames, and the model was trained on scenes of %s: expect less of it.',
            unseen[0],
            ' and '.join(map(str, sorted(lengths))),
        )
    return blocks, {'joint': joint, 'window': window, 'sinks': sinks}


def with_sample(config: config_lib.Config, **settings) -> config_lib.Config:
    """The configuration with other settings of `sample`."""
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, **settings))


Video = samples.Video
save = samples.save


@dataclasses.dataclass(frozen=True)
class Scene:
    """One scene of a story that is told.

    Attributes:
      number: its place in the story, from 0.
      caption: what it was asked to show.
      pixels: float32 in [0, 1], [F, H, W, 3].
      latents: float32 [T, h, w, C], what it was decoded from.
    """

    number: int
    caption: str
    pixels: np.ndarray
    latents: np.ndarray


def check_sampling(
    config: config_lib.Config,
    num_scenes: int,
    frames: Sequence[int | None],
    *,
    seed: int,
    sampler: str,
    steps: int,
    guidance,
    **how,
) -> None:
    """Refuses what cannot be sampled, before anything is loaded.

    Args:
      config: the model's configuration, whose fields have the ranges.
      num_scenes: scenes of a story.
      frames: numbers of frames that are asked for; None for those that are not.
      seed, sampler, steps, guidance, **how: as in `Model.request`.

    Raises:
      ValueError: naming all that is wrong, and what is allowed.
    """
    found = ranges.problems(config_lib.Config, {'seed': seed}, '')
    unknown = [name for name in how if name not in config_lib.HOW]
    found += [
        f'There is no setting {name!r}{ranges.nearest(name, config_lib.HOW)}.' for name in unknown
    ]
    settings = {'sampler': sampler, 'steps': steps, **how}
    found += ranges.problems(config_lib.SampleConfig, settings, '')
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
    ranges.refuse(config_lib.context_conflicts(with_sample(config, **how)))
    if how.get('lag') and config.train.objective != 'diffusion_forcing':
        logging.warning(
            'Scenes begin %d steps after each other, and the model was trained by %s, not by '
            'diffusion_forcing: expect less of it, or give --lag=0.',
            how['lag'],
            config.train.objective,
        )


@dataclasses.dataclass(frozen=True)
class Request:
    """Videos that are to be made, after everything has been checked that is cheap to check.

    Attributes:
      stories: captions of each video.
      frames: pixel frames per scene.
      given: the given scenes.
      mesh: the devices that the videos are sampled on.
      global_caption: what stands before the caption of every scene; empty for none.
      negative_caption: what guidance leads away from.
      config: the model's, with what is asked for in `sample`.
      sampling: seed, sampler, steps and guidance.
      blocks: which scenes are generated together, and which are given then.
      record: what story.json holds. Its `weights`, a checksum, and its `checkpoint` are certain
        once `inputs` are there: before, the latter is the newest of a workdir, whole or not.
      inputs: what the transformer gets, after `Model.start`.
    """

    stories: list[list[str]]
    frames: tuple[int, ...]
    given: list[_GivenScene]
    mesh: jax.sharding.Mesh
    global_caption: str
    negative_caption: str
    config: config_lib.Config
    sampling: dict
    blocks: list[generation.Block]
    record: dict
    inputs: generation.Inputs | None = None


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
            steps, guidance, global_caption, negative_caption, joint, window, sinks, lag, context,
            given_timestep, captions_of_given.

        Returns:
          Video, or a list of them if captions is a list of lists.

        Raises:
          FileNotFoundError, ValueError: naming what is missing or does not fit.
        """
        request = self.start(self.request(captions, **settings))
        videos = list(self.videos(request, range(len(request.stories)), callback))
        is_one = isinstance(captions[0], str)
        return videos[0] if is_one else videos

    def tell(self, captions: Sequence[str], **settings) -> Iterator[Scene]:
        """Tells one story, and yields each scene as soon as it is decoded.

        Args:
          captions: one for each scene, those of given scenes included.
          **settings: those of `request`.

        Yields:
          Scene, the given ones first.

        Raises:
          FileNotFoundError, ValueError: naming what is missing or does not fit.
        """
        request = self.start(self.request(list(captions), **settings))
        yield from self.scenes(request, 0)

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
        global_caption: str = '',
        negative_caption: str = '',
        joint: int | None = None,
        window: int | None = None,
        sinks: int | None = None,
        **how,
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
          global_caption: what is true of all scenes, who and where for instance: it is put before
            the caption of each.
          negative_caption: what guidance leads away from, in every scene.
          joint: how many scenes at the beginning are generated together; None takes as many as the
            model was trained on, or one after teacher forcing. All later ones are generated one
            after another.
          window: how many scenes right before a later one are given to it; None takes as many as
            the model was trained on, the new scene and `sinks` not counted.
          sinks: how many scenes at the beginning of the story are given to every later one on top;
            None takes one, or none if the model was trained on fewer than three scenes.
          **how: lag, context, given_timestep, captions_of_given: see config.SampleConfig; None
            takes the setting of the model.

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
        how = {name: getattr(self.config.sample, name) for name in config_lib.HOW} | {
            name: value for name, value in how.items() if value is not None
        }
        check_sampling(self.config, len(stories[0]), [*asked, given_frames], **sampling, **how)
        config = with_sample(self.config, **how)

        scenes = []
        for item in given:
            scenes += _open_given(item, self.codec, given_frames, seed)
        lengths = [scene.frames for scene in scenes]
        planned = plan_frames(asked, lengths, self.config.data.layouts[0][0])
        blocks, telling = plan_telling(
            self.config, planned, len(scenes), joint=joint, window=window, sinks=sinks
        )
        mesh = self._mesh_for(self._num_tokens(planned, blocks, len(scenes)))
        record = {
            'scenes': _scene_records(stories[0], planned),
            'checkpoint': self.source,
            'weights': None,
            'given': [scene.record for scene in scenes],
            'given_frames': given_frames,
            'num_videos': len(stories),
            'first_index': first_index,
            'global_prompt': global_caption,
            'negative_prompt': negative_caption,
            **sampling,
            **how,
            **telling,
            'fps': self.config.data.fps,
            'model': dataclasses.asdict(self.config.model),
            'jax': jax.__version__,
            **self.settings,
            'device': mesh.devices.flat[0].device_kind,
            'mesh': [mesh.shape['fsdp'], mesh.shape['context']],
        }
        return Request(
            stories,
            planned,
            scenes,
            mesh,
            global_caption,
            negative_caption,
            config,
            sampling,
            blocks,
            record,
        )

    def start(self, request: Request) -> Request:
        """Encodes the captions and given scenes of a request, then reads the transformer.

        One network is in memory at a time: the text encoder, the VAE, the transformer.
        """
        lengths = [f'{len(list(run))} x {n}' for n, run in itertools.groupby(request.frames)]
        logging.info(
            'Sampling %d video(s) of %d scenes (%s frames).',
            len(request.stories),
            len(request.frames),
            ' + '.join(lengths),
        )
        before = [request.global_caption] if request.global_caption else []
        inputs = generation.encode_inputs(
            self.codec,
            [[' '.join([*before, caption]) for caption in story] for story in request.stories],
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
            listener = _step_counter(callback, _num_steps(request) * len(indices))

        for index in tqdm.tqdm(indices, desc='sampling', unit='video'):
            is_last = index == indices[-1]
            scenes = self.scenes(request, index, listener=listener, keeps_params=not is_last)
            yield self._video(request, index, list(scenes))

    def scenes(
        self,
        request: Request,
        index: int,
        told: Sequence[np.ndarray] = (),
        listener: Callable[[], None] | None = None,
        keeps_params: bool = False,
    ) -> Iterator[Scene]:
        """Tells one story of a request that was started.

        Args:
          request: of `start`.
          index: which of its stories.
          told: latents [T, h, w, C] of the scenes that are generated already, of this or of a
            shorter request that is otherwise the same. They are decoded again, not generated.
          listener: called after every denoising step.
          keeps_params: whether the transformer is needed after the last scene, where the model does
            not keep its parameters.

        Yields:
          Scene, as soon as its block is decoded.
        """
        inputs = request.inputs.story(index)
        sampling = request.sampling | {'first_index': request.record['first_index'] + index}
        blocks = request.blocks
        new = _unmade(request, len(told))
        # What is carried is not on disk: scenes that are there already leave it once more.
        carrying = request.config.sample.context == 'carried' and new
        carriers = blocks[: blocks.index(new[-1])] if carrying else []
        config = request.config
        done = []  # latents [1, T, h, w, C] of each scene
        carried = generation.NOTHING
        captions = request.stories[index]
        is_long = len(new) > 1
        with tqdm.tqdm(total=len(new), desc='telling', unit='block', disable=not is_long) as bar:
            for block in blocks:
                params = None
                if block in new or block in carriers:
                    _, params = self.params(request.mesh)
                if block.stop <= len(told):
                    latents = [scene[None] for scene in told[block.start : block.stop]]
                else:
                    latents = generation.tell(
                        config, params, inputs, block, done, carried, listener=listener, **sampling
                    )
                if block in carriers:
                    carried = generation.carry(config, params, inputs, block, latents, carried)
                if params is not None:
                    del params
                    self._put_away(is_last=block == blocks[-1] and not keeps_params)
                bar.update(block in new)
                done += latents

                frames = request.inputs.latent_frames[block.start : block.stop]
                pixels = self.codec.decode_video(np.concatenate(latents, axis=1), frames)[0]
                lengths = request.frames[block.start : block.stop]
                clips_px = story_file.split_scenes(pixels, lengths)
                for number, clip, scene in zip(range(block.start, block.stop), clips_px, latents):
                    yield Scene(number, captions[number], clip, scene[0])

    def _put_away(self, is_last: bool) -> None:
        """Makes room for the VAE where parameters are not kept."""
        if self._keep_params:
            return
        if is_last:
            self._params = None
        else:
            path, params = self._params
            self._params = path, _in_memory(params, 'pinned_host')

    def _video(self, request: Request, index: int, scenes: Sequence[Scene]) -> Video:
        """One video of all its scenes."""
        captions = request.stories[index]
        record = request.record | {
            'scenes': _scene_records(captions, request.frames),
            'num_videos': 1,
            'first_index': request.record['first_index'] + index,
        }
        return Video(
            [scene.pixels for scene in scenes],
            captions,
            len(request.given),
            self.config.data.fps,
            record,
            self.latents_of(request, [scene.latents for scene in scenes]),
        )

    def read_latents(self, path) -> list[np.ndarray]:
        """The scenes [T, h, w, C] of a file of latents, or of the folder of one.

        Raises:
          FileNotFoundError, ValueError: naming the file, if it is not there or does not fit.
        """
        return [scene.latents for scene in _open_given(path, self.codec, None, 0)]

    def latents_of(self, request: Request, scenes: Sequence[np.ndarray]) -> latent_file.Latents:
        """The leading scenes of a story, [T, h, w, C] each, for a file of latents."""
        return latent_file.Latents(
            list(scenes),
            list(request.frames[: len(scenes)]),
            self.codec.fingerprint,
            self.codec.size_px,
            request.record['checkpoint'],
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

    def _num_tokens(
        self, frames: tuple[int, ...], blocks: Sequence[generation.Block], num_given: int
    ) -> int:
        """The greatest common divisor of the numbers of tokens of all forward passes of a story."""
        latent_frames = self.codec.latent_frames(frames)
        numbers = []
        for block in blocks:
            count = len(block.given) if block.start else num_given
            is_given = np.arange(len(block.scenes)) < count
            remembered = generation.num_remembered(self.config, is_given[None])
            for scenes in (block.scenes[:remembered], block.scenes[remembered:]):
                if scenes:
                    seen = tuple(latent_frames[scene] for scene in scenes)
                    layout = self.config.model.layout(seen, *self.codec.latent_shape[:2])
                    numbers.append(layout.num_tokens)
        return math.gcd(*numbers)


def _in_memory(params, kind: str):
    """Parameters in a memory of their devices, 'device' or 'pinned_host'."""
    return jax.device_put(params, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), params))


def _scene_records(captions: Sequence[str], frames: Sequence[int]) -> list[dict]:
    return [{'caption': c, 'frames': f} for c, f in zip(captions, frames)]


def _unmade(request: Request, num_told: int) -> list[generation.Block]:
    """The blocks that are to be generated where so many leading scenes are generated already."""
    there = max(num_told, len(request.given))
    return [block for block in request.blocks if block.stop > there]


def _num_steps(request: Request) -> int:
    """Denoising steps of one video."""
    steps = request.sampling['steps']
    lag = generation.lag(request.config, steps)
    new = [
        block.stop - max(block.start, len(request.given)) for block in _unmade(request, num_told=0)
    ]
    return sum(steps + lag * (count - 1) for count in new)


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
    layouts = ((config.model.sample_frames,) * _RELEASED_SCENES,)
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
