"""What is known of a compiled program, as numbers and as Markdown."""

import math

from mask2dit_jax import tables
from mask2dit_jax.aot import hlo, kernel_schedules
from mask2dit_jax.attention import splash
from mask2dit_jax.models import flops as flops_lib


def kernel_work(
    kernels, blocks: tuple[int, float, float], bundles: dict | None = None
) -> tuple[float, float]:
    """FLOPs of splash kernels per device, two products per visited query and key forward and five
    backward; and their cycles if bundles are given, one each where nothing stalls.

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
        flops += rows * (visible + evaluated) * products * 2.0 * block**2 * dim
        if bundles:
            plain, masked = bundles[direction]
            cycles += rows * (visible * plain + evaluated * masked)
    return flops, cycles


def _work(config, layout, what, mesh, chip, text, schedules: str | None) -> dict:
    program = hlo.analyze(text)
    attention, backend = 0.0, config.model.attention_backend
    if backend in ('splash', 'jax_splash'):
        blocks = splash.visited_blocks(layout, config.model.pattern, chip.splash_block)
        bundles = schedules and kernel_schedules.kernel_bundles(
            schedules,
            config.model.attention_head_dim,
            'tokamax' if backend == 'splash' else 'jax',
            blocks[0],
        )
        attention, cycles = kernel_work(program.kernels, blocks, bundles)
        program.cycles |= {'attention kernels': cycles} if schedules else {}
    examples = (
        config.train.batch_size
        if what == 'train'
        else max(1, mesh.shape['data'] * mesh.shape['fsdp'] // 2)
    )
    if what == 'train':
        model = flops_lib.training_flops(config.model, layout)
    else:  # two passes a step, the halves of guidance
        forward = flops_lib.forward_flops(config.model, layout)
        model = {k: 2 * config.sample.steps * v for k, v in forward.items()}
    executed = program.flops + attention
    return {
        'flops_per_chip': {
            'executed': executed,
            'attention kernels': attention,
            'model': examples * sum(model.values()) / mesh.size,
        },
        'executed_over_model': executed * mesh.size / (examples * sum(model.values())),
        'collectives': {
            k: {'times': n, 'gb': b / 1e9} for k, (n, b) in program.collectives.items()
        },
        'largest_loop_all_reduces': [
            {'mb': b / 1e6, 'operation': n} for b, n in program.loop_all_reduces[:5]
        ],
        'cycles': program.cycles,
        'lower_limit_seconds': executed / chip.peak_flops,
    }


def to_markdown(r: dict) -> str:
    """A report as Markdown."""
    mesh = ' x '.join(f'{k} {v}' for k, v in r['mesh'].items() if v > 1)
    lines = [
        f'## {r["what"]} on {r["topology"]}' + (f' x {r["slices"]}' if r['slices'] > 1 else ''),
        '',
        f'{r["chips"]} chips ({mesh}), {r["scenes"]} scenes, {r["tokens"]} tokens, remat {r["remat"]}, '
        f'attention {r["backend"]}. Compiled by libtpu {r["versions"]["libtpu"]} (jax {r["versions"]["jax"]}), '
        'not run.',
        '',
    ]
    if 'error' in r:
        return '\n'.join([*lines, f'DOES NOT FIT: {r["error"]}', ''])
    gib, flops = r['gib'], r['flops_per_chip']
    rows = [{'GiB per chip': k, 'value': v} for k, v in gib.items()]
    rows += [
        {'GiB per chip': f'  of arguments: {k}', 'value': v} for k, v in r['arguments_gib'].items()
    ]
    moved = [{'collective': k} | v for k, v in r['collectives'].items()]
    lines += [
        tables.format_table(rows, ('GiB per chip', 'value')),
        '',
        f'{"Fits" if r["fits"] else "DOES NOT FIT"}: {gib["total"]:.2f} of {r["hbm_gib"]} GiB.',
        '',
        f'FLOPs per chip: executed {flops["executed"]:.3e} (attention kernels {flops["attention kernels"]:.3e}), '
        f'model {flops["model"]:.3e}, executed / model {r["executed_over_model"]:.3f}.',
        '',
        tables.format_table(moved, ('collective', 'times', 'gb')),
        '',
        'Largest all-reduces inside loops: '
        + (
            '; '.join(
                f'{a["mb"]:.2f} MB {a["operation"].split("/", 3)[-1][-70:]}'
                for a in r['largest_loop_all_reduces']
            )
            or 'none'
        )
        + '.',
        '',
        'Estimated cycles outside collectives: '
        + ', '.join(f'{k} {v / 1e6:.0f} M' for k, v in r['cycles'].items())
        + (' (quick schedules: --effort=0 for real ones)' if r['effort'] < 0 else '')
        + '.',
        f'At least {r["lower_limit_seconds"]:.2f} s: executed FLOPs / peak FLOP/s of the chip.',
        '',
    ]
    return '\n'.join(lines)
