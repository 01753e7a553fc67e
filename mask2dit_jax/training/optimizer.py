"""The optimizer: AdamW or Muon, under a learning rate schedule and gradient clipping."""

import jax
import optax

from mask2dit_jax import config as config_lib


def make_optimizer(cfg: config_lib.OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Muon under warm-up and cosine."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        cfg.learning_rate,
        cfg.warmup_steps,
        max(steps, cfg.warmup_steps + 1),
        cfg.learning_rate * cfg.final_fraction,
    )
    if cfg.name == 'muon':
        # One orthogonalisation per layer and matrix: the stacked layer axis is a batch axis.
        def matrices(params):
            return jax.tree_util.tree_map_with_path(
                lambda path, x: (
                    optax.contrib.MuonDimensionNumbers(-2, -1)
                    if path[0].key == 'blocks'
                    and path[1].key in ('attn', 'ff_in', 'ff_out')
                    and path[-1].key == 'kernel'
                    else None
                ),
                params,
            )

        update = optax.contrib.muon(
            rate,
            adam_b1=cfg.b1,
            adam_b2=cfg.b2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            adam_weight_decay=cfg.weight_decay,
            consistent_rms=cfg.muon_rms,
            muon_weight_dimension_numbers=matrices,
        )
    else:
        update = optax.adamw(rate, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay)
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), update)
