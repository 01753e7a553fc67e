"""Where each token stands, and at which timestep.

Rotary and sin-cos positions, resampling of learned positions, and the timestep embedding.

Positions depend only on the layout. Their features are computed in float64 numpy for each axis of
the grid apart, and the program joins these small tables: as a constant of the program, a row for
every token would be 222 MB at 427k tokens.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax.layout import SceneLayout


class PositionWeights(NamedTuple):
    """Interpolation matrices from a trained position table to a layout, float64.

    Attributes:
      text: [S*M, M].
      time: [token frames, T0].
      rows: [H, H0].
      columns: [W, W0].
    """

    text: np.ndarray
    time: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


def fit_grid(grid: tuple[int, int], base: tuple[int, int]) -> tuple[int, int, int, int]:
    """Fits a token grid into the trained one, keeping its aspect ratio (CogVideoX 1.0 rotary crop).

    Args:
      grid: rows and columns of the token grid.
      base: rows and columns of the trained token grid.

    Returns:
      (top, left, height, width) of the crop in units of the base grid. Halves are rounded to even
      numbers, as the reference's Python does.
    """
    rows, columns = grid
    base_rows, base_columns = base

    if rows / columns > base_rows / base_columns:
        height = base_rows
        width = round(base_rows / rows * columns)
    else:
        height = round(base_columns / columns * rows)
        width = base_columns

    top = round((base_rows - height) / 2)
    left = round((base_columns - width) / 2)
    return top, left, height, width


def _join_axes(time: np.ndarray, rows: np.ndarray, columns: np.ndarray, order: str) -> jax.Array:
    """Features of every cell of a grid, from those of its axes; computed in the program.

    Args:
      time, rows, columns: features along each axis, [T, a], [H, b] and [W, c].
      order: of the features of a cell: 'thw' or 'twh'.

    Returns:
      float32 [T*H*W, a + b + c].
    """
    grid = (len(time), len(rows), len(columns))
    axes = {'t': time[:, None, None], 'h': rows[None, :, None], 'w': columns[None, None]}

    parts = []
    for axis in order:
        features = axes[axis].astype(np.float32)
        parts.append(jnp.broadcast_to(features, (*grid, features.shape[-1])))
    return jnp.concatenate(parts, axis=-1).reshape(math.prod(grid), -1)


def rope_table(
    layout: SceneLayout,
    head_dim: int,
    rule: str,
    base: tuple[int, int],
    scene_offset: float = 0.0,
    scene_phase: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """3D rotary positions on one timeline that runs through all scenes.

    Args:
      layout: the story's layout, without remembered scenes.
      head_dim: D; a quarter of it turns with time, three eighths each with row and column.
      rule: 'linspace' (CogVideoX 1.0: any resolution is squeezed into the base grid) or 'slice'
        (1.5: rows and columns are counted).
      base: rows and columns of the trained token grid.
      scene_offset: frames that the timeline jumps at every cut (EchoShot, MultiShotMaster).
      scene_phase: radians that every cut adds to all angles of time (ShotStream).

    Returns:
      Cosines and sines, float32 [num_video, D], each value repeated for the two members of its
      pair.

    Raises:
      ValueError: if head_dim is not a multiple of 16, the rule is unknown, or a 'slice' grid
        exceeds the base grid.
    """
    if head_dim % 16:
        raise ValueError(f'Rotary positions need head_dim to be a multiple of 16, got {head_dim}.')

    height = layout.height
    width = layout.width
    if rule == 'linspace':
        top, left, crop_height, crop_width = fit_grid((height, width), base)
        rows = top + np.arange(height) * crop_height / height
        columns = left + np.arange(width) * crop_width / width
    elif rule == 'slice':
        if height > base[0] or width > base[1]:
            raise ValueError(
                f'Token grid {height}x{width} exceeds the trained {base[0]}x{base[1]}, beyond '
                'which there are no "slice" rotary positions: generate at a smaller size.'
            )
        rows = np.arange(height, dtype=np.float64)
        columns = np.arange(width, dtype=np.float64)
    else:
        raise ValueError(f'Unknown rotary rule {rule!r}: use "linspace" or "slice".')

    # Each axis of the grid turns its own share of the head.
    scenes = np.repeat(np.arange(layout.num_scenes, dtype=np.float64), layout.token_frames)
    times = np.arange(sum(layout.token_frames), dtype=np.float64) + scene_offset * scenes
    shares = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)
    angles = []
    for positions, share in zip((times, rows, columns), shares):
        frequencies = 10000.0 ** (-np.arange(0, share, 2) / share)
        pair_angles = positions[:, None] * frequencies  # [n, share/2]
        angles.append(np.repeat(pair_angles, 2, axis=1))
    angles[0] += scene_phase * scenes[:, None]

    cos = _join_axes(*map(np.cos, angles), order='thw')
    sin = _join_axes(*map(np.sin, angles), order='thw')
    return cos, sin


def apply_rope(x, cos, sin):
    """Rotates adjacent pairs (2i, 2i + 1) of features, in float32.

    Args:
      x: [B, L, N, D].
      cos, sin: tables [L, D].

    Returns:
      [B, L, N, D] in x's dtype.
    """
    # (a, b) turns into (-b, a) by a product with a signed permutation, which is exact. An axis of
    # pairs would leave the TPU's lanes empty, and a roll there writes shifted copies in float32.
    size = x.shape[-1]
    even = np.arange(0, size, 2)
    turn = np.zeros((size, size), np.float32)
    turn[even + 1, even] = -1
    turn[even, even + 1] = 1
    turned = jnp.einsum('blnd,de->blne', x, turn.astype(x.dtype), precision='highest')

    rotated = x.astype(jnp.float32) * cos[:, None] + turned.astype(jnp.float32) * sin[:, None]
    return rotated.astype(x.dtype)


def _sincos(positions: np.ndarray, width: int) -> np.ndarray:
    """[sin | cos] features, float64 [n, width]."""
    frequencies = 10000.0 ** (-np.arange(width // 2) / (width / 2))
    angles = positions.reshape(-1, 1) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _half_pixel(size: int, base: int) -> np.ndarray:
    """Coordinates of `size` samples on a line of `base` points.

    Samples stand at half-pixel centres and are clamped at the ends.
    """
    return np.clip((np.arange(size) + 0.5) * base / size - 0.5, 0, base - 1)


def _linear_weights(size: int, base: int) -> np.ndarray:
    """Linear interpolation from `base` to `size` points (align_corners false), [size, base]."""
    coordinates = _half_pixel(size, base)
    low = np.floor(coordinates).astype(int)
    high = np.minimum(low + 1, base - 1)
    fraction = coordinates - low

    # At the last point low and high are the same, so the second share is added to the first.
    weights = np.zeros((size, base))
    samples = np.arange(size)
    weights[samples, low] = 1 - fraction
    weights[samples, high] += fraction
    return weights


def interpolate(weights: np.ndarray, table) -> jax.Array:
    """The product of interpolation weights and a table.

    A row of weights is zero but for one value or two neighbouring ones. These and their places are
    all that becomes a constant of the program.

    Args:
      weights: [n, m].
      table: float32 [m, E].

    Returns:
      float32 [n, E].
    """
    low = np.argmax(weights != 0, axis=1)
    high = np.minimum(low + 1, weights.shape[1] - 1)
    samples = np.arange(len(weights))
    at_low = weights[samples, low].astype(np.float32)
    at_high = np.where(high > low, weights[samples, high], 0).astype(np.float32)
    return at_low[:, None] * table[low] + at_high[:, None] * table[high]


def resample_positions(
    layout: SceneLayout, base: tuple[int, int, int], scenes_share: bool
) -> PositionWeights:
    """Interpolation matrices from a trained position table to a layout.

    Args:
      layout: the story's layout.
      base: (T0, H0, W0), the trained grid.
      scenes_share: False for the reference's rule (one clip's table is stretched over T0*S frames
        and cut), True to start the table anew in every scene, resampled to that scene's length.

    Returns:
      The matrices.

    Raises:
      ValueError: if the reference's rule is asked for more frames than its T0*S.
    """
    base_frames, base_rows, base_columns = base
    num_scenes = layout.num_scenes
    text_tokens = layout.text_tokens
    rows = _linear_weights(layout.height, base_rows)
    columns = _linear_weights(layout.width, base_columns)

    if scenes_share:
        text = np.tile(np.eye(text_tokens), (num_scenes, 1))
        scenes = [_linear_weights(frames, base_frames) for frames in layout.token_frames]
        return PositionWeights(text, np.concatenate(scenes), rows, columns)

    total_frames = sum(layout.token_frames)
    stretched_frames = base_frames * num_scenes
    if total_frames > stretched_frames:
        raise ValueError(
            f'The reference timeline holds {base_frames} latent frames per scene '
            f'({stretched_frames} in all), got {total_frames}: shorten the scenes or use '
            'position_rule="continuous".'
        )
    text = _linear_weights(num_scenes * text_tokens, text_tokens)
    time = _linear_weights(stretched_frames, base_frames)[:total_frames]
    return PositionWeights(text, time, rows, columns)


def sincos_positions(
    layout: SceneLayout,
    width: int,
    base: tuple[int, int, int],
    rule: str,
    time_scale: float = 1.0,
    space_scale: float = 1.875,
) -> jax.Array:
    """Sin-cos positions of the joint sequence; text gets zeros.

    Args:
      layout: the story's layout.
      width: E, a multiple of 16.
      base: (T0, H0, W0), the trained grid.
      rule: 'reference' resamples the trained clip's table to T0*S frames and cuts it, as the
        released code does. 'continuous' counts frames straight through scenes of any length. Both
        are the same for one clip of T0 frames on the base grid.
      time_scale, space_scale: divisors of the coordinates.

    Returns:
      float32 [L, width], features ordered [time | column | row].

    Raises:
      ValueError: if the width is not a multiple of 16.
    """
    if width % 16:
        raise ValueError(f'Sin-cos positions need a width that is a multiple of 16, got {width}.')

    base_frames, base_rows, base_columns = base
    time_width = width // 4
    space_width = width // 8 * 3

    if rule == 'continuous':
        times = np.arange(sum(layout.token_frames))
        rows = _half_pixel(layout.height, base_rows)
        columns = _half_pixel(layout.width, base_columns)
        tables = (
            _sincos(times / time_scale, time_width),
            _sincos(rows / space_scale, space_width),
            _sincos(columns / space_scale, space_width),
        )
    else:
        # The released buffer is rounded to float32 and then resampled. A feature varies along one
        # axis alone, so resampling the other two leaves it as it is.
        weights = resample_positions(layout, base, scenes_share=False)
        trained = (
            _sincos(np.arange(base_frames) / time_scale, time_width),
            _sincos(np.arange(base_rows) / space_scale, space_width),
            _sincos(np.arange(base_columns) / space_scale, space_width),
        )
        resampling = (weights.time, weights.rows, weights.columns)
        tables = [w @ table.astype(np.float32) for w, table in zip(resampling, trained)]

    video = _join_axes(*tables, order='twh')
    return jnp.pad(video, ((layout.num_text, 0), (0, 0)))


def timestep_embedding(t, width: int, flip_sin_to_cos: bool, freq_shift: int):
    """Sinusoids of the timestep.

    Args:
      t: timesteps [...].
      width: number of features, an even number.
      flip_sin_to_cos: puts cosines before sines.
      freq_shift: shortens the geometric series of frequencies, as in the released config.json.

    Returns:
      float32 [..., width].
    """
    half = width // 2
    frequencies = np.exp(-np.log(10000.0) * np.arange(half) / (half - freq_shift))
    frequencies = jnp.asarray(frequencies, jnp.float32)
    angles = jnp.asarray(t, jnp.float32)[..., None] * frequencies  # [..., width/2]

    if flip_sin_to_cos:
        parts = [jnp.cos(angles), jnp.sin(angles)]
    else:
        parts = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts, axis=-1)
