"""Trains a multi-scene model, draws sample grids, and scores it on held-out stories.

Required flags: --config, the configuration file, and --workdir, the folder of the run.

  python -m mask2dit_jax.main --config=configs/tiny.py --workdir=runs/tiny
  python -m mask2dit_jax.main --config=configs/tiny.py:isolated --workdir=runs/isolated \\
    --config.train.steps=2000
  python -m mask2dit_jax.main --config=configs/tiny.py:conditional --workdir=runs/more \\
    --config.init_from=runs/tiny
  python -m mask2dit_jax.main --config=configs/tiny.py:lora --workdir=runs/lora \\
    --config.init_from=runs/tiny
  python -m mask2dit_jax.main --config=configs/sft.py:5b --workdir=runs/5b \\
    --checkpoint=CogVideoX-5b --config.data.encoded=data/stories

Data: a data set that mask2dit_jax.encode wrote, if config.data.encoded names one. Otherwise it is
rendered stories, which are made at the first start in <workdir>/../data.

Resuming: the same command continues a run that was stopped; a run that is finished is scored again.
SIGTERM and Ctrl-C save a checkpoint after the present step, and the command exits with 0; a second
Ctrl-C stops at once. Before the first step and during the final scores, where there is nothing to
save, the first one does. The next start continues from the newest good checkpoint, and its results
are the same to the bit as without the stop. A damaged checkpoint is named in the log and renamed to
STEP.damaged, and the one before it is used. A workdir has one owner at a time: a second command on
it is refused as long as the first one lives.

Several processes: start the same command once per process, with a --process_id of its own. The
processes share the workdir, and each takes its part of every batch. On the hosts of a TPU slice
these three flags are not needed:

  python -m mask2dit_jax.main ... --coordinator=HOST:1234 --num_processes=2 --process_id=0

A process whose peer was killed, was stopped or hangs exits with an error within two minutes. Where
the peer may be compiling, saving, drawing or scoring, the limits of config.limits hold, and so they
do in a process that hangs itself: it prints where it stands and exits with 1.

The workdir then holds:
  config.json            the configuration
  metrics.jsonl          loss, grad_norm, steps_per_second, data_wait (share of the time that
                         training waited for data) and, on TPU, mfu
  tensorboard/           the same metrics, if tensorboardX is installed
  sheets/                sample grids of generated and extended stories
  checkpoints/           parameters, EMA and optimizer; with LoRA those of its tensors alone
  scores.md, scores.json the scores, at the end

Compiled programs are kept for the next start if JAX_COMPILATION_CACHE_DIR names a folder. XLA flags
for TPU are in launch/env.sh.
"""

import dataclasses
import math
import pathlib
import signal

import jax
from absl import app, flags

from mask2dit_jax import checkpoint, logs, paths
from mask2dit_jax import config as config_lib
from mask2dit_jax.data import encoded_clips
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import multihost
from mask2dit_jax.pretrained import load as load_lib
from mask2dit_jax.training import trainer

# --help shows the module's docstring.
__doc__ = f'{__doc__}\n{config_lib.describe()}'

_CONFIG = config_lib.define_flag(
    'Configuration file, with a variant after a colon: configs/tiny.py:isolated. Flags such as '
    '--config.train.steps=2000 override single values.'
)
_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'Folder of the run: checkpoints, metrics, sample grids, scores. The same command resumes a run '
    'that was stopped.',
)
_CHECKPOINT = flags.DEFINE_string(
    'checkpoint',
    None,
    'Where training starts: a model folder, released or converted, with its transformer, schedule, '
    'VAE and text encoder, or the workdir of another run, with its EMA.',
)
_TRACE_STEP = flags.DEFINE_integer(
    'trace_step',
    None,
    f'First of {trainer.TRACED_STEPS} steps that jax.profiler records, to <workdir>/trace (for '
    'TensorBoard or Perfetto).',
    lower_bound=0,
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator',
    None,
    'HOST:PORT of process 0, if several processes share the run. On TPU slices of several hosts '
    '--coordinator, --num_processes and --process_id are not needed.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes',
    None,
    'Number of processes that share the run; each is started by this command.',
    lower_bound=1,
)
_PROCESS_ID = flags.DEFINE_integer(
    'process_id', None, 'Number of this process, from 0.', lower_bound=0
)
flags.mark_flags_as_required(['config', 'workdir'])
paths.check_flags_local('workdir', 'checkpoint')


def _with_model_from(config: config_lib.Config, folder: str, workdir: str) -> config_lib.Config:
    """`config` with the model of --checkpoint, or of the run itself if that folder has moved away:
    a run that continues does not need it."""
    if not pathlib.Path(folder).exists() and checkpoint.folders(workdir):
        config = load_lib.with_model_from(config, workdir)
        return dataclasses.replace(config, init_from=folder)
    return load_lib.with_model_from(config, folder)


def main(argv):
    config = config_lib.parse(_CONFIG.value)
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    process_flags = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
    given = [flag.value is not None for flag in process_flags]
    if any(given) and not all(given):
        raise app.UsageError(
            '--coordinator, --num_processes and --process_id belong together: give all or none.'
        )
    if all(given) and _PROCESS_ID.value >= _NUM_PROCESSES.value:
        raise app.UsageError(
            f'--process_id={_PROCESS_ID.value} must be less than --num_processes='
            f'{_NUM_PROCESSES.value}.'
        )

    # Where nothing is to be saved, Ctrl-C ends the process at once, as SIGTERM does.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    # What is started from or trained on has a say in the sizes.
    if _CHECKPOINT.value:
        config = _with_model_from(config, _CHECKPOINT.value, _WORKDIR.value)
    if config.data.encoded:
        config = encoded_clips.with_data_from(config)

    # Before anything touches a device: JAX fixes their number at its first use.
    logs.quiet_libraries()
    jax.config.update('jax_num_cpu_devices', config.mesh.cpu_devices)
    num_devices = math.prod(getattr(config.mesh, axis) for axis in mesh_lib.AXES)
    multihost.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, num_devices)

    with multihost.ending_together():
        trainer.train_and_evaluate(config, _WORKDIR.value, _TRACE_STEP.value)


if __name__ == '__main__':
    app.run(main)
