"""The work of a compiled program as numbers, and a report as Markdown."""

import itertools
import math

from mask2dit_jax import tables
from mask2dit_jax.aot import hlo, kernel_schedules
from mask2dit_jax.attention import splash
from mask2dit_jax.layout import SceneLayout


def kernel_work(
    kernels, blocks: dict[int, splash.VisitedBlocks], bundles: dict | None = None
) -> tuple[float, float]:
    """FLOPs and cycles of the splash kernels, per device.

    Every visited pair of a query and a key takes two products in the forward pass and five in the
    backward pass. A bundle takes one cycle where nothing stalls.

    Args:
      kernels: how often each kernel runs, as in hlo.Program.
      blocks: result of splash.visited_blocks, by the number of queries of a call.
      bundles: result of kernel_schedules.kernel_bundles at the same block size, or None.

    Returns:
      FLOPs, and cycles, which are 0 without bundles.

    Raises:
      ValueError: if a kernel is not one of splash's.
    """
    flops = 0.0
    cycles = 0.0
    for (name, shape), times in kernels.items():
        *heads, length, head_dim = shape
        if '_fwd' in name:
            direction = 'forward'
            products = 2
        elif '_dkv' in name:
            direction = 'backward'
            products = 5
            heads = heads[1:]  # the first axis has slots for parts of dq
        else:
            raise ValueError(f'Unknown kernel {name}.')

        block, visible, evaluated = blocks[length]
        query_blocks = times * math.prod(heads) * length / block
        flops += query_blocks * (visible + evaluated) * products * 2.0 * block**2 * head_dim
        if bundles:
            plain, masked = bundles[direction]
            cycles += query_blocks * (visible * plain + evaluated * masked)
    return flops, cycles


def program_work(
    config,
    passes: list[tuple[SceneLayout, str, dict[str, float]]],
    stories: int,
    mesh,
    chip,
    text: str,
    topology: str,
    schedules: bool,
) -> dict:
    """FLOPs, collectives and cycles of a compiled program.

    Args:
      config: the configuration.
      passes: layouts of a story, and the attention pattern and the FLOPs that the model needs for
        all passes over each.
      stories: stories per run, over all chips.
      mesh: the mesh that the program was compiled for.
      chip: the kind of chip, one of hardware.CHIPS.
      text: text of the compiled program.
      topology: topology that the kernels' schedules are compiled for.
      schedules: whether to count the cycles of the attention kernels.

    Returns:
      A JSON-like dict, a part of compiler.compile_report's.
    """
    program = hlo.analyze(text)

    # The compiler's text says nothing about the work inside the kernels.
    kernel_flops = 0.0
    backend = config.model.attention_backend
    if backend in ('splash', 'jax_splash'):
        blocks = {}
        for layout, pattern, _ in passes:
            visited = splash.visited_blocks(layout, pattern, chip.splash_block)
            for start, stop in itertools.pairwise(splash.query_edges(layout, chip.splash_block)):
                blocks[stop - start] = visited
        bundles = None
        if schedules:
            kernel = 'tokamax' if backend == 'splash' else 'jax'
            bundles = kernel_schedules.kernel_bundles(
                topology, config.model.attention_head_dim, kernel, visited.block
            )
        kernel_flops, kernel_cycles = kernel_work(program.kernels, blocks, bundles)
        if schedules:
            program.cycles['attention kernels'] = kernel_cycles

    story_flops = sum(sum(flops.values()) for _, _, flops in passes)
    executed = program.flops + kernel_flops
    return {
        'flops_per_chip': {
            'executed': executed,
            'attention kernels': kernel_flops,
            'model': stories * story_flops / mesh.size,
        },
        'executed_over_model': executed * mesh.size / (stories * story_flops),
        'collectives': {
            kind: {'times': total.times, 'gb': total.bytes / 1e9}
            for kind, total in program.collectives.items()
        },
        'largest_loop_all_reduces': [
            {'mb': reduced.bytes / 1e6, 'operation': reduced.operation}
            for reduced in program.loop_all_reduces[:5]
        ],
        'cycles': program.cycles,
        'lower_limit_seconds': executed / chip.peak_flops,
    }


def to_markdown(report: dict) -> str:
    """Returns a report of compiler.compile_report as Markdown."""
    title = f'## {report["what"]} on {report["topology"]}'
    if report['slices'] > 1:
        title += f' x {report["slices"]}'

    axes = ' x '.join(f'{axis} {size}' for axis, size in report['mesh'].items() if size > 1)
    versions = report['versions']
    lines = [
        title,
        '',
        f'{report["chips"]} chips ({axes}), {report["scenes"]} scenes, {report["tokens"]} tokens, '
        f'remat {report["remat"]}, attention {report["backend"]}. '
        f'Compiled by libtpu {versions["libtpu"]} (jax {versions["jax"]}), not run.',
        '',
    ]
    if 'error' in report:
        return '\n'.join([*lines, f'DOES NOT FIT: {report["error"]}', ''])

    # Memory.
    rows = [{'GiB per chip': name, 'value': size} for name, size in report['gib'].items()]
    for kind, size in report['arguments_gib'].items():
        rows.append({'GiB per chip': f'  of arguments: {kind}', 'value': size})
    verdict = 'Fits' if report['fits'] else 'DOES NOT FIT'
    lines += [
        tables.format_table(rows, ('GiB per chip', 'value')),
        '',
        f'{verdict}: {report["gib"]["total"]:.2f} of {report["hbm_gib"]} GiB.',
        '',
    ]

    # FLOPs and collectives.
    flops = report['flops_per_chip']
    rows = [{'collective': kind} | total for kind, total in report['collectives'].items()]
    reduced = [
        f'{each["mb"]:.2f} MB {each["operation"].split("/", 3)[-1][-70:]}'
        for each in report['largest_loop_all_reduces']
    ]
    lines += [
        f'FLOPs per chip: executed {flops["executed"]:.3e} '
        f'(attention kernels {flops["attention kernels"]:.3e}), model {flops["model"]:.3e}, '
        f'executed / model {report["executed_over_model"]:.3f}.',
        '',
        tables.format_table(rows, ('collective', 'times', 'gb')),
        '',
        f'Largest all-reduces inside loops: {"; ".join(reduced) or "none"}.',
        '',
    ]

    # Time.
    cycles = ', '.join(f'{kind} {count / 1e6:.0f} M' for kind, count in report['cycles'].items())
    quick = ' (of quick schedules; --effort=full has the real ones)'
    seconds = report['lower_limit_seconds']
    lines += [
        f'Estimated cycles outside collectives: {cycles}'
        f'{quick if report["effort"] == "quick" else ""}.',
        f'At least {seconds:.2f} s: executed FLOPs / peak FLOP/s of the chip.',
        '',
    ]
    return '\n'.join(lines)
