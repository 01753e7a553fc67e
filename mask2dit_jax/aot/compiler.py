"""Compiles the training step and the sampling loop for a TPU slice from shapes, and reports what they take."""
import importlib.metadata
import importlib.util
import math
import os
import time

import jax
import jax.numpy as jnp

from mask2dit_jax import config as config_lib
from mask2dit_jax import hardware, pipeline
from mask2dit_jax.aot import hlo
from mask2dit_jax.attention import splash
from mask2dit_jax.benchmark import tasks
from mask2dit_jax.data import batches
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.pretrained import load
from mask2dit_jax.training import metric_writer, train_step

WHAT = ('train', 'sample')
GIB = 2 ** 30

# The compiler's own levels, which every libtpu that setup.py allows takes: EFFORT_UNKNOWN is its default, EFFORT_O1 is
# quicker and plans nearly the same memory, but its schedules are slower.
EFFORTS = {'full': 0, 'quick': 19}


def topology_devices(topology: str, slices: int = 1):
    """Devices of a TPU topology such as 'v5p:4x4x4' that need not be there.

    Raises:
      ValueError: if libtpu is not installed or knows no such topology.
    """
    if importlib.util.find_spec('libtpu') is None:
        raise ValueError("Compiling for TPU needs libtpu: pip install 'mask2dit_jax[tpu]'.")
    # No search for a TPU on this machine, no lock against other processes, no log files.
    os.environ.update(TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost', TPU_ACCELERATOR_TYPE='v5p-8',
                      ALLOW_MULTIPLE_LIBTPU_LOAD='1', TPU_LOG_DIR='disabled', TF_CPP_MIN_LOG_LEVEL='2')
    from jax.experimental import topologies
    generation = topology.split(':')[0]
    if generation not in hardware.CHIPS:
        raise ValueError(f'{topology!r} is no topology: write one of {", ".join(hardware.CHIPS)}, a colon and its shape.')
    options = dict(hardware.CHIPS[generation].topology_options) | ({'num_slices': slices} if slices > 1 else {})
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=topology, **options).devices
    except Exception as error:  # libtpu raises several kinds
        raise ValueError(f'libtpu knows no topology {topology!r} ({str(error).splitlines()[0][:200]}).') from error


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
    state = partitioning.targets(state, mesh)
    batch = {n: shape((size, *x.shape), x.dtype, sharding=partitioning.batch_sharding(mesh))
             for n, x in zip(('latents', 'text'), inputs)}
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = train_step.jit_train_step(config, frames, shardings, partitioning.batch_sharding(mesh))
    parts = {'parameters': state.params, 'EMA': state.ema, 'optimizer': state.opt, 'batch': batch}
    parts |= {'frozen parameters': state.base} if config.lora.rank else {}
    return step.lower(state, batch, shape(text[1:], jnp.float32)), _bytes_by_kind(parts)


def lower_sample(config: config_lib.Config, frames: tuple[int, ...], latent, mesh):
    """As lower_train: the sampling loop, of as many stories as fill the batch axes with guidance's halves."""
    m, steps, count = config.model, config.sample.steps, max(1, mesh.shape['data'] * mesh.shape['fsdp'] // 2)
    params = partitioning.targets(load.abstract_params(m), mesh, m.dtype)
    shape, f32, s = jax.ShapeDtypeStruct, jnp.float32, len(frames)
    null = shape((m.max_text_seq_length, m.text_embed_dim), f32)
    x = shape((count, sum(frames), *latent), f32)
    args = (x, shape((count, s, *null.shape), f32), null, x, shape((count, s), bool), shape((steps,), jnp.int32),
            shape((steps, 5), f32), shape((s,), f32))
    return pipeline.jit_sample(config, frames, mesh).lower(params, *args), _bytes_by_kind({'parameters': params})


def _bytes_by_kind(parts: dict) -> dict[str, int]:
    return {kind: sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
            for kind, tree in parts.items()}


def kernel_work(kernels, blocks: tuple[int, float, float], bundles: dict | None = None) -> tuple[float, float]:
    """FLOPs of splash kernels per device, two products per visited query and key forward and five backward; and their
    cycles if bundles are given, one each where nothing stalls.

    Args:
      kernels: hlo.Program's.
      blocks: of splash.visited_blocks.
      bundles: of benchmark.kernel_bundles at the same block size.
    """
    block, visible, evaluated = blocks
    flops = cycles = 0.0
    for (name, shape), times in kernels.items():
        *heads, length, dim = shape
        if '_fwd' in name:
            products, direction = 2, 'forward'
        elif '_dkv' in name:
            products, direction = 5, 'backward'
            heads = heads[1:]  # dq's slots
        else:
            raise ValueError(f'Unknown kernel {name}.')
        rows = times * math.prod(heads) * length / block  # of blocks
        flops += rows * (visible + evaluated) * products * 2.0 * block ** 2 * dim
        if bundles:
            plain, masked = bundles[direction]
            cycles += rows * (visible * plain + evaluated * masked)
    return flops, cycles


def compile_report(config: config_lib.Config, what: str, topology: str, slices: int, frames, effort: str,
                   schedules: bool = False) -> dict:
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
    latent_frames, latent = batches.latent_shape(config, frames)
    layout = config.model.layout(latent_frames, *latent[:2])
    mesh = partitioning.make_mesh(config.mesh, topology_devices(topology, slices))
    report = {'what': what, 'topology': topology, 'slices': slices, 'chips': mesh.size,
              'mesh': dict(mesh.shape), 'remat': config.model.remat, 'backend': config.model.attention_backend,
              'scenes': len(frames), 'tokens': layout.num_tokens, 'effort': effort, 'hbm_gib': chip.hbm_gib,
              'versions': {name: importlib.metadata.version(name) for name in ('libtpu', 'jax')}}
    started = time.monotonic()
    lowered, arguments = (lower_train if what == 'train' else lower_sample)(config, latent_frames, latent, mesh)
    report['lower_seconds'] = time.monotonic() - started
    try:
        compiled = lowered.compile(compiler_options={'optimization_level': EFFORTS[effort]})
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return report | {'fits': False, 'error': str(error).splitlines()[0]}
    report['compile_seconds'] = time.monotonic() - started
    memory = compiled.memory_analysis()
    gib = {'arguments': memory.argument_size_in_bytes, 'outputs': memory.output_size_in_bytes,
           'aliased': -memory.alias_size_in_bytes, 'temporaries': memory.temp_size_in_bytes}
    total = sum(gib.values())
    gib |= {'total': total, 'peak': memory.peak_memory_in_bytes, 'host': memory.host_temp_size_in_bytes}
    report['gib'] = {k: v / GIB for k, v in gib.items()}
    report['arguments_gib'] = {k: v / GIB for k, v in arguments.items()}
    report['fits'] = total <= chip.hbm_gib * GIB
    report |= _work(config, layout, what, mesh, chip, compiled.as_text(), topology if schedules else None)
    return report


def _work(config, layout, what, mesh, chip, text, schedules: str | None) -> dict:
    program = hlo.analyze(text)
    attention, backend = 0.0, config.model.attention_backend
    if backend in ('splash', 'jax_splash'):
        blocks = splash.visited_blocks(layout, config.model.pattern, splash.BLOCKS[mesh.devices.flat[0].device_kind])
        bundles = schedules and tasks.kernel_bundles(
            schedules, config.model.attention_head_dim, 'tokamax' if backend == 'splash' else 'jax', blocks[0])
        attention, cycles = kernel_work(program.kernels, blocks, bundles)
        program.cycles |= {'attention kernels': cycles} if schedules else {}
    examples = config.train.batch_size if what == 'train' else max(1, mesh.shape['data'] * mesh.shape['fsdp'] // 2)
    model = hardware.model_flops(config, layout, what)
    executed = program.flops + attention
    return {
        'flops_per_chip': {'executed': executed, 'attention kernels': attention,
                           'model': examples * sum(model.values()) / mesh.size},
        'executed_over_model': executed * mesh.size / (examples * sum(model.values())),
        'collectives': {k: {'times': n, 'gb': b / 1e9} for k, (n, b) in program.collectives.items()},
        'largest_loop_all_reduces': [{'mb': b / 1e6, 'operation': n} for b, n in program.loop_all_reduces[:5]],
        'cycles': program.cycles,
        'lower_limit_seconds': executed / chip.peak_flops,
    }


def to_markdown(r: dict) -> str:
    """A report as Markdown."""
    mesh = ' x '.join(f'{k} {v}' for k, v in r['mesh'].items() if v > 1)
    lines = [f'## {r["what"]} on {r["topology"]}' + (f' x {r["slices"]}' if r['slices'] > 1 else ''), '',
             f'{r["chips"]} chips ({mesh}), {r["scenes"]} scenes, {r["tokens"]} tokens, remat {r["remat"]}, '
             f'attention {r["backend"]}. Compiled by libtpu {r["versions"]["libtpu"]} (jax {r["versions"]["jax"]}), '
             'not run.', '']
    if 'error' in r:
        return '\n'.join([*lines, f'DOES NOT FIT: {r["error"]}', ''])
    gib, flops = r['gib'], r['flops_per_chip']
    rows = [{'GiB per chip': k, 'value': v} for k, v in gib.items()]
    rows += [{'GiB per chip': f'  of arguments: {k}', 'value': v} for k, v in r['arguments_gib'].items()]
    moved = [{'collective': k} | v for k, v in r['collectives'].items()]
    lines += [metric_writer.format_table(rows, ('GiB per chip', 'value')), '',
              f'{"Fits" if r["fits"] else "DOES NOT FIT"}: {gib["total"]:.2f} of {r["hbm_gib"]} GiB.', '',
              f'FLOPs per chip: executed {flops["executed"]:.3e} (attention kernels {flops["attention kernels"]:.3e}), '
              f'model {flops["model"]:.3e}, executed / model {r["executed_over_model"]:.3f}.', '',
              metric_writer.format_table(moved, ('collective', 'times', 'gb')), '',
              'Largest all-reduces inside loops: ' + ('; '.join(
                  f'{a["mb"]:.2f} MB {a["operation"].split("/", 3)[-1][-70:]}' for a in r['largest_loop_all_reduces'])
                  or 'none') + '.', '',
              'Estimated cycles outside collectives: ' + ', '.join(
                  f'{k} {v / 1e6:.0f} M' for k, v in r['cycles'].items()) + (
                      ' (quick schedules: --effort=0 for real ones)' if r['effort'] < 0 else '') + '.',
              f'At least {r["lower_limit_seconds"]:.2f} s: executed FLOPs / peak FLOP/s of the chip.', '']
    return '\n'.join(lines)
