"""Where each token stands, and at which timestep: rotary and sin-cos positions, and the timestep
embedding."""

import jax.numpy as jnp
import numpy as np

from mask2dit_jax.layout import SceneLayout

# Positions -----------------------------------------------------------------------------------------------------


def fit_grid(grid: tuple[int, int], base: tuple[int, int]) -> tuple[int, int, int, int]:
    """Fits a token grid into the trained one, keeping its aspect ratio (CogVideoX 1.0 rotary crop).

    Returns:
      (top, left, height, width) of the crop in units of the base grid; Python's round-half-to-even
      throughout.
    """
    (gh, gw), (bh, bw) = grid, base
    rh, rw = (bh, round(bh / gh * gw)) if gh / gw > bh / bw else (round(bw / gw * gh), bw)
    return round((bh - rh) / 2), round((bw - rw) / 2), rh, rw


def rope_table(
    layout: SceneLayout, head_dim: int, rule: str, base: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of 3D rotary positions on one timeline that runs straight through all
    scenes.

    Args:
      layout: the story's layout.
      head_dim: D; a quarter turns with time, three eighths each with row and column.
      rule: 'linspace' (CogVideoX 1.0: any resolution is squeezed into the base grid) or 'slice'
        (1.5: integers).
      base: rows and columns of the trained token grid.

    Returns:
      cos and sin, float32 [num_video, D], each value repeated for the two members of its pair.

    Raises:
      ValueError: if head_dim does not split, the rule is unknown, or a 'slice' grid exceeds the
        base grid.
    """
    if head_dim % 16:
        raise ValueError(f'Rotary positions need head_dim to be a multiple of 16, got {head_dim}.')
    gh, gw = layout.height, layout.width
    if rule == 'linspace':
        top, left, rh, rw = fit_grid((gh, gw), base)
        rows, cols = top + np.arange(gh) * rh / gh, left + np.arange(gw) * rw / gw
    elif rule == 'slice':
        if gh > base[0] or gw > base[1]:
            raise ValueError(
                f'Token grid {gh}x{gw} exceeds the trained {base[0]}x{base[1]}, past which "slice" '
                'rotary positions do not go: generate at a smaller size.'
            )
        rows, cols = np.arange(gh, dtype=np.float64), np.arange(gw, dtype=np.float64)
    else:
        raise ValueError(f'Unknown rotary rule {rule!r}: use "linspace" or "slice".')
    times = np.arange(sum(layout.token_frames), dtype=np.float64)
    widths = head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3
    grid = np.meshgrid(times, rows, cols, indexing='ij')
    angles = [
        np.repeat(p.reshape(-1, 1) * 10000.0 ** (-np.arange(0, m, 2) / m), 2, axis=1)
        for p, m in zip(grid, widths)
    ]
    angles = np.concatenate(angles, axis=1)  # [num_video, D]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _sincos(positions: np.ndarray, width: int) -> np.ndarray:
    """[sin | cos] features, float64 [n, width]."""
    omega = 10000.0 ** (-np.arange(width // 2) / (width / 2))
    angles = positions.reshape(-1, 1) * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_grid(
    times, rows, cols, width: int, time_scale: float = 1.0, space_scale: float = 1.875
) -> np.ndarray:
    """Sin-cos embedding of a (time, row, column) grid, float64 [T*H*W, width], ordered [time |
    column | row]."""
    if width % 16:
        raise ValueError(f'Sin-cos positions need a width that is a multiple of 16, got {width}.')
    t, r, c = np.meshgrid(
        np.asarray(times) / time_scale,
        np.asarray(rows) / space_scale,
        np.asarray(cols) / space_scale,
        indexing='ij',
    )
    return np.concatenate(
        [_sincos(t, width // 4), _sincos(c, width // 8 * 3), _sincos(r, width // 8 * 3)], axis=1
    )


def _half_pixel(size: int, base: int) -> np.ndarray:
    """Coordinates of `size` samples on a line of `base` points: half-pixel centres, clamped at the
    ends."""
    return np.clip((np.arange(size) + 0.5) * base / size - 0.5, 0, base - 1)


def _linear_weights(size: int, base: int) -> np.ndarray:
    """Matrix [size, base] of linear interpolation from `base` to `size` points (align_corners
    false)."""
    x = _half_pixel(size, base)
    low = np.floor(x).astype(int)
    weights = np.zeros((size, base))
    weights[np.arange(size), low] = 1 - (x - low)
    weights[np.arange(size), np.minimum(low + 1, base - 1)] += x - low
    return weights


def resample_positions(
    layout: SceneLayout, base: tuple[int, int, int], scenes_share: bool
) -> list[np.ndarray]:
    """Interpolation matrices from a trained position table to a layout.

    Args:
      layout: the story's layout.
      base: (T0, H0, W0), the trained grid.
      scenes_share: False for the reference's rule (one clip's table stretched over T0*S frames and
        cut), True to start the table anew in every scene, resampled to that scene's length.

    Returns:
      float64 matrices for text [S*M, M], time [token frames, T0], rows [h, H0] and columns [w, W0].

    Raises:
      ValueError: if the reference's rule is asked for more frames than its T0*S.
    """
    t0, h0, w0 = base
    s, m, frames = layout.num_scenes, layout.text_tokens, layout.token_frames
    rows, cols = _linear_weights(layout.height, h0), _linear_weights(layout.width, w0)
    if scenes_share:
        return [
            np.tile(np.eye(m), (s, 1)),
            np.concatenate([_linear_weights(f, t0) for f in frames]),
            rows,
            cols,
        ]
    if sum(frames) > t0 * s:
        raise ValueError(
            f'The reference timeline holds {t0} latent frames per scene ({t0 * s} in all), got '
            f'{sum(frames)}: shorten the scenes or use position_rule="continuous".'
        )
    return [_linear_weights(s * m, m), _linear_weights(t0 * s, t0)[: sum(frames)], rows, cols]


def sincos_positions(
    layout: SceneLayout,
    width: int,
    base: tuple[int, int, int],
    rule: str,
    time_scale: float = 1.0,
    space_scale: float = 1.875,
) -> np.ndarray:
    """Sin-cos positions of the joint sequence (zeros for text), float32 [L, width].

    'reference' resamples the trained clip's table to T0*S frames and cuts it, as the released code
    does; 'continuous' counts frames straight through all scenes of whatever length, and equals it
    for one clip of T0 frames on the base grid.
    """
    t0, h0, w0 = base
    if rule == 'continuous':
        video = sincos_grid(
            np.arange(sum(layout.token_frames)),
            _half_pixel(layout.height, h0),
            _half_pixel(layout.width, w0),
            width,
            time_scale,
            space_scale,
        )
    else:
        table = sincos_grid(
            np.arange(t0), np.arange(h0), np.arange(w0), width, time_scale, space_scale
        )
        _, time, rows, cols = resample_positions(layout, base, scenes_share=False)
        table = table.astype(np.float32).reshape(t0, h0, w0, width)
        video = np.einsum('at,bh,cw,thwd->abcd', time, rows, cols, table, optimize=True).reshape(
            -1, width
        )
    return np.concatenate([np.zeros((layout.num_text, width)), video]).astype(np.float32)


def timestep_embedding(t, width: int, flip_sin_to_cos: bool, freq_shift: int):
    """Sinusoids of the timestep, float32 [..., width]."""
    half = width // 2
    omega = jnp.asarray(
        np.exp(-np.log(10000.0) * np.arange(half) / (half - freq_shift)), jnp.float32
    )
    angles = jnp.asarray(t, jnp.float32)[..., None] * omega
    parts = (
        [jnp.cos(angles), jnp.sin(angles)]
        if flip_sin_to_cos
        else [jnp.sin(angles), jnp.cos(angles)]
    )
    return jnp.concatenate(parts, axis=-1)


def apply_rope(x, cos, sin):
    """Rotates adjacent pairs (2i, 2i + 1) of [B, L, N, D] by tables [L, D], in float32.

    Neighbours come from a product with a signed permutation, which is exact: an axis of pairs would
    leave the TPU's lanes empty, and a roll there writes shifted copies in float32.
    """
    even = np.arange(0, x.shape[-1], 2)
    turn = np.zeros((x.shape[-1],) * 2, np.float32)
    turn[even + 1, even], turn[even, even + 1] = -1, 1
    turned = jnp.einsum('blnd,de->blne', x, turn.astype(x.dtype), precision='highest')
    return (
        x.astype(jnp.float32) * cos[:, None] + turned.astype(jnp.float32) * sin[:, None]
    ).astype(x.dtype)
