"""The FLOPs that the model needs."""

from mask2dit_jax.attention import masks
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models import dit


def forward_flops(cfg: dit.DiTConfig, layout: SceneLayout) -> dict[str, float]:
    """FLOPs of a forward pass for one example: 'dense' and 'attention'.

    Dense: 24·E² per layer and token, and the projections at both ends. Attention: 4·E per layer and
      visible pair.
    """
    e = cfg.width
    ends = (
        2
        * e
        * (
            layout.num_video
            * cfg.patch_size**2
            * (cfg.patch_size_t or 1)
            * (cfg.in_channels + cfg.out_channels)
            + layout.num_text * cfg.text_embed_dim
        )
    )
    return {
        'dense': cfg.num_layers * 24 * e**2 * layout.num_tokens + ends,
        'attention': cfg.num_layers * 4.0 * e * masks.segment_pairs(layout, cfg.pattern),
    }


def training_flops(cfg: dit.DiTConfig, layout: SceneLayout) -> dict[str, float]:
    """FLOPs of a training step for one example: 3 times the dense products of a forward pass, and
    3.5 times those of its attention, whose backward pass has five products of the size of the
    forward pass's two."""
    forward = forward_flops(cfg, layout)
    return {'dense': 3 * forward['dense'], 'attention': 3.5 * forward['attention']}
