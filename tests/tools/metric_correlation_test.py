"""Metrics follow the exact scores of stories, and comparisons tell when they do not."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from mask2dit_jax.stories import rendering, world
from mask2dit_jax.tools import metric_correlation

FRAMES = (4, 4, 8)


@pytest.fixture(scope='module')
def known():
    rng = np.random.default_rng(0)
    stories = [world.sample_story(rng, FRAMES, split='test') for _ in range(40)]
    return [story for story in stories if len(set(story.actions)) == 3][:16]


def render_leaking(story):
    """A rendering whose scenes show the action of the next scene."""
    actions = story.actions[1:] + story.actions[:1]
    travels = [np.array(world.MOTIONS[action][0]) for action in actions]
    starts = tuple((8 - travel / 2).tolist() for travel in travels)
    return rendering.render(dataclasses.replace(story, actions=actions, starts=starts))


def render_strangers(story):
    """A rendering whose scenes show a character of another colour each."""
    colors = [color for color in world.COLORS if color != story.color]
    scenes = []
    for scene in range(len(FRAMES)):
        video = rendering.render(dataclasses.replace(story, color=colors[scene]))
        scenes.append(np.split(video, np.cumsum(FRAMES)[:-1])[scene])
    return np.concatenate(scenes)


@pytest.fixture(scope='module')
def found(known):
    renders = {'right': rendering.render, 'leaking': render_leaking, 'strangers': render_strangers}
    found = {}
    for name, render in renders.items():
        videos = np.stack([render(story) for story in known]) / 255
        found[name] = metric_correlation.score(videos, known)
    return found


def mean(found, run, kind, name):
    return np.mean(found[run][kind][name])


def test_measured_features_rank_runs_as_the_exact_scores_do(found):
    for run in found:
        action = mean(found, run, 'exact', 'action')
        assert mean(found, run, 'measured', 'matches') == pytest.approx(action, abs=0.03)
    assert mean(found, 'right', 'exact', 'story') == 1
    assert mean(found, 'right', 'measured', 'semantic') > 0.999
    assert mean(found, 'leaking', 'exact', 'leak') > 0.95

    _, rows = metric_correlation.report(found)
    by_name = {(row['encoder'], row['exact'], row['metric']): row for row in rows}
    for pair in ('action', 'matches'), ('action', 'margin'), ('consistency', 'subject_between'):
        row = by_name['measured', *pair]
        assert (row['alike'], row['open'], row['reversed']) == (2, 0, 0)
        assert row['correlation'] > 0.8


def test_an_encoder_that_sees_no_actions_does_not_tell_leaks(found):
    """Both encoders see other characters, but only one sees the action of another scene."""

    def drop(kind, metric, run):
        return mean(found, 'right', kind, metric) - mean(found, run, kind, metric)

    assert drop('pixels', 'subject_between', 'strangers') > 0.1
    assert drop('measured', 'subject_between', 'strangers') > 0.1
    assert 0.005 < drop('pixels', 'semantic', 'leaking') < 0.1
    assert drop('measured', 'semantic', 'leaking') > 0.1


def test_compare_counts_pairs_and_correlates_ranks():
    low = np.arange(8) / 100
    middle = 0.5 + np.arange(8) / 100
    high = 1 - np.arange(8) / 100
    runs = [low, middle, high]

    assert metric_correlation.compare(runs, [x**3 for x in runs]) == {
        'correlation': pytest.approx(1),
        'alike': 3,
        'open': 0,
        'reversed': 0,
    }
    assert metric_correlation.compare(runs, [-x for x in runs]) == {
        'correlation': pytest.approx(-1),
        'alike': 0,
        'open': 0,
        'reversed': 3,
    }
    assert metric_correlation.compare([low, low, high], [high, middle, high]) == {
        'correlation': pytest.approx(0.5, abs=0.5),
        'alike': 1,
        'open': 1,
        'reversed': 0,
    }
    assert metric_correlation.compare([low, high], [np.ones(8)] * 2)['correlation'] is None


def test_the_page_has_a_row_for_every_run_and_pair(found):
    text, rows = metric_correlation.report(found)
    for run in found:
        for kind in ('exact', 'measured', 'pixels'):
            assert f'| {run} | {kind} |' in text
    assert len(rows) == 2 * len(metric_correlation.FOLLOWS)


def test_out_is_tried_before_anything_is_loaded(tmp_path):
    """The runs do not exist; what is said is that --out cannot be written."""
    (tmp_path / 'out').write_text('')
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'mask2dit_jax.tools.metric_correlation',
            f'--runs={tmp_path}/a,{tmp_path}/b',
            f'--out={tmp_path}/out',
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f'{tmp_path}/out cannot be written (it is a file)' in done.stderr
