"""Compiles the training step or the sampling loop for a TPU slice, without a TPU, and says whether
it fits into the chips' memory.

Required flag: --config, the configuration file, with a slice after the colon (or --topology).

  python -m mask2dit_jax.aot --config=configs/sft.py:v5p-128
  python -m mask2dit_jax.aot --config=configs/sft.py:v6e-8 --what=sample --effort=quick \\
    --out=runs/aot
  python -m mask2dit_jax.aot --config=configs/sft.py:v5p-128 --scenes=24 \\
    --config.model.remat=offload_layer
  python -m mask2dit_jax.aot --config=configs/sft.py:v5p-8 --what=extend --scenes=4 \\
    --config.model.pattern=causal

The TPU's own compiler (libtpu, on any machine) compiles the very functions that main and sample
run, from shapes alone. --what=extend is sampling the last of --scenes with a cache of the others;
--what=sample with as many scenes computes all of them at every step. The report has memory per
chip, FLOPs, collectives and estimated cycles. It is printed and, with --out, written as Markdown
and JSON. Nothing runs: the seconds in the report are lower limits, and their formula stands beside
them.

The exit code is 0 if everything fits, else 1.
"""

import json
import math
import pathlib
import re
import sys

import jax
from absl import app, flags

from mask2dit_jax import config as config_lib
from mask2dit_jax import logs, paths, presets
from mask2dit_jax.aot import compiler, report
from mask2dit_jax.distributed import mesh as mesh_lib


def _topology(config: config_lib.Config) -> str:
    """The topology of --topology, or of the configuration's slice."""
    if _TOPOLOGY.value:
        return _TOPOLOGY.value
    if not config.mesh.slice:
        raise app.UsageError(
            'The configuration names no slice: give one after the colon, or --topology.'
        )
    return presets.SLICES[config.mesh.slice].topology


def _num_slices(config: config_lib.Config, topology: str) -> int:
    """How many slices of the topology the mesh fills."""
    # A topology in another form is refused later, by topology_devices.
    if not re.fullmatch(r'\w+:\d+(x\d+)*', topology):
        return 1
    shape = topology.split(':')[1]
    chips = math.prod(int(size) for size in shape.split('x'))
    devices = math.prod(getattr(config.mesh, axis) for axis in mesh_lib.AXES)
    return max(1, devices // chips) if chips else 1


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    unknown = sorted(set(_WHAT.value) - set(compiler.WHAT))
    if unknown:
        raise app.UsageError(
            f'--what={",".join(unknown)} is unknown: use {", ".join(compiler.WHAT)}, or several.'
        )

    # JAX itself stays on the CPU; only the compiler is the TPU's.
    jax.config.update('jax_platforms', 'cpu')
    logs.quiet_libraries()

    config = config_lib.parse(_CONFIG.value)
    topology = _topology(config)
    slices = _num_slices(config, topology)
    frames = config.data.layouts[0]
    if _SCENES.value is not None:
        frames = (frames[0],) * _SCENES.value

    reports = []
    for what in _WHAT.value:
        reports.append(
            compiler.compile_report(
                config, what, topology, slices, frames, _EFFORT.value, _KERNEL_CYCLES.value
            )
        )

    text = '\n'.join(report.to_markdown(each) for each in reports)
    print(text)
    if _OUT.value:
        out = pathlib.Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        (out / 'aot.md').write_text(text)
        (out / 'aot.json').write_text(json.dumps(reports, indent=2) + '\n')
    sys.exit(0 if all(each['fits'] for each in reports) else 1)


if __name__ == '__main__':
    _CONFIG = config_lib.define_flag('Configuration file, with a slice after the colon.')
    _TOPOLOGY = flags.DEFINE_string(
        'topology',
        None,
        "Topology in place of the slice's, e.g. v6e:8x8; the mesh must fill it.",
    )
    _WHAT = flags.DEFINE_list(
        'what', ['train'], f'What is compiled: {", ".join(compiler.WHAT)}, or several.'
    )
    _SCENES = flags.DEFINE_integer(
        'scenes',
        None,
        "Number of scenes, each as long as the first scene of the configuration's first layout. "
        'Without the flag that layout is compiled as it is.',
        lower_bound=1,
    )
    _EFFORT = flags.DEFINE_enum(
        'effort',
        'full',
        [*compiler.EFFORTS],
        "The compiler's effort. With quick it takes two thirds of the time and plans nearly the "
        'same memory, but its schedules are slower.',
    )
    _KERNEL_CYCLES = flags.DEFINE_bool(
        'kernel_cycles',
        False,
        "Whether to count the attention kernels' cycles in their schedules, too. This takes a "
        'minute longer.',
    )
    _OUT = flags.DEFINE_string(
        'out', None, 'Folder for aot.md and aot.json. Without it the report is only printed.'
    )
    flags.mark_flag_as_required('config')
    paths.check_flags_local('out')
    app.run(main)
