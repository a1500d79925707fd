"""Logistic regression against scikit-learn; l2 is what held-out examples choose."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from supcon_jax import parallel
from supcon_jax.evaluation import logistic
from supcon_jax.evaluation.logistic import assign_folds, fit_classifier

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 160)
X = RNG.normal(size=(4, 6))[LABELS] + 1.2 * RNG.normal(size=(160, 6))
X = (X * [1, 1, 1, 5, 0.1, 1] + 3).astype(np.float32)


def scikit_learn(x, labels, l2):
    """The same problem: there the losses are summed, here their mean is taken."""
    model = LogisticRegression(
        C=1 / (l2 * len(x)), tol=1e-10, max_iter=500, solver="newton-cholesky"
    )
    return model.fit(x.astype(np.float64), labels)


def probabilities(found, x):
    logits = np.float64(x) @ found.kernel + found.bias
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def as_inside(x, labels):
    """Centred and divided by one number, as the regularisation sees features."""
    known = x[labels >= 0].astype(np.float64)
    scale = np.sqrt(known.var(axis=0).mean())
    return (x - known.mean(axis=0)) / scale


@pytest.mark.parametrize("l2", [10.0, 0.1, 1e-3, 1e-5])
def test_probabilities_are_those_of_scikit_learn(l2):
    found = fit_classifier(jnp.asarray(X), LABELS, num_classes=4, grid=(l2,))
    assert found.l2 == l2
    inside = as_inside(X, LABELS)
    expected = scikit_learn(inside, LABELS, l2).predict_proba(inside)
    np.testing.assert_allclose(probabilities(found, X), expected, atol=1e-4)


def test_l2_is_the_one_that_held_out_examples_choose():
    """Every value of the grid by scikit-learn, on the same folds."""
    grid = (0.1, 1e-3, 1e-4)
    found = fit_classifier(jnp.asarray(X), LABELS, num_classes=4, grid=grid)
    inside, folds = as_inside(X, LABELS), assign_folds(LABELS, 5, seed=0)
    losses = {}
    for l2 in found.validation_loss:
        total = 0.0
        for fold in range(5):
            held = folds == fold
            model = scikit_learn(inside[~held], LABELS[~held], l2)
            p = model.predict_proba(inside[held])
            total -= np.log(p[np.arange(held.sum()), LABELS[held]]).sum()
        losses[l2] = total / len(X)
    assert found.validation_loss == pytest.approx(losses, rel=1e-3)
    assert found.l2 == min(losses, key=losses.__getitem__)
    assert found.l2 not in (grid[0], grid[-1])


def test_size_and_place_of_features_change_nothing():
    found = fit_classifier(jnp.asarray(X), LABELS, num_classes=4)
    moved = fit_classifier(jnp.asarray(100 * X - 7), LABELS, num_classes=4)
    assert moved.l2 == found.l2
    np.testing.assert_allclose(
        probabilities(moved, 100 * X - 7), probabilities(found, X), atol=1e-4
    )


def test_unlabelled_examples_padding_and_devices_change_nothing():
    """167 rows on 8 devices are padded to 168."""
    labels = np.concatenate([LABELS, np.full(7, -1)])
    x = np.concatenate([X, RNG.normal(size=(7, 6)).astype(np.float32)])
    split = parallel.split_rows(x, parallel.create_mesh())
    assert split.shape == (168, 6) and len(split.sharding.device_set) == 8
    grid = (1e-1, 1e-2)
    found = fit_classifier(split, labels, num_classes=4, grid=grid)
    alone = fit_classifier(jnp.asarray(X), LABELS, num_classes=4, grid=grid)
    assert found.validation_loss == pytest.approx(alone.validation_loss, rel=1e-4)
    np.testing.assert_allclose(
        probabilities(found, X), probabilities(alone, X), atol=1e-5
    )


def test_folds_are_stratified():
    labels = np.array([0] * 10 + [1] * 5 + [2] * 3 + [3] + [-1] * 4)
    folds = assign_folds(labels, 5, seed=1)
    np.testing.assert_array_equal(np.bincount(folds[labels == 0]), [2] * 5)
    np.testing.assert_array_equal(np.bincount(folds[labels == 1]), [1] * 5)
    assert len(set(folds[labels == 2])) == 3
    assert set(folds[labels == 3]) == set(folds[labels == -1]) == {-1}


def test_one_example_of_each_class_is_enough():
    rows = [int(np.flatnonzero(LABELS == c)[0]) for c in range(4)]
    labels = np.full(160, -1)
    labels[rows] = range(4)
    found = fit_classifier(jnp.asarray(X), labels, num_classes=4)
    assert found.l2 == logistic.FALLBACK_L2 and not found.validation_loss
    np.testing.assert_array_equal(
        probabilities(found, X[rows]).argmax(axis=1), range(4)
    )


def test_features_that_are_all_equal_give_the_shares_of_the_classes():
    equal = np.ones((160, 6), np.float32)
    found = fit_classifier(jnp.asarray(equal), LABELS, num_classes=4, grid=(0.1,))
    shares = np.bincount(LABELS) / 160
    np.testing.assert_allclose(probabilities(found, equal[:1]), [shares], atol=1e-3)


def test_without_labels_it_is_refused():
    with pytest.raises(ValueError, match="no training image has a label"):
        fit_classifier(jnp.ones((4, 3)), np.full(4, -1), num_classes=2)
