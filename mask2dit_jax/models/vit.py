"""Vision transformers that turn frames and clips into features, and CLIP's text transformer: one
network for all.

CLIP, DINOv2 (also with registers) and VideoMAE are configurations of it;
mask2dit_jax.evaluation.feature_encoders reads their folders.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

ACTIVATIONS = {
    'gelu': functools.partial(nn.gelu, approximate=False),
    'gelu_pytorch_tanh': nn.gelu,
    'gelu_new': nn.gelu,
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A pre-norm transformer.

    Attributes:
      width, layers, heads: of the residual stream, number of blocks, and of attention heads.
      mlp: hidden width.
      activation: one of ACTIVATIONS, or 'swiglu', whose fc1 holds gate and value.
      eps: of all norms in blocks.
      biases: which of the projections q, k, v have one.
      layer_scale: whether each branch is scaled per channel.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    activation: str
    eps: float
    biases: str = 'qkv'
    layer_scale: bool = False


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """An encoder of pictures or clips.

    Attributes:
      blocks: the transformer.
      image_size: pixels along either side that the position table is for.
      patch_size: pixels along either side of a patch.
      frames: of a clip, 1 for pictures.
      tubelet: frames of a patch.
      patch_bias: of the patch projection.
      positions: 'fixed' table; 'bicubic' or 'antialiased' for a learned one that other sizes
        interpolate, as DINOv2 without and with registers do; or 'sincos' of the patch's number.
      class_token: whether there is one, whose last state is the feature; else that is the mean of
        all tokens.
      registers: tokens without meaning of their own.
      pre_norm: of the tokens, before the blocks.
      norm: of all 'tokens', of the 'feature', or 'none'.
      norm_eps: of that norm.
      project: width of the feature if it is projected.
    """

    blocks: Blocks
    image_size: int
    patch_size: int
    frames: int = 1
    tubelet: int = 1
    patch_bias: bool = True
    positions: str = 'fixed'
    class_token: bool = True
    registers: int = 0
    pre_norm: bool = False
    norm: str = 'tokens'
    norm_eps: float = 1e-6
    project: int | None = None


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """CLIP's encoder of captions: causal blocks, the last token's state projected to `project`."""

    blocks: Blocks
    vocab_size: int
    length: int
    project: int


def _norm(eps: float, name: str):
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, name=name)


class _Block(nn.Module):
    cfg: Blocks
    causal: bool

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg
        scale = (
            (lambda name: self.param(name, nn.initializers.ones, (cfg.width,)))
            if cfg.layer_scale
            else lambda name: 1
        )
        h = _norm(cfg.eps, 'norm1')(x)
        q, k, v = (
            nn.Dense(cfg.width, use_bias=n in cfg.biases, name=n)(h).reshape(
                *h.shape[:2], cfg.heads, -1
            )
            for n in 'qkv'
        )
        h = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal).reshape(h.shape)
        x = x + scale('scale1') * nn.Dense(cfg.width, name='out')(h)
        h = _norm(cfg.eps, 'norm2')(x)
        if cfg.activation == 'swiglu':
            gate, h = jnp.split(nn.Dense(2 * cfg.mlp, name='fc1')(h), 2, axis=-1)
            h = nn.silu(gate) * h
        else:
            h = ACTIVATIONS[cfg.activation](nn.Dense(cfg.mlp, name='fc1')(h))
        return x + scale('scale2') * nn.Dense(cfg.width, name='fc2')(h), None


def _run_blocks(cfg: Blocks, x, causal: bool = False):
    scanned = nn.scan(
        _Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=cfg.layers
    )
    return scanned(cfg, causal, name='blocks')(x)[0]


def bicubic_matrix(size: int, new_size: int, antialias: bool) -> np.ndarray:
    """Interpolation of `size` samples to `new_size` as PyTorch's, [new_size, size] float64.

    Keys' cubic kernel, with a = -0.75 and edges repeated, or, antialiased, with a = -0.5, widened
    when shrinking, and weights beyond the edges left out.
    """
    a, stretch = (-0.5, max(1, size / new_size)) if antialias else (-0.75, 1)
    centers = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    reach = int(np.ceil(2 * stretch)) + 1
    taps = np.floor(centers).astype(int)[:, None] + np.arange(-reach, reach + 1)
    x = np.abs(taps - centers[:, None]) / stretch
    kernel = np.where(
        x < 1,
        (a + 2) * x**3 - (a + 3) * x**2 + 1,
        np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0),
    )
    if antialias:
        kernel = kernel * ((taps >= 0) & (taps < size))
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (np.arange(new_size)[:, None], np.clip(taps, 0, size - 1)), kernel)
    return matrix / matrix.sum(1, keepdims=True)


def _sincos(count: int, width: int) -> np.ndarray:
    """VideoMAE's fixed positions [count, width]: sine and cosine of the number, interleaved."""
    angles = np.arange(count)[:, None] / 10000 ** (np.arange(width) // 2 * 2 / width)
    return np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles)).astype(np.float32)


class ViT(nn.Module):
    """Normalised pixels float32 [B, F, H, W, 3] to features [B, D]."""

    cfg: ViTConfig

    @nn.compact
    def __call__(self, pixels):
        cfg, width = self.cfg, self.cfg.blocks.width
        patch = (cfg.tubelet, cfg.patch_size, cfg.patch_size)
        x = nn.Conv(width, patch, patch, 'VALID', use_bias=cfg.patch_bias, name='patch')(pixels)
        grid = x.shape[1:4]
        x = x.reshape(len(x), -1, width)
        special = [jnp.zeros((0, width))]  # tokens before the patches
        if cfg.positions == 'sincos':
            x = x + _sincos(x.shape[1], width)
        else:
            side = cfg.image_size // cfg.patch_size
            table = self.param(
                'positions', nn.initializers.normal(0.02), (cfg.class_token + side**2, width)
            )
            x = x + self._resized(table[-(side**2) :], side, grid[1:])
            if cfg.class_token:
                special.append(
                    self.param('class_token', nn.initializers.zeros, (width,))[None] + table[:1]
                )
        if cfg.registers:
            special.append(self.param('registers', nn.initializers.zeros, (cfg.registers, width)))
        special = jnp.concatenate(special)
        x = jnp.concatenate([jnp.broadcast_to(special, (len(x), *special.shape)), x], axis=1)
        if cfg.pre_norm:
            x = _norm(cfg.blocks.eps, 'pre_norm')(x)
        x = _run_blocks(cfg.blocks, x)
        if cfg.norm == 'tokens':
            x = _norm(cfg.norm_eps, 'norm')(x)
        x = x[:, 0] if cfg.class_token else x.mean(1)
        if cfg.norm == 'feature':
            x = _norm(cfg.norm_eps, 'norm')(x)
        return nn.Dense(cfg.project, use_bias=False, name='project')(x) if cfg.project else x

    def _resized(self, table, side: int, grid: tuple[int, int]):
        if grid == (side, side):
            return table
        if self.cfg.positions == 'fixed':
            raise ValueError(
                f'A grid of {grid} patches does not fit the {side} x {side} of the position table: '
                'crop to its size in preprocessor_config.json.'
            )
        rows, cols = (bicubic_matrix(side, n, self.cfg.positions == 'antialiased') for n in grid)
        return jnp.einsum('yi,xj,ijd->yxd', rows, cols, table.reshape(side, side, -1)).reshape(
            -1, table.shape[-1]
        )


class TextTransformer(nn.Module):
    """Token ids int32 [B, M] and the position of each caption's last token [B] to features [B,
    project]."""

    cfg: TextConfig

    @nn.compact
    def __call__(self, ids, last):
        cfg, width = self.cfg, self.cfg.blocks.width
        x = nn.Embed(cfg.vocab_size, width, name='tokens')(ids)
        x = (
            x
            + self.param('positions', nn.initializers.normal(0.02), (cfg.length, width))[
                : ids.shape[1]
            ]
        )
        x = _run_blocks(cfg.blocks, x, causal=True)[jnp.arange(len(ids)), last]
        return nn.Dense(cfg.project, use_bias=False, name='project')(
            _norm(cfg.blocks.eps, 'norm')(x)
        )
