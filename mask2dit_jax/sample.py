"""Captions in, one multi-scene video out; given clips are extended.

Required: --workdir or --checkpoint, and --prompt (once for each scene); or --story with a
story.json that `sample` wrote.

  python -m mask2dit_jax.sample --workdir=runs/tiny --prompt="red ring on gray moves left" \
    --prompt="it grows"
  python -m mask2dit_jax.sample --workdir=runs/tiny --story=story.json --num_videos=4
  python -m mask2dit_jax.sample --workdir=runs/tiny --given=a.mp4 --given=b.mp4 --prompt=A \
    --prompt=B --prompt=NEW
  python -m mask2dit_jax.sample --workdir=runs/tiny --story=long.json --window=2 --sinks=1
  python -m mask2dit_jax.sample --extend=samples --prompt=NEW --prompt=NEWER --out=longer
  python -m mask2dit_jax.sample --checkpoint=CogVideoX-5b --prompt=A --prompt=B --height=480 \
    --width=720 --frames=49
  python -m mask2dit_jax.sample --checkpoint=CogVideoX-5b \
    --lora=pytorch_lora_weights.safetensors --prompt=A --prompt=B

A story file is {"scenes": [{"caption": "red ring on gray moves left", "frames": 8}, {"caption":
"it grows"}]}; "seconds" may take the place of "frames". It may set what the flags set, too. The
story.json in --out sets everything: with --story it makes the same videos again, to the byte on the
same machine, and flags replace single values of it. Two other forms are read: a .txt file with
"red ring on gray moves left [5s] | it grows [10s]", and the JSON of ST-Bench and EntityBench, of
which every prompt becomes a scene.

--out belongs to one story. In it are

  story.json                     the story and its settings
  video_0.mp4, video_0.gif       the first video
  sheet_0.png                    its scenes as rows of frames, with their captions
  video_0/scene_0.mp4, ...       each of its scenes as a clip
  video_0/latents.safetensors    what it was decoded from; --given takes it (or its folder) and
                                 extends the video without another way through mp4 and the VAE

and as much of every other video, which is written as soon as it is done. From Python,
mask2dit_jax.load does the same.

A story of more scenes than the model was trained on is told: the first --joint scenes are generated
together, and then one after another, each from the --window scenes right before it and, on top of
these, the first --sinks scenes of the story, with their captions. Every scene is written when it is
done. --extend=FOLDER goes on with the videos of a folder that sample wrote, from their latents, to
the same videos as if the longer story had been told in one go.

After a kill the same command goes on with the scenes that are not there, to the same bits. Ctrl-C
stops after the present scene, a second one at once.
"""

import concurrent.futures
import math
import os
import pathlib
import signal
import sys
import threading

import jax
from absl import app, flags, logging

from mask2dit_jax import config as config_lib
from mask2dit_jax import logs, paths, pipeline, ranges, storage
from mask2dit_jax.data import samples, story_file
from mask2dit_jax.data import video as video_lib
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
    'story',
    None,
    'JSON file with scenes of caption and frames, and with other settings that no flag gives; or '
    'a .txt file, or the JSON of ST-Bench or EntityBench; instead of --prompt.',
)
_GIVEN = flags.DEFINE_multi_string(
    'given',
    [],
    'Video of a leading scene that is given, or latents.safetensors (or its folder) with several; '
    'repeat it in story order.',
)
_EXTEND = flags.DEFINE_string(
    'extend',
    None,
    'Folder that sample wrote, whose videos are told on, with all its settings: --prompt gives the '
    'new scenes, or --story all scenes. --out is another folder.',
)
_JOINT = flags.DEFINE_integer(
    'joint',
    None,
    'Scenes at the beginning of a story that are generated together; later ones are generated one '
    'after another. Default: as many as the model was trained on, 3 for model folders, 1 after '
    'teacher forcing.',
    lower_bound=1,
)
_WINDOW = flags.DEFINE_integer(
    'window',
    None,
    'Scenes right before a later one that are given to it. Default: as many as the model was '
    'trained on, without the new one and --sinks.',
    lower_bound=1,
)
_SINKS = flags.DEFINE_integer(
    'sinks',
    None,
    'Scenes at the beginning of the story that are given to every later one, on top of --window. '
    'Default: 1, or 0 if the model was trained on fewer than three scenes.',
    lower_bound=0,
)
_GIVEN_FRAMES = flags.DEFINE_integer(
    'given_frames',
    None,
    'Number of frames to cut from every given video, as encode cuts the scenes of stories; --seed '
    'draws where they start. Default: all frames.',
    lower_bound=1,
)
_SEED = flags.DEFINE_integer(
    'seed',
    None,
    'Seed of the noise; the same seed gives the same video. Default: 0.',
    lower_bound=0,
)
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
_LAG = flags.DEFINE_integer(
    'lag',
    None,
    'Steps that each scene begins after the scene before it, of scenes that are generated '
    'together; for models that were trained by diffusion forcing. Default: the configuration of '
    'the run, or 0, or as many as --steps after teacher forcing.',
    lower_bound=0,
)
_CONTEXT = flags.DEFINE_enum(
    'context',
    None,
    config_lib.CONTEXTS,
    'How a later scene sees the given ones, of a model with the pattern causal: computed anew, or '
    'carried on as they were computed when each was made, which still tells of scenes that have '
    'left the window. Default: the configuration of the run, or anew.',
)
_GIVEN_TIMESTEP = flags.DEFINE_integer(
    'given_timestep',
    None,
    'Timestep of given scenes, with its noise, for models that were trained with '
    'given_max_timestep. Default: the configuration of the run, or 0, which leaves them clean.',
    lower_bound=0,
)
_CAPTIONS_OF_GIVEN = flags.DEFINE_bool(
    'captions_of_given',
    None,
    'Keep the captions of given scenes in the negative half of guidance, too. Default: the '
    'configuration of the run, or not.',
)
_GLOBAL = flags.DEFINE_string(
    'global_prompt',
    None,
    'What is true of all scenes, who and where for instance: put before the caption of each.',
)
_NEGATIVE = flags.DEFINE_string(
    'negative_prompt', None, 'Caption that guidance leads away from, in every scene; default: none.'
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
    None,
    ('bfloat16', 'float32'),
    'Number format in which the transformer and the text encoder of a model folder are held and '
    'computed, by default bfloat16; the VAE always computes in float32.',
)
_TILING = flags.DEFINE_bool(
    'tiling', None, 'Run the VAE of a model folder in overlapping tiles, for less memory.'
)
_DECODE_RULE = flags.DEFINE_enum(
    'decode_rule',
    None,
    vae.DECODE_RULES,
    'How the VAE of a model folder batches frames: as Mask²DiT does (reference, the default), or '
    'as stock diffusers.',
)
_MASK_PADDING = flags.DEFINE_bool(
    'mask_padding',
    None,
    'Hide padding from the text encoder of a model folder; the reference does not.',
)
_FOLDER_FLAGS = 'height', 'width', 'dtype', 'tiling', 'decode_rule', 'mask_padding'
_NUM_VIDEOS = flags.DEFINE_integer(
    'num_videos',
    None,
    'Number of videos of this story, each from noise of its own. Default: 1.',
    lower_bound=1,
)
_MESH = flags.DEFINE_list(
    'mesh',
    None,
    'FSDP,CONTEXT: the number of devices over which the parameters and the halves of guidance are '
    'spread, and the number over which tokens are. CONTEXT must divide the heads and the tokens; '
    'the devices that the product leaves over stay idle. Default on accelerators: 2 and the most '
    'that divide.',
)
_OUT = flags.DEFINE_string(
    'out', 'samples', 'Folder for the videos and story.json; it belongs to one story.'
)
_OVERWRITE = flags.DEFINE_bool(
    'overwrite', False, 'Delete the samples of another story that --out holds.'
)

paths.check_flags_local('workdir', 'checkpoint', 'lora', 'story', 'given', 'extend', 'out')

# Flags that go with --extend: all other settings are those of its story.json.
_WITH_EXTEND = ('extend', 'prompt', 'story', 'frames', 'workdir', 'checkpoint', 'mesh', 'out')
ranges.check_flag('seed', config_lib.Config, 'seed')
ranges.check_flag('steps', config_lib.SampleConfig, 'steps')
ranges.check_flag('guidance', config_lib.SampleConfig, 'guidance')
ranges.check_flag('lag', config_lib.SampleConfig, 'lag')
ranges.check_flag('mesh', mesh_lib.MeshConfig, 'fsdp')


def _chosen(flag, record: dict, default=None):
    """The value of a flag, else that of the story file, else the default."""
    if flag.value not in (None, []):
        return flag.value
    return record.get(flag.name, default)


def _mesh(record: dict) -> jax.sharding.Mesh | None:
    """The mesh that --mesh asks for, or the one of the story file where the devices allow it."""
    axes = _MESH.value
    if axes and (len(axes) != 2 or not all(size.isdigit() for size in axes)):
        raise app.UsageError(f'--mesh needs two numbers, FSDP,CONTEXT, got {",".join(axes)}.')
    recorded = record.get('mesh')
    if not axes and recorded and math.prod(recorded) == jax.device_count():
        axes = recorded
    return pipeline.default_mesh(tuple(map(int, axes))) if axes else None


def _read_story() -> dict:
    """The settings of --story, or none but the scenes of --prompt."""
    if bool(_PROMPT.value) == bool(_STORY.value):
        raise app.UsageError('Give the captions either by --prompt, repeated, or by --story.')
    record = {'scenes': [{'caption': caption} for caption in _PROMPT.value]}
    if _STORY.value:
        record = story_file.read_record(_STORY.value)
    if _EXTEND.value:
        record = _extended(record)
    if 'weights' in record and 'joint' not in record:
        # Of a version that generated all scenes together.
        record |= {'joint': len(record['scenes'])}
    return record


def _extended(story: dict) -> dict:
    """The story of --extend, with the scenes that are to come.

    Raises:
      UsageError: if a flag contradicts it.
      ValueError: if the folder has no story, or --story is another one.
    """
    names = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])]
    for name in names:
        flag = flags.FLAGS[name]
        if name not in (*_WITH_EXTEND, 'overwrite') and flag.value not in (None, []):
            raise app.UsageError(
                f'--extend keeps the settings of its folder, so --{name} cannot be given: to '
                f'change them, start from --given={_EXTEND.value}/video_0 instead.'
            )
    if pathlib.Path(_EXTEND.value).resolve() == pathlib.Path(_OUT.value).resolve():
        raise app.UsageError('--out must be another folder than --extend, which stays as it is.')

    made = story_file.read_record(pathlib.Path(_EXTEND.value) / samples.STORY)
    if 'weights' not in made:
        raise ValueError(
            f'{_EXTEND.value} was not written by sample: --extend needs the story.json and the '
            'latents of its folder.'
        )
    made = {'joint': len(made['scenes'])} | made
    if _PROMPT.value:
        return made | {'scenes': made['scenes'] + story['scenes']}

    # Of --story all scenes, which begin with those that are made.
    differences = samples.compare(
        {key: made.get(key) for key in story}, story, ['scenes', 'num_videos']
    )
    told = [scene['caption'] for scene in story['scenes']]
    known = [scene['caption'] for scene in made['scenes']]
    if told[: len(known)] != known or len(told) <= len(known):
        differences.append(f'it does not begin with the {len(known)} scenes of the folder')
    if differences:
        raise ValueError(
            f'{_STORY.value} does not go on with {_EXTEND.value}: {"; ".join(differences)}.'
        )
    return made | {'scenes': made['scenes'] + story['scenes'][len(known) :]}


def _model_path(record: dict) -> pathlib.Path:
    """What the model is loaded from.

    Of the workdir that the story was made from it is the same checkpoint, however many have come
    since.
    """
    recorded = record.get('checkpoint')
    chosen = [bool(flag.value) for flag in (_CHECKPOINT, _WORKDIR)]
    if all(chosen) or not (any(chosen) or recorded):
        raise app.UsageError('Give either --workdir or --checkpoint.')
    if _CHECKPOINT.value:
        return pathlib.Path(_CHECKPOINT.value)
    if _WORKDIR.value:
        if recorded and _is_checkpoint_of(recorded, _WORKDIR.value):
            logging.info('Using %s, from which the story was made.', recorded)
            return pathlib.Path(recorded)
        return pathlib.Path(_WORKDIR.value)
    if not pathlib.Path(recorded).is_dir():
        raise FileNotFoundError(
            f'{recorded}, from which {_STORY.value} was made, is gone: give another model by '
            '--workdir or --checkpoint.'
        )
    return pathlib.Path(recorded)


def _is_checkpoint_of(path, workdir) -> bool:
    """Whether it is a checkpoint of this workdir, and still there."""
    path = pathlib.Path(path)
    workdir = pathlib.Path(workdir)
    return (path / 'ema').is_dir() and path.parent.parent.resolve() == workdir.resolve()


def _folder_settings(path: pathlib.Path, record: dict) -> dict:
    """The settings that are for model folders, if that is one.

    Raises:
      UsageError: if a flag of them is given for something else.
      FileNotFoundError: if --checkpoint is neither a checkpoint nor a model folder.
    """
    values = {name: flags.FLAGS[name].value for name in _FOLDER_FLAGS}
    if (path / 'transformer').is_dir():
        told = {name: record[name] for name in _FOLDER_FLAGS if name in record}
        return told | {name: value for name, value in values.items() if value is not None}
    if _CHECKPOINT.value and not (path / 'ema').is_dir():
        raise FileNotFoundError(
            f'{path} is neither a checkpoint of a workdir (with ema/) nor a model folder (with '
            'transformer/): check --checkpoint.'
        )
    useless = [f'--{name}' for name, value in values.items() if value is not None]
    if useless:
        raise app.UsageError(
            f'Only for model folders, and {path} is not one: {", ".join(useless)}.'
        )
    return {}


def _load(path: pathlib.Path, record: dict) -> pipeline.Model:
    return pipeline.load(
        path,
        mesh=_mesh(record),
        lora_file=_chosen(_LORA, record),
        keep_params=False,
        **_folder_settings(path, record),
    )


def _request(model: pipeline.Model, record: dict) -> pipeline.Request:
    """What is asked for by flags and story file."""
    captions = [scene['caption'] for scene in record['scenes']]
    fps = model.config.data.fps
    frames = story_file.lengths(record['scenes'], fps, model.codec.nearest_frames)
    if _FRAMES.value and all(frames):
        raise app.UsageError(
            f'--frames is for scenes without a length, and {_STORY.value} says the length of each.'
        )
    given = [item for item in _chosen(_GIVEN, record, []) if item]  # --given= gives none
    guidance = record.get('guidance')
    if _GUIDANCE.value:
        guidance = [float(g) for g in _GUIDANCE.value]
        guidance = guidance[0] if len(guidance) == 1 else guidance

    return model.request(
        [captions] * _chosen(_NUM_VIDEOS, record, 1),
        frames=[f or (_FRAMES.value if i >= len(given) else None) for i, f in enumerate(frames)],
        given=given,
        given_frames=_chosen(_GIVEN_FRAMES, record),
        seed=_chosen(_SEED, record, 0),
        first_index=record.get('first_index', 0),
        sampler=_chosen(_SAMPLER, record),
        steps=_chosen(_STEPS, record),
        guidance=guidance,
        lag=_chosen(_LAG, record),
        context=_chosen(_CONTEXT, record),
        given_timestep=_chosen(_GIVEN_TIMESTEP, record),
        captions_of_given=_chosen(_CAPTIONS_OF_GIVEN, record),
        global_caption=_chosen(_GLOBAL, record, ''),
        negative_caption=_chosen(_NEGATIVE, record, ''),
        joint=_chosen(_JOINT, record),
        window=_chosen(_WINDOW, record),
        sinks=_chosen(_SINKS, record),
    )


def _prepare(path: pathlib.Path, record: dict) -> tuple[pipeline.Model, pipeline.Request]:
    """The model and what it is asked for, if --out may get it.

    If a killed command has left a part of the same videos in --out, its checkpoint is used, even if
    the workdir has a newer one by now.
    """
    model = _load(path, record)
    request = _request(model, record)
    if not _OVERWRITE.value:
        samples.check(_OUT.value, request.record, but=samples.UNCERTAIN)

    begun = samples.begun_from(_OUT.value, request.record)
    is_workdir = not _CHECKPOINT.value and path == pathlib.Path(_WORKDIR.value or '')
    if begun and is_workdir and _is_checkpoint_of(begun, path):
        model = _load(pathlib.Path(begun), record)
        request = _request(model, record)
    return model, request


def _tell_differences(story: dict, made: dict) -> None:
    """Says why the videos will not be those of the story file, if they will not."""
    told = {key: story[key] for key in story if key in made and key not in ('scenes', 'given')}
    differences = samples.compare(told, {key: made[key] for key in told}, ['num_videos'])
    sums = [[entry.get('sha256') for entry in r.get('given', [])] for r in (story, made)]
    if 'given' in story and sums[0] != sums[1]:
        differences.append('other given scenes')
    if differences:
        logging.warning(
            'The videos will not be byte for byte those of %s: %s.',
            _STORY.value,
            '; '.join(differences),
        )


def _sample(stop: threading.Event) -> tuple[int, int]:
    """Samples into --out until all is there, or until `stop` is set.

    Returns:
      The number of videos that were made, and the number that are still to be made.
    """
    record = _read_story()
    path = _model_path(record)
    storage.try_output(_OUT.value)
    with storage.claim(_OUT.value) as hold:
        model, request = _prepare(path, record)
        if samples.is_done(_OUT.value, request.record):
            return 0, 0
        made = _made(model, record)

        request = model.start(request)
        if _EXTEND.value and request.record['weights'] != record['weights']:
            raise ValueError(
                f'{_EXTEND.value} was made by another model ({record["checkpoint"]}) than '
                f'{request.record["checkpoint"]}: give that one, or start from '
                f'--given={_EXTEND.value}/video_0.'
            )
        if _STORY.value and not _EXTEND.value:
            _tell_differences(record, request.record)
        hold.check()
        indices = samples.begin(_OUT.value, request.record, _OVERWRITE.value)
        if stop.is_set() or not indices:
            return 0, len(indices)

        for count, index in enumerate(indices):
            there = _told(model, index)
            told = max(there, made.get(index, []), key=len)
            is_last = index == indices[-1]
            if not _tell(model, request, index, told, len(there), is_last, hold, stop):
                return count, len(indices) - count
            if stop.is_set():
                return count + 1, len(indices) - count - 1
        return len(indices), 0


def _made(model: pipeline.Model, record: dict) -> dict[int, list]:
    """Latents [T, h, w, C] of the scenes of each video of --extend.

    Raises:
      FileNotFoundError, ValueError: naming the video that lacks them.
    """
    if not _EXTEND.value:
        return {}
    made = {}
    for index in range(record['num_videos']):
        path = samples.latents_path(_EXTEND.value, index)
        if not path.is_file():
            raise FileNotFoundError(
                f'{path} is not there: let sample finish {_EXTEND.value}, or, if an earlier '
                f'version wrote it, extend its video by --given={_EXTEND.value}/video_{index}.mp4.'
            )
        made[index] = model.read_latents(path)
    return made


def _told(model: pipeline.Model, index: int) -> list:
    """Latents of the scenes of a video that a killed command has left in --out."""
    path = samples.latents_path(_OUT.value, index)
    return model.read_latents(path) if path.is_file() else []


def _tell(
    model: pipeline.Model,
    request: pipeline.Request,
    index: int,
    told: list,
    num_there: int,
    is_last: bool,
    hold: storage.Claim,
    stop: threading.Event,
) -> bool:
    """Makes and writes one video, scene by scene.

    Args:
      model, request: what is made.
      index: of the video.
      told: latents of its scenes that are generated already.
      num_there: how many of these --out has.
      is_last: whether no other video follows.
      hold: the claim on --out.
      stop: set by Ctrl-C.

    Returns:
      Whether the video is whole.
    """
    scenes = []  # uint8 [F, H, W, 3]
    latents = []
    stops = [block.stop for block in request.blocks[:-1]]
    told_scenes = model.scenes(request, index, told, keeps_params=not is_last)
    for scene in told_scenes:
        hold.check()
        scenes.append(video_lib.to_uint8(scene.pixels))
        latents.append(scene.latents)
        # Those of a killed command stay until there are more.
        if len(latents) > num_there:
            samples.write_latents(_OUT.value, index, model.latents_of(request, latents))
        samples.write_scene(_OUT.value, index, scene.number, scenes[-1], model.config.data.fps)
        # Scenes that were generated together are all written.
        if stop.is_set() and len(scenes) in stops:
            told_scenes.close()
            return False

    samples.write_whole(
        _OUT.value,
        index,
        scenes,
        request.stories[index],
        len(request.given),
        model.config.data.fps,
    )
    return True


def _stop_at_interrupt(stop: threading.Event) -> None:
    """Makes the first Ctrl-C set `stop`, and the second end the process."""

    def interrupt(number, frame):
        del number, frame
        if stop.is_set():
            os._exit(130)
        stop.set()
        os.write(2, b'\nStopping after the present scene; Ctrl-C again stops at once.\n')

    signal.signal(signal.SIGINT, interrupt)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    logs.quiet_libraries()

    # Signals come to the main thread, which only waits here. In the midst of XLA, a
    # KeyboardInterrupt is lost, becomes another error, or ends in a crash.
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    _stop_at_interrupt(stop)
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            made, left = pool.submit(_sample, stop).result()
    finally:
        if not stop.is_set():
            signal.signal(signal.SIGINT, before)

    if left:
        print(
            f'Stopped: {left} video(s) are not yet in {_OUT.value}; the same command goes on.',
            file=sys.stderr,
        )
        sys.exit(130)
    if not made:
        print(f'Nothing to do: all videos of this story are in {_OUT.value} already.')
        return
    print(
        f'Wrote {made} video(s) to {_OUT.value}: story.json, video_*.mp4, video_*.gif, '
        'sheet_*.png, and in video_*/ each scene and the latents.'
    )


if __name__ == '__main__':
    app.run(main)
