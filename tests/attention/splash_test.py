"""Splash kernels: the mask by brute force; attention and gradients against the dense reference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mask2dit_jax.attention import dense as dense_lib
from mask2dit_jax.attention import masks, splash
from mask2dit_jax.layout import SceneLayout

LAYOUTS = [(3,), (2, 3), (1, 2, 3), (2, 1, 3, 2, 1)]


def layout_of(frames):
    return SceneLayout(frames, 6, 8, 7)


def padded_mask(layout, pattern, length):
    """The dense mask in the kernels' order: video, text, padding."""
    text = np.arange(layout.num_text)
    video = np.arange(layout.num_text, layout.num_tokens)
    order = np.concatenate([video, text])
    tokens = layout.num_tokens

    mask = np.zeros((length, length), bool)
    mask[:tokens, :tokens] = masks.dense_mask(layout, pattern)[order][:, order]
    mask[tokens:, :tokens] = True  # rows of padding must see something
    return mask


@pytest.mark.parametrize('pattern', masks.PATTERNS)
@pytest.mark.parametrize('block', [128, 384])
@pytest.mark.parametrize('frames', LAYOUTS, ids=str)
def test_mask_by_brute_force(frames, block, pattern):
    sequence = splash._KernelSequence(layout_of(frames), block)
    length = sequence.starts[-1]
    middle = length // block // 2 * block

    for queries in [(0, length), (0, middle), (middle, length)]:
        mask = splash.SceneMask(sequence, pattern, queries)
        truth = padded_mask(sequence.layout, pattern, length)[slice(*queries)]
        assert mask.shape == truth.shape

        rows = range(0, len(truth), block)
        columns = range(0, length, block)
        for row, column in itertools.product(rows, columns):
            window = slice(row, row + block), slice(column, column + block)
            answer = np.broadcast_to(mask[window], (block, block))
            np.testing.assert_array_equal(answer, truth[window])

        computed = mask.mask_function(mask.q_sequence[:, None], np.arange(length)[None])
        np.testing.assert_array_equal(computed, truth)


@pytest.mark.parametrize('seed', range(20))
def test_tables_of_blocks_by_brute_force(seed):
    """What the libraries are told of every block, for random layouts, blocks and queries."""
    rng = np.random.default_rng(seed)
    frames = tuple(rng.integers(1, 6, rng.integers(1, 6)).tolist())
    height, width, text_tokens = rng.integers(1, [9, 9, 40]).tolist()
    block = int(rng.choice([32, 96, 128, 384]))
    sequence = splash._KernelSequence(SceneLayout(frames, height, width, text_tokens), block)
    length = sequence.starts[-1]
    num_blocks = length // block
    first, last = sorted(rng.choice(num_blocks + 1, 2, replace=False).tolist())

    for pattern in masks.PATTERNS:
        truth = padded_mask(sequence.layout, pattern, length)
        windows = truth.reshape(num_blocks, block, num_blocks, block)
        all_true = windows.all(axis=(1, 3))
        mixed = windows.any(axis=(1, 3)) & ~all_true
        kinds = np.where(all_true, splash.WHOLE, np.where(mixed, splash.MIXED, splash.EMPTY))

        for start, stop in ((0, num_blocks), (first, last)):
            mask = splash.SceneMask(sequence, pattern, (start * block, stop * block))
            np.testing.assert_array_equal(mask.blocks(block), kinds[start:stop])

            # The libraries ask block by block.
            asked = splash._BlockMask(mask, block)
            for row, column in itertools.product(range(stop - start), range(num_blocks)):
                window = asked[
                    row * block : (row + 1) * block, column * block : (column + 1) * block
                ]
                kind = kinds[start + row, column]
                assert (window.any(), window.all()) == (kind > 0, kind == splash.WHOLE)


@pytest.mark.parametrize('kernel', splash.KERNELS)
def test_kernels_hold_no_numbers_of_tokens(kernel):
    """The program makes the queries' segments: those in the tables would be its constants."""
    sequence = splash._KernelSequence(layout_of((2, 1, 3, 2, 1)), 128)
    queries = (128, sequence.starts[-1])
    mask = splash.SceneMask(sequence, 'dual', queries)
    if kernel == 'tokamax':
        run = splash._tokamax_kernel(mask, 128, True)
    else:
        run = splash._jax_kernel(mask, 1, 128, True)
    traced = splash._with_traced_queries(run, sequence, queries)
    for info in (traced.fwd_mask_info, traced.dkv_mask_info):
        np.testing.assert_array_equal(info.q_sequence, mask.q_sequence)

    traced = jax.make_jaxpr(lambda: splash._with_traced_queries(run, sequence, queries))()
    sizes = [np.size(const) for const in traced.consts]
    assert max(sizes) < len(mask.q_sequence) / 4


@pytest.mark.parametrize('pattern, frames', [('full', (2, 2)), ('dual', (4,))], ids=str)
@pytest.mark.parametrize('kernel', splash.KERNELS)
def test_a_mask_that_hides_nothing(kernel, pattern, frames):
    """256 tokens that fill two blocks, without padding, and all see each other."""
    text_tokens = (256 - 4 * 48) // len(frames)
    layout = SceneLayout(frames, 6, 8, text_tokens)
    assert layout.num_tokens == 256
    assert_equals_dense(layout, pattern, kernel, True)


def test_uniform_blocks_are_not_evaluated():
    """24 scenes of the published size: 417 x 417 blocks, answered from segments."""
    block = 1024
    sequence = splash._KernelSequence(SceneLayout((13,) * 24, 30, 45, 226), block)
    length = sequence.starts[-1]
    mask = splash.SceneMask(sequence, 'dual', (0, length))

    sizes = []
    for row, column in itertools.product(range(0, length, 7 * block), repeat=2):
        window = mask[row : row + block, column : column + block]
        sizes.append(window.size)
    assert np.mean(np.array(sizes) == 1) > 0.95


@pytest.mark.parametrize('pattern', masks.PATTERNS)
def test_visited_blocks_by_brute_force(pattern):
    layout = layout_of((2, 1, 3, 2, 1))
    block, visible, evaluated = splash.visited_blocks(layout, pattern, 128)
    assert block == 128

    num_blocks = -(-layout.num_tokens // block)
    truth = padded_mask(layout, pattern, num_blocks * block)
    windows = truth.reshape(num_blocks, block, num_blocks, block)
    all_true = windows.all(axis=(1, 3))
    mixed = windows.any(axis=(1, 3)) & ~all_true
    assert visible == all_true.sum() / num_blocks
    assert evaluated == mixed.sum() / num_blocks


def forward_and_gradients(attend, q, k, v, d_out):
    """The output, dq, dk and dv."""
    out, vjp = jax.vjp(attend, q, k, v)
    return (out, *vjp(d_out))


def forward(attend, q, k, v, d_out):
    """The output alone."""
    return (attend(q, k, v),)


def assert_equals_dense(
    frames,
    pattern,
    kernel,
    interpret,
    dtype=jnp.float32,
    tolerance=3e-6,
    dim=64,
    block=128,
    run=forward_and_gradients,
):
    layout = frames if isinstance(frames, SceneLayout) else layout_of(frames)
    keys = jax.random.split(jax.random.key(0), 4)
    shape = 1, layout.num_tokens, 1, dim
    q, k, v = (jax.random.normal(key, shape, dtype) for key in keys[:3])
    d_out = jax.random.normal(keys[3], shape).astype(dtype)

    ours = functools.partial(
        splash.attend,
        layout=layout,
        pattern=pattern,
        block=block,
        kernel=kernel,
        interpret=interpret,
    )
    dense = functools.partial(dense_lib.dense, layout=layout, pattern=pattern)

    results = run(ours, q, k, v, d_out)
    expected = run(dense, q, k, v, d_out)
    for name, mine, theirs in zip(('out', 'dq', 'dk', 'dv'), results, expected):
        assert mine.dtype == theirs.dtype == dtype
        np.testing.assert_allclose(
            mine.astype(np.float32), theirs.astype(np.float32), atol=tolerance, err_msg=name
        )


# Every pattern, and every layout; their masks in every combination are tested above.
CASES = [
    *((LAYOUTS[2], pattern) for pattern in masks.PATTERNS),
    *((frames, 'dual') for frames in LAYOUTS),
]


@pytest.mark.parametrize('frames, pattern', dict.fromkeys(CASES), ids=str)
@pytest.mark.parametrize('kernel', splash.KERNELS)
def test_attention_and_gradients(kernel, frames, pattern):
    # Plain interpretation is right up to three blocks of keys; the test of dq below has more.
    block = 128 if len(frames) < 5 else 256
    assert_equals_dense(frames, pattern, kernel, True, block=block)


@pytest.mark.parametrize('frames', LAYOUTS[1::2], ids=str)
@pytest.mark.parametrize('kernel', splash.KERNELS)
def test_without_gradients(kernel, frames):
    """Without gradients another kernel runs, which keeps nothing for them."""
    assert_equals_dense(frames, 'dual', kernel, True, block=256, run=forward)


@pytest.mark.parametrize('pattern, lead', [('dual', 1), ('causal', 2)])
@pytest.mark.parametrize('kernel', splash.KERNELS)
def test_where_others_see_lead_frames_alone(kernel, pattern, lead):
    """One scene is too short for a tail."""
    layout = SceneLayout((3, 1, 2), 6, 8, 7, lead=lead)
    assert_equals_dense(layout, pattern, kernel, True)


@pytest.mark.parametrize('kernel', splash.KERNELS)
def test_bfloat16_and_heads_of_128(kernel):
    assert_equals_dense((1, 2, 3), 'dual', kernel, True, jnp.bfloat16, 3e-2, dim=128)


def test_summing_dq_in_slots_over_many_blocks():
    """Plain interpretation, without a model of the chip's memory, is wrong from four blocks on."""
    assert_equals_dense((2, 1, 3, 2, 1), 'dual', 'tokamax', pltpu.InterpretParams())


@pytest.mark.parametrize('kernel', splash.KERNELS)
def test_long_sequences_are_asked_for_in_parts(kernel, monkeypatch):
    asked = set()
    scene_mask = splash.SceneMask

    def recorded(sequence, pattern, queries):
        asked.add(queries)
        return scene_mask(sequence, pattern, queries)

    monkeypatch.setattr(splash, '_MAX_PAIRS', 5)
    monkeypatch.setattr(splash, 'SceneMask', recorded)
    assert_equals_dense((1, 2, 3), 'dual', kernel, True)
    assert asked == {(0, 128), (128, 384)}
