"""The T5 v1.1 encoder (Raffel et al. 2020, gated-GELU variant) and its tokenizer."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
import tokenizers

PAD, EOS = 0, 1


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Architecture; defaults are T5 v1.1 XXL's, names those of the released config.json.

    Attributes:
      dtype: compute dtype; norms and softmax are float32 whatever it is.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dtype: str = 'float32'


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of key - query for every pair, int32 [length, length]; half of the buckets for each
    direction.

    Small distances have a bucket each, larger ones share logarithmically growing ones. Logarithms
    are float32, as borders depend on their rounding.
    """
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, distance = num_buckets // 2, np.abs(relative)
    exact = half // 2
    log = (
        np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
        / np.float32(np.log(max_distance / exact))
        * np.float32(half - exact)
    )
    far = np.minimum(exact + log.astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, far) + half * (relative > 0)).astype(np.int32)


class _RMSNorm(nn.Module):
    cfg: T5Config

    @nn.compact
    def __call__(self, x):
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.cfg.layer_norm_epsilon)
        return (x * scale).astype(self.cfg.dtype)


class _Block(nn.Module):
    cfg: T5Config

    @nn.compact
    def __call__(self, x, bias):
        cfg = self.cfg
        dense = functools.partial(nn.Dense, use_bias=False, dtype=cfg.dtype)
        h = _RMSNorm(cfg, name='attn_norm')(x)
        q, k, v = (
            dense(cfg.num_heads * cfg.d_kv, name=n)(h).reshape(
                *h.shape[:2], cfg.num_heads, cfg.d_kv
            )
            for n in 'qkv'
        )
        scores = jnp.einsum('bqnd,bknd->bnqk', q, k, preferred_element_type=jnp.float32) + bias
        h = jnp.einsum('bnqk,bknd->bqnd', jax.nn.softmax(scores).astype(v.dtype), v)
        x = x + dense(cfg.d_model, name='o')(h.reshape(*h.shape[:2], -1))
        h = _RMSNorm(cfg, name='ff_norm')(x)
        h = nn.gelu(dense(cfg.d_ff, name='wi_0')(h), approximate=True) * dense(
            cfg.d_ff, name='wi_1'
        )(h)
        return x + dense(cfg.d_model, name='wo')(h), None


class T5Encoder(nn.Module):
    """Token ids int32 [B, M], and optionally a bool mask [B, M] of the tokens that may be seen, to
    [B, M, d_model]."""

    cfg: T5Config

    @nn.compact
    def __call__(self, ids, mask=None):
        cfg = self.cfg
        x = nn.Embed(cfg.vocab_size, cfg.d_model, dtype=cfg.dtype, name='embed')(ids)
        buckets = relative_buckets(
            ids.shape[1], cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance
        )
        table = nn.Embed(cfg.relative_attention_num_buckets, cfg.num_heads, name='relative_bias')
        bias = table(buckets).transpose(2, 0, 1)[None]  # [1, N, M, M]
        if mask is not None:
            bias = jnp.where(mask[:, None, None], bias, jnp.finfo(jnp.float32).min)
        blocks = nn.scan(
            _Block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            length=cfg.num_layers,
            in_axes=nn.broadcast,
        )
        x, _ = blocks(cfg, name='blocks')(x, bias)
        return _RMSNorm(cfg, name='final_norm')(x)


@functools.partial(jax.jit, static_argnames='cfg')
def encode(cfg: T5Config, params, ids, mask=None):
    """The encoder, jitted: ids int32 [B, M] and mask as in T5Encoder to its last hidden state [B,
    M, d_model]."""
    return T5Encoder(cfg).apply({'params': params}, ids, mask)


def load_tokenizer(folder) -> Callable[[list[str], int], np.ndarray]:
    """Tokenizer of a released folder: spiece.model, or tokenizer.json if that is all there is.

    Returns:
      Function of captions and a length to ids, int32 [number of captions, length]: cut off, ended
      by EOS, padded.

    Raises:
      FileNotFoundError, ValueError: if there is neither, or it is damaged.
    """
    folder = pathlib.Path(folder)
    model, fast = folder / 'spiece.model', folder / 'tokenizer.json'
    if not model.is_file() and not fast.is_file():
        raise FileNotFoundError(
            f'{folder} has neither spiece.model nor tokenizer.json: copy the tokenizer there.'
        )
    try:
        if model.is_file():
            encode = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode
        else:
            tokenizer = tokenizers.Tokenizer.from_file(str(fast))
            tokenizer.no_truncation()
            tokenizer.no_padding()

            def encode(caption):
                return tokenizer.encode(caption, add_special_tokens=False).ids
    except Exception as error:  # both libraries raise what they like
        raise ValueError(
            f'{model if model.is_file() else fast} is damaged ({error}): copy it again.'
        ) from error

    def tokenize(captions, length):
        ids = np.full((len(captions), length), PAD, np.int32)
        for row, caption in zip(ids, captions):
            pieces = [*encode(caption)[: length - 1], EOS]
            row[: len(pieces)] = pieces
        return ids

    return tokenize
