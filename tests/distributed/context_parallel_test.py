"""Attention over meshes of eight devices equals one device's: every backend inside, every pattern,
unequal scenes."""

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
    return SceneLayout(
        frames, 4, 4, 8
    )  # 8 captions' and 16 frames' tokens: every number of scenes divides


def qkv(layout, batch=4, heads=8, dim=16):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, (batch, layout.num_tokens, heads, dim)) for k in keys]


@functools.cache
def dense(layout, pattern):
    return jax.jit(functools.partial(forward_and_gradients, dense_lib.dense, layout, pattern))(
        *qkv(layout)
    )


def forward_and_gradients(attend, layout, pattern, q, k, v, do):
    out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, layout, pattern), q, k, v)
    return (out, *vjp(do))


@functools.cache
def on_mesh(axes, inside, layout, pattern):
    """Jitted function of q, k, v and the output's cotangent."""
    mesh = mesh_of(*axes)

    @functools.partial(jax.jit, in_shardings=NamedSharding(mesh, context_parallel.SPEC))
    def run(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            attend = functools.partial(context_parallel.attend, backend=INSIDE[inside])
            return forward_and_gradients(attend, layout, pattern, *args)

    return run


def assert_equal(axes, inside, frames, pattern):
    layout = layout_of(frames)
    for name, ref, ours in zip(
        ('out', 'dq', 'dk', 'dv'),
        dense(layout, pattern),
        on_mesh(axes, inside, layout, pattern)(*qkv(layout)),
    ):
        np.testing.assert_allclose(ours, ref, atol=3e-6, err_msg=name)


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
    run, args = on_mesh(axes, 'blockwise', layout, 'dual'), qkv(layout)
    for scene in range(3):
        start, stop = layout.video_range(scene)
        do = jnp.zeros_like(args[3]).at[:, start:stop].set(args[3][:, start:stop])
        _, _, dk, dv = run(*args[:3], do)
        for other in range(3):
            a, b = layout.text_range(other)
            for grad in (dk, dv):
                assert bool(jnp.any(grad[:, a:b])) == (other == scene)


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
