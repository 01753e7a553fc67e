"""The CogVideoX transformer with the two masks of Mask²DiT, at any size.

One forward pass serves everything: `t` holds one timestep per latent frame, and every token is
modulated by the timestep of its own frame (Mask²DiT, section 3.3: given scenes are clean, at
timestep 0). Pretraining, conditional training, diffusion forcing and auto-regressive extension
differ only in `t` and in the loss mask.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mask2dit_jax import layout as layout_lib
from mask2dit_jax import ranges
from mask2dit_jax.attention import attend, kv_cache, masks
from mask2dit_jax.distributed import context_parallel, partitioning
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.layout import VIDEO, SceneLayout
from mask2dit_jax.models import embeddings


class RematNames(NamedTuple):
    """Named values that the backward pass does not compute again."""

    saved: tuple[str, ...] = ()  # on the device
    offloaded: tuple[str, ...] = ()  # in the host's memory


# By DiTConfig.remat; None computes nothing again. The names are those given to checkpoint_name.
REMAT = {
    'none': None,
    'full': RematNames(),
    'save_attention': RematNames(saved=('attention',)),
    'save_matmuls': RematNames(saved=('attention', 'matmul')),
    'offload_attention': RematNames(offloaded=('attention',)),
    'offload_layer': RematNames(offloaded=('layer',)),
}


# Words that fields of DiTConfig may have.
POSITION_RULES = ('continuous', 'reference')
DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Architecture of the transformer; defaults are CogVideoX-5B's.

    Names follow the released config.json where it has one.

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
      learned_positions: learned additive positions, alone or on top of rotary ones (5B-I2V).
      position_rule: 'continuous' counts frames straight through scenes of any number and length,
        and starts a learned table anew in every scene; 'reference' stretches one clip's table over
        all scenes as the released code does. Rotary positions are the same under both.
      scene_offset_frames: frames that rotary positions in time jump at every cut, so that the model
        sees where scenes meet; 0 is the paper's straight timeline.
      scene_phase: radians that every cut adds to the angles of rotary positions in time.
      pattern: attention mask: 'dual' (the paper's: a caption touches only its own scene, and all
        video tokens see each other), 'full' (no mask), 'isolated' (a scene sees only itself) or
        'causal' (as dual, but video does not see the video of later scenes).
      lead_frames: latent frames at the beginning of a scene that the other scenes which may see it
        do see, under 'dual' and 'causal'; None for all. With it attention to other scenes costs so
        many frames of each.
      attention_backend: implementation of attention: 'blockwise' and 'dense' run anywhere, 'splash'
        and 'jax_splash' on TPU, 'cudnn' on GPU.
      dtype: compute dtype, 'float32' or 'bfloat16'; parameters are float32 whatever it is.
      remat: what the backward pass computes again: 'none', 'full' (every layer, from its input),
        'save_attention' (all but attention), 'save_matmuls' (neither attention nor matmuls; on a
        CPU this is faster than 'none', because it moves less), 'offload_attention' (as
        save_attention, but attention is kept in host memory) or 'offload_layer' (every layer, whose
        input is kept in host memory).
    """

    num_layers: int = ranges.whole(42, least=1)
    num_attention_heads: int = ranges.whole(48, least=1)
    attention_head_dim: int = ranges.whole(64, least=1)
    in_channels: int = ranges.whole(16, least=1)
    out_channels: int = ranges.whole(16, least=1)
    text_embed_dim: int = ranges.whole(4096, least=1)
    time_embed_dim: int = ranges.whole(512, least=1)
    max_text_seq_length: int = ranges.whole(226, least=1)
    patch_size: int = ranges.whole(2, least=1)
    patch_size_t: int | None = ranges.whole(None, least=1, or_none=True)
    patch_bias: bool = ranges.switch(True)
    sample_height: int = ranges.whole(60, least=1)
    sample_width: int = ranges.whole(90, least=1)
    sample_frames: int = ranges.whole(49, least=1)
    temporal_compression_ratio: int = ranges.whole(4, least=1)
    flip_sin_to_cos: bool = ranges.switch(True)
    freq_shift: int = ranges.whole(0, least=0)
    attention_bias: bool = ranges.switch(True)
    norm_elementwise_affine: bool = ranges.switch(True)
    norm_eps: float = ranges.real(1e-5, above=0)
    spatial_interpolation_scale: float = ranges.real(1.875, above=0)
    temporal_interpolation_scale: float = ranges.real(1.0, above=0)
    rotary: bool = ranges.switch(True)
    learned_positions: bool = ranges.switch(False)
    position_rule: str = ranges.word('continuous', POSITION_RULES)
    scene_offset_frames: float = ranges.real(0.0)
    scene_phase: float = ranges.real(0.0)
    pattern: str = ranges.word('dual', masks.PATTERNS)
    lead_frames: int | None = ranges.whole(None, least=1, or_none=True)
    attention_backend: str = ranges.word('blockwise', attend.BACKENDS)
    dtype: str = ranges.word('bfloat16', DTYPES)
    remat: str = ranges.word('none', REMAT)

    def __post_init__(self):
        ranges.refuse(ranges.problems(DiTConfig, vars(self), 'model.') or conflicts(self))

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def base_grid(self) -> tuple[int, int, int]:
        """Trained latent frames, token rows and token columns (T0, H0, W0)."""
        return (
            (self.sample_frames - 1) // self.temporal_compression_ratio + 1,
            self.sample_height // self.patch_size,
            self.sample_width // self.patch_size,
        )

    def whole_patches(self, frames: tuple[int, ...]) -> layout_lib.WholePatches:
        """Scenes of these latent frames, filled up to whole tokens: see layout.whole_patches."""
        return layout_lib.whole_patches(frames, self.patch_size_t or 1)

    def layout(self, frames: tuple[int, ...], height: int, width: int) -> SceneLayout:
        """Layout of a story in this model's token space.

        Args:
          frames: latent frames per scene.
          height, width: latent height and width.

        Returns:
          The layout.

        Raises:
          ValueError: if the size is not a multiple of the patch size.
        """
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f'Latent size {height}x{width} is not a multiple of patch_size {self.patch_size}.'
            )

        return SceneLayout(
            frames=tuple(frames),
            height=height // self.patch_size,
            width=width // self.patch_size,
            text_tokens=self.max_text_seq_length,
            patch_t=self.patch_size_t or 1,
            lead=self.lead_frames and -(-self.lead_frames // (self.patch_size_t or 1)),
        )


def conflicts(cfg: DiTConfig) -> list[str]:
    """Says which fields, all of them in their ranges, do not fit each other."""
    found = []

    if cfg.lead_frames and cfg.pattern not in ('dual', 'causal'):
        found.append(
            f'model.lead_frames {cfg.lead_frames} says what other scenes see of a scene, which the '
            f'pattern {cfg.pattern!r} says already: leave one of them.'
        )

    remat = REMAT[cfg.remat]
    keeps_attention = remat is not None and 'attention' in remat.saved + remat.offloaded
    if cfg.attention_backend == 'cudnn' and keeps_attention:
        found.append(
            f'model.remat {cfg.remat!r} does not work with the cudnn backend, because the '
            'statistics of its softmax cannot be kept: use full, offload_layer or none.'
        )

    # Rotary and sin-cos features divide a head into sixteenths.
    needs_sixteenths = cfg.rotary or not cfg.learned_positions
    if needs_sixteenths and cfg.attention_head_dim % 16:
        found.append(
            f'model.attention_head_dim must be a multiple of 16, got {cfg.attention_head_dim}.'
        )

    for name in ('scene_offset_frames', 'scene_phase'):
        if getattr(cfg, name) and not cfg.rotary:
            found.append(
                f'model.{name} {getattr(cfg, name)} is about rotary positions, which this model '
                'does not have: set it to 0.'
            )

    half_width = cfg.num_attention_heads * cfg.attention_head_dim // 2
    if cfg.freq_shift >= half_width:
        found.append(
            f'model.freq_shift {cfg.freq_shift} must be below half of num_attention_heads x '
            f'attention_head_dim, {half_width}.'
        )
    return found


def cache_conflict(cfg: DiTConfig) -> str:
    """Says why keys and values of scenes depend on later scenes, so that they cannot be kept.

    Empty if they do not.
    """
    if cfg.pattern not in kv_cache.PATTERNS:
        return (
            f'A cache of keys and values is exact under the patterns {", ".join(kv_cache.PATTERNS)}'
            f' alone, not under {cfg.pattern!r}, where given scenes see later ones.'
        )
    if cfg.position_rule == 'reference' and (cfg.learned_positions or not cfg.rotary):
        return (
            "position_rule 'reference' stretches positions over all scenes, so that a new one moves"
            " those before it and no cache of them is exact: use 'continuous'."
        )
    return ''


def patchify(x, layout: SceneLayout, patch: int):
    """Cuts latents into tokens.

    Args:
      x: [B, T, H, W, C].
      layout: the story's layout, in tokens.
      patch: rows and columns of a patch, p; the layout knows the frames of a patch, pt.

    Returns:
      [B, num_video, C·pt·p·p], features in (channel, frame, row, column) order.
    """
    batch, _, height, width, channels = x.shape
    patch_t = layout.patch_t

    # A patch must not reach into the next scene, so every scene is padded to whole patches.
    if layout.frames != tuple(frames * patch_t for frames in layout.token_frames):
        starts = np.cumsum((0, *layout.frames))
        scenes = []
        for start, frames in zip(starts, layout.frames):
            scene = x[:, start : start + frames]
            missing = -frames % patch_t
            scenes.append(jnp.pad(scene, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0))))
        x = jnp.concatenate(scenes, axis=1)

    x = x.reshape(batch, -1, patch_t, height // patch, patch, width // patch, patch, channels)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)  # [B, T/pt, H/p, W/p, C, pt, p, p]
    return x.reshape(batch, layout.num_video, channels * patch_t * patch * patch)


def unpatchify(x, layout: SceneLayout, patch: int):
    """Inverse of `patchify`; frames that only pad a scene are cut off.

    Args:
      x: [B, num_video, C·pt·p·p].
      layout, patch: as for `patchify`.

    Returns:
      [B, T, H, W, C].
    """
    batch = x.shape[0]
    patch_t = layout.patch_t
    token_frames = sum(layout.token_frames)

    x = x.reshape(batch, token_frames, layout.height, layout.width, -1, patch_t, patch, patch)
    channels = x.shape[4]
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)  # [B, T/pt, pt, H/p, p, W/p, p, C]
    x = x.reshape(batch, -1, layout.height * patch, layout.width * patch, channels)

    starts = np.cumsum((0, *layout.token_frames)) * patch_t
    keep = np.concatenate(
        [np.arange(start, start + frames) for start, frames in zip(starts, layout.frames)]
    )
    return x if len(keep) == x.shape[1] else x[:, keep]


class _Dense(nn.Module):
    """Dense layer whose kernel is gathered axis by axis on a mesh."""

    features: int
    dtype: jnp.dtype
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        inputs = x.shape[-1]
        kernel = self.param('kernel', self.kernel_init, (inputs, self.features), jnp.float32)
        name = '/'.join((*self.path, 'kernel'))
        kernel = partitioning.gather_context(kernel.astype(self.dtype), name)

        # XLA's CPU backend computes the weight gradient twice as fast if the leading axes are one.
        # Where both examples and tokens are spread over devices, that one axis could not be spread.
        context_devices = mesh_lib.mesh_axes().get('context', 1)
        flat = x.reshape(-1, inputs) if context_devices == 1 else x
        y = checkpoint_name(flat.astype(self.dtype) @ kernel, 'matmul')

        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


def _layer_norm(eps: float, affine: bool, name: str | None = None):
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
    """Picks rows of tables [B, K, E] by one-hot rows [L, K]; returns [B, L, E].

    The product is exact, shards over tokens, and its gradient needs no scatter.
    """
    return jnp.einsum('lk,bke->ble', one_hot, table, precision='highest')


def _pick_rows_forward(one_hot, table):
    return _pick_rows(one_hot, table), one_hot


def _pick_rows_backward(one_hot, cotangent):
    """The derivative, in an order of axes that needs no transposed copy of the cotangent.

    The derivative that JAX makes of the einsum does need one.
    """
    return None, jnp.einsum('lk,ble->bke', one_hot, cotangent, precision='highest')


_pick_rows.defvjp(_pick_rows_forward, _pick_rows_backward)


class _Affine(nn.Module):
    """Scale and bias [E] of a LayerNorm."""

    features: int

    @nn.compact
    def __call__(self):
        scale = self.param('scale', nn.initializers.ones, (self.features,), jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32)
        return scale, bias


class _Times(NamedTuple):
    """Embeddings of the timesteps of a sequence, and which of them every token has.

    Attributes:
      emb: [B, F + S, Et], of the frames of tokens and then of the captions, if there are any.
      rows: int32 [L], which of them every token has.
    """

    emb: jax.Array
    rows: jax.Array


class _AdaLayerNorm(nn.Module):
    """adaLN: every token is shifted and scaled by the vectors of its own timestep.

    Returns the modulated tokens [B, L, E] and, if `parts` is 3, the gate [B, L, E].
    """

    cfg: DiTConfig
    num_frames: int  # F
    parts: int  # vectors per timestep: shift and scale; 3: also a gate

    @nn.compact
    def __call__(self, x, times: _Times):
        cfg = self.cfg
        dtype = jnp.dtype(cfg.dtype)
        width = cfg.width
        batch, num_times = times.emb.shape[:2]
        kinds = 1 + (num_times > self.num_frames)

        # A table of the vectors of every timestep; video and text have weights of their own.
        linear = _Dense(
            kinds * self.parts * width,
            dtype=dtype,
            kernel_init=nn.initializers.zeros,
            name='linear',
        )
        table = linear(nn.silu(times.emb)).reshape(batch, num_times, kinds, self.parts, width)
        of_frames, of_captions = jnp.split(table, [self.num_frames], axis=1)
        table = jnp.concatenate([of_frames[:, :, 0], of_captions[:, :, -1]], axis=1)
        shift, scale, *gate = jnp.moveaxis(table, 2, 0)  # [B, F + S, E] each
        scale = 1 + scale

        # The norm's own scale and bias are merged into these few vectors, which is cheaper than to
        # apply them to all tokens.
        if cfg.norm_elementwise_affine:
            norm_scale, norm_bias = _Affine(width, name='norm')()
            shift = shift + scale * norm_bias
            scale = scale * norm_scale

        # Every token picks the vectors of its timestep.
        one_hot = jax.nn.one_hot(times.rows, num_times, dtype=dtype)  # [L, F + S]
        shift, scale, *gate = (
            _pick_rows(one_hot, vectors.astype(dtype)) for vectors in (shift, scale, *gate)
        )  # [B, L, E] each

        y = _layer_norm(cfg.norm_eps, affine=False)(x)
        return (y * scale + shift).astype(dtype), *gate


def _rows(x, ranges: list[tuple[int, int]], axis: int = 0):
    """The rows of x in these (start, stop) ranges, one range after the other."""
    parts = [jax.lax.slice_in_dim(x, start, stop, axis=axis) for start, stop in ranges]
    return jnp.concatenate(parts, axis=axis) if parts else x[:0]


class _Attention(nn.Module):
    """Multi-head attention with normed q and k, rotary positions and the scene mask.

    Returns the result [B, L, E], and what a cache of this layer's video needs.
    """

    cfg: DiTConfig
    layout: SceneLayout
    pattern: str

    @nn.compact
    def __call__(self, x, rope, cache):
        cfg = self.cfg
        layout = self.layout
        dtype = jnp.dtype(cfg.dtype)
        dense = functools.partial(_Dense, cfg.width, dtype=dtype)

        heads = (*x.shape[:2], cfg.num_attention_heads, cfg.attention_head_dim)
        q = dense(use_bias=cfg.attention_bias, name='to_q')(x).reshape(heads)  # [B, L, N, D]
        k = dense(use_bias=cfg.attention_bias, name='to_k')(x).reshape(heads)
        v = dense(use_bias=cfg.attention_bias, name='to_v')(x).reshape(heads)

        q = _layer_norm(1e-6, True, 'norm_q')(q).astype(dtype)
        k = _layer_norm(1e-6, True, 'norm_k')(k).astype(dtype)
        seen = [(part.start, part.stop) for part in layout.segments if part.kind == VIDEO]
        video = kv_cache.KVCache(
            *(_rows(c.reshape(x.shape), seen, axis=1) for c in (k, v))  # [B, L, N·D]
        )
        if cache is not None:
            # Both halves of guidance may share what is remembered.
            copies = len(x) // len(cache.keys)
            cache = jax.tree.map(
                lambda c: jnp.concatenate([c.reshape(*c.shape[:2], *heads[2:])] * copies), cache
            )
        if rope is not None:
            q = embeddings.apply_rope(q, *rope.tokens)
            k = embeddings.apply_rope(k, *rope.tokens)
            if cache is not None:
                cache = cache._replace(keys=embeddings.apply_rope(cache.keys, *rope.remembered))

        # Attention has no parameters, and some kernels run only on their chip, while parameters are
        # also made on other devices.
        if self.is_initializing():
            out = v
        else:
            out = attend.attend(q, k, v, layout, self.pattern, cfg.attention_backend, cache)
        return dense(name='to_out')(out.reshape(x.shape)), video


class _Block(nn.Module):
    """One transformer block; text and video share all weights but the adaLN vectors."""

    cfg: DiTConfig
    layout: SceneLayout
    pattern: str
    remembers: bool

    @nn.compact
    def __call__(self, x, times, rope, cache):
        cfg = self.cfg
        dtype = jnp.dtype(cfg.dtype)
        x = checkpoint_name(partitioning.constrain_tokens(x), 'layer')  # [B, L, E]

        frames = sum(self.layout.token_frames[self.layout.remembered :])

        h, gate = _AdaLayerNorm(cfg, frames, parts=3, name='norm1')(x, times)
        attention = _Attention(cfg, self.layout, self.pattern, name='attn')
        h, video = attention(h, rope, cache)
        x = x + gate * h

        h, gate = _AdaLayerNorm(cfg, frames, parts=3, name='norm2')(x, times)
        h = _Dense(4 * cfg.width, dtype=dtype, name='ff_in')(h)
        h = nn.gelu(h, approximate=True)
        x = x + gate * _Dense(cfg.width, dtype=dtype, name='ff_out')(h)

        # Carry and output of the scan over layers.
        return x, context_parallel.spread_cache(video) if self.remembers else None


def _block_stack(cfg: DiTConfig):
    """The block as a scan over layers: one compiled body, parameters stacked on axis 0."""
    block = _Block

    remat = REMAT[cfg.remat]
    if remat is not None:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=remat.saved,
            names_which_can_be_offloaded=remat.offloaded,
            offload_src='device',
            offload_dst='pinned_host',
        )
        # Inside a scan XLA cannot merge the recomputation with the forward pass, so the barriers
        # that prevent_cse would add are not needed.
        block = nn.remat(block, policy=policy, prevent_cse=False)

    return nn.scan(
        block,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=cfg.num_layers,
        in_axes=(nn.broadcast, nn.broadcast, 0),  # a cache has an entry per layer
    )


def _token_times(t, layout: SceneLayout):
    """Timesteps of the frames of tokens [B, F] and of captions [B, S], of those of frames [B, T].

    Of several frames the greatest counts: given ones, which are clean, have less than others.
    """
    starts = np.cumsum((0, *layout.frames))[:-1]
    of_frames = []
    of_captions = []
    for start, length in zip(starts, layout.frames):
        # The last frame once more fills up patches, and the scenes that are shorter than others.
        patch = np.arange(-(-length // layout.patch_t) * layout.patch_t).reshape(-1, layout.patch_t)
        of_frames += list(start + np.minimum(patch, length - 1))
        of_captions.append(start + np.minimum(np.arange(max(layout.frames)), length - 1))
    return t[:, np.stack(of_frames)].max(2), t[:, np.stack(of_captions)].max(2)


class _Places(NamedTuple):
    """Where the scenes of a sequence stand.

    Attributes:
      layout: the layout whose positions they have.
      scenes: for every scene of the sequence, which scene of that layout it is.
    """

    layout: SceneLayout
    scenes: tuple[int, ...]

    def of_sequence(self, table):
        """The rows [L, ...] of the sequence's tokens, of those [L', ...] of the layout's."""
        layout = self.layout
        if self.scenes == tuple(range(layout.num_scenes)):
            return table
        ranges = [layout.text_range(scene) for scene in self.scenes]
        ranges += [layout.video_range(scene) for scene in self.scenes]
        return _rows(table, ranges)


class RotaryTables(NamedTuple):
    """Cosines and sines [L, D] each, of the tokens of a sequence and of remembered video."""

    tokens: tuple[jax.Array, jax.Array]
    remembered: tuple[jax.Array, jax.Array]


class DiT(nn.Module):
    """Multi-scene diffusion transformer.

    Attributes:
      cfg: its size.
      forced: whether the scenes come twice, a clean copy and then a noisy one, under the attention
        pattern masks.FORCED: every noisy scene sees the clean ones before it, so that one pass
        learns to generate each scene of a story from those before it. Both copies stand at the
        positions of the scene.
    """

    cfg: DiTConfig
    forced: bool = False

    @nn.compact
    def __call__(
        self,
        latents,
        text,
        t,
        frames: tuple[int, ...],
        cache: kv_cache.KVCache | None = None,
        remembers: bool = False,
    ):
        """Predicts the velocity.

        Args:
          latents: [B, T, H, W, C], scenes concatenated along T.
          text: [B, S, M, text_embed_dim] caption embeddings.
          t: [B, T], one timestep per latent frame (0 for given scenes), or [B, S], one for all
            frames of each scene. A caption has that of the frames of its scene that are to be
            denoised, which is their greatest.
          frames: static, latent frames per scene; their sum is T. With a cache those of the
            remembered scenes come first, and are not among T and S. If `forced`, two for each
            scene of the story, a clean and a noisy copy, as layout.twice makes them.
          cache: of the video of scenes before these, [layers, B or a divisor of it, L, N·D] each.
          remembers: static, whether a cache of these scenes is returned, too.

        Returns:
          The predicted v, float32 [B, T, H, W, out_channels]; with `remembers` also a KVCache.

        Raises:
          ValueError: if there is or shall be a cache and it would not be exact.
        """
        cfg = self.cfg
        dtype = jnp.dtype(cfg.dtype)
        batch, num_scenes = text.shape[:2]
        layout = cfg.layout(frames, *latents.shape[2:4])
        layout = dataclasses.replace(layout, remembered=len(frames) - num_scenes)
        own_scenes = cfg.layout(frames[layout.remembered :], *latents.shape[2:4])
        if self.forced:
            story = cfg.layout(frames[::2], *latents.shape[2:4])
            places = _Places(story, tuple(scene // 2 for scene in range(num_scenes)))
        else:
            places = _Places(layout.whole, tuple(range(layout.remembered, layout.num_scenes)))
        num_text = layout.num_text
        if (cache is not None or remembers) and cache_conflict(cfg):
            raise ValueError(cache_conflict(cfg))
        chex.assert_shape(latents, (batch, own_scenes.total_frames, None, None, cfg.in_channels))
        chex.assert_shape(text, (batch, num_scenes, cfg.max_text_seq_length, cfg.text_embed_dim))
        if t.shape[1] == num_scenes:  # no other shape than [B, T] if every scene has one frame
            t = jnp.asarray(t)[:, layout_lib.frame_scenes(own_scenes.frames)]
        chex.assert_shape(t, (batch, own_scenes.total_frames))

        # One embedding per timestep.
        frame_times, caption_times = _token_times(t, own_scenes)
        emb = jnp.concatenate([frame_times, caption_times], axis=1)  # [B, F + S]
        emb = embeddings.timestep_embedding(emb, cfg.width, cfg.flip_sin_to_cos, cfg.freq_shift)
        emb = _Dense(cfg.time_embed_dim, dtype=dtype, name='time_in')(emb.astype(dtype))
        emb = nn.silu(emb)
        emb = _Dense(cfg.time_embed_dim, dtype=dtype, name='time_out')(emb)  # [B, F + S, Et]
        num_frames = frame_times.shape[1]
        frame = jnp.arange(layout.num_video) // (layout.height * layout.width)
        caption = jnp.arange(num_text) // layout.text_tokens
        times = _Times(emb, jnp.concatenate([num_frames + caption, frame]))

        # The joint sequence: all text tokens, then all video tokens.
        video = patchify(latents.astype(dtype), own_scenes, cfg.patch_size)
        patch_bias = cfg.patch_bias or cfg.patch_size_t is not None
        video = _Dense(cfg.width, use_bias=patch_bias, dtype=dtype, name='patch')(video)
        text = _Dense(cfg.width, dtype=dtype, name='text')(text.astype(dtype))
        text = text.reshape(batch, num_text, -1)
        x = jnp.concatenate([text, video], axis=1)  # [B, L, E]
        x = self._add_positions(x, places)

        rope = self._rope(places, layout.remembered_ranges) if cfg.rotary else None
        pattern = masks.FORCED if self.forced else cfg.pattern
        blocks = _block_stack(cfg)(cfg, layout, pattern, remembers, name='blocks')
        x, remembered = blocks(x, times, rope, cache)

        # Only video tokens are predicted.
        x = x[:, num_text:]
        x = _layer_norm(cfg.norm_eps, cfg.norm_elementwise_affine, 'norm_final')(x).astype(dtype)
        times = _Times(emb[:, :num_frames], frame)
        (x,) = _AdaLayerNorm(cfg, num_frames, parts=2, name='norm_out')(x, times)
        features = cfg.out_channels * layout.patch_t * cfg.patch_size**2
        x = _Dense(features, dtype=dtype, kernel_init=nn.initializers.zeros, name='proj_out')(x)
        v = unpatchify(x, own_scenes, cfg.patch_size).astype(jnp.float32)
        return (v, remembered) if remembers else v

    def _rope(self, places: _Places, remembered: list[tuple[int, int]]) -> RotaryTables:
        """Rotary tables, float32; text is not rotated."""
        cfg = self.cfg
        rule = 'linspace' if cfg.patch_size_t is None else 'slice'
        tables = embeddings.rope_table(
            places.layout,
            cfg.attention_head_dim,
            rule,
            cfg.base_grid[1:],
            cfg.scene_offset_frames,
            cfg.scene_phase,
        )
        text_rows = ((places.layout.num_text, 0), (0, 0))
        tokens = []
        for table, of_text in zip(tables, (1, 0)):
            joint = jnp.pad(table, text_rows, constant_values=of_text)
            tokens.append(partitioning.constrain_token_table(places.of_sequence(joint)))
        return RotaryTables(tuple(tokens), tuple(_rows(table, remembered) for table in tables))

    def _add_positions(self, x, places: _Places):
        """Adds sin-cos (2B) or learned (5B-I2V, tiny) positions, if the model has any."""
        cfg = self.cfg
        if cfg.learned_positions:
            positions = self._learned_positions(places.layout)
        elif not cfg.rotary:
            positions = embeddings.sincos_positions(
                places.layout,
                cfg.width,
                cfg.base_grid,
                cfg.position_rule,
                cfg.temporal_interpolation_scale,
                cfg.spatial_interpolation_scale,
            )
        else:
            return x
        return x + places.of_sequence(positions).astype(x.dtype)

    def _learned_positions(self, layout):
        """The learned table [M + T0·H0·W0, E], resampled to the joint sequence [L, E]."""
        cfg = self.cfg
        base = cfg.base_grid
        text_tokens = cfg.max_text_seq_length
        shape = (text_tokens + math.prod(base), cfg.width)
        table = self.param('positions', nn.initializers.normal(0.02), shape, jnp.float32)

        scenes_share = cfg.position_rule == 'continuous'
        weights = embeddings.resample_positions(layout, base, scenes_share)
        video = jnp.einsum(
            'at,bh,cw,thwe->abce',
            weights.time.astype(np.float32),
            weights.rows.astype(np.float32),
            weights.columns.astype(np.float32),
            table[text_tokens:].reshape(*base, cfg.width),
            precision='highest',
        ).reshape(-1, cfg.width)
        text = embeddings.interpolate(weights.text, table[:text_tokens])
        return jnp.concatenate([text, video])
