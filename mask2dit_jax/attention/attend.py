"""Attention over the joint [text, video] sequence under a scene pattern (Mask²DiT, section 3.2).

One signature, `attend`; backends differ in how they compute, never in what. `dense` builds the mask
and is the definition; `blockwise` is plain XLA that never forms an L x L array and never repeats
video keys or values.

What the backward pass needs of the result is named 'attention', so that rematerialization can keep
or offload it.
"""

from mask2dit_jax.attention import blockwise as blockwise_lib
from mask2dit_jax.attention import dense as dense_lib
from mask2dit_jax.attention import flash, splash
from mask2dit_jax.distributed import context_parallel
from mask2dit_jax.layout import SceneLayout


def _splash(kernel: str):
    def attend(q, k, v, layout, pattern):
        return splash.attend(q, k, v, layout, pattern, block=splash.block_of_chip(), kernel=kernel)

    return attend


# By name: XLA anywhere, XLA anywhere, tokamax's and jax's kernels on TPU, cuDNN on GPU.
BACKENDS = {
    'dense': dense_lib.dense,
    'blockwise': blockwise_lib.blockwise,
    'splash': _splash('tokamax'),
    'jax_splash': _splash('jax'),
    'cudnn': flash.flash,
}


def attend(q, k, v, layout: SceneLayout, pattern: str, backend: str):
    """Scaled dot-product attention under a scene pattern, on the mesh that is being traced for.

    Args:
      q, k, v: [B, L, N, D], text tokens first; any float dtype. Scores and softmax are float32.
      layout: says which token belongs to which scene; its num_tokens must be L.
      pattern: one of scenes.PATTERNS.
      backend: one of BACKENDS.

    Returns:
      [B, L, N, D] in q's dtype.

    Raises:
      ValueError: unknown pattern or backend, a backend that the device cannot run, L that is not
        the layout's, or a mesh that it does not divide over.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f'Unknown attention backend {backend!r}: use one of {", ".join(BACKENDS)}.'
        )
    if not (q.shape == k.shape == v.shape and q.ndim == 4 and q.shape[1] == layout.num_tokens):
        raise ValueError(
            f'Attention over {layout} needs q, k, v of shape [B, {layout.num_tokens}, N, D], '
            f'got {q.shape}, {k.shape}, {v.shape}.'
        )
    return context_parallel.attend(q, k, v, layout, pattern, BACKENDS[backend])
