"""Fine-tuning CogVideoX or Mask²DiT: consecutive scenes, half of the time with leading scenes given.

  python -m mask2dit_jax.main --config=configs/sft.py:5b --checkpoint=CogVideoX-5b --workdir=runs/5b
  python -m mask2dit_jax.aot --config=configs/sft.py:v5p-128

After the colon a model (5b, the default, 2b, 1.5-5b, tpu_native), a slice (v4-, v5p-8, 128, 256, 512; v5e-, v6e-8, 64,
128, 256), or both: 2b,v6e-64; two slices: v6e-256x2. --checkpoint is a model folder, whose own config.json wins over
the sizes here. Recipe: Mask²DiT's (AdamW, rate 1e-5, warm-up 100 steps, weight decay 0.03, 3 scenes of 49 frames), with
clipping that acts, caption dropout and an EMA. Parameters, EMA and Adam's moments take 16 bytes a parameter: 27 GB at
2B, 89 GB at 5B; with LoRA, --config.lora.rank=64, 7 GB and 23 GB. It trains on rendered stories, which are square; the
configurations of slices have the published size, 480x720, which stories cannot fill, and are only compiled so far.
"""
from mask2dit_jax import presets

VARIANTS = (*presets.MODELS, *presets.SLICES, 'v6e-256x2', '2b,v6e-64', 'tpu_native,v5e-256')


def get_config(variant='5b'):
    c = presets.pod(variant)
    c.model.position_rule = 'reference'
    if c.model.num_layers == 30:
        c.schedule.snr_shift_scale = 3.0
    c.data.update(codec='vae', layouts=((49, 49, 49),), height_px=480, width_px=720 if c.mesh.slice else 480,
                  num_train=64, num_test=8, fps=8.0)
    c.optimizer.update(learning_rate=1e-5, warmup_steps=100, eps=1e-10, weight_decay=0.03)
    c.train.update(steps=1000, conditional_probability=0.5)
    return c
