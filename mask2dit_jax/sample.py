"""Captions in, one multi-scene video out; given clips are extended.

  python -m mask2dit_jax.sample --workdir=runs/tiny --prompt="red ring on gray moves left" --prompt="it grows"
  python -m mask2dit_jax.sample --workdir=runs/tiny --story=story.json --num_videos=4
  python -m mask2dit_jax.sample --workdir=runs/tiny --given=a.mp4 --given=b.mp4 --prompt=A --prompt=B --prompt=NEW
  python -m mask2dit_jax.sample --checkpoint=CogVideoX-5b --prompt=A --prompt=B --height=480 --width=720 --frames=49
  python -m mask2dit_jax.sample --checkpoint=CogVideoX-5b --lora=pytorch_lora_weights.safetensors --prompt=A --prompt=B

A story file is {"scenes": [{"caption": "red ring on gray moves left", "frames": 8}, {"caption": "it
grows"}]}.
"""

import dataclasses
import hashlib
import json
import pathlib

import jax
import numpy as np
import tqdm
from absl import app, flags, logging

from mask2dit_jax import config as config_lib
from mask2dit_jax import logs, pipeline
from mask2dit_jax.data import latent_codec, manifest, sheets, story_file, video
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.models import dit, lora, vae
from mask2dit_jax.pretrained import load as load_lib
from mask2dit_jax.pretrained import lora_files, names, runs

_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'Folder that mask2dit_jax.main has written; its newest good checkpoint is used.',
)
_CHECKPOINT = flags.DEFINE_string(
    'checkpoint',
    None,
    'Instead: one checkpoint of a workdir, e.g. '
    'runs/tiny/checkpoints/2000, or a model folder, released (transformer/, vae/, '
    'text_encoder/, tokenizer/, scheduler/) or converted to Orbax.',
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
    'Caption of a scene; repeat it, one for every scene, those of given clips included.',
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
    'Cut so many frames from every given clip, as encode '
    'cuts those of stories, from a start that --seed draws; default: all.',
    lower_bound=1,
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the noise; the same seed gives the same video.')
_STEPS = flags.DEFINE_integer(
    'steps', None, 'Sampling steps; default: the configuration of the run.', lower_bound=1
)
_GUIDANCE = flags.DEFINE_list(
    'guidance',
    None,
    'Classifier-free guidance scale: one number, or one per scene, '
    'separated by commas; default: the configuration of the run.',
)
_SAMPLER = flags.DEFINE_enum(
    'sampler', None, samplers.SAMPLERS, 'Default: the configuration of the run.'
)
_NEGATIVE = flags.DEFINE_string(
    'negative_prompt', '', 'What guidance leads away from, in every scene.'
)
_FRAMES = flags.DEFINE_integer(
    'frames',
    None,
    'Frames of a scene for which no story file or given clip says it; '
    'default: those the model was trained with.',
    lower_bound=1,
)
_HEIGHT = flags.DEFINE_integer(
    'height', None, 'Pixels; model folders only, default: the size they were trained with.'
)
_WIDTH = flags.DEFINE_integer('width', None, 'As --height.')
_DTYPE = flags.DEFINE_enum(
    'dtype',
    'bfloat16',
    ('bfloat16', 'float32'),
    'Computing and holding parameters of model folders; the VAE always computes in float32.',
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
    'num_videos', 1, 'How many videos of this story, from different noise.', lower_bound=1
)
_MESH = flags.DEFINE_list(
    'mesh',
    None,
    'FSDP,CONTEXT: over how many devices the halves of guidance and the parameters '
    'are spread, and over how many the tokens; default on accelerators 2 and the rest.',
)
_OUT = flags.DEFINE_string('out', 'samples', 'Folder for mp4, gif, contact sheet and story.json.')


def read_given(path, height_px: int, width_px: int, frames: int | None, seed: int) -> np.ndarray:
    """A given clip uint8 [F, H, W, 3]: all of a video, or so many frames of it, at most every
    third.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    if frames is None:
        return video.read_video(path, height_px=height_px, width_px=width_px)[0]
    info = video.probe(path)
    try:
        indices = manifest.choose_frames(
            manifest.MULTI_SCENE, len(info.times), frames, 3, np.random.default_rng(seed)
        )
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return video.read_frames(path, info, indices, height_px=height_px, width_px=width_px)


def plan_frames(frames: list[int | None], given: list[np.ndarray], default: int) -> tuple[int, ...]:
    """Pixel frames per scene: a given clip's own, else the story's, else the default.

    Raises:
      ValueError: if there are as many given clips as scenes, or a clip contradicts the story.
    """
    if len(given) >= len(frames):
        raise ValueError(
            f'{len(given)} given clips and {len(frames)} captions leave no scene to generate: give one '
            'caption per clip and at least one more.'
        )
    lengths = [len(clip) for clip in given] + [None] * (len(frames) - len(given))
    for i, (asked, length) in enumerate(zip(frames, lengths)):
        if asked and length and asked != length:
            raise ValueError(
                f'Scene {i + 1} has {asked} frames in the story but its given clip has {length}.'
            )
    return tuple(length or asked or default for asked, length in zip(frames, lengths))


def _mesh() -> jax.sharding.Mesh:
    """Mesh of --mesh; by default all accelerators, guidance's halves on fsdp and tokens on context,
    or one CPU."""
    count = jax.device_count() if _MESH.value or jax.default_backend() != 'cpu' else 1
    sizes = (
        [int(n) for n in _MESH.value] if _MESH.value else [1, 1] if count == 1 else [2, count // 2]
    )
    if len(sizes) != 2:
        raise app.UsageError(
            f'--mesh needs two numbers, FSDP,CONTEXT, got {",".join(_MESH.value)}.'
        )
    return mesh_lib.make_mesh(
        mesh_lib.MeshConfig(fsdp=sizes[0], context=sizes[1]), jax.devices()[:count]
    )


def load_run(path: pathlib.Path):
    """As `load_folder`, of a workdir, the newest good checkpoint of which is used, or of one
    checkpoint in it."""
    workdir = path.absolute() if _WORKDIR.value else path.absolute().parent.parent
    cfg = config_lib.load(workdir / 'config.json')
    target = partitioning.abstract_arrays(names.abstract_params(cfg.model), _mesh())

    def load():
        return (
            runs.newest(path, cfg, target)
            if _WORKDIR.value
            else (path, runs.restore(path, cfg, target))
        )

    return cfg, latent_codec.for_run(cfg, workdir), load


def load_folder(folder: pathlib.Path):
    """Configuration, codec and a function that loads the transformer and says from where, of a
    model folder."""
    base = config_lib.Config(
        data=config_lib.DataConfig(fps=8.0), model=dit.DiTConfig(dtype=_DTYPE.value)
    )
    cfg = load_lib.with_model_from(base, folder)
    frames, factor = (
        cfg.model.sample_frames,
        load_lib.read_config('vae', folder / 'vae').spatial_factor,
    )
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, layouts=((frames,),)))
    size = (
        _HEIGHT.value or cfg.model.sample_height * factor,
        _WIDTH.value or cfg.model.sample_width * factor,
    )
    codec = latent_codec.PretrainedCodec(
        folder,
        cfg.model,
        size,
        tiling=_TILING.value,
        decode_rule=_DECODE_RULE.value,
        mask_padding=_MASK_PADDING.value,
    )
    target = partitioning.abstract_arrays(
        names.abstract_params(cfg.model), _mesh(), cfg.model.dtype
    )
    return (
        cfg,
        codec,
        lambda: (
            folder,
            load_lib.read_params('transformer', folder / 'transformer', cfg.model, target),
        ),
    )


def write_outputs(
    out: pathlib.Path, videos, captions, frames, num_given: int, fps: float, record: dict
) -> None:
    """Writes mp4, gif and contact sheet per video, and story.json with all it takes to make them
    again."""
    scale = max(1, 256 // videos.shape[2])
    for i, pixels in enumerate(videos):
        video.write_mp4(out / f'video_{i}.mp4', pixels, fps, scale)
        video.write_gif(out / f'video_{i}.gif', pixels, fps, scale)
        scenes, marks = (
            story_file.split_scenes(pixels, frames),
            [s < num_given for s in range(len(frames))],
        )
        video.write_png(out / f'sheet_{i}.png', sheets.contact_sheet(scenes, captions, given=marks))
    (out / 'story.json').write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')


def _inputs():
    """Captions and asked frames from --prompt or --story."""
    if bool(_PROMPT.value) == bool(_STORY.value):
        raise app.UsageError('Give the captions either by --prompt, repeated, or by --story.')
    return (
        story_file.read_story(_STORY.value)
        if _STORY.value
        else (_PROMPT.value, [None] * len(_PROMPT.value))
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    if bool(_WORKDIR.value) == bool(_CHECKPOINT.value):
        raise app.UsageError('Give either --workdir or --checkpoint.')
    logs.quiet_libraries()
    captions, asked = _inputs()
    path = pathlib.Path(_CHECKPOINT.value or _WORKDIR.value)
    is_folder, chosen = (path / 'transformer').is_dir(), {n: flags.FLAGS[n] for n in _FOLDER_FLAGS}
    if not is_folder and (useless := [f'--{n}' for n, flag in chosen.items() if flag.present]):
        raise app.UsageError(f'Only for model folders, and {path} is none: {", ".join(useless)}.')
    if not is_folder and _CHECKPOINT.value and not (path / 'ema').is_dir():
        raise FileNotFoundError(
            f'{path} is neither a checkpoint of a workdir (with ema/) nor a model folder (with '
            'transformer/): check --checkpoint.'
        )
    cfg, codec, load_params = load_folder(path) if is_folder else load_run(path)
    low_rank = lora_files.read_lora(_LORA.value, cfg.model) if _LORA.value else None
    height, width = codec.size_px
    given = [read_given(g, height, width, _GIVEN_FRAMES.value, _SEED.value) for g in _GIVEN.value]
    frames = plan_frames(asked, given, _FRAMES.value or cfg.data.layouts[0][0])
    guidance = [float(g) for g in _GUIDANCE.value or [cfg.sample.guidance]]
    settings = {
        'seed': _SEED.value,
        'sampler': _SAMPLER.value or cfg.sample.sampler,
        'steps': _STEPS.value or cfg.sample.steps,
        'guidance': guidance[0] if len(guidance) == 1 else guidance,
    }
    clips = np.concatenate(given)[None] if given else None
    logging.info(
        'Sampling %d video(s) of %s frames from %s.',
        _NUM_VIDEOS.value,
        '+'.join(map(str, frames)),
        path,
    )
    # One network in memory at a time: text encoder and VAE in here, the transformer, then the VAE
    # again.
    inputs = pipeline.encode_inputs(codec, [captions], frames, clips, _NEGATIVE.value)
    path, params = load_params()
    if _LORA.value:
        params = lora.merge_placed(params, *low_rank)
    latents = np.concatenate(
        [
            pipeline.sample_latents(cfg, params, inputs, first_index=i, **settings)
            for i in tqdm.trange(_NUM_VIDEOS.value, desc='sampling', unit='video')
        ]
    )
    del params
    videos = codec.decode_video(latents, inputs.latent_frames)
    record = {
        'scenes': [{'caption': c, 'frames': f} for c, f in zip(captions, frames)],
        'checkpoint': str(path),
        'lora': _LORA.value,
        'given': [
            {'file': g, 'sha256': hashlib.sha256(pathlib.Path(g).read_bytes()).hexdigest()}
            for g in _GIVEN.value
        ],
        'given_frames': _GIVEN_FRAMES.value,
        'num_videos': _NUM_VIDEOS.value,
        'negative_prompt': _NEGATIVE.value,
        **settings,
        'model': dataclasses.asdict(cfg.model),
        'jax': jax.__version__,
    }
    if is_folder:
        record |= {n: flag.value for n, flag in chosen.items()} | {'height': height, 'width': width}
    out = pathlib.Path(_OUT.value)
    write_outputs(out, videos, captions, frames, len(given), cfg.data.fps, record)
    print(
        f'Wrote {_NUM_VIDEOS.value} video(s) to {out}: video_*.mp4, video_*.gif, sheet_*.png, story.json.'
    )


if __name__ == '__main__':
    app.run(main)
