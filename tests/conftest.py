"""Eight fake CPU devices for every test; flags parsed, since grain's workers read them."""
import jax
from absl import flags

jax.config.update('jax_num_cpu_devices', 8)
# The models are tiny: compiling takes far longer than running, and LLVM's optimizations do not change what is tested.
jax.config.update('jax_disable_most_optimizations', True)
flags.FLAGS.mark_as_parsed()
