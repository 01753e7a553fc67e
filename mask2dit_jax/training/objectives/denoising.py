"""What a training step asks for: timesteps, given scenes and dropped captions."""

import jax
import jax.numpy as jnp


def stratified_timesteps(key, batch: int, num_timesteps: int):
    """Integer timesteps [B], each uniform, together one in every B-th part of the range, in random
    order."""
    offset_key, order_key = jax.random.split(key)
    u = (
        jax.random.permutation(order_key, batch) + jax.random.uniform(offset_key, (batch,))
    ) / batch
    return jnp.minimum((u * num_timesteps).astype(jnp.int32), num_timesteps - 1)


def random_given(key, batch: int, num_scenes: int, probability: float, which: str = 'leading'):
    """Given scenes bool [B, S]: with this probability, per story, a random number of them but never
    all; the 'leading' ones, or 'any'."""
    if num_scenes == 1 or not probability:
        return jnp.zeros((batch, num_scenes), bool)
    coin_key, count_key, *order_key = jax.random.split(key, 3 if which == 'any' else 2)
    count = jax.random.randint(count_key, (batch, 1), 1, num_scenes)
    coin = jax.random.bernoulli(coin_key, probability, (batch, 1))
    order = jnp.broadcast_to(jnp.arange(num_scenes), (batch, num_scenes))
    if which == 'any':
        order = jax.random.permutation(order_key[0], order, axis=1, independent=True)
    return coin & (order < count)
