"""Which examples a step sees: once an epoch, any step first, balanced classes."""

import numpy as np
import pytest

from supcon_jax.data.sampler import class_balanced, in_order, shuffled
from supcon_jax.data.sources import PADDING


def stream(sampler, steps, start=0):
    return np.concatenate([sampler(step) for step in range(start, start + steps)])


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 25), (7, 7), (3, 1)])
def test_shuffled_shows_each_example_once_an_epoch(count, batch_size):
    ids = stream(shuffled(count, batch_size, seed=0), 40)
    epochs = len(ids) // count
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids[:, 0], np.arange(len(ids)) // count)
    for epoch in range(epochs):
        assert sorted(ids[ids[:, 0] == epoch, 1]) == list(range(count))


def test_any_step_can_be_the_first():
    """Step 100,000 of ImageNet at batch 8192 costs one permutation, not a replay."""
    ids = shuffled(1_281_167, 8192, seed=3)(100_000)
    assert set(ids[:, 0]) == {100_000 * 8192 // 1_281_167}
    assert len(set(ids[:, 1].tolist())) == 8192
    np.testing.assert_array_equal(ids, shuffled(1_281_167, 8192, seed=3)(100_000))


def test_in_order_pads_with_nobody():
    ids = stream(in_order(5, 4), 2)
    assert ids[:, 1].tolist() == [0, 1, 2, 3, 4] + [PADDING] * 3
    assert set(ids[:, 0]) == {0}


LABELS = np.repeat([0, 1, 2, 4], [9, 3, 5, 8])  # class 3 has no images


def balanced(classes=2, batch_size=6, seed=0):
    return class_balanced(LABELS, 5, batch_size, classes=classes, seed=seed)


def test_balanced_batches_hold_p_classes_of_k_examples():
    sampler = balanced()
    for step in range(30):
        index = sampler(step)[:, 1]
        counts = np.bincount(LABELS[index], minlength=5)
        assert sorted(counts) == [0, 0, 0, 3, 3]
        assert len(set(index.tolist())) == 6


def test_balanced_rounds_show_every_class_equally_often():
    ids = stream(balanced(), 20)  # ten rounds of two steps
    np.testing.assert_array_equal(
        np.bincount(LABELS[ids[:, 1]], minlength=5), [30, 30, 30, 0, 30]
    )
    for label in (0, 1, 2, 4):
        own = ids[LABELS[ids[:, 1]] == label]
        # Passes of 9, 3, 3 (of 5) and 6 (of 8) examples, none of them twice.
        size = np.sum(LABELS == label) // 3 * 3
        np.testing.assert_array_equal(own[:, 0], np.arange(30) // size)
        assert len({tuple(i) for i in own}) == len(own)
        assert len(set(own[:, 1].tolist())) == np.sum(LABELS == label)


def test_balanced_with_more_rows_than_a_class_has():
    """Five of a class of three: each example once before any comes twice."""
    sampler = class_balanced(LABELS, 5, 20, classes=4, seed=0)
    index = stream(sampler, 3)[:, 1]
    counts = np.bincount(index[LABELS[index] == 1])[9:]
    assert counts.tolist() == [5, 5, 5]


def test_balanced_with_classes_left_over():
    """Three of four classes a step: one sits out each round, not always the same."""
    sampler = balanced(classes=3)
    present = [set(LABELS[sampler(step)[:, 1]]) for step in range(40)]
    assert all(len(classes) == 3 for classes in present)
    assert len({frozenset(classes) for classes in present}) == 4


def test_balanced_is_a_function_of_seed_and_step():
    np.testing.assert_array_equal(balanced()(17), balanced()(17))
    assert not np.array_equal(balanced()(17), balanced(seed=1)(17))
    first, second = balanced()(0), balanced()(2)
    assert not np.array_equal(first, second)


def test_balanced_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match=r"=4 does not divide the batch size 6 "):
        balanced(classes=4)
    with pytest.raises(ValueError, match=r"=6 but only 4 classes have"):
        balanced(classes=6)
