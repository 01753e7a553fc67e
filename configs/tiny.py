"""A tiny multi-scene model on rendered stories, trained, sampled and scored on a laptop's CPU.

  python -m mask2dit_jax.main --config=configs/tiny.py --workdir=runs/tiny

Variants, after the colon:
  dual           both masks (the default)
  full           no attention mask
  isolated       a scene sees nothing of the others
  unconditional  dual, but no scene is ever given in training
  conditional    fine-tunes another run with given scenes: --config.init_from=runs/unconditional
  lora           as conditional, by LoRA of rank 8
  mixed          2 to 5 scenes of unequal length
  extend         windows of longer stories, whose captions often do not name what is given
  memory         characters and places with names, which leave and come back: windows of 4 scenes
  frames         9 frames a scene, in three latent frames: the first alone, then groups of four
  sharp          32 x 32 pixels, in four times as many tokens
  smoke          a few steps in seconds, to check that everything runs
"""

from mask2dit_jax import config as config_lib
from mask2dit_jax import ranges

VARIANTS = (
    'dual',
    'full',
    'isolated',
    'unconditional',
    'conditional',
    'lora',
    'mixed',
    'extend',
    'memory',
    'frames',
    'sharp',
    'smoke',
)


def get_config(variant='dual'):
    if variant not in VARIANTS:
        raise ValueError(
            f'configs/tiny.py has no variant {variant!r}{ranges.nearest(variant, VARIANTS)}: use '
            f'one of {", ".join(VARIANTS)}.'
        )

    config = config_lib.default()
    config.model.update(
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=48,
        in_channels=24,
        out_channels=24,
        text_embed_dim=64,
        time_embed_dim=96,
        max_text_seq_length=6,
        patch_size=1,
        sample_height=4,
        sample_width=4,
        sample_frames=4,
        learned_positions=True,
        attention_backend='dense',
        dtype='float32',
        remat='save_matmuls',
    )
    config.data.codec_components = 24
    config.optimizer.update(
        name='muon', learning_rate=8e-3, muon_rms=0.5, warmup_steps=50, final_fraction=0.02
    )
    config.train.update(
        steps=3000,
        batch_size=16,
        conditional_probability=0.5,
        conditional_from_step=2000,
        ema_decay=0.995,
        checkpoint_every_steps=1000,
    )
    config.sample.update(steps=20, guidance=1.5)

    if variant in ('full', 'isolated'):
        config.model.pattern = variant
    if variant == 'unconditional':
        config.train.conditional_probability = 0.0
    if variant in ('conditional', 'lora'):
        config.requires = ('init_from',)
    if variant == 'conditional':
        config.optimizer.learning_rate = 3e-3
        config.train.update(steps=800, conditional_from_step=0)
    if variant == 'lora':
        config.lora.rank = 8
        config.optimizer.update(name='adamw', learning_rate=1e-2)
        config.train.update(steps=800, conditional_from_step=0)
    if variant == 'mixed':
        config.data.layouts = (
            (4, 4, 4),
            (8, 4),
            (4, 4, 4),
            (4, 8, 4, 4),
            (4, 4, 4),
            (4, 4, 8, 4, 4),
        )
        config.train.steps = 6000
    if variant == 'extend':
        config.data.story_scenes = 4
        # Half of the windows are not named and always have given scenes: few others need any.
        config.train.update(steps=7000, conditional_from_step=500, conditional_probability=0.25)
    if variant == 'memory':
        config.model.max_text_seq_length = 8
        config.data.update(world='cast', layouts=((4, 4, 4, 4),), story_scenes=8, num_train=8192)
        config.train.steps = 6000
    if variant == 'frames':
        config.data.update(layouts=((9, 9, 9),), codec_first_frame=True)
        config.model.sample_frames = 9  # (9 - 1) / 4 + 1 = 3 latent frames
    if variant == 'sharp':
        config.data.update(height_px=32, width_px=32, codec_components=32)
        config.model.update(in_channels=32, out_channels=32, sample_height=8, sample_width=8)
    if variant == 'smoke':
        config.data.update(num_train=64, num_test=16)
        config.train.update(
            steps=12,
            conditional_from_step=6,
            checkpoint_every_steps=6,
            sample_every_steps=6,
            log_every_steps=3,
        )
        config.sample.update(steps=2, sheet_stories=2)
        config.eval.update(stories=16, batch_size=16)
    return config
