"""The optimizer: AdamW or Muon, under a learning rate schedule and gradient clipping."""

import re

import jax
import optax

from mask2dit_jax import config as config_lib

# The matrices of the blocks' attention and MLP. Norms, biases, embeddings and LoRA tensors are not
# among them.
_MUON_PARAMETERS = re.compile(r'blocks/(attn|ff_in|ff_out)/(.+/)?kernel')


def make_optimizer(config: config_lib.OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Makes the optimizer of a run.

    Gradients are clipped by their global norm and then go to AdamW or Muon. The learning rate grows
    linearly from 0 in the warm-up and then follows a cosine.

    Args:
      config: the optimizer's settings.
      steps: updates of the whole run, at whose end the cosine ends.
    """
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        # A run that is shorter than its warm-up never comes to the cosine, but optax wants one.
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )

    if config.name == 'muon':
        update = optax.contrib.muon(
            rate,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            adam_weight_decay=config.weight_decay,
            consistent_rms=config.muon_rms,
            muon_weight_dimension_numbers=_muon_matrices,
        )
    else:
        update = optax.adamw(
            rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay
        )

    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _muon_matrices(params):
    """The axes of each matrix that Muon updates; None for a parameter that is left to AdamW."""

    def axes(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        if not _MUON_PARAMETERS.fullmatch(name):
            return None

        # Layers are stacked on the leading axis, which Muon takes for a batch: it orthogonalises
        # the matrix of each layer by itself.
        return optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    return jax.tree_util.tree_map_with_path(axes, params)
