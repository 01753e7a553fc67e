"""Scene attention on TPU by splash kernels (tokamax's, or jax's own), exact and without an L x L
array.

Inside, a sequence is ordered [video, text, padding] and padded to whole blocks, so that everything
that is not video lies in the last blocks. A block of the mask is answered from the scenes that it
touches, never from its pairs; within a block that is neither all true nor all false the kernel
computes the mask from positions.

The mask is computed by comparisons alone: kernels on the TPU have no fast integer division.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from mask2dit_jax.attention import masks
from mask2dit_jax.layout import SceneLayout

KERNELS = ('tokamax', 'jax')
_LANES = 128

# Tokens per block (queries and keys), by the device kind of the chip: of v5p (TPU v5) and v6e the
# largest that compiles with the default VMEM, of v5e one that compiles; v4's is not tried.
BLOCKS = {'TPU v4': 1024, 'TPU v5': 1280, 'TPU v5 lite': 1024, 'TPU v6 lite': 1536}

# Pairs of blocks that one call may visit: tokamax's table of them takes 13 bytes each of the chip's
# 1 MiB of scalar memory. Longer sequences are called for in several parts of their queries.
_MAX_PAIRS = 72_000


@dataclasses.dataclass(frozen=True)
class _Segments:
    """The sequence as kernels see it: one segment for every scene's video, then every caption, then
    padding."""

    layout: SceneLayout
    block: int

    @property
    def starts(self) -> tuple[int, ...]:
        """First token of each segment, and the length of the whole."""
        n, s = self.layout, range(self.layout.num_scenes)
        video = [n.video_range(i)[0] - n.num_text for i in s]
        text = [n.num_video + n.text_range(i)[0] for i in s]
        return (*video, *text, n.num_tokens, -(-n.num_tokens // self.block) * self.block)

    def visible(self, pattern: str) -> np.ndarray:
        """bool [2S+1, 2S+1], true where a query of segment i may see a key of j; padding sees all,
        and none see it."""
        s = self.layout.num_scenes
        scene, is_text = np.tile(np.arange(s), 2), np.arange(2 * s) >= s
        table = np.zeros((2 * s + 1,) * 2, bool)
        table[:-1, :-1] = masks.may_attend(
            pattern, scene[:, None], is_text[:, None], scene[None], is_text[None]
        )
        table[-1, :-1] = True
        return table


class SceneMask(splash_attention_mask.Mask):
    """The mask of a pattern as both splash libraries take it: `mask[rows, columns]`, and a function
    of positions.

    A block that is uniform comes back as a single value, so that the table of blocks costs no
    pairs.

    Args:
      segments: the sequence.
      pattern: one of scenes.PATTERNS.
      queries: the tokens that ask, first and one past the last; they are the mask's rows.
    """

    def __init__(self, segments: _Segments, pattern: str, queries: tuple[int, int]):
        self._key = segments, pattern, queries
        self._starts = np.array(segments.starts)
        self._visible = segments.visible(pattern)
        self._offsets = queries[0], 0
        self._segment_of = np.repeat(np.arange(len(self._visible)), np.diff(self._starts)).astype(
            np.int32
        )
        # What the kernel holds per query is its segment; keys are positions.
        self.q_sequence = self._segment_of[slice(*queries)]
        self.mask_function = functools.partial(
            _visible_pairs, pattern, segments.layout.num_scenes, segments.starts
        )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q_sequence), len(self._segment_of)

    def __getitem__(self, index):
        index = [
            slice(*(offset + x for x in i.indices(n)[:2]))
            for i, n, offset in zip(index, self.shape, self._offsets)
        ]
        rows, columns = (self._touched(i) for i in index)
        touched = self._visible[rows[0] : rows[1], columns[0] : columns[1]]
        if touched.all() or not touched.any():
            return touched[:1, :1]
        return self._visible[self._segment_of[index[0]][:, None], self._segment_of[index[1]][None]]

    def _touched(self, tokens: slice) -> tuple[int, int]:
        """First and one-past-last segment that a range of tokens meets."""
        first, last = np.searchsorted(self._starts, (tokens.start, tokens.stop - 1), 'right')
        return int(first) - 1, int(last)

    def __eq__(self, other):
        return type(other) is type(self) and self._key == other._key

    def __hash__(self):
        return hash(self._key)


def _visible_pairs(pattern: str, num_scenes: int, starts: tuple[int, ...], q_segment, k_position):
    """The predicate between queries' segments and keys' positions, with comparisons only."""

    def scene_of(segment):
        return segment - num_scenes * (segment >= num_scenes).astype(jnp.int32)

    k_segment = sum((k_position >= s).astype(jnp.int32) for s in starts[1:-1] if s > 0)
    q_text, k_text = ((x >= num_scenes).astype(jnp.int32) for x in (q_segment, k_segment))
    seen = masks.may_attend(pattern, scene_of(q_segment), q_text, scene_of(k_segment), k_text)
    return (seen | (q_segment == 2 * num_scenes)) & (k_position < starts[-2])


@functools.lru_cache(maxsize=64)
def _tokamax_kernel(mask: SceneMask, block: int, interpret):
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash

    # dq is summed over key blocks in three slots; without that it takes one float32 copy of dq per
    # block of keys.
    config = splash.SplashConfig(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        dq_reduction_steps=3,
        residual_checkpoint_name='attention',
        interpret=interpret,
    )
    return splash.make_splash_mha_single_device(mask, config=config)


@functools.lru_cache(maxsize=64)
def _jax_kernel(mask: SceneMask, num_heads: int, block: int, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    sizes = splash.BlockSizes(block, block, block, block, block, block, use_fused_bwd_kernel=True)
    return splash.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        interpret=interpret,
        residual_checkpoint_name='attention',
    )


def block_of_chip() -> int:
    """Tokens per block for the chip that is being traced for.

    Raises:
      ValueError: if it is none that the kernels run on.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device else jax.devices()[0].device_kind
    if kind not in BLOCKS:
        raise ValueError(
            f'Splash attention runs on {", ".join(BLOCKS)}, not on {kind!r}: set model.attention_backend '
            'to blockwise (any device) or cudnn (GPU).'
        )
    return BLOCKS[kind]


def visited_blocks(layout: SceneLayout, pattern: str, block: int) -> tuple[int, float, float]:
    """What kernels visit: tokens per block, and for a block of queries, on average, the number of
    wholly visible blocks of keys and of those whose mask is evaluated."""
    block = min(block, -(-layout.num_tokens // _LANES) * _LANES)
    segments = _Segments(layout, block)
    length = segments.starts[-1]
    mask, starts = SceneMask(segments, pattern, (0, length)), range(0, length, block)
    windows = [mask[i : i + block, j : j + block] for i in starts for j in starts]
    visible, seen = sum(bool(w.all()) for w in windows), sum(bool(w.any()) for w in windows)
    return block, visible / len(starts), (seen - visible) / len(starts)


def attend(
    q,
    k,
    v,
    layout: SceneLayout,
    pattern: str,
    *,
    block: int,
    kernel: str = 'tokamax',
    interpret=False,
):
    """Attention under a scene pattern by a splash kernel on one device.

    Args:
      q, k, v, layout, pattern: as in attention.attend.
      block: tokens per block of queries and of keys, a multiple of 128.
      kernel: one of KERNELS; tokamax evaluates the mask only in blocks that need it.
      interpret: run the kernel on any device, slowly; pltpu.InterpretParams() also models the
        chip's memory, without which tokamax's dq is wrong from the fourth block of keys on.
    """
    block = min(block, -(-layout.num_tokens // _LANES) * _LANES)
    segments = _Segments(layout, block)
    padding = ((0, 0), (0, segments.starts[-1] - layout.num_tokens), (0, 0), (0, 0))

    def enter(x):  # [B, L, N, D] to [B, N, padded, D]
        x = jnp.concatenate([x[:, layout.num_text :], x[:, : layout.num_text]], axis=1)
        return jnp.pad(x, padding).swapaxes(1, 2)

    blocks = segments.starts[-1] // block
    parts = -(-(blocks**2) // _MAX_PAIRS)
    edges = [block * (blocks * i // parts) for i in range(parts + 1)]
    q, k, v = enter(q * q.shape[-1] ** -0.5), enter(k), enter(v)
    out = []
    for queries in itertools.pairwise(edges):
        # The mask is a constant: its tables must not become tracers of the layer that asked first.
        with jax.ensure_compile_time_eval():
            mask = SceneMask(segments, pattern, queries)
            run = (
                _tokamax_kernel(mask, block, interpret)
                if kernel == 'tokamax'
                else _jax_kernel(mask, q.shape[1], block, interpret)
            )
        out.append(jax.vmap(run)(q[:, :, slice(*queries)], k, v))
    out = jnp.concatenate(out, axis=2).swapaxes(1, 2)
    return jnp.concatenate(
        [out[:, layout.num_video : layout.num_tokens], out[:, : layout.num_video]], axis=1
    )
