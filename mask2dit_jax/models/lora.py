"""LoRA (arXiv 2106.09685): kernel + alpha / rank · A @ B, with A [in, rank] and B [rank, out]
trained, kernels frozen.

A tree of LoRA tensors is shaped as the parameters' are, with lora_A and lora_B in the place of a
kernel; layers are stacked there as they are here, each with an A and B of its own. In files the
names are those of PEFT and diffusers.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from flax import traverse_util


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank fine-tuning: only A and B are trained, and a kernel acts as kernel + alpha / rank *
    A @ B.

    The base, which `init_from` must name, stays as it is and is not saved again. A and B are no
    matrices of the blocks in the optimizer's sense: under 'muon' they get its Nesterov AdamW.

    Attributes:
      rank: of A @ B; 0 trains the whole model instead.
      alpha: see above; 0 means alpha = rank, so a scale of 1, which is also what diffusers takes
        where a file of LoRA tensors does not say.
      layers: regular expression, searched for in the parameters' paths, e.g. 'blocks/ff_in/kernel';
        the default is the attention's four projections in every block.
    """

    rank: int = 0
    alpha: float = 0.0
    layers: str = r'/attn/to_(q|k|v|out)/kernel$'


def scale(cfg: LoraConfig) -> float:
    """What A @ B is multiplied by."""
    return (cfg.alpha or cfg.rank) / cfg.rank


def matched(params, cfg: LoraConfig) -> list[tuple[str, ...]]:
    """Paths of the kernels that cfg.layers selects, without their last part.

    Raises:
      ValueError: if it selects nothing, or something that is no matrix, or is no regular
        expression.
    """
    try:
        pattern = re.compile(cfg.layers)
    except re.error as error:
        raise ValueError(
            f'config.lora.layers {cfg.layers!r} is no regular expression ({error}).'
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
                f'config.lora.layers {cfg.layers!r} matches {"/".join(path)}, which is no matrix: let it '
                'match kernels only, e.g. by ending it with /kernel$.'
            )
    return [path[:-1] for path in paths]


def init(key, params, cfg: LoraConfig):
    """Fresh tensors, float32: A uniform in ±in^-½ as in PEFT, B zero, so that training starts from
    the base itself.

    Args:
      key: PRNG key.
      params: parameters of the base, or their shapes.
      cfg: rank and layers.

    Raises:
      ValueError: see `matched`.
    """
    flat, tree = traverse_util.flatten_dict(params), {}
    for i, path in enumerate(matched(params, cfg)):
        *stack, rows, columns = flat[*path, 'kernel'].shape
        tree[*path, 'lora_A'] = jax.random.uniform(
            jax.random.fold_in(key, i),
            (*stack, rows, cfg.rank),
            jnp.float32,
            -(rows**-0.5),
            rows**-0.5,
        )
        tree[*path, 'lora_B'] = jnp.zeros((*stack, cfg.rank, columns), jnp.float32)
    return traverse_util.unflatten_dict(tree)


def merge_kernel(kernel, a, b, factor: float):
    """kernel + factor · a @ b, computed in float32, in the kernel's dtype; leading axes are a
    batch."""
    return (kernel.astype(jnp.float32) + factor * jnp.matmul(a, b, precision='highest')).astype(
        kernel.dtype
    )


def merge(params, tree, cfg: LoraConfig, merge_kernel=merge_kernel):
    """The parameters with every kernel that has LoRA tensors in `tree` replaced by
    `merge_kernel`."""
    flat, pairs = dict(traverse_util.flatten_dict(params)), traverse_util.flatten_dict(tree)
    for *path, _ in (p for p in pairs if p[-1] == 'lora_A'):
        kernel, a, b = flat[*path, 'kernel'], pairs[*path, 'lora_A'], pairs[*path, 'lora_B']
        flat[*path, 'kernel'] = merge_kernel(kernel, a, b, scale(cfg))
    return traverse_util.unflatten_dict(flat)


def merge_placed(params, tree, cfg: LoraConfig):
    """`merge` of arrays on devices: kernels come out where they lay, everything else is shared with
    `params`."""
    return merge(
        params,
        tree,
        cfg,
        lambda kernel, a, b, factor: jax.jit(
            merge_kernel, static_argnums=3, out_shardings=kernel.sharding
        )(kernel, a, b, factor),
    )
