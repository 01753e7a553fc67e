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
    """Architecture of the encoder; defaults are T5 v1.1 XXL's.

    Names are those of the released config.json.

    Attributes:
      dtype: compute dtype; norms and softmax are always float32.
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
    """Bucket of the distance key - query, for every pair of tokens.

    Half of the buckets is for each direction. Small distances have a bucket each, larger ones share
    buckets that grow logarithmically, up to max_distance.

    Args:
      length: M, the number of tokens.
      num_buckets: of both directions.
      max_distance: distance from which on all pairs share the last bucket.

    Returns:
      int32 [M, M], queries along the rows.
    """
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(relative)
    half = num_buckets // 2
    exact = half // 2

    # The logarithms are float32 as the reference's: borders of buckets depend on their rounding.
    log_distance = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    log_range = np.float32(np.log(max_distance / exact))
    steps = log_distance / log_range * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int32), half - 1)

    bucket = np.where(distance < exact, distance, far)
    return (bucket + half * (relative > 0)).astype(np.int32)


class _RMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    cfg: T5Config

    @nn.compact
    def __call__(self, x):
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        power = jnp.mean(x * x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(power + self.cfg.layer_norm_epsilon)
        return (x * scale).astype(self.cfg.dtype)


class _Block(nn.Module):
    """Self-attention with relative positions, then a gated-GELU feed-forward layer."""

    cfg: T5Config

    @nn.compact
    def __call__(self, x, bias):
        cfg = self.cfg
        dense = functools.partial(nn.Dense, use_bias=False, dtype=cfg.dtype)

        h = _RMSNorm(cfg, name='attn_norm')(x)  # [B, M, d_model]
        inner = cfg.num_heads * cfg.d_kv
        heads = (*h.shape[:2], cfg.num_heads, cfg.d_kv)
        q = dense(inner, name='q')(h).reshape(heads)  # [B, M, N, D]
        k = dense(inner, name='k')(h).reshape(heads)
        v = dense(inner, name='v')(h).reshape(heads)

        # T5 does not divide the scores by sqrt(D).
        scores = jnp.einsum('bqnd,bknd->bnqk', q, k, preferred_element_type=jnp.float32) + bias
        weights = jax.nn.softmax(scores).astype(v.dtype)
        h = jnp.einsum('bnqk,bknd->bqnd', weights, v)
        x = x + dense(cfg.d_model, name='o')(h.reshape(*h.shape[:2], -1))

        h = _RMSNorm(cfg, name='ff_norm')(x)
        gate = nn.gelu(dense(cfg.d_ff, name='wi_0')(h), approximate=True)
        h = gate * dense(cfg.d_ff, name='wi_1')(h)
        x = x + dense(cfg.d_model, name='wo')(h)

        return x, None  # carry and output of the scan over layers


class T5Encoder(nn.Module):
    """The encoder; `cfg` says its size."""

    cfg: T5Config

    @nn.compact
    def __call__(self, ids, mask=None):
        """Encodes captions.

        Args:
          ids: int32 [B, M].
          mask: bool [B, M], the tokens that may be seen; None shows all of them, padding included.

        Returns:
          The last hidden state [B, M, d_model].
        """
        cfg = self.cfg
        x = nn.Embed(cfg.vocab_size, cfg.d_model, dtype=cfg.dtype, name='embed')(ids)

        # One bias per head and bucket of distance, which all layers share.
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
    """The encoder, jitted.

    Args:
      cfg, params: the network.
      ids, mask: as for `T5Encoder`.

    Returns:
      The last hidden state [B, M, d_model].
    """
    return T5Encoder(cfg).apply({'params': params}, ids, mask)


def load_tokenizer(folder) -> Callable[[list[str], int], np.ndarray]:
    """Tokenizer of a released folder: spiece.model, or tokenizer.json if that is all there is.

    Args:
      folder: path of the folder.

    Returns:
      Function of captions and a length to ids, int32 [number of captions, length]. A caption is cut
      off where it is too long, ended by EOS, and padded.

    Raises:
      FileNotFoundError: if the folder has neither file.
      ValueError: if the file is damaged.
    """
    folder = pathlib.Path(folder)
    model = folder / 'spiece.model'
    fast = folder / 'tokenizer.json'
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
    except Exception as error:  # both libraries raise exceptions of many classes
        damaged = model if model.is_file() else fast
        raise ValueError(f'{damaged} is damaged ({error}): copy it again.') from error

    def tokenize(captions, length):
        ids = np.full((len(captions), length), PAD, np.int32)
        for row, caption in zip(ids, captions):
            pieces = encode(caption)[: length - 1]  # EOS needs a place
            pieces = [*pieces, EOS]
            row[: len(pieces)] = pieces
        return ids

    return tokenize
