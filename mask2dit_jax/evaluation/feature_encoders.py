"""Encoders of frames, clips and captions, from folders as transformers writes them.

CLIP, DINOv2 (also with registers) and VideoMAE are implemented, as configurations of models/vit.py.
A folder holds config.json, .safetensors files and preprocessor_config.json, and for the captions of
CLIP tokenizer.json, or vocab.json and merges.txt. Loading is strict: every missing, unexpected or
misshapen tensor is named. Heads that features do not need (classifiers, the decoder of VideoMAE)
are not read.

    encoder = load('clip-vit-large-patch14')
    features = encode_clips(encoder, clips)  # uint8 [N, encoder.config.frames, H, W, 3] -> [N, D]
    features, was_cut = encode_captions(encoder, captions)  # [N, D]

The sections of this file: names of tensors; config.json; tensors to parameters; pictures to pixels;
captions to token ids; a folder to an encoder; encoding.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from PIL import Image
from tokenizers import normalizers, pre_tokenizers

from mask2dit_jax import tensor_io
from mask2dit_jax.models import vit

# ------------------------------------------------------------------------------------------------
# Names of tensors

# Each table maps a parameter here, or the module that holds it, to the name in the file; '*' is the
# number of the layer. Here the layers of a parameter are stacked on axis 0.


def _in_layers(prefix: str, names: dict[str, str]) -> dict[str, str]:
    """The names of a block, for all layers."""
    return {f'blocks/{ours}': f'{prefix}.*.{theirs}' for ours, theirs in names.items()}


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
    **_in_layers('vision_model.encoder.layers', _CLIP_BLOCK),
}
_CLIP_TEXT = {
    'tokens': 'text_model.embeddings.token_embedding',
    'positions': 'text_model.embeddings.position_embedding.weight',
    'norm': 'text_model.final_layer_norm',
    'project': 'text_projection',
    **_in_layers('text_model.encoder.layers', _CLIP_BLOCK),
}

_ATTENTION = {
    'q': 'attention.attention.query',
    'k': 'attention.attention.key',
    'v': 'attention.attention.value',
    'out': 'attention.output.dense',
}
_DINO_BLOCK = {
    **_ATTENTION,
    'norm1': 'norm1',
    'scale1': 'layer_scale1.lambda1',
    'norm2': 'norm2',
    'fc1': 'mlp.fc1',
    'fc2': 'mlp.fc2',
    'scale2': 'layer_scale2.lambda1',
}
_DINO = {
    'patch': 'embeddings.patch_embeddings.projection',
    'class_token': 'embeddings.cls_token',
    'positions': 'embeddings.position_embeddings',
    'registers': 'embeddings.register_tokens',
    'norm': 'layernorm',
    **_in_layers('encoder.layer', _DINO_BLOCK),
}
_DINO_SWIGLU = {
    **_DINO,
    **_in_layers('encoder.layer', {'fc1': 'mlp.weights_in', 'fc2': 'mlp.weights_out'}),
}
_VIDEOMAE_BLOCK = {
    **_ATTENTION,
    'norm1': 'layernorm_before',
    'q/bias': 'attention.attention.q_bias',
    'v/bias': 'attention.attention.v_bias',
    'norm2': 'layernorm_after',
    'fc1': 'intermediate.dense',
    'fc2': 'output.dense',
}
_VIDEOMAE = {
    'patch': 'embeddings.patch_embeddings.projection',
    'norm': 'layernorm',
    **_in_layers('encoder.layer', _VIDEOMAE_BLOCK),
}

# What follows the name of a module in the file, by the parameter's name here.
_SUFFIXES = {'kernel': '.weight', 'scale': '.weight', 'embedding': '.weight', 'bias': '.bias'}

# Tensors of a file that features do not need, as regular expressions by model_type.
_UNUSED = {
    'clip': r'logit_scale|.*\.position_ids',
    'dinov2': r'(.*\.)?embeddings\.mask_token|classifier\..*',
    'dinov2_with_registers': r'(.*\.)?embeddings\.mask_token|classifier\..*',
    'videomae': r'classifier\..*|decoder\..*|encoder_to_decoder\..*|mask_token',
}


# ------------------------------------------------------------------------------------------------
# config.json

# Where config.json leaves a setting out, the default of transformers holds.


class _Network(NamedTuple):
    """A transformer and the names of its tensors."""

    config: vit.ViTConfig | vit.TextConfig
    names: dict[str, str]


class _Networks(NamedTuple):
    """The networks of a config.json: for pictures or clips, and for captions if there is one."""

    vision: _Network
    text: _Network | None


def _blocks(config: dict, *, mlp: int, activation: str | None = None, **fields) -> vit.Blocks:
    """The transformer of a config.json; `activation` replaces its hidden_act."""
    if activation is None:
        activation = config['hidden_act']
        if activation not in vit.ACTIVATIONS:
            raise ValueError(
                f'hidden_act {activation!r} is not implemented, only {", ".join(vit.ACTIVATIONS)}'
            )
    if config.get('num_channels', 3) != 3:
        raise ValueError(f'num_channels is {config["num_channels"]}, only 3 are implemented')

    return vit.Blocks(
        width=config['hidden_size'],
        layers=config['num_hidden_layers'],
        heads=config['num_attention_heads'],
        mlp=mlp,
        activation=activation,
        eps=config['layer_norm_eps'],
        **fields,
    )


def _parse_clip(config: dict, tensors: dict) -> _Networks:
    del tensors
    # transformers prefers the older key, *_config_dict, where a file has both.
    vision = config.get('vision_config_dict') or config.get('vision_config') or {}
    text = config.get('text_config_dict') or config.get('text_config') or {}
    project = config.get('projection_dim', 512)

    both = {'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5, 'num_hidden_layers': 12}
    vision = {
        **both,
        'hidden_size': 768,
        'intermediate_size': 3072,
        'num_attention_heads': 12,
        **vision,
    }
    text = {
        **both,
        'hidden_size': 512,
        'intermediate_size': 2048,
        'num_attention_heads': 8,
        **text,
    }

    vision_config = vit.ViTConfig(
        blocks=_blocks(vision, mlp=vision['intermediate_size']),
        image_size=vision.get('image_size', 224),
        patch_size=vision.get('patch_size', 32),
        patch_bias=False,
        pre_norm=True,
        norm_eps=vision['layer_norm_eps'],
        project=project,
    )
    text_config = vit.TextConfig(
        blocks=_blocks(text, mlp=text['intermediate_size']),
        vocab_size=text.get('vocab_size', 49408),
        length=text.get('max_position_embeddings', 77),
        project=project,
    )
    return _Networks(_Network(vision_config, _CLIP_VISION), _Network(text_config, _CLIP_TEXT))


def _parse_dino(config: dict, tensors: dict) -> _Networks:
    del tensors
    has_registers = config['model_type'] == 'dinov2_with_registers'
    config = {
        'hidden_size': 768,
        'num_hidden_layers': 12,
        'num_attention_heads': 12,
        'hidden_act': 'gelu',
        'layer_norm_eps': 1e-6,
        **config,
    }

    names = _DINO
    activation = None
    mlp = int(config['hidden_size'] * config.get('mlp_ratio', 4))
    if config.get('use_swiglu_ffn', False):
        names = _DINO_SWIGLU
        activation = 'swiglu'
        # Two thirds, since SwiGLU has three matrices instead of two; then up to a multiple of 8.
        mlp = (int(mlp * 2 / 3) + 7) // 8 * 8

    blocks = _blocks(
        config,
        mlp=mlp,
        activation=activation,
        biases='qkv' if config.get('qkv_bias', True) else '',
        layer_scale=True,
    )
    vision_config = vit.ViTConfig(
        blocks=blocks,
        image_size=config.get('image_size', 224),
        patch_size=config.get('patch_size', 16 if has_registers else 14),
        positions='antialiased' if has_registers else 'bicubic',
        registers=config.get('num_register_tokens', 4) if has_registers else 0,
        norm_eps=blocks.eps,
    )
    return _Networks(_Network(vision_config, names), None)


def _parse_videomae(config: dict, tensors: dict) -> _Networks:
    config = {
        'hidden_size': 768,
        'num_hidden_layers': 12,
        'num_attention_heads': 12,
        'hidden_act': 'gelu',
        'layer_norm_eps': 1e-12,
        'intermediate_size': 3072,
        **config,
    }
    blocks = _blocks(
        config,
        mlp=config['intermediate_size'],
        biases='qv' if config.get('qkv_bias', True) else '',
    )

    names = _VIDEOMAE
    norm = 'none' if config.get('use_mean_pooling', True) else 'tokens'
    norm_eps = blocks.eps
    if norm == 'none' and 'fc_norm.weight' in tensors:
        # A classifier has a norm of the mean instead, with PyTorch's default eps.
        names = {**_VIDEOMAE, 'norm': 'fc_norm'}
        norm = 'feature'
        norm_eps = 1e-5

    vision_config = vit.ViTConfig(
        blocks=blocks,
        image_size=config.get('image_size', 224),
        patch_size=config.get('patch_size', 16),
        frames=config.get('num_frames', 16),
        tubelet=config.get('tubelet_size', 2),
        positions='sincos',
        class_token=False,
        norm=norm,
        norm_eps=norm_eps,
    )
    return _Networks(_Network(vision_config, names), None)


# By model_type: config.json and the tensors of the folder to the networks.
_PARSERS = {
    'clip': _parse_clip,
    'dinov2': _parse_dino,
    'dinov2_with_registers': _parse_dino,
    'videomae': _parse_videomae,
}


# ------------------------------------------------------------------------------------------------
# Tensors to parameters


class _Parameter(NamedTuple):
    """A parameter here and its tensors in the file, one per layer if it belongs to the blocks.

    Attributes:
      path: keys in the tree of parameters.
      names: of the tensors.
      shape: of each tensor.
    """

    path: tuple[str, ...]
    names: list[str]
    shape: tuple[int, ...]


def _abstract_params(config) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Shapes of a network's parameters, by path."""
    if isinstance(config, vit.TextConfig):
        network = vit.TextTransformer(config)
        inputs = (jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32))
    else:
        network = vit.ViT(config)
        inputs = (jnp.zeros((1, config.frames, config.image_size, config.image_size, 3)),)
    variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    return flax.traverse_util.flatten_dict(variables['params'])


def _parameters(network: _Network) -> Iterator[_Parameter]:
    """Where in the file each parameter of a network is."""
    for path, abstract in _abstract_params(network.config).items():
        module = '/'.join(path)
        suffix = ''
        if module not in network.names:
            module = '/'.join(path[:-1])
            suffix = _SUFFIXES[path[-1]]
        name = network.names[module] + suffix

        names = [name]
        shape = abstract.shape
        if path[0] == 'blocks':
            num_layers, *shape = shape
            names = [name.replace('*', str(layer)) for layer in range(num_layers)]
        if path[-1] == 'kernel':
            # PyTorch has outputs first: [out, in, *window] where Flax has [*window, in, out].
            *window, inputs, outputs = shape
            shape = (outputs, inputs, *window)
        yield _Parameter(path, names, tuple(shape))


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of an encoder by name, from the contents of its config.json."""
    networks = _PARSERS[config['model_type']](config, {})
    return _wanted_shapes([list(_parameters(network)) for network in networks if network])


def _wanted_shapes(networks: list[list[_Parameter]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of all networks, by name."""
    shapes = {}
    for parameters in networks:
        for parameter in parameters:
            shapes |= dict.fromkeys(parameter.names, parameter.shape)
    return shapes


def _squeezed(shape) -> tuple[int, ...]:
    """The shape without axes of length 1, which files have or lack: a token may be (1, 1, D)."""
    return tuple(size for size in shape if size != 1)


def _read(networks: list[_Network], tensors: dict, folder) -> list[dict]:
    """Reads the parameters, float32, of networks that share the tensors of a folder.

    Raises:
      ValueError: naming every missing, unexpected or wrongly shaped tensor.
    """
    parameters = [list(_parameters(network)) for network in networks]
    wanted = _wanted_shapes(parameters)

    problems = [f'missing {name}' for name in wanted if name not in tensors]
    for name, shape in wanted.items():
        if name in tensors and _squeezed(tensors[name].shape) != _squeezed(shape):
            problems.append(f'{name} has shape {tuple(tensors[name].shape)}, expected {shape}')
    problems += [f'unexpected {name}' for name in sorted(set(tensors) - set(wanted))]
    if problems:
        raise ValueError(f'{folder} does not fit its config.json: {"; ".join(problems)}.')

    trees = []
    for network_parameters in parameters:
        flat = {p.path: _read_parameter(p, tensors) for p in network_parameters}
        trees.append(flax.traverse_util.unflatten_dict(flat))
    return trees


def _read_parameter(parameter: _Parameter, tensors: dict) -> jax.Array:
    """Reads one parameter, float32."""
    layers = [np.asarray(tensors[name], np.float32) for name in parameter.names]
    values = np.stack([layer.reshape(parameter.shape) for layer in layers])
    if parameter.path[-1] == 'kernel':
        # [layers, out, in, *window] to [layers, *window, in, out]
        values = np.moveaxis(values, (1, 2), (-1, -2))
    if parameter.path[0] != 'blocks':
        (values,) = values
    return jnp.asarray(values)


# ------------------------------------------------------------------------------------------------
# Pictures to pixels


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How a picture is prepared, according to preprocessor_config.json.

    Attributes:
      size: length in pixels to which the shorter side is scaled, or (height, width); None does not
        scale.
      resample: PIL's number of the filter.
      crop: (height, width) of the centre that is cut out, or None.
      factor: multiplies the values 0 to 255.
      mean, std: per channel.
    """

    size: int | tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _parse_size(value) -> int | tuple[int, int]:
    """A size of preprocessor_config.json: the shorter side, or (height, width)."""
    if isinstance(value, dict) and set(value) == {'height', 'width'}:
        return value['height'], value['width']
    if isinstance(value, dict) and set(value) == {'shortest_edge'}:
        return value['shortest_edge']
    if isinstance(value, int):
        return value
    raise ValueError(f'size {value} is neither a number, shortest_edge, nor height and width')


def parse_preprocess(config: dict) -> Preprocess:
    """Parses the contents of preprocessor_config.json.

    Raises:
      ValueError, TypeError, KeyError: if a size is not understood, or the mean or std is missing.
    """
    size = None
    if config.get('do_resize', True):
        size = _parse_size(config.get('size', 224))

    crop = None
    if config.get('do_center_crop', True):
        crop = _parse_size(config.get('crop_size', 224))
        if isinstance(crop, int):
            crop = (crop, crop)

    factor = 1
    if config.get('do_rescale', True):
        factor = config.get('rescale_factor', 1 / 255)

    mean, std = (0,), (1,)
    if config.get('do_normalize', True):
        mean, std = tuple(config['image_mean']), tuple(config['image_std'])

    return Preprocess(size, config.get('resample', 3), crop, factor, mean, std)


def prepare(how: Preprocess, frames) -> np.ndarray:
    """Scales, crops and normalises frames as the encoder takes them.

    Args:
      how: of the encoder's folder.
      frames: uint8 [N, H, W, 3].

    Returns:
      float32 [N, height, width, 3], of the size that `how` says.

    Raises:
      ValueError: if the crop is larger than the scaled frame.
    """
    height, width = frames.shape[1:3]
    if isinstance(how.size, int):
        shorter = min(height, width)
        height, width = int(how.size * height / shorter), int(how.size * width / shorter)
    elif how.size:
        height, width = how.size

    # 8-bit pictures, as in transformers: PIL rounds after scaling.
    scaled = [Image.fromarray(frame).resize((width, height), how.resample) for frame in frames]
    pixels = np.stack([np.asarray(picture) for picture in scaled])  # [N, height, width, 3]

    if how.crop:
        crop_height, crop_width = how.crop
        if crop_height > height or crop_width > width:
            raise ValueError(
                f'A crop of {how.crop} px does not fit into frames scaled to {height} x {width} '
                'px: correct preprocessor_config.json.'
            )
        top = (height - crop_height) // 2
        left = (width - crop_width) // 2
        pixels = pixels[:, top : top + crop_height, left : left + crop_width]

    return ((pixels * how.factor - how.mean) / how.std).astype(np.float32)


# ------------------------------------------------------------------------------------------------
# Captions to token ids

_BEGIN = '<|startoftext|>'
_END = '<|endoftext|>'
_CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def load_tokenizer(folder) -> Callable[[str], list[int]]:
    """Loads the tokenizer of CLIP from a folder.

    Returns:
      A function from a caption to its ids, between those that begin and end a text.

    Raises:
      FileNotFoundError: if there is no tokenizer.
      ValueError: if it is damaged, or not one of CLIP.
    """
    folder = pathlib.Path(folder)
    fast = folder / 'tokenizer.json'
    vocab = folder / 'vocab.json'
    merges = folder / 'merges.txt'
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
            tokenizer = _build_tokenizer(vocab, merges)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise ValueError(
            f'{fast if fast.is_file() else vocab} or {merges.name} is damaged ({error}): copy it '
            'again.'
        ) from error

    begin = tokenizer.token_to_id(_BEGIN)
    end = tokenizer.token_to_id(_END)
    if begin is None or end is None:
        raise ValueError(
            f'The tokenizer of {folder} lacks {_BEGIN} or {_END}: copy a tokenizer of CLIP there.'
        )

    def tokenize(caption: str) -> list[int]:
        return [begin, *tokenizer.encode(caption, add_special_tokens=False).ids, end]

    return tokenize


def _build_tokenizer(vocab: pathlib.Path, merges: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer of CLIP, from the files of its byte pair encoding."""
    model = tokenizers.models.BPE.from_file(
        str(vocab), str(merges), unk_token=_END, end_of_word_suffix='</w>'
    )
    tokenizer = tokenizers.Tokenizer(model)
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
    tokenizer.add_special_tokens([_BEGIN, _END])
    return tokenizer


# ------------------------------------------------------------------------------------------------
# A folder to an encoder


@dataclasses.dataclass(frozen=True)
class CaptionEncoder:
    """CLIP's encoder of captions.

    Attributes:
      config, params: of the text transformer.
      tokenize: a caption to its token ids.
    """

    config: vit.TextConfig
    params: dict
    tokenize: Callable[[str], list[int]]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The encoder in a folder.

    Attributes:
      config, params: of the vision transformer.
      preprocess: how its pictures are prepared.
      text: of captions; None if the encoder has none.
    """

    config: vit.ViTConfig
    params: dict
    preprocess: Preprocess
    text: CaptionEncoder | None


def _read_json(path: pathlib.Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding='utf-8')))
    except OSError as error:
        raise FileNotFoundError(
            f'{path} cannot be read ({error.strerror}): an encoder is a folder as transformers '
            'writes it.'
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f'{path} is not a JSON object ({error}): copy it again.') from error


def load(folder) -> Encoder:
    """Loads the encoder in a folder.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is missing or does not fit.
    """
    folder = pathlib.Path(folder)
    config_path = folder / 'config.json'
    preprocess_path = folder / 'preprocessor_config.json'
    config = _read_json(config_path)
    preprocess_config = _read_json(preprocess_path)

    kind = config.get('model_type')
    if kind not in _PARSERS:
        raise ValueError(
            f'{config_path} describes a {kind!r} model: only {", ".join(_PARSERS)} are implemented.'
        )

    # Checkpoints with a head, such as a classifier, have the model's name before its tensors.
    tensors = {
        re.sub(f'^{kind}\\.', '', name): tensor
        for name, tensor in tensor_io.open_safetensors(folder, _UNUSED[kind]).items()
    }

    try:
        vision, text = _PARSERS[kind](config, tensors)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{config_path}: {error}.') from error
    try:
        preprocess = parse_preprocess(preprocess_config)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{preprocess_path}: {error!r}.') from error

    if text is None:
        (params,) = _read([vision], tensors, folder)
        return Encoder(vision.config, params, preprocess, text=None)

    tokenize = load_tokenizer(folder)
    params, text_params = _read([vision, text], tensors, folder)
    caption_encoder = CaptionEncoder(text.config, text_params, tokenize)
    return Encoder(vision.config, params, preprocess, caption_encoder)


# ------------------------------------------------------------------------------------------------
# Encoding


@functools.partial(jax.jit, static_argnames='config')
def _encode_pixels(config: vit.ViTConfig, params, pixels):
    with jax.default_matmul_precision('float32'):
        return vit.ViT(config).apply({'params': params}, pixels)


@functools.partial(jax.jit, static_argnames='config')
def _encode_ids(config: vit.TextConfig, params, ids, last):
    with jax.default_matmul_precision('float32'):
        return vit.TextTransformer(config).apply({'params': params}, ids, last)


def _in_batches(run: Callable, batch_size: int, *arrays) -> np.ndarray:
    """Runs a function on all rows of the arrays, batch_size rows at a time."""
    count = len(arrays[0])

    # The last batch is filled up with zeros, since a batch of another size would be compiled anew.
    lacking = -count % batch_size
    if lacking:
        arrays = [
            np.concatenate([array, np.zeros((lacking, *array.shape[1:]), array.dtype)])
            for array in arrays
        ]

    results = []
    for start in range(0, count, batch_size):
        batch = [array[start : start + batch_size] for array in arrays]
        results.append(np.asarray(run(*batch)))
    return np.concatenate(results)[:count]


def encode_clips(encoder: Encoder, clips, frames_at_once: int = 8) -> np.ndarray:
    """Encodes clips, or pictures as clips of one frame.

    Args:
      encoder: of `load`.
      clips: uint8 [N, F, H, W, 3], with F = encoder.config.frames.
      frames_at_once: number of frames in a batch; a clip that has more is a batch of its own.

    Returns:
      float32 [N, D].

    Raises:
      ValueError: for another number of frames.
    """
    config = encoder.config
    if clips.shape[1] != config.frames:
        raise ValueError(f'Clips have {clips.shape[1]} frames, the encoder takes {config.frames}.')

    def run(batch):
        frames = batch.reshape(-1, *batch.shape[2:])  # [B * F, H, W, 3]
        pixels = prepare(encoder.preprocess, frames)
        pixels = pixels.reshape(len(batch), config.frames, *pixels.shape[1:])
        return _encode_pixels(config, encoder.params, pixels)

    return _in_batches(run, max(1, frames_at_once // config.frames), clips)


def encode_captions(
    encoder: Encoder, captions: Sequence[str], at_once: int = 16
) -> tuple[np.ndarray, list[bool]]:
    """Encodes captions.

    Args:
      encoder: of `load`; its `text` must not be None.
      captions: N texts.
      at_once: number of captions in a batch.

    Returns:
      Features float32 [N, D], and for each caption whether it was too long and cut off.
    """
    text = encoder.text
    length = text.config.length
    rows = [text.tokenize(caption) for caption in captions]

    ids = np.zeros((len(rows), length), np.int32)  # [N, M]
    last = np.zeros(len(rows), np.int32)  # [N], position of the token that ends the text
    for index, row in enumerate(rows):
        kept = row
        if len(row) > length:
            kept = [*row[: length - 1], row[-1]]  # the end stays, since its state is the feature
        ids[index, : len(kept)] = kept
        last[index] = len(kept) - 1

    run = functools.partial(_encode_ids, text.config, text.params)
    features = _in_batches(run, at_once, ids, last)
    was_cut = [len(row) > length for row in rows]
    return features, was_cut
