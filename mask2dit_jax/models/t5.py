"""The T5 v1.1 encoder (Raffel et al. 2020, gated-GELU variant) and its tokenizer."""

import dataclasses
import functools
import json
import pathlib
import re
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
def _encode(cfg: T5Config, params, ids, mask):
    return T5Encoder(cfg).apply({'params': params}, ids, mask)


def encode(cfg: T5Config, params, ids, mask=None):
    """The encoder, jitted.

    Args:
      cfg, params: the network.
      ids, mask: as for `T5Encoder`, on the host.

    Returns:
      The last hidden state [B, M, d_model].

    Raises:
      ValueError: if a token has no embedding.
    """
    largest = int(np.max(ids))
    if largest >= cfg.vocab_size:
        raise ValueError(
            f'A caption has token {largest}, and the text encoder knows {cfg.vocab_size}: take '
            'special tokens such as <extra_id_0> out of it, or give the folder its own tokenizer.'
        )
    return _encode(cfg, params, ids, mask)


def caption_tokens(ids: np.ndarray) -> np.ndarray:
    """Which tokens belong to the captions, EOS included: bool, of the shape of ids [..., M].

    A caption may itself hold the padding's token, so the last EOS tells where it ends.
    """
    is_end = ids == EOS
    return np.flip(np.logical_or.accumulate(np.flip(is_end, -1), axis=-1), -1)


def load_tokenizer(folder) -> Callable[[list[str], int], np.ndarray]:
    """Tokenizer of a released folder: spiece.model, or tokenizer.json if that is all there is.

    The ids are those of transformers' T5Tokenizer for the one and of T5TokenizerFast for the other.
    In both of them tokens such as `</s>`, `<pad>` and `<extra_id_0>` that stand in a caption are
    special ones.

    Args:
      folder: path of the folder.

    Returns:
      Function of captions and a length to ids, int32 [number of captions, length]. A caption is cut
      off where it is too long, ended by EOS, and padded.

    Raises:
      FileNotFoundError: if the folder has neither file.
      ValueError: if a file is damaged, or asks for something that is not implemented.
    """
    folder = pathlib.Path(folder)
    model = folder / 'spiece.model'
    fast = folder / 'tokenizer.json'
    if not model.is_file() and not fast.is_file():
        raise FileNotFoundError(
            f'{folder} has neither spiece.model nor tokenizer.json: copy the tokenizer there.'
        )

    settings = _tokenizer_settings(folder / 'tokenizer_config.json')
    try:
        encode = (
            _slow_encoder(model, settings) if model.is_file() else _fast_encoder(fast, settings)
        )
    except Exception as error:  # both libraries raise exceptions of many classes
        damaged = model if model.is_file() else fast
        raise ValueError(f'{damaged} is damaged ({error}): copy it again.') from error

    def tokenize(captions, length):
        ids = np.full((len(captions), length), PAD, np.int32)
        for row, caption in zip(ids, captions):
            tokens = encode(caption)[: length - 1]  # EOS needs a place
            # T5Tokenizer does not end a caption that ends with EOS already.
            if not (model.is_file() and tokens[-1:] == [EOS]):
                tokens = [*tokens, EOS]
            row[: len(tokens)] = tokens
        return ids

    return tokenize


@dataclasses.dataclass(frozen=True)
class _Special:
    """A token that stands for itself in a caption, and whether it takes the spaces beside it."""

    content: str
    lstrip: bool
    rstrip: bool


@dataclasses.dataclass(frozen=True)
class _TokenizerSettings:
    """What tokenizer_config.json says: special tokens by id, and how many sentinels there are."""

    added: dict[int, _Special]
    extra_ids: int


def _tokenizer_settings(path: pathlib.Path) -> _TokenizerSettings:
    """Reads a tokenizer_config.json; without one the settings are those of the class.

    Raises:
      ValueError: naming the file, if it is damaged or has a value that is not implemented.
    """
    if not path.is_file():
        return _TokenizerSettings({}, 100)

    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        added = {}
        for index, token in content.get('added_tokens_decoder', {}).items():
            lstrip, rstrip = (bool(token.get(side, False)) for side in ('lstrip', 'rstrip'))
            added[int(index)] = _Special(token['content'], lstrip, rstrip)
        extra_ids = int(content.get('extra_ids', 100))
        legacy = content.get('legacy')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is damaged ({error}): copy it again.') from error

    if legacy not in (None, True):
        raise ValueError(f'{path} sets legacy to {legacy!r}: only True is implemented.')
    return _TokenizerSettings(added, extra_ids)


def _sentinels(settings: _TokenizerSettings) -> list[str]:
    return [f'<extra_id_{i}>' for i in range(settings.extra_ids)]


def _slow_encoder(path: pathlib.Path, settings: _TokenizerSettings) -> Callable[[str], list[int]]:
    """A caption's ids without the last EOS, as T5Tokenizer has them."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))

    # Sentinels come after the vocabulary, the last one first, and take the spaces around them.
    num_pieces = processor.get_piece_size()
    special = {}
    for i, content in enumerate(reversed(_sentinels(settings))):
        special[num_pieces + i] = _Special(content, lstrip=True, rstrip=True)
    special |= settings.added
    found = {token.content for token in special.values()}
    for content in {'</s>', '<unk>', '<pad>'} - found:
        special[processor.piece_to_id(content)] = _Special(content, lstrip=False, rstrip=False)

    ids = {token.content: index for index, token in special.items()}
    tokens = {token.content: token for token in special.values()}
    longest_first = sorted(ids, key=len, reverse=True)
    pattern = re.compile(f'({"|".join(map(re.escape, longest_first))})')

    def encode(caption: str) -> list[int]:
        # Text and special tokens in turn, beginning and ending with text that may be empty.
        parts = pattern.split(caption)
        encoded = []
        for i, part in enumerate(parts):
            if part in ids:
                encoded.append(ids[part])
                continue
            if i > 0 and tokens[parts[i - 1]].rstrip:
                part = part.lstrip()
            if i + 1 < len(parts) and tokens[parts[i + 1]].lstrip:
                part = part.rstrip()
            encoded += processor.encode(part)
        return encoded

    return encode


def _fast_encoder(path: pathlib.Path, settings: _TokenizerSettings) -> Callable[[str], list[int]]:
    """A caption's ids without the last EOS, as T5TokenizerFast has them."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    # Those of the settings count more than the file's own; the class adds what both of them lack.
    wanted = [token for _, token in sorted(settings.added.items())]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known |= {token.content for token in wanted}
    for content in ('</s>', '<unk>', '<pad>', *_sentinels(settings)):
        if content not in known:
            wanted.append(_Special(content, lstrip=False, rstrip=False))
    tokenizer.add_special_tokens(
        [
            tokenizers.AddedToken(special=True, normalized=False, **dataclasses.asdict(token))
            for token in wanted
        ]
    )

    def encode(caption: str) -> list[int]:
        return tokenizer.encode(caption, add_special_tokens=False).ids

    return encode
