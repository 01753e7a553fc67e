"""Captions in, one multi-scene video out; given clips are extended.

Required: --workdir or --checkpoint, and --prompt (once for each scene) or --story.

  python -m mask2dit_jax.sample --workdir=runs/tiny --prompt="red ring on gray moves left" \
    --prompt="it grows"
  python -m mask2dit_jax.sample --workdir=runs/tiny --story=story.json --num_videos=4
  python -m mask2dit_jax.sample --workdir=runs/tiny --given=a.mp4 --given=b.mp4 --prompt=A \
    --prompt=B --prompt=NEW
  python -m mask2dit_jax.sample --checkpoint=CogVideoX-5b --prompt=A --prompt=B --height=480 \
    --width=720 --frames=49
  python -m mask2dit_jax.sample --checkpoint=CogVideoX-5b \
    --lora=pytorch_lora_weights.safetensors --prompt=A --prompt=B

A story file is {"scenes": [{"caption": "red ring on gray moves left", "frames": 8}, {"caption":
"it grows"}]}. From Python, mask2dit_jax.load does the same.
"""

import pathlib

import jax
from absl import app, flags

from mask2dit_jax import config as config_lib
from mask2dit_jax import logs, paths, pipeline, ranges
from mask2dit_jax.data import story_file
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.models import vae

_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'Folder that mask2dit_jax.main has written; its newest good checkpoint is used.',
)
_CHECKPOINT = flags.DEFINE_string(
    'checkpoint',
    None,
    'Instead of --workdir: one checkpoint of a workdir, such as runs/tiny/checkpoints/2000, or a '
    'model folder, released (transformer/, vae/, text_encoder/, tokenizer/, scheduler/) or '
    'converted to Orbax.',
)
_LORA = flags.DEFINE_string(
    'lora',
    None,
    "LoRA file of diffusers' CogVideoX (.safetensors) to merge into the model; a "
    'run that was trained with LoRA has its own merged already.',
)
_PROMPT = flags.DEFINE_multi_string(
    'prompt',
    [],
    'Caption of a scene; repeat the flag for every scene, given clips included.',
)
_STORY = flags.DEFINE_string(
    'story', None, 'JSON file with scenes of caption and frames, instead of --prompt.'
)
_GIVEN = flags.DEFINE_multi_string(
    'given', [], 'Video of a leading scene that is given; repeat it in story order.'
)
_GIVEN_FRAMES = flags.DEFINE_integer(
    'given_frames',
    None,
    'Number of frames to cut from every given clip, as encode cuts the scenes of stories; --seed '
    'draws where they start. Default: all frames.',
    lower_bound=1,
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the noise; the same seed gives the same video.')
_STEPS = flags.DEFINE_integer(
    'steps', None, 'Sampling steps; default: the configuration of the run.', lower_bound=1
)
_GUIDANCE = flags.DEFINE_list(
    'guidance',
    None,
    'Scale of classifier-free guidance: one number, or one for each scene, separated by commas; '
    'default: the configuration of the run.',
)
_SAMPLER = flags.DEFINE_enum(
    'sampler', None, samplers.SAMPLERS, 'Sampler; default: the configuration of the run.'
)
_NEGATIVE = flags.DEFINE_string(
    'negative_prompt', '', 'Caption that guidance leads away from, in every scene.'
)
_FRAMES = flags.DEFINE_integer(
    'frames',
    None,
    'Number of frames of every scene whose length neither a story file nor a given clip says; '
    'default: the length that the model was trained with.',
    lower_bound=1,
)
_HEIGHT = flags.DEFINE_integer(
    'height',
    None,
    'Height in pixels, for model folders only; default: the size of training.',
    lower_bound=1,
)
_WIDTH = flags.DEFINE_integer('width', None, 'Width in pixels, as --height.', lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    'dtype',
    'bfloat16',
    ('bfloat16', 'float32'),
    'Number format in which the transformer and the text encoder of a model folder are held and '
    'computed; the VAE always computes in float32.',
)
_TILING = flags.DEFINE_bool(
    'tiling', False, 'Run the VAE of a model folder in overlapping tiles, for less memory.'
)
_DECODE_RULE = flags.DEFINE_enum(
    'decode_rule',
    'reference',
    vae.DECODE_RULES,
    'How the VAE of a model folder batches frames: as Mask²DiT does, or as stock diffusers.',
)
_MASK_PADDING = flags.DEFINE_bool(
    'mask_padding',
    False,
    'Hide padding from the text encoder of a model folder; the reference does not.',
)
_FOLDER_FLAGS = 'height', 'width', 'dtype', 'tiling', 'decode_rule', 'mask_padding'
_NUM_VIDEOS = flags.DEFINE_integer(
    'num_videos', 1, 'Number of videos of this story, each from noise of its own.', lower_bound=1
)
_MESH = flags.DEFINE_list(
    'mesh',
    None,
    'FSDP,CONTEXT: the number of devices over which the parameters and the halves of guidance are '
    'spread, and the number over which tokens are; default on accelerators: 2 and the rest.',
)
_OUT = flags.DEFINE_string('out', 'samples', 'Folder for mp4, gif, contact sheet and story.json.')

paths.check_flags_local('workdir', 'checkpoint', 'lora', 'story', 'given', 'out')
ranges.check_flag('seed', config_lib.Config, 'seed')
ranges.check_flag('steps', config_lib.SampleConfig, 'steps')
ranges.check_flag('guidance', config_lib.SampleConfig, 'guidance')
ranges.check_flag('mesh', mesh_lib.MeshConfig, 'fsdp')


def _mesh() -> jax.sharding.Mesh:
    """The mesh that --mesh asks for."""
    if not _MESH.value:
        return pipeline.default_mesh()
    if len(_MESH.value) != 2:
        raise app.UsageError(
            f'--mesh needs two numbers, FSDP,CONTEXT, got {",".join(_MESH.value)}.'
        )
    fsdp, context = map(int, _MESH.value)
    return pipeline.default_mesh((fsdp, context))


def _story() -> tuple[list[str], list[int | None]]:
    """Captions and frames from --prompt or --story."""
    if bool(_PROMPT.value) == bool(_STORY.value):
        raise app.UsageError('Give the captions either by --prompt, repeated, or by --story.')
    if _STORY.value:
        return story_file.read_story(_STORY.value)
    return _PROMPT.value, [None] * len(_PROMPT.value)


def _folder_settings(path: pathlib.Path) -> dict:
    """The flags that are for model folders, if that is one.

    Raises:
      UsageError: if one of them is given for something else.
      FileNotFoundError: if --checkpoint is neither a checkpoint nor a model folder.
    """
    chosen = {name: flags.FLAGS[name] for name in _FOLDER_FLAGS}
    if (path / 'transformer').is_dir():
        return {name: flag.value for name, flag in chosen.items()}
    useless = [f'--{name}' for name, flag in chosen.items() if flag.present]
    if useless:
        raise app.UsageError(
            f'Only for model folders, and {path} is not one: {", ".join(useless)}.'
        )
    if _CHECKPOINT.value and not (path / 'ema').is_dir():
        raise FileNotFoundError(
            f'{path} is neither a checkpoint of a workdir (with ema/) nor a model folder (with '
            'transformer/): check --checkpoint.'
        )
    return {}


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    if bool(_WORKDIR.value) == bool(_CHECKPOINT.value):
        raise app.UsageError('Give either --workdir or --checkpoint.')
    logs.quiet_libraries()
    captions, frames = _story()
    default_frames = _FRAMES.value
    path = pathlib.Path(_CHECKPOINT.value or _WORKDIR.value)
    model = pipeline.load(
        path,
        mesh=_mesh(),
        lora_file=_LORA.value,
        keep_params=False,
        **_folder_settings(path),
    )

    guidance = None
    if _GUIDANCE.value:
        guidance = [float(g) for g in _GUIDANCE.value]
        guidance = guidance[0] if len(guidance) == 1 else guidance
    given_at = len(_GIVEN.value)
    videos = model.generate(
        [captions] * _NUM_VIDEOS.value,
        frames=[f or (default_frames if i >= given_at else None) for i, f in enumerate(frames)],
        given=_GIVEN.value,
        given_frames=_GIVEN_FRAMES.value,
        seed=_SEED.value,
        sampler=_SAMPLER.value,
        steps=_STEPS.value,
        guidance=guidance,
        negative_caption=_NEGATIVE.value,
    )
    pipeline.save(videos, _OUT.value)
    print(
        f'Wrote {len(videos)} video(s) to {_OUT.value}: video_*.mp4, video_*.gif, sheet_*.png, '
        'story.json.'
    )


if __name__ == '__main__':
    app.run(main)
