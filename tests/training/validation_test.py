"""Sample grids and scores of several processes: each holds its share of the stories, and together
they say what one process says."""

import json
import os
import re
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from conftest import child_environment, free_port, mesh_of
from PIL import Image

from mask2dit_jax import config as config_lib
from mask2dit_jax.data import latent_codec
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.models import dit
from mask2dit_jax.pretrained import names
from mask2dit_jax.stories import cast, world
from mask2dit_jax.training import validation

CONFIG = config_lib.Config(
    model=dit.DiTConfig(
        num_layers=1,
        num_attention_heads=8,
        attention_head_dim=16,
        in_channels=48,
        out_channels=48,
        text_embed_dim=16,
        time_embed_dim=16,
        max_text_seq_length=8,
        patch_size=1,
        sample_height=4,
        sample_width=4,
        sample_frames=4,
        dtype='float32',
        attention_backend='dense',
    ),
    data=config_lib.DataConfig(layouts=((4, 4),), num_train=2, num_test=8),
    sample=config_lib.SampleConfig(steps=2, guidance=1.5, sheet_stories=8),
    eval=config_lib.EvalConfig(stories=16, batch_size=8),
)


def look(mesh, workdir):
    """Draws grids and scores stories with random parameters.

    Returns:
      The rows of scores; and how many stories this process has in memory at once: of latents that
      the transformer gets, of latents that come out of it, and of videos.
    """
    held = {'in': set(), 'out': set(), 'videos': set()}

    class Codec(latent_codec.StoriesCodec):
        """Writes down what it decodes."""

        def decode_video(self, latents, latent_frames):
            held['videos'].add(len(latents))
            return super().decode_video(latents, latent_frames)

    local_batch = mesh_lib.local_batch
    global_batch = mesh_lib.global_batch

    def observed_output(array):
        rows = local_batch(array)
        shards = {shard.index[0].indices(len(array)) for shard in array.addressable_shards}
        assert len(rows) == sum(stop - start for start, stop, _ in shards)
        held['out'].add(len(rows))
        return rows

    def observed_input(batch, *args):
        held['in'] |= {len(array) for array in batch.values()}
        return global_batch(batch, *args)

    rng = np.random.default_rng(0)
    shapes = names.abstract_params(CONFIG.model)
    params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), shapes)
    params = jax.tree.map(
        lambda p, s: jax.make_array_from_callback(p.shape, s, lambda index: p[index]),
        params,
        partitioning.shardings(params, mesh),
    )

    codec = Codec(CONFIG, workdir)
    mesh_lib.local_batch, mesh_lib.global_batch = observed_output, observed_input
    try:
        validation.write_sample_grids(CONFIG, params, codec, workdir, 6)
        rows = validation.score_stories(CONFIG, params, codec, workdir)
    finally:
        mesh_lib.local_batch, mesh_lib.global_batch = local_batch, global_batch
    return rows, {kind: sorted(counts) for kind, counts in held.items()}


# Each of two processes runs this. Its arguments are the coordinator's address, its own number, the
# mesh's axes and the workdir.
CODE = """
    import json, sys

    import jax

    jax.config.update('jax_num_cpu_devices', 4)
    address, process, axes, workdir = sys.argv[1:]

    from mask2dit_jax.distributed import multihost

    multihost.initialize(address, 2, int(process), devices=8)

    import conftest, validation_test

    jax.config.update('jax_num_cpu_devices', 4)  # conftest asks for eight
    rows, held = validation_test.look(conftest.mesh_of(*json.loads(axes)), workdir)
    print('RESULT', json.dumps([rows, held]))
"""


def look_twice(axes, folder):
    """`look` in two processes of four devices each; returns the results of both."""
    script = folder / 'run.py'
    script.write_text(textwrap.dedent(CODE))
    environment = child_environment()
    environment['PYTHONPATH'] += os.pathsep + os.path.dirname(__file__)
    address = f'localhost:{free_port()}'

    processes = []
    for i in range(2):
        arguments = [address, str(i), json.dumps(axes), folder / 'runs/two']
        process = subprocess.Popen(
            [sys.executable, script, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)

    outputs = [process.communicate(timeout=600) for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return [json.loads(out.split('RESULT')[1]) for out, _ in outputs]


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """A workdir and what one process on one device says."""
    workdir = tmp_path_factory.mktemp('runs') / 'one'
    workdir.mkdir()
    return workdir, look(mesh_of(1), workdir)


def pictures(workdir):
    return [np.asarray(Image.open(path), int) for path in sorted(workdir.glob('sheets/*.png'))]


# Mesh; and the stories of eight that each process needs, and that it decodes, draws and scores.
SHARES = [
    ((2, 2, 2), [4, 4], [4, 4]),
    # All devices share the tokens of every story, so that both processes need all latents.
    pytest.param((1, 1, 8), [8, 8], [4, 4], marks=pytest.mark.slow),
]


@pytest.mark.parametrize('axes, needed, owned', SHARES, ids=str)
def test_a_process_holds_its_share_of_the_stories(axes, needed, owned, alone, tmp_path):
    workdir, (expected, held) = alone
    assert held == {'in': [8], 'out': [8], 'videos': [8]}

    (tmp_path / 'runs/two').mkdir(parents=True)
    results = look_twice(axes, tmp_path)
    for (rows, held), count, own in zip(results, needed, owned):
        assert held == {'in': [count], 'out': [count], 'videos': [own]}
        for row, expected_row in zip(rows, expected, strict=True):
            assert row.pop('task') == expected_row['task']
            assert row.pop('frames') == expected_row['frames']
            assert row == pytest.approx({name: expected_row[name] for name in row}, rel=1e-3)
            assert len(row) == len(expected_row) - 2

    drawn = pictures(tmp_path / 'runs/two')
    assert len(drawn) == 2
    for ours, theirs in zip(drawn, pictures(workdir), strict=True):
        assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize('batch_size, shares', [(8, 4), (4, 4), (2, 2), (6, 2), (3, 1)])
def test_as_many_devices_as_divide_the_rows_share_them(batch_size, shares):
    """On a mesh of two copies of two."""
    mesh = mesh_of(2, 2, 2)
    sharding = mesh_lib.row_sharding(mesh, batch_size)
    assert sharding.shard_shape((batch_size, 5)) == (batch_size // shares, 5)
    assert mesh_lib.local_rows(mesh, batch_size) == list(range(batch_size))
    assert mesh_lib.owned_rows(mesh, batch_size) == list(range(batch_size))

    rows = np.random.default_rng(0).standard_normal((batch_size, 5))
    placed = mesh_lib.global_batch({'x': rows.astype(np.float32)}, mesh, batch_size)['x']
    assert placed.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(mesh_lib.local_batch(placed), rows.astype(np.float32))


@pytest.mark.parametrize('of_world', ['one', 'cast'])
def test_a_run_proposes_captions_of_its_world(of_world, tmp_path, capsys):
    """What it prints last can be sampled, or says that captions are the user's."""
    config = config_lib.Config(data=config_lib.DataConfig(world=of_world))
    validation.write_scores(config, [{'task': 'generate', 'residual': 0.1}], tmp_path, 1.0)
    captions = re.findall('--prompt="(.*?)"', capsys.readouterr().out)
    parse = {'one': world.parse_captions, 'cast': cast.parse_cast_captions}[of_world]
    parse(captions)

    encoded = config_lib.Config(data=config_lib.DataConfig(encoded='clips', codec='vae'))
    validation.write_scores(encoded, [{'task': 'generate', 'residual': 0.1}], tmp_path, 1.0)
    assert '--prompt="..."' in capsys.readouterr().out
