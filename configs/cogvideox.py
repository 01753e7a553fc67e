"""CogVideoX and Mask²DiT at their released sizes: fine-tuning one of them, and what its inference defaults are.

  python -m mask2dit_jax.main --config=configs/cogvideox.py:5b --checkpoint=CogVideoX-5b --workdir=runs/5b
  python -m mask2dit_jax.sample --checkpoint=CogVideoX-5b --prompt="..." --prompt="..." --prompt="..."

Variants: `2b` (sin-cos positions), `5b` (rotary; Mask²DiT's), `1.5-5b` (two frames a token). --checkpoint is a model
folder, whose own config.json wins over the sizes here. Recipe: Mask²DiT's (AdamW, rate 1e-5, warm-up 100 steps, weight
decay 0.03, 3 scenes of 49 frames, half of them with given scenes), with clipping that acts, caption dropout and an EMA.
It trains on rendered stories. Parameters, EMA and Adam's moments take 16 bytes a parameter: 27 GB at 2B, 89 GB at 5B.
"""
from mask2dit_jax import config as config_lib

VARIANTS = ('5b', '2b', '1.5-5b')


def get_config(variant='5b'):
    if variant not in VARIANTS:
        raise ValueError(f'configs/cogvideox.py has no variant {variant!r}: use one of {", ".join(VARIANTS)}.')
    c = config_lib.default()
    c.model.update(position_rule='reference', remat='full')
    if variant == '2b':
        c.model.update(num_layers=30, num_attention_heads=30, rotary=False)
        c.schedule.snr_shift_scale = 3.0
    if variant == '1.5-5b':
        c.model.update(patch_size_t=2, patch_bias=False, sample_height=300, sample_width=300, sample_frames=81)
    c.data.update(layouts=((49, 49, 49),), size_px=480, num_train=64, num_test=8, fps=8.0)
    c.optimizer.update(learning_rate=1e-5, warmup_steps=100, eps=1e-10, weight_decay=0.03)
    c.train.update(steps=1000, batch_size=8, conditional_probability=0.5)
    c.eval.update(stories=8, batch_size=1)
    return c
