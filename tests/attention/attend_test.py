"""Every backend equals the dense mask: forward and gradients of q, k and v, every pattern, unequal
scenes."""

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


def qkv(layout, dtype, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = 2, layout.num_tokens, 2, 16
    return [jax.random.normal(k, shape, jnp.float32).astype(dtype) for k in keys]


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def forward_and_gradients(backend, q, k, v, do, layout, pattern):
    out, vjp = jax.vjp(
        lambda q, k, v: attend_lib.attend(q, k, v, layout, pattern, backend), q, k, v
    )
    return (out, *vjp(do))


# In float32 every pattern of every layout; in bfloat16 every pattern, and every layout.
CASES = [
    *((pattern, frames, 'float32') for pattern in masks.PATTERNS for frames in FRAMES),
    *((pattern, (3, 1, 2), 'bfloat16') for pattern in masks.PATTERNS),
    *(('dual', frames, 'bfloat16') for frames in FRAMES),
]


@pytest.mark.parametrize('pattern, frames, dtype', dict.fromkeys(CASES), ids=str)
def test_blockwise_equals_dense(monkeypatch, pattern, frames, dtype):
    monkeypatch.setattr(
        attend_lib, 'QUERY_BLOCK', 13
    )  # scenes of 3 frames: two blocks, the second partly filled
    layout = SceneLayout(frames, 2, 3, 5)
    args = qkv(layout, dtype)
    results = [forward_and_gradients(b, *args, layout, pattern) for b in ('dense', 'blockwise')]
    for name, ref, ours in zip(('out', 'dq', 'dk', 'dv'), *results):
        assert ours.dtype == ref.dtype == dtype
        ref, ours = (np.asarray(x, np.float32) for x in (ref, ours))
        np.testing.assert_allclose(
            ours, ref, rtol=0, atol=TOLERANCE[dtype] * max(1, np.abs(ref).max()), err_msg=name
        )


@pytest.mark.parametrize('pattern', masks.PATTERNS)
def test_flash_pieces_equal_dense(pattern):
    """The pieces that cuDNN computes on a GPU, computed by XLA."""
    layout = SceneLayout((3, 1, 2), 2, 3, 5)
    q, k, v, do = qkv(layout, 'float32')
    pieces = functools.partial(flash.flash, layout=layout, pattern=pattern, implementation='xla')

    @jax.jit
    def run(q, k, v, do):
        out, vjp = jax.vjp(pieces, q, k, v)
        return (out, *vjp(do))

    for ref, ours in zip(
        forward_and_gradients('dense', q, k, v, do, layout, pattern), run(q, k, v, do)
    ):
        np.testing.assert_allclose(ours, ref, atol=3e-6)


@pytest.mark.parametrize('backend', XLA)
@pytest.mark.parametrize('pattern', masks.PATTERNS)
def test_against_float64(backend, pattern):
    layout = SceneLayout((2, 1), 2, 2, 3)
    q, k, v, _ = (np.asarray(x, np.float64) for x in qkv(layout, 'float32'))
    scores = np.einsum('bqnd,bknd->bnqk', q, k) / 4
    weights = np.exp(scores) * masks.dense_mask(layout, pattern)
    expected = np.einsum('bnqk,bknd->bqnd', weights / weights.sum(-1, keepdims=True), v)
    attend = jax.jit(attend_lib.attend, static_argnums=(3, 4, 5))
    ours = attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), layout, pattern, backend)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize('backend', XLA)
def test_bfloat16_has_float32_scores(backend):
    """Scores of up to about 30: in bfloat16 their rounding alone would be several per cent of the
    weights."""
    layout = SceneLayout((2, 1), 2, 2, 3)
    q, k, v, _ = qkv(layout, 'bfloat16')
    attend = jax.jit(attend_lib.attend, static_argnums=(3, 4, 5))
    ours = attend(8 * q, k, v, layout, 'dual', backend)
    exact = attend(*(x.astype(jnp.float32) for x in (8 * q, k, v)), layout, 'dual', backend)
    np.testing.assert_allclose(
        ours.astype(jnp.float32), exact, rtol=2**-8, atol=2**-7
    )  # rounds result and weights


def test_large_scores_stay_finite():
    layout = SceneLayout((2, 1), 2, 2, 3)
    q, k, v, do = qkv(layout, 'float32')
    for x in forward_and_gradients('blockwise', 200 * q, 200 * k, v, do, layout, 'dual'):
        assert jnp.isfinite(x).all()


def arrays_of(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        for param in eqn.params.values():
            for sub in jax.tree.leaves(
                param, is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
            ):
                if hasattr(sub, 'jaxpr'):
                    yield from arrays_of(sub.jaxpr)
                elif hasattr(sub, 'eqns'):
                    yield from arrays_of(sub)


def test_blockwise_forms_no_quadratic_array_and_repeats_no_video():
    """No intermediate of forward or backward is L x L, or holds the video's keys once per scene."""
    layout = SceneLayout((30, 30, 30, 30), 8, 8, 16)
    q, k, v, do = qkv(layout, 'float32')
    jaxpr = jax.make_jaxpr(lambda *a: forward_and_gradients('blockwise', *a, layout, 'dual'))(
        q, k, v, do
    ).jaxpr
    largest = max(a.size for a in arrays_of(jaxpr))
    block_scores = blockwise_lib.QUERY_BLOCK * layout.num_tokens
    assert largest <= block_scores < 2 * 2 * layout.num_tokens**2 / 4


def test_errors_name_the_input():
    layout = SceneLayout((2,), 2, 2, 3)
    q, k, v, _ = qkv(layout, 'float32')
    with pytest.raises(ValueError, match="'fast': use one of dense, blockwise"):
        attend_lib.attend(q, k, v, layout, 'dual', 'fast')
    with pytest.raises(
        ValueError, match=r"runs on TPU v4, .*, not on 'cpu': set model.attention_backend to"
    ):
        attend_lib.attend(q, k, v, layout, 'dual', 'splash')
    with pytest.raises(ValueError, match=r'needs q, k, v of shape \[B, 11, N, D\]'):
        attend_lib.attend(q[:, 1:], k[:, 1:], v[:, 1:], layout, 'dual', 'dense')


def test_cudnn_lowers_to_one_fused_call_per_caption_and_scene(monkeypatch):
    """As far as this goes without a GPU: what JAX asks of cuDNN's library and of the chip is
    answered for them."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 91000)
    monkeypatch.setattr(fused, 'check_compute_capability', lambda capability: capability <= '9.0')
    layout = SceneLayout((2, 3), 4, 4, 6)
    x = jax.ShapeDtypeStruct((1, layout.num_tokens, 2, 64), jnp.bfloat16)

    def gradients(q, k, v, d):
        return jax.vjp(lambda *x: attend_lib.attend(*x, layout, 'dual', 'cudnn'), q, k, v)[1](d)

    text = jax.jit(gradients).trace(x, x, x, x).lower(lowering_platforms=('cuda',)).as_text()
    for call in 'fmhaSoftmax', 'fmhaSoftmaxBackward':
        assert text.count(f'custom_call @__cudnn${call}(') == 4
    assert 'exponential' not in text
