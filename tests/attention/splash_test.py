"""Splash kernels: the mask by brute force, and attention and its gradients as the dense reference
has them."""

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
    order = np.concatenate(
        [np.arange(layout.num_text, layout.num_tokens), np.arange(layout.num_text)]
    )
    mask = np.zeros((length, length), bool)
    mask[: layout.num_tokens, : layout.num_tokens] = masks.dense_mask(layout, pattern)[order][
        :, order
    ]
    mask[layout.num_tokens :, : layout.num_tokens] = True  # rows of padding must see something
    return mask


@pytest.mark.parametrize('pattern', masks.PATTERNS)
@pytest.mark.parametrize('frames', LAYOUTS, ids=str)
def test_mask_by_brute_force(frames, pattern):
    layout = layout_of(frames)
    for block in (128, 384):
        segments = splash._KernelSequence(layout, block)
        length = segments.starts[-1]
        for queries in [
            (0, length),
            (0, length // block // 2 * block),
            (length // block // 2 * block, length),
        ]:
            mask = splash.SceneMask(segments, pattern, queries)
            truth = padded_mask(layout, pattern, length)[slice(*queries)]
            assert mask.shape == truth.shape
            for i, j in itertools.product(range(0, len(truth), block), range(0, length, block)):
                window = slice(i, i + block), slice(j, j + block)
                np.testing.assert_array_equal(
                    np.broadcast_to(mask[window], (block, block)), truth[window]
                )
            computed = mask.mask_function(mask.q_sequence[:, None], np.arange(length)[None])
            np.testing.assert_array_equal(computed, truth)


def test_uniform_blocks_are_not_evaluated():
    """24 scenes of the published size: 417 x 417 blocks, answered from scenes."""
    layout = SceneLayout((13,) * 24, 30, 45, 226)
    segments = splash._KernelSequence(layout, 1024)
    mask = splash.SceneMask(segments, 'dual', (0, segments.starts[-1]))
    n, sizes = mask.shape[0] // 1024, []
    for i, j in itertools.product(range(0, n, 7), range(0, n, 7)):
        sizes.append(mask[i * 1024 : (i + 1) * 1024, j * 1024 : (j + 1) * 1024].size)
    assert np.mean(np.array(sizes) == 1) > 0.95


def forward_and_gradients(fn, q, k, v, weights):
    out, vjp = jax.vjp(fn, q, k, v)
    return (out, *vjp(weights))


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
    layout = layout_of(frames)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(x, (1, layout.num_tokens, 1, dim), dtype) for x in keys[:3])
    weights = jax.random.normal(keys[3], q.shape).astype(dtype)
    ours = functools.partial(
        splash.attend,
        layout=layout,
        pattern=pattern,
        block=block,
        kernel=kernel,
        interpret=interpret,
    )
    dense = functools.partial(dense_lib.dense, layout=layout, pattern=pattern)
    for name, mine, theirs in zip(
        ('out', 'dq', 'dk', 'dv'), run(ours, q, k, v, weights), run(dense, q, k, v, weights)
    ):
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
    block = (
        128 if len(frames) < 5 else 256
    )  # plain interpretation is right up to three blocks of keys, see below
    assert_equals_dense(frames, pattern, kernel, True, block=block)


@pytest.mark.parametrize('frames', LAYOUTS[1::2], ids=str)
@pytest.mark.parametrize('kernel', splash.KERNELS)
def test_without_gradients(kernel, frames):
    """A kernel of its own, which keeps nothing for them."""
    assert_equals_dense(
        frames, 'dual', kernel, True, block=256, run=lambda fn, *args: (fn(*args[:3]),)
    )


@pytest.mark.parametrize('kernel', splash.KERNELS)
def test_bfloat16_and_heads_of_128(kernel):
    assert_equals_dense((1, 2, 3), 'dual', kernel, True, jnp.bfloat16, 3e-2, dim=128)


def test_summing_dq_in_slots_over_many_blocks():
    """Without the model of the chip's memory this option is wrong from the fourth block of keys
    on."""
    assert_equals_dense((2, 1, 3, 2, 1), 'dual', 'tokamax', pltpu.InterpretParams())


@pytest.mark.parametrize('kernel', splash.KERNELS)
def test_long_sequences_are_asked_for_in_parts(kernel, monkeypatch):
    calls, real = [], splash.SceneMask
    monkeypatch.setattr(splash, '_MAX_PAIRS', 5)
    monkeypatch.setattr(splash, 'SceneMask', lambda *x: calls.append(x[2]) or real(*x))
    assert_equals_dense((1, 2, 3), 'dual', kernel, True)
    assert set(calls) == {(0, 128), (128, 384)}
