"""Scenes that attend to a cache: their rows of the whole attention, on every backend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mask2dit_jax.attention import attend as attend_lib
from mask2dit_jax.attention import blockwise as blockwise_lib
from mask2dit_jax.attention import dense as dense_lib
from mask2dit_jax.attention import flash, kv_cache, masks, splash
from mask2dit_jax.layout import TEXT, VIDEO, SceneLayout, token_scenes

# Frames per scene, and how many leading scenes are remembered.
SCENES = [((2, 4), 1), ((3, 1, 2), 1), ((3, 1, 2), 2), ((1, 3, 2, 1, 2), 2), ((1, 3, 2, 1, 2), 4)]
# Under 'full' video sees the captions of earlier scenes, which are not remembered.
PATTERNS = ('dual', 'causal', 'isolated')
TOLERANCE = {'float32': 2e-6, 'bfloat16': 2e-2}
BACKENDS = {
    'dense': dense_lib.dense,
    'blockwise': blockwise_lib.blockwise,
    'flash': functools.partial(flash.flash, implementation='xla'),
}


def parts(layout):
    """Places in the whole sequence: of the sequence's tokens, and of what is remembered."""
    scene, kind = token_scenes(layout.whole.segments)
    own = scene >= layout.remembered
    return np.flatnonzero(own), np.flatnonzero(~own & (kind == VIDEO))


def inputs_of(layout, dtype):
    """q, k, v and the cotangent of the whole sequence; the cotangent is 0 but for the own rows."""
    own, _ = parts(layout)
    keys = jax.random.split(jax.random.key(0), 4)
    shape = 2, layout.whole.num_tokens, 2, 16
    q, k, v, d_out = (jax.random.normal(key, shape, jnp.float32).astype(dtype) for key in keys)
    return q, k, v, jnp.zeros_like(d_out).at[:, own].set(d_out[:, own])


def assert_rows_of_the_whole(backend, layout, pattern, dtype, tolerance):
    """Output and gradients of q, k, v and the cache."""
    own, remembered = parts(layout)
    q, k, v, d_out = inputs_of(layout, dtype)

    def of_whole(q, k, v):
        return dense_lib.dense(q, k, v, layout.whole, pattern)[:, own]

    def with_cache(q, k, v):
        new_k, new_v = (
            kv_cache.insert(x[:, own], x[:, remembered], layout.num_text) for x in (k, v)
        )
        return backend(q[:, own], new_k, new_v, layout, pattern)

    results = []
    for attend in (of_whole, with_cache):
        out, vjp = jax.jit(functools.partial(jax.vjp, attend))(q, k, v)
        results.append((out, *jax.jit(vjp)(d_out[:, own])))
    for name, expected, ours in zip(('out', 'dq', 'dk', 'dv'), *results):
        assert ours.dtype == dtype
        expected, ours = (np.asarray(x, np.float32) for x in (expected, ours))
        atol = tolerance * max(1, np.abs(expected).max())
        np.testing.assert_allclose(ours, expected, rtol=0, atol=atol, err_msg=name)


# In float32 every pattern of every layout; in bfloat16 every layout.
CASES = [
    *((pattern, *scenes, 'float32') for pattern in PATTERNS for scenes in SCENES),
    *(('causal', *scenes, 'bfloat16') for scenes in SCENES),
]


@pytest.mark.parametrize('pattern, frames, remembered, dtype', CASES, ids=str)
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('lead', [None, 1])
def test_rows_of_the_whole(lead, backend, pattern, frames, remembered, dtype, monkeypatch):
    monkeypatch.setattr(blockwise_lib, 'QUERY_BLOCK', 13)
    layout = SceneLayout(frames, 2, 3, 5, remembered=remembered, lead=lead)
    assert_rows_of_the_whole(BACKENDS[backend], layout, pattern, dtype, TOLERANCE[dtype])


@pytest.mark.parametrize('frames, remembered', [SCENES[0], SCENES[2], SCENES[3]], ids=str)
@pytest.mark.parametrize('kernel', splash.KERNELS)
@pytest.mark.parametrize('lead', [None, 1])
def test_splash(lead, kernel, frames, remembered):
    """Whether the new scenes' tokens begin within a block or not, and in several blocks."""
    # Three blocks of keys: plain interpretation of tokamax's kernel is wrong from four on.
    height = 288 // 8 // sum(frames)
    layout = SceneLayout(frames, height, 8, 7, remembered=remembered, lead=lead)
    backend = functools.partial(splash.attend, block=128, kernel=kernel, interpret=True)
    assert_rows_of_the_whole(backend, layout, 'causal', 'float32', 2e-5)


@pytest.mark.parametrize('seed', range(15))
def test_splash_masks_by_brute_force(seed):
    """The mask of the queries, and what the libraries are told of its blocks: never too little."""
    rng = np.random.default_rng(seed)
    frames = tuple(rng.integers(1, 6, rng.integers(2, 6)).tolist())
    height, width, text_tokens = rng.integers(1, [9, 9, 40]).tolist()
    block = int(rng.choice([32, 96, 128]))
    layout = SceneLayout(
        frames,
        height,
        width,
        text_tokens,
        remembered=int(rng.integers(len(frames))),
        lead=[None, 1, 2][seed % 3],
    )
    sequence = splash._KernelSequence(layout, block)
    start, length = sequence.first_query, sequence.starts[-1]
    assert 0 <= start <= layout.num_remembered and (length - start) % block == 0
    assert layout.num_remembered - start < block  # no block without a query that is asked for

    def to_kernel(mask):
        """Videos before captions."""
        return np.concatenate([mask[layout.num_text :], mask[: layout.num_text]])

    for pattern in PATTERNS:
        mask = splash.SceneMask(sequence, pattern, (start, length))
        computed = mask.mask_function(mask.q_sequence[:, None], np.arange(length)[None])
        truth = masks.dense_mask(layout, pattern)  # [queries, keys]
        truth = to_kernel(to_kernel(truth).T).T
        first = layout.num_remembered - start
        end = layout.num_remembered + layout.num_tokens
        np.testing.assert_array_equal(computed[first : first + layout.num_tokens, :end], truth)
        assert not computed[:, end:].any() and computed.any(1).all()

        kinds = mask.blocks(block)
        windows = computed.reshape(len(kinds), block, length // block, block)
        assert windows.all(axis=(1, 3))[kinds == splash.WHOLE].all()
        assert not windows.any(axis=(1, 3))[kinds == splash.EMPTY].any()


def test_a_cache_must_hold_what_the_layout_remembers():
    layout = SceneLayout((2, 4), 2, 3, 5, remembered=1)
    x = jnp.zeros((2, layout.num_tokens, 2, 16))
    for cache in (None, kv_cache.KVCache(x, x)):
        with pytest.raises(ValueError, match='needs a cache of 12 tokens'):
            attend_lib.attend(x, x, x, layout, 'causal', 'dense', cache)


@pytest.mark.parametrize('pattern', masks.PATTERNS)
def test_patterns_under_which_a_cache_is_exact(pattern):
    """Those that let no token of a scene see a later scene, by brute force."""
    layout = SceneLayout((1, 2, 1), 2, 2, 3)
    scene, kind = token_scenes(layout.segments)
    is_text = kind == TEXT
    mask = masks.dense_mask(layout, pattern)
    sees_later = (mask & (scene[:, None] < scene[None])).any()
    sees_captions_of_earlier = (mask & (scene[:, None] > scene[None]) & is_text[None]).any()
    exact = not sees_later and not sees_captions_of_earlier
    assert exact == (pattern in kv_cache.PATTERNS)


def test_layouts_keep_a_scene_to_generate():
    with pytest.raises(ValueError, match='needs a scene that is not remembered'):
        dataclasses.replace(SceneLayout((2, 4), 2, 3, 5), remembered=2)
