"""The FLOPs that the model needs, for utilisation (MFU) and for compile-time reports."""

import dataclasses

from mask2dit_jax import layout as layout_lib
from mask2dit_jax.attention import masks
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models import dit


def forward_flops(
    cfg: dit.DiTConfig, layout: SceneLayout, pattern: str | None = None
) -> dict[str, float]:
    """FLOPs of a forward pass for one example.

    Dense products need 24·E² per layer and token, plus the projections at both ends. Attention
    needs 4·E per layer and pair of tokens that the mask lets see each other.

    Args:
      cfg: the model's size.
      layout: the story's layout.
      pattern: attention pattern; None for the model's.

    Returns:
      'dense' and 'attention'.
    """
    width = cfg.width

    # Patches go in and out, text only goes in; a product of n inputs and m outputs is 2·n·m.
    patch_values = cfg.patch_size**2 * (cfg.patch_size_t or 1)
    video_ends = layout.num_video * patch_values * (cfg.in_channels + cfg.out_channels)
    text_ends = layout.num_text * cfg.text_embed_dim
    ends = 2 * width * (video_ends + text_ends)

    return {
        'dense': cfg.num_layers * 24 * width**2 * layout.num_tokens + ends,
        'attention': cfg.num_layers
        * 4.0
        * width
        * masks.segment_pairs(layout, pattern or cfg.pattern),
    }


def training_pass(
    cfg: dit.DiTConfig, layout: SceneLayout, objective: str
) -> tuple[SceneLayout, str]:
    """The layout and the attention pattern of a training step: under teacher forcing every scene
    comes twice."""
    if objective != 'teacher_forcing':
        return layout, cfg.pattern
    frames, _ = layout_lib.twice(layout.frames)
    return dataclasses.replace(layout, frames=frames), masks.FORCED


def training_flops(
    cfg: dit.DiTConfig, layout: SceneLayout, objective: str = 'denoising'
) -> dict[str, float]:
    """FLOPs of a training step for one example.

    A training step needs 3 times the dense products of a forward pass, and 3.5 times those of its
    attention, because attention's backward pass has five products of the size of the forward pass's
    two.

    Args:
      cfg: the model's size.
      layout: the story's layout.
      objective: of config.train.

    Returns:
      'dense' and 'attention'.
    """
    forward = forward_flops(cfg, *training_pass(cfg, layout, objective))
    return {'dense': 3 * forward['dense'], 'attention': 3.5 * forward['attention']}
