"""Eight fake CPU devices for every test; flags parsed, since grain's workers read them."""
import jax
from absl import flags

jax.config.update('jax_num_cpu_devices', 8)
flags.FLAGS.mark_as_parsed()
