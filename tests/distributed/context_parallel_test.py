"""Attention over eight devices equals that of one: every backend and pattern, unequal scenes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mask2dit_jax.attention import blockwise as blockwise_lib
from mask2dit_jax.attention import dense as dense_lib
from mask2dit_jax.attention import flash, masks, splash
from mask2dit_jax.distributed import context_parallel
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.layout import SceneLayout

MESHES = {
    (1, 1, 2, 4): '1x1x2x4',
    (4, 1, 2, 1): '4x1x2x1',
    (1, 2, 4, 1): '1x2x4x1',
    (2, 2, 2, 1): '2x2x2x1',
    (1, 1, 8, 1): '1x1x8x1',
    (1, 1, 1, 8): '1x1x1x8',
}
INSIDE = {
    'dense': dense_lib.dense,
    'blockwise': blockwise_lib.blockwise,
    'cudnn': functools.partial(flash.flash, implementation='xla'),
    'splash': functools.partial(splash.attend, block=128, interpret=True),
    'jax_splash': functools.partial(splash.attend, block=128, kernel='jax', interpret=True),
}


def mesh_of(*axes):
    return mesh_lib.make_mesh(mesh_lib.MeshConfig(*axes))


def layout_of(frames):
    # Captions have 8 tokens and frames have 16, so that every number of scenes divides.
    return SceneLayout(frames, 4, 4, 8)


def qkv(layout):
    """Random q, k, v and the cotangent of the output, [B, L, N, D] each."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (4, layout.num_tokens, 8, 16)) for key in keys]


def forward_and_gradients(attend, layout, pattern, q, k, v, d_out):
    """The output, dq, dk and dv."""
    out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, layout, pattern), q, k, v)
    return (out, *vjp(d_out))


@functools.cache
def dense(layout, pattern):
    """The reference, on one device."""
    run = functools.partial(forward_and_gradients, dense_lib.dense, layout, pattern)
    return jax.jit(run)(*qkv(layout))


@functools.cache
def on_mesh(axes, inside, layout, pattern):
    """Jitted function of q, k, v and the output's cotangent."""
    mesh = mesh_of(*axes)
    attend = functools.partial(context_parallel.attend, backend=INSIDE[inside])

    @functools.partial(jax.jit, in_shardings=NamedSharding(mesh, context_parallel.SPEC))
    def run(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return forward_and_gradients(attend, layout, pattern, *args)

    return run


def assert_equal(axes, inside, frames, pattern):
    layout = layout_of(frames)
    expected = dense(layout, pattern)
    results = on_mesh(axes, inside, layout, pattern)(*qkv(layout))
    for name, theirs, ours in zip(('out', 'dq', 'dk', 'dv'), expected, results):
        np.testing.assert_allclose(ours, theirs, atol=3e-6, err_msg=name)


@pytest.mark.parametrize('axes', MESHES, ids=MESHES.get)
def test_every_mesh(axes):
    assert_equal(axes, 'blockwise', (2, 1, 3), 'dual')


@pytest.mark.parametrize(
    'frames, pattern',
    [
        *(((3, 1, 2), pattern) for pattern in masks.PATTERNS),
        *((frames, 'dual') for frames in ((3,), (2, 4), (1, 3, 2, 1, 2))),
    ],
    ids=str,
)
@pytest.mark.parametrize('inside', ['dense', 'blockwise', 'cudnn'])
def test_every_pattern_and_number_of_scenes(inside, frames, pattern):
    assert_equal((2, 1, 4, 1), inside, frames, pattern)


@pytest.mark.parametrize('pattern', masks.PATTERNS)
@pytest.mark.parametrize('inside', ['splash', 'jax_splash'])
def test_splash_inside(inside, pattern):
    assert_equal((1, 2, 4, 1), inside, (3, 1, 2), pattern)


@pytest.mark.parametrize('axes', MESHES, ids=MESHES.get)
def test_captions_get_no_gradient_from_other_scenes_on_any_mesh(axes):
    """The defining property of the dual mask, which the reference loses on several devices."""
    layout = layout_of((2, 1, 3))
    run = on_mesh(axes, 'blockwise', layout, 'dual')
    q, k, v, d_out = qkv(layout)

    for scene in range(3):
        start, stop = layout.video_range(scene)
        d_scene = jnp.zeros_like(d_out).at[:, start:stop].set(d_out[:, start:stop])
        _, _, dk, dv = run(q, k, v, d_scene)

        for caption in range(3):
            start, stop = layout.text_range(caption)
            for gradient in (dk, dv):
                has_gradient = bool(jnp.any(gradient[:, start:stop]))
                assert has_gradient == (caption == scene)


@pytest.mark.parametrize(
    'axes, size, message',
    [
        (
            (2, 1, 4, 1),
            (2, 64, 6),
            r'6 attention heads .* context 4 x tensor 1: .* context may be 1, 2, 3, 6\.$',
        ),
        ((8, 1, 1, 1), (4, 64, 8), r'batch of 4 .* data 8 x fsdp 1: make it a multiple of 8'),
        ((1, 1, 1, 8), (1, 64, 4), r'context may be nothing\.$'),
        ((1, 2, 4, 1), (2, 43, 8), r'43 tokens do not divide over context 4: .* may be 1\.$'),
    ],
    ids=str,
)
def test_errors_say_what_would_fit(axes, size, message):
    with pytest.raises(ValueError, match=message):
        context_parallel.check(dict(zip(mesh_lib.AXES, axes)), *size)
