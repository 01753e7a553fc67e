"""Scene attention on TPU by splash kernels (tokamax's, or JAX's own), without an L x L array.

The mask is Mask²DiT's (section 3.2), and the result is exact. Inside, a sequence is ordered [video,
text, padding] and padded to whole blocks, so that everything that is not video lies in the last
blocks. Whether a block of the mask is all true, all false or mixed is read off the segments that it
touches, for all blocks at once and never off their (query, key) pairs; in a mixed block the kernel
computes the mask from positions.

The mask is computed by comparisons alone: kernels on the TPU have no fast integer division.
"""

import copy
import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from mask2dit_jax import hardware
from mask2dit_jax.attention import masks
from mask2dit_jax.layout import TAIL, TEXT, VIDEO, SceneLayout, Segment

KERNELS = ('tokamax', 'jax')
_LANES = 128

# Pairs of blocks that one call may visit: tokamax's table takes 13 bytes for each of them, of the
# chip's 1 MiB of scalar memory. The queries of a longer sequence are split over several calls.
_MAX_PAIRS = 72_000


@dataclasses.dataclass(frozen=True)
class _KernelSequence:
    """The sequence as kernels see it: every scene's video, then every caption, then padding.

    Segments are counted in this order: the video of scene i is segment i, its caption is segment
    S + i, and the padding is segment 2S. Where videos have tails, every number stands for two
    segments, the second one a video's tail, or nothing behind a caption. _visible_pairs relies on
    these numbers.
    """

    layout: SceneLayout
    block: int

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The layout's keys in the order of kernels; start and stop remain the layout's.

        The captions of remembered scenes are among them, without tokens, and tails that scenes are
        too short for.
        """
        there = {(segment.scene, segment.kind): segment for segment in self.layout.key_segments}

        def found(scene, kind):
            return there.get((scene, kind), Segment(scene, kind, 0, 0))

        scenes = range(self.layout.num_scenes)
        if self.per_part == 1:
            return tuple(found(scene, kind) for kind in (VIDEO, TEXT) for scene in scenes)
        videos = [found(scene, kind) for scene in scenes for kind in (VIDEO, TAIL)]
        nothing = [Segment(scene, TEXT, 0, 0) for scene in scenes]
        captions = [(found(scene, TEXT), nothing[scene]) for scene in scenes]
        return (*videos, *itertools.chain(*captions))

    @property
    def per_part(self) -> int:
        """Segments of a video, and of a caption."""
        return 1 if self.layout.lead is None else 2

    @property
    def first_query(self) -> int:
        """Where the queries begin, so that they fill whole blocks up to the sequence's end.

        Before the first one may be others, whose results nobody needs.
        """
        length = self.starts[-1]
        num_blocks = -(-(length - self.layout.num_remembered) // self.block)
        return length - num_blocks * self.block

    @property
    def starts(self) -> tuple[int, ...]:
        """First token of each segment and of the padding, and the length of the whole."""
        starts = [0]
        for segment in self.segments:
            starts.append(starts[-1] + segment.length)

        num_blocks = -(-starts[-1] // self.block)
        return (*starts, num_blocks * self.block)

    def visible(self, pattern: str) -> np.ndarray:
        """True where a query of segment i may see a key of segment j; the padding is the last one.

        No query sees a key of the padding. The queries of the padding see all other keys, since
        softmax over no keys at all would be 0 / 0.
        """
        scene = np.array([segment.scene for segment in self.segments])
        kind = np.array([segment.kind for segment in self.segments])

        size = len(self.segments) + 1
        table = np.zeros((size, size), bool)
        table[:-1, :-1] = masks.may_attend(
            pattern, scene[:, None], kind[:, None], scene[None], kind[None]
        )
        table[-1, :-1] = True
        return table


# What a block of the mask is; the libraries use the same numbers.
EMPTY, MIXED, WHOLE = range(3)


class SceneMask:
    """The mask of a pattern, for some of the queries and all keys.

    It is `mask[rows, columns]`, a table of blocks, and a function of positions. A window that is
    uniform comes back as a single value.

    Args:
      sequence: the sequence as kernels see it.
      pattern: one of masks.PATTERNS.
      queries: first and one-past-last token of the queries, which are the mask's rows.
    """

    def __init__(self, sequence: _KernelSequence, pattern: str, queries: tuple[int, int]):
        self._key = sequence, pattern, queries
        self._starts = np.array(sequence.starts)
        self._visible = sequence.visible(pattern)
        self._offsets = queries[0], 0  # of rows and of columns

        segments = np.arange(len(self._visible))
        lengths = np.diff(self._starts)
        self._segment_of = np.repeat(segments, lengths).astype(np.int32)  # [padded L]

        # The kernel holds one number per query, which is the query's segment; for keys it has
        # their positions.
        self.q_sequence = self._segment_of[slice(*queries)]  # see _with_traced_queries
        self.mask_function = functools.partial(
            _visible_pairs,
            pattern,
            sequence.layout.num_scenes,
            sequence.per_part,
            sequence.starts,
        )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q_sequence), len(self._segment_of)

    def __getitem__(self, index):
        rows, columns = (self._tokens(window, axis=axis) for axis, window in enumerate(index))
        first_row, last_row = self._touched(rows)
        first_column, last_column = self._touched(columns)
        touched = self._visible[first_row:last_row, first_column:last_column]

        if touched.all() or not touched.any():
            return touched[:1, :1]
        return self._visible[self._segment_of[rows][:, None], self._segment_of[columns][None]]

    def blocks(self, block: int) -> np.ndarray:
        """EMPTY, MIXED or WHOLE for every block of the mask, int8 [rows, columns].

        Args:
          block: tokens per block, of which the rows and the columns are multiples.
        """
        first_row, last_row = self._touched_by_blocks(block, axis=0)
        first_column, last_column = self._touched_by_blocks(block, axis=1)

        # Pairs of segments before (i, j) that see each other; four of these sums tell how many of
        # the pairs that a block touches do.
        before = np.pad(self._visible.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        upper = before[last_row][:, last_column] - before[last_row][:, first_column]
        lower = before[first_row][:, last_column] - before[first_row][:, first_column]
        seen = upper - lower
        touched = np.outer(last_row - first_row, last_column - first_column)
        return np.where(seen == touched, WHOLE, np.where(seen > 0, MIXED, EMPTY)).astype(np.int8)

    def _touched_by_blocks(self, block: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """First and one-past-last segment that each block of rows (or of columns) meets."""
        start = self._offsets[axis] + np.arange(0, self.shape[axis], block)
        first = np.searchsorted(self._starts, start, 'right') - 1
        last = np.searchsorted(self._starts, start + block - 1, 'right')
        return first, last

    def _tokens(self, window: slice, axis: int) -> slice:
        """The tokens of the sequence that a slice of the mask's rows (or columns) stands for."""
        start, stop, _ = window.indices(self.shape[axis])
        return slice(self._offsets[axis] + start, self._offsets[axis] + stop)

    def _touched(self, tokens: slice) -> tuple[int, int]:
        """First and one-past-last segment that a range of tokens meets."""
        first, last = np.searchsorted(self._starts, (tokens.start, tokens.stop - 1), 'right')
        return int(first) - 1, int(last)

    def __eq__(self, other):
        return type(other) is type(self) and self._key == other._key

    def __hash__(self):
        return hash(self._key)


def _visible_pairs(
    pattern: str, num_scenes: int, per_part: int, starts: tuple[int, ...], q_segment, k_position
):
    """The predicate between the segments of queries and the positions of keys.

    Args:
      pattern: one of masks.PATTERNS.
      num_scenes: S; segments are counted as in _KernelSequence.
      per_part, starts: of _KernelSequence.
      q_segment, k_position: int32 arrays that broadcast.
    """
    first_text = per_part * num_scenes

    def scene_and_kind(segment):
        is_text = (segment >= first_text).astype(jnp.int32)
        part = segment - first_text * is_text
        if per_part == 1:
            return part, is_text
        return part >> 1, is_text - (segment & 1)  # nothing with a token is behind a caption

    # A key's segment is the number of segments after the first that begin at or before the key.
    k_segment = sum((k_position >= start).astype(jnp.int32) for start in starts[1:-1])

    seen = masks.may_attend(pattern, *scene_and_kind(q_segment), *scene_and_kind(k_segment))

    q_is_padding = q_segment == 2 * first_text
    return (seen | q_is_padding) & (k_position < starts[-2])


class _Uniform:
    """A window of one value. A numpy array of it would take most of the time to tell the value."""

    def __init__(self, value: bool):
        self._value = value

    def any(self) -> bool:
        return self._value

    def all(self) -> bool:
        return self._value


# One window for each kind of block.
_WINDOWS = {
    EMPTY: _Uniform(False),
    MIXED: np.array([[True, False]]),
    WHOLE: _Uniform(True),
}


class _BlockMask(splash_attention_mask.Mask):
    """A SceneMask as both splash libraries take it.

    They ask for every block, several times, whether it is all true or all false, and no more than
    that: the kernel computes mixed blocks by `mask_function`. So every block comes back as one of
    _WINDOWS.
    """

    def __init__(self, mask: SceneMask, block: int):
        self._key = mask, block
        self._block = block
        self._kinds = mask.blocks(block).tolist()  # lists are quicker to read one by one
        self._shape = mask.shape
        self.q_sequence = mask.q_sequence
        self.mask_function = mask.mask_function

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def __getitem__(self, index):
        rows, columns = index
        return _WINDOWS[self._kinds[rows.start // self._block][columns.start // self._block]]

    def __eq__(self, other):
        return type(other) is type(self) and self._key == other._key

    def __hash__(self):
        return hash(self._key)


@functools.lru_cache(maxsize=64)
def _tokamax_kernel(mask: SceneMask, block: int, interpret):
    """tokamax's kernel for one example: a function of q, k and v [N, padded L, D]."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash

    config = splash.SplashConfig(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        # dq is summed over blocks of keys in three slots. Without this option the kernel takes one
        # float32 copy of dq per block of keys.
        dq_reduction_steps=3,
        residual_checkpoint_name='attention',
        interpret=interpret,
    )
    return splash.make_splash_mha_single_device(_BlockMask(mask, block), config=config)


@functools.lru_cache(maxsize=64)
def _jax_kernel(mask: SceneMask, num_heads: int, block: int, interpret):
    """JAX's kernel for one example: a function of q, k and v [N, padded L, D]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    return splash.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([_BlockMask(mask, block)] * num_heads),
        block_sizes=sizes,
        interpret=interpret,
        residual_checkpoint_name='attention',
    )


def _with_traced_queries(kernel, sequence: _KernelSequence, queries: tuple[int, int]):
    """The kernel with its queries' segments computed in the program.

    As the libraries have them they are constants of the program, one number for each token in each
    direction.
    """
    starts = np.array(sequence.starts[1:-1], np.int32)
    token = jnp.arange(*queries, dtype=jnp.int32)[:, None]
    segment = jnp.sum(token >= starts, axis=1, dtype=jnp.int32)  # [queries]

    # Where every query sees every key tokamax drops the mask, and then wants no queries either.
    if kernel.fwd_mask_info.block_mask is None:
        segment = None

    kernel = copy.copy(kernel)
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(q_sequence=segment)
    kernel.dkv_mask_info = kernel.dkv_mask_info._replace(q_sequence=segment)
    return kernel


def block_of_chip() -> int:
    """Tokens per block for the chip that is being traced for.

    Raises:
      ValueError: if the kernels do not run on the device.
    """
    # When a program is compiled ahead of time the chip is the mesh's, and none is attached.
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device else jax.devices()[0].device_kind

    blocks = {chip.device_kind: chip.splash_block for chip in hardware.CHIPS.values()}
    if kind not in blocks:
        raise ValueError(
            f'Splash attention runs on {", ".join(blocks)}, not on {kind!r}: '
            'set model.attention_backend to blockwise (any device) or cudnn (GPU).'
        )
    return blocks[kind]


class VisitedBlocks(NamedTuple):
    """The blocks of the mask that kernels visit.

    Attributes:
      block: tokens per block.
      visible: wholly visible blocks of keys per block of queries, on average.
      evaluated: blocks of keys whose mask is evaluated, per block of queries, on average.
    """

    block: int
    visible: float
    evaluated: float


def _fit(block: int, layout: SceneLayout) -> int:
    """Tokens per block for this sequence: fewer if the whole sequence fills less than a block."""
    num_keys = layout.num_remembered + layout.num_tokens
    return min(block, -(-num_keys // _LANES) * _LANES)


def query_edges(layout: SceneLayout, block: int) -> list[int]:
    """Where the queries of each call begin, in the kernels' order, and where the last one ends."""
    block = _fit(block, layout)
    sequence = _KernelSequence(layout, block)
    start, length = sequence.first_query, sequence.starts[-1]
    num_queries = (length - start) // block
    num_calls = -(-(num_queries * (length // block)) // _MAX_PAIRS)
    return [start + block * (num_queries * i // num_calls) for i in range(num_calls + 1)]


def visited_blocks(layout: SceneLayout, pattern: str, block: int) -> VisitedBlocks:
    """Counts the blocks that kernels visit.

    Args:
      layout: the sequence.
      pattern: one of masks.PATTERNS.
      block: tokens per block of queries and of keys, a multiple of 128.
    """
    block = _fit(block, layout)
    sequence = _KernelSequence(layout, block)
    queries = sequence.first_query, sequence.starts[-1]
    blocks = SceneMask(sequence, pattern, queries).blocks(block)
    visible = np.mean(np.sum(blocks == WHOLE, axis=1))
    evaluated = np.mean(np.sum(blocks == MIXED, axis=1))
    return VisitedBlocks(block, float(visible), float(evaluated))


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
      q, k, v, layout, pattern: as in attend.attend.
      block: tokens per block of queries and of keys, a multiple of 128.
      kernel: one of KERNELS; tokamax evaluates the mask only in blocks that need it.
      interpret: run the kernel on any device, slowly; pltpu.InterpretParams() also models the
        chip's memory, without which tokamax's dq is wrong from the fourth block of keys on.

    Returns:
      [B, L, N, D] in q's dtype.
    """
    block = _fit(block, layout)
    sequence = _KernelSequence(layout, block)
    edges = query_edges(layout, block)
    start, length = edges[0], edges[-1]
    filled = layout.num_remembered - start  # queries before those that are asked for
    end = layout.num_remembered + layout.num_tokens

    def to_kernel(x, before):
        """[B, L, N, D] to [B, N, padded L, D] in the order of kernels."""
        video = x[:, layout.num_text :]
        text = x[:, : layout.num_text]
        padding = ((0, 0), (before, length - end), (0, 0), (0, 0))
        return jnp.pad(jnp.concatenate([video, text], axis=1), padding).swapaxes(1, 2)

    q = to_kernel(q * q.shape[-1] ** -0.5, filled)
    k = to_kernel(k, 0)
    v = to_kernel(v, 0)
    outs = []
    for queries in itertools.pairwise(edges):
        # The mask is a constant: its tables must not become tracers of the layer that asked first.
        with jax.ensure_compile_time_eval():
            mask = SceneMask(sequence, pattern, queries)
            if kernel == 'tokamax':
                run = _tokamax_kernel(mask, block, interpret)
            else:
                run = _jax_kernel(mask, q.shape[1], block, interpret)
        run = _with_traced_queries(run, sequence, queries)
        first, last = queries[0] - start, queries[1] - start
        outs.append(jax.vmap(run)(q[:, :, first:last], k, v))

    out = jnp.concatenate(outs, axis=2).swapaxes(1, 2)  # [B, padded L, N, D]
    out = out[:, filled : filled + layout.num_tokens]
    text = out[:, layout.num_video :]
    video = out[:, : layout.num_video]
    return jnp.concatenate([text, video], axis=1)
