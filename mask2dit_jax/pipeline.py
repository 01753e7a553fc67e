"""Captions (and given scenes) to videos: the functions behind training's sheets, the scores and
`sample`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax import config as config_lib
from mask2dit_jax.data import latent_codec
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.models import dit
from mask2dit_jax.pretrained import names


@functools.cache
def jit_sample(config: config_lib.Config, frames: tuple[int, ...], mesh: jax.sharding.Mesh):
    """Jitted sampling loop for these latent frames per scene; one compilation per batch size and
    step count.

    The two halves of classifier-free guidance are rows of one batch, spread over the mesh's batch
    axes; tokens are spread over context. Everything but the parameters comes in whole on every
    device.
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
                velocity, noise, layout, timesteps, table, guidance, given, given_scenes
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
      given_videos: None, or pixels [B, F', H, W, 3] of the leading scenes, which are given.
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
) -> np.ndarray:
    """Denoises the stories of `inputs`; arguments as in `generate`. Returns latents float32 [B, T,
    h, w, C].

    The work is spread over the mesh that `params` lie on.
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
    run = jit_sample(config, inputs.latent_frames, mesh_lib.mesh_of(params))
    return np.asarray(
        run(
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
) -> np.ndarray:
    """Generates a batch of stories of one layout.

    Args:
      config: the model's configuration, which also holds the default sampler settings.
      params: parameters, on one device or spread over a mesh by sharding.shardings.
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
            f'Given clips have {given_frames} frames in all, which fills no number of leading scenes of '
            f'{frames} and leaves one to generate.'
        )
    return ends.index(given_frames) + 1
