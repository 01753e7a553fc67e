"""Schedules of the splash attention kernels, as the TPU compiler dumps them."""

import functools
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mask2dit_jax.aot import topology as topology_lib
from mask2dit_jax.attention import splash
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.layout import SceneLayout


class Bundles(NamedTuple):
    """Instruction bundles per head and block of queries and keys.

    Attributes:
      visible: bundles of a block that is wholly visible.
      masked: bundles of a block whose mask is evaluated.
    """

    visible: int
    masked: int


def kernel_bundles(
    topology: str, head_dim: int, kernel: str, block: int = 1024
) -> dict[str, Bundles]:
    """Compiles the splash kernels and counts the bundles of their schedules.

    Args:
      topology: e.g. 'v6e:2x2'; libtpu compiles for one of its chips.
      head_dim: D.
      kernel: 'tokamax' or 'jax'.
      block: queries and keys of a block.

    Returns:
      The bundles of 'forward' and 'backward'.
    """
    bundles = {}
    with tempfile.TemporaryDirectory() as folder:
        # A process of its own, since libtpu reads LIBTPU_INIT_ARGS once.
        call = f'dump_kernel({topology!r}, {block}, {head_dim}, {kernel!r}, {folder!r})'
        code = (
            'from absl import flags; flags.FLAGS.mark_as_parsed(); '
            f'from mask2dit_jax.aot import kernel_schedules; kernel_schedules.{call}'
        )
        subprocess.run(
            [sys.executable, '-c', code],
            check=True,
            env=os.environ | {'JAX_PLATFORMS': 'cpu'},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        for direction, name in (('forward', 'fwd'), ('backward', 'dkv')):
            dumps = pathlib.Path(folder).glob(f'*splash*{name}*-final_bundles.txt')
            (path,) = (dump for dump in dumps if 'schedule-analysis' not in dump.name)
            longest, second = count_bundles(path.read_text())[:2]
            # tokamax's kernel has one stretch of code for each kind of block; jax's evaluates the
            # mask of every block.
            visible = second if kernel == 'tokamax' else longest
            bundles[direction] = Bundles(visible=visible, masked=longest)
    return bundles


def dump_kernel(topology: str, block: int, head_dim: int, kernel: str, folder: str) -> None:
    """Compiles forward and backward pass for three scenes of the published size, and has every pass
    of the compiler written to `folder`."""
    os.environ['LIBTPU_INIT_ARGS'] = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
    devices = topology_lib.topology_devices(topology)[:1]
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), devices)

    # Two frames per scene are enough: the code for a block does not depend on their number.
    layout = SceneLayout((2,) * 3, 30, 45, 226)
    x = jax.ShapeDtypeStruct(
        (1, layout.num_tokens, 1, head_dim),  # [B, L, N, D]
        jnp.bfloat16,
        sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )

    def gradients(q, k, v, d_out):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            attend = functools.partial(
                splash.attend, layout=layout, pattern='dual', block=block, kernel=kernel
            )
            _, vjp = jax.vjp(attend, q, k, v)
            return vjp(d_out)

    jax.jit(gradients).lower(x, x, x, x).compile()


def count_bundles(text: str) -> list[int]:
    """Returns the bundles between branches in a final schedule, the longest stretches first."""
    address = 0
    marks = [0]
    for line in text.splitlines():
        bundle = re.match(r'\s*(0x[0-9a-f]+)\s', line)
        if bundle:
            address = int(bundle.group(1), 16)
            if 'sbr.rel' in line:
                marks.append(address)

    stretches = itertools.pairwise([*marks, address])
    return sorted((end - start for start, end in stretches), reverse=True)
