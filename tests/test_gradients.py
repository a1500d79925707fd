"""The parts of pairs in the gradient, against automatic differentiation; the tool."""

import functools

import jax
import numpy as np
import pytest

from supcon_jax import supcon_loss
from supcon_jax.evaluation.gradients import anchor_gradients, pair_gradients


def batch(seed=0, count=12, dimension=6):
    """Projections of any length, and labels of which one stands alone."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    labels[0] = 7
    return rng.normal(size=(count, dimension)) * rng.uniform(0.3, 3, (count, 1)), labels


@pytest.mark.parametrize("summation", ["outside", "inside"])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_parts_add_up_to_the_gradient(summation, temperature):
    """Of each anchor's loss alone, and of the whole loss with both roles of a view."""
    options = {"temperature": temperature, "summation": summation}
    w, labels = batch()
    pairs = pair_gradients(w, labels, **options)

    def losses(w, reduction):
        return supcon_loss(w[:, None], labels, reduction=reduction, **options)

    with jax.enable_x64(True):
        # What an anchor's own projection changes of its own loss.
        jacobian = np.asarray(
            jax.jacrev(functools.partial(losses, reduction="none"))(w)
        )
        own = jacobian[np.arange(len(w)), np.arange(len(w))]
        whole = np.asarray(jax.grad(functools.partial(losses, reduction="mean"))(w))
    assert own.dtype == np.float64
    np.testing.assert_allclose(
        anchor_gradients(w, pairs.weight), own, rtol=1e-6, atol=1e-12
    )
    both = (pairs.weight + pairs.weight.T) / np.sum(pairs.positive.any(axis=1))
    np.testing.assert_allclose(anchor_gradients(w, both), whole, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("summation", ["outside", "inside"])
def test_norms_are_those_of_single_parts(summation):
    """A loop over pairs, with the vectors written out."""
    w, labels = batch(1)
    pairs = pair_gradients(w, labels, temperature=0.2, summation=summation)
    z = [row / np.sqrt(np.sum(row * row)) for row in w]
    for i in range(len(w)):
        for j in range(len(w)):
            tangent = z[j] - np.dot(z[i], z[j]) * z[i]
            part = pairs.weight[i, j] * tangent / np.sqrt(np.sum(w[i] * w[i]))
            np.testing.assert_allclose(
                pairs.norm[i, j], np.sqrt(np.sum(part * part)), atol=1e-9
            )
            same = i != j and labels[i] == labels[j]
            assert pairs.positive[i, j] == same
            assert pairs.negative[i, j] == (i != j and not same)
    assert not pairs.norm[0].any()  # its label stands alone: no loss, no gradient
    assert np.all(pairs.weight[pairs.negative] >= 0)


def test_easy_pairs_give_nothing_and_another_sum_is_refused():
    w = np.array([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    pairs = pair_gradients(w, np.array([0, 0, 0, 1]))
    assert pairs.norm[0, 1] == 0  # the same direction
    assert pairs.norm[0, 3] == 0  # the opposite one
    assert pairs.norm[0, 2] > 1  # a hard positive
    with pytest.raises(ValueError, match="'outside' or 'inside'; got 'both'"):
        pair_gradients(w, np.zeros(4), summation="both")
