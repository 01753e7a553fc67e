"""Sizes of the released models: memory and time of conversion and of the VAE: pytest -m slow -s
tests/large_test.py"""

import itertools
import json
import subprocess
import sys
import textwrap
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mask2dit_jax.models import dit
from mask2dit_jax.pretrained import export, names

pytestmark = pytest.mark.slow
PEAK = (
    'import resource; print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)'
)


def python(code):
    """Runs code in a fresh interpreter; returns seconds, its peak resident memory in GiB and its
    output."""
    started = time.monotonic()
    out = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code) + '\n' + PEAK],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return time.monotonic() - started, float(out.split('PEAK')[1]), out


def write_synthetic(folder):
    """A 5B transformer in bf16 and 2 GB files; returns the sum of every tensor, taken from its
    values."""
    folder.mkdir(parents=True)
    cfg = dit.DiTConfig(position_rule='reference')
    tensors = export.export_params('transformer', cfg, names.abstract_params(cfg))
    (folder / 'config.json').write_text(json.dumps(names.transformer_json(cfg)))
    rng, sums, shard, filled, files = np.random.default_rng(0), {}, {}, 0, []
    for i, (name, tensor) in enumerate(tensors.items()):
        bits = rng.integers(
            2**16, size=tensor.shape, dtype=np.uint16
        )  # any sign and fraction, 2^-3 to 2^1
        value = (bits & 0x81FF | 0x3E00).view(ml_dtypes.bfloat16)
        sums[name], shard[name] = int(value.view(np.uint16).astype(np.int64).sum()), value
        filled += value.nbytes
        if filled > 2e9 or i + 1 == len(tensors):
            files.append(folder / f'diffusion_pytorch_model-{len(files) + 1:05d}.safetensors')
            save_file(shard, files[-1])
            shard, filled = {}, 0
    return sums, sum(int(np.prod(t.shape)) for t in tensors.values())


def sums_of(folder):
    from mask2dit_jax import tensor_io

    return {
        n: int(np.asarray(t).view(np.uint16).astype(np.int64).sum())
        for n, t in tensor_io.open_safetensors(folder).items()
    }


def test_5b_transformer_to_orbax_and_back(tmp_path):
    sums, count = write_synthetic(tmp_path / 'released/transformer')
    assert count == 5_570_283_072
    paths = [tmp_path / n for n in ('released', 'orbax', 'back')]
    for source, target in itertools.pairwise(paths):
        seconds, peak, _ = python(f"""
            from mask2dit_jax.pretrained import export
            export.convert_folder({str(source)!r}, {str(target)!r})""")
        size = sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 2**30
        print(
            f'\n5B {source.name} -> {target.name}: {seconds:.0f} s, peak {peak:.2f} GiB of memory, '
            f'{size:.1f} GiB on disk'
        )
        assert peak < 4
    assert sums_of(tmp_path / 'back/transformer') == sums
    for source in paths[:2]:
        seconds, peak, _ = python(f"""
            from mask2dit_jax.pretrained import load
            load.load_transformer({str(source / 'transformer')!r}, param_dtype='bfloat16')""")
        print(
            f'\n5B loading {source.name}: {seconds:.0f} s, peak {peak:.2f} GiB (10.4 GiB of them parameters)'
        )


@pytest.mark.parametrize('tiling', [False, True], ids=['whole', 'tiles'])
@pytest.mark.parametrize('task', ['decode', 'encode'])
def test_released_vae_at_480x720(task, tiling):
    """49 frames of random video through random weights of the real channel sizes; half an hour to
    an hour each."""
    seconds, peak, out = python(f"""
        import jax, numpy as np
        from mask2dit_jax.pretrained import names
        from mask2dit_jax.models import vae
        cfg = vae.VAEConfig()
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda p: jax.numpy.asarray(rng.standard_normal(p.shape, np.float32) * 0.03),
                              names.abstract_params(cfg, 'vae'))
        if {task!r} == 'decode':
            out = vae.decode(cfg, params, rng.standard_normal((1, 13, 60, 90, 16), np.float32), tiling={tiling})
        else:
            out, _ = vae.encode(cfg, params, rng.uniform(-1, 1, (1, 49, 480, 720, 3)).astype('f'), tiling={tiling})
        assert np.isfinite(out).all()
        print('SHAPE', out.shape)""")
    how = 'in tiles' if tiling else 'whole'
    print(f'\nVAE {task}, 49 frames of 480x720, {how}: {seconds:.0f} s, peak {peak:.2f} GiB')
    expected = '(1, 49, 480, 720, 3)' if task == 'decode' else '(1, 13, 60, 90, 16)'
    assert out.split('SHAPE')[1].split('PEAK')[0].strip() == expected
