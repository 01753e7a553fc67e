"""The moving average (EMA) of the parameters, which sampling and the scores use."""

import jax.numpy as jnp
import optax

from mask2dit_jax import config as config_lib
from mask2dit_jax.models import lora


def update_ema(ema, params, step, limit: float):
    """Moves the average towards the new parameters.

    The decay grows with the number of updates, so that the average soon forgets the random start.

    Args:
      ema: the average so far.
      params: the parameters after this update, a tree like `ema`.
      step: int [], the updates done before this one.
      limit: the largest decay, config.train.ema_decay.

    Returns:
      decay * ema + (1 - decay) * params, with decay = min((1 + step) / (10 + step), limit).
    """
    decay = jnp.minimum((1.0 + step) / (10.0 + step), limit)
    return optax.incremental_update(new_tensors=params, old_tensors=ema, step_size=1 - decay)


def model_ema(config: config_lib.Config, state):
    """EMA parameters of the whole model.

    Args:
      config: the configuration.
      state: a train_step.TrainState. Under LoRA its `ema` holds only the LoRA tensors, which are
        merged into the frozen parameters.

    Returns:
      A tree like the model's parameters, with their shardings.
    """
    if config.lora.rank:
        return lora.merge_placed(state.frozen_params, state.ema, config.lora)
    return state.ema
