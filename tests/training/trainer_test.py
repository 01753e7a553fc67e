"""A whole small run: what it leaves, resuming bit for bit, fine-tuning and sampling from it."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl.testing import flagsaver
from conftest import unlike_the_umask

from mask2dit_jax import checkpoint, pipeline, sample
from mask2dit_jax import config as config_lib
from mask2dit_jax.data import batches as batches_lib
from mask2dit_jax.data import latent_codec, story_file, video
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.models import dit
from mask2dit_jax.models import flops as flops_lib
from mask2dit_jax.pretrained import names as names_lib
from mask2dit_jax.stories import cast, world
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


def test_a_run_on_stories_with_a_cast_is_scored_by_gap(tmp_path):
    """Trained on windows of longer stories; its scores say how many scenes each gap has."""
    config = smoke_config(
        steps=2,
        model=dataclasses.replace(smoke_config().model, max_text_seq_length=8),
        data=config_lib.DataConfig(
            world='cast', layouts=((4, 4, 4),), story_scenes=6, num_train=32, num_test=8
        ),
    )
    rows = trainer.train_and_evaluate(config, tmp_path / 'run')
    source = batches_lib.open_stories(config, tmp_path / 'run', (4, 4, 4), 'test')
    stories = [source[i]['story'] for i in range(8)]
    gaps = np.array([cast.gaps(story.who) for story in stories])
    captions = json.loads((tmp_path / 'run/sheets/00000002_generated.json').read_text())
    assert captions['stories'] == [world.captions(story) for story in stories[:4]]

    generated, extended, unnamed = rows
    for row, scored in (generated, gaps), (extended, gaps[:, 2:]), (unnamed, gaps[:, 2:]):
        for gap in range(3):
            count = int((scored == gap).sum())
            assert row.get(f'identity/gap {gap or "new"}/count', 0) == count
    assert (gaps[:, 2] > 0).sum() > 4


@pytest.fixture(scope='module')
def weights(finished):
    """'params' and 'ema' of the finished run, read from its last checkpoint without the package's
    own functions."""
    workdir, _ = finished
    cfg = smoke_config()
    shapes = names_lib.abstract_params(cfg.model)
    shardings = partitioning.shardings({'params': shapes}, mesh_lib.make_mesh(cfg.mesh))
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings['params'],
    )

    folder = (workdir / 'checkpoints/6').absolute()
    with ocp.StandardCheckpointer() as reader:
        return {item: reader.restore(folder / item, target) for item in ('params', 'ema')}


def records(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_a_run_leaves_what_it_promises(finished):
    workdir, rows = finished
    assert [(r['task'], r['frames']) for r in rows] == [
        ('generate', '4+4'),
        ('extend 1 given', '4+4'),
        ('extend 1 given, unnamed', '4+4'),
        ('generate', '4+8'),
        ('extend 1 given', '4+8'),
        ('extend 1 given, unnamed', '4+8'),
    ]
    assert json.loads((workdir / 'scores.json').read_text()) == rows

    assert [r['step'] for r in records(workdir)] == [1, 2, 3, 4, 5, 6]
    assert len(list((workdir / 'sheets').glob('*.png'))) == 2
    assert config_lib.load(workdir / 'config.json') == smoke_config()
    assert unlike_the_umask(workdir) == {}


def test_sheets_are_those_of_the_ema(finished, weights, tmp_path):
    workdir, _ = finished
    cfg = smoke_config()
    codec = latent_codec.StoriesCodec(cfg, workdir)

    def pictures(item):
        paths = validation.write_sample_grids(cfg, weights[item], codec, tmp_path / item, 6)
        return [path.read_bytes() for path in paths]

    sheets = [path.read_bytes() for path in (workdir / 'sheets').glob('*.png')]
    assert sorted(sheets) == sorted(pictures('ema'))
    assert not set(sheets) & set(pictures('params'))

    extended, generated = (
        json.loads(path.read_text()) for path in sorted((workdir / 'sheets').glob('*.json'))
    )
    assert extended['given_scenes'] == 1
    assert generated['given_scenes'] == 0
    assert extended['stories'] == generated['stories']
    assert all(len(captions) == 2 for captions in extended['stories'])


def event_names(trace):
    """The names of all events in a file of jax.profiler."""
    return [
        event.name
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    ]


def untimed(workdir):
    """Records without what differs from run to run."""
    timed = ('steps_per_second', 'data_wait')
    return [
        {name: value for name, value in record.items() if name not in timed}
        for record in records(workdir)
    ]


def test_resume_is_bit_equal(finished, tmp_path):
    workdir, rows = finished
    other = tmp_path / 'smoke'
    shutil.copytree(workdir, other)
    shutil.copytree(workdir.parent / 'data', tmp_path / 'data')

    # As if the run was killed after the checkpoint of step 3.
    shutil.rmtree(other / 'checkpoints' / '6')
    assert trainer.train_and_evaluate(smoke_config(), other, trace_step=3) == rows
    assert untimed(other) == untimed(workdir)

    (trace,) = (other / 'trace').rglob('*.xplane.pb')
    executions = event_names(trace).count('CommonPjRtLoadedExecutable::Execute (jit_step)')
    assert executions == trainer.TRACED_STEPS

    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one_device),
        names_lib.abstract_params(smoke_config().model),
    )
    straight = checkpoint.restore(workdir / 'checkpoints/6', {'ema': target})
    resumed = checkpoint.restore(other / 'checkpoints/6', {'ema': target})
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)


def test_what_is_due():
    train = config_lib.TrainConfig(
        steps=12, log_every_steps=2, checkpoint_every_steps=3, sample_every_steps=4
    )

    def due(done, stopped=False):
        return {
            name for name, value in trainer._due(done, train, stopped)._asdict().items() if value
        }

    assert due(1) == set()
    assert due(2) == {'log'}
    assert due(3) == {'log', 'save'}  # only what is known to be finite is saved
    assert due(4) == {'log', 'sample'}
    assert due(12) == {'log', 'save'}  # the last grids are drawn after the loop
    assert due(1, stopped=True) == {'log', 'save'}
    assert due(4, stopped=True) == {'log', 'save'}


def test_records_are_means_since_the_last_one(monkeypatch):
    clock = iter([0, 1, 10, 20, 23, 30, 31, 40])  # two readings around each wait, one per record
    monkeypatch.setattr(trainer, 'time', types.SimpleNamespace(monotonic=lambda: next(clock)))
    recorder = trainer._Recorder(peak_share={(4,): 2.0, (8,): 4.0})
    batches = iter([((4,), {}), ((4,), {}), ((8,), {})])

    # The first record has no times: the time before it is the compiler's.
    layout, _ = recorder.wait_for(batches)
    recorder.add(layout, {'loss': np.float32(5)})
    assert recorder.record(1) == {'loss': 5}

    for loss in (1, 2):
        layout, _ = recorder.wait_for(batches)
        recorder.add(layout, {'loss': np.float32(loss)})
    assert recorder.record(3) == {
        'loss': 1.5,
        'data_wait': (3 + 1) / 30,
        'mfu': (2.0 + 4.0) / 30,
    }


def test_the_share_of_the_peak_counts_model_flops_of_all_devices(finished):
    workdir, _ = finished
    cfg = smoke_config()
    codec = latent_codec.StoriesCodec(cfg, workdir)

    device = types.SimpleNamespace(device_kind='TPU v5')
    mesh_of_four = types.SimpleNamespace(size=4, devices=np.array([device]))
    shares = trainer._peak_share(cfg, mesh_of_four, codec)
    assert shares.keys() == {(4, 4), (4, 8)}

    flops = flops_lib.training_flops(cfg.model, cfg.model.layout((1, 2), 4, 4))
    assert shares[4, 8] == pytest.approx(8 * sum(flops.values()) / (4 * 459e12))

    # A CPU's peak is not known.
    assert trainer._peak_share(cfg, mesh_lib.make_mesh(cfg.mesh), codec) == {}


class EnoughError(Exception):
    pass


def test_at_most_two_steps_are_in_flight(finished, tmp_path, monkeypatch):
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path / 'run')
    shutil.copytree(workdir.parent / 'data', tmp_path / 'data')
    cfg = smoke_config(steps=1000)
    train = dataclasses.replace(cfg.train, log_every_steps=1000, checkpoint_every_steps=1000)
    cfg = dataclasses.replace(cfg, train=train)

    sent = []
    running = []
    jit_steps = trainer._jit_steps

    def counting(step):
        def run(*args):
            if len(sent) == 12:
                raise EnoughError
            state, metrics = step(*args)
            sent.append(metrics['loss'])
            running.append(sum(not loss.is_ready() for loss in sent))
            return state, metrics

        return run

    def jit_counting_steps(*args):
        return {layout: counting(step) for layout, step in jit_steps(*args).items()}

    monkeypatch.setattr(trainer, '_jit_steps', jit_counting_steps)
    with pytest.raises(EnoughError):
        trainer.train_and_evaluate(cfg, tmp_path / 'run')
    assert 1 <= max(running) <= 2, running


def test_a_run_goes_on_without_its_base_but_not_from_another(finished, tmp_path, monkeypatch):
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path / 'base')
    shutil.copytree(workdir.parent / 'data', tmp_path / 'data')

    def enough(*_):
        raise EnoughError

    def train(steps, base):
        """Trains, or resumes, and stops where nothing follows that matters here."""
        with pytest.raises(EnoughError):
            trainer.train_and_evaluate(smoke_config(steps, init_from=str(base)), tmp_path / 'run')
        return config_lib.load(tmp_path / 'run/config.json').init_from

    monkeypatch.setattr(validation, 'write_sample_grids', enough)
    train(1, tmp_path / 'base')
    assert (tmp_path / 'run/checkpoints/1').is_dir()
    monkeypatch.setattr(trainer, '_jit_steps', enough)

    # It is gone, and not needed.
    (tmp_path / 'base').rename(tmp_path / 'moved')
    assert train(2, tmp_path / 'base') == str(tmp_path / 'base')

    # Another folder must hold the same parameters.
    shutil.copytree(tmp_path / 'moved', tmp_path / 'other')
    shutil.rmtree(tmp_path / 'other/checkpoints/6')
    with pytest.raises(ValueError, match='trained with another init_from'):
        train(2, tmp_path / 'other')
    with pytest.raises(ValueError, match='trained with another init_from'):
        train(2, '')
    assert train(2, tmp_path / 'moved') == str(tmp_path / 'moved')


def test_steps_that_are_not_run_cannot_be_recorded(finished):
    with pytest.raises(
        ValueError, match='--trace_step=2 cannot be recorded: this run goes from step 6 to 6'
    ):
        trainer.train_and_evaluate(smoke_config(), finished[0], trace_step=2)


def test_resuming_another_run_is_refused(finished):
    other = smoke_config(seed=1, schedule=schedule_lib.Schedule(snr_shift_scale=3.0))
    message = (
        r'another schedule\.snr_shift_scale \(1\.0, now 3\.0\), seed \(0, now 1\): use the same'
    )
    with pytest.raises(checkpoint.OtherRunError, match=message):
        trainer.train_and_evaluate(other, finished[0])


def check_resuming(folder, **changes):
    """Asks for a checkpoint of `finished`, as a run with these changed settings does."""
    config = smoke_config()
    for key, value in changes.items():
        section, _, name = key.partition('__')
        new = dataclasses.replace(getattr(config, section), **{name: value}) if name else value
        config = dataclasses.replace(config, **{section: new})

    saved = json.loads((folder / 'meta/metadata').read_text())
    batches = types.SimpleNamespace(fingerprint=saved['data'])
    checkpoint.restore(folder, {}, trainer._run_meta(config, batches))


@pytest.mark.parametrize(
    'changes, named',
    [
        ({'schedule__rescale_betas_zero_snr': False}, 'schedule.rescale_betas_zero_snr (True, now'),
        (
            {'schedule__timestep_spacing': 'leading'},
            'schedule.timestep_spacing (trailing, now lead',
        ),
        ({'data__layouts': ((4, 4),)}, 'data.layouts ([[4, 4], [4, 8]], now [[4, 4]])'),
        ({'data__codec_components': 24}, 'data.codec_components (48, now 24)'),
        ({'data__height_px': 32}, 'data.height_px (16, now 32)'),
        ({'data__caption_style': 'every'}, 'data.caption_style (first, now every)'),
        ({'optimizer__b2': 0.95}, 'optimizer.b2 (0.999, now 0.95)'),
        ({'optimizer__name': 'adamw'}, 'optimizer.name (muon, now adamw)'),
        ({'train__caption_dropout': 0.5}, 'train.caption_dropout (0.1, now 0.5)'),
        ({'train__conditional_probability': 0.0}, 'train.conditional_probability (0.5, now 0.0)'),
        ({'train__given': 'any'}, 'train.given (leading, now any)'),
        ({'train__ema_decay': 0.5}, 'train.ema_decay (0.9, now 0.5)'),
        ({'train__batch_size': 16}, 'train.batch_size (8, now 16)'),
        ({'model__dtype': 'bfloat16'}, 'model.dtype (float32, now bfloat16)'),
        ({'model__pattern': 'full', 'seed': 3}, 'model.pattern (dual, now full), seed (0, now 3)'),
        ({'lora__alpha': 2.0}, 'lora.alpha (0.0, now 2.0)'),
    ],
)
def test_what_a_run_is_may_not_change(finished, changes, named):
    with pytest.raises(checkpoint.OtherRunError, match=re.escape(f'trained with another {named}')):
        check_resuming(finished[0] / 'checkpoints/6', **changes)


def test_what_a_run_does_may_change(finished):
    changes = {
        'train__steps': 12,
        'train__grad_accumulation': 2,
        'train__log_every_steps': 7,
        'train__checkpoint_every_steps': 4,
        'train__sample_every_steps': 5,
        'train__keep_checkpoints': 9,
        'train__keep_every_steps': 8,
        'optimizer__learning_rate': 1e-4,
        'optimizer__clip_norm': 0.5,
        'model__remat': 'full',
        'model__attention_backend': 'blockwise',
        'data__dir': 'elsewhere',
        'mesh': mesh_lib.MeshConfig(fsdp=2),
        'sample': config_lib.SampleConfig('euler', 3, 2.0, 8),
        'eval': config_lib.EvalConfig(16, 16),
    }
    check_resuming(finished[0] / 'checkpoints/6', **changes)


def test_all_that_is_not_declared_to_change_is_compared():
    """So are keys that the configuration will have one day."""
    keys = checkpoint.flat(dataclasses.asdict(config_lib.Config()))
    sections = {key.partition('.')[0] for key in keys}
    assert {*keys, *sections} >= trainer._MAY_CHANGE

    meta = trainer._run_meta(config_lib.Config(), types.SimpleNamespace(fingerprint=''))
    changing = {key for key in keys if {key, key.partition('.')[0]} & trainer._MAY_CHANGE}
    assert meta.keys() == keys.keys() - changing | {'data', 'init_from'}
    assert sum(key.startswith('schedule.') for key in meta) == len(
        dataclasses.fields(schedule_lib.Schedule)
    )


def test_checkpoints_of_earlier_versions_are_compared_by_what_they_hold(finished, tmp_path):
    folder = tmp_path / 'checkpoints/6'
    shutil.copytree(finished[0] / 'checkpoints/6', folder)
    config = smoke_config()
    now = json.loads((folder / 'meta/metadata').read_text())
    earlier = {
        'data': now['data'],
        'seed': 0,
        'init_from': '',
        'optimizer': 'muon',
        'model': dataclasses.asdict(config.model) | {'remat': '', 'attention_backend': ''},
        'lora': dataclasses.asdict(config.lora),
        'batch_size': 8,
        'caption_style': 'first',
        'checksums': now['checksums'],
    }
    (folder / 'meta/metadata').write_text(json.dumps(earlier))

    check_resuming(folder)
    check_resuming(folder, train__ema_decay=0.5)  # they do not tell
    for changes, named in (
        ({'optimizer__name': 'adamw'}, 'optimizer.name (muon, now adamw)'),
        ({'train__batch_size': 16}, 'train.batch_size (8, now 16)'),
        ({'data__caption_style': 'every'}, 'data.caption_style (first, now every)'),
        ({'model__num_layers': 2}, 'model.num_layers (1, now 2)'),
        ({'lora__rank': 2}, 'lora.rank (0, now 2)'),
    ):
        with pytest.raises(checkpoint.OtherRunError, match=re.escape(named)):
            check_resuming(folder, **changes)


def test_divergence_stops_and_saves_nothing(tmp_path):
    cfg = smoke_config(
        optimizer=config_lib.OptimizerConfig('adamw', 1e30, warmup_steps=1),
        data=config_lib.DataConfig(layouts=((4, 4),), num_train=32, num_test=16),
    )
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, log_every_steps=100))

    # The first save is due at step 3.
    with pytest.raises(FloatingPointError, match=r'before step 3: nothing was saved'):
        trainer.train_and_evaluate(cfg, tmp_path / 'run')
    assert not [p for p in (tmp_path / 'run/checkpoints').glob('*') if p.name.isdigit()]


def test_fine_tuning_starts_from_the_ema(finished, weights):
    workdir, _ = finished
    cfg = smoke_config(steps=1, init_from=str(workdir))
    codec = latent_codec.StoriesCodec(cfg, workdir)
    state, _ = trainer._initial_state(cfg, codec, mesh_lib.make_mesh(cfg.mesh))

    for ours in state.params, state.ema:
        jax.tree.map(np.testing.assert_array_equal, ours, weights['ema'])
    assert int(state.step) == 0


def sample_run(tmp_path, workdir, **flags):
    """Runs `sample` with these flags, and returns the folder that it wrote."""
    defaults = {'workdir': workdir and str(workdir), 'out': str(tmp_path / 'out')}
    with flagsaver.flagsaver(**(defaults | flags)):
        sample.main(['sample'])
    return tmp_path / 'out'


def test_sampling_and_fine_tuning_take_the_newest_good_checkpoint(finished, tmp_path, caplog):
    workdir = tmp_path / 'smoke'
    shutil.copytree(finished[0], workdir)
    (workdir / 'checkpoints/6/ema/manifest.ocdbt').unlink()

    # Sampling.
    out = sample_run(tmp_path, workdir, prompt=['red ring on gray moves left', 'it grows'])
    used = json.loads((out / 'story.json').read_text())['checkpoint']
    assert used == str(workdir / 'checkpoints/3')
    assert any(f'{workdir}/checkpoints/6 is damaged' in r.getMessage() for r in caplog.records)

    # Fine-tuning.
    cfg = smoke_config(init_from=str(workdir))
    codec = latent_codec.StoriesCodec(cfg, workdir)
    state, _ = trainer._initial_state(cfg, codec, mesh_lib.make_mesh(cfg.mesh))
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params
    )
    ema = checkpoint.restore(workdir / 'checkpoints/3', {'ema': target})['ema']
    jax.tree.map(np.testing.assert_array_equal, state.params, ema)

    # A damaged checkpoint that is named is not replaced by another.
    damaged = str(workdir / 'checkpoints/6')
    with pytest.raises(ValueError, match='checkpoints/6 is damaged'):
        sample_run(tmp_path / 'named', None, checkpoint=damaged, prompt=['it grows', 'it blinks'])


def test_sample_writes_reproducible_videos(finished, tmp_path):
    workdir, _ = finished
    prompts = ['red ring on gray moves left', 'it grows', 'it blinks']
    out = sample_run(tmp_path, workdir, prompt=prompts, num_videos=2)

    first, fps = video.read_video(out / 'video_0.mp4')
    assert first.shape == (12, 256, 256, 3)
    assert fps == 4

    of_each_video = ['video_{}.mp4', 'video_{}.gif', 'sheet_{}.png']
    names = {name.format(i) for i in (0, 1) for name in of_each_video}
    assert {path.name for path in out.iterdir()} == names | {'story.json', 'video_0', 'video_1'}

    # Each video has its own noise.
    second, _ = video.read_video(out / 'video_1.mp4')
    assert (second != first).any()

    # story.json is all that is needed to make the first one again.
    again = sample_run(tmp_path / 'again', workdir, story=str(out / 'story.json'))
    repeated, _ = video.read_video(again / 'video_0.mp4')
    np.testing.assert_array_equal(repeated, first)


def test_sample_extends_given_clips_and_takes_unequal_scenes(finished, tmp_path):
    workdir, _ = finished
    clip = np.full((8, 16, 16, 3), 0.5, np.float32)
    clip[:, 4:12, 4:12] = (1, 0, 0)
    video.write_mp4(tmp_path / 'given.mp4', clip, 4, scale=16)

    scenes = [
        {'caption': 'red ball on gray stays'},
        {'caption': 'it grows', 'frames': 4},
        {'caption': 'it moves up', 'frames': 12},
    ]
    story = tmp_path / 'story.json'
    story.write_text(json.dumps({'scenes': scenes}))

    given = [str(tmp_path / 'given.mp4')]
    out = sample_run(tmp_path, workdir, story=str(story), given=given, guidance=['1', '2', '1'])

    made = video.read_video(out / 'video_0.mp4', height_px=16, width_px=16)[0]
    assert len(made) == 8 + 4 + 12
    assert np.abs(made[:8] / 255 - clip).mean() < 0.06  # the given scene, through the codec
    assert json.loads((out / 'story.json').read_text())['scenes'][2] == scenes[2]


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
    for text in ('[]', '{', '{"scene": []}', '{"scenes": []}', '{"scenes": {}}'):
        path.write_text(text)
        with pytest.raises(
            ValueError, match=r'story.json (is not a story file|has no scenes).*write {'
        ):
            story_file.read_story(path)

    for scene, message in (
        ({'frames': 4}, 'has no caption'),
        ({'caption': None}, 'has the caption null, which is not a text'),
        ({'caption': 'a', 'fames': 4}, 'has an unknown key "fames" \\(did you mean frames\\?\\)'),
        ({'caption': 'a', 'frames': 0}, 'has 0 frames, not a whole number from 1 on'),
        ({'caption': 'a', 'frames': True}, 'has true frames'),
        ({'caption': 'a', 'frames': '8'}, 'has "8" frames'),
        ('a', 'is "a", not an object with a caption'),
    ):
        path.write_text(json.dumps({'scenes': [{'caption': 'good'}, scene]}))
        for read in story_file.read_story, story_file.read_record:
            with pytest.raises(ValueError, match=f'story.json: scene 2 {message}'):
                read(path)

    for settings, message in (
        ({'seeds': 1}, 'unknown setting "seeds" \\(did you mean seed\\?\\)'),
        ({'seed': -1}, '"seed": -1: use a whole number from 0 to 4294967295'),
        ({'steps': 2.5}, '"steps": 2.5: use a whole number of at least 1'),
        ({'guidance': [1, '2']}, '"guidance": .*a finite number, or a list'),
        ({'guidance': float('nan')}, '"guidance": NaN'),
        ({'sampler': 'foo'}, '"sampler": "foo": use one of ddim'),
        ({'given': ['a.mp4']}, '"given": .*use a list of {"file"'),
        ({'mesh': 'all'}, '"mesh": "all"'),
    ):
        path.write_text(json.dumps({'scenes': [{'caption': 'good'}]} | settings))
        with pytest.raises(ValueError, match=message):
            story_file.read_record(path)
        assert story_file.read_story(path) == (['good'], [None])

    assert pipeline.plan_frames([None, 8], [12], 4) == (12, 8)
    with pytest.raises(
        ValueError, match='Scene 1 has 4 frames in the story but its given clip has 12'
    ):
        pipeline.plan_frames([4, 8], [12], 4)
    with pytest.raises(ValueError, match='leave no scene to generate'):
        pipeline.plan_frames([4], [12], 4)


def test_missing_workdirs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no checkpoint'):
        checkpoint.latest(tmp_path, {})

    with pytest.raises(FileNotFoundError, match=r'must be a folder that mask2dit_jax\.main wrote'):
        config_lib.load(tmp_path / 'config.json')


@pytest.mark.parametrize('sample_every', [2, 3])
def test_sigterm_while_it_draws_saves_that_step_once(sample_every, tmp_path, monkeypatch):
    """Whether the step is saved anyway, as step 3, or not, as step 2."""
    config = smoke_config()
    train = dataclasses.replace(config.train, sample_every_steps=sample_every, log_every_steps=3)
    config = dataclasses.replace(
        config, train=train, data=dataclasses.replace(config.data, layouts=((4, 4),))
    )
    draw = validation.write_sample_grids

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args)

    monkeypatch.setattr(validation, 'write_sample_grids', stopped)
    assert trainer.train_and_evaluate(config, tmp_path / 'run') is None
    assert [path.name for path in checkpoint.folders(tmp_path / 'run')] == [str(sample_every)]
    assert [record['step'] for record in records(tmp_path / 'run')] == [sample_every]


def test_freed_memory_is_kept_where_a_cpu_computes():
    """In a process of its own, since it lasts. Pages that are made count as faults."""
    code = """
import resource, sys
import numpy as np
from mask2dit_jax.distributed import mesh
from mask2dit_jax.training import trainer

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24)  # 128 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults(), faults()
trainer._keep_freed_memory(mesh.make_mesh(mesh.MeshConfig()))
first, second = faults(), faults()
print(before, first, second)
sys.exit(not (second < 10 < min(before)))
"""
    subprocess.run([sys.executable, '-c', code], check=True)
