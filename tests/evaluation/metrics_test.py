"""Metrics on cases with known answers, and what must not change them."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mask2dit_jax.evaluation import cuts, frechet, metrics

SEEDS = st.integers(0, 2**32 - 1)
SAFE = {'deadline': None, 'max_examples': 25}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_identical_scenes_are_fully_consistent_and_orthogonal_ones_not_at_all():
    same = np.ones((4, 3))
    assert metrics.visual_consistency(same) == pytest.approx(1)
    assert metrics.visual_consistency(same, 'adjacent') == pytest.approx(1)
    assert metrics.visual_consistency(np.eye(4)) == 0
    assert metrics.subject_within([np.ones((5, 2)), np.ones((2, 2))]) == pytest.approx(1)
    assert metrics.subject_between([np.ones((5, 2)), np.ones((2, 2))]) == pytest.approx(1)


def test_pairs_by_hand():
    scenes = np.array([[1, 0], [1, 1], [0, 2]])
    root = np.sqrt(0.5)
    assert metrics.visual_consistency(scenes, 'adjacent') == pytest.approx(root)
    assert metrics.visual_consistency(scenes, 'all') == pytest.approx(2 * root / 3)
    captions = np.array([[1, 0], [0, 1], [0, -1]])
    assert metrics.semantic_consistency(scenes, captions) == pytest.approx((1 + root - 1) / 3)
    assert metrics.sequence_consistency(0.7095, 0.2394) == pytest.approx(
        0.47445
    )  # the paper's row, 47.45


def test_subject_consistency_by_hand():
    """Three frames that turn by 60 degrees: 60 and 120 from the first, 60 from the one before."""
    turn = np.array([[np.cos(a), np.sin(a)] for a in np.pi / 3 * np.arange(3)])
    assert metrics.subject_within([turn]) == pytest.approx(((0.5 - 0.5) / 2 + 0.5) / 2)
    pairs = [a @ b for a in turn for b in turn[:2]]
    assert metrics.subject_between([turn, turn[:2]]) == pytest.approx(np.mean(pairs))


@settings(**SAFE)
@given(SEEDS, st.integers(2, 6))
def test_shuffled_captions_are_found_out(seed, count):
    """Features of captions plus noise that is smaller than their distance: the matrix shows the
    permutation."""
    captions = np.linalg.qr(normal(seed, 16, 16))[0][:count]
    scenes = 3 * captions + 0.1 * normal(seed + 1, count, 16)
    right = metrics.caption_cosines(scenes, captions)
    assert metrics.caption_matches(right).tolist() == [1] * count
    order = np.roll(np.arange(count), 1)
    wrong = metrics.caption_cosines(scenes, captions[order])
    np.testing.assert_allclose(wrong, right[:, order])
    assert not metrics.caption_matches(wrong).any()
    assert metrics.caption_margin(wrong) < 0 < metrics.caption_margin(right)


def test_captions_that_leak_raise_visual_consistency_and_lower_matches():
    """Features of character and action: that all scenes show the first caption's action looks
    consistent."""
    character, actions = np.ones((3, 1)), np.eye(3)
    captions = np.concatenate([character, actions], 1)
    leaked = np.concatenate([character, actions[[0, 0, 0]]], 1)
    assert metrics.visual_consistency(leaked) == pytest.approx(1)
    assert metrics.visual_consistency(captions) == pytest.approx(0.5)
    assert metrics.caption_matches(metrics.caption_cosines(captions, captions)).mean() == 1
    confusion = metrics.caption_cosines(leaked, captions)
    assert metrics.caption_matches(confusion).mean() == pytest.approx(1 / 3)
    assert metrics.caption_margin(confusion) == pytest.approx(0)


def test_equal_captions_share_a_match():
    captions = np.array([[1.0, 2], [1, 2], [-2, 1]])
    assert metrics.caption_matches(metrics.caption_cosines(captions, captions)).tolist() == [
        0.5,
        0.5,
        1,
    ]
    assert metrics.caption_matches(np.full((4, 4), 0.3)).mean() == 1 / 4


@settings(**SAFE)
@given(SEEDS, st.integers(2, 5))
def test_cosines_know_directions_alone(seed, count):
    """Neither lengths nor a rotation of the space matter, nor, for all pairs, the order of
    scenes."""
    scenes, captions, turn = (
        normal(seed, count, 6),
        normal(seed + 1, count, 6),
        np.linalg.qr(normal(seed, 6, 6))[0],
    )
    lengths = np.random.default_rng(seed).uniform(0.1, 10, (count, 1))
    order = np.random.default_rng(seed).permutation(count)
    for pairs in ('all', 'adjacent'):
        assert metrics.visual_consistency(lengths * scenes @ turn, pairs) == pytest.approx(
            metrics.visual_consistency(scenes, pairs)
        )
    assert metrics.visual_consistency(scenes[order]) == pytest.approx(
        metrics.visual_consistency(scenes)
    )
    assert metrics.semantic_consistency(
        scenes[order] @ turn, captions[order] @ turn
    ) == pytest.approx(metrics.semantic_consistency(scenes, captions))


@pytest.mark.parametrize(
    'call',
    [
        lambda: metrics.visual_consistency(np.ones((1, 3))),
        lambda: metrics.unit(np.zeros(3)),
        lambda: metrics.unit([1, np.nan]),
        lambda: metrics.caption_cosines(np.ones((2, 3)), np.ones((3, 3))),
        lambda: metrics.caption_cosines(np.ones((2, 3)), np.ones((2, 4))),
        lambda: metrics.subject_within([np.ones((1, 3))]),
        lambda: cuts.transitions(np.zeros((2, 1, 1, 3))),
        lambda: cuts.cut_scores(np.ones(3), (2, 3)),
        lambda: cuts.cut_scores(np.ones(3), (1, 1, 2)),
        lambda: frechet.frechet_distance(
            frechet.moments(np.ones((1, 2))), frechet.moments(np.ones((3, 2)))
        ),
        lambda: frechet.frechet_distance(
            frechet.moments(np.ones((3, 3))), frechet.moments(np.ones((3, 2)))
        ),
    ],
)
def test_what_has_no_answer_is_an_error(call):
    with pytest.raises(ValueError) as error:
        call()
    assert '\n' not in str(error.value)


@settings(**SAFE)
@given(SEEDS, st.integers(1, 6))
def test_frechet_distance_of_gaussians_in_closed_form(seed, size):
    """Covariances with the same axes: the sum of squared differences of means and of standard
    deviations."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(size, size)))[0]
    stds, means = rng.uniform(0, 3, (2, size)), rng.normal(size=(2, size))
    a, b = (frechet.Moments(2, mean, axes * std**2 @ axes.T) for mean, std in zip(means, stds))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((stds[0] - stds[1]) ** 2)
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8, abs=1e-8)
    assert frechet.frechet_distance(b, a) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_frechet_distance_of_other_axes_is_that_of_scipy():
    """Against the textbook form, a general matrix square root; scipy comes with jax."""
    import scipy.linalg

    a, b = (frechet.moments(normal(s, 50, 5) @ normal(s + 10, 5, 5) + s) for s in (0, 1))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_few_samples_in_many_dimensions():
    """Two samples span a line: covariances of rank one, of which everything is known."""
    a, b = np.zeros((2, 2, 50))
    a[1, 0], b[1, 1] = 2, 4  # covariances 2 and 8 along two axes, means half way
    assert frechet.frechet_distance(frechet.moments(a), frechet.moments(b)) == pytest.approx(
        1 + 4 + 2 + 8
    )
    assert frechet.frechet_distance(frechet.moments(a), frechet.moments(a)) == pytest.approx(
        0, abs=1e-6
    )


@settings(**SAFE)
@given(SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_streaming_is_the_whole(seed, sizes):
    """Batches merge to numpy's mean and covariance, also far from the origin, where sums of squares
    would fail."""
    features = normal(seed, sum(sizes) + 2, 4) + 1e6
    parts = np.split(features, np.cumsum(sizes))
    merged = functools.reduce(frechet.merge, map(frechet.moments, parts))
    assert merged.count == len(features)
    np.testing.assert_allclose(merged.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(merged.covariance, np.cov(features.T), rtol=1e-6, atol=1e-9)


def still(levels, frames):
    """A video of grey scenes that do not move."""
    return np.repeat(np.array(levels, np.uint8), frames)[:, None, None, None] * np.ones(
        (1, 4, 6, 3), np.uint8
    )


def test_transitions_by_hand():
    assert cuts.transitions(still([0, 255, 204], [2, 1, 2])).tolist() == pytest.approx(
        [0, 1, 0.2, 0]
    )


def test_hard_cuts_between_still_scenes_are_perfect():
    frames = (3, 5, 2)
    scores = cuts.cut_scores(cuts.transitions(still([10, 90, 50], frames)), frames)
    assert scores['sharpness'].tolist() == [1, 1] and scores['placed'].tolist() == [1, 1]


def test_no_cuts_are_seen_as_none():
    frames = (3, 5, 2)
    ramp = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.full((1, 4, 6, 3), 20, np.uint8)
    for video in (still([30, 30, 30], frames), ramp):
        scores = cuts.cut_scores(cuts.transitions(video), frames)
        np.testing.assert_allclose(scores['sharpness'], 0, atol=1e-12)
        assert scores['placed'].tolist() == [0, 0]


def test_cuts_in_the_wrong_place():
    """One cut of two is where the layout says; the other, a frame late, makes its border the
    stillest place."""
    scores = cuts.cut_scores(cuts.transitions(still([10, 90, 50], (4, 5, 3))), (4, 4, 4))
    assert scores['placed'].tolist() == [1, 0]
    assert scores['sharpness'].tolist() == [1, -1]


def test_cut_by_hand_and_invisible_changes():
    change = [0.1, 0.3, 0.1, 0.001, 0.1]
    scores = cuts.cut_scores(change, (2, 2, 2))
    assert scores['sharpness'].tolist() == pytest.approx([(0.3 - 0.1) / 0.4, -1])
    assert scores['placed'].tolist() == [1, 0]
    assert cuts.cut_scores([0.3, 0.3, 0.3, 0.3, 0.1], (2, 2, 2))['placed'].tolist() == [
        0,
        0,
    ]  # two rivals for two places
    assert cuts.cut_scores([0.3, 0.3, 0.2, 0.3, 0.1], (2, 2, 2))['placed'].tolist() == [1, 1]


@settings(**SAFE)
@given(SEEDS, st.floats(1, 50), st.lists(st.integers(2, 6), min_size=2, max_size=5))
def test_cut_scores_know_no_brightness_nor_direction_of_time(seed, factor, frames):
    change = np.random.default_rng(seed).uniform(0.01, 0.02, sum(frames) - 1)
    scores, scaled = cuts.cut_scores(change, frames), cuts.cut_scores(factor * change, frames)
    backwards = cuts.cut_scores(change[::-1], frames[::-1])
    for name in scores:
        np.testing.assert_allclose(scaled[name], scores[name], atol=1e-9)
        np.testing.assert_allclose(backwards[name][::-1], scores[name], atol=1e-9)


def test_bootstrap_interval_is_the_normal_one_for_many_values_and_the_same_for_a_seed():
    values = normal(0, 400)
    low, high = metrics.bootstrap(values, 1)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert metrics.bootstrap(values, 1) == (low, high) != metrics.bootstrap(values, 2)
    assert metrics.bootstrap([3.0, 3, 3], 0) == (3, 3)
    assert metrics.bootstrap([3.0], 0) is None
