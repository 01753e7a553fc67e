"""Schedules of the splash kernels, as the TPU compiler dumps them."""

import functools
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp

from mask2dit_jax.aot import topology as topology_lib
from mask2dit_jax.attention import splash
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.layout import SceneLayout


def dump_kernel(topology: str, block: int, head_dim: int, kernel: str, folder: str) -> None:
    """Compiles forward and backward of three published scenes, with every pass of the compiler
    written to `folder`.

    In a process of its own: libtpu reads its arguments once.
    """
    os.environ['LIBTPU_INIT_ARGS'] = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), topology_lib.topology_devices(topology)[:1])
    layout = SceneLayout(
        (2,) * 3, 30, 45, 226
    )  # two frames each: a block's code does not depend on it
    x = jax.ShapeDtypeStruct(
        (1, layout.num_tokens, 1, head_dim),
        jnp.bfloat16,
        sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )

    def gradients(q, k, v, d_out):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            attend = functools.partial(
                splash.attend, layout=layout, pattern='dual', block=block, kernel=kernel
            )
            return jax.vjp(attend, q, k, v)[1](d_out)

    jax.jit(gradients).lower(x, x, x, x).compile()


def count_bundles(text: str) -> list[int]:
    """Bundles between branches in a final schedule, the longest stretches first."""
    address, marks = 0, [0]
    for line in text.splitlines():
        found = re.match(r'\s*(0x[0-9a-f]+)\s', line)
        if found:
            address = int(found.group(1), 16)
            if 'sbr.rel' in line:
                marks.append(address)
    return sorted((b - a for a, b in itertools.pairwise([*marks, address])), reverse=True)


def kernel_bundles(
    topology: str, head_dim: int, kernel: str, block: int = 1024
) -> dict[str, tuple[int, int]]:
    """Bundles per head and block of so many queries and keys: 'forward' and 'backward', (visible,
    masked)."""
    bundles = {}
    with tempfile.TemporaryDirectory() as folder:
        code = (
            'import sys; from absl import flags; flags.FLAGS.mark_as_parsed(); from mask2dit_jax.aot import kernel_schedules; '
            f'kernel_schedules.dump_kernel({topology!r}, {block}, {head_dim}, {kernel!r}, {folder!r})'
        )
        subprocess.run(
            [sys.executable, '-c', code],
            check=True,
            env=os.environ | {'JAX_PLATFORMS': 'cpu'},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for direction, name in (('forward', 'fwd'), ('backward', 'dkv')):
            (path,) = (
                p
                for p in pathlib.Path(folder).glob(f'*splash*{name}*-final_bundles.txt')
                if 'schedule-analysis' not in p.name
            )
            longest, second = count_bundles(path.read_text())[:2]
            bundles[direction] = (second, longest) if kernel == 'tokamax' else (longest, longest)
    return bundles
