"""Eight fake CPU devices for every test; flags parsed, since grain's workers read them."""
import os

import jax
from absl import flags

jax.config.update('jax_num_cpu_devices', 8)
# Tests compile far longer than they run. The program stays the same; only LLVM's work on it goes, five times faster.
jax.config.update('jax_disable_most_optimizations', True)
if jax.__version_info__ < (0, 11):  # later ones have nothing else, and end the process at a flag they do not know
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_use_fusion_emitters=false'
flags.FLAGS.mark_as_parsed()
