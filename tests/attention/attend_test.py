"""Every backend equals the dense mask: forward and gradients, every pattern, unequal scenes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mask2dit_jax.attention import attend as attend_lib
from mask2dit_jax.attention import blockwise as blockwise_lib
from mask2dit_jax.attention import flash, masks
from mask2dit_jax.layout import SceneLayout

XLA = ('dense', 'blockwise')  # the backends that every device runs
FRAMES = [(3,), (2, 4), (3, 1, 2), (1, 3, 2, 1, 2)]
TOLERANCE = {'float32': 2e-6, 'bfloat16': 2e-2}


def qkv(layout, dtype):
    """Random q, k, v and the cotangent of the output, [B, L, N, D] each."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = 2, layout.num_tokens, 2, 16
    return [jax.random.normal(key, shape, jnp.float32).astype(dtype) for key in keys]


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def forward_and_gradients(backend, q, k, v, d_out, layout, pattern):
    """The output, dq, dk and dv."""

    def attend(q, k, v):
        return attend_lib.attend(q, k, v, layout, pattern, backend)

    out, vjp = jax.vjp(attend, q, k, v)
    return (out, *vjp(d_out))


# In float32 every pattern of every layout; in bfloat16 every pattern, and every layout.
CASES = [
    *((pattern, frames, 'float32') for pattern in masks.PATTERNS for frames in FRAMES),
    *((pattern, (3, 1, 2), 'bfloat16') for pattern in masks.PATTERNS),
    *(('dual', frames, 'bfloat16') for frames in FRAMES),
]


@pytest.mark.parametrize('pattern, frames, dtype', dict.fromkeys(CASES), ids=str)
def test_blockwise_equals_dense(monkeypatch, pattern, frames, dtype):
    # A scene of 3 frames has 18 tokens: two blocks of queries, the second one partly filled.
    monkeypatch.setattr(blockwise_lib, 'QUERY_BLOCK', 13)
    layout = SceneLayout(frames, 2, 3, 5)
    args = qkv(layout, dtype)

    dense = forward_and_gradients('dense', *args, layout, pattern)
    blockwise = forward_and_gradients('blockwise', *args, layout, pattern)

    for name, expected, ours in zip(('out', 'dq', 'dk', 'dv'), dense, blockwise):
        assert ours.dtype == expected.dtype == dtype
        expected = np.asarray(expected, np.float32)
        ours = np.asarray(ours, np.float32)
        tolerance = TOLERANCE[dtype] * max(1, np.abs(expected).max())
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize('pattern', ['dual', 'causal'])
@pytest.mark.parametrize('frames', [(3,), (2, 4), (1, 3, 2, 1, 2)], ids=str)
def test_blockwise_equals_dense_where_others_see_lead_frames_alone(frames, pattern):
    for lead, dtype in ((1, 'float32'), (2, 'float32'), (1, 'bfloat16')):
        layout = SceneLayout(frames, 2, 3, 5, lead=lead)
        args = qkv(layout, dtype)
        dense = forward_and_gradients('dense', *args, layout, pattern)
        blockwise = forward_and_gradients('blockwise', *args, layout, pattern)
        for expected, ours in zip(dense, blockwise):
            expected, ours = (np.asarray(x, np.float32) for x in (expected, ours))
            tolerance = TOLERANCE[dtype] * max(1, np.abs(expected).max())
            np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize('lead', [None, 1, 2])
@pytest.mark.parametrize('pattern', masks.PATTERNS)
def test_flash_pieces_equal_dense(pattern, lead):
    """The pieces that cuDNN computes on a GPU, computed by XLA."""
    layout = SceneLayout((3, 1, 2), 2, 3, 5, lead=lead)
    args = qkv(layout, 'float32')
    pieces = functools.partial(flash.flash, layout=layout, pattern=pattern, implementation='xla')

    @jax.jit
    def run(q, k, v, d_out):
        out, vjp = jax.vjp(pieces, q, k, v)
        return (out, *vjp(d_out))

    dense = forward_and_gradients('dense', *args, layout, pattern)
    for expected, ours in zip(dense, run(*args)):
        np.testing.assert_allclose(ours, expected, atol=3e-6)


@pytest.mark.parametrize('backend', XLA)
@pytest.mark.parametrize('pattern', masks.PATTERNS)
def test_against_float64(backend, pattern):
    layout = SceneLayout((2, 1), 2, 2, 3)
    single = qkv(layout, 'float32')[:3]
    q, k, v = (np.asarray(x, np.float64) for x in single)

    scores = np.einsum('bqnd,bknd->bnqk', q, k) / 4  # the square root of 16
    weights = np.exp(scores) * masks.dense_mask(layout, pattern)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum('bnqk,bknd->bqnd', weights, v)

    attend = jax.jit(attend_lib.attend, static_argnums=(3, 4, 5))
    ours = attend(*single, layout, pattern, backend)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize('backend', XLA)
def test_bfloat16_has_float32_scores(backend):
    """Scores reach about 30; rounding them to bfloat16 would move weights by several per cent."""
    layout = SceneLayout((2, 1), 2, 2, 3)
    q, k, v, _ = qkv(layout, 'bfloat16')
    half = (8 * q, k, v)
    single = [x.astype(jnp.float32) for x in half]

    attend = jax.jit(attend_lib.attend, static_argnums=(3, 4, 5))
    ours = attend(*half, layout, 'dual', backend)
    exact = attend(*single, layout, 'dual', backend)

    # The tolerance covers the rounding of the result and of the weights.
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-8, atol=2**-7)


def test_large_scores_stay_finite():
    layout = SceneLayout((2, 1), 2, 2, 3)
    q, k, v, d_out = qkv(layout, 'float32')
    results = forward_and_gradients('blockwise', 200 * q, 200 * k, v, d_out, layout, 'dual')
    for x in results:
        assert jnp.isfinite(x).all()


def arrays_of(jaxpr):
    """Every intermediate array of a jaxpr and of the jaxprs inside it."""

    def is_jaxpr(x):
        return hasattr(x, 'eqns') or hasattr(x, 'jaxpr')

    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)

        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if hasattr(inner, 'jaxpr'):
                yield from arrays_of(inner.jaxpr)
            elif hasattr(inner, 'eqns'):
                yield from arrays_of(inner)


def test_blockwise_forms_no_quadratic_array_and_repeats_no_video():
    """No intermediate of forward or backward is L x L, or holds the video's keys once per scene."""
    layout = SceneLayout((30, 30, 30, 30), 8, 8, 16)

    def run(q, k, v, d_out):
        return forward_and_gradients('blockwise', q, k, v, d_out, layout, 'dual')

    jaxpr = jax.make_jaxpr(run)(*qkv(layout, 'float32')).jaxpr
    largest = max(array.size for array in arrays_of(jaxpr))

    block_scores = blockwise_lib.QUERY_BLOCK * layout.num_tokens
    all_scores = 2 * 2 * layout.num_tokens**2  # [B, N, L, L]
    assert largest <= block_scores < all_scores / 4


def test_errors_name_the_input():
    layout = SceneLayout((2,), 2, 2, 3)
    q, k, v, _ = qkv(layout, 'float32')

    with pytest.raises(ValueError, match="'fast': use one of dense, blockwise"):
        attend_lib.attend(q, k, v, layout, 'dual', 'fast')

    message = r"runs on TPU v4, .*, not on 'cpu': set model.attention_backend to"
    with pytest.raises(ValueError, match=message):
        attend_lib.attend(q, k, v, layout, 'dual', 'splash')

    with pytest.raises(ValueError, match=r'needs q, k, v of shape \[B, 11, N, D\]'):
        attend_lib.attend(q[:, 1:], k[:, 1:], v[:, 1:], layout, 'dual', 'dense')


def test_cudnn_lowers_to_one_fused_call_per_caption_and_scene(monkeypatch):
    """The test lowers and does not run, since it needs no GPU."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    # JAX asks the library and the chip; neither is here, so that the test answers.
    monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 91000)
    monkeypatch.setattr(fused, 'check_compute_capability', lambda capability: capability <= '9.0')

    layout = SceneLayout((2, 3), 4, 4, 6)
    x = jax.ShapeDtypeStruct((1, layout.num_tokens, 2, 64), jnp.bfloat16)

    def attend(q, k, v):
        return attend_lib.attend(q, k, v, layout, 'dual', 'cudnn')

    def gradients(q, k, v, d_out):
        _, vjp = jax.vjp(attend, q, k, v)
        return vjp(d_out)

    text = jax.jit(gradients).trace(x, x, x, x).lower(lowering_platforms=('cuda',)).as_text()
    for call in 'fmhaSoftmax', 'fmhaSoftmaxBackward':
        assert text.count(f'custom_call @__cudnn${call}(') == 4
    assert 'exponential' not in text
