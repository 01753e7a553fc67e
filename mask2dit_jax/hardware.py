"""What TPU chips can do, and what the model asks of them."""
import dataclasses

import numpy as np

from mask2dit_jax import config as config_lib
from mask2dit_jax.layout import SceneLayout, visible


@dataclasses.dataclass(frozen=True)
class Chip:
    """JAX's name, what the compiler may use of memory (GiB, from its own error messages), and peak bf16 FLOP/s."""
    device_kind: str
    hbm_gib: float
    peak_flops: float
    topology_options: tuple = ()


CHIPS = {
    # v4 has two cores that show as one device; the compiler must be told.
    'v4': Chip('TPU v4', 30.75, 275e12, (('chip_config_name', 'megacore'), ('chips_per_host_bounds', (2, 2, 1)))),
    'v5e': Chip('TPU v5 lite', 15.75, 197e12),
    'v5p': Chip('TPU v5', 95.74, 459e12),
    'v6e': Chip('TPU v6 lite', 31.25, 918e12),
}


def model_flops(config: config_lib.Config, layout: SceneLayout, what: str) -> dict[str, float]:
    """FLOPs that one example needs, 'dense' and 'attention'.

    Forward, dense: 24·E² per layer and token, and the projections at both ends; attention: 4·E per visible pair. A
    training step takes 3 times the dense products and 3.5 times the attention's, whose backward pass has five products
    of the size of a forward pass's two. Sampling takes two forward passes a step.
    """
    m, e = config.model, config.model.width
    seen = sum(_tokens(layout, i, a) * _tokens(layout, j, b) for i in range(layout.num_scenes)
                  for j in range(layout.num_scenes) for a in (0, 1) for b in (0, 1)
                  if visible(m.pattern, np.int32(i), np.bool_(a), np.int32(j), np.bool_(b)))
    ends = 2 * e * (layout.num_video * m.patch_size ** 2 * (m.patch_size_t or 1) * (m.in_channels + m.out_channels)
                    + layout.num_text * m.text_embed_dim)
    dense, pairs = m.num_layers * 24 * e ** 2 * layout.num_tokens + ends, m.num_layers * 4.0 * e * seen
    times = (3, 3.5) if what == 'train' else (2 * config.sample.steps,) * 2
    return {'dense': times[0] * dense, 'attention': times[1] * pairs}


def _tokens(layout, scene, is_text):
    start, stop = layout.text_range(scene) if is_text else layout.video_range(scene)
    return stop - start
