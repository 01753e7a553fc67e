"""Keys and values of scenes that are done, for the scenes after them.

Under the pattern 'causal' video sees the video of earlier scenes, and nothing of an earlier scene
sees a later one. So all that a scene needs of those before it are, in every layer, the keys and
values of their video, which no later scene changes (Mask²DiT, section 3.2, with the mask made
causal).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Patterns under which no token of a scene sees a later scene.
PATTERNS = ('causal', 'isolated')


class KVCache(NamedTuple):
    """Keys and values of the video of some scenes, in story order.

    Keys are as they are before rotary positions: what is remembered may come to stand elsewhere.
    Heads and their features are one axis: alone, 64 features would fill half of a TPU's lanes, and
    every cache twice its size.

    Attributes:
      keys, values: [layers, B, L, N·D]; inside a layer [B, L, N·D], in its attention [B, L, N, D].
    """

    keys: jax.Array
    values: jax.Array


def insert(x, cached, num_text: int):
    """Puts what is remembered between the captions and the video of a sequence.

    Args:
      x: [B, L, N, D], text tokens first.
      cached: [B, L', N, D].
      num_text: text tokens of x.

    Returns:
      [B, L + L', N, D], the order of SceneLayout.key_segments.
    """
    return jnp.concatenate([x[:, :num_text], cached, x[:, num_text:]], axis=1)
