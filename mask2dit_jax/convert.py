"""The three networks of a released folder: reference names, shapes and configs <-> Flax parameters.

A model folder in diffusers' layout has transformer/, vae/, text_encoder/ (each config.json and
.safetensors), tokenizer/ and scheduler/. Loading is strict: a missing, unexpected or wrongly shaped
tensor is an error that names it.

    model, params = load_transformer('folder/transformer')
    v = model.apply({'params': params}, latents, text, t, frames=(13, 13, 13))

with latents [B, T, H, W, C] (the reference's (B, F, C, h, w) with channels moved last), text [B, S,
M, E], one timestep per scene t [B, S], and frames, the latent frames of each scene. Where the
reference sets clip_idx=i, t is the timestep in column i and 0 elsewhere. attn_msk_version becomes
`model.cfg.pattern`.

    model, params = load_vae('folder/vae')             # vae.encode(model.cfg, params, pixels),
    vae.decode(...) model, params = load_t5('folder/text_encoder')     # t5.encode(model.cfg,
    params, ids)

As a command it converts a whole model folder to Orbax, which loads faster, and back:

  python -m mask2dit_jax.convert --from=CogVideoX-5b --to=cogvideox-orbax
  python -m mask2dit_jax.convert --from=cogvideox-orbax --to=exported
  python -m mask2dit_jax.convert --from=runs/mine --to=exported      # EMA of a training run, for PyTorch users

A run with LoRA gives both: transformer/ with LoRA merged into its base, and
pytorch_lora_weights.safetensors, the LoRA alone, for diffusers' load_lora_weights and for `sample
--lora`.
"""

import time

from absl import app, flags

from mask2dit_jax import logs
from mask2dit_jax.pretrained import export


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    logs.quiet_libraries()
    started = time.monotonic()
    counts = export.convert_folder(_FROM.value, _TO.value)
    listed = ', '.join(f'{kind} {count:,}' for kind, count in counts.items())
    print(f'Wrote {_TO.value} in {time.monotonic() - started:.0f} s; parameters: {listed}.')


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
        'New folder: Orbax from a released folder, safetensors from the others. A '
        'run with LoRA leaves transformer/, merged, and pytorch_lora_weights.safetensors, the '
        "LoRA alone, in diffusers' naming.",
        required=True,
    )
    app.run(main)
