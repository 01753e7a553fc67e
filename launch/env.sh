# Environment of a run on TPU: compile cache, and XLA's flags by generation of chips. Source it before Python starts:
#   TPU_GENERATION=v5p source launch/env.sh
# libtpu reads LIBTPU_INIT_ARGS once and refuses flags that it does not know; tests/launch_test.py shows these to it,
# with libtpu 0.0.42.1, 0.0.48.1 and 0.0.50.1 so far.
# None of them has been timed on a TPU by us: compare a --trace_step trace with and without.
# shellcheck shell=bash

# Compiled programs, by a hash of program, flags and versions: a restart skips minutes of compiling. A folder or gs://.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/mask2dit_jax}"

flags=(
  # Parameters are gathered axis by axis in every layer: start these gathers early, and let matmuls run meanwhile.
  --xla_enable_async_all_gather=true
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  # Several slices: the sum of gradients over the data-centre network runs beside the backward pass.
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)
case "${TPU_GENERATION:?set it to v4, v5e, v5p or v6e}" in
  v4 | v5p)
    # Two cores share a chip: a gather inside a fusion would hold up both.
    flags+=(--xla_tpu_megacore_fusion_allow_ags=false)
    ;;
  v6e)
    # 128 MiB of vector memory, of which fusions may use 16 by default; larger tiles feed the larger matrix units.
    flags+=(--xla_tpu_scoped_vmem_limit_kib=65536)
    ;;
  v5e)
    # A gather that is fused with the work of several steps. libtpu 0.0.50 refuses it elsewhere, and warns of wrong
    # results: so it is left out there whatever the version.
    flags+=(--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true)
    ;;
  *)
    echo "launch/env.sh: unknown TPU_GENERATION=$TPU_GENERATION: use v4, v5e, v5p or v6e." >&2
    return 1
    ;;
esac
export LIBTPU_INIT_ARGS="${flags[*]} ${LIBTPU_INIT_ARGS:-}"
unset flags
