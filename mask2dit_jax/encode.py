"""Encodes videos and captions into a data set for training.

Required flags: --manifest, the list of videos, and --out, the folder of the data set; --checkpoint,
a model folder, too, unless --store=frames.

Everything that the frozen networks compute is computed once, here.

  python -m mask2dit_jax.encode --manifest=clips.csv --checkpoint=CogVideoX-5b --out=data/clips
  python -m mask2dit_jax.encode --manifest=stories.json --checkpoint=CogVideoX-5b \\
    --out=data/stories --frames=49
  python -m mask2dit_jax.encode --manifest=stories.json --store=frames --height=240 --width=360 \\
    --out=data/frames

The manifest is one of three files:

* the reference's CSV of single clips, with the columns caption and path, for pretraining;
* the reference's JSON of stories, for fine-tuning: a list of
  {"values": [{"url": ..., "caption": ...}, ...]};
* a JSON {"stories": [{"scenes": [{"video": ..., "caption": ..., "frames": 49}, ...]}]}, where every
  scene may have its own length.

Where the manifest and a video file disagree about the file, the file decides.

From each video a clip of --frames frames is cut and cropped. The cut is the reference's, but the
clip is scaled until it fills the frame, so that there are no black bars. The data set holds the
VAE's posterior (mean and log-variance, from which training draws latents anew every epoch) and the
states of the text encoder, both in bfloat16.

The data set is written in parts. After a kill the same command continues with the parts that are
missing, and looks again at the clips that were left out: a video that is there now, or was mended,
gets its place in the data set. Other settings than those that a data set was begun with are
refused. The hosts of a TPU slice share the parts; so do several processes that are started with
--num_workers=N and --worker=0 to N-1. The last process to finish completes the data set. report.md
in the data set counts and lists every clip that was left out, and everything unusual about the
others.
"""

import pathlib
import time

import jax
from absl import app, flags

from mask2dit_jax import config as config_lib
from mask2dit_jax import logs, paths, ranges
from mask2dit_jax.data import precompute
from mask2dit_jax.data import records as records_lib
from mask2dit_jax.pretrained import config_json


def _job() -> precompute.Job:
    """The job that the flags describe."""
    folder = _CHECKPOINT.value
    if (_STORE.value == 'moments') != bool(folder):
        raise app.UsageError(
            '--checkpoint, a model folder, goes with --store=moments and only with it.'
        )

    height_px, width_px = _HEIGHT.value, _WIDTH.value
    if folder and height_px is None and width_px is None:
        # The size that the model was trained with.
        model = config_json.read_config('transformer', pathlib.Path(folder) / 'transformer')
        factor = config_json.read_config('vae', pathlib.Path(folder) / 'vae').spatial_factor
        height_px = model.sample_height * factor
        width_px = model.sample_width * factor
    elif height_px is None or width_px is None:
        raise app.UsageError('Give both --height and --width.')

    return precompute.Job(
        manifest=_MANIFEST.value,
        root=_ROOT.value,
        folder=folder,
        frames=_FRAMES.value,
        height_px=height_px,
        width_px=width_px,
        stride=_STRIDE.value,
        windows=_WINDOWS.value,
        seed=_SEED.value,
        store=_STORE.value,
        tiling=_TILING.value,
        dtype=_DTYPE.value,
        part_clips=_PART.value,
    )


def _share() -> tuple[int, int]:
    """Number of this worker, and number of workers."""
    if (_WORKER.value is None) != (_NUM_WORKERS.value is None):
        raise app.UsageError('Give both --worker and --num_workers, or neither.')
    if _WORKER.value is None:
        return jax.process_index(), jax.process_count()
    if _WORKER.value >= _NUM_WORKERS.value:
        raise app.UsageError(
            f'--worker={_WORKER.value} must be below --num_workers={_NUM_WORKERS.value}.'
        )
    return _WORKER.value, _NUM_WORKERS.value


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    logs.quiet_libraries()
    started = time.monotonic()

    job = _job()
    worker, num_workers = _share()
    complete = precompute.precompute(job, _OUT.value, worker, num_workers, _THREADS.value)
    if not complete:
        return

    report = (pathlib.Path(_OUT.value) / 'report.md').read_text(encoding='utf-8')
    summary = report.splitlines()[2]
    seconds = time.monotonic() - started
    print(f'{_OUT.value}: {summary} {seconds:.1f} s. See report.md there.')
    records_lib.Records(_OUT.value)  # raises if it is empty


if __name__ == '__main__':
    _MANIFEST = flags.DEFINE_string(
        'manifest', None, 'The list of videos: a CSV of clips or a JSON of stories.', required=True
    )
    _ROOT = flags.DEFINE_string(
        'root',
        None,
        'The folder that the paths in the manifest are relative to. The default is the folder of '
        'the manifest.',
    )
    _CHECKPOINT = flags.DEFINE_string(
        'checkpoint',
        None,
        'A model folder, released or converted. Its VAE and its text encoder do the encoding.',
    )
    _OUT = flags.DEFINE_string(
        'out',
        None,
        'The folder of the data set. If it holds a part of the data set, the command continues '
        'from there.',
        required=True,
    )
    _FRAMES = flags.DEFINE_integer(
        'frames',
        49,
        'The number of frames of a clip. A number in the manifest has precedence.',
        lower_bound=1,
    )
    _HEIGHT = flags.DEFINE_integer(
        'height',
        None,
        'The height of the clips in pixels. The default is the height that the model was trained '
        'with.',
        lower_bound=8,
    )
    _WIDTH = flags.DEFINE_integer(
        'width',
        None,
        'The width of the clips in pixels. The default is the width that the model was trained '
        'with.',
        lower_bound=8,
    )
    _STRIDE = flags.DEFINE_integer(
        'stride',
        3,
        'The distance between neighbouring frames of a clip, in frames of the video. For the '
        'scenes of stories a smaller distance is used where the video is too short for this one.',
        lower_bound=1,
    )
    _WINDOWS = flags.DEFINE_integer(
        'windows',
        1,
        'The number of clips that are cut from every video, each from another random start.',
        lower_bound=1,
    )
    _SEED = flags.DEFINE_integer(
        'seed',
        0,
        'The seed of the random starts of the clips in their videos.',
        lower_bound=0,
    )
    _STORE = flags.DEFINE_enum(
        'store',
        'moments',
        records_lib.STORES,
        'What the data set holds: moments of the VAE and text states for training, or the frames '
        'themselves.',
    )
    _TILING = flags.DEFINE_bool(
        'tiling',
        False,
        'Run the VAE on overlapping tiles of the frames, which takes less memory and changes the '
        'result.',
    )
    _DTYPE = flags.DEFINE_enum(
        'dtype',
        'bfloat16',
        ('bfloat16', 'float32'),
        'The dtype in which the text encoder computes. The VAE always computes in float32.',
    )
    _PART = flags.DEFINE_integer(
        'part_clips',
        None,
        'The number of clips in a part. A kill costs at most the part in work, and hosts share '
        'whole parts. The default makes parts of about 2 GB, or smaller ones so that there are 64.',
        lower_bound=1,
    )
    _WORKER = flags.DEFINE_integer(
        'worker',
        None,
        'The number of this process among those that share the parts, from 0. The default is the '
        'number of the host in its slice.',
        lower_bound=0,
    )
    _NUM_WORKERS = flags.DEFINE_integer(
        'num_workers',
        None,
        'The number of processes that share the parts. The default is the number of hosts of the '
        'slice.',
        lower_bound=1,
    )
    _THREADS = flags.DEFINE_integer(
        'threads',
        4,
        'The number of videos that are read at the same time.',
        lower_bound=1,
    )
    paths.check_flags_local('manifest', 'root', 'checkpoint', 'out')
    ranges.check_flag('seed', config_lib.Config, 'seed')
    app.run(main)
