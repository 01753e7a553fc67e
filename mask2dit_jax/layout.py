"""Scenes: which token belongs to which scene, who may attend to whom, and where each token stands.

Everything that depends on the scenes of a story is a function of one `SceneLayout`; nothing else in the package
infers scenes from shapes. The joint sequence is [all text tokens, all video tokens], both in story order
(Mask²DiT, section 3.2, symmetric binary attention mask).
"""
import dataclasses
import itertools

import numpy as np

PATTERNS = ('dual', 'full', 'isolated', 'causal')


@dataclasses.dataclass(frozen=True)
class SceneLayout:
    """Static description of one multi-scene story in token space.

    Attributes:
      frames: latent frames per scene; scenes may differ in length.
      height: rows of the token grid (latent height / patch size).
      width: columns of the token grid.
      text_tokens: text tokens per scene, padding included.
      patch_t: latent frames per token (1, or 2 for CogVideoX 1.5); a scene is padded at its end to a multiple.
    """
    frames: tuple[int, ...]
    height: int
    width: int
    text_tokens: int
    patch_t: int = 1

    def __post_init__(self):
        if not self.frames or min(self.frames) < 1:
            raise ValueError(f'SceneLayout needs at least one scene of at least one latent frame, got {self.frames}.')
        if min(self.height, self.width, self.text_tokens, self.patch_t) < 1:
            raise ValueError(f'SceneLayout needs a positive grid, text length and temporal patch, got {self}.')

    @property
    def num_scenes(self) -> int:
        return len(self.frames)

    @property
    def total_frames(self) -> int:
        return sum(self.frames)

    @property
    def token_frames(self) -> tuple[int, ...]:
        """Frames per scene as the transformer counts them, after temporal patching."""
        return tuple(-(-f // self.patch_t) for f in self.frames)

    @property
    def num_text(self) -> int:
        return self.num_scenes * self.text_tokens

    @property
    def num_video(self) -> int:
        return sum(self.token_frames) * self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.num_text + self.num_video

    def text_range(self, scene: int) -> tuple[int, int]:
        """First and one-past-last token of a scene's caption in the joint sequence."""
        return scene * self.text_tokens, (scene + 1) * self.text_tokens

    def video_range(self, scene: int) -> tuple[int, int]:
        """First and one-past-last token of a scene's video in the joint sequence."""
        ends = self.num_text + np.cumsum((0, *self.token_frames)) * self.height * self.width
        return int(ends[scene]), int(ends[scene + 1])


def token_scenes(layout: SceneLayout) -> tuple[np.ndarray, np.ndarray]:
    """Scene index (int32 [L]) and is-text flag (bool [L]) of every token of the joint sequence."""
    scenes = np.arange(layout.num_scenes, dtype=np.int32)
    text = np.repeat(scenes, layout.text_tokens)
    video = np.repeat(scenes, np.array(layout.token_frames) * layout.height * layout.width)
    return np.concatenate([text, video]), np.arange(layout.num_tokens) < layout.num_text


def frame_scenes(layout: SceneLayout) -> np.ndarray:
    """Scene index of every latent frame, int32 [T]."""
    return np.repeat(np.arange(layout.num_scenes, dtype=np.int32), layout.frames)


def loss_mask(layout: SceneLayout, given):
    """Which latent frames the loss counts: those of scenes that are not given.

    Args:
      layout: the story's layout.
      given: bool [..., S], true where a scene is given (clean, at timestep 0).

    Returns:
      bool [..., T].
    """
    return ~given[..., frame_scenes(layout)]


def visible(pattern: str, q_scene, q_is_text, k_scene, k_is_text):
    """The attention predicate: may this query see this key?

    `dual` is the paper's mask (same scene, or both video), `full` none at all, `isolated` same scene only, and
    `causal` is `dual` except that video sees no video of later scenes. Only comparisons and boolean operators are
    used, so that numpy, jax and kernels' computable masks can evaluate it. Arguments broadcast.

    Raises:
      ValueError: for an unknown pattern.
    """
    same = q_scene == k_scene
    if pattern == 'isolated':
        return same
    if pattern == 'full':
        return same | (q_scene != k_scene)
    both_video = (q_is_text < 1) & (k_is_text < 1)
    if pattern == 'dual':
        return same | both_video
    if pattern == 'causal':
        return same | (both_video & (k_scene <= q_scene))
    raise ValueError(f'Unknown attention pattern {pattern!r}: use one of {", ".join(PATTERNS)}.')


def dense_mask(layout: SceneLayout, pattern: str) -> np.ndarray:
    """The whole mask, bool [L, L], true where query i may see key j. Quadratic: for tests, pictures, tiny models."""
    scene, is_text = token_scenes(layout)
    return visible(pattern, scene[:, None], is_text[:, None], scene[None], is_text[None])


def key_ranges(layout: SceneLayout, pattern: str, scene: int, is_text: bool) -> list[tuple[int, int]]:
    """Contiguous token ranges that the queries of one segment may see, read off the predicate.

    A segment is the caption or the video of one scene; the predicate depends on nothing finer.

    Returns:
      At most a few disjoint (start, stop) ranges in ascending order.
    """
    segments = [(s, True, layout.text_range(s)) for s in range(layout.num_scenes)]
    segments += [(s, False, layout.video_range(s)) for s in range(layout.num_scenes)]
    ranges: list[tuple[int, int]] = []
    for k_scene, k_is_text, (start, stop) in segments:
        if not visible(pattern, scene, is_text, k_scene, k_is_text):
            continue
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return ranges


# Positions -----------------------------------------------------------------------------------------------------


def fit_grid(grid: tuple[int, int], base: tuple[int, int]) -> tuple[int, int, int, int]:
    """Fits a token grid into the trained one, keeping its aspect ratio (CogVideoX 1.0 rotary crop).

    Returns:
      (top, left, height, width) of the crop in units of the base grid; Python's round-half-to-even throughout.
    """
    (gh, gw), (bh, bw) = grid, base
    rh, rw = (bh, round(bh / gh * gw)) if gh / gw > bh / bw else (round(bw / gw * gh), bw)
    return round((bh - rh) / 2), round((bw - rw) / 2), rh, rw


def rope_table(layout: SceneLayout, head_dim: int, rule: str, base: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of 3D rotary positions on one timeline that runs straight through all scenes.

    Args:
      layout: the story's layout.
      head_dim: D; a quarter turns with time, three eighths each with row and column.
      rule: 'linspace' (CogVideoX 1.0: any resolution is squeezed into the base grid) or 'slice' (1.5: integers).
      base: rows and columns of the trained token grid.

    Returns:
      cos and sin, float32 [num_video, D], each value repeated for the two members of its pair.

    Raises:
      ValueError: if head_dim does not split, the rule is unknown, or a 'slice' grid exceeds the base grid.
    """
    if head_dim % 16:
        raise ValueError(f'Rotary positions need head_dim to be a multiple of 16, got {head_dim}.')
    gh, gw = layout.height, layout.width
    if rule == 'linspace':
        top, left, rh, rw = fit_grid((gh, gw), base)
        rows, cols = top + np.arange(gh) * rh / gh, left + np.arange(gw) * rw / gw
    elif rule == 'slice':
        if gh > base[0] or gw > base[1]:
            raise ValueError(f'Token grid {gh}x{gw} exceeds the trained {base[0]}x{base[1]}, past which "slice" '
                             'rotary positions do not go: generate at a smaller size.')
        rows, cols = np.arange(gh, dtype=np.float64), np.arange(gw, dtype=np.float64)
    else:
        raise ValueError(f'Unknown rotary rule {rule!r}: use "linspace" or "slice".')
    times = np.arange(sum(layout.token_frames), dtype=np.float64)
    widths = head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3
    grid = np.meshgrid(times, rows, cols, indexing='ij')
    angles = [np.repeat(p.reshape(-1, 1) * 10000.0 ** (-np.arange(0, m, 2) / m), 2, axis=1)
              for p, m in zip(grid, widths)]
    angles = np.concatenate(angles, axis=1)  # [num_video, D]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _sincos(positions: np.ndarray, width: int) -> np.ndarray:
    """[sin | cos] features, float64 [n, width]."""
    omega = 10000.0 ** (-np.arange(width // 2) / (width / 2))
    angles = positions.reshape(-1, 1) * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_grid(times, rows, cols, width: int, time_scale: float = 1.0, space_scale: float = 1.875) -> np.ndarray:
    """Sin-cos embedding of a (time, row, column) grid, float64 [T*H*W, width], ordered [time | column | row]."""
    if width % 16:
        raise ValueError(f'Sin-cos positions need a width that is a multiple of 16, got {width}.')
    t, r, c = np.meshgrid(np.asarray(times) / time_scale, np.asarray(rows) / space_scale,
                          np.asarray(cols) / space_scale, indexing='ij')
    return np.concatenate([_sincos(t, width // 4), _sincos(c, width // 8 * 3), _sincos(r, width // 8 * 3)], axis=1)


def _half_pixel(size: int, base: int) -> np.ndarray:
    """Coordinates of `size` samples on a line of `base` points: half-pixel centres, clamped at the ends."""
    return np.clip((np.arange(size) + 0.5) * base / size - 0.5, 0, base - 1)


def _linear_weights(size: int, base: int) -> np.ndarray:
    """Matrix [size, base] of linear interpolation from `base` to `size` points (align_corners false)."""
    x = _half_pixel(size, base)
    low = np.floor(x).astype(int)
    weights = np.zeros((size, base))
    weights[np.arange(size), low] = 1 - (x - low)
    weights[np.arange(size), np.minimum(low + 1, base - 1)] += x - low
    return weights


def resample_positions(layout: SceneLayout, base: tuple[int, int, int], scenes_share: bool) -> list[np.ndarray]:
    """Interpolation matrices from a trained position table to a layout.

    Args:
      layout: the story's layout.
      base: (T0, H0, W0), the trained grid.
      scenes_share: False for the reference's rule (one clip's table stretched over T0*S frames and cut), True to
        start the table anew in every scene, resampled to that scene's length.

    Returns:
      float64 matrices for text [S*M, M], time [token frames, T0], rows [h, H0] and columns [w, W0].

    Raises:
      ValueError: if the reference's rule is asked for more frames than its T0*S.
    """
    t0, h0, w0 = base
    s, m, frames = layout.num_scenes, layout.text_tokens, layout.token_frames
    rows, cols = _linear_weights(layout.height, h0), _linear_weights(layout.width, w0)
    if scenes_share:
        return [np.tile(np.eye(m), (s, 1)), np.concatenate([_linear_weights(f, t0) for f in frames]), rows, cols]
    if sum(frames) > t0 * s:
        raise ValueError(f'The reference timeline holds {t0} latent frames per scene ({t0 * s} in all), got '
                         f'{sum(frames)}: shorten the scenes or use position_rule="continuous".')
    return [_linear_weights(s * m, m), _linear_weights(t0 * s, t0)[:sum(frames)], rows, cols]


def sincos_positions(layout: SceneLayout, width: int, base: tuple[int, int, int], rule: str,
                     time_scale: float = 1.0, space_scale: float = 1.875) -> np.ndarray:
    """Sin-cos positions of the joint sequence (zeros for text), float32 [L, width].

    'reference' resamples the trained clip's table to T0*S frames and cuts it, as the released code does;
    'continuous' counts frames straight through all scenes of whatever length, and equals it for one clip of T0
    frames on the base grid.
    """
    t0, h0, w0 = base
    if rule == 'continuous':
        video = sincos_grid(np.arange(sum(layout.token_frames)), _half_pixel(layout.height, h0),
                            _half_pixel(layout.width, w0), width, time_scale, space_scale)
    else:
        table = sincos_grid(np.arange(t0), np.arange(h0), np.arange(w0), width, time_scale, space_scale)
        _, time, rows, cols = resample_positions(layout, base, scenes_share=False)
        table = table.astype(np.float32).reshape(t0, h0, w0, width)
        video = np.einsum('at,bh,cw,thwd->abcd', time, rows, cols, table, optimize=True).reshape(-1, width)
    return np.concatenate([np.zeros((layout.num_text, width)), video]).astype(np.float32)


def segment_pairs(layout: SceneLayout, pattern: str) -> int:
    """Number of (query, key) pairs that the pattern lets see each other."""
    segments = list(itertools.product(range(layout.num_scenes), (True, False)))
    size = {(s, text): np.diff(layout.text_range(s) if text else layout.video_range(s)).item() for s, text in segments}
    return sum(size[q] * size[k] for q in segments for k in segments if visible(pattern, *q, *k))
