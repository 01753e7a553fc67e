"""Captions (and given scenes) to videos: the functions behind training's sheets, the scores and `sample`."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax import config as config_lib
from mask2dit_jax import data, samplers
from mask2dit_jax.models import dit


@functools.cache
def _sampling_fn(config: config_lib.Config, frames: tuple[int, ...]):
    """Jitted sampling loop for these latent frames per scene; one compilation per batch size and step count."""
    model = dit.DiT(config.model)

    def run(params, noise, text, null_text, given, given_scenes, timesteps, table, guidance):
        layout = config.model.layout(frames, *noise.shape[2:4])
        both = jnp.concatenate([jnp.broadcast_to(null_text, text.shape), text])

        def velocity(x, t):
            return model.apply({'params': params}, x, both, t, frames=frames)

        return samplers.sample(velocity, noise, layout, timesteps, table, guidance, given, given_scenes)

    return jax.jit(run)


def story_noise(seed: int, index: int, shape: tuple[int, ...]):
    """Initial noise of one story, float32; a function of seed and index alone, whatever the batch."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), index)
    return jax.random.normal(key, shape, jnp.float32)


def generate(config: config_lib.Config, params, coders: data.Coders, captions, frames: tuple[int, ...], *, seed: int,
             first_index: int = 0, given_videos=None, sampler: str | None = None, steps: int | None = None,
             guidance=None) -> np.ndarray:
    """Generates a batch of stories of one layout.

    Args:
      config: the model's configuration, which also holds the default sampler settings.
      params: parameters.
      coders: text and video coders.
      captions: per story a list of S strings, those of given scenes included.
      frames: pixel frames per scene.
      seed: story i gets the noise of (seed, first_index + i).
      first_index: see above.
      given_videos: None, or pixels [B, F', H, W, 3] of the leading scenes, which are given.
      sampler, steps, guidance: overrides of config.sample; guidance may be one number per scene.

    Returns:
      Pixels float32 in [0, 1], [B, F, H, W, 3]; given scenes come back as their codec sees them.

    Raises:
      ValueError: if captions, frames and given scenes do not fit each other.
    """
    num_scenes = len(frames)
    if any(len(c) != num_scenes for c in captions):
        raise ValueError(f'Every story needs one caption for each of its {num_scenes} scenes, got {captions[0]}.')
    guidance = config.sample.guidance if guidance is None else guidance
    if np.size(guidance) not in (1, num_scenes):
        raise ValueError(f'Guidance must be one number or one per scene ({num_scenes}), got {guidance}.')
    latent_frames = coders.latent_frames(frames)
    shape = sum(latent_frames), *coders.latent_shape
    noise = jnp.stack([story_noise(seed, first_index + i, shape) for i in range(len(captions))])
    text = np.stack([coders.encode_text(c) for c in captions])
    given, given_scenes = np.zeros(noise.shape, np.float32), np.zeros((len(captions), num_scenes), bool)
    if given_videos is not None:
        count = _given_count(frames, given_videos.shape[1])
        latents = coders.encode_video(given_videos)
        given[:, :latents.shape[1]] = latents
        given_scenes[:, :count] = True
    timesteps, table = samplers.sampler_table(sampler or config.sample.sampler, config.schedule,
                                              steps or config.sample.steps)
    scale = np.broadcast_to(np.asarray(guidance, np.float32), num_scenes)
    latents = _sampling_fn(config, latent_frames)(params, noise, text, coders.encode_text([''])[0], given,
                                                  given_scenes, timesteps, table, scale)
    return coders.decode_video(np.asarray(latents))


def _given_count(frames: tuple[int, ...], given_frames: int) -> int:
    """How many leading scenes these frames fill."""
    ends = list(np.cumsum(frames))
    if given_frames not in ends[:-1]:
        raise ValueError(f'Given clips have {given_frames} frames in all, which fills no number of leading scenes of '
                         f'{frames} and leaves one to generate.')
    return ends.index(given_frames) + 1


def split_scenes(video, frames: tuple[int, ...]) -> list[np.ndarray]:
    """[F, H, W, 3] into its scenes."""
    return np.split(video, np.cumsum(frames)[:-1])
