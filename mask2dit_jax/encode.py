"""Videos and captions to a data set for training: everything that the frozen networks compute,
computed once.

  python -m mask2dit_jax.encode --manifest=clips.csv --checkpoint=CogVideoX-5b --out=data/clips
  python -m mask2dit_jax.encode --manifest=stories.json --checkpoint=CogVideoX-5b --out=data/stories --frames=49
  python -m mask2dit_jax.encode --manifest=stories.json --store=frames --height=240 --width=360 --out=data/frames

A manifest is the reference's CSV of single clips (columns caption and path; for pretraining), its
JSON of stories (a list of {"values": [{"url": ..., "caption": ...}, ...]}; for SFT), or {"stories":
[{"scenes": [{"video": ..., "caption": ..., "frames": 49}, ...]}]}, where every scene may have its own length. What the files themselves say counts, not the
manifest.

From each video a clip of --frames is cut and cropped as the reference does, but scaled until it
fills the frame: no black bars. The data set holds the VAE's posterior (mean and log-variance, from
which training draws anew every epoch) and the text encoder's states, in bfloat16. It is written in
parts: the same command goes on after a kill, and the hosts of a slice, or --worker=0...N-1 of
--num_workers=N, share the parts. Every clip that is left out, and every oddity of one that is not,
is counted and listed in report.md. The last to finish completes the data set.
"""

import pathlib
import time

import jax
from absl import app, flags

from mask2dit_jax import logs
from mask2dit_jax.data import precompute
from mask2dit_jax.data import records as records_lib
from mask2dit_jax.pretrained import config_json


def _job() -> precompute.Job:
    """From the flags; sizes default to those that the model was trained with."""
    folder, sizes = _CHECKPOINT.value, (_HEIGHT.value, _WIDTH.value)
    if (_STORE.value == 'moments') != bool(folder):
        raise app.UsageError(
            '--checkpoint, a model folder, goes with --store=moments and only with it.'
        )
    if None in sizes:
        if not folder or sizes != (None, None):
            raise app.UsageError('Give both --height and --width.')
        model = config_json.read_config('transformer', pathlib.Path(folder) / 'transformer')
        factor = config_json.read_config('vae', pathlib.Path(folder) / 'vae').spatial_factor
        sizes = model.sample_height * factor, model.sample_width * factor
    return precompute.Job(
        manifest=_MANIFEST.value,
        root=_ROOT.value,
        folder=folder,
        frames=_FRAMES.value,
        height_px=sizes[0],
        width_px=sizes[1],
        stride=_STRIDE.value,
        windows=_WINDOWS.value,
        seed=_SEED.value,
        store=_STORE.value,
        tiling=_TILING.value,
        dtype=_DTYPE.value,
        part_clips=_PART.value,
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    if (_WORKER.value is None) != (_NUM_WORKERS.value is None):
        raise app.UsageError('Give both --worker and --num_workers, or neither.')
    logs.quiet_libraries()
    job, started = _job(), time.monotonic()
    worker, count = (
        (jax.process_index(), jax.process_count())
        if _WORKER.value is None
        else (_WORKER.value, _NUM_WORKERS.value)
    )
    if worker >= count:
        raise app.UsageError(f'--worker={worker} must be below --num_workers={count}.')
    if precompute.precompute(job, _OUT.value, worker, count, _THREADS.value):
        records, text = (
            records_lib.Records(_OUT.value),
            (pathlib.Path(_OUT.value) / 'report.md').read_text().splitlines(),
        )
        print(f'{_OUT.value}: {text[2]} {time.monotonic() - started:.1f} s. See report.md there.')
        if not len(records):
            raise ValueError(f'{_OUT.value} is empty: see report.md there.')


if __name__ == '__main__':
    _MANIFEST = flags.DEFINE_string(
        'manifest', None, 'CSV of clips or JSON of stories.', required=True
    )
    _ROOT = flags.DEFINE_string(
        'root', None, "Folder that the manifest's files are relative to; default: its own."
    )
    _CHECKPOINT = flags.DEFINE_string(
        'checkpoint',
        None,
        'Model folder, released or converted, whose VAE and text encoder are used.',
    )
    _OUT = flags.DEFINE_string(
        'out', None, 'Folder of the data set; a part of one is gone on with.', required=True
    )
    _FRAMES = flags.DEFINE_integer(
        'frames', 49, 'Frames of a clip, where the manifest does not say.', lower_bound=1
    )
    _HEIGHT = flags.DEFINE_integer(
        'height', None, 'Pixels; default: what the model was trained with.', lower_bound=8
    )
    _WIDTH = flags.DEFINE_integer('width', None, 'As --height.', lower_bound=8)
    _STRIDE = flags.DEFINE_integer(
        'stride', 3, 'Every so many-th frame is taken; of stories, at most.', lower_bound=1
    )
    _WINDOWS = flags.DEFINE_integer(
        'windows', 1, 'Clips cut of every video, from other starts.', lower_bound=1
    )
    _SEED = flags.DEFINE_integer('seed', 0, 'Of the starts.')
    _STORE = flags.DEFINE_enum(
        'store',
        'moments',
        records_lib.STORES,
        'What is written: moments of the VAE and text states, or frames.',
    )
    _TILING = flags.DEFINE_bool(
        'tiling', False, 'Run the VAE in overlapping tiles, for less memory.'
    )
    _DTYPE = flags.DEFINE_enum(
        'dtype',
        'bfloat16',
        ('bfloat16', 'float32'),
        'Of the text encoder; the VAE computes in float32.',
    )
    _PART = flags.DEFINE_integer(
        'part_clips',
        64,
        'Clips in a file: what a kill may cost, and what hosts share.',
        lower_bound=1,
    )
    _WORKER = flags.DEFINE_integer(
        'worker',
        None,
        'Share of this process; default: that of its host in the slice.',
        lower_bound=0,
    )
    _NUM_WORKERS = flags.DEFINE_integer('num_workers', None, 'Number of shares.', lower_bound=1)
    _THREADS = flags.DEFINE_integer('threads', 4, 'Videos read at the same time.', lower_bound=1)
    app.run(main)
