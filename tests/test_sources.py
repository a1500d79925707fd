"""Subsets, held-out splits, label noise: the same for every kind of source."""

import dataclasses

import numpy as np
import pytest

from supcon_jax.data.datasets import open_source
from supcon_jax.data.sources import (
    UNREAD,
    ArraySource,
    FileSource,
    RecordSource,
    SyntheticSource,
    add_label_noise,
    hold_out,
    read_labels,
    take_fraction,
    take_per_class,
    take_subset,
)


def arrays(per_class=(10, 10, 10, 10, 10)):
    """Image i is filled with i; labels are sorted."""
    labels = np.repeat(np.arange(len(per_class), dtype=np.int32), per_class)
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return ArraySource(np.tile(images, (1, 2, 2, 3)), labels, len(per_class))


def names(source):
    """Which examples a source of `arrays` holds."""
    return source.images[:, 0, 0, 0].tolist()


def files(count=30):
    return FileSource(
        np.asarray([f"{i}.jpg" for i in range(count)]),
        np.arange(count, dtype=np.int32) % 3,
        ("a", "b", "c"),
    )


def records(count=30):
    return RecordSource(
        files=("f",),
        file=np.zeros(count, int),
        offset=np.arange(count) * 100,
        length=np.full(count, 90),
        labels=np.full(count, UNREAD, np.int32),
        num_classes=3,
    )


def noise(count=30):
    return SyntheticSource(np.full(count, UNREAD, np.int32), num_classes=3)


ALL = [arrays, files, records]


@pytest.mark.parametrize("make", [*ALL, noise])
def test_rows_are_taken_from_every_column(make):
    source = make()
    taken = source.take_rows(np.asarray([5, 2]))
    assert taken.num_examples == 2 and taken.num_classes == source.num_classes
    for field in dataclasses.fields(source):
        before, after = getattr(source, field.name), getattr(taken, field.name)
        if isinstance(before, np.ndarray):
            np.testing.assert_array_equal(after, before[[5, 2]])
        else:
            assert after == before


def test_subset_of_arrays_is_fixed_by_its_seed():
    images = np.arange(50, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 2, 2, 3), np.uint8
    )
    source = ArraySource(images, np.repeat(np.arange(5, dtype=np.int32), 10), 5)
    one, same = take_subset(source, 20), take_subset(source, 20)
    other = take_subset(source, 20, seed=1)
    np.testing.assert_array_equal(one.images, same.images)
    assert not np.array_equal(one.images, other.images)
    index = one.images[:, 0, 0, 0]
    assert one.num_examples == 20 and len(set(index.tolist())) == 20
    np.testing.assert_array_equal(one.labels, index // 10)
    assert len(set(one.labels.tolist())) == 5  # not the first ones, sorted by class
    assert one.num_classes == 5
    assert take_subset(source, 50) is source and take_subset(source, 99) is source


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_hold_out_divides_a_split_in_two(make, fraction):
    source = make()
    count = source.num_examples
    marked = dataclasses.replace(
        source,
        **(
            {"images": source.images}
            if make is arrays
            else {"paths": np.arange(count)}
            if make is files
            else {"offset": np.arange(count)}
        ),
    )

    def held(seed):
        return hold_out(marked, fraction, seed=seed)

    def members(part):
        column = {arrays: "images", files: "paths", records: "offset"}[make]
        return getattr(part, column).reshape(part.num_examples, -1)[:, 0].tolist()

    train, test = held(0)
    assert sorted(members(train) + members(test)) == list(range(count))
    assert test.num_examples == round(count * fraction)
    assert members(held(0)[1]) == members(test) != members(held(1)[1])
    if make is not records:  # where labels are known the classes keep their shares
        counts = np.bincount(test.labels, minlength=test.num_classes)
        assert counts.max() - counts.min() <= 1


def test_hold_out_of_small_classes_takes_its_share_of_all():
    """Two of each class and a fifth: no class gives one alone, together they do."""
    _, test = hold_out(arrays([2] * 20), 0.2, seed=0)
    assert test.num_examples == 8


def test_hold_out_refuses_to_leave_nothing():
    with pytest.raises(ValueError, match=r"0 to evaluate .*validation_fraction"):
        hold_out(arrays([2]), 0.1, seed=0)


def test_fraction_and_samples_per_class():
    source = arrays([10, 20, 30])
    some = take_fraction(source, 0.5, seed=0)
    np.testing.assert_array_equal(np.bincount(some.labels), [5, 10, 15])
    assert names(some) == sorted(names(some)) != names(source)[:30]
    assert names(take_fraction(source, 0.5, seed=1)) != names(some)
    assert take_fraction(source, 1.0, seed=0) is source
    few = take_per_class(source, 4, seed=0)
    np.testing.assert_array_equal(np.bincount(few.labels), [4, 4, 4])
    assert names(take_per_class(source, 4, seed=0)) == names(few)
    assert names(take_per_class(source, 4, seed=1)) != names(few)
    for label, name in zip(few.labels, names(few), strict=True):
        assert source.labels[name] == label
    with pytest.raises(ValueError, match="class 0 has 10 examples"):
        take_per_class(source, 11, seed=0)
    with pytest.raises(ValueError, match=r"--config\.data\.fraction"):
        take_fraction(arrays([3]), 0.01, seed=0)


@pytest.mark.parametrize("make", ALL)
def test_label_noise(make):
    """A share of the labels is drawn anew, a C-th of those as they were."""
    source = make().take_rows(np.resize(np.arange(30), 6000))
    noisy = add_label_noise(source, 0.4, seed=0)
    changed = np.mean(noisy.labels != source.labels)
    expected = 0.4 if make is records else 0.4 * (1 - 1 / source.num_classes)
    assert abs(changed - expected) < 0.03
    fresh = noisy.labels[noisy.labels != source.labels]
    assert set(fresh) == set(range(source.num_classes))
    again = add_label_noise(source, 0.4, seed=0)
    np.testing.assert_array_equal(again.labels, noisy.labels)
    assert not np.array_equal(add_label_noise(source, 0.4, seed=1).labels, noisy.labels)
    assert add_label_noise(source, 0.0, seed=0) is source


def test_labels_of_records_are_read_when_they_are_needed(tfds_dir):
    source = open_source("cifar10", "test[:40]", dir=tfds_dir)
    assert set(source.labels) == {UNREAD}
    known = read_labels(source)
    assert known.labels.tolist() == [source.read(i).label for i in range(40)]
    assert read_labels(known) is known
    few = take_per_class(open_source("cifar10", "test[:400]", dir=tfds_dir), 5, seed=0)
    np.testing.assert_array_equal(np.bincount(few.labels), [5] * 10)
    # A label that noise has given is not read again from the file.
    noisy = add_label_noise(source, 1.0, seed=0)
    assert [noisy.read(i).label for i in range(40)] == noisy.labels.tolist()
