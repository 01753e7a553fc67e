"""The moving average of the parameters."""

from mask2dit_jax import config as config_lib
from mask2dit_jax.models import lora
from mask2dit_jax.training import train_step as train_step_lib


def model_ema(config: config_lib.Config, state: train_step_lib.TrainState):
    """EMA parameters of the whole model."""
    return (
        lora.merge_placed(state.frozen_params, state.ema, config.lora)
        if config.lora.rank
        else state.ema
    )
