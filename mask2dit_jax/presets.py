"""Models and TPU slices by name, as in --config=configs/sft.py:5b,v5p-128."""

import math

import ml_collections

from mask2dit_jax import config as config_lib
from mask2dit_jax import ranges
from mask2dit_jax.hardware import SLICES

# Differences from the defaults, which are CogVideoX-5B's. Heads of 64 leave half of a TPU's matrix
# units idle: tpu_native has heads of 128 at 5B's width and number of parameters. No weights were
# released for it, so it is trained from scratch.
MODELS = {
    '5b': {},
    '2b': {'num_layers': 30, 'num_attention_heads': 30, 'rotary': False},
    '1.5-5b': {
        'patch_size_t': 2,
        'patch_bias': False,
        'sample_height': 300,
        'sample_width': 300,
        'sample_frames': 81,
    },
    'tpu_native': {'num_attention_heads': 24, 'attention_head_dim': 128},
}


def pod(variant: str) -> ml_collections.ConfigDict:
    """Returns the defaults for a model on a slice.

    Args:
      variant: 'MODEL', 'SLICE' or 'MODEL,SLICE'; the model is 5b unless one is named. 'v6e-256x2'
        means two slices, between which only gradients travel. Without a slice the configuration is
        for one device and attention in plain XLA.

    Raises:
      ValueError: naming the variant that is not known.
    """
    words = variant.split(',') if variant else []
    model = words.pop(0) if words and words[0] in MODELS else '5b'
    slice_name = words.pop(0) if words else ''
    kind, _, count = slice_name.partition('x')

    known_kind = not slice_name or kind in SLICES
    known_count = not count or (count.isdigit() and count != '0')
    if words or not known_kind or not known_count:
        near = ranges.nearest(variant, (*MODELS, *SLICES))
        raise ValueError(
            f'{variant!r} is not a variant of this file{near}: give MODEL, SLICE or MODEL,SLICE, '
            f'with a model of {", ".join(MODELS)} and a slice of {", ".join(SLICES)}, several as '
            'in v6e-256x2.'
        )

    config = config_lib.default()
    config.model.update(MODELS[model], remat='full')
    config.eval.update(stories=8, batch_size=1)
    if not slice_name:
        return config

    chips = SLICES[kind].chips
    context = math.gcd(SLICES[kind].context, config.model.num_attention_heads)
    config.mesh.update(slice=kind, data=int(count or 1), fsdp=chips // context, context=context)
    config.model.update(attention_backend='splash', remat='save_attention')

    # One example for every group of chips that share the tokens of an example.
    groups = config.mesh.data * config.mesh.fsdp
    config.train.batch_size = groups
    config.sample.sheet_stories = groups
    config.eval.update(stories=groups, batch_size=groups)
    return config
