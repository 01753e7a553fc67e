"""Fine-tuning CogVideoX or Mask²DiT: consecutive scenes, half of the time with some of them given.

  python -m mask2dit_jax.main --config=configs/sft.py:5b --checkpoint=CogVideoX-5b --workdir=runs/5b \\
    --config.data.encoded=data/stories
  python -m mask2dit_jax.aot --config=configs/sft.py:v5p-128

After the colon a model (5b, the default, 2b, 1.5-5b, tpu_native), a slice (v4-, v5p-8, 128, 256,
512; v5e-, v6e-8, 64, 128, 256), or both: 2b,v6e-64; two slices: v6e-256x2; or tiny, which tries
everything in a minute on a folder of mask2dit_jax.tools.random_model. --checkpoint is a model
folder, or the workdir of a run, whose own config.json wins over the sizes here. data.encoded is a
data set of mask2dit_jax.encode, whose frames win over height_px and width_px; without one it trains
on rendered stories, which must be square.

Recipe: Mask²DiT's (AdamW, rate 1e-5, warm-up 100 steps, weight decay 0.03, 3 scenes of 49 frames,
given scenes in half of the examples), put right where its published launch went wrong: gradient
clipping acts, parameters and moments are float32, captions are dropped for guidance, the choice of
given scenes is made per example, and there is an EMA. train.given='any' gives any subset instead of
leading scenes. Parameters, EMA and Adam's moments take 16 bytes a parameter: 27 GB at 2B, 89 GB at
5B; with LoRA, --config.lora.rank=64, 7 GB and 23 GB.
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
    c = presets.pod('' if variant == 'tiny' else variant)
    c.model.position_rule = 'reference'
    if c.model.num_layers == 30:
        c.schedule.snr_shift_scale = 3.0
    c.data.update(
        codec='vae',
        layouts=((49, 49, 49),),
        height_px=480,
        width_px=720 if c.mesh.slice else 480,
        num_train=64,
        num_test=8,
        fps=8.0,
    )
    c.optimizer.update(learning_rate=1e-5, warmup_steps=100, eps=1e-10, weight_decay=0.03)
    c.train.update(steps=1000, conditional_probability=0.5)
    if variant == 'tiny':
        c.model.update(dtype='float32', attention_backend='dense', remat='none')
        c.data.update(layouts=((9, 9, 9),), height_px=32, width_px=32)
        c.optimizer.update(learning_rate=2e-3, warmup_steps=10)
        c.train.update(
            steps=60, batch_size=4, ema_decay=0.9, log_every_steps=10, checkpoint_every_steps=20
        )
        c.sample.update(steps=4, sheet_stories=2)
        c.eval.update(stories=8, batch_size=8)
    return c
