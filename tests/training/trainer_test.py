"""A whole small run: what it leaves, resuming bit for bit, fine-tuning and sampling from it."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl.testing import flagsaver

from mask2dit_jax import checkpoint, sample
from mask2dit_jax import config as config_lib
from mask2dit_jax.data import latent_codec, story_file, video
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.models import dit
from mask2dit_jax.models import flops as flops_lib
from mask2dit_jax.pretrained import names as names_lib
from mask2dit_jax.training import trainer, validation


def smoke_config(steps=6, **kwargs):
    model = dit.DiTConfig(
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=32,
        in_channels=48,
        out_channels=48,
        text_embed_dim=16,
        time_embed_dim=16,
        max_text_seq_length=6,
        patch_size=1,
        sample_height=4,
        sample_width=4,
        sample_frames=4,
        dtype='float32',
        learned_positions=True,
        attention_backend='dense',
    )
    cfg = config_lib.Config(
        model=model,
        optimizer=config_lib.OptimizerConfig('muon', 1e-2, warmup_steps=2, final_fraction=0.1),
        data=config_lib.DataConfig(layouts=((4, 4), (4, 8)), num_train=32, num_test=16),
        train=config_lib.TrainConfig(
            steps=steps,
            batch_size=8,
            conditional_probability=0.5,
            ema_decay=0.9,
            log_every_steps=1,
            checkpoint_every_steps=3,
            sample_every_steps=100,
        ),
        sample=config_lib.SampleConfig(steps=2, guidance=1.5, sheet_stories=4),
        eval=config_lib.EvalConfig(stories=8, batch_size=8),
        mesh=mesh_lib.MeshConfig(data=8, cpu_devices=8),
    )
    return dataclasses.replace(cfg, **kwargs)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished run of a few steps on two layouts, and its rows of scores."""
    workdir = tmp_path_factory.mktemp('runs') / 'smoke'
    return workdir, trainer.train_and_evaluate(smoke_config(), workdir)


@pytest.fixture(scope='module')
def weights(finished):
    """'params' and 'ema' of the finished run, read from its last checkpoint without the package's
    own functions."""
    cfg = smoke_config()
    shapes = names_lib.abstract_params(cfg.model)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        partitioning.shardings({'params': shapes}, mesh_lib.make_mesh(cfg.mesh))['params'],
    )
    with ocp.StandardCheckpointer() as reader:
        return {
            k: reader.restore((finished[0] / 'checkpoints/6' / k).absolute(), target)
            for k in ('params', 'ema')
        }


def records(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_a_run_leaves_what_it_promises(finished):
    workdir, rows = finished
    assert [(r['task'], r['frames']) for r in rows] == [
        ('generate', '4+4'),
        ('extend 1 given', '4+4'),
        ('generate', '4+8'),
        ('extend 1 given', '4+8'),
    ]
    assert json.loads((workdir / 'scores.json').read_text()) == rows
    assert [r['step'] for r in records(workdir)] == [1, 2, 3, 4, 5, 6]
    assert len(list((workdir / 'sheets').glob('*.png'))) == 2
    assert config_lib.load(workdir / 'config.json') == smoke_config()


def test_sheets_are_those_of_the_ema(finished, weights, tmp_path):
    codec = latent_codec.StoriesCodec(smoke_config(), finished[0])
    by_ema, by_params = (
        [
            path.read_bytes()
            for path in validation.write_sample_grids(smoke_config(), w, codec, tmp_path / k, 6)
        ]
        for k, w in sorted(weights.items())
    )
    sheets = [path.read_bytes() for path in (finished[0] / 'sheets').glob('*.png')]
    assert sorted(sheets) == sorted(by_ema)
    assert not set(sheets) & set(by_params)
    told = [
        json.loads(path.read_text()) for path in sorted((finished[0] / 'sheets').glob('*.json'))
    ]
    assert [t['given_scenes'] for t in told] == [1, 0] and told[0]['stories'] == told[1]['stories']
    assert all(len(captions) == 2 for captions in told[0]['stories'])


def test_resume_is_bit_equal(finished, tmp_path):
    workdir, rows = finished
    other = tmp_path / 'smoke'
    shutil.copytree(workdir, other)
    shutil.copytree(workdir.parent / 'data', tmp_path / 'data')
    shutil.rmtree(other / 'checkpoints' / '6')  # as if killed after the checkpoint of step 3
    assert trainer.train_and_evaluate(smoke_config(), other, trace_step=3) == rows
    (trace,) = (other / 'trace').rglob('*.xplane.pb')
    names = [
        e.name
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for e in line.events
    ]
    assert names.count('CommonPjRtLoadedExecutable::Execute (jit_step)') == trainer.TRACED_STEPS

    def untimed(path):
        return [
            {k: v for k, v in r.items() if k not in ('steps_per_second', 'data_wait')}
            for r in records(path)
        ]

    assert untimed(other) == untimed(workdir)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        names_lib.abstract_params(smoke_config().model),
    )
    a, b = (checkpoint.restore(w / 'checkpoints/6', {'ema': target}) for w in (workdir, other))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_share_of_the_peak_counts_model_flops_of_all_devices(finished):
    cfg = smoke_config()
    codec, device = (
        latent_codec.StoriesCodec(cfg, finished[0]),
        types.SimpleNamespace(device_kind='TPU v5'),
    )
    shares = trainer._peak_share(
        cfg, types.SimpleNamespace(size=4, devices=np.array([device])), codec
    )
    flops = flops_lib.training_flops(cfg.model, cfg.model.layout((1, 2), 4, 4))
    assert shares.keys() == {(4, 4), (4, 8)}
    assert shares[4, 8] == pytest.approx(8 * sum(flops.values()) / (4 * 459e12))
    assert trainer._peak_share(cfg, mesh_lib.make_mesh(cfg.mesh), codec) == {}


def test_steps_that_are_not_run_cannot_be_recorded(finished):
    with pytest.raises(
        ValueError, match='--trace_step=2 cannot be recorded: this run goes from step 6 to 6'
    ):
        trainer.train_and_evaluate(smoke_config(), finished[0], trace_step=2)


def test_resuming_another_run_is_refused(finished):
    with pytest.raises(ValueError, match='trained with another seed'):
        trainer.train_and_evaluate(smoke_config(seed=1), finished[0])


def test_divergence_stops_and_saves_nothing(tmp_path):
    cfg = smoke_config(
        optimizer=config_lib.OptimizerConfig('adamw', 1e30, warmup_steps=1),
        data=config_lib.DataConfig(layouts=((4, 4),), num_train=32, num_test=16),
    )
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, log_every_steps=100))
    with pytest.raises(
        FloatingPointError, match=r'before step 3: nothing was saved'
    ):  # where the first save is due
        trainer.train_and_evaluate(cfg, tmp_path / 'run')
    assert not [p for p in (tmp_path / 'run/checkpoints').glob('*') if p.name.isdigit()]


def test_fine_tuning_starts_from_the_ema(finished, weights):
    cfg = smoke_config(steps=1, init_from=str(finished[0]))
    codec = latent_codec.StoriesCodec(cfg, finished[0])
    state, _ = trainer._initial_state(cfg, codec, mesh_lib.make_mesh(cfg.mesh))
    for ours in state.params, state.ema:
        jax.tree.map(np.testing.assert_array_equal, ours, weights['ema'])
    assert int(state.step) == 0


def test_sampling_and_fine_tuning_take_the_newest_good_checkpoint(finished, tmp_path, caplog):
    workdir = tmp_path / 'smoke'
    shutil.copytree(finished[0], workdir)
    (workdir / 'checkpoints/6/ema/manifest.ocdbt').unlink()
    out = sample_run(tmp_path, workdir, prompt=['red ring on gray moves left', 'it grows'])
    assert json.loads((out / 'story.json').read_text())['checkpoint'] == str(
        workdir / 'checkpoints/3'
    )
    assert any(f'{workdir}/checkpoints/6 is damaged' in r.getMessage() for r in caplog.records)
    cfg = smoke_config(init_from=str(workdir))
    state, _ = trainer._initial_state(
        cfg, latent_codec.StoriesCodec(cfg, workdir), mesh_lib.make_mesh(cfg.mesh)
    )
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params
    )
    ema = checkpoint.restore(workdir / 'checkpoints/3', {'ema': target})['ema']
    jax.tree.map(np.testing.assert_array_equal, state.params, ema)
    with pytest.raises(ValueError, match='checkpoints/6 is damaged'):
        sample_run(
            tmp_path,
            None,
            checkpoint=str(workdir / 'checkpoints/6'),
            prompt=['it grows', 'it blinks'],
        )


def sample_run(tmp_path, workdir, **flags):
    with flagsaver.flagsaver(
        **({'workdir': workdir and str(workdir), 'out': str(tmp_path / 'out')} | flags)
    ):
        sample.main(['sample'])
    return tmp_path / 'out'


def test_sample_writes_reproducible_videos(finished, tmp_path):
    prompts = ['red ring on gray moves left', 'it grows', 'it blinks']
    out = sample_run(tmp_path, finished[0], prompt=prompts, num_videos=2)
    first, fps = video.read_video(out / 'video_0.mp4')
    assert first.shape == (12, 256, 256, 3) and fps == 4
    assert {p.name for p in out.iterdir()} == {
        f'{n}_{i}.{e}'
        for i in (0, 1)
        for n, e in (('video', 'mp4'), ('video', 'gif'), ('sheet', 'png'))
    } | {'story.json'}
    assert (video.read_video(out / 'video_1.mp4')[0] != first).any()  # its own noise
    again = sample_run(tmp_path / 'again', finished[0], story=str(out / 'story.json'))
    np.testing.assert_array_equal(video.read_video(again / 'video_0.mp4')[0], first)


def test_sample_extends_given_clips_and_takes_unequal_scenes(finished, tmp_path):
    clip = np.full((8, 16, 16, 3), 0.5, np.float32)
    clip[:, 4:12, 4:12] = (1, 0, 0)
    video.write_mp4(tmp_path / 'given.mp4', clip, 4, scale=16)
    story = tmp_path / 'story.json'
    story.write_text(
        json.dumps(
            {
                'scenes': [
                    {'caption': 'red ball on gray stays'},
                    {'caption': 'it grows', 'frames': 4},
                    {'caption': 'it moves up', 'frames': 12},
                ]
            }
        )
    )
    given = [str(tmp_path / 'given.mp4')]
    out = sample_run(tmp_path, finished[0], story=str(story), given=given, guidance=['1', '2', '1'])
    made = video.read_video(out / 'video_0.mp4', height_px=16, width_px=16)[0]
    assert len(made) == 8 + 4 + 12
    assert np.abs(made[:8] / 255 - clip).mean() < 0.06  # the given scene, through the codec
    assert json.loads((out / 'story.json').read_text())['scenes'][2] == {
        'caption': 'it moves up',
        'frames': 12,
    }


@pytest.mark.parametrize(
    'flags, message',
    [
        ({'prompt': ['red ring on gray moves left', 'it dances']}, "unknown word 'dances'"),
        ({'prompt': ['it grows'], 'given': ['missing.mp4']}, 'missing.mp4 is not a file'),
        ({'story': 'missing.json'}, 'missing.json cannot be read'),
        (
            {'prompt': ['it grows', 'it blinks'], 'guidance': ['1', '2', '3']},
            r'one per scene \(2\)',
        ),
    ],
)
def test_sample_errors_name_the_input(finished, tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sample_run(tmp_path, finished[0], **flags)


def test_story_files_and_frames(tmp_path):
    path = tmp_path / 'story.json'
    for text in (
        '[]',
        '{"scenes": [{"frames": 4}]}',
        '{"scenes": []}',
        '{"scenes": [{"caption": "a", "fames": 4}]}',
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r'story.json (is not a story file|needs a text caption)'):
            story_file.read_story(path)
    assert sample.plan_frames([None, 8], [np.zeros((12, 1, 1, 3))], 4) == (12, 8)
    with pytest.raises(
        ValueError, match='Scene 1 has 4 frames in the story but its given clip has 12'
    ):
        sample.plan_frames([4, 8], [np.zeros((12, 1, 1, 3))], 4)
    with pytest.raises(ValueError, match='leave no scene to generate'):
        sample.plan_frames([4], [np.zeros((12, 1, 1, 3))], 4)


def test_missing_workdirs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no checkpoint'):
        checkpoint.latest(tmp_path, {})
    with pytest.raises(FileNotFoundError, match=r'must be a folder that mask2dit_jax\.main wrote'):
        config_lib.load(tmp_path / 'config.json')
