"""Compiles the training step and the sampling loop for a TPU slice from shapes, without a TPU, and
reports their memory and work.

They are the very functions that the trainer and the command sample run. 'extend' is the sampling
loop of one more scene, with a cache of the scenes before it.
"""

import dataclasses
import importlib.metadata
import math
import time

import jax
import jax.numpy as jnp

from mask2dit_jax import config as config_lib
from mask2dit_jax import generation, hardware
from mask2dit_jax.aot import report as report_lib
from mask2dit_jax.aot import topology as topology_lib
from mask2dit_jax.data import latent_codec
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models import dit
from mask2dit_jax.models import flops as flops_lib
from mask2dit_jax.pretrained import names
from mask2dit_jax.training import train_step

WHAT = ('train', 'sample', 'extend')
GIB = 2**30

# Values of the compiler option optimization_level, which every libtpu that setup.py allows takes.
# 0 (EFFORT_UNKNOWN) is the compiler's default. 19 (EFFORT_O1) is quicker and plans nearly the same
# memory, but its schedules are slower.
EFFORTS = {'full': 0, 'quick': 19}


def lower_train(config: config_lib.Config, frames: tuple[int, ...], latent, mesh):
    """Lowers the trainer's step from shapes.

    Args:
      config: the configuration.
      frames: latent frames per scene.
      latent: (H, W, C).
      mesh: mesh of a topology's devices.

    Returns:
      The lowered step, and bytes per device of its arguments by kind.
    """
    caption = (config.model.max_text_seq_length, config.model.text_embed_dim)
    latents = jax.ShapeDtypeStruct((sum(frames), *latent), jnp.float32)  # [T, H, W, C]
    text = jax.ShapeDtypeStruct((len(frames), *caption), jnp.float32)  # [S, M, E]
    null_text = jax.ShapeDtypeStruct(caption, jnp.float32)  # [M, E]

    def init(latents, text):
        return train_step.init_state(config, (latents, text, frames))

    state = jax.eval_shape(init, latents, text)
    state = partitioning.abstract_arrays(state, mesh)

    batch_sharding = mesh_lib.batch_sharding(mesh)
    batch = {}
    least_given = jax.ShapeDtypeStruct((), jnp.int32)
    for name, example in (('latents', latents), ('text', text), ('least_given', least_given)):
        shape = (config.train.batch_size, *example.shape)
        batch[name] = jax.ShapeDtypeStruct(shape, example.dtype, sharding=batch_sharding)

    arguments = {
        'parameters': state.params,
        'EMA': state.ema,
        'optimizer': state.opt_state,
        'batch': batch,
    }
    if config.lora.rank:
        arguments['frozen parameters'] = state.frozen_params

    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    step = train_step.jit_train_step(config, frames, state_shardings, batch_sharding)
    return step.lower(state, batch, null_text), _bytes_by_kind(arguments)


def lower_sample(
    config: config_lib.Config, frames: tuple[int, ...], latent, mesh, remembered: int = 0
):
    """Lowers the sampling loop from shapes; arguments and results as for `lower_train`.

    `remembered` is that of generation.jit_sample.
    """
    stories = sampled_stories(mesh)
    scenes = len(frames)
    steps = config.sample.steps
    caption = (config.model.max_text_seq_length, config.model.text_embed_dim)
    rows = mesh_lib.row_sharding(mesh, stories)

    def by_rows(shape, dtype):
        return jax.ShapeDtypeStruct((stories, *shape), dtype, sharding=rows)

    latents = by_rows((sum(frames), *latent), jnp.float32)  # [B, T, H, W, C]
    params = partitioning.abstract_arrays(
        names.abstract_params(config.model), mesh, config.model.dtype
    )
    inputs = {
        'noise': latents,
        'text': by_rows((scenes, *caption), jnp.float32),
        'null_text': jax.ShapeDtypeStruct(caption, jnp.float32),
        'given': latents,
        'given_scenes': by_rows((scenes,), bool),
        'timesteps': jax.ShapeDtypeStruct((steps, scenes), jnp.int32),
        'table': jax.ShapeDtypeStruct((steps, scenes, 5), jnp.float32),
        'guidance': jax.ShapeDtypeStruct((scenes,), jnp.float32),
    }
    sample = generation.jit_sample(config, frames, mesh, remembered=remembered)
    return sample.lower(params, *inputs.values()), _bytes_by_kind({'parameters': params})


def sampled_stories(mesh) -> int:
    """Returns how many stories, doubled for guidance, fill the batch axes of a mesh."""
    return max(1, mesh.shape['data'] * mesh.shape['fsdp'] // 2)


def _bytes_by_kind(arguments: dict) -> dict[str, int]:
    """Bytes per device of the arrays of every tree."""
    sizes = {}
    for kind, tree in arguments.items():
        sizes[kind] = sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
    return sizes


def compile_report(
    config: config_lib.Config,
    what: str,
    topology: str,
    slices: int,
    frames: tuple[int, ...],
    effort: str,
    schedules: bool = False,
) -> dict:
    """Compiles the training step or the sampling loop, and reports its memory and work.

    Args:
      config: the configuration; its mesh must fill the topology.
      what: one of WHAT.
      topology: generation and shape of a slice, e.g. 'v6e:8x8'.
      slices: number of such slices.
      frames: pixel frames per scene.
      effort: one of EFFORTS.
      schedules: whether to count the attention kernels' bundles, too, for their cycles.

    Returns:
      A JSON-like dict; 'fits' says whether the chips' memory suffices.

    Raises:
      ValueError: if an extension has no scene to go on from, or the model's cannot be remembered.
    """
    chip = hardware.CHIPS[topology.split(':')[0]]
    latent_frames, latent = latent_codec.latent_shape(config, frames)
    remembered = len(frames) - 1 if what == 'extend' else 0
    if what == 'extend' and (not remembered or dit.cache_conflict(config.model)):
        raise ValueError(
            f'--what=extend: {dit.cache_conflict(config.model) or "needs at least two scenes."}'
        )
    layout = config.model.layout(latent_frames, *latent[:2])
    layout = dataclasses.replace(layout, remembered=remembered)
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
    if what == 'train':
        lowered, argument_bytes = lower_train(config, latent_frames, latent, mesh)
    else:
        lowered, argument_bytes = lower_sample(config, latent_frames, latent, mesh, remembered)
    report['lower_seconds'] = time.monotonic() - started

    # The compiler gives up on a program that is far too large.
    try:
        compiled = lowered.compile(compiler_options={'optimization_level': EFFORTS[effort]})
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return report | {'fits': False, 'error': str(error).splitlines()[0]}
    report['compile_seconds'] = time.monotonic() - started

    # Memory per chip. Outputs that take the place of arguments are counted in both.
    memory = compiled.memory_analysis()
    sizes = {
        'arguments': memory.argument_size_in_bytes,
        'outputs': memory.output_size_in_bytes,
        'aliased': -memory.alias_size_in_bytes,
        'temporaries': memory.temp_size_in_bytes,
    }
    total = sum(sizes.values())
    sizes['total'] = total
    sizes['peak'] = memory.peak_memory_in_bytes
    sizes['host'] = memory.host_temp_size_in_bytes
    report['gib'] = {name: size / GIB for name, size in sizes.items()}
    report['arguments_gib'] = {kind: size / GIB for kind, size in argument_bytes.items()}
    report['fits'] = total <= chip.hbm_gib * GIB

    stories = config.train.batch_size if what == 'train' else sampled_stories(mesh)
    passes = _passes(config, what, layout, mesh)
    return report | report_lib.program_work(
        config, passes, stories, mesh, chip, compiled.as_text(), topology, schedules
    )


def _passes(config: config_lib.Config, what: str, layout: SceneLayout, mesh):
    """Layouts of a story, and the pattern and the FLOPs of all passes over each."""
    if what == 'train':
        flops = flops_lib.training_flops(config.model, layout, config.train.objective)
        seen, pattern = flops_lib.training_pass(config.model, layout, config.train.objective)
        return [(seen, pattern, flops)]

    def forward(layout, times):
        flops = flops_lib.forward_flops(config.model, layout)
        flops = {kind: times * number for kind, number in flops.items()}
        return layout, config.model.pattern, flops

    # Two passes per step, the halves of classifier-free guidance.
    passes = [forward(layout, 2 * config.sample.steps)]
    if layout.remembered:
        given = dataclasses.replace(layout, frames=layout.frames[: layout.remembered], remembered=0)
        halves = generation.num_caches(config, mesh, sampled_stories(mesh))
        passes.insert(0, forward(given, halves))
    return passes
