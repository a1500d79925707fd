"""Mixup and CutMix."""

import functools

import jax
import numpy as np
import pytest

from supcon_jax.data import augment
from tests.test_augment import assert_share, assert_uniform

MIX_IDS = np.stack([np.zeros(400), np.arange(400)], axis=1).astype(np.int32)


def mixed(count=400, seed=0, views=1, **alphas):
    """Image i is all i + 1 and has the label i mod 7."""
    values = np.arange(1, count + 1, dtype=np.float32)
    images = np.broadcast_to(
        values[:, None, None, None, None], (count, views, 10, 14, 3)
    )
    mix = functools.partial(augment.mix_examples, seed=seed, num_classes=7, **alphas)
    out, targets = jax.jit(mix)(images, np.arange(count) % 7, MIX_IDS[:count])
    return values, np.asarray(out), np.asarray(targets)


def assert_targets(targets, kept):
    """Row i: `kept` of class i mod 7, the rest of that of its neighbour."""
    count = len(kept)
    expected = np.zeros((count, 7))
    for i in range(count):
        expected[i, i % 7] += kept[i]
        expected[i, (i ^ 1) % 7] += 1 - kept[i]
    np.testing.assert_allclose(targets, expected, atol=1e-4)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-5)


def test_mixup():
    values, out, targets = mixed(views=2, mixup_alpha=1.0)
    flat = out.reshape(400, -1)
    np.testing.assert_allclose(flat, flat[:, :1] + 0 * flat)  # pixels and views alike
    other = values[np.arange(400) ^ 1]
    kept = (flat[:, 0] - other) / (values - other)
    assert_uniform(kept, 0, 1)  # Beta(1, 1)
    assert_targets(targets, kept)


def test_cutmix():
    values, out, targets = mixed(cutmix_alpha=1.0)
    own = out[:, 0, :, :, 0] == values[:, None, None]
    other = out[:, 0, :, :, 0] == values[np.arange(400) ^ 1, None, None]
    assert np.all(own ^ other)
    assert_targets(targets, own.mean(axis=(1, 2)))
    for shown in other:  # a box, of sides in the ratio of the image's but at borders
        rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
        assert shown.sum() == len(rows) * len(columns)
        if len(rows):
            assert np.ptp(rows) + 1 == len(rows) and np.ptp(columns) + 1 == len(columns)
    assert 0.5 < own.mean() < 0.8  # l uniform, and boxes are cut off at the border


def test_mixup_or_cutmix():
    values, out, targets = mixed(mixup_alpha=0.5, cutmix_alpha=1.0)
    plain = np.isin(out[:, 0, :, :, 0], values).all(axis=(1, 2))
    assert_share(plain, 0.5)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "alphas", [{"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}], ids=str
)
def test_the_last_of_an_odd_number_stays_alone(alphas):
    values, out, targets = mixed(count=5, **alphas)
    np.testing.assert_allclose(out[4], values[4], rtol=1e-6)
    np.testing.assert_allclose(targets[4], np.eye(7)[4], atol=1e-6)


def test_mixtures_are_functions_of_the_identity():
    _, out, targets = mixed(mixup_alpha=0.4)
    _, again, _ = mixed(mixup_alpha=0.4)
    np.testing.assert_array_equal(out, again)
    assert not np.array_equal(mixed(seed=1, mixup_alpha=0.4)[1], out)
    with pytest.raises(ValueError, match="one must be above 0"):
        mixed()
