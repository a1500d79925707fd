"""Opening by name: the fixed digits split, and images that are made up."""

import hashlib
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from supcon_jax.data.datasets import open_source


def refusal(*args, **kwargs):
    """The message of the ValueError, which must be one line."""
    with pytest.raises(ValueError) as error:
        open_source(*args, **kwargs)
    message = str(error.value)
    assert message and "\n" not in message
    return message


@pytest.fixture(scope="module")
def digits():
    return open_source("digits", "train"), open_source("digits", "test")


def test_digits_are_split_1297_to_500_with_nothing_in_both(digits):
    train, test = digits
    assert (train.num_examples, test.num_examples) == (1297, 500)
    assert train.num_classes == test.num_classes == 10
    for source in digits:
        assert source.images.shape == (source.num_examples, 8, 8, 3)
        assert source.images.dtype == np.uint8 and source.labels.dtype == np.int32
        assert np.all(source.images == source.images[..., :1])  # grey
        assert source.images.min() == 0 and source.images.max() == 255
    # Together they are the whole dataset, each image once, with its own label.
    original = load_digits()
    grey = np.rint(original.images / 16 * 255).astype(np.uint8).reshape(1797, 64)
    expected = sorted(
        (row.tobytes(), label) for row, label in zip(grey, original.target, strict=True)
    )
    found = sorted(
        (image[..., 0].tobytes(), label)
        for source in digits
        for image, label in zip(source.images, source.labels, strict=True)
    )
    assert found == expected


def test_digits_are_stratified(digits):
    train, test = digits
    share = np.bincount(test.labels) / np.bincount(
        np.concatenate([train.labels, test.labels])
    )
    np.testing.assert_allclose(share, 500 / 1797, atol=0.004)


def test_digits_split_is_fixed(digits):
    """Results are comparable only as long as this holds."""
    checksums = [
        hashlib.sha256(source.images.tobytes() + source.labels.tobytes()).hexdigest()
        for source in digits
    ]
    assert [checksum[:16] for checksum in checksums] == [
        "1340386a37ef61a2",
        "4c5fcf0128be768f",
    ]


def test_two_digits_are_a_hundred_classes_of_digits_side_by_side(digits):
    splits = [open_source("two_digits", split) for split in ("train", "test")]
    for source, halves, count in zip(splits, digits, (50, 10), strict=True):
        assert source.images.shape == (100 * count, 16, 16, 3)
        assert source.num_classes == 100 and source.class_names[7] == "07"
        np.testing.assert_array_equal(np.bincount(source.labels), [count] * 100)
        np.testing.assert_array_equal(source.images[:, ::2], source.images[:, 1::2])
        # Each half is a digit of the same split, of the class that the number says.
        known = {
            (image.tobytes(), label)
            for image, label in zip(halves.images, halves.labels, strict=True)
        }
        for image, label in zip(source.images[:, ::2], source.labels, strict=True):
            assert (image[:, :8].tobytes(), label // 10) in known
            assert (image[:, 8:].tobytes(), label % 10) in known
    again = open_source("two_digits", "test")
    np.testing.assert_array_equal(again.images, splits[1].images)
    assert "train, test" in refusal("two_digits", "validation")


def test_digits_refuses_other_splits():
    message = refusal("digits", "validation")
    assert "'validation'" in message and "train, test" in message
    assert "--config.data.train_split" in message


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in refusal("digits", "train")


def test_synthetic_needs_nothing(no_tensorflow):
    train, test = (open_source("synthetic", split) for split in ("train", "test"))
    assert train.num_classes == test.num_classes == 1000
    assert train.num_examples == 1_281_167
    assert "train, test" in refusal("synthetic", "val")
