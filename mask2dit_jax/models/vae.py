"""The causal 3D VAE of CogVideoX, which codes a scene in chunks of frames.

Every causal convolution keeps the last two frames that it saw in the 'cache' collection, and the
next chunk starts from them; the first chunk of a scene finds that collection empty. Group norm
statistics are those of one chunk, so the chunk borders are part of the function: other borders give
other numbers. Scenes are coded independently of each other.

Latents have size h x w, pixels H x W = 8h x 8w.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_ENCODE_CHUNK = 8  # frames
_DECODE_CHUNK = 2  # latents
_TILE_OVERLAP = (1 / 6, 1 / 5)  # share of a tile's height and width
DECODE_RULES = ('reference', 'diffusers')
# The reference fixes it for the encoder's last norm and for every spatial norm, whatever norm_eps
# its config.json has.
_FIXED_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Architecture of the VAE; defaults are CogVideoX-5B's.

    Names are those of the released config.json.

    Attributes:
      norm_eps: added to the variance in the norms of the encoder's resnets, and in no other.
      sample_height, sample_width: trained size in pixels; tiles are half of it.
      scaling_factor: the transformer works on the posterior times this factor.
      dtype: compute dtype; group norm statistics are always float32.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 3
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    temporal_compression_ratio: int = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: float = 0.7
    dtype: str = 'float32'

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, along height and along width."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def temporal_levels(self) -> int:
        """Number of blocks that halve or double the number of frames."""
        return self.temporal_compression_ratio.bit_length() - 1


# Layers: convolutions and norms


class _Kernel(nn.Module):
    """Parameters of a 3x3x3 convolution.

    It is a module of its own, since the reference puts them into an inner layer with a name.
    """

    inputs: int
    features: int

    @nn.compact
    def __call__(self):
        shape = (3, 3, 3, self.inputs, self.features)
        kernel = self.param('kernel', nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32)
        return kernel, bias


class _CausalConv(nn.Module):
    """3x3x3 convolution over each frame and the two before it, also those of the previous chunk.

    It is a scan over frames that carries two of them, with one 2D convolution per tap in time. The
    norm and activation before it (`prepare`) run inside the scan and so need no array for the whole
    chunk, and XLA's CPU backend runs 2D convolutions three times as fast as the 3D one.
    """

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x, prepare=lambda frame: frame, *extras):
        """Convolves the prepared frames.

        Args:
          x: [B, T, H, W, C].
          prepare: function of one frame [B, H, W, C], and of one frame of each of the extras.
          *extras: arrays whose axis 1 is T, too.

        Returns:
          [B, T, H, W, features].
        """
        kernel, bias = _Kernel(x.shape[-1], self.features, name='conv')()
        kernel = kernel.astype(self.dtype)
        bias = bias.astype(self.dtype)
        frames = tuple(jnp.moveaxis(array, 1, 0) for array in (x, *extras))  # [T, B, ...] each

        # The two frames before this chunk; before a scene its first frame stands in for them.
        if self.has_variable('cache', 'frames'):
            past = self.get_variable('cache', 'frames')
        else:
            first = prepare(*(array[0] for array in frames))
            past = (first, first)

        conv = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(1, 1),
            padding=[(1, 1), (1, 1)],
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )

        def step(past, frame):
            seen = (*past, prepare(*frame))
            out = bias + sum(conv(seen_frame, tap) for seen_frame, tap in zip(seen, kernel))
            return seen[1:], out

        past, out = jax.lax.scan(step, past, frames)
        self.put_variable('cache', 'frames', past)
        return jnp.moveaxis(out, 0, 1)


class _PointConv(nn.Module):
    """1x1x1 convolution, under the name that the reference gives its inner layer."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        return nn.Conv(self.features, (1, 1, 1), dtype=self.dtype, name='conv')(x)


class _GroupNorm(nn.Module):
    """Group norm by the float32 statistics of the whole chunk [B, T, H, W, C].

    Returns the function that normalises one frame by them, for `_CausalConv`.
    """

    cfg: VAEConfig
    eps: float

    @nn.compact
    def __call__(self, x):
        groups = self.cfg.norm_num_groups
        channels = x.shape[-1]
        group_size = channels // groups
        scale = self.param('scale', nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, (channels,), jnp.float32)

        x = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, group_size)
        mean = jnp.mean(x, (1, 2, 3, 5), keepdims=True)
        var = jnp.mean(jnp.square(x - mean), (1, 2, 3, 5), keepdims=True)
        rate = jax.lax.rsqrt(var + self.eps)

        mean = _per_channel(mean, group_size)  # [B, 1, 1, C]
        rate = _per_channel(rate, group_size)

        def normalise(frame):
            normed = (frame.astype(jnp.float32) - mean) * (rate * scale) + bias
            return normed.astype(self.cfg.dtype)

        return normalise


def _per_channel(statistic, group_size: int):
    """Repeats a statistic [B, 1, 1, 1, groups, 1] for every channel, [B, 1, 1, C]."""
    groups = statistic.shape[4]
    return jnp.repeat(statistic.reshape(-1, 1, 1, groups), group_size, axis=-1)


def _frame_indices(frames: int, latents: int) -> np.ndarray:
    """Which latent each frame belongs to, int [frames].

    The first frame of an odd number has the first latent for itself.
    """
    alone = int(frames > 1 and frames % 2)
    rest = np.arange(frames - alone) * (latents - alone) // (frames - alone)
    return np.concatenate([np.zeros(alone, int), alone + rest])


def _widen(z, shape):
    """Nearest resampling of [B, h, w, C] to the height and width of `shape`."""
    rows = jnp.repeat(z, shape[1] // z.shape[1], axis=1)
    return jnp.repeat(rows, shape[2] // z.shape[2], axis=2)


class _SpatialNorm(nn.Module):
    """Group norm whose scale and shift at each place come from the latents at that place.

    Returns a function of one frame and of one frame of two extras, and those extras.
    """

    cfg: VAEConfig

    @nn.compact
    def __call__(self, x, z):
        normalise = _GroupNorm(self.cfg, _FIXED_NORM_EPS, name='norm_layer')(x)

        # A pointwise convolution commutes with nearest resampling, so it runs at the latents' size.
        features = x.shape[-1]
        latents = _frame_indices(x.shape[1], z.shape[1])
        scale = _PointConv(features, self.cfg.dtype, name='conv_y')(z)[
            :, latents
        ]  # [B, T, h, w, C]
        shift = _PointConv(features, self.cfg.dtype, name='conv_b')(z)[:, latents]

        def modulate(frame, scale, shift):
            return normalise(frame) * _widen(scale, frame.shape) + _widen(shift, frame.shape)

        return modulate, [scale, shift]


def _activation(cfg: VAEConfig, name: str, x, z):
    """What `_CausalConv` takes beside x: norm and silu of one frame, and the norm's extras.

    The norm is a spatial norm if there are latents z (decoder), and a group norm if not (encoder).
    """
    if z is None:
        eps = _FIXED_NORM_EPS if name == 'norm_out' else cfg.norm_eps
        norm = _GroupNorm(cfg, eps, name=name)(x)
        extras = []
    else:
        norm, extras = _SpatialNorm(cfg, name=name)(x, z)

    def activate(*frame):
        return nn.silu(norm(*frame))

    return activate, *extras


# Blocks: resnets and changes of size


class _Resnet(nn.Module):
    """Two causal convolutions and a shortcut around them."""

    cfg: VAEConfig
    features: int

    @nn.compact
    def __call__(self, x, z=None):
        cfg = self.cfg
        activation = _activation(cfg, 'norm1', x, z)
        h = _CausalConv(self.features, cfg.dtype, name='conv1')(x, *activation)
        activation = _activation(cfg, 'norm2', h, z)
        h = _CausalConv(self.features, cfg.dtype, name='conv2')(h, *activation)

        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1, 1), dtype=cfg.dtype, name='conv_shortcut')(x)
        return x + h


class _Downsample(nn.Module):
    """Halves height and width, and the frames if `time`."""

    cfg: VAEConfig
    time: bool

    @nn.compact
    def __call__(self, x):
        # Pairs of frames are averaged. The first of an odd number, which only a scene's first chunk
        # has, stays: it becomes the latent that stands for one frame.
        if self.time and x.shape[1] > 1:
            odd = x.shape[1] % 2
            first = x[:, :odd]
            pairs = x[:, odd:]
            x = jnp.concatenate([first, (pairs[:, ::2] + pairs[:, 1::2]) / 2], axis=1)

        # Frame by frame; padding is at the right and at the bottom only, as in the reference.
        batch, frames, height, width, channels = x.shape
        conv = nn.Conv(
            channels,
            (3, 3),
            strides=2,
            padding=((0, 1), (0, 1)),
            dtype=self.cfg.dtype,
            name='conv',
        )
        x = conv(x.reshape(batch * frames, height, width, channels))
        return x.reshape(batch, frames, *x.shape[1:])


class _Upsample(nn.Module):
    """Doubles height and width, and the frames if `time`; `first` is the first chunk of a scene."""

    cfg: VAEConfig
    time: bool
    first: bool

    @nn.compact
    def __call__(self, x):
        batch, frames, height, width, channels = x.shape
        x = x.reshape(batch * frames, height, width, channels)
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = nn.Conv(channels, (3, 3), padding=1, dtype=self.cfg.dtype, name='conv')(x)
        x = x.reshape(batch, frames, 2 * height, 2 * width, channels)
        if not self.time:
            return x

        # The convolution is per frame, so frames are repeated after it. In a first chunk the first
        # of an odd number of frames stays one, as the encoder kept it.
        keep = frames % 2 if self.first else 0
        return jnp.concatenate([x[:, :keep], jnp.repeat(x[:, keep:], 2, axis=1)], axis=1)


class _Stage(nn.Module):
    """Resnets of one width, then a change of size if there is one."""

    cfg: VAEConfig
    features: int
    resnets: int
    resize: Callable[[], nn.Module] | None = None

    @nn.compact
    def __call__(self, x, z=None):
        for i in range(self.resnets):
            x = _Resnet(self.cfg, self.features, name=f'resnets_{i}')(x, z)
        return x if self.resize is None else self.resize()(x)


# Networks of one chunk


class Encoder(nn.Module):
    """One chunk of pixels [B, F, H, W, 3] to moments [B, T, h, w, 2C], mean and log-variance."""

    cfg: VAEConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg
        widths = cfg.block_out_channels
        x = _CausalConv(widths[0], cfg.dtype, name='conv_in')(x.astype(cfg.dtype))

        # All stages but the last halve the size, the first ones also the number of frames.
        for i, features in enumerate(widths):
            halves_time = i < cfg.temporal_levels
            down = functools.partial(_Downsample, cfg, halves_time, name='downsamplers_0')
            stage = _Stage(
                cfg,
                features,
                resnets=cfg.layers_per_block,
                resize=down if i + 1 < len(widths) else None,
                name=f'down_blocks_{i}',
            )
            x = stage(x)
        x = _Stage(cfg, widths[-1], resnets=2, name='mid_block')(x)  # [B, T, h, w, widths[-1]]

        conv_out = _CausalConv(2 * cfg.latent_channels, cfg.dtype, name='conv_out')
        return conv_out(x, *_activation(cfg, 'norm_out', x, None))


class Decoder(nn.Module):
    """One chunk of latents [B, T, h, w, C] to pixels [B, F, H, W, 3].

    `first` says whether it is the first chunk of a scene.
    """

    cfg: VAEConfig

    @nn.compact
    def __call__(self, z, first: bool):
        cfg = self.cfg
        widths = cfg.block_out_channels[::-1]
        z = z.astype(cfg.dtype)
        x = _CausalConv(widths[0], cfg.dtype, name='conv_in')(z)
        x = _Stage(cfg, widths[0], resnets=2, name='mid_block')(x, z)

        # All stages but the last double the size, the first ones also the number of frames.
        for i, features in enumerate(widths):
            doubles_time = i < cfg.temporal_levels
            up = functools.partial(_Upsample, cfg, doubles_time, first, name='upsamplers_0')
            stage = _Stage(
                cfg,
                features,
                resnets=cfg.layers_per_block + 1,
                resize=up if i + 1 < len(widths) else None,
                name=f'up_blocks_{i}',
            )
            x = stage(x, z)

        conv_out = _CausalConv(cfg.out_channels, cfg.dtype, name='conv_out')
        return conv_out(x, *_activation(cfg, 'norm_out', x, z))


class VAE(nn.Module):
    """Encoder and decoder of one chunk; `encode` and `decode` below run whole scenes."""

    cfg: VAEConfig

    def setup(self):
        self.encoder = Encoder(self.cfg)
        self.decoder = Decoder(self.cfg)

    def __call__(self, x):
        """Runs both, which makes the parameters of both."""
        mean = self.encoder(x)[..., : self.cfg.latent_channels]
        return self.decoder(mean, True)

    def encode_chunk(self, x, first: bool):
        """Moments of one chunk; the encoder's graph does not depend on `first`."""
        del first
        return self.encoder(x)

    def decode_chunk(self, z, first: bool):
        """Pixels of one chunk."""
        return self.decoder(z, first)


# Whole scenes: chunks in time


def _apply_chunk(cfg: VAEConfig, method: str, params, cache, x, first: bool):
    """Output of one chunk, float32, and the cache for the next one."""
    variables = {'params': params, 'cache': cache}
    out, updated = VAE(cfg).apply(variables, x, first, method=method, mutable='cache')
    return out.astype(jnp.float32), updated['cache']


@functools.cache
def _run_chunk():
    """Jitted `_apply_chunk`; a function, since the backend is not known at import."""
    # The CPU's default order of operations starts all loops' outputs at once: 21 GB instead of 9 at
    # 480x720.
    if jax.default_backend() == 'cpu':
        options = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}
    else:
        options = None

    return jax.jit(
        _apply_chunk,
        static_argnames=('cfg', 'method', 'first'),
        donate_argnames='cache',
        compiler_options=options,
    )


def _run_scene(cfg: VAEConfig, method: str, params, x, borders) -> np.ndarray:
    """Runs all chunks of a scene or tile in turn; only one chunk is on the device at a time."""
    cache = {}
    chunks = []
    for start, stop in itertools.pairwise(borders):
        is_first = start == 0
        chunk, cache = _run_chunk()(cfg, method, params, cache, x[:, start:stop], is_first)
        chunks.append(np.asarray(chunk))
    return np.concatenate(chunks, axis=1)


def _front_loaded(total: int, size: int) -> list[int]:
    """Borders of chunks of `size`; the remainder is added to the first chunk."""
    rest = total % size if total >= size else 0
    return [0, *range(size + rest, total, size), total]


def encode_borders(frames: int) -> list[int]:
    """Where the chunks of a scene begin and end, in frames.

    Args:
      frames: F, the number of frames of the scene.

    Returns:
      Borders from 0 to F; those of 49 frames make chunks of 9, 8, 8, 8, 8 and 8.
    """
    # A scene of 4k + 1 frames has one latent for its first frame and one for every 4 frames after
    # it. The odd frame must be in the first chunk, which alone may have an odd number of frames.
    return _front_loaded(frames, _ENCODE_CHUNK)


def decode_borders(latents: int, rule: str) -> list[int]:
    """Where the chunks of a scene begin and end, in latents.

    Args:
      latents: T, the number of latents of the scene.
      rule: one of DECODE_RULES.

    Returns:
      Borders from 0 to T; those of 13 latents make chunks of 1, 2, 2, ... under 'reference' and of
      3, 2, 2, ... under 'diffusers'.
    """
    # As in the encoder: an odd number of latents leaves one over, which joins the first pair.
    if rule == 'diffusers':
        return _front_loaded(latents, _DECODE_CHUNK)

    # The first latent, which stands for one frame, is decoded alone, then pairs. An even number of
    # latents leaves one for the last chunk.
    return [0, *range(1, latents, _DECODE_CHUNK), latents]


def encode(cfg: VAEConfig, params, pixels, tiling: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Posterior of one scene, with the chunks of frames that Mask²DiT's code has.

    Args:
      cfg, params: the network.
      pixels: [B, F, H, W, 3] in -1...1, H and W multiples of cfg.spatial_factor.
      tiling: codes overlapping tiles of half the trained size and cross-fades them, which needs
        less memory and changes the results. The rule is exactly the reference's, sizes included:
        see check_tiling.

    Returns:
      Mean and log-variance, float32 numpy [B, T, h, w, C], neither scaled by cfg.scaling_factor. T
      is 1 + (F-1)/4 for the usual F = 4k + 1.

    Raises:
      ValueError: if the size is not a multiple of cfg.spatial_factor.
    """
    _check_size(cfg, pixels.shape)
    borders = encode_borders(pixels.shape[1])
    run = functools.partial(_run_scene, cfg, 'encode_chunk', params, borders=borders)

    factor = cfg.spatial_factor
    if tiling:
        moments = _tiled(run, pixels, _tile_size(cfg), lambda length: length // factor)
    else:
        moments = run(pixels)

    mean, logvar = np.split(moments, 2, axis=-1)
    return mean, np.clip(logvar, -30.0, 20.0)


def decode(
    cfg: VAEConfig, params, latents, tiling: bool = False, rule: str = 'reference'
) -> np.ndarray:
    """Pixels of one scene.

    Args:
      cfg, params: the network.
      latents: [B, T, h, w, C], already divided by cfg.scaling_factor.
      tiling: as in `encode`.
      rule: 'reference' decodes the first latent alone and then pairs, which gives 4(T-1)+1 frames;
        'diffusers' is the rule of the stock AutoencoderKLCogVideoX, which gives other pixels.

    Returns:
      float32 numpy [B, F, 8h, 8w, 3], about -1...1, not clipped.

    Raises:
      ValueError: if the rule is unknown.
    """
    if rule not in DECODE_RULES:
        raise ValueError(f'Decode rule {rule!r} is unknown: use one of {", ".join(DECODE_RULES)}.')
    borders = decode_borders(latents.shape[1], rule)
    run = functools.partial(_run_scene, cfg, 'decode_chunk', params, borders=borders)
    if not tiling:
        return run(latents)

    factor = cfg.spatial_factor
    height, width = _tile_size(cfg)
    tile = (height // factor, width // factor)
    return _tiled(run, latents, tile, lambda length: length * factor)


def _check_size(cfg: VAEConfig, shape) -> None:
    """Raises ValueError if frames of this shape [B, F, H, W, 3] are not made of whole latents."""
    if shape[2] % cfg.spatial_factor or shape[3] % cfg.spatial_factor:
        raise ValueError(
            f'The VAE cannot code frames of {shape[2]}x{shape[3]} pixels: height and width must be '
            f'multiples of {cfg.spatial_factor}.'
        )


# Tiles in space


def _tile_size(cfg: VAEConfig) -> tuple[int, int]:
    """Height and width of a tile in pixels."""
    return cfg.sample_height // 2, cfg.sample_width // 2


def check_tiling(cfg: VAEConfig) -> None:
    """Makes sure that tiles give frames of the right size.

    If the overlap of two tiles is not a whole number of latents, the reference's rule loses rows or
    columns.

    Args:
      cfg: the VAE, whose sample_height and sample_width set the tiles.

    Raises:
      ValueError: if an overlap is not a whole number of latents.
    """
    for name, tile, share in zip(('height', 'width'), _tile_size(cfg), _TILE_OVERLAP):
        latents = tile // cfg.spatial_factor
        step_in_latents = int(latents * (1 - share))
        kept_pixels = tile - int(tile * share)
        if step_in_latents * cfg.spatial_factor != kept_pixels:
            raise ValueError(
                f'The VAE cannot run in tiles: half of its sample_{name}, {tile} pixels, does not '
                f'overlap by {share:.3f} in whole latents.'
            )


def _tiled(run, x, tile, scale) -> np.ndarray:
    """Runs overlapping tiles and cross-fades them.

    Args:
      run: function of one tile [B, T, ., ., C].
      x: whole input.
      tile: height and width of an input tile.
      scale: function of a length of the input that gives the length of the output.
    """
    tile_height, tile_width = tile
    overlap_height, overlap_width = _TILE_OVERLAP

    # From one input tile to the next, and what of each output tile fades into the next.
    step_height = int(tile_height * (1 - overlap_height))
    step_width = int(tile_width * (1 - overlap_width))
    fade_height = int(scale(tile_height) * overlap_height)
    fade_width = int(scale(tile_width) * overlap_width)
    keep_height = scale(tile_height) - fade_height
    keep_width = scale(tile_width) - fade_width

    # A tile fades into the finished one above it first, then into the one to its left.
    above = []
    strips = []
    for top in range(0, x.shape[2], step_height):
        row = []
        for left in range(0, x.shape[3], step_width):
            y = run(x[:, :, top : top + tile_height, left : left + tile_width])
            if above:
                _cross_fade(above[len(row)], y, fade_height, axis=2)
            if row:
                _cross_fade(row[-1], y, fade_width, axis=3)
            row.append(y)
        kept = [y[:, :, :keep_height, :keep_width] for y in row]
        strips.append(np.concatenate(kept, axis=3))
        above = row
    return np.concatenate(strips, axis=2)


def _cross_fade(before, after, length: int, axis: int) -> None:
    """Fades the end of `before` linearly into the start of `after`, in place."""
    length = min(length, before.shape[axis], after.shape[axis])
    weight = np.arange(length, dtype=np.float32) / length
    weight = weight.reshape((length,) + (1,) * (after.ndim - axis - 1))

    earlier_axes = (slice(None),) * axis
    head = after[(*earlier_axes, slice(length))]
    tail = before[(*earlier_axes, slice(before.shape[axis] - length, None))]
    head[...] = tail * (1 - weight) + head * weight
