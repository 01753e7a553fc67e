"""Trains a multi-scene model, draws sample sheets, and scores it on held-out stories.

  python -m mask2dit_jax.main --config=configs/tiny.py --workdir=runs/tiny
  python -m mask2dit_jax.main --config=configs/tiny.py:isolated --config.train.steps=2000 --workdir=runs/isolated
  python -m mask2dit_jax.main --config=configs/tiny.py:conditional --config.init_from=runs/tiny --workdir=runs/more
  python -m mask2dit_jax.main --config=configs/tiny.py:lora --config.init_from=runs/tiny --workdir=runs/lora
  python -m mask2dit_jax.main --config=configs/sft.py:5b --checkpoint=CogVideoX-5b --workdir=runs/5b \
    --config.data.encoded=data/stories

The same command goes on with a run that was stopped; one that is finished is scored again. SIGTERM
saves after the step that runs and exits with 0. However a run ends, the next start continues from
the newest good checkpoint, to the very bits of a run that nothing stopped; a damaged one is named,
set aside as STEP.damaged, and the one before is taken.

  python -m mask2dit_jax.main ... --coordinator=HOST:1234 --num_processes=2 --process_id=0     # and 1, elsewhere

Several processes share the workdir and take their parts of every batch. On hosts of a TPU slice the
three flags are not needed. A process whose peer is killed, stopped or hung exits with an error
within two minutes, or later where that peer would compile or save: at its first steps, at sheets
and scores.

It trains on config.data.encoded, a data set of mask2dit_jax.encode, or on stories, which are
rendered on first use into <workdir>/../data. In the workdir: config.json, metrics.jsonl (loss,
grad_norm, steps_per_second; data_wait, the share of time spent waiting for data; on TPU mfu),
tensorboard/ (the same, if tensorboardX is installed), sheets/ (stories generated and extended,
every config.train.sample_every_steps), checkpoints/ (parameters, their moving average, optimizer;
with LoRA of its tensors alone), and at the end scores.md and scores.json.

Sections of the configuration, every value of which is a flag --config.SECTION.NAME=VALUE: model
(architecture, mask pattern, attention backend, dtype), schedule (noise), data (scenes, sizes),
optimizer, lora (low-rank fine-tuning), train (steps, batch size, caption dropout, given scenes),
sample (sampler, steps, guidance), eval, mesh (devices: data x fsdp x context x tensor).
mask2dit_jax/config.py documents each. Compiled programs are kept for the next start where
JAX_COMPILATION_CACHE_DIR names a folder; XLA flags for TPU are in launch/env.sh.
"""

import math

import jax
from absl import app, flags
from ml_collections import config_flags

from mask2dit_jax import config as config_lib
from mask2dit_jax import logs
from mask2dit_jax.data import clips
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import multihost
from mask2dit_jax.pretrained import load as load_lib
from mask2dit_jax.training import trainer

_CONFIG = config_flags.DEFINE_config_file(
    'config',
    None,
    'Configuration file, with a variant after a colon: configs/tiny.py:isolated. Single values are '
    'overridden by --config.train.steps=2000 and the like.',
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'Folder of the run: checkpoints, metrics, sheets, scores. A run that '
    'stopped is resumed by the same command.',
)
_CHECKPOINT = flags.DEFINE_string(
    'checkpoint',
    None,
    'What to start from: a model folder, released or converted, with '
    'its transformer, schedule, VAE and text encoder, or the workdir of another run, '
    'with its EMA.',
)
_TRACE_STEP = flags.DEFINE_integer(
    'trace_step',
    None,
    f'Record {trainer.TRACED_STEPS} steps from this one with '
    'jax.profiler, to <workdir>/trace (for TensorBoard or Perfetto).',
    lower_bound=0,
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator',
    None,
    'HOST:PORT of process 0, for several processes. On TPU slices '
    'of several hosts none of these three flags is needed.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes',
    None,
    'How many processes share the run, each started by this command.',
    lower_bound=1,
)
_PROCESS_ID = flags.DEFINE_integer(
    'process_id', None, 'Which of them this is, from 0.', lower_bound=0
)
flags.mark_flags_as_required(['config', 'workdir'])


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    given = [f.value is not None for f in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)]
    if any(given) and not all(given):
        raise app.UsageError(
            '--coordinator, --num_processes and --process_id belong together: give all or none.'
        )
    if all(given) and _PROCESS_ID.value >= _NUM_PROCESSES.value:
        raise app.UsageError(
            f'--process_id={_PROCESS_ID.value} must be less than --num_processes='
            f'{_NUM_PROCESSES.value}.'
        )
    config = config_lib.parse(_CONFIG.value)
    if _CHECKPOINT.value:
        config = load_lib.with_model_from(config, _CHECKPOINT.value)
    if config.data.encoded:
        config = clips.with_data_from(config)
    logs.quiet_libraries()
    jax.config.update('jax_num_cpu_devices', config.mesh.cpu_devices)
    devices = math.prod(getattr(config.mesh, axis) for axis in mesh_lib.AXES)
    multihost.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, devices)
    with multihost.ending_together():
        trainer.train_and_evaluate(config, _WORKDIR.value, _TRACE_STEP.value)


if __name__ == '__main__':
    app.run(main)
