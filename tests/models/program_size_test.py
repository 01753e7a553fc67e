"""Programs do not grow with the number of tokens: what a token needs is computed, not stored."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of

from mask2dit_jax import config as config_lib
from mask2dit_jax import generation, presets
from mask2dit_jax.aot import compiler
from mask2dit_jax.aot import topology as topology_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.layout import SceneLayout, token_scenes, traced_token_scenes
from mask2dit_jax.models import dit, embeddings
from mask2dit_jax.pretrained import names

MODEL = dit.DiTConfig(
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_embed_dim=8,
    time_embed_dim=16,
    max_text_seq_length=4,
    patch_size=1,
    sample_height=16,
    sample_width=16,
    sample_frames=9,
    dtype='float32',
)
FRAMES = 2, 3
SMALL, LARGE = 8, 64  # latent rows and columns

# Video tokens that the large program has more. Not one byte of it may be theirs: the features of
# the axes, and the few numbers for each text token, are fewer.
MORE_TOKENS = sum(FRAMES) * (LARGE**2 - SMALL**2)
MODELS = {
    'rotary': {},
    'sin-cos': {'rotary': False},
    'sin-cos, reference': {'rotary': False, 'position_rule': 'reference'},
    'learned': {'learned_positions': True},
    'learned, reference': {'learned_positions': True, 'position_rule': 'reference'},
    'patches in time': {'patch_size_t': 2, 'sample_height': 64, 'sample_width': 64},
    'dense': {'attention_backend': 'dense'},
}


def size_of(lowered):
    """Bytes of a lowered program."""
    file = io.BytesIO()
    lowered.compiler_ir('stablehlo').operation.write_bytecode(file)
    return len(file.getvalue())


def lowered_gradient(model, side, text_tokens):
    """The gradient of a model of this many latent rows and columns."""
    model = dataclasses.replace(model, max_text_seq_length=text_tokens)
    arrays = [
        jax.ShapeDtypeStruct((1, sum(FRAMES), side, side, 4), jnp.float32),
        jax.ShapeDtypeStruct((1, len(FRAMES), text_tokens, 8), jnp.float32),
        jax.ShapeDtypeStruct((1, sum(FRAMES)), jnp.float32),
    ]

    def loss(params, *arrays):
        return jnp.sum(dit.DiT(model).apply({'params': params}, *arrays, FRAMES) ** 2)

    return jax.jit(jax.grad(loss)).lower(names.abstract_params(model), *arrays)


def lowered_train(model, side):
    """The whole training step, on four devices."""
    config = config_lib.Config(model=model, train=config_lib.TrainConfig(batch_size=2))
    mesh = mesh_of(1, 2, 2, 1)
    return compiler.lower_train(config, FRAMES, (side, side, 4), mesh)[0]


def lowered_sample(model, side):
    config = config_lib.Config(model=model)
    caption = (model.max_text_seq_length, model.text_embed_dim)
    shapes = {
        'noise': (1, sum(FRAMES), side, side, 4),
        'text': (1, len(FRAMES), *caption),
        'null_text': caption,
        'given': (1, sum(FRAMES), side, side, 4),
        'given_scenes': (1, len(FRAMES)),
        'timesteps': (3, len(FRAMES)),
        'table': (3, len(FRAMES), 5),
        'guidance': (len(FRAMES),),
    }
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values()]
    inputs[4] = jax.ShapeDtypeStruct(inputs[4].shape, bool)
    params = names.abstract_params(model)
    return generation.jit_sample(config, FRAMES, mesh_of(1, 2, 2, 1)).lower(params, *inputs)


@pytest.mark.parametrize('name', MODELS)
def test_a_model_does_not_grow_with_tokens(name):
    model = dataclasses.replace(MODEL, **MODELS[name])
    small = lowered_gradient(model, SMALL, text_tokens=4)
    large = lowered_gradient(model, LARGE, text_tokens=104)
    assert size_of(large) - size_of(small) < MORE_TOKENS


@pytest.mark.parametrize('lower', [lowered_train, lowered_sample])
def test_a_program_does_not_grow_with_tokens(lower):
    assert size_of(lower(MODEL, LARGE)) - size_of(lower(MODEL, SMALL)) < MORE_TOKENS


@pytest.mark.slow
def test_the_5b_training_step_at_427k_tokens():
    """24 scenes of the published size on a TPU slice, lowered from shapes: under 5 MB."""
    pytest.importorskip('libtpu')
    config = config_lib.parse(presets.pod('5b,v5p-128'))
    frames = (13,) * 24
    devices = topology_lib.topology_devices(presets.SLICES['v5p-128'].topology)
    mesh = mesh_lib.make_mesh(config.mesh, devices)
    assert config.model.layout(frames, 60, 90).num_tokens == 426_624
    lowered, _ = compiler.lower_train(config, frames, (60, 90, 16), mesh)
    assert size_of(lowered) < 5e6


def test_positions_are_the_same_numbers_in_the_program():
    """The program joins tables of the axes; a row for every token in numpy is the definition."""
    layout = SceneLayout((3, 5, 2), 6, 9, 7)
    cos, sin = jax.jit(lambda: embeddings.rope_table(layout, 32, 'linspace', (30, 45)))()

    # A quarter of the head turns with time, three eighths each with row and column.
    top, left, height, width = embeddings.fit_grid((6, 9), (30, 45))
    axes = (np.arange(10.0), top + np.arange(6) * height / 6, left + np.arange(9) * width / 9)
    angles = []
    for positions, share in zip(np.meshgrid(*axes, indexing='ij'), (8, 12, 12)):
        frequencies = 10000.0 ** (-np.arange(0, share, 2) / share)
        angles.append(np.repeat(positions.reshape(-1, 1) * frequencies, 2, axis=1))
    angles = np.concatenate(angles, axis=1)
    np.testing.assert_array_equal(cos, np.cos(angles).astype(np.float32))
    np.testing.assert_array_equal(sin, np.sin(angles).astype(np.float32))

    for ours, expected in zip(
        jax.jit(lambda: traced_token_scenes(layout.segments))(), token_scenes(layout.segments)
    ):
        np.testing.assert_array_equal(ours, expected)
        assert ours.dtype == expected.dtype
