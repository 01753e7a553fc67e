"""Metrics follow the exact scores of stories where the truth is known, and comparisons say so when
they do not."""

import dataclasses

import numpy as np
import pytest

from mask2dit_jax.stories import rendering, world
from mask2dit_jax.tools import metric_correlation

FRAMES = (4, 4, 8)


@pytest.fixture(scope='module')
def known():
    rng = np.random.default_rng(0)
    return [
        s
        for s in (world.sample_story(rng, FRAMES, split='test') for _ in range(40))
        if len(set(s.actions)) == 3
    ][:16]


@pytest.fixture(scope='module')
def found(known):
    """Renderings that are right, of which every scene shows the next one's action, or another
    character each."""

    def leaking(story):
        return dataclasses.replace(
            story,
            actions=story.actions[1:] + story.actions[:1],
            starts=tuple(
                (8 - np.array(world.MOTIONS[a][0]) / 2).tolist()
                for a in story.actions[1:] + story.actions[:1]
            ),
        )

    def strangers(story, i):
        others = [c for c in world.COLORS if c != story.color]
        cut = np.split(
            rendering.render(dataclasses.replace(story, color=others[i])), np.cumsum(FRAMES)[:-1]
        )
        return cut[i]

    videos = {
        'right': [rendering.render(s) for s in known],
        'leaking': [rendering.render(leaking(s)) for s in known],
        'strangers': [np.concatenate([strangers(s, i) for i in range(3)]) for s in known],
    }
    return {name: metric_correlation.score(np.stack(v) / 255, known) for name, v in videos.items()}


def mean(found, run, kind, name):
    return np.mean(found[run][kind][name])


def test_measured_features_rank_runs_as_the_exact_scores_do(found):
    for run in found:
        assert mean(found, run, 'measured', 'matches') == pytest.approx(
            mean(found, run, 'exact', 'action'), abs=0.03
        )
    assert (
        mean(found, 'right', 'exact', 'story') == 1
        and mean(found, 'right', 'measured', 'semantic') > 0.999
    )
    assert mean(found, 'leaking', 'exact', 'leak') > 0.95
    _, rows = metric_correlation.report(found)
    by_name = {(r['encoder'], r['exact'], r['metric']): r for r in rows}
    for pair in ('action', 'matches'), ('action', 'margin'), ('consistency', 'subject_between'):
        row = by_name['measured', *pair]
        assert (row['alike'], row['open'], row['reversed']) == (2, 0, 0) and row[
            'correlation'
        ] > 0.8


def test_an_encoder_that_sees_no_actions_does_not_tell_leaks(found):
    """Both encoders see other characters; only one that knows actions sees that these are another
    scene's."""

    def drop(kind, metric, run):
        return mean(found, 'right', kind, metric) - mean(found, run, kind, metric)

    assert (
        drop('pixels', 'subject_between', 'strangers')
        > 0.1
        < drop('measured', 'subject_between', 'strangers')
    )
    assert (
        0.005
        < drop('pixels', 'semantic', 'leaking')
        < 0.1
        < drop('measured', 'semantic', 'leaking')
    )


def test_compare_counts_pairs_and_correlates_ranks():
    low, high, middle = np.arange(8) / 100, 1 - np.arange(8) / 100, 0.5 + np.arange(8) / 100
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
    assert all(
        f'| {run} | {kind} |' in text for run in found for kind in ('exact', 'measured', 'pixels')
    )
    assert len(rows) == 2 * len(metric_correlation.FOLLOWS)
