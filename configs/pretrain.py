"""Pretraining of the multi-scene masks: unrelated scenes side by side, none of them given.

  python -m mask2dit_jax.main --config=configs/pretrain.py:5b --checkpoint=CogVideoX-5b --workdir=runs/pretrained \\
    --config.data.encoded=data/clips
  python -m mask2dit_jax.aot --config=configs/pretrain.py:tpu_native,v6e-64

After the colon as in configs/sft.py, from which it differs in that scenes are unrelated clips and
none is given. Without --checkpoint the parameters are random, and the VAE that encoded the clips is
used.
"""

import importlib.util
import pathlib

_SPEC = importlib.util.spec_from_file_location('sft', pathlib.Path(__file__).with_name('sft.py'))
sft = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sft)
VARIANTS = sft.VARIANTS


def get_config(variant='5b'):
    c = sft.get_config(variant)
    c.train.conditional_probability = 0.0
    c.data.scenes = 'unrelated'
    return c
