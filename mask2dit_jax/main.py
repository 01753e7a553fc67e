"""Trains, samples and scores: python -m mask2dit_jax.main --config=configs/tiny.py --workdir=runs/tiny"""
import jax
from absl import app, flags
from ml_collections import config_flags

from mask2dit_jax import config as config_lib
from mask2dit_jax import convert, metric_writer, train

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Configuration file, with a variant after a colon: configs/tiny.py:isolated. Single values are '
    'overridden by --config.train.steps=2000 and the like.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, sheets, scores. A run that '
                               'stopped is resumed by the same command.')
_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Model folder, released or converted, to fine-tune: transformer, '
                                  'schedule, VAE and text encoder come from there.')
flags.mark_flags_as_required(['config', 'workdir'])


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    config = config_lib.parse(_CONFIG.value)
    if _CHECKPOINT.value:
        config = convert.adopt(config, _CHECKPOINT.value)
    metric_writer.quiet_libraries()
    jax.config.update('jax_num_cpu_devices', config.mesh.cpu_devices)
    train.train_and_evaluate(config, _WORKDIR.value)


if __name__ == '__main__':
    app.run(main)
