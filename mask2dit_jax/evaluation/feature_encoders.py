"""Encoders of frames, clips and captions, from folders as transformers writes them: CLIP, DINOv2,
VideoMAE.

A folder holds config.json, .safetensors, preprocessor_config.json, and for CLIP's captions
tokenizer.json, or vocab.json and merges.txt. Loading is strict: every missing, unexpected or
misshapen tensor is named; heads that features do not need (classifiers, VideoMAE's decoder) are not
read.

    encoder = load('clip-vit-large-patch14')
    features = encode_clips(encoder, clips)             # uint8 [N, F, H, W, 3], F =
    encoder.cfg.frames -> [N, D] features, cut = encode_captions(encoder, captions)  # [N, D]
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from PIL import Image
from tokenizers import normalizers, pre_tokenizers

from mask2dit_jax import tensor_io
from mask2dit_jax.models import vit

_BOS, _EOS = '<|startoftext|>', '<|endoftext|>'
_CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""

# (our parameter or module, reference name); '*' is the layer, stacked on axis 0 here.
_CLIP_BLOCK = {
    'norm1': 'layer_norm1',
    'q': 'self_attn.q_proj',
    'k': 'self_attn.k_proj',
    'v': 'self_attn.v_proj',
    'out': 'self_attn.out_proj',
    'norm2': 'layer_norm2',
    'fc1': 'mlp.fc1',
    'fc2': 'mlp.fc2',
}
_CLIP_VISION = {
    'patch': 'vision_model.embeddings.patch_embedding',
    'class_token': 'vision_model.embeddings.class_embedding',
    'positions': 'vision_model.embeddings.position_embedding.weight',
    'pre_norm': 'vision_model.pre_layrnorm',
    'norm': 'vision_model.post_layernorm',
    'project': 'visual_projection',
} | {
    f'blocks/{ours}': f'vision_model.encoder.layers.*.{theirs}'
    for ours, theirs in _CLIP_BLOCK.items()
}
_CLIP_TEXT = {
    'tokens': 'text_model.embeddings.token_embedding',
    'positions': 'text_model.embeddings.position_embedding.weight',
    'norm': 'text_model.final_layer_norm',
    'project': 'text_projection',
} | {
    f'blocks/{ours}': f'text_model.encoder.layers.*.{theirs}'
    for ours, theirs in _CLIP_BLOCK.items()
}
_ATTENTION = {
    'q': 'attention.attention.query',
    'k': 'attention.attention.key',
    'v': 'attention.attention.value',
    'out': 'attention.output.dense',
}
_DINO = {
    'patch': 'embeddings.patch_embeddings.projection',
    'class_token': 'embeddings.cls_token',
    'positions': 'embeddings.position_embeddings',
    'registers': 'embeddings.register_tokens',
    'norm': 'layernorm',
} | {
    f'blocks/{ours}': f'encoder.layer.*.{theirs}'
    for ours, theirs in (
        _ATTENTION
        | {
            'norm1': 'norm1',
            'scale1': 'layer_scale1.lambda1',
            'norm2': 'norm2',
            'fc1': 'mlp.fc1',
            'fc2': 'mlp.fc2',
            'scale2': 'layer_scale2.lambda1',
        }
    ).items()
}
_SWIGLU = {
    'blocks/fc1': 'encoder.layer.*.mlp.weights_in',
    'blocks/fc2': 'encoder.layer.*.mlp.weights_out',
}
_VIDEOMAE = {
    'patch': 'embeddings.patch_embeddings.projection',
    'norm': 'layernorm',
} | {
    f'blocks/{ours}': f'encoder.layer.*.{theirs}'
    for ours, theirs in (
        _ATTENTION
        | {
            'norm1': 'layernorm_before',
            'q/bias': 'attention.attention.q_bias',
            'v/bias': 'attention.attention.v_bias',
            'norm2': 'layernorm_after',
            'fc1': 'intermediate.dense',
            'fc2': 'output.dense',
        }
    ).items()
}
_SUFFIXES = {'kernel': '.weight', 'scale': '.weight', 'embedding': '.weight', 'bias': '.bias'}
# Tensors of a file that features do not need.
_UNUSED = {
    'clip': r'logit_scale|.*\.position_ids',
    'dinov2': r'(.*\.)?embeddings\.mask_token|classifier\..*',
    'dinov2_with_registers': r'(.*\.)?embeddings\.mask_token|classifier\..*',
    'videomae': r'classifier\..*|decoder\..*|encoder_to_decoder\..*|mask_token',
}


def _blocks(config: dict, defaults: dict, **fields) -> vit.Blocks:
    get = (defaults | config).__getitem__
    if fields.get('activation') != 'swiglu':
        fields['activation'] = get('hidden_act')
        if fields['activation'] not in vit.ACTIVATIONS:
            raise ValueError(
                f'hidden_act {fields["activation"]!r} is not implemented, only '
                f'{", ".join(vit.ACTIVATIONS)}'
            )
    if config.get('num_channels', 3) != 3:
        raise ValueError(f'num_channels is {config["num_channels"]}, only 3 are implemented')
    return vit.Blocks(
        get('hidden_size'),
        get('num_hidden_layers'),
        get('num_attention_heads'),
        fields.pop('mlp', None) or get('intermediate_size'),
        eps=get('layer_norm_eps'),
        **fields,
    )


def _parse_clip(config: dict, tensors: dict):
    # Where both are there, transformers believes the older key.
    text, vision = (
        config.get(f'{k}_config_dict') or config.get(f'{k}_config') or {}
        for k in ('text', 'vision')
    )
    same = {'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5, 'num_hidden_layers': 12}
    project = config.get('projection_dim', 512)
    blocks = _blocks(
        vision, same | {'hidden_size': 768, 'intermediate_size': 3072, 'num_attention_heads': 12}
    )
    seen = vit.ViTConfig(
        blocks,
        vision.get('image_size', 224),
        vision.get('patch_size', 32),
        patch_bias=False,
        pre_norm=True,
        norm_eps=blocks.eps,
        project=project,
    )
    blocks = _blocks(
        text, same | {'hidden_size': 512, 'intermediate_size': 2048, 'num_attention_heads': 8}
    )
    said = vit.TextConfig(
        blocks, text.get('vocab_size', 49408), text.get('max_position_embeddings', 77), project
    )
    return seen, _CLIP_VISION, said


def _parse_dino(config: dict, tensors: dict):
    config = {
        'hidden_size': 768,
        'num_hidden_layers': 12,
        'num_attention_heads': 12,
        'hidden_act': 'gelu',
        'layer_norm_eps': 1e-6,
    } | config
    registers = config['model_type'] == 'dinov2_with_registers'
    fields, names = {'mlp': int(config['hidden_size'] * config.get('mlp_ratio', 4))}, _DINO
    if config.get('use_swiglu_ffn', False):
        fields = {'mlp': (int(fields['mlp'] * 2 / 3) + 7) // 8 * 8, 'activation': 'swiglu'}
        names = _DINO | _SWIGLU
    blocks = _blocks(
        config, {}, biases='qkv' if config.get('qkv_bias', True) else '', layer_scale=True, **fields
    )
    cfg = vit.ViTConfig(
        blocks,
        config.get('image_size', 224),
        config.get('patch_size', 16 if registers else 14),
        positions='antialiased' if registers else 'bicubic',
        registers=config.get('num_register_tokens', 4) if registers else 0,
        norm_eps=blocks.eps,
    )
    return cfg, names, None


def _parse_videomae(config: dict, tensors: dict):
    blocks = _blocks(
        config,
        {
            'hidden_size': 768,
            'num_hidden_layers': 12,
            'num_attention_heads': 12,
            'hidden_act': 'gelu',
            'layer_norm_eps': 1e-12,
            'intermediate_size': 3072,
        },
        biases='qv' if config.get('qkv_bias', True) else '',
    )
    names, norm, eps = (
        _VIDEOMAE,
        'none' if config.get('use_mean_pooling', True) else 'tokens',
        blocks.eps,
    )
    if (
        norm == 'none' and 'fc_norm.weight' in tensors
    ):  # of a classifier, with PyTorch's default eps
        names, norm, eps = _VIDEOMAE | {'norm': 'fc_norm'}, 'feature', 1e-5
    cfg = vit.ViTConfig(
        blocks,
        config.get('image_size', 224),
        config.get('patch_size', 16),
        config.get('num_frames', 16),
        config.get('tubelet_size', 2),
        positions='sincos',
        class_token=False,
        norm=norm,
        norm_eps=eps,
    )
    return cfg, names, None


_PARSERS = {
    'clip': _parse_clip,
    'dinov2': _parse_dino,
    'dinov2_with_registers': _parse_dino,
    'videomae': _parse_videomae,
}


def _abstract(cfg):
    """Shapes of a network's parameters, by path."""
    if isinstance(cfg, vit.TextConfig):
        tree = jax.eval_shape(
            vit.TextTransformer(cfg).init,
            jax.random.key(0),
            jnp.zeros((1, 1), jnp.int32),
            jnp.zeros(1, jnp.int32),
        )
    else:
        tree = jax.eval_shape(
            vit.ViT(cfg).init,
            jax.random.key(0),
            jnp.zeros((1, cfg.frames, cfg.image_size, cfg.image_size, 3)),
        )
    return {
        tuple(k.key for k in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree['params'])
    }


def _entries(cfg, names: dict):
    """(path here, reference names, the shape of each) of every parameter."""
    for path, shape in _abstract(cfg).items():
        module, suffix = '/'.join(path), ''
        if module not in names:
            module, suffix = '/'.join(path[:-1]), _SUFFIXES[path[-1]]
        stacked = path[0] == 'blocks'
        if path[-1] == 'kernel':
            shape = (*shape[:stacked], shape[-1], shape[-2], *shape[stacked:-2])
        name = names[module] + suffix
        yield (
            path,
            [name.replace('*', str(i)) for i in range(shape[0])] if stacked else [name],
            shape[stacked:],
        )


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of an encoder, by name, of what its config.json says."""
    cfg, names, text = _PARSERS[config['model_type']](config, {})
    networks = [(cfg, names)] + ([(text, _CLIP_TEXT)] if text else [])
    return {
        name: shape
        for network in networks
        for _, theirs, shape in _entries(*network)
        for name in theirs
    }


def _squeezed(shape) -> tuple[int, ...]:
    return tuple(
        n for n in shape if n != 1
    )  # (1, 1, D) for a token, or no axis of frames, mean the same


def _read(networks, tensors: dict, folder) -> list[dict]:
    """Parameters of networks [(cfg, names), ...], float32, that share the tensors of a folder.

    Raises:
      ValueError: naming every missing, unexpected or wrongly shaped tensor.
    """
    entries = [list(_entries(cfg, names)) for cfg, names in networks]
    want = {name: shape for network in entries for _, theirs, shape in network for name in theirs}
    problems = [f'missing {n}' for n in want if n not in tensors]
    problems += [
        f'{n} has shape {tuple(tensors[n].shape)}, expected {shape}'
        for n, shape in want.items()
        if n in tensors and _squeezed(tensors[n].shape) != _squeezed(shape)
    ]
    problems += [f'unexpected {n}' for n in sorted(set(tensors) - set(want))]
    if problems:
        raise ValueError(f'{folder} does not fit its config.json: {"; ".join(problems)}.')
    trees = []
    for network in entries:
        tree = {}
        for path, theirs, shape in network:
            values = np.stack([np.asarray(tensors[n], np.float32).reshape(shape) for n in theirs])
            if path[-1] == 'kernel':
                values = np.moveaxis(values, (1, 2), (-1, -2))
            node = tree
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = jnp.asarray(values if path[0] == 'blocks' else values[0])
        trees.append(tree)
    return trees


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """What a picture goes through, of preprocessor_config.json.

    Attributes:
      size: the shorter side is scaled to it, or (height, width); None does not scale.
      resample: PIL's number of the filter.
      crop: (height, width) of the centre, or None.
      factor: of the values 0 to 255.
      mean, std: per channel.
    """

    size: int | tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _side(value):
    """A size of preprocessor_config.json: shortest edge, or (height, width)."""
    if isinstance(value, dict) and set(value) == {'height', 'width'}:
        return value['height'], value['width']
    if isinstance(value, dict) and set(value) == {'shortest_edge'}:
        return value['shortest_edge']
    if isinstance(value, int):
        return value
    raise ValueError(f'size {value} is neither a number, shortest_edge, nor height and width')


def _preprocess(config: dict) -> Preprocess:
    size = _side(config.get('size', 224)) if config.get('do_resize', True) else None
    crop = _side(config.get('crop_size', 224)) if config.get('do_center_crop', True) else None
    normal = config.get('do_normalize', True)
    return Preprocess(
        size,
        config.get('resample', 3),
        (crop, crop) if isinstance(crop, int) else crop,
        config.get('rescale_factor', 1 / 255) if config.get('do_rescale', True) else 1,
        tuple(config['image_mean']) if normal else (0,),
        tuple(config['image_std']) if normal else (1,),
    )


def prepare(how: Preprocess, frames) -> np.ndarray:
    """Frames uint8 [N, H, W, 3] to what the network takes, float32 [N, h, w, 3].

    Raises:
      ValueError: if the crop is larger than the scaled frame.
    """
    height, width = frames.shape[1:3]
    if isinstance(how.size, int):
        short = min(height, width)
        height, width = int(how.size * height / short), int(how.size * width / short)
    elif how.size:
        height, width = how.size
    out = np.stack(
        [np.asarray(Image.fromarray(f).resize((width, height), how.resample)) for f in frames]
    )
    if how.crop:
        if how.crop[0] > height or how.crop[1] > width:
            raise ValueError(
                f'A crop of {how.crop} px does not fit into frames scaled to {height} x {width} px: '
                'correct preprocessor_config.json.'
            )
        top, left = (height - how.crop[0]) // 2, (width - how.crop[1]) // 2
        out = out[:, top : top + how.crop[0], left : left + how.crop[1]]
    return ((out * how.factor - how.mean) / how.std).astype(np.float32)


def load_tokenizer(folder) -> Callable[[str], list[int]]:
    """CLIP's tokenizer of a folder: caption to ids, between the tokens that begin and end a text.

    Raises:
      FileNotFoundError, ValueError: if there is none, or it is damaged.
    """
    folder = pathlib.Path(folder)
    fast, vocab, merges = folder / 'tokenizer.json', folder / 'vocab.json', folder / 'merges.txt'
    if not fast.is_file() and not (vocab.is_file() and merges.is_file()):
        raise FileNotFoundError(
            f'{folder} has neither tokenizer.json nor vocab.json and merges.txt: copy the '
            'tokenizer there.'
        )
    try:
        if fast.is_file():
            tokenizer = tokenizers.Tokenizer.from_file(str(fast))
            tokenizer.no_truncation()
            tokenizer.no_padding()
        else:
            tokenizer = tokenizers.Tokenizer(
                tokenizers.models.BPE.from_file(
                    str(vocab), str(merges), unk_token=_EOS, end_of_word_suffix='</w>'
                )
            )
            tokenizer.normalizer = normalizers.Sequence(
                [
                    normalizers.NFC(),
                    normalizers.Replace(tokenizers.Regex(r'\s+'), ' '),
                    normalizers.Lowercase(),
                ]
            )
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), 'removed', invert=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
            tokenizer.add_special_tokens([_BOS, _EOS])
    except Exception as error:  # the library raises what it likes
        raise ValueError(
            f'{fast if fast.is_file() else vocab} or {merges.name} is damaged ({error}): copy it again.'
        ) from error
    begin, end = tokenizer.token_to_id(_BOS), tokenizer.token_to_id(_EOS)
    if begin is None or end is None:
        raise ValueError(
            f'The tokenizer of {folder} lacks {_BOS} or {_EOS}: copy a tokenizer of CLIP there.'
        )
    return lambda caption: [begin, *tokenizer.encode(caption, add_special_tokens=False).ids, end]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A loaded folder.

    Attributes:
      cfg, params: of the vision transformer.
      preprocess: of pictures.
      text: CLIP's configuration, parameters and tokenizer for captions, else None.
    """

    cfg: vit.ViTConfig
    params: dict
    preprocess: Preprocess
    text: tuple[vit.TextConfig, dict, Callable[[str], list[int]]] | None


def _json(path: pathlib.Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding='utf-8')))
    except OSError as error:
        raise FileNotFoundError(
            f'{path} cannot be read ({error.strerror}): an encoder is a folder as transformers '
            'writes it.'
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f'{path} is no JSON object ({error}): copy it again.') from error


def load(folder) -> Encoder:
    """The encoder in a folder.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is missing or does not fit.
    """
    folder = pathlib.Path(folder)
    config, picture = _json(folder / 'config.json'), _json(folder / 'preprocessor_config.json')
    kind = config.get('model_type')
    if kind not in _PARSERS:
        raise ValueError(
            f'{folder / "config.json"} describes a {kind!r} model: only {", ".join(_PARSERS)} are '
            'implemented.'
        )
    tensors = tensor_io.open_safetensors(folder, _UNUSED[kind])
    tensors = {re.sub(f'^{kind}\\.', '', name): tensor for name, tensor in tensors.items()}
    try:
        cfg, names, text = _PARSERS[kind](config, tensors)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{folder / "config.json"}: {error}.') from error
    try:
        preprocess = _preprocess(picture)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{folder / "preprocessor_config.json"}: {error!r}.') from error
    if text is None:
        (params,) = _read([(cfg, names)], tensors, folder)
        return Encoder(cfg, params, preprocess, None)
    tokenize = load_tokenizer(folder)
    params, text_params = _read([(cfg, names), (text, _CLIP_TEXT)], tensors, folder)
    return Encoder(cfg, params, preprocess, (text, text_params, tokenize))


@functools.partial(jax.jit, static_argnames='cfg')
def _encode_pixels(cfg: vit.ViTConfig, params, pixels):
    with jax.default_matmul_precision('float32'):
        return vit.ViT(cfg).apply({'params': params}, pixels)


@functools.partial(jax.jit, static_argnames='cfg')
def _encode_ids(cfg: vit.TextConfig, params, ids, last):
    with jax.default_matmul_precision('float32'):
        return vit.TextTransformer(cfg).apply({'params': params}, ids, last)


def _in_batches(run: Callable, batch: int, *arrays) -> np.ndarray:
    """run of arrays' rows, always so many at once, as every other number would be compiled anew."""
    count, rest = len(arrays[0]), -len(arrays[0]) % batch
    arrays = (
        [np.concatenate([a, np.zeros((rest, *a.shape[1:]), a.dtype)]) for a in arrays]
        if rest
        else arrays
    )
    parts = [np.asarray(run(*(a[i : i + batch] for a in arrays))) for i in range(0, count, batch)]
    return np.concatenate(parts)[:count]


def encode_clips(encoder: Encoder, clips, frames_at_once: int = 8) -> np.ndarray:
    """Clips uint8 [N, cfg.frames, H, W, 3], for pictures of one frame each, to features float32 [N,
    D].

    Raises:
      ValueError: for another number of frames.
    """
    cfg = encoder.cfg
    if clips.shape[1] != cfg.frames:
        raise ValueError(f'Clips have {clips.shape[1]} frames, the encoder takes {cfg.frames}.')

    def run(part):
        pixels = prepare(encoder.preprocess, part.reshape(-1, *part.shape[2:]))
        return _encode_pixels(
            cfg, encoder.params, pixels.reshape(len(part), cfg.frames, *pixels.shape[1:])
        )

    return _in_batches(run, max(1, frames_at_once // cfg.frames), clips)


def encode_captions(
    encoder: Encoder, captions: Sequence[str], at_once: int = 16
) -> tuple[np.ndarray, list[bool]]:
    """Captions to features float32 [N, D], and for each whether it was too long for the encoder and
    cut off."""
    cfg, params, tokenize = encoder.text
    rows = [tokenize(caption) for caption in captions]
    ids, last = np.zeros((len(rows), cfg.length), np.int32), np.zeros(len(rows), np.int32)
    for i, row in enumerate(rows):
        kept = [*row[: cfg.length - 1], row[-1]] if len(row) > cfg.length else row
        ids[i, : len(kept)], last[i] = kept, len(kept) - 1
    features = _in_batches(functools.partial(_encode_ids, cfg, params), at_once, ids, last)
    return features, [len(row) > cfg.length for row in rows]
