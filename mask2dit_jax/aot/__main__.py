"""Compiles the training step and the sampling loop for a TPU slice, without a TPU, and says whether
they fit.

  python -m mask2dit_jax.aot --config=configs/sft.py:v5p-128
  python -m mask2dit_jax.aot --config=configs/sft.py:v6e-8 --what=sample --effort=quick --out=runs/aot
  python -m mask2dit_jax.aot --config=configs/sft.py:v5p-128 --config.model.remat=offload_layer --scenes=24

The very functions that main and sample run are compiled by the TPU's own compiler (libtpu, on any
machine), from shapes alone. Printed and, with --out, written as Markdown and JSON: memory per chip,
FLOPs, collectives, estimated cycles. Nothing runs: seconds are lower limits, with their formula.
The exit code is 0 if everything fits, else 1.
"""

import json
import math
import pathlib
import re
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from mask2dit_jax import config as config_lib
from mask2dit_jax import logs, presets
from mask2dit_jax.aot import compiler, report
from mask2dit_jax.distributed import mesh as mesh_lib


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    jax.config.update('jax_platforms', 'cpu')
    logs.quiet_libraries()
    config = config_lib.parse(_CONFIG.value)
    topology = _TOPOLOGY.value or (
        presets.SLICES[config.mesh.slice].topology if config.mesh.slice else None
    )
    if topology is None:
        raise app.UsageError(
            'The configuration names no slice: give one after the colon, or --topology.'
        )
    frames = config.data.layouts[0]
    frames = frames if _SCENES.value is None else (frames[0],) * _SCENES.value
    count = (
        math.prod(map(int, topology.split(':')[1].split('x')))
        if re.fullmatch(r'\w+:\d+(x\d+)*', topology)
        else 0
    )
    slices = (
        max(1, math.prod(getattr(config.mesh, a) for a in mesh_lib.AXES) // count) if count else 1
    )
    strange = sorted(set(_WHAT.value) - set(compiler.WHAT))
    if strange:
        raise app.UsageError(
            f'--what={",".join(strange)} is unknown: use {" or ".join(compiler.WHAT)}, or both.'
        )
    reports = [
        compiler.compile_report(
            config, what, topology, slices, frames, _EFFORT.value, _KERNEL_CYCLES.value
        )
        for what in _WHAT.value
    ]
    text = '\n'.join(map(report.to_markdown, reports))
    print(text)
    if _OUT.value:
        out = pathlib.Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        (out / 'aot.md').write_text(text)
        (out / 'aot.json').write_text(json.dumps(reports, indent=2) + '\n')
    sys.exit(0 if all(r['fits'] for r in reports) else 1)


if __name__ == '__main__':
    _CONFIG = config_flags.DEFINE_config_file(
        'config', None, 'Configuration, with a slice after the colon.', lock_config=True
    )
    _TOPOLOGY = flags.DEFINE_string(
        'topology',
        None,
        'Topology instead of that of the slice, e.g. v6e:8x8; the mesh must fill it.',
    )
    _WHAT = flags.DEFINE_list('what', ['train'], f'What to compile: {", ".join(compiler.WHAT)}.')
    _SCENES = flags.DEFINE_integer(
        'scenes', None, 'So many scenes of the length of the first.', lower_bound=1
    )
    _EFFORT = flags.DEFINE_enum(
        'effort',
        'full',
        [*compiler.EFFORTS],
        "The compiler's effort; quick takes two thirds of the "
        'time and plans nearly the same memory, but its schedules are slower.',
    )
    _KERNEL_CYCLES = flags.DEFINE_bool(
        'kernel_cycles',
        False,
        "Count the attention kernels' cycles in their schedules, too; takes a minute longer.",
    )
    _OUT = flags.DEFINE_string('out', None, 'Folder for aot.md and aot.json; default: print only.')
    flags.mark_flag_as_required('config')
    app.run(main)
