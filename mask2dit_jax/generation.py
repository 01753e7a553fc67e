"""Captions and given scenes to latents and pixels: what is generated together, and the loop.

Below stand `encode_inputs`, `sample_latents`, and both with decoding, `generate`, for batches of
stories whose scenes have the same lengths. A story of more scenes than can be generated at once is
told in blocks (`plan_blocks`, `tell`): each new scene is conditioned on some that precede it
(Mask²DiT, section 3.3). pipeline.py makes a model for users of it.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax import config as config_lib
from mask2dit_jax.attention import kv_cache
from mask2dit_jax.data import latent_codec
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.layout import VIDEO
from mask2dit_jax.models import dit
from mask2dit_jax.pretrained import names

# The seed's independent streams of random numbers; training has the streams before them.
_STORY_STREAM = 2
_SCENE_STREAM = 3
_GIVEN_STREAM = 4

# Functions that hear of every denoising step that is done, by a number of their own. The compiled
# loops get the number as an input and call `_report_step` with it, so that a loop need not be
# compiled anew for each of them.
_step_listeners: dict[int, Callable[[], None]] = {}
_listener_numbers = itertools.count()


def _report_step(number) -> None:
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
    remembered: int = 0,
    carried: bool = False,
):
    """The jitted sampling loop for these latent frames per scene; it compiles once for each batch
    size and number of steps.

    With `remembered`, so many leading scenes are given in every story. They go through the
    transformer once, which leaves the keys and values of their video in a cache, and the loop has
    the tokens of the other scenes alone. The result is that of the loop over all tokens, to
    rounding, if the pattern lets no scene see later ones. With `carried` that cache is an input,
    after the guidance.

    Stories lie on the mesh as mesh.row_sharding says. The two halves of classifier-free guidance
    are rows of one batch, spread over the batch axes; tokens are spread over context. With
    `reports_steps` the loop gets the number of one of `_step_listeners` as its last input, and
    tells it of every step that is done.
    """
    model = dit.DiT(config.model)
    given_timestep = config.sample.given_timestep
    first = sum(frames[:remembered])  # the first frame that has tokens in the loop

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
        *more,
    ):
        more = list(more)
        cache = more.pop(0) if carried else None
        noise, text, given, given_scenes = map(by_rows, (noise, text, given, given_scenes))

        # The captions of both halves of guidance.
        negative = jnp.broadcast_to(null_text, text.shape)
        if config.sample.captions_of_given:
            negative = jnp.where(given_scenes[..., None, None], text, negative)
        both = jnp.concatenate([negative, text])

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            if remembered and not carried:
                cache = _remember(
                    config,
                    params,
                    text[:, :remembered],
                    negative[:, :remembered],
                    given[:, :first],
                    frames[:remembered],
                    mesh,
                )

            # Between forward passes width and channels are one axis: alone, 16 channels would fill
            # an eighth of the TPU's lanes, and every copy of the latents eight times their size.
            shape = (-1, *noise.shape[2:])

            def velocity(x, t):
                v = model.apply(
                    {'params': params},
                    x.reshape(len(x), *shape),
                    both[:, remembered:],
                    t,
                    frames=frames,
                    cache=cache,
                )
                return v.reshape(x.shape)

            merged, of_given = (x.reshape(*x.shape[:3], -1) for x in (noise, given))
            out = samplers.sample(
                velocity,
                merged[:, first:],
                config.model.layout(frames[remembered:], *noise.shape[2:4]),
                timesteps[:, remembered:],
                table[:, remembered:],
                guidance[remembered:],
                of_given[:, first:],
                given_scenes[:, remembered:],
                given_timestep=given_timestep,
                callback=_report_step if reports_steps else None,
                callback_data=more[0] if reports_steps else None,
            )
        out = out.reshape(len(out), *shape)
        return by_rows(jnp.concatenate([given[:, :first], out], axis=1))

    # Stories come in and go out as they lie: how they are spread depends on their number.
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = partitioning.shardings(names.abstract_params(config.model), mesh)
    cache = (None,) * carried
    inputs = (None, None, whole, None, None, *[whole] * 3, *cache, *[whole] * reports_steps)
    return jax.jit(run, in_shardings=(params, *inputs))


def _remember(config, params, text, negative, given, frames, mesh, cache=None) -> kv_cache.KVCache:
    """Keys and values of given scenes.

    They are of both halves of guidance, or of the positive one if it serves both.
    """
    halves = [negative, text][-num_caches(config, mesh, len(text)) :]
    latents = jnp.concatenate([given] * len(halves))
    _, remembered = dit.DiT(config.model).apply(
        {'params': params},
        latents,
        jnp.concatenate(halves),
        jnp.full(latents.shape[:2], config.sample.given_timestep),
        frames=frames,
        cache=cache,
        remembers=True,
    )
    return remembered


@functools.cache
def _jit_carry(config: config_lib.Config, frames: tuple[int, ...], mesh: jax.sharding.Mesh):
    """The jitted pass that remembers the last scenes of `frames`; the others are in its cache."""

    def run(params, text, null_text, given, cache):
        negative = text
        if not config.sample.captions_of_given:
            negative = jnp.broadcast_to(null_text, text.shape)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return _remember(config, params, text, negative, given, frames, mesh, cache)

    return jax.jit(run)


def story_noise(seed: int, index: int, shape: tuple[int, ...]):
    """Initial noise of one story, float32; a function of seed and index alone, whatever the
    batch."""
    return jax.random.normal(_key(seed, _STORY_STREAM, index), shape, jnp.float32)


def scene_noise(seed: int, index: int, scene: int, shape: tuple[int, ...]):
    """Initial noise of one scene that is generated after others of its story, float32."""
    return jax.random.normal(_key(seed, _SCENE_STREAM, index, scene), shape, jnp.float32)


def given_noise(seed: int, index: int, scene: int, shape: tuple[int, ...]):
    """Noise of what is given when this scene is generated, float32."""
    return jax.random.normal(_key(seed, _GIVEN_STREAM, index, scene), shape, jnp.float32)


def _key(seed: int, *numbers: int):
    key = jax.random.key(seed)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


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
    scene: int | None = None,
    cache: kv_cache.KVCache | None = None,
) -> np.ndarray:
    """Denoises stories, on the mesh that `params` lie on.

    Args:
      config, params, seed, first_index, sampler, steps, guidance, batch_size: as in `generate`.
      inputs: of `encode_inputs`, for the stories that this process needs (mesh.local_rows).
      listener: called after every denoising step.
      scene: where the last scene of the inputs is the only new one, its number in the story: it
        then has the noise of `scene_noise`, not a part of that of the whole story.
      cache: of the given scenes; None where it is made of them.

    Returns:
      Latents float32 [B, T, h, w, C] of these stories; given scenes come back as they are.

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
    noise = []
    for row in rows:
        index = first_index + row
        if scene is None:
            noise.append(story_noise(seed, index, given.shape[1:]))
            continue
        new = np.zeros(given.shape[1:], np.float32)
        frames = whole.frames[-1]
        new[-frames:] = scene_noise(seed, index, scene, (frames, *new.shape[1:]))
        noise.append(new)
    stories = {
        'noise': np.stack(noise),
        'text': inputs.text,
        'given': _with_noise(config, given, seed, [first_index + row for row in rows], scene or 0),
        'given_scenes': inputs.given_scenes,
    }
    stories = mesh_lib.global_batch(stories, mesh, batch_size)

    timesteps, table = samplers.sampler_table(
        sampler or config.sample.sampler, config.schedule, steps or config.sample.steps
    )
    turns = _turns(inputs.given_scenes, num_scenes)
    scene_steps = samplers.staircase(timesteps, table, lag(config, len(timesteps)) * turns)
    scale = np.broadcast_to(np.asarray(guidance, np.float32), num_scenes)
    run = jit_sample(
        config,
        whole.frames,
        mesh,
        reports_steps=listener is not None,
        remembered=num_remembered(config, inputs.given_scenes),
        carried=cache is not None,
    )
    arguments = (
        params,
        stories['noise'],
        stories['text'],
        inputs.null_text,
        stories['given'],
        stories['given_scenes'],
        *scene_steps,
        scale,
        *((cache,) if cache else ()),
    )
    if listener is None:
        latents = mesh_lib.local_batch(run(*arguments))
    else:
        with _listening(listener) as number:
            latents = mesh_lib.local_batch(run(*arguments, number))
    is_given = np.repeat(inputs.given_scenes, inputs.latent_frames, axis=1)  # [B, T]
    return np.where(is_given[..., None, None, None], inputs.given, latents[:, whole.kept])


def lag(config: config_lib.Config, steps: int) -> int:
    """How many of so many steps a scene begins after the one before it: see config.SampleConfig."""
    if config.sample.lag is not None:
        return config.sample.lag
    # Such a model has never seen a noisy scene before the one that it denoises.
    return steps if config.train.objective == 'teacher_forcing' else 0


def _turns(given_scenes: np.ndarray, num_scenes: int) -> np.ndarray:
    """The turn of every scene, int [S], among those after the scenes that every story has given."""
    leading = np.cumprod(given_scenes.all(0)).sum()
    return np.maximum(np.arange(num_scenes) - leading, 0)


def num_caches(config: config_lib.Config, mesh: jax.sharding.Mesh, num_stories: int) -> int:
    """1 if the halves of guidance share a cache, else 2.

    They do if given scenes have their captions in both, and if so many stories spread over the
    batch axes, which two halves always must.
    """
    fills = num_stories % mesh_lib.batch_devices(mesh) == 0
    return 1 if config.sample.captions_of_given and fills else 2


def num_remembered(config: config_lib.Config, given_scenes: np.ndarray) -> int:
    """How many leading scenes a cache can hold.

    Args:
      config: of the model, which must let no scene see or shift another one before it.
      given_scenes: bool [B, S], of which those count that every story has.
    """
    if dit.cache_conflict(config.model):
        return 0
    leading = np.cumprod(given_scenes, axis=1).sum(1)  # [B]
    return int(min(leading.min(), given_scenes.shape[1] - 1))


def _with_noise(
    config: config_lib.Config, given: np.ndarray, seed: int, indices: Sequence[int], scene: int
) -> np.ndarray:
    """What is given [B, T, h, w, C], at the timestep config.sample.given_timestep."""
    if not config.sample.given_timestep:
        return given
    noise = [given_noise(seed, index, scene, given.shape[1:]) for index in indices]
    timesteps = np.full(len(given), config.sample.given_timestep)
    noisy = schedule_lib.add_noise(config.schedule, given, np.stack(noise), timesteps)
    return np.asarray(noisy, np.float32)


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


class Block(NamedTuple):
    """Scenes of a story that are generated together.

    Attributes:
      given: earlier scenes that they are conditioned on, in story order.
      start: the first scene of the block.
      stop: one past its last scene.
    """

    given: tuple[int, ...]
    start: int
    stop: int

    @property
    def scenes(self) -> tuple[int, ...]:
        """All scenes that the transformer sees."""
        return (*self.given, *range(self.start, self.stop))


def plan_blocks(
    num_scenes: int, num_given: int, *, joint: int, window: int, sinks: int
) -> list[Block]:
    """Plans how a story is told.

    The first block is generated jointly, after which every scene is a block of its own,
    conditioned on the scenes right before it and on the first ones of the story.

    Args:
      num_scenes: S, scenes of the story.
      num_given: leading scenes that are there already, fewer than S.
      joint: scenes of the first block, those that are given included.
      window: how many scenes right before a new one are given.
      sinks: how many scenes at the beginning of the story are given on top.

    Returns:
      The blocks, in order; together they are all scenes. If more scenes are given than the first
      block holds, they are a block without anything new.
    """
    first = min(joint, num_scenes)
    if num_given >= first:
        first = num_given
    blocks = [Block((), 0, first)]
    for scene in range(first, num_scenes):
        near = set(range(max(0, scene - window), scene))
        far = set(range(min(sinks, scene)))
        blocks.append(Block(tuple(sorted(near | far)), scene, scene + 1))
    return blocks


class Carried(NamedTuple):
    """What is carried from scene to scene: keys and values, as they were when each was made.

    Attributes:
      scenes: numbers of the scenes.
      caches: of each.
    """

    scenes: tuple[int, ...] = ()
    caches: tuple[kv_cache.KVCache, ...] = ()

    def of(self, scenes: Sequence[int]) -> kv_cache.KVCache | None:
        """The cache of some of the scenes, one after another; None for that of none."""
        if not scenes:
            return None
        caches = [self.caches[self.scenes.index(scene)] for scene in scenes]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *caches)


NOTHING = Carried()


def carry(
    config: config_lib.Config,
    params,
    inputs: Inputs,
    block: Block,
    scenes: Sequence[np.ndarray],
    carried: Carried,
) -> Carried:
    """Adds the scenes of a block that is told, as they see the scenes given to it.

    These see those that were given to them, and so on: what is carried knows of scenes that are
    not in the window any more. Of what was there before, the scenes given to the block stay.

    Args:
      config, params, inputs, block: as in `tell`; unless config.sample.context is 'carried',
        nothing is.
      scenes: latents [B, T, h, w, C] of each scene of the block.
      carried: of the blocks before.
    """
    if config.sample.context != 'carried':
        return carried
    mesh = mesh_lib.mesh_of(params)
    given, own = list(block.given), list(range(block.start, block.stop))
    frames = [
        config.model.whole_patches(tuple(inputs.latent_frames[scene] for scene in part))
        for part in (given, own)
    ]
    stories = {
        'text': inputs.text[:, own],
        'given': np.concatenate(scenes, axis=1)[:, frames[1].source],
    }
    stories = mesh_lib.global_batch(stories, mesh, len(inputs.text))
    cache = _jit_carry(config, frames[0].frames + frames[1].frames, mesh)(
        params, stories['text'], inputs.null_text, stories['given'], carried.of(given)
    )
    layout = config.model.layout(frames[1].frames, *inputs.given.shape[2:4])
    ends = np.cumsum([part.length for part in layout.segments if part.kind == VIDEO])
    parts = [
        kv_cache.KVCache(*(x[:, :, start:stop] for x in cache))
        for start, stop in itertools.pairwise([0, *ends.tolist()])
    ]
    kept = [carried.caches[carried.scenes.index(scene)] for scene in given]
    return Carried((*given, *own), (*kept, *parts))


def tell(
    config: config_lib.Config,
    params,
    inputs: Inputs,
    block: Block,
    told: Sequence[np.ndarray],
    carried: Carried = NOTHING,
    **settings,
) -> list[np.ndarray]:
    """Generates the scenes of one block for a batch of stories.

    Args:
      config, params: as in `generate`.
      inputs: of `encode_inputs`, for the whole stories, of which some leading scenes may be given.
      block: of `plan_blocks`.
      told: latents [B, T, h, w, C] of each scene before the block.
      carried: of `carry`, of the blocks before.
      **settings: the other arguments of `sample_latents`; guidance is one number, or one per scene
        of the story.

    Returns:
      Latents [B, T, h, w, C] of each scene of the block.
    """
    frames = inputs.latent_frames
    borders = np.cumsum((0, *frames))
    seen = list(block.scenes)
    latents = []
    for scene in seen:
        is_told = scene < block.start
        own = inputs.given[:, borders[scene] : borders[scene + 1]]
        latents.append(told[scene] if is_told else own)
    given_scenes = inputs.given_scenes[:, seen].copy()
    given_scenes[:, : len(block.given)] = True
    if given_scenes.all():
        return latents[len(block.given) :]

    guidance = settings.pop('guidance', None)
    out = sample_latents(
        config,
        params,
        Inputs(
            latent_frames=tuple(frames[scene] for scene in seen),
            text=inputs.text[:, seen],
            null_text=inputs.null_text,
            given=np.concatenate(latents, axis=1),
            given_scenes=given_scenes,
        ),
        guidance=np.asarray(guidance)[seen] if np.size(guidance) > 1 else guidance,
        scene=block.start if block.start else None,
        cache=carried.of(block.given) if carried.scenes else None,
        **settings,
    )
    scenes = np.split(out, np.cumsum([frames[scene] for scene in seen])[:-1], axis=1)
    return scenes[len(block.given) :]
