"""Metrics in cases with known answers, and changes that must not affect them."""

import functools

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
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
    captions = np.array([[1, 0], [0, 1], [0, -1]])
    root = np.sqrt(0.5)

    assert metrics.visual_consistency(scenes, 'adjacent') == pytest.approx(root)
    assert metrics.visual_consistency(scenes, 'all') == pytest.approx(2 * root / 3)
    assert metrics.semantic_consistency(scenes, captions) == pytest.approx((1 + root - 1) / 3)


def test_sequence_consistency_is_that_of_the_papers_row():
    assert metrics.sequence_consistency(0.7095, 0.2394) == pytest.approx(0.47445)  # 47.45


def test_subject_consistency_by_hand():
    """Three frames that turn by 60 degrees: 60 and 120 from the first, 60 from the one before."""
    angles = np.pi / 3 * np.arange(3)
    turn = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert metrics.subject_within([turn]) == pytest.approx(((0.5 - 0.5) / 2 + 0.5) / 2)
    pairs = [a @ b for a in turn for b in turn[:2]]
    assert metrics.subject_between([turn, turn[:2]]) == pytest.approx(np.mean(pairs))


@settings(**SAFE)
@given(SEEDS, st.integers(2, 6))
def test_shuffled_captions_are_found_out(seed, count):
    """Scenes are their captions and some noise: the confusion matrix shows permuted captions."""
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
    """Scenes that all show the first caption's action look consistent."""
    character = np.ones((3, 1))
    actions = np.eye(3)
    captions = np.concatenate([character, actions], 1)
    leaked = np.concatenate([character, actions[[0, 0, 0]]], 1)

    assert metrics.visual_consistency(leaked) == pytest.approx(1)
    assert metrics.visual_consistency(captions) == pytest.approx(0.5)

    right = metrics.caption_cosines(captions, captions)
    assert metrics.caption_match_rate(right) == 1
    confusion = metrics.caption_cosines(leaked, captions)
    assert metrics.caption_match_rate(confusion) == pytest.approx(1 / 3)
    assert metrics.caption_margin(confusion) == pytest.approx(0)


def test_equal_captions_share_a_match():
    captions = np.array([[1.0, 2], [1, 2], [-2, 1]])
    confusion = metrics.caption_cosines(captions, captions)
    assert metrics.caption_matches(confusion).tolist() == [0.5, 0.5, 1]


def test_scenes_that_show_nothing_of_captions_match_by_chance():
    assert metrics.caption_match_rate(np.full((4, 4), 0.3)) == 1 / 4


@settings(**SAFE)
@given(SEEDS, st.integers(2, 5))
def test_cosines_know_directions_alone(seed, count):
    """Lengths and rotations do not matter, and with all pairs neither does the order of scenes."""
    scenes = normal(seed, count, 6)
    captions = normal(seed + 1, count, 6)
    turn, _ = np.linalg.qr(normal(seed, 6, 6))
    lengths = np.random.default_rng(seed).uniform(0.1, 10, (count, 1))
    order = np.random.default_rng(seed).permutation(count)

    for pairs in ('all', 'adjacent'):
        turned = metrics.visual_consistency(lengths * scenes @ turn, pairs)
        assert turned == pytest.approx(metrics.visual_consistency(scenes, pairs))

    shuffled = metrics.visual_consistency(scenes[order])
    assert shuffled == pytest.approx(metrics.visual_consistency(scenes))

    both = metrics.semantic_consistency(scenes[order] @ turn, captions[order] @ turn)
    assert both == pytest.approx(metrics.semantic_consistency(scenes, captions))


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
        lambda: frechet.frechet_video_distance([np.ones((1, 2))], np.ones((3, 2))),
        lambda: frechet.frechet_video_distance([np.ones((3, 3))], np.ones((3, 2))),
    ],
)
def test_what_has_no_answer_is_an_error(call):
    with pytest.raises(ValueError) as error:
        call()
    assert '\n' not in str(error.value)


@settings(**SAFE)
@given(SEEDS, st.integers(1, 6))
def test_frechet_distance_of_gaussians_in_closed_form(seed, size):
    """If the covariances share their axes, squared differences of means and deviations add up."""
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.normal(size=(size, size)))
    stds = rng.uniform(0, 3, (2, size))
    means = rng.normal(size=(2, size))
    a, b = (frechet.Moments(2, mean, axes * std**2 @ axes.T) for mean, std in zip(means, stds))

    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((stds[0] - stds[1]) ** 2)
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8, abs=1e-8)
    assert frechet.frechet_distance(b, a) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_frechet_distance_of_other_axes_is_that_of_scipy():
    """scipy computes the textbook form, with a general square root of a matrix."""
    a = frechet.moments(normal(0, 50, 5) @ normal(10, 5, 5))
    b = frechet.moments(normal(1, 50, 5) @ normal(11, 5, 5) + 1)

    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_few_samples_in_many_dimensions():
    """Two samples span a line, so that the covariances have rank one and known values."""
    a, b = np.zeros((2, 2, 50))
    a[1, 0] = 2  # mean 1, variance 2 on the first axis
    b[1, 1] = 4  # mean 2, variance 8 on the second axis
    assert frechet.frechet_video_distance([a], b) == pytest.approx(1 + 4 + 2 + 8)
    assert frechet.frechet_video_distance([a], a) == pytest.approx(0, abs=1e-6)


def test_frechet_video_distance_takes_videos_one_by_one_or_together():
    generated = normal(0, 20, 3)
    reference = normal(1, 30, 3) + 1
    together = frechet.frechet_video_distance([generated], reference)
    one_by_one = frechet.frechet_video_distance(np.split(generated, len(generated)), reference)
    assert one_by_one == pytest.approx(together)


@settings(**SAFE)
@given(SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_moments_of_parts_merge_to_those_of_the_whole(seed, sizes):
    """Also far from the origin, where sums of squares would lose all digits."""
    features = normal(seed, sum(sizes) + 2, 4) + 1e6
    parts = np.split(features, np.cumsum(sizes))
    merged = functools.reduce(frechet.merge, map(frechet.moments, parts))

    assert merged.count == len(features)
    np.testing.assert_allclose(merged.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(merged.covariance, np.cov(features.T), rtol=1e-6, atol=1e-9)


def still(levels, frames):
    """A video of gray scenes that do not move, uint8 [F, 4, 6, 3]."""
    gray = np.repeat(np.array(levels, np.uint8), frames)
    return np.broadcast_to(gray[:, None, None, None], (len(gray), 4, 6, 3))


def test_transitions_by_hand():
    change = cuts.transitions(still([0, 255, 204], [2, 1, 2]))
    assert change.tolist() == pytest.approx([0, 1, 0.2, 0])


def test_hard_cuts_between_still_scenes_are_perfect():
    frames = (3, 5, 2)
    scores = cuts.cut_scores(cuts.transitions(still([10, 90, 50], frames)), frames)
    assert scores['sharpness'].tolist() == [1, 1]
    assert scores['placed'].tolist() == [1, 1]
    assert scores['transition_deviation'].tolist() == [0, 0]


def test_no_cuts_are_seen_as_none():
    frames = (3, 5, 2)
    ramp = still(20 * np.arange(10), np.ones(10, int))  # every frame is brighter by the same step
    for video in (still([30, 30, 30], frames), ramp):
        scores = cuts.cut_scores(cuts.transitions(video), frames)
        np.testing.assert_allclose(scores['sharpness'], 0, atol=1e-12)
        assert scores['placed'].tolist() == [0, 0]
        assert scores['transition_deviation'].tolist() == [2, 2]  # as far as half way to the other


def test_cuts_in_the_wrong_place():
    """One cut is where the layout says; the other is a frame late, so that its border is still."""
    scores = cuts.cut_scores(cuts.transitions(still([10, 90, 50], (4, 5, 3))), (4, 4, 4))
    assert scores['placed'].tolist() == [1, 0]
    assert scores['sharpness'].tolist() == [1, -1]
    assert scores['transition_deviation'].tolist() == [0, 1]


@pytest.mark.parametrize('late', [-3, -2, -1, 0, 1, 2, 3])
def test_transition_deviation_is_how_many_frames_a_cut_is_late_or_early(late):
    video = still([10, 90, 50], (8 + late, 8 - late, 8))
    deviation = cuts.cut_scores(cuts.transitions(video), (8, 8, 8))['transition_deviation']
    assert deviation.tolist() == [abs(late), 0]


def test_cut_by_hand_and_invisible_changes():
    change = [0.1, 0.3, 0.1, 0.001, 0.1]
    scores = cuts.cut_scores(change, (2, 2, 2))
    assert scores['sharpness'].tolist() == pytest.approx([(0.3 - 0.1) / 0.4, -1])
    assert scores['placed'].tolist() == [1, 0]
    # Of the second and the third change, which are as near to the second border, one is as large as
    # the last one.
    assert scores['transition_deviation'].tolist() == [0, 1]


def test_a_border_has_its_place_if_fewer_changes_inside_rival_it_than_there_are_borders():
    frames = (2, 2, 2)
    two_rivals = cuts.cut_scores([0.3, 0.3, 0.3, 0.3, 0.1], frames)
    assert two_rivals['placed'].tolist() == [0, 0]
    one_rival = cuts.cut_scores([0.3, 0.3, 0.2, 0.3, 0.1], frames)
    assert one_rival['placed'].tolist() == [1, 1]


@settings(**SAFE)
@given(SEEDS, st.floats(1, 50), st.lists(st.integers(2, 6), min_size=2, max_size=5))
def test_cut_scores_know_no_brightness_nor_direction_of_time(seed, factor, frames):
    change = np.random.default_rng(seed).uniform(0.01, 0.02, sum(frames) - 1)
    scores = cuts.cut_scores(change, frames)
    scaled = cuts.cut_scores(factor * change, frames)
    backwards = cuts.cut_scores(change[::-1], frames[::-1])
    for name in scores:
        np.testing.assert_allclose(scaled[name], scores[name], atol=1e-9)
        np.testing.assert_allclose(backwards[name][::-1], scores[name], atol=1e-9)


def test_bootstrap_interval_is_the_normal_one_for_many_values():
    values = normal(0, 400)
    low, high = metrics.bootstrap(values, 1)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_bootstrap_interval_is_that_of_scipy():
    values = normal(0, 30)
    for level in (0.5, 0.95):
        expected = scipy.stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=2000,
            confidence_level=level,
            method='percentile',
            random_state=np.random.default_rng(1),
        ).confidence_interval
        assert metrics.bootstrap(values, 1, level=level) == pytest.approx(tuple(expected))


def test_bootstrap_depends_on_nothing_but_values_and_seed():
    values = normal(0, 400)
    assert metrics.bootstrap(values, 1) == metrics.bootstrap(values, 1)
    assert metrics.bootstrap(values, 1) != metrics.bootstrap(values, 2)


def test_bootstrap_of_equal_values_and_of_one():
    assert metrics.bootstrap([3.0, 3, 3], 0) == (3, 3)
    assert metrics.bootstrap([3.0], 0) is None
