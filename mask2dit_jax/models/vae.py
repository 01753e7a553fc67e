"""The causal 3D VAE of CogVideoX, frame batching included.

A scene is coded in chunks of frames. Every causal convolution keeps the last two frames that it saw
in the 'cache' collection; the first chunk of a scene finds that collection empty. Group norm
statistics are those of one chunk, so that the chunk borders are part of the function. Scenes know
nothing of each other.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_ENCODE_CHUNK, _DECODE_CHUNK = 8, 2  # frames of `encode`, latents of `decode`
_TILE_OVERLAP = 1 / 6, 1 / 5  # share of a tile's height and width
DECODE_RULES = ('reference', 'diffusers')


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Architecture; defaults are CogVideoX-5B's, names those of the released config.json.

    Attributes:
      sample_height, sample_width: trained size in pixels; tiles are half of it.
      scaling_factor: what the transformer sees is the posterior times this.
      dtype: compute dtype; group norm statistics are float32 whatever it is.
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
        """How many of the blocks halve or double the number of frames."""
        return self.temporal_compression_ratio.bit_length() - 1


class _Kernel(nn.Module):
    """Parameters of a 3x3x3 convolution, under the name that the reference gives its inner
    layer."""

    inputs: int
    features: int

    @nn.compact
    def __call__(self):
        shape = 3, 3, 3, self.inputs, self.features
        kernel = self.param('kernel', nn.initializers.lecun_normal(), shape, jnp.float32)
        return kernel, self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32)


class _CausalConv(nn.Module):
    """3x3x3 convolution over this frame and the two before it, those of the previous chunk
    included.

    A scan over frames that holds two of them, with one 2D convolution per tap in time: what comes
    before it (`prepare`, norm and activation) needs no array of its own for the whole chunk, and
    XLA's CPU backend runs 2D convolutions three times as fast as the 3D one.
    """

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x, prepare=lambda frame: frame, *extras):
        """Convolves prepare(frame, *extras of the frame) of x [B, T, H, W, C]; extras have T as
        axis 1, too."""
        kernel, bias = (
            p.astype(self.dtype) for p in _Kernel(x.shape[-1], self.features, name='conv')()
        )
        frames = tuple(jnp.moveaxis(a, 1, 0) for a in (x, *extras))
        if self.has_variable('cache', 'frames'):
            past = self.get_variable('cache', 'frames')
        else:
            past = (prepare(*(a[0] for a in frames)),) * 2

        conv = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(1, 1),
            padding=[(1, 1), (1, 1)],
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )

        def step(past, frame):
            seen = (*past, prepare(*frame))
            return seen[1:], bias + sum(conv(f, k) for f, k in zip(seen, kernel))

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
    """Statistics of the chunk [B, T, H, W, C], float32; returns the function that normalises one
    frame by them."""

    cfg: VAEConfig

    @nn.compact
    def __call__(self, x):
        groups, c = self.cfg.norm_num_groups, x.shape[-1]
        scale = self.param('scale', nn.initializers.ones, (c,), jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, (c,), jnp.float32)
        x = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, c // groups)
        mean = jnp.mean(x, (1, 2, 3, 5), keepdims=True)
        var = jnp.mean(jnp.square(x - mean), (1, 2, 3, 5), keepdims=True)
        mean, rate = (
            jnp.repeat(a.reshape(-1, 1, 1, groups), c // groups, axis=-1)
            for a in (mean, jax.lax.rsqrt(var + self.cfg.norm_eps))
        )  # [B, 1, 1, C]
        return lambda frame: ((frame.astype(jnp.float32) - mean) * (rate * scale) + bias).astype(
            self.cfg.dtype
        )


def _frame_indices(frames: int, latents: int) -> np.ndarray:
    """Which latent a frame belongs to; the first of an odd count of frames has the first one for
    itself."""
    alone = int(frames > 1 and frames % 2)
    rest = np.arange(frames - alone) * (latents - alone) // (frames - alone)
    return np.concatenate([np.zeros(alone, int), alone + rest])


def _widen(z, shape):
    """Nearest resampling of [B, h, w, C] to the height and width of `shape`."""
    return jnp.repeat(jnp.repeat(z, shape[1] // z.shape[1], axis=1), shape[2] // z.shape[2], axis=2)


class _SpatialNorm(nn.Module):
    """Group norm, scaled and shifted by what the latents at the same place say, for one frame, and
    its two extras."""

    cfg: VAEConfig

    @nn.compact
    def __call__(self, x, z):
        normalise = _GroupNorm(self.cfg, name='norm_layer')(x)
        # A pointwise convolution commutes with nearest resampling, so it runs at the latents' size.
        latents = _frame_indices(x.shape[1], z.shape[1])
        extras = [
            _PointConv(x.shape[-1], self.cfg.dtype, name=n)(z)[:, latents]
            for n in ('conv_y', 'conv_b')
        ]
        return (
            lambda frame, y, b: normalise(frame) * _widen(y, frame.shape) + _widen(b, frame.shape),
            extras,
        )


def _activation(cfg: VAEConfig, name: str, x, z):
    """Norm and silu of one frame, and its extras: a spatial norm if there are latents z (decoder),
    else group norm."""
    norm, extras = (
        (_GroupNorm(cfg, name=name)(x), []) if z is None else _SpatialNorm(cfg, name=name)(x, z)
    )
    return lambda *frame: nn.silu(norm(*frame)), *extras


class _Resnet(nn.Module):
    cfg: VAEConfig
    features: int

    @nn.compact
    def __call__(self, x, z=None):
        h = _CausalConv(self.features, self.cfg.dtype, name='conv1')(
            x, *_activation(self.cfg, 'norm1', x, z)
        )
        h = _CausalConv(self.features, self.cfg.dtype, name='conv2')(
            h, *_activation(self.cfg, 'norm2', h, z)
        )
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1, 1), dtype=self.cfg.dtype, name='conv_shortcut')(x)
        return x + h


class _Downsample(nn.Module):
    """Halves height and width, and the frames if `time`: the first of an odd count stays, pairs are
    averaged."""

    cfg: VAEConfig
    time: bool

    @nn.compact
    def __call__(self, x):
        if self.time and x.shape[1] > 1:
            first, pairs = x[:, : x.shape[1] % 2], x[:, x.shape[1] % 2 :]
            x = jnp.concatenate([first, (pairs[:, ::2] + pairs[:, 1::2]) / 2], axis=1)
        b, t, h, w, c = x.shape
        x = nn.Conv(
            c, (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=self.cfg.dtype, name='conv'
        )(x.reshape(b * t, h, w, c))
        return x.reshape(b, t, *x.shape[1:])


class _Upsample(nn.Module):
    """Doubles height and width, and the frames if `time`: the first of an odd count in a first
    chunk stays one."""

    cfg: VAEConfig
    time: bool
    first: bool

    @nn.compact
    def __call__(self, x):
        b, t, h, w, c = x.shape
        x = jnp.repeat(jnp.repeat(x.reshape(b * t, h, w, c), 2, axis=1), 2, axis=2)
        x = nn.Conv(c, (3, 3), padding=1, dtype=self.cfg.dtype, name='conv')(x).reshape(
            b, t, 2 * h, 2 * w, c
        )
        if not self.time:
            return x
        # The convolution is per frame, so frames are repeated after it.
        keep = t % 2 if self.first else 0
        return jnp.concatenate([x[:, :keep], jnp.repeat(x[:, keep:], 2, axis=1)], axis=1)


class _Stage(nn.Module):
    """Resnets of one width, then, if it has one, a change of size."""

    cfg: VAEConfig
    features: int
    resnets: int
    resize: Callable[[], nn.Module] | None = None

    @nn.compact
    def __call__(self, x, z=None):
        for i in range(self.resnets):
            x = _Resnet(self.cfg, self.features, name=f'resnets_{i}')(x, z)
        return x if self.resize is None else self.resize()(x)


class Encoder(nn.Module):
    """One chunk of pixels [B, T, H, W, 3] to moments [B, T', H/8, W/8, 2C], mean and
    log-variance."""

    cfg: VAEConfig

    @nn.compact
    def __call__(self, x):
        cfg, widths = self.cfg, self.cfg.block_out_channels
        x = _CausalConv(widths[0], cfg.dtype, name='conv_in')(x.astype(cfg.dtype))
        for i, width in enumerate(widths):
            down = functools.partial(
                _Downsample, cfg, i < cfg.temporal_levels, name='downsamplers_0'
            )
            last = i + 1 == len(widths)
            x = _Stage(
                cfg, width, cfg.layers_per_block, None if last else down, name=f'down_blocks_{i}'
            )(x)
        x = _Stage(cfg, widths[-1], 2, name='mid_block')(x)
        conv_out = _CausalConv(2 * cfg.latent_channels, cfg.dtype, name='conv_out')
        return conv_out(x, *_activation(cfg, 'norm_out', x, None))


class Decoder(nn.Module):
    """One chunk of latents [B, T, h, w, C] to pixels [B, T', 8h, 8w, 3]; `first` is the first chunk
    of a scene."""

    cfg: VAEConfig

    @nn.compact
    def __call__(self, z, first: bool):
        cfg, widths, z = self.cfg, self.cfg.block_out_channels[::-1], z.astype(self.cfg.dtype)
        x = _CausalConv(widths[0], cfg.dtype, name='conv_in')(z)
        x = _Stage(cfg, widths[0], 2, name='mid_block')(x, z)
        for i, width in enumerate(widths):
            up = functools.partial(
                _Upsample, cfg, i < cfg.temporal_levels, first, name='upsamplers_0'
            )
            last = i + 1 == len(widths)
            x = _Stage(
                cfg, width, cfg.layers_per_block + 1, None if last else up, name=f'up_blocks_{i}'
            )(x, z)
        return _CausalConv(cfg.out_channels, cfg.dtype, name='conv_out')(
            x, *_activation(cfg, 'norm_out', x, z)
        )


class VAE(nn.Module):
    """Encoder and decoder of one chunk; `encode` and `decode` below run whole scenes."""

    cfg: VAEConfig

    def setup(self):
        self.encoder, self.decoder = Encoder(self.cfg), Decoder(self.cfg)

    def __call__(self, x):
        return self.decoder(self.encoder(x)[..., : self.cfg.latent_channels], True)

    def encode_chunk(self, x, first: bool):
        """Moments of one chunk; the encoder's graph does not depend on `first`."""
        del first
        return self.encoder(x)

    def decode_chunk(self, z, first: bool):
        """Pixels of one chunk."""
        return self.decoder(z, first)


def _apply_chunk(cfg: VAEConfig, method: str, params, cache, x, first: bool):
    out, updated = VAE(cfg).apply(
        {'params': params, 'cache': cache}, x, first, method=method, mutable='cache'
    )
    return out.astype(jnp.float32), updated['cache']


@functools.cache
def _run_chunk():
    """Jitted `_apply_chunk`."""
    # The CPU's default order of operations starts all loops' outputs at once: 21 GB instead of 9 at
    # 480x720.
    on_cpu = jax.default_backend() == 'cpu'
    options = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'} if on_cpu else None
    return jax.jit(
        _apply_chunk,
        static_argnames=('cfg', 'method', 'first'),
        donate_argnames='cache',
        compiler_options=options,
    )


def _run_scene(cfg: VAEConfig, method: str, params, x, borders) -> np.ndarray:
    """All chunks of a scene or tile in turn; only one chunk is on the device at a time."""
    cache, out = {}, []
    for start, stop in itertools.pairwise(borders):
        y, cache = _run_chunk()(cfg, method, params, cache, x[:, start:stop], start == 0)
        out.append(np.asarray(y))
    return np.concatenate(out, axis=1)


def _front_loaded(total: int, size: int) -> list[int]:
    """Borders of chunks of `size`, the remainder going into the first."""
    rest = total % size if total >= size else 0
    return [0, *range(size + rest, total, size), total]


def encode_borders(frames: int) -> list[int]:
    """Where the chunks of a scene begin and end, in frames: 49 are 9, 8, 8, 8, 8, 8."""
    return _front_loaded(frames, _ENCODE_CHUNK)


def decode_borders(latents: int, rule: str) -> list[int]:
    """Where the chunks of a scene begin and end, in latents: the first alone, then pairs;
    'diffusers' starts with 3."""
    if rule == 'diffusers':
        return _front_loaded(latents, _DECODE_CHUNK)
    return [0, *range(1, latents, _DECODE_CHUNK), latents]


def encode(cfg: VAEConfig, params, pixels, tiling: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Posterior of one scene (method of CogVideoX's VAE; frames are batched as Mask²DiT's code
    does).

    Args:
      cfg, params: the network.
      pixels: [B, F, H, W, 3] in -1...1, H and W multiples of cfg.spatial_factor.
      tiling: code overlapping tiles of half the trained size and cross-fade them, for less memory;
        changes results. Exactly the reference's rule, sizes included: see check_tiling.

    Returns:
      Mean and log-variance, float32 numpy [B, T, h, w, C], neither scaled by cfg.scaling_factor. T
      is 1 + (F-1)/4 for the usual F = 4k + 1.

    Raises:
      ValueError: if the size is no multiple of cfg.spatial_factor.
    """
    _check_size(cfg, pixels.shape)
    run = functools.partial(
        _run_scene, cfg, 'encode_chunk', params, borders=encode_borders(pixels.shape[1])
    )
    factor = cfg.spatial_factor
    moments = _tiled(run, pixels, _tile_size(cfg), lambda n: n // factor) if tiling else run(pixels)
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
      rule: 'reference' decodes the first latent alone and then pairs, 4(T-1)+1 frames; 'diffusers'
        is the rule of the stock AutoencoderKLCogVideoX, which gives other pixels.

    Returns:
      float32 numpy [B, F, 8h, 8w, 3], about -1...1, not clipped.
    """
    if rule not in DECODE_RULES:
        raise ValueError(f'Decode rule {rule!r} is unknown: use one of {", ".join(DECODE_RULES)}.')
    run = functools.partial(
        _run_scene, cfg, 'decode_chunk', params, borders=decode_borders(latents.shape[1], rule)
    )
    if not tiling:
        return run(latents)
    factor = cfg.spatial_factor
    return _tiled(run, latents, tuple(n // factor for n in _tile_size(cfg)), lambda n: n * factor)


def _tile_size(cfg: VAEConfig) -> tuple[int, int]:
    """Height and width of a tile in pixels."""
    return cfg.sample_height // 2, cfg.sample_width // 2


def check_tiling(cfg: VAEConfig) -> None:
    """Makes sure that tiles lead to frames of the right size; the reference's rule loses rows or
    columns otherwise.

    Raises:
      ValueError: if the overlaps are no whole latents.
    """
    for name, tile, share in zip(('height', 'width'), _tile_size(cfg), _TILE_OVERLAP):
        latents = tile // cfg.spatial_factor
        if int(latents * (1 - share)) * cfg.spatial_factor != tile - int(tile * share):
            raise ValueError(
                f'The VAE cannot run in tiles: half of its sample_{name}, {tile} pixels, does not overlap '
                f'by {share:.3f} in whole latents.'
            )


def _check_size(cfg: VAEConfig, shape) -> None:
    if shape[2] % cfg.spatial_factor or shape[3] % cfg.spatial_factor:
        raise ValueError(
            f'The VAE cannot code frames of {shape[2]}x{shape[3]} pixels: height and width must be '
            f'multiples of {cfg.spatial_factor}.'
        )


def _tiled(run, x, tile, scale) -> np.ndarray:
    """Runs overlapping tiles and cross-fades each with the finished one above it, then with the one
    to its left.

    Args:
      run: function of one tile [B, T, ., ., C].
      x: whole input.
      tile: height and width of an input tile.
      scale: input to output length.
    """
    steps = [int(n * (1 - share)) for n, share in zip(tile, _TILE_OVERLAP)]
    fades = [int(scale(n) * share) for n, share in zip(tile, _TILE_OVERLAP)]
    keep = [scale(n) - fade for n, fade in zip(tile, fades)]
    above, strips = [], []
    for top in range(0, x.shape[2], steps[0]):
        row = []
        for left in range(0, x.shape[3], steps[1]):
            y = run(x[:, :, top : top + tile[0], left : left + tile[1]])
            if above:
                _cross_fade(above[len(row)], y, fades[0], axis=2)
            if row:
                _cross_fade(row[-1], y, fades[1], axis=3)
            row.append(y)
        strips.append(np.concatenate([y[:, :, : keep[0], : keep[1]] for y in row], axis=3))
        above = row
    return np.concatenate(strips, axis=2)


def _cross_fade(before, after, length: int, axis: int) -> None:
    """Fades the end of `before` linearly into the start of `after`, in place."""
    length = min(length, before.shape[axis], after.shape[axis])
    weight = (np.arange(length, dtype=np.float32) / length).reshape(
        (length,) + (1,) * (after.ndim - axis - 1)
    )
    head = after[(slice(None),) * axis + (slice(length),)]
    tail = before[(slice(None),) * axis + (slice(before.shape[axis] - length, None),)]
    head[...] = tail * (1 - weight) + head * weight
