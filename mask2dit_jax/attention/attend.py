"""Attention over the joint [text, video] sequence under a scene pattern (Mask²DiT, section 3.2).

Every backend has one signature and one result; backends differ only in how they compute. `dense`
builds the mask and is the definition. `blockwise` is plain XLA that never forms an L x L array and
never repeats the keys or values of video.

What the backward pass needs of the result is named 'attention' (jax.ad_checkpoint), so that
rematerialization can keep or offload it.
"""

from mask2dit_jax.attention import blockwise as blockwise_lib
from mask2dit_jax.attention import dense as dense_lib
from mask2dit_jax.attention import flash, kv_cache, splash
from mask2dit_jax.distributed import context_parallel
from mask2dit_jax.layout import SceneLayout


def _splash(kernel: str):
    """The splash backend with one of splash.KERNELS, in blocks of the size that suits the chip."""

    def attend(q, k, v, layout, pattern):
        block = splash.block_of_chip()
        return splash.attend(q, k, v, layout, pattern, block=block, kernel=kernel)

    return attend


# Functions of (q, k, v, layout, pattern), by the name that model.attention_backend gives: 'splash'
# where a configuration names a TPU slice (presets.py), otherwise 'blockwise'. The block size of
# every TPU chip is in hardware.CHIPS.
BACKENDS = {
    # Any device: plain XLA with the whole [L, L] mask. For tests and tiny models.
    'dense': dense_lib.dense,
    # Any device: plain XLA, memory linear in L.
    'blockwise': blockwise_lib.blockwise,
    # TPU: the Pallas kernel of tokamax, which evaluates the mask only in blocks that need it.
    'splash': _splash('tokamax'),
    # TPU: the Pallas kernel that comes with JAX.
    'jax_splash': _splash('jax'),
    # NVIDIA GPU: cuDNN's flash attention.
    'cudnn': flash.flash,
}


def attend(
    q,
    k,
    v,
    layout: SceneLayout,
    pattern: str,
    backend: str,
    cache: kv_cache.KVCache | None = None,
):
    """Scaled dot-product attention under a scene pattern, on the mesh that is being traced for.

    Args:
      q, k, v: [B, L, N, D], text tokens first; any float dtype. Scores and softmax are float32.
      layout: says which token belongs to which scene; its num_tokens must be L.
      pattern: one of masks.PATTERNS.
      backend: one of BACKENDS.
      cache: of one layer, the video of the layout's remembered scenes, which the queries see too;
        its heads are spread over the mesh's tensor and context axes.

    Returns:
      [B, L, N, D] in q's dtype.

    Raises:
      ValueError: if the pattern or the backend is unknown, if the device cannot run the backend, if
        L is not the layout's, or if B, L or N do not divide over the mesh.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f'Unknown attention backend {backend!r}: use one of {", ".join(BACKENDS)}.'
        )

    fits = q.shape == k.shape == v.shape and q.ndim == 4 and q.shape[1] == layout.num_tokens
    if not fits:
        raise ValueError(
            f'Attention over {layout} needs q, k, v of shape [B, {layout.num_tokens}, N, D], '
            f'got {q.shape}, {k.shape}, {v.shape}.'
        )

    remembered = 0 if cache is None else cache.keys.shape[1]
    if remembered != layout.num_remembered:
        raise ValueError(
            f'Attention over {layout} needs a cache of {layout.num_remembered} tokens, '
            f'got {remembered}.'
        )

    def attend_to_all(q, k, v, layout, pattern, *cache):
        if cache:
            k, v = (kv_cache.insert(*pair, layout.num_text) for pair in zip((k, v), cache))
        return BACKENDS[backend](q, k, v, layout, pattern)

    return context_parallel.attend(q, k, v, layout, pattern, attend_to_all, cache or ())
