"""Pretraining of the multi-scene masks: unrelated clips are the scenes, and none of them is given.

  python -m mask2dit_jax.main --config=configs/pretrain.py:5b --workdir=runs/pretrained \\
    --checkpoint=CogVideoX-5b --config.data.encoded=data/clips
  python -m mask2dit_jax.aot --config=configs/pretrain.py:tpu_native,v6e-64

Variants, after the colon, are those of configs/sft.py. Training needs config.data.encoded. Without
--checkpoint the parameters start at random, and the VAE is the one that encoded the clips.
"""

import importlib.util
import pathlib

# configs/ is not a package, so sft.py is loaded by its path.
_SPEC = importlib.util.spec_from_file_location('sft', pathlib.Path(__file__).with_name('sft.py'))
sft = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sft)
VARIANTS = sft.VARIANTS


def get_config(variant='5b'):
    config = sft.get_config(variant)
    config.requires = ('data.encoded',)
    config.train.conditional_probability = 0.0
    config.data.scenes = 'unrelated'
    return config
