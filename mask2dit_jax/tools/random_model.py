"""A model folder in the released layout with tiny, random networks, to try commands and for tests.

Required flag: --out, the folder to write.

Every command runs on it in seconds, and its videos are noise.

  python -m mask2dit_jax.tools.random_model --out=models/tiny
  python -m mask2dit_jax.tools.random_model --encoders --out=models/encoders
"""

import copy
import dataclasses
import io
import json
import pathlib
import string

import jax
import numpy as np
import sentencepiece
from absl import app, flags

from mask2dit_jax import paths, tensor_io
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.evaluation import feature_encoders
from mask2dit_jax.models import dit, t5, vae
from mask2dit_jax.pretrained import config_json, export, names

TRANSFORMER = dit.DiTConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_embed_dim=24,
    time_embed_dim=16,
    max_text_seq_length=12,
    sample_height=4,
    sample_width=4,
    sample_frames=5,
    position_rule='reference',
    dtype='float32',
    attention_backend='dense',
)
VAE = vae.VAEConfig(
    latent_channels=4,
    block_out_channels=(4, 8, 8, 12),
    layers_per_block=1,
    norm_num_groups=2,
    sample_height=96,
    sample_width=80,
)
T5 = t5.T5Config(vocab_size=384, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=3)

# The encoders that mask2dit_jax.evaluate takes: their config.json, without sizes of the vocabulary.
BLOCK = {
    'hidden_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 3,
    'intermediate_size': 40,
}
_PICTURE = {'image_size': 20, 'patch_size': 10}
ENCODERS = {
    'clip': {
        'text_config': BLOCK | {'max_position_embeddings': 12},
        'vision_config': BLOCK | _PICTURE,
        'projection_dim': 16,
    },
    'dinov2': BLOCK | _PICTURE,
    'videomae': BLOCK | _PICTURE | {'num_frames': 4},
}

# Merges of CLIP's tokenizer, enough for a test to tell them from single letters.
_MERGES = ['r e', 're d</w>', 'm o', 'mo v', 'b a', 'l l</w>', 'ba ll</w>', "' s</w>", 'Ã ©</w>']


def _write_json(path: pathlib.Path, content) -> None:
    path.write_text(json.dumps(content, indent=2) + '\n')


def _config_json(config, **fixed) -> dict:
    """The fields of a network's config, without its dtype, and what else its config.json says."""
    content = dataclasses.asdict(config)
    del content['dtype']
    return content | fixed


def _write_network(
    folder: pathlib.Path, kind: str, config, config_json: dict, seed: int, dtype, **kwargs
) -> None:
    """Writes the safetensors and the config.json of one network, by names.NETWORKS."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(dtype),
        names.abstract_params(config, kind),
    )
    tensors = export.export_params(kind, config, params)

    stem = names.NETWORKS[kind].stem
    tensor_io.write_safetensors(folder / kind, stem, tensors, **kwargs)
    _write_json(folder / kind / 'config.json', config_json)


def _write_tokenizer(folder: pathlib.Path) -> None:
    """A tokenizer of single bytes and letters, which knows every text."""
    letters = string.ascii_letters + string.digits + string.punctuation
    sentences = [' '.join(letters)] * 2 + ['a red ring on gray moves left', 'it grows and blinks']

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=T5.vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        # The numbers of the released tokenizer.
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir()
    (folder / 'spiece.model').write_bytes(model.getvalue())


def write(folder, transformer: dit.DiTConfig = TRANSFORMER, dtype=np.float32, **kwargs) -> None:
    """Writes a model folder: transformer/, vae/, text_encoder/, tokenizer/ and scheduler/.

    Args:
      folder: a new folder, or an empty one.
      transformer: configuration of the transformer.
      dtype: type of the transformer's tensors; those of the other networks are float32.
      **kwargs: arguments of tensor_io.write_safetensors, for the transformer.

    Raises:
      ValueError: if the folder has something in it.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f'{folder} is not empty: give --out a new folder.')

    transformer_json = config_json.transformer_json(transformer)
    _write_network(folder, 'transformer', transformer, transformer_json, 0, dtype, **kwargs)

    vae_json = _config_json(
        VAE,
        _class_name='AutoencoderKLCogVideoX',
        down_block_types=['CogVideoXDownBlock3D'] * 4,
        up_block_types=['CogVideoXUpBlock3D'] * 4,
        act_fn='silu',
        use_quant_conv=False,
    )
    _write_network(folder, 'vae', VAE, vae_json, 1, np.float32)

    t5_json = _config_json(
        T5,
        model_type='t5',
        feed_forward_proj='gated-gelu',
        architectures=['T5EncoderModel'],
    )
    _write_network(folder, 'text_encoder', T5, t5_json, 2, np.float32)

    _write_tokenizer(folder / 'tokenizer')

    schedule = dataclasses.replace(schedule_lib.Schedule(), snr_shift_scale=3.0)
    (folder / 'scheduler').mkdir()
    _write_json(folder / 'scheduler/scheduler_config.json', config_json.schedule_json(schedule))


def write_vocabulary(folder: pathlib.Path) -> int:
    """Writes vocab.json and merges.txt in CLIP's form.

    Args:
      folder: an existing folder.

    Returns:
      The number of tokens; the last token ends a text.
    """
    # Every letter alone and at the end of a word, the results of the merges, and both ends.
    letters = [*string.printable[:94], *'ÃÂâ©Ġ']
    last_letters = [letter + '</w>' for letter in letters]
    merged = [merge.replace(' ', '') for merge in _MERGES]
    ends = ['<|startoftext|>', '<|endoftext|>']
    pieces = dict.fromkeys([*letters, *last_letters, *merged, *ends])

    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (folder / 'vocab.json').write_text(json.dumps(vocabulary))
    (folder / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(_MERGES) + '\n')
    return len(pieces)


def write_encoder(folder, kind: str) -> pathlib.Path:
    """Writes an encoder as mask2dit_jax.evaluation.feature_encoders reads it.

    Args:
      folder: a new folder.
      kind: one of ENCODERS.

    Returns:
      The folder.

    Raises:
      FileExistsError: if there is such a folder.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)

    config = copy.deepcopy(ENCODERS[kind] | {'model_type': kind})
    if kind == 'clip':
        config['text_config']['vocab_size'] = write_vocabulary(folder)

    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in feature_encoders.tensor_shapes(config).items():
        tensors[name] = rng.normal(0, 0.3, shape).astype(np.float32)

    preprocessor = {
        'size': {'shortest_edge': 20},
        'crop_size': 20,
        'image_mean': [0.4] * 3,
        'image_std': [0.3] * 3,
    }
    tensor_io.write_file(folder / 'model.safetensors', tensors)
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'preprocessor_config.json').write_text(json.dumps(preprocessor))
    return folder


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')

    if _ENCODERS.value:
        for kind in ENCODERS:
            write_encoder(pathlib.Path(_OUT.value) / kind, kind)
        print(f'Wrote {_OUT.value}: {", ".join(ENCODERS)}.')
    else:
        write(_OUT.value)
        print(f'Wrote {_OUT.value}: transformer, vae, text_encoder, tokenizer, scheduler.')


if __name__ == '__main__':
    _OUT = flags.DEFINE_string('out', None, 'A new folder.', required=True)
    _ENCODERS = flags.DEFINE_bool(
        'encoders', False, 'Writes the encoders that mask2dit_jax.evaluate takes, not a model.'
    )
    paths.check_flags_local('out')
    app.run(main)
