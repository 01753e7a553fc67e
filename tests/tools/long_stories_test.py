"""Long stories are told and scored by the number of the scene."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import STORY_MODEL, mesh_of

from mask2dit_jax import checkpoint, generation
from mask2dit_jax import config as config_lib
from mask2dit_jax.data import latent_codec
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.pretrained import names, runs
from mask2dit_jax.stories import cast, world
from mask2dit_jax.tools import long_stories
from mask2dit_jax.training import train_step

# With one layer no caption reaches the scene after its own.
MODEL = dataclasses.replace(STORY_MODEL, num_layers=2)
CONFIG = config_lib.Config(
    model=MODEL,
    data=config_lib.DataConfig(codec_components=8, layouts=((4, 4, 4),)),
    sample=config_lib.SampleConfig(steps=1),
)
CAST_CONFIG = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(MODEL, max_text_seq_length=8),
    data=dataclasses.replace(CONFIG.data, world='cast'),
)


def make_run(tmp_path_factory, config):
    """The workdir of a run with random parameters."""
    workdir = tmp_path_factory.mktemp('runs') / 'run'
    workdir.mkdir()
    config_lib.save(config, workdir / 'config.json')
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: rng.normal(0, 0.5, p.shape).astype(np.float32),
        names.abstract_params(config.model),
    )
    state = train_step.TrainState(np.int32(3), params, params, {'unused': np.ones(1)})
    checkpoints = checkpoint.manager(workdir, 10, 0, 0)
    checkpoint.save(checkpoints, 3, state, {})
    checkpoint.finish(checkpoints)
    return workdir


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return make_run(tmp_path_factory, CONFIG)


@pytest.fixture(scope='module')
def cast_run(tmp_path_factory):
    return make_run(tmp_path_factory, CAST_CONFIG)


def settings(**lists):
    """All combinations."""
    lists = {
        'window': [1],
        'sinks': [0],
        'given_timestep': [0],
        'captions': ['unnamed'],
        'carry': ['latents'],
    } | lists
    return [long_stories.Setting(*values) for values in itertools.product(*lists.values())]


def test_every_combination_has_its_curve(run, tmp_path):
    tried = settings(window=[1, 2], sinks=[0, 1])
    long_stories.sweep([run], tmp_path / 'out', tried, num_scenes=5, num_stories=2)
    results = json.loads((tmp_path / 'out/curves.json').read_text())['results']
    assert [tuple(result['setting'].values())[:2] for result in results] == [
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    shapes = {np.shape(result['curves'][name]) for result in results for name in long_stories.SHOWN}
    assert shapes == {(1, 5)}
    assert (tmp_path / 'out/curves.png').stat().st_size > 1000
    lines = (tmp_path / 'out/curves.md').read_text().splitlines()
    longer = [line for line in lines if 'longer than trained (4, not 3)' in line]
    assert len(lines) == 2 + 8 and len(longer) == 2


def test_runs_that_differ_by_their_seed_share_a_row(run, tmp_path):
    """Others have rows of their own, and a row of several runs has their mean."""
    others = {
        'seed_1': {'seed': 1},
        'causal': {'model': dataclasses.replace(MODEL, pattern='causal')},
    }
    for name, changes in others.items():
        shutil.copytree(run, tmp_path / name)
        config_lib.save(dataclasses.replace(CONFIG, **changes), tmp_path / name / 'config.json')
    out = tmp_path / 'out'

    def sweep(*workdirs, num_scenes=4):
        return long_stories.sweep(workdirs, out, settings(), num_scenes=num_scenes, num_stories=2)

    sweep(run, tmp_path / 'causal')
    before = json.loads((out / 'curves.json').read_text())['results']

    # A later command adds to the folder; what is there is not computed again.
    table = sweep(tmp_path / 'seed_1', run)
    results = json.loads((out / 'curves.json').read_text())['results']
    shapes = [np.shape(result['curves']['right']) for result in results]
    assert [len(result['runs']) for result in results] == [2, 1] and shapes == [(2, 4), (1, 4)]
    assert (
        results[1] == before[1]
        and results[0]['curves']['action'][:1] == before[0]['curves']['action']
    )
    # The folders hold the same parameters.
    assert len(np.unique(results[0]['curves']['action'], axis=0)) == 1 and ' ± 0.000' in table

    with pytest.raises(ValueError, match='curves of other stories: scenes is 4 there and 5 here'):
        sweep(run, num_scenes=5)


def test_captions_name_nobody_where_they_are_given_again(run):
    """The first scene's caption matters after the joint scenes if it is a sink or in the window;
    carrying pixels matters from the first scene on that has given ones."""
    target = partitioning.abstract_arrays(names.abstract_params(MODEL), mesh_of(1, 1, 1, 1))
    _, params = runs.newest(run, CONFIG, target)
    codec = latent_codec.for_run(CONFIG, run)
    stories = long_stories.sample_stories(CONFIG, 2, 5)

    def told(**choice):
        (setting,) = settings(**{name: [value] for name, value in choice.items()})
        pixels = long_stories.tell(CONFIG, params, codec, setting, stories)
        return pixels.reshape(2, 5, 4, 16, 16, 3)

    def differing(one, other):
        return [scene for scene in range(5) if (one[:, scene] != other[:, scene]).any()]

    plain = told()
    assert differing(plain, told(captions='named')) == []
    assert differing(told(window=3), told(window=3, captions='named')) == [3, 4]
    assert differing(told(sinks=1), told(sinks=1, captions='named')) == [3, 4]
    assert differing(plain, told(carry='pixels')) == [3, 4]
    assert differing(plain, told(given_timestep=300)) == [3, 4]


def test_stories_with_a_cast_are_scored_by_gap(cast_run, tmp_path):
    """Every scene with a look that was shown before is counted at its gap."""
    num_stories, num_scenes = 3, 7
    out = tmp_path / 'out'
    table = long_stories.sweep(
        [cast_run], out, settings(), num_scenes=num_scenes, num_stories=num_stories
    )
    (result,) = json.loads((out / 'curves.json').read_text())['results']
    (recall,) = result['recall']
    stories = long_stories.sample_stories(CAST_CONFIG, num_stories, num_scenes)
    for score, turns in (('identity', 'who'), ('background', 'where')):
        gaps = [gap for story in stories for gap in cast.gaps(getattr(story, turns))]
        for gap in range(1, num_scenes):
            assert recall.get(f'{score}/gap {gap}/count', 0) == gaps.count(gap)
        row = [line for line in table.splitlines() if f' {score} ' in line and '| unnamed' in line][
            -1
        ]
        later = sum(gap in (2, 3) for gap in gaps)
        assert f' {later} |' in row


def test_who_is_new_is_described_and_who_was_given_is_not(cast_run):
    codec = latent_codec.for_run(CAST_CONFIG, cast_run)
    (story,) = long_stories.sample_stories(CAST_CONFIG, 1, 6)
    whole = codec.encode_text(world.captions(story))
    bare = codec.encode_text(world.captions(story, 'never', given=6))
    blocks = generation.plan_blocks(6, 0, joint=3, window=2, sinks=1)
    assert [block.start for block in blocks] == [0, 3, 4, 5]
    for captions, of_given in (('named', whole), ('unnamed', bare)):
        for block in blocks:
            text = long_stories.encode_block(codec, [story], block, captions).text[0]
            for scene in block.scenes:
                expected = of_given if scene in block.given else whole
                np.testing.assert_array_equal(text[scene], expected[scene])


def test_runs_on_encoded_videos_have_no_exact_scores(run, tmp_path):
    config = config_lib.Config(data=config_lib.DataConfig(encoded='data', codec='vae'))
    config_lib.save(config, tmp_path / 'config.json')
    with pytest.raises(ValueError, match='was trained on encoded videos'):
        long_stories.sweep([tmp_path], tmp_path, settings(), num_scenes=5, num_stories=2)
