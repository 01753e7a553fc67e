"""Memory and time at the sizes of the released models: conversion of the transformer, and the VAE.

pytest -m slow -s tests/pretrained/large_test.py
"""

import itertools
import json
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mask2dit_jax import tensor_io
from mask2dit_jax.models import dit
from mask2dit_jax.pretrained import config_json, export, names

pytestmark = pytest.mark.slow
PRINT_PEAK = (
    'import resource; print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)'
)
SHARD_BYTES = 2e9


class Run(NamedTuple):
    """A run of code in an interpreter of its own."""

    seconds: float
    peak_gib: float  # of resident memory
    output: str


def python(code):
    """Runs code in a fresh interpreter, so that the peak of memory is that of this code."""
    started = time.monotonic()
    output = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code) + '\n' + PRINT_PEAK],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    seconds = time.monotonic() - started
    return Run(seconds, float(output.split('PEAK')[1]), output)


def sum_of_bits(value):
    return int(np.asarray(value).view(np.uint16).astype(np.int64).sum())


def write_synthetic(folder):
    """Writes a 5B transformer in bf16 and 2 GB files.

    Returns the sum of the bits of every tensor, and the number of parameters.
    """
    folder.mkdir(parents=True)
    config = dit.DiTConfig(position_rule='reference')
    tensors = export.export_params('transformer', config, names.abstract_params(config))
    (folder / 'config.json').write_text(json.dumps(config_json.transformer_json(config)))

    rng = np.random.default_rng(0)
    sums = {}
    shard = {}
    filled = 0
    num_files = 0
    for i, (name, tensor) in enumerate(tensors.items()):
        # Any sign and fraction, and magnitudes from 2^-3 to 2^1.
        bits = rng.integers(2**16, size=tensor.shape, dtype=np.uint16)
        value = (bits & 0x81FF | 0x3E00).view(ml_dtypes.bfloat16)
        sums[name] = sum_of_bits(value)
        shard[name] = value
        filled += value.nbytes

        if filled > SHARD_BYTES or i + 1 == len(tensors):
            num_files += 1
            save_file(shard, folder / f'diffusion_pytorch_model-{num_files:05d}.safetensors')
            shard = {}
            filled = 0

    num_parameters = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    return sums, num_parameters


def test_5b_transformer_to_orbax_and_back(tmp_path):
    sums, num_parameters = write_synthetic(tmp_path / 'released/transformer')
    assert num_parameters == 5_570_283_072

    paths = [tmp_path / name for name in ('released', 'orbax', 'back')]
    for source, target in itertools.pairwise(paths):
        run = python(f"""
            from mask2dit_jax.pretrained import export
            export.convert_folder({str(source)!r}, {str(target)!r})""")
        size_gib = sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 2**30
        print(
            f'\n5B {source.name} -> {target.name}: {run.seconds:.0f} s, peak {run.peak_gib:.2f} '
            f'GiB of memory, {size_gib:.1f} GiB on disk'
        )
        assert run.peak_gib < 4

    back = tensor_io.open_safetensors(tmp_path / 'back/transformer')
    assert {name: sum_of_bits(tensor) for name, tensor in back.items()} == sums

    for source in paths[:2]:
        run = python(f"""
            from mask2dit_jax.pretrained import load
            load.load_transformer({str(source / 'transformer')!r}, param_dtype='bfloat16')""")
        print(
            f'\n5B loading {source.name}: {run.seconds:.0f} s, peak {run.peak_gib:.2f} GiB '
            '(10.4 GiB of them parameters)'
        )


@pytest.mark.parametrize('tiling', [False, True], ids=['whole', 'tiles'])
@pytest.mark.parametrize('task', ['decode', 'encode'])
def test_released_vae_at_480x720(task, tiling):
    """49 frames of random video through random weights of the real channel sizes; half an hour to
    an hour each."""
    run = python(f"""
        import jax
        import numpy as np
        from mask2dit_jax.models import vae
        from mask2dit_jax.pretrained import names

        config = vae.VAEConfig()
        rng = np.random.default_rng(0)

        def random(p):
            return jax.numpy.asarray(rng.standard_normal(p.shape, np.float32) * 0.03)

        params = jax.tree.map(random, names.abstract_params(config, 'vae'))
        if {task!r} == 'decode':
            latents = rng.standard_normal((1, 13, 60, 90, 16), np.float32)
            out = vae.decode(config, params, latents, tiling={tiling})
        else:
            pixels = rng.uniform(-1, 1, (1, 49, 480, 720, 3)).astype(np.float32)
            out, _ = vae.encode(config, params, pixels, tiling={tiling})
        assert np.isfinite(out).all()
        print('SHAPE', out.shape)""")
    how = 'in tiles' if tiling else 'whole'
    print(
        f'\nVAE {task}, 49 frames of 480x720, {how}: {run.seconds:.0f} s, '
        f'peak {run.peak_gib:.2f} GiB'
    )
    expected = '(1, 49, 480, 720, 3)' if task == 'decode' else '(1, 13, 60, 90, 16)'
    assert run.output.split('SHAPE')[1].split('PEAK')[0].strip() == expected
