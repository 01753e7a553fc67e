"""Trains a multi-scene model, draws sample sheets, and scores it on held-out stories.

  python -m mask2dit_jax.main --config=configs/tiny.py --workdir=runs/tiny
  python -m mask2dit_jax.main --config=configs/tiny.py:isolated --config.train.steps=2000 --workdir=runs/isolated
  python -m mask2dit_jax.main --config=configs/tiny.py:conditional --config.init_from=runs/tiny --workdir=runs/more
  python -m mask2dit_jax.main --config=configs/sft.py:5b --checkpoint=CogVideoX-5b --workdir=runs/5b \
    --config.data.encoded=data/stories

It trains on config.data.encoded, a data set of mask2dit_jax.encode, or on stories, which are rendered on first use into
<workdir>/../data. The same command goes on with a run that was stopped; one that is finished is scored again. In the
workdir: config.json, metrics.jsonl (loss, grad_norm, steps per second),
sheets/ (stories generated and extended, every config.train.sample_every_steps), checkpoints/ (parameters, their moving
average, optimizer), and at the end scores.md and scores.json.

Sections of the configuration, every value of which is a flag --config.SECTION.NAME=VALUE: model (architecture, mask
pattern, attention backend, dtype), schedule (noise), data (scenes, sizes), optimizer, train (steps, batch size, caption
dropout, given scenes), sample (sampler, steps, guidance), eval, mesh (devices: data x fsdp x context x tensor).
mask2dit_jax/config.py documents each. Compiled programs are kept for the next start where JAX_COMPILATION_CACHE_DIR
names a folder; XLA flags for TPU are in launch/env.sh.
"""
import jax
from absl import app, flags
from ml_collections import config_flags

from mask2dit_jax import config as config_lib
from mask2dit_jax import convert, data, metric_writer, train

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Configuration file, with a variant after a colon: configs/tiny.py:isolated. Single values are '
    'overridden by --config.train.steps=2000 and the like.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, sheets, scores. A run that '
                               'stopped is resumed by the same command.')
_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'What to start from: a model folder, released or converted, with '
                                  'its transformer, schedule, VAE and text encoder, or the workdir of another run, '
                                  'with its EMA.')
_TRACE_STEP = flags.DEFINE_integer('trace_step', None, f'Record {train.TRACED_STEPS} steps from this one with '
                                   'jax.profiler, to <workdir>/trace (for TensorBoard or Perfetto).', lower_bound=0)
flags.mark_flags_as_required(['config', 'workdir'])


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    config = config_lib.parse(_CONFIG.value)
    if _CHECKPOINT.value:
        config = convert.adopt(config, _CHECKPOINT.value)
    if config.data.encoded:
        config = data.adopt(config)
    metric_writer.quiet_libraries()
    jax.config.update('jax_num_cpu_devices', config.mesh.cpu_devices)
    train.train_and_evaluate(config, _WORKDIR.value, _TRACE_STEP.value)


if __name__ == '__main__':
    app.run(main)
