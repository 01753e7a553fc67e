"""A model folder in the released layout with tiny, random networks, for trying commands, and for
tests.

Everything runs on it in seconds, and nothing that comes out is worth looking at.

  python -m mask2dit_jax.tools.random_model --out=models/tiny
  python -m mask2dit_jax.tools.random_model --encoders --out=models/encoders
"""

import dataclasses
import io
import json
import pathlib
import string

import jax
import numpy as np
import safetensors.numpy
import sentencepiece
from absl import app, flags

from mask2dit_jax import tensor_io
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
_MERGES = ['r e', 're d</w>', 'm o', 'mo v', 'b a', 'l l</w>', 'ba ll</w>', "' s</w>", 'Ã ©</w>']


def _json(cfg, **fixed) -> dict:
    return {
        f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name != 'dtype'
    } | fixed


def _write_network(
    folder: pathlib.Path, kind: str, cfg, config_json: dict, seed: int, dtype, **kwargs
) -> None:
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda p: rng.normal(0, 0.3, p.shape).astype(dtype), names.abstract_params(cfg, kind)
    )
    tensor_io.write_safetensors(
        folder / kind, names.NETWORKS[kind].stem, export.export_params(kind, cfg, params), **kwargs
    )
    (folder / kind / 'config.json').write_text(json.dumps(config_json, indent=2) + '\n')


def _write_tokenizer(folder: pathlib.Path) -> None:
    """A tokenizer of single bytes and letters, which knows every text."""
    model = io.BytesIO()
    letters = string.ascii_letters + string.digits + string.punctuation
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [' '.join(letters)] * 2 + ['a red ring on gray moves left', 'it grows and blinks']
        ),
        model_writer=model,
        vocab_size=T5.vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir()
    (folder / 'spiece.model').write_bytes(model.getvalue())


def write(folder, transformer: dit.DiTConfig = TRANSFORMER, dtype=np.float32, **kwargs) -> None:
    """Writes transformer/, vae/, text_encoder/, tokenizer/, scheduler/.

    Args:
      folder: new.
      transformer: its configuration.
      dtype: of the transformer's tensors.
      **kwargs: of weights.write_safetensors, for the transformer.

    Raises:
      ValueError: if the folder has something in it.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f'{folder} is not empty: give --out a new folder.')
    _write_network(
        folder,
        'transformer',
        transformer,
        config_json.transformer_json(transformer),
        0,
        dtype,
        **kwargs,
    )
    _write_network(
        folder,
        'vae',
        VAE,
        _json(
            VAE,
            _class_name='AutoencoderKLCogVideoX',
            down_block_types=['CogVideoXDownBlock3D'] * 4,
            up_block_types=['CogVideoXUpBlock3D'] * 4,
            act_fn='silu',
            use_quant_conv=False,
        ),
        1,
        np.float32,
    )
    _write_network(
        folder,
        'text_encoder',
        T5,
        _json(
            T5, model_type='t5', feed_forward_proj='gated-gelu', architectures=['T5EncoderModel']
        ),
        2,
        np.float32,
    )
    _write_tokenizer(folder / 'tokenizer')
    (folder / 'scheduler').mkdir()
    schedule = config_json.schedule_json(
        dataclasses.replace(schedule_lib.Schedule(), snr_shift_scale=3.0)
    )
    (folder / 'scheduler/scheduler_config.json').write_text(json.dumps(schedule, indent=2) + '\n')


def write_vocabulary(folder: pathlib.Path) -> int:
    """vocab.json and merges.txt in CLIP's form; returns the number of tokens, of which the last
    ends a text."""
    letters = [*string.printable[:94], *'ÃÂâ©Ġ']
    pieces = [*letters, *(c + '</w>' for c in letters), *(m.replace(' ', '') for m in _MERGES)]
    pieces += ['<|startoftext|>', '<|endoftext|>']
    (folder / 'vocab.json').write_text(
        json.dumps({p: i for i, p in enumerate(dict.fromkeys(pieces))})
    )
    (folder / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(_MERGES) + '\n')
    return len(dict.fromkeys(pieces))


def write_encoder(folder, kind: str) -> pathlib.Path:
    """Writes a folder of one of ENCODERS, as mask2dit_jax.evaluation.feature_encoders reads it;
    returns it.

    Raises:
      FileExistsError: if there is such a folder.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(ENCODERS[kind] | {'model_type': kind}))
    if kind == 'clip':
        config['text_config']['vocab_size'] = write_vocabulary(folder)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in feature_encoders.tensor_shapes(config).items()
    }
    safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'preprocessor_config.json').write_text(
        json.dumps(
            {
                'size': {'shortest_edge': 20},
                'crop_size': 20,
                'image_mean': [0.4] * 3,
                'image_std': [0.3] * 3,
            }
        )
    )
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
    _OUT = flags.DEFINE_string('out', None, 'New folder.', required=True)
    _ENCODERS = flags.DEFINE_bool(
        'encoders', False, 'Write the encoders that mask2dit_jax.evaluate takes instead.'
    )
    app.run(main)
