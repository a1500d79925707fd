"""Cross-entropy against its definition, term by term."""

import doctest
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax.losses import cross_entropy
from supcon_jax.losses.cross_entropy import (
    cross_entropy_loss,
    cross_entropy_of_views,
    logit_adjustment,
)


def loop_cross_entropy(logits, labels, smoothing):
    losses = []
    for row, label in zip(np.asarray(logits, np.float64), labels, strict=True):
        log_total = math.log(sum(math.exp(value) for value in row))
        loss = 0.0
        for c, value in enumerate(row):
            target = (1 - smoothing) * (c == label) + smoothing / len(row)
            loss -= target * (value - log_total)
        losses.append(loss)
    return losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_equals_the_definition(smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 5)).astype(np.float32) * 3
    labels = np.array([0, 4, 2, 2, 1, 3])
    losses = cross_entropy_loss(logits, labels, label_smoothing=smoothing)
    assert losses.shape == (6,) and losses.dtype == jnp.float32
    np.testing.assert_allclose(
        losses, loop_cross_entropy(logits, labels, smoothing), rtol=1e-5
    )


def test_analytic_values():
    """One logit ahead by g: `log(1 + (C-1) e^-g)`, plus `s g (C-1)/C` smoothed."""
    gap, classes, smoothing = 2.0, 4, 0.2
    logits = jnp.zeros((1, classes)).at[0, 1].set(gap)
    plain = math.log(1 + (classes - 1) * math.exp(-gap))
    label = jnp.array([1])
    np.testing.assert_allclose(cross_entropy_loss(logits, label)[0], plain, rtol=1e-6)
    np.testing.assert_allclose(
        cross_entropy_loss(logits, label, label_smoothing=smoothing)[0],
        plain + smoothing * gap * (classes - 1) / classes,
        rtol=1e-6,
    )


def test_gradient_is_softmax_minus_target():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, 4)).astype(np.float32)
    labels = np.array([3, 0, 1])
    gradient = jax.grad(
        lambda x: jnp.sum(cross_entropy_loss(x, labels, label_smoothing=0.1))
    )(logits)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = 0.9 * np.eye(4)[labels] + 0.1 / 4
    np.testing.assert_allclose(gradient, softmax - target, atol=1e-6)


def test_large_and_low_precision_logits():
    """A million apart stays finite; bfloat16 logits are summed in float32."""
    far = jnp.array([[1e6, 0.0], [0.0, 1e6]])
    np.testing.assert_allclose(cross_entropy_loss(far, jnp.array([0, 0])), [0, 1e6])
    # 1,000 equal logits: bfloat16 sums would miss log(1000) by several percent.
    losses = cross_entropy_loss(jnp.ones((1, 1000), jnp.bfloat16), jnp.array([0]))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, math.log(1000), rtol=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels"), [((2, 3), (3,)), ((2, 3), (2, 1)), ((2, 2, 3), (2,))]
)
def test_refuses_shapes_that_do_not_fit(logits, labels):
    with pytest.raises(ValueError, match=r"expected \[N, C\] and \[N\]"):
        cross_entropy_loss(jnp.zeros(logits), jnp.zeros(labels, jnp.int32))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_refuses_smoothing_outside_its_range(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        cross_entropy_loss(
            jnp.zeros((1, 2)), jnp.zeros(1, jnp.int32), label_smoothing=smoothing
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_shares_of_classes(smoothing):
    """One-hot shares are the integer labels; mixtures weigh the losses of each."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    labels, others = jnp.array([0, 2, 1, 1]), jnp.array([1, 2, 0, 2])
    loss = functools.partial(cross_entropy_loss, label_smoothing=smoothing)
    np.testing.assert_allclose(
        loss(logits, jax.nn.one_hot(labels, 3)), loss(logits, labels), rtol=1e-6
    )
    mixture = 0.3 * jax.nn.one_hot(labels, 3) + 0.7 * jax.nn.one_hot(others, 3)
    expected = 0.3 * loss(logits, labels) + 0.7 * loss(logits, others)
    np.testing.assert_allclose(loss(logits, mixture), expected, rtol=1e-5)


def test_docstring_example():
    assert doctest.testmod(cross_entropy).failed == 0


def test_cross_entropy_of_views_against_a_loop():
    logits = jax.random.normal(jax.random.key(0), (3, 2, 4))
    labels = jnp.array([0, 3, 1])
    loss, metrics = cross_entropy_of_views(logits, labels)
    expected, hits = [], []
    for b in range(3):
        for v in range(2):
            row = np.asarray(logits[b, v], np.float64)
            expected.append(np.log(np.exp(row).sum()) - row[int(labels[b])])
            hits.append(row.argmax() == int(labels[b]))
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-6)
    assert float(metrics["top1"]) == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_images_without_a_label_do_not_count(smoothing):
    """Loss, accuracy and gradient are those of the labelled images alone."""
    logits = jax.random.normal(jax.random.key(0), (5, 2, 4))
    labels, labelled = jnp.array([-1, 0, 3, -7, 1]), jnp.array([1, 2, 4])
    loss = functools.partial(cross_entropy_of_views, label_smoothing=smoothing)
    expected, metrics = loss(logits[labelled], labels[labelled])
    got, found = loss(logits, labels)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(found["top1"], metrics["top1"], rtol=1e-6)
    gradient = jax.grad(lambda x: loss(x, labels)[0])(logits)
    assert np.all(gradient[jnp.array([0, 3])] == 0)
    # As shares of the classes (Mixup): what is mixed with such an image has none either.
    shares = jax.nn.one_hot(labels, 4).at[1].set(jnp.array([0.4, 0.0, 0.0, 0.0]))
    expected, _ = loss(logits[2::2], labels[2::2])
    np.testing.assert_allclose(loss(logits, shares)[0], expected, rtol=1e-6)


def test_a_batch_without_labels_gives_zero():
    logits = jax.random.normal(jax.random.key(0), (2, 2, 3))
    loss, metrics = cross_entropy_of_views(logits, jnp.array([-1, -1]))
    assert float(loss) == float(metrics["top1"]) == 0
    gradient = jax.grad(lambda x: cross_entropy_of_views(x, jnp.array([-1, -1]))[0])
    assert np.all(gradient(logits) == 0)


def test_with_all_labels_the_mean_is_the_plain_one_bit_for_bit():
    logits = jax.random.normal(jax.random.key(1), (37, 2, 10))
    labels = jnp.arange(37) % 10
    rows = logits.reshape(-1, 10)
    plain = jnp.sum(cross_entropy_loss(rows, jnp.repeat(labels, 2))) / 74
    np.testing.assert_array_equal(cross_entropy_of_views(logits, labels)[0], plain)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_logit_adjustment_is_a_margin_for_every_pair_of_classes(tau):
    """The paper's Eq. 11: `log(1 + sum_c' (pi_c' / pi_y)^tau e^(f_c' - f_y))`."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(7, 2, 4)).astype(np.float32)
    labels, counts = np.array([0, 3, 1, 2, 2, -1, 1]), np.array([60, 25, 10, 5])
    found, metrics = cross_entropy_of_views(
        logits, labels, logit_offset=logit_adjustment(counts, tau)
    )
    losses = []
    for views, label in zip(logits, labels, strict=True):
        for f in views if label >= 0 else []:
            others = sum(
                (counts[c] / counts[label]) ** tau * math.exp(f[c] - f[label])
                for c in range(4)
                if c != label
            )
            losses.append(math.log(1 + others))
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)
    hits = (logits.argmax(-1) == labels[:, None])[labels >= 0]
    np.testing.assert_allclose(metrics["top1"], hits.mean(), rtol=1e-6)


def test_logit_adjustment_of_a_class_without_images_is_finite():
    offset = logit_adjustment(np.array([3, 0]), 1.0)
    np.testing.assert_allclose(offset, np.log([3 / 4, 1 / 4]), rtol=1e-6)
    assert not logit_adjustment(np.array([5, 1]), 0.0).any()
