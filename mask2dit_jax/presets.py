"""Models and TPU slices by name: what stands after the colon of
--config=configs/sft.py:5b,v5p-128."""

import dataclasses
import math

import ml_collections

from mask2dit_jax import config as config_lib

# What differs from the defaults, which are CogVideoX-5B's: the released models, and one for the
# TPU's matrix units, which heads of 64 leave half idle: 24 heads of 128, parameters and width as
# 5B, to be trained from scratch.
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


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice: its name among topologies, and how many chips share the tokens of an example.

    Attributes:
      topology: generation and shape of the torus of chips.
      context: devices on the context axis where the number of heads allows; whole axes of the torus
        for 48 heads.
    """

    topology: str
    context: int

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.topology.split(':')[1].split('x')))


# By accelerator type, which counts cores for v4 and v5p (two a chip) and chips for v5e and v6e.
SLICES = {
    'v4-8': Slice('v4:2x2x1', 2),
    'v4-128': Slice('v4:4x4x4', 4),
    'v4-256': Slice('v4:4x4x8', 8),
    'v4-512': Slice('v4:4x8x8', 8),
    'v5p-8': Slice('v5p:2x2x1', 2),
    'v5p-128': Slice('v5p:4x4x4', 4),
    'v5p-256': Slice('v5p:4x4x8', 8),
    'v5p-512': Slice('v5p:4x8x8', 8),
    'v5e-8': Slice('v5e:2x4', 4),
    'v5e-64': Slice('v5e:8x8', 8),
    'v5e-128': Slice('v5e:8x16', 8),
    'v5e-256': Slice('v5e:16x16', 16),
    'v6e-8': Slice('v6e:2x4', 4),
    'v6e-64': Slice('v6e:8x8', 8),
    'v6e-128': Slice('v6e:8x16', 8),
    'v6e-256': Slice('v6e:16x16', 16),
}


def pod(variant: str, variants=tuple(MODELS)) -> ml_collections.ConfigDict:
    """The defaults for a model on a slice.

    Args:
      variant: 'MODEL', 'SLICE' or 'MODEL,SLICE'; the model is 5b unless named. 'v6e-256x2' means
        two slices, between which only gradients travel. Without a slice, one device and plain XLA
        attention.
      variants: names of the models that the file offers.

    Raises:
      ValueError: naming what is not known.
    """
    words = variant.split(',') if variant else []
    model = words.pop(0) if words and words[0] in variants else '5b'
    name = words.pop(0) if words else ''
    kind, _, count = name.partition('x')
    if words or (name and kind not in SLICES) or (count and not count.isdigit()) or count == '0':
        raise ValueError(
            f'{variant!r} is no variant of this file: give MODEL, SLICE or MODEL,SLICE, with a model of '
            f'{", ".join(variants)} and a slice of {", ".join(SLICES)}, several as in v6e-256x2.'
        )
    c = config_lib.default()
    c.model.update(MODELS[model], remat='full')
    c.eval.update(stories=8, batch_size=1)
    if name:
        context = math.gcd(SLICES[kind].context, c.model.num_attention_heads)
        c.mesh.update(
            slice=kind, data=int(count or 1), fsdp=SLICES[kind].chips // context, context=context
        )
        c.model.update(attention_backend='splash', remat='save_attention')
        # One example to every group of chips that share tokens; groups share parameters.
        groups = c.mesh.data * c.mesh.fsdp
        c.train.batch_size, c.sample.sheet_stories = groups, groups
        c.eval.update(stories=groups, batch_size=groups)
    return c
