"""Calibration against loops and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from supcon_jax.evaluation import calibration as cal

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.normal(size=(500, 4))
P = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
LABELS = np.array([RNG.choice(4, p=p) for p in P**0.5 / (P**0.5).sum(1, keepdims=True)])


def test_likelihood_equals_scikit_learn():
    ours = cal.negative_log_likelihood(LOGITS, LABELS)
    np.testing.assert_allclose(ours, log_loss(LABELS, P), rtol=1e-9)


def test_brier_score_equals_scikit_learn():
    """Which has it for each class by itself."""
    theirs = sum(brier_score_loss(LABELS == c, P[:, c]) for c in range(4))
    np.testing.assert_allclose(cal.brier_score(LOGITS, LABELS), theirs, rtol=1e-9)


def bins_by_hand(confidence, correct, bins=15):
    """The definition, one prediction at a time."""
    groups = {}
    for c, right in zip(confidence, correct, strict=True):
        number = next(b for b in range(bins) if c <= (b + 1) / bins or b == bins - 1)
        groups.setdefault(number, []).append((c, right))
    return groups


def error_by_hand(groups):
    count = sum(map(len, groups.values()))
    return sum(abs(sum(r - c for c, r in group)) / count for group in groups.values())


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_expected_calibration_error_equals_a_loop(bins):
    groups = bins_by_hand(P.max(1), P.argmax(1) == LABELS, bins)
    ours = cal.expected_calibration_error(LOGITS, LABELS, bins=bins)
    np.testing.assert_allclose(ours, error_by_hand(groups), rtol=1e-9)


def test_adaptive_error_equals_a_loop():
    """15 bins of 33 or 34 predictions, in order of confidence."""
    pairs = sorted(zip(P.max(1), P.argmax(1) == LABELS, strict=True))
    groups, begin = {}, 0
    for number in range(15):
        end = begin + (34 if number < 500 % 15 else 33)
        groups[number], begin = pairs[begin:end], end
    ours = cal.adaptive_calibration_error(LOGITS, LABELS)
    np.testing.assert_allclose(ours, error_by_hand(groups), rtol=1e-9)


def test_classwise_error_equals_a_loop():
    errors = [error_by_hand(bins_by_hand(P[:, c], LABELS == c)) for c in range(4)]
    ours = cal.classwise_calibration_error(LOGITS, LABELS)
    np.testing.assert_allclose(ours, np.mean(errors), rtol=1e-9)


def test_confidence_at_the_edges_of_bins():
    """0 and 1 have a bin; an edge belongs to the bin below it."""
    counts, mean, share = cal.reliability(
        np.array([0.0, 0.5, 0.5 + 1e-9, 1.0]), np.array([1, 0, 1, 1]), bins=2
    )
    assert counts.tolist() == [2, 2]
    np.testing.assert_allclose(mean, [0.25, 0.75], atol=1e-8)
    np.testing.assert_allclose(share, [0.5, 1.0])
    counts, mean, _ = cal.reliability(np.array([0.9]), np.array([1]), bins=3)
    assert counts.tolist() == [0, 0, 1] and np.isnan(mean[:2]).all()


def test_errors_of_a_calibrated_and_of_a_sure_classifier():
    sure = np.array([[50.0, -50.0]] * 10)
    half = np.arange(10) % 2
    for error in (cal.expected_calibration_error, cal.adaptive_calibration_error):
        np.testing.assert_allclose(error(sure, half), 0.5, atol=1e-9)
    np.testing.assert_allclose(cal.classwise_calibration_error(sure, half), 0.5)
    even = np.zeros((10, 2))
    np.testing.assert_allclose(cal.expected_calibration_error(even, half), 0, atol=1e-9)


def test_temperature_is_the_best_one():
    """Against a fine grid; and labels drawn at temperature 2 give back 2."""
    fitted = cal.fit_temperature(LOGITS, LABELS)
    grid = np.exp(np.linspace(-1, 2, 3001))
    losses = [
        cal.negative_log_likelihood(LOGITS, LABELS, temperature=float(t)) for t in grid
    ]
    np.testing.assert_allclose(fitted, grid[np.argmin(losses)], rtol=2e-3)
    assert 1.6 < fitted < 2.4
    np.testing.assert_allclose(cal.fit_temperature(LOGITS / fitted, LABELS), 1, 1e-3)


def test_few_examples_that_are_all_recognised_do_not_make_sure():
    """Platt's targets, by a loop over a grid; n examples leave 1 / (n + 2) open."""
    labels = np.arange(14) % 3
    logits = np.random.default_rng(0).normal(size=(14, 3)) + 9 * np.eye(3)[labels]
    grid = np.exp(np.linspace(-4, 4, 4001))
    losses = []
    for temperature in grid:
        p = np.exp(logits / temperature)
        p /= p.sum(axis=1, keepdims=True)
        loss = 0.0
        for row, label in enumerate(labels):
            for c in range(3):
                target = 15 / 16 if c == label else 1 / 32
                loss -= target * np.log(p[row, c])
        losses.append(loss)
    fitted = cal.fit_temperature(logits, labels, smooth=True)
    np.testing.assert_allclose(fitted, grid[np.argmin(losses)], rtol=3e-3)
    p = np.exp(cal.log_probabilities(logits, temperature=fitted)).max(axis=1)
    np.testing.assert_allclose(p.mean(), 15 / 16, atol=0.01)
    assert cal.fit_temperature(logits, labels) < 0.1  # nothing is lost any more


def test_halves_are_scaled_by_the_temperature_of_the_other():
    scaled, mean = cal.scale_by_halves(LOGITS, LABELS, seed=3)
    order = np.random.default_rng(3).permutation(500)
    first, second = order[:250], order[250:]
    t_first, t_second = (
        cal.fit_temperature(LOGITS[half], LABELS[half]) for half in (first, second)
    )
    np.testing.assert_allclose(scaled[first], LOGITS[first] / t_second)
    np.testing.assert_allclose(scaled[second], LOGITS[second] / t_first)
    np.testing.assert_allclose(mean, np.sqrt(t_first * t_second))
    before = cal.negative_log_likelihood(LOGITS, LABELS)
    assert cal.negative_log_likelihood(scaled, LABELS) < before
    assert (scaled.argmax(1) == LOGITS.argmax(1)).all()


def test_large_logits_overflow_nowhere():
    huge = np.array([[1e4, -1e4], [-1e4, 1e4]])
    labels = np.array([0, 1])
    assert cal.negative_log_likelihood(huge, labels) == 0
    assert cal.brier_score(huge, labels) == 0
    assert np.isfinite(cal.fit_temperature(huge, labels))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_without_finite_logits_is_wrong_and_leaves_the_others(value):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 3)), rng.integers(0, 3, 40)
    broken = np.concatenate([logits, [[0, value, 0]]])
    with_it = np.append(labels, 1)
    for error in (
        cal.expected_calibration_error,
        cal.adaptive_calibration_error,
        cal.classwise_calibration_error,
    ):
        assert 0 <= error(broken, with_it) < 1
    np.testing.assert_allclose(
        cal.expected_calibration_error(broken, with_it),
        cal.expected_calibration_error(logits, labels) * 40 / 41,
    )
    counts, mean, share = cal.reliability(
        np.array([value, 0.9]), np.array([True, True]), bins=2
    )
    assert (counts.tolist(), mean.tolist(), share.tolist()) == (
        [1, 1],
        [0.0, 0.9],
        [0.0, 1.0],
    )
    assert cal.fit_temperature(broken, with_it) == (cal.fit_temperature(logits, labels))
    assert cal.fit_temperature(broken[-1:], with_it[-1:]) == 1.0
