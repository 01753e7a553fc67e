"""LoRA (arXiv 2106.09685): a kernel acts as kernel + alpha / rank · A @ B.

A [in, rank] and B [rank, out] are trained, kernels are frozen. A tree of LoRA tensors has the shape
of the parameters' tree, with lora_A and lora_B in the place of a kernel. The blocks' layers are
stacked on axis 0 in both trees, so every layer has an A and a B of its own. In files the names are
those of PEFT and diffusers.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from flax import traverse_util

from mask2dit_jax import ranges


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank fine-tuning: only A and B are trained; a kernel acts as kernel + alpha / rank · A@B.

    The base, which `init_from` must name, stays as it is and is not saved again. The 'muon'
    optimizer does not treat A and B as matrices of the blocks: it updates them by Nesterov AdamW.

    Attributes:
      rank: the rank of A @ B; 0 trains the whole model instead.
      alpha: the scale of A @ B is alpha / rank. 0 means alpha = rank, a scale of 1, which is also
        what diffusers takes where a file of LoRA tensors does not say.
      layers: regular expression that is searched for in the parameters' paths, such as
        'blocks/ff_in/kernel'; the default is the attention's four projections in every block.
    """

    rank: int = ranges.whole(0, least=0)
    alpha: float = ranges.real(0.0, least=0)
    layers: str = ranges.pattern(r'/attn/to_(q|k|v|out)/kernel$')


def scale(cfg: LoraConfig) -> float:
    """The factor of A @ B."""
    return (cfg.alpha or cfg.rank) / cfg.rank


def matched(params, cfg: LoraConfig) -> list[tuple[str, ...]]:
    """Paths of the kernels that cfg.layers selects, without their last part.

    Args:
      params: parameters of the base, or their shapes.
      cfg: the regular expression.

    Returns:
      Paths such as ('blocks', 'attn', 'to_q'), in the order of `params`.

    Raises:
      ValueError: if cfg.layers is not a regular expression, or selects nothing, or selects
        something that is not a kernel.
    """
    try:
        pattern = re.compile(cfg.layers)
    except re.error as error:
        raise ValueError(
            f'config.lora.layers {cfg.layers!r} is not a regular expression ({error}).'
        ) from error

    paths = [path for path in traverse_util.flatten_dict(params) if pattern.search('/'.join(path))]
    if not paths:
        raise ValueError(
            f'config.lora.layers {cfg.layers!r} matches no parameter: their paths look like '
            'blocks/attn/to_q/kernel.'
        )

    for path in paths:
        if path[-1] != 'kernel':
            raise ValueError(
                f'config.lora.layers {cfg.layers!r} matches {"/".join(path)}, which is not a '
                'matrix: let it match kernels only, e.g. by ending it with /kernel$.'
            )
    return [path[:-1] for path in paths]


def init(key, params, cfg: LoraConfig):
    """Fresh LoRA tensors.

    A is uniform in ±1/sqrt(in) as in PEFT. B is zero, so that training starts from the base itself.

    Args:
      key: PRNG key.
      params: parameters of the base, or their shapes.
      cfg: rank and layers.

    Returns:
      Tree of lora_A [..., in, rank] and lora_B [..., rank, out], float32.

    Raises:
      ValueError: see `matched`.
    """
    flat = traverse_util.flatten_dict(params)
    tree = {}
    for i, path in enumerate(matched(params, cfg)):
        *stack, rows, columns = flat[*path, 'kernel'].shape
        bound = rows**-0.5  # PEFT's Kaiming initialisation with a = sqrt(5)
        tree[*path, 'lora_A'] = jax.random.uniform(
            jax.random.fold_in(key, i), (*stack, rows, cfg.rank), jnp.float32, -bound, bound
        )
        tree[*path, 'lora_B'] = jnp.zeros((*stack, cfg.rank, columns), jnp.float32)
    return traverse_util.unflatten_dict(tree)


def merge_kernel(kernel, a, b, factor: float):
    """Merges one pair of LoRA tensors into its kernel.

    Args:
      kernel: [..., in, out].
      a, b: [..., in, rank] and [..., rank, out].
      factor: see `scale`.

    Returns:
      kernel + factor · a @ b, computed in float32, in the kernel's dtype.
    """
    product = jnp.matmul(a, b, precision='highest')
    return (kernel.astype(jnp.float32) + factor * product).astype(kernel.dtype)


def merge(params, tree, cfg: LoraConfig, merge_kernel=merge_kernel):
    """Merges a tree of LoRA tensors into the parameters.

    Args:
      params: parameters of the base.
      tree: LoRA tensors as `init` makes them.
      cfg: rank and alpha.
      merge_kernel: function that merges one pair.

    Returns:
      The parameters, in which every kernel that has LoRA tensors in `tree` is a merged one.
    """
    merged = dict(traverse_util.flatten_dict(params))
    lora_tensors = traverse_util.flatten_dict(tree)
    paths = [path[:-1] for path in lora_tensors if path[-1] == 'lora_A']
    for path in paths:
        kernel = merged[*path, 'kernel']
        a = lora_tensors[*path, 'lora_A']
        b = lora_tensors[*path, 'lora_B']
        merged[*path, 'kernel'] = merge_kernel(kernel, a, b, scale(cfg))
    return traverse_util.unflatten_dict(merged)


def merge_placed(params, tree, cfg: LoraConfig):
    """`merge` of arrays on devices.

    A merged kernel gets the sharding of the kernel that it replaces. All other arrays are shared
    with `params`.
    """

    # Without out_shardings the compiler may place the merged kernel elsewhere.
    def merge_in_place(kernel, a, b, factor):
        jitted = jax.jit(merge_kernel, static_argnums=3, out_shardings=kernel.sharding)
        return jitted(kernel, a, b, factor)

    return merge(params, tree, cfg, merge_in_place)
