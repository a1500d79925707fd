"""mCE and relative mCE against loops, and against what papers printed."""

import numpy as np
import pytest

from supcon_jax.evaluation.corruption import (
    ALEXNET,
    CORRUPTIONS,
    PUBLISHED,
    SEVERITIES,
    Reference,
    corruption_errors,
    mean_corruption_error,
    relative_corruption_errors,
    relative_mean_corruption_error,
)


def test_both_against_a_loop():
    rng = np.random.default_rng(0)
    errors = {name: rng.uniform(0.3, 0.9, 5).tolist() for name in CORRUPTIONS}
    theirs = {name: rng.uniform(0.5, 0.9, 5).tolist() for name in CORRUPTIONS}
    clean, their_clean = 0.2, 0.4
    ratios, relative = [], []
    for name in CORRUPTIONS:
        ours_sum = their_sum = our_rise = their_rise = 0.0
        for severity in range(5):
            ours_sum += errors[name][severity]
            their_sum += theirs[name][severity]
            our_rise += errors[name][severity] - clean
            their_rise += theirs[name][severity] - their_clean
        ratios.append(ours_sum / their_sum)
        relative.append(our_rise / their_rise)
    reference = Reference(
        "theirs", {name: np.mean(e) for name, e in theirs.items()}, their_clean
    )
    found = corruption_errors(errors, reference)
    assert list(found.values()) == pytest.approx(ratios, abs=1e-12)
    assert mean_corruption_error(errors, reference) == pytest.approx(
        sum(ratios) / 15, abs=1e-12
    )
    found = relative_corruption_errors(errors, clean, reference)
    assert list(found.values()) == pytest.approx(relative, abs=1e-12)
    assert relative_mean_corruption_error(errors, clean, reference) == pytest.approx(
        sum(relative) / 15, abs=1e-12
    )


def test_alexnet_is_its_own_measure():
    errors = {name: [error] * 5 for name, error in ALEXNET.errors.items()}
    assert mean_corruption_error(errors, ALEXNET) == pytest.approx(1)
    found = relative_mean_corruption_error(errors, ALEXNET.clean, ALEXNET)
    assert found == pytest.approx(1)
    assert len(CORRUPTIONS) == 15 and SEVERITIES == (1, 2, 3, 4, 5)
    assert np.mean(list(ALEXNET.errors.values())) == pytest.approx(0.78899, abs=5e-6)


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("SupCon R50", 67.5), ("SupCon R200", 50.5), ("CE R50", 68.7), ("CE R200", 52.3)],
)
def test_table_6_of_the_paper_gives_its_figure_3(name, ratio):
    """Table 6 has no corruptions, so each is taken to be as hard as it is for AlexNet.

    That gives the mean error by AlexNet's, to the printed digit, and the printed mCE to
    0.3 points; the rest is that a mean of ratios is no ratio of means.
    """
    published = PUBLISHED[name]
    share = (1 - np.mean(published.top1[1:])) / np.mean(list(ALEXNET.errors.values()))
    errors = {c: [share * error] * 5 for c, error in ALEXNET.errors.items()}
    found = 100 * mean_corruption_error(errors, ALEXNET)
    assert round(found, 1) == ratio
    assert abs(found - 100 * published.mce) < 0.31


def test_nothing_to_divide_by_is_no_number():
    errors = {"fog": [0.5] * 5, "snow": [0.6] * 5}
    reference = Reference("r", {"fog": 0.1, "snow": 0.0}, 0.1)
    assert corruption_errors(errors, reference)["fog"] == pytest.approx(5)
    assert np.isnan(mean_corruption_error(errors, reference))
    assert np.isnan(relative_corruption_errors(errors, 0.2, reference)["fog"])
