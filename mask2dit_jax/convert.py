"""Converts model folders between the released format and Orbax, and exports training runs.

Required flags: --from, what to read, and --to, the folder to write.

A converted folder has the layout of the released one, with an Orbax item params/ in the place of
the .safetensors files, and loads faster. Converted back, every tensor has the same bits.

  # A released folder to Orbax, and back.
  python -m mask2dit_jax.convert --from=CogVideoX-5b --to=cogvideox-orbax
  python -m mask2dit_jax.convert --from=cogvideox-orbax --to=exported

  # The EMA of a training run, for users of PyTorch.
  python -m mask2dit_jax.convert --from=runs/mine --to=exported

A run with LoRA gives two things: transformer/, with LoRA merged into its base, and
pytorch_lora_weights.safetensors, the LoRA alone, for diffusers' load_lora_weights and for `sample
--lora`.
"""

import time

from absl import app, flags

from mask2dit_jax import logs, paths
from mask2dit_jax.pretrained import export


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    logs.quiet_libraries()

    started = time.monotonic()
    counts = export.convert_folder(_FROM.value, _TO.value)

    seconds = time.monotonic() - started
    listed = ', '.join(f'{kind} {count:,}' for kind, count in counts.items())
    print(f'Wrote {_TO.value} in {seconds:.0f} s; parameters: {listed}.')


if __name__ == '__main__':
    _FROM = flags.DEFINE_string(
        'from',
        None,
        'Model folder, released or converted, or workdir or checkpoint of a training run.',
        required=True,
    )
    _TO = flags.DEFINE_string(
        'to',
        None,
        'New folder. It gets Orbax if --from is a released folder, and safetensors otherwise. A '
        'run with LoRA gives transformer/, merged, and pytorch_lora_weights.safetensors, the LoRA '
        "alone under diffusers' names.",
        required=True,
    )
    paths.check_flags_local('from', 'to')
    app.run(main)
