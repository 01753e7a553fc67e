"""The CogVideoX transformer with the two masks of Mask²DiT, at any size.

One forward serves everything: `t` holds one timestep per scene, and every token is modulated by its
own scene's (Mask²DiT, section 3.3: given scenes are clean at timestep 0). Pretraining, conditional
training and auto-regressive extension differ only in `t` and in the loss mask.
"""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mask2dit_jax.attention import attend, masks
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.layout import SceneLayout, token_scenes
from mask2dit_jax.models import embeddings

# What the backward pass does not compute again: names to keep on the device, names to move to the
# host's memory.
REMAT = {
    'none': None,
    'full': ((), ()),
    'save_attention': (('attention',), ()),
    'save_matmuls': (('attention', 'matmul'), ()),
    'offload_attention': ((), ('attention',)),
    'offload_layer': ((), ('layer',)),
}


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Architecture; defaults are CogVideoX-5B's. Names follow the released config.json where it has
    one.

    Attributes:
      num_layers: transformer blocks.
      num_attention_heads: attention heads of a block.
      attention_head_dim: features of an attention head, a multiple of 16.
      in_channels: channels of the latents.
      out_channels: channels of the prediction, as many as in_channels for a video model.
      text_embed_dim: features of a text state.
      time_embed_dim: features of the timestep embedding that modulates the blocks.
      max_text_seq_length: text tokens of every scene's caption.
      patch_size: latent rows and columns of a token.
      patch_size_t: latent frames of a token (1.5); None for one frame.
      patch_bias: whether the patch projection has a bias; with a patch_size_t it always has one.
      sample_height: latent rows that the model was trained at; they set the base grid.
      sample_width: latent columns that the model was trained at; they set the base grid.
      sample_frames: pixel frames that the model was trained at; they set the base grid.
      temporal_compression_ratio: pixel frames of a latent frame, but for the first.
      flip_sin_to_cos: whether the timestep embedding has its cosines before its sines.
      freq_shift: subtracted from the number of frequencies in the timestep embedding's exponent.
      attention_bias: whether the projections to queries, keys and values have biases.
      norm_elementwise_affine: whether the layer norms have scales and biases.
      norm_eps: added to the variance in the layer norms.
      spatial_interpolation_scale: sin-cos positions of rows and columns are divided by it.
      temporal_interpolation_scale: sin-cos positions of frames are divided by it.
      rotary: 3D rotary positions (5B) or, if false, fixed sin-cos ones (2B).
      learned_positions: learned additive positions, alone or on top of rotary (5B-I2V).
      position_rule: 'continuous' counts frames straight through scenes of any number and length,
        and starts a learned table anew in every scene; 'reference' stretches one clip's table over
        all scenes as the released code does. Rotary positions are the same under both.
      pattern: attention mask: 'dual' (the paper's: a caption touches only its own scene, and all
        video tokens see each other), 'full' (no mask), 'isolated' (a scene sees only itself) or
        'causal' (as dual, but video does not see the video of later scenes).
      attention_backend: implementation of attention: 'blockwise' and 'dense' run anywhere, 'splash'
        and 'jax_splash' on TPU, 'cudnn' on GPU.
      dtype: compute dtype, 'float32' or 'bfloat16'; parameters are float32 whatever it is.
      remat: what the backward pass computes again: 'none', 'full' (every layer, from its input),
        'save_attention' (all but attention), 'save_matmuls' (neither attention nor matmuls: on a
        CPU faster than 'none', for moving less), 'offload_attention' (as save_attention, kept in
        host memory) or 'offload_layer' (every layer, with its input kept in host memory).
    """

    num_layers: int = 42
    num_attention_heads: int = 48
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    text_embed_dim: int = 4096
    time_embed_dim: int = 512
    max_text_seq_length: int = 226
    patch_size: int = 2
    patch_size_t: int | None = None
    patch_bias: bool = True
    sample_height: int = 60
    sample_width: int = 90
    sample_frames: int = 49
    temporal_compression_ratio: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    attention_bias: bool = True
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    rotary: bool = True
    learned_positions: bool = False
    position_rule: str = 'continuous'
    pattern: str = 'dual'
    attention_backend: str = 'blockwise'
    dtype: str = 'bfloat16'
    remat: str = 'none'

    def __post_init__(self):
        choices = {
            'pattern': masks.PATTERNS,
            'attention_backend': tuple(attend.BACKENDS),
            'remat': tuple(REMAT),
            'position_rule': ('continuous', 'reference'),
            'dtype': ('float32', 'bfloat16'),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f'model.{field} is {getattr(self, field)!r}: use one of {", ".join(allowed)}.'
                )
        if self.attention_backend == 'cudnn' and 'attention' in sum(REMAT[self.remat] or (), ()):
            raise ValueError(
                f'model.remat {self.remat!r} does not go with the cudnn backend, whose statistics cannot '
                'be kept: use full, offload_layer or none.'
            )
        if self.attention_head_dim % 16 and (self.rotary or not self.learned_positions):
            raise ValueError(
                f'model.attention_head_dim must be a multiple of 16, got {self.attention_head_dim}.'
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def base_grid(self) -> tuple[int, int, int]:
        """Trained latent frames, token rows and columns (T0, H0, W0)."""
        return (
            (self.sample_frames - 1) // self.temporal_compression_ratio + 1,
            self.sample_height // self.patch_size,
            self.sample_width // self.patch_size,
        )

    def layout(self, frames: tuple[int, ...], height: int, width: int) -> SceneLayout:
        """Layout of a story with these latent frames per scene and this latent height and width.

        Raises:
          ValueError: if the size is not a multiple of the patch size.
        """
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f'Latent size {height}x{width} is not a multiple of patch_size {self.patch_size}.'
            )
        return SceneLayout(
            tuple(frames),
            height // self.patch_size,
            width // self.patch_size,
            self.max_text_seq_length,
            self.patch_size_t or 1,
        )


def patchify(x, layout: SceneLayout, patch: int):
    """[B, T, H, W, C] to tokens [B, num_video, C·pt·p·p], features in (channel, frame, row, column)
    order."""
    b, _, h, w, c = x.shape
    pt = layout.patch_t
    if layout.frames != tuple(f * pt for f in layout.token_frames):
        starts = np.cumsum((0, *layout.frames))
        x = jnp.concatenate(
            [
                jnp.pad(x[:, a : a + f], ((0, 0), (0, -f % pt), (0, 0), (0, 0), (0, 0)))
                for a, f in zip(starts, layout.frames)
            ],
            axis=1,
        )
    x = x.reshape(b, -1, pt, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, layout.num_video, c * pt * patch * patch)


def unpatchify(x, layout: SceneLayout, patch: int):
    """Inverse of `patchify`, padding frames cut off: [B, num_video, C·pt·p·p] to [B, T, H, W,
    C]."""
    b, pt = x.shape[0], layout.patch_t
    x = x.reshape(b, sum(layout.token_frames), layout.height, layout.width, -1, pt, patch, patch)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(
        b, -1, layout.height * patch, layout.width * patch, x.shape[4]
    )
    starts = np.cumsum((0, *layout.token_frames)) * pt
    keep = np.concatenate([np.arange(a, a + f) for a, f in zip(starts, layout.frames)])
    return x if len(keep) == x.shape[1] else x[:, keep]


class _Dense(nn.Module):
    """Dense whose kernel is gathered axis by axis on a mesh.

    Leading axes are flattened, since XLA's CPU backend computes the weight gradient twice as fast
    that way, but not where both examples and tokens are spread over devices: the flattened axis
    could not be.
    """

    features: int
    dtype: jnp.dtype
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        kernel = partitioning.gather_context(
            kernel.astype(self.dtype), '/'.join((*self.path, 'kernel'))
        )
        flat = mesh_lib.mesh_axes().get('context', 1) == 1
        y = checkpoint_name(
            (x.reshape(-1, x.shape[-1]) if flat else x).astype(self.dtype) @ kernel, 'matmul'
        )
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


def _layer_norm(eps: float, affine: bool, name: str):
    """LayerNorm with float32 statistics and result; the caller casts."""
    return nn.LayerNorm(
        epsilon=eps,
        use_bias=affine,
        use_scale=affine,
        dtype=jnp.float32,
        use_fast_variance=False,
        name=name,
    )


@jax.custom_vjp
def _pick_rows(one_hot, table):
    """Rows of tables [B, K, E] by one-hot rows [L, K]: exact, shards over tokens, and its gradient
    is no scatter."""
    return jnp.einsum('lk,bke->ble', one_hot, table, precision='highest')


# The derivative, but in an order of axes that needs no transposed copy of the cotangent, as that of
# einsum does.
_pick_rows.defvjp(
    lambda one_hot, table: (_pick_rows(one_hot, table), one_hot),
    lambda one_hot, d: (None, jnp.einsum('lk,ble->bke', one_hot, d, precision='highest')),
)


class _Affine(nn.Module):
    """Scale and bias [E] of a LayerNorm."""

    features: int

    @nn.compact
    def __call__(self):
        return (
            self.param('scale', nn.initializers.ones, (self.features,), jnp.float32),
            self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32),
        )


class _AdaLayerNorm(nn.Module):
    """adaLN: every token is shifted and scaled by the vector of its own scene.

    Returns as many [B, L, E] vectors as `parts`: the modulated tokens, then the gate if parts is 3.
    """

    cfg: DiTConfig
    parts: int
    kinds: int  # 2: video and text have vectors of their own, in this order; 1: video only

    @nn.compact
    def __call__(self, x, emb, token_kind):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        b, s, e = *emb.shape[:2], cfg.width
        table = _Dense(
            self.kinds * self.parts * e,
            dtype=dtype,
            kernel_init=nn.initializers.zeros,
            name='linear',
        )(nn.silu(emb))
        shift, scale, *gate = jnp.moveaxis(table.reshape(b, s * self.kinds, self.parts, e), 2, 0)
        scale = 1 + scale
        if cfg.norm_elementwise_affine:
            # Joined to the vectors of the scenes, of which there are few, and not to the tokens.
            norm_scale, norm_bias = _Affine(e, name='norm')()
            shift, scale = shift + scale * norm_bias, scale * norm_scale
        one_hot = jax.nn.one_hot(token_kind, s * self.kinds, dtype=dtype)  # [L, S·kinds]
        shift, scale, *gate = (_pick_rows(one_hot, v.astype(dtype)) for v in (shift, scale, *gate))
        y = nn.LayerNorm(
            epsilon=cfg.norm_eps,
            use_bias=False,
            use_scale=False,
            dtype=jnp.float32,
            use_fast_variance=False,
        )(x)
        return (y * scale + shift).astype(dtype), *gate


class _Attention(nn.Module):
    """Multi-head attention with normed q and k, rotary positions and the scene mask."""

    cfg: DiTConfig
    layout: SceneLayout

    @nn.compact
    def __call__(self, x, rope):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        dense = functools.partial(_Dense, cfg.width, dtype=dtype)
        heads = (*x.shape[:2], cfg.num_attention_heads, cfg.attention_head_dim)
        q, k, v = (
            dense(use_bias=cfg.attention_bias, name=n)(x).reshape(heads)
            for n in ('to_q', 'to_k', 'to_v')
        )
        q = _layer_norm(1e-6, True, 'norm_q')(q).astype(dtype)
        k = _layer_norm(1e-6, True, 'norm_k')(k).astype(dtype)
        if rope is not None:
            q, k = embeddings.apply_rope(q, *rope), embeddings.apply_rope(k, *rope)
        if (
            self.is_initializing()
        ):  # attention has no parameters, and its kernels ask for their chip
            out = v
        else:
            pattern, backend = cfg.pattern, cfg.attention_backend
            out = attend.attend(q, k, v, self.layout, pattern, backend)
        return dense(name='to_out')(out.reshape(x.shape))


class _Block(nn.Module):
    """One transformer block; text and video share all weights but the adaLN vectors."""

    cfg: DiTConfig
    layout: SceneLayout

    @nn.compact
    def __call__(self, x, emb, rope, token_kind):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        x = checkpoint_name(partitioning.constrain_tokens(x), 'layer')
        h, gate = _AdaLayerNorm(cfg, 3, 2, name='norm1')(x, emb, token_kind)
        x = x + gate * _Attention(cfg, self.layout, name='attn')(h, rope)
        h, gate = _AdaLayerNorm(cfg, 3, 2, name='norm2')(x, emb, token_kind)
        h = nn.gelu(_Dense(4 * cfg.width, dtype=dtype, name='ff_in')(h), approximate=True)
        return x + gate * _Dense(cfg.width, dtype=dtype, name='ff_out')(h), None


def _block_stack(cfg: DiTConfig):
    """The block as a scan over layers: one compiled body, parameters stacked on axis 0."""
    block = _Block
    if REMAT[cfg.remat] is not None:
        saved, offloaded = REMAT[cfg.remat]
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=saved,
            names_which_can_be_offloaded=offloaded,
            offload_src='device',
            offload_dst='pinned_host',
        )
        block = nn.remat(block, policy=policy, prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=cfg.num_layers,
        in_axes=nn.broadcast,
    )


class DiT(nn.Module):
    """Multi-scene diffusion transformer; `cfg` says its size.

    Call with
      latents: [B, T, H, W, C], scenes concatenated along T.
      text: [B, S, M, text_embed_dim] caption embeddings.
      t: [B, S], one timestep per scene (0 for given scenes).
      frames: static tuple, latent frames per scene, summing to T.

    Returns the predicted v, float32 [B, T, H, W, out_channels].
    """

    cfg: DiTConfig

    @nn.compact
    def __call__(self, latents, text, t, frames: tuple[int, ...]):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        layout = cfg.layout(frames, *latents.shape[2:4])
        b, s = latents.shape[0], layout.num_scenes
        chex.assert_shape(latents, (b, layout.total_frames, None, None, cfg.in_channels))
        chex.assert_shape(text, (b, s, cfg.max_text_seq_length, cfg.text_embed_dim))
        chex.assert_shape(t, (b, s))

        emb = embeddings.timestep_embedding(
            t, cfg.width, cfg.flip_sin_to_cos, cfg.freq_shift
        ).astype(dtype)
        emb = _Dense(cfg.time_embed_dim, dtype=dtype, name='time_in')(emb)
        emb = _Dense(cfg.time_embed_dim, dtype=dtype, name='time_out')(nn.silu(emb))  # [B, S, Et]

        bias = cfg.patch_bias or cfg.patch_size_t is not None
        video = patchify(latents.astype(dtype), layout, cfg.patch_size)
        video = _Dense(cfg.width, use_bias=bias, dtype=dtype, name='patch')(video)
        text = _Dense(cfg.width, dtype=dtype, name='text')(text.astype(dtype)).reshape(
            b, layout.num_text, -1
        )
        x = jnp.concatenate([text, video], axis=1)  # [B, L, E]
        x = self._add_positions(x, layout)

        scene, is_text = token_scenes(layout)
        rope = self._rope(layout) if cfg.rotary else None
        x, _ = _block_stack(cfg)(cfg, layout, name='blocks')(x, emb, rope, 2 * scene + is_text)

        x = _layer_norm(cfg.norm_eps, cfg.norm_elementwise_affine, 'norm_final')(
            x[:, layout.num_text :]
        )
        (x,) = _AdaLayerNorm(cfg, 2, 1, name='norm_out')(
            x.astype(dtype), emb, scene[layout.num_text :]
        )
        features = cfg.out_channels * layout.patch_t * cfg.patch_size**2
        x = _Dense(features, dtype=dtype, kernel_init=nn.initializers.zeros, name='proj_out')(x)
        return unpatchify(x, layout, cfg.patch_size).astype(jnp.float32)

    def _rope(self, layout):
        """Rotary tables over the joint sequence; text is not rotated."""
        rule = 'linspace' if self.cfg.patch_size_t is None else 'slice'
        cos, sin = embeddings.rope_table(
            layout, self.cfg.attention_head_dim, rule, self.cfg.base_grid[1:]
        )
        pad = ((layout.num_text, 0), (0, 0))
        return np.pad(cos, pad, constant_values=1), np.pad(sin, pad)

    def _add_positions(self, x, layout):
        """Adds sin-cos (2B) or learned (5B-I2V, tiny) positions, if the model has any."""
        cfg = self.cfg
        if cfg.learned_positions:
            t0, h0, w0 = cfg.base_grid
            m, e = cfg.max_text_seq_length, cfg.width
            table = self.param(
                'positions', nn.initializers.normal(0.02), (m + t0 * h0 * w0, e), jnp.float32
            )
            share = cfg.position_rule == 'continuous'
            text, time, rows, cols = embeddings.resample_positions(layout, (t0, h0, w0), share)
            video = jnp.einsum(
                'at,bh,cw,thwe->abce',
                *(m.astype(np.float32) for m in (time, rows, cols)),
                table[m:].reshape(t0, h0, w0, e),
                precision='highest',
            ).reshape(-1, e)
            positions = jnp.concatenate([text.astype(np.float32) @ table[:m], video])
        elif not cfg.rotary:
            positions = embeddings.sincos_positions(
                layout,
                cfg.width,
                cfg.base_grid,
                cfg.position_rule,
                cfg.temporal_interpolation_scale,
                cfg.spatial_interpolation_scale,
            )
        else:
            return x
        return x + positions.astype(x.dtype)
