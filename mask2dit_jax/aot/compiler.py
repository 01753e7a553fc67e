"""Compiles the training step and the sampling loop for a TPU slice from shapes, and reports what
they take."""

import importlib.metadata
import importlib.util
import math
import time

import jax
import jax.numpy as jnp

from mask2dit_jax import config as config_lib
from mask2dit_jax import hardware, pipeline
from mask2dit_jax.aot import report as report_lib
from mask2dit_jax.aot import topology as topology_lib
from mask2dit_jax.data import latent_codec
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.pretrained import names
from mask2dit_jax.training import train_step

WHAT = ('train', 'sample')
GIB = 2**30

# The compiler's own levels, which every libtpu that setup.py allows takes: EFFORT_UNKNOWN is its
# default, EFFORT_O1 is quicker and plans nearly the same memory, but its schedules are slower.
EFFORTS = {'full': 0, 'quick': 19}


def lower_train(config: config_lib.Config, frames: tuple[int, ...], latent, mesh):
    """The trainer's step, lowered from shapes.

    Args:
      config: the configuration.
      frames: latent frames per scene.
      latent: (h, w, C).
      mesh: of a topology's devices.

    Returns:
      The lowered step, and bytes per device of its arguments by kind.
    """
    m, size = config.model, config.train.batch_size
    text, shape = (len(frames), m.max_text_seq_length, m.text_embed_dim), jax.ShapeDtypeStruct
    inputs = shape((sum(frames), *latent), jnp.float32), shape(text, jnp.float32)
    state = jax.eval_shape(lambda x, y: train_step.init_state(config, (x, y, frames)), *inputs)
    state = partitioning.abstract_arrays(state, mesh)
    batch = {
        n: shape((size, *x.shape), x.dtype, sharding=mesh_lib.batch_sharding(mesh))
        for n, x in zip(('latents', 'text'), inputs)
    }
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = train_step.jit_train_step(config, frames, shardings, mesh_lib.batch_sharding(mesh))
    parts = {
        'parameters': state.params,
        'EMA': state.ema,
        'optimizer': state.opt_state,
        'batch': batch,
    }
    parts |= {'frozen parameters': state.frozen_params} if config.lora.rank else {}
    return step.lower(state, batch, shape(text[1:], jnp.float32)), _bytes_by_kind(parts)


def lower_sample(config: config_lib.Config, frames: tuple[int, ...], latent, mesh):
    """As lower_train: the sampling loop, of as many stories as fill the batch axes with guidance's
    halves."""
    m, steps, count = (
        config.model,
        config.sample.steps,
        max(1, mesh.shape['data'] * mesh.shape['fsdp'] // 2),
    )
    params = partitioning.abstract_arrays(names.abstract_params(m), mesh, m.dtype)
    shape, f32, s = jax.ShapeDtypeStruct, jnp.float32, len(frames)
    null = shape((m.max_text_seq_length, m.text_embed_dim), f32)
    x = shape((count, sum(frames), *latent), f32)
    args = (
        x,
        shape((count, s, *null.shape), f32),
        null,
        x,
        shape((count, s), bool),
        shape((steps,), jnp.int32),
        shape((steps, 5), f32),
        shape((s,), f32),
    )
    return pipeline.jit_sample(config, frames, mesh).lower(params, *args), _bytes_by_kind(
        {'parameters': params}
    )


def _bytes_by_kind(parts: dict) -> dict[str, int]:
    return {
        kind: sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
        for kind, tree in parts.items()
    }


def compile_report(
    config: config_lib.Config,
    what: str,
    topology: str,
    slices: int,
    frames,
    effort: str,
    schedules: bool = False,
) -> dict:
    """Compiles one of WHAT and collects what is known of it.

    Args:
      config: its mesh must fill the topology.
      what: 'train' or 'sample'.
      topology: e.g. 'v6e:8x8'.
      slices: number of such slices.
      frames: pixel frames per scene.
      effort: one of EFFORTS.
      schedules: also count the bundles of the attention kernels, for their cycles.

    Returns:
      A JSON-like dict; 'fits' says whether memory suffices.
    """
    chip = hardware.CHIPS[topology.split(':')[0]]
    latent_frames, latent = latent_codec.latent_shape(config, frames)
    layout = config.model.layout(latent_frames, *latent[:2])
    mesh = mesh_lib.make_mesh(config.mesh, topology_lib.topology_devices(topology, slices))
    report = {
        'what': what,
        'topology': topology,
        'slices': slices,
        'chips': mesh.size,
        'mesh': dict(mesh.shape),
        'remat': config.model.remat,
        'backend': config.model.attention_backend,
        'scenes': len(frames),
        'tokens': layout.num_tokens,
        'effort': effort,
        'hbm_gib': chip.hbm_gib,
        'versions': {name: importlib.metadata.version(name) for name in ('libtpu', 'jax')},
    }
    started = time.monotonic()
    lowered, arguments = (lower_train if what == 'train' else lower_sample)(
        config, latent_frames, latent, mesh
    )
    report['lower_seconds'] = time.monotonic() - started
    try:
        compiled = lowered.compile(compiler_options={'optimization_level': EFFORTS[effort]})
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return report | {'fits': False, 'error': str(error).splitlines()[0]}
    report['compile_seconds'] = time.monotonic() - started
    memory = compiled.memory_analysis()
    gib = {
        'arguments': memory.argument_size_in_bytes,
        'outputs': memory.output_size_in_bytes,
        'aliased': -memory.alias_size_in_bytes,
        'temporaries': memory.temp_size_in_bytes,
    }
    total = sum(gib.values())
    gib |= {
        'total': total,
        'peak': memory.peak_memory_in_bytes,
        'host': memory.host_temp_size_in_bytes,
    }
    report['gib'] = {k: v / GIB for k, v in gib.items()}
    report['arguments_gib'] = {k: v / GIB for k, v in arguments.items()}
    report['fits'] = total <= chip.hbm_gib * GIB
    report |= report_lib._work(
        config, layout, what, mesh, chip, compiled.as_text(), topology if schedules else None
    )
    return report
