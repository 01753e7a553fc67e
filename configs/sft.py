"""Fine-tuning CogVideoX or Mask²DiT on consecutive scenes, some of which are given in half of the
examples.

  python -m mask2dit_jax.main --config=configs/sft.py:5b --workdir=runs/5b \\
    --checkpoint=CogVideoX-5b --config.data.encoded=data/stories
  python -m mask2dit_jax.aot --config=configs/sft.py:v5p-128

Variants, after the colon:
  a model    5b (the default), 2b, 1.5-5b or tpu_native
  a slice    v4-, v5p-8, 128, 256, 512; v5e-, v6e-8, 64, 128, 256; two slices as v6e-256x2
  both       2b,v6e-64
  tiny       tries everything in a minute, on a folder of mask2dit_jax.tools.random_model

--checkpoint is a model folder, or the workdir of a run; its own config.json then sets the model's
sizes. config.data.encoded is a data set of mask2dit_jax.encode; its frames then set height_px and
width_px. Training needs both; aot needs neither.

The recipe is Mask²DiT's: AdamW, learning rate 1e-5, 100 warm-up steps, weight decay 0.03, 3 scenes
of 49 frames, given scenes in half of the examples. Where the published launch script departs from
the recipe, this file does not follow the script: gradients are clipped, parameters and moments are
float32, captions are dropped for guidance, the given scenes are chosen per example, and there is an
EMA. train.given='any' gives any subset of scenes instead of leading ones.

Memory: parameters, EMA and Adam's moments take 16 bytes per parameter, 27 GB for 2B and 89 GB for
5B. With LoRA (--config.lora.rank=64) they take 7 GB and 23 GB.
"""

from mask2dit_jax import presets

VARIANTS = (
    *presets.MODELS,
    'tiny',
    *presets.SLICES,
    'v6e-256x2',
    '2b,v6e-64',
    'tpu_native,v5e-256',
)


def get_config(variant='5b'):
    is_tiny = variant == 'tiny'
    config = presets.pod('' if is_tiny else variant)

    config.requires = ('init_from', 'data.encoded')

    # Positions and noise as in the released weights, 2B's (30 layers) shifted.
    config.model.position_rule = 'reference'
    if config.model.num_layers == 30:
        config.schedule.snr_shift_scale = 3.0

    config.data.update(
        codec='vae',
        layouts=((49, 49, 49),),
        height_px=480,
        width_px=720 if config.mesh.slice else 480,
        fps=8.0,
    )
    config.optimizer.update(learning_rate=1e-5, warmup_steps=100, eps=1e-10, weight_decay=0.03)
    config.train.update(steps=1000, conditional_probability=0.5)

    if is_tiny:
        config.model.update(dtype='float32', attention_backend='dense', remat='none')
        config.data.update(layouts=((9, 9, 9),), height_px=32, width_px=32)
        config.optimizer.update(learning_rate=2e-3, warmup_steps=10)
        config.train.update(
            steps=60, batch_size=4, ema_decay=0.9, log_every_steps=10, checkpoint_every_steps=20
        )
        config.sample.update(steps=4, sheet_stories=2)
        config.eval.update(stories=8, batch_size=8)
    return config
