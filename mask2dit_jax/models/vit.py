"""Vision transformers that turn frames and clips into features, and CLIP's text transformer.

CLIP, DINOv2 (also with registers) and VideoMAE are configurations of one network;
mask2dit_jax.evaluation.feature_encoders reads their folders.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# By the names of config.json's hidden_act; nn.gelu is the tanh approximation.
ACTIVATIONS = {
    'gelu': functools.partial(nn.gelu, approximate=False),
    'gelu_pytorch_tanh': nn.gelu,
    'gelu_new': nn.gelu,
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Size of a pre-norm transformer.

    Attributes:
      width: of the residual stream.
      layers: number of blocks.
      heads: number of attention heads.
      mlp: hidden width of the feed-forward layer.
      activation: one of ACTIVATIONS, or 'swiglu', whose fc1 holds gate and value.
      eps: of all norms in the blocks.
      biases: which of the projections q, k, v have a bias.
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
      image_size: pixels along either side that the position table is made for.
      patch_size: pixels along either side of a patch.
      frames: number of frames of a clip, 1 for pictures.
      tubelet: number of frames of a patch.
      patch_bias: whether the patch projection has a bias.
      positions: 'fixed' is a learned table for image_size alone; 'bicubic' and 'antialiased' are
        learned tables that other sizes interpolate, as DINOv2 without and with registers do;
        'sincos' is a function of the patch's number.
      class_token: whether there is one, whose last state is the feature; without it the feature is
        the mean of all tokens.
      registers: number of extra tokens, which have no meaning of their own.
      pre_norm: whether the tokens are normed before the blocks.
      norm: what the last norm acts on: all 'tokens', the 'feature', or 'none'.
      norm_eps: of the last norm.
      project: width to which the feature is projected, if it is.
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
    """CLIP's encoder of captions: causal blocks; the last token's state is projected to `project`.

    Attributes:
      blocks: the transformer.
      vocab_size: number of token ids.
      length: number of positions, the longest caption.
      project: width of the feature.
    """

    blocks: Blocks
    vocab_size: int
    length: int
    project: int


def _norm(eps: float, name: str):
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, name=name)


class _Block(nn.Module):
    """One pre-norm transformer block."""

    cfg: Blocks
    causal: bool

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg

        h = _norm(cfg.eps, 'norm1')(x)  # [B, L, E]
        heads = (*h.shape[:2], cfg.heads, -1)
        q = nn.Dense(cfg.width, use_bias='q' in cfg.biases, name='q')(h).reshape(heads)
        k = nn.Dense(cfg.width, use_bias='k' in cfg.biases, name='k')(h).reshape(heads)
        v = nn.Dense(cfg.width, use_bias='v' in cfg.biases, name='v')(h).reshape(heads)
        h = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)  # [B, L, N, D]
        h = h.reshape(x.shape)
        x = x + self._layer_scale('scale1') * nn.Dense(cfg.width, name='out')(h)

        h = _norm(cfg.eps, 'norm2')(x)
        if cfg.activation == 'swiglu':
            h = nn.Dense(2 * cfg.mlp, name='fc1')(h)
            gate, value = jnp.split(h, 2, axis=-1)
            h = nn.silu(gate) * value
        else:
            h = nn.Dense(cfg.mlp, name='fc1')(h)
            h = ACTIVATIONS[cfg.activation](h)
        x = x + self._layer_scale('scale2') * nn.Dense(cfg.width, name='fc2')(h)

        return x, None  # carry and output of the scan over layers

    def _layer_scale(self, name: str):
        """Factor of a branch, [E], or 1 if the model has none."""
        if not self.cfg.layer_scale:
            return 1
        return self.param(name, nn.initializers.ones, (self.cfg.width,))


def _run_blocks(cfg: Blocks, x, causal: bool = False):
    """Scans the blocks over [B, L, E]; parameters are stacked on axis 0."""
    blocks = nn.scan(
        _Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=cfg.layers
    )
    x, _ = blocks(cfg, causal, name='blocks')(x)
    return x


def bicubic_matrix(size: int, new_size: int, antialias: bool) -> np.ndarray:
    """Bicubic interpolation along one axis, as PyTorch does it.

    The kernel is Keys' cubic one. Without antialiasing it has a = -0.75, and edges are repeated.
    With antialiasing it has a = -0.5, is widened when the axis shrinks, and has no weight beyond
    the edges.

    Args:
      size: number of samples.
      new_size: number of interpolated samples.
      antialias: see above.

    Returns:
      float64 [new_size, size].
    """
    if antialias:
        a = -0.5
        stretch = max(1, size / new_size)
    else:
        a = -0.75
        stretch = 1

    # The samples that can have weight in each new one, some of them beyond the edges.
    centers = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    reach = int(np.ceil(2 * stretch)) + 1
    taps = np.floor(centers).astype(int)[:, None] + np.arange(-reach, reach + 1)

    # Keys' kernel has one cubic up to distance 1, another up to 2, and is zero from there on.
    x = np.abs(taps - centers[:, None]) / stretch
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * (x**3 - 5 * x**2 + 8 * x - 4)
    kernel = np.where(x < 1, inner, np.where(x < 2, outer, 0))

    if antialias:
        kernel = kernel * ((taps >= 0) & (taps < size))

    # Taps beyond an edge add their weight to the sample at the edge.
    matrix = np.zeros((new_size, size))
    rows = np.arange(new_size)[:, None]
    np.add.at(matrix, (rows, np.clip(taps, 0, size - 1)), kernel)
    return matrix / matrix.sum(1, keepdims=True)


def _sincos(count: int, width: int) -> np.ndarray:
    """VideoMAE's fixed positions, float32 [count, width]: sine and cosine, interleaved."""
    channels = np.arange(width)
    angles = np.arange(count)[:, None] / 10000 ** (channels // 2 * 2 / width)
    return np.where(channels % 2, np.cos(angles), np.sin(angles)).astype(np.float32)


class ViT(nn.Module):
    """Encoder of pictures or clips; `cfg` says which."""

    cfg: ViTConfig

    @nn.compact
    def __call__(self, pixels):
        """Encodes clips.

        Args:
          pixels: normalised, float32 [B, F, H, W, 3].

        Returns:
          Features [B, E], or [B, cfg.project].

        Raises:
          ValueError: if the positions are 'fixed' and the size is not image_size.
        """
        cfg = self.cfg
        width = cfg.blocks.width

        # One token per patch.
        patch = (cfg.tubelet, cfg.patch_size, cfg.patch_size)
        x = nn.Conv(width, patch, patch, 'VALID', use_bias=cfg.patch_bias, name='patch')(pixels)
        grid = x.shape[1:4]
        x = x.reshape(len(x), -1, width)  # [B, L, E]

        # The table has a row for the class token, if there is one, and then one per patch. Special
        # tokens stand before the patches: the class token, then registers, which have no position.
        special = [jnp.zeros((0, width))]
        if cfg.positions == 'sincos':
            x = x + _sincos(x.shape[1], width)
        else:
            side = cfg.image_size // cfg.patch_size
            shape = (cfg.class_token + side**2, width)
            table = self.param('positions', nn.initializers.normal(0.02), shape)
            x = x + self._resized(table[-(side**2) :], side, grid[1:])
            if cfg.class_token:
                class_token = self.param('class_token', nn.initializers.zeros, (width,))
                special.append(class_token[None] + table[:1])
        if cfg.registers:
            registers = self.param('registers', nn.initializers.zeros, (cfg.registers, width))
            special.append(registers)
        special = jnp.concatenate(special)
        special = jnp.broadcast_to(special, (len(x), *special.shape))
        x = jnp.concatenate([special, x], axis=1)

        if cfg.pre_norm:
            x = _norm(cfg.blocks.eps, 'pre_norm')(x)
        x = _run_blocks(cfg.blocks, x)
        if cfg.norm == 'tokens':
            x = _norm(cfg.norm_eps, 'norm')(x)

        x = x[:, 0] if cfg.class_token else x.mean(1)  # [B, E]
        if cfg.norm == 'feature':
            x = _norm(cfg.norm_eps, 'norm')(x)
        if cfg.project:
            x = nn.Dense(cfg.project, use_bias=False, name='project')(x)
        return x

    def _resized(self, table, side: int, grid: tuple[int, int]):
        """Position table [side², E] for a grid of patches, [rows · columns, E]."""
        if grid == (side, side):
            return table
        if self.cfg.positions == 'fixed':
            raise ValueError(
                f'A grid of {grid} patches does not fit the {side} x {side} of the position table: '
                'crop to its size in preprocessor_config.json.'
            )

        antialias = self.cfg.positions == 'antialiased'
        rows, columns = (bicubic_matrix(side, size, antialias) for size in grid)
        table = table.reshape(side, side, -1)
        resized = jnp.einsum('yi,xj,ijd->yxd', rows, columns, table)
        return resized.reshape(-1, table.shape[-1])


class TextTransformer(nn.Module):
    """CLIP's encoder of captions; `cfg` says its size."""

    cfg: TextConfig

    @nn.compact
    def __call__(self, ids, last):
        """Encodes captions.

        Args:
          ids: token ids, int32 [B, M].
          last: position of each caption's last token, int [B].

        Returns:
          Features [B, cfg.project].
        """
        cfg = self.cfg
        width = cfg.blocks.width

        x = nn.Embed(cfg.vocab_size, width, name='tokens')(ids)
        table = self.param('positions', nn.initializers.normal(0.02), (cfg.length, width))
        x = x + table[: ids.shape[1]]  # [B, M, E]
        x = _run_blocks(cfg.blocks, x, causal=True)

        feature = x[jnp.arange(len(ids)), last]  # [B, E]
        feature = _norm(cfg.blocks.eps, 'norm')(feature)
        return nn.Dense(cfg.project, use_bias=False, name='project')(feature)
