"""Subsets, held-out splits, label noise: the same for every kind of source, new ones too."""

import dataclasses
import io
import logging
import zipfile

import numpy as np
import pytest
from PIL import Image

from supcon_jax.data import datasets
from supcon_jax.data.datasets import open_source
from supcon_jax.data.pipeline import load_small
from supcon_jax.data.records import RecordSource
from supcon_jax.data.selection import (
    add_label_noise,
    hold_out,
    take_classes,
    take_fraction,
    take_per_class,
    take_subset,
)
from supcon_jax.data.sources import (
    UNREAD,
    ArraySource,
    Encoded,
    FileSource,
    Source,
    SyntheticSource,
    Unreadable,
    read_labels,
)
from supcon_jax.pretrain import pretrain
from supcon_jax.run.opening import open_run
from supcon_jax.run.splits import open_sources
from tests.runs import first_batches, pretrain_config


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
            assert after is before


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


def test_classes_are_taken_and_numbered_anew():
    source = arrays([10, 20, 30])
    two = take_classes(source, (2, 0))
    np.testing.assert_array_equal(np.bincount(two.labels), [30, 10])
    assert (two.num_classes, two.class_names) == (2, ("2", "0"))
    for label, name in zip(two.labels, names(two), strict=True):
        assert source.labels[name] == (2, 0)[label]
    others = take_classes(source, (2, 0), others=True)
    assert (others.num_examples, others.class_names) == (20, ("1",))
    assert take_classes(source, ()) is source
    unlabelled = dataclasses.replace(
        source, labels=np.where(np.arange(60) % 2, source.labels, -1)
    )
    assert take_classes(unlabelled, (1, 2)).num_examples == 25
    with pytest.raises(ValueError, match=r"data.classes=\(0, 3\); allowed: 0 to 2"):
        take_classes(source, (0, 3))
    with pytest.raises(ValueError, match="names all classes"):
        take_classes(source, (0, 1, 2), others=True)


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


# --- images that cannot be decoded ---


@pytest.mark.parametrize("make", [*ALL, noise])
def test_subsets_share_the_record_of_unreadable_images(make):
    source = dataclasses.replace(make(), unreadable=Unreadable(skip=True))
    few = take_fraction(take_subset(source, 25), 0.8, seed=0)
    train, held = hold_out(add_label_noise(few, 0.5, seed=0), 0.5, seed=0)
    held.unreadable.add({"one": "it is empty"})
    train.unreadable.add({"two": "it is text"})
    assert source.unreadable.reasons == {"one": "it is empty", "two": "it is text"}
    assert make().unreadable.reasons == {}  # of another split


def test_unreadable_images_are_an_error_or_a_warning_each(caplog):
    found = {"a.jpg": "it is empty", "b.jpg": "it is text"}
    strict, lenient = Unreadable(), Unreadable(skip=True)
    with pytest.raises(
        ValueError, match=r"cannot decode a\.jpg: it is empty; .*=True$"
    ):
        strict.add(found)
    assert strict.reasons == {}
    with caplog.at_level(logging.WARNING, "supcon_jax"):
        lenient.add(found)
    assert lenient.reasons == found
    assert [record.getMessage() for record in caplog.records] == [
        "warning: skipping a.jpg: it is empty",
        "warning: skipping b.jpg: it is text",
    ]


def test_images_lost_while_loading_a_split_are_recorded(tfds_dir):
    """A split that is decoded into memory keeps the record of what was lost there."""

    def damaged(skip_errors):
        source = open_source(
            "cifar10", "test[:9]", dir=tfds_dir, skip_errors=skip_errors
        )
        length = source.length.copy()
        length[4] = 30  # the record ends early
        return dataclasses.replace(source, length=length)

    source = damaged(skip_errors=True)
    loaded = load_small(source, 32)
    assert loaded.num_examples == 8
    assert list(loaded.unreadable.reasons) == [source.name(4)]
    with pytest.raises(ValueError, match="cannot decode"):
        load_small(damaged(skip_errors=False), 32)


# --- a new kind of source: one class, one entry ---


@dataclasses.dataclass(frozen=True)
class ZipSource(Source):
    """PNG files in a zip archive, named `<split>/<class>/...`."""

    images = None
    archive: str
    members: np.ndarray
    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]
    unreadable: Unreadable = dataclasses.field(default_factory=Unreadable)

    def name(self, index):
        return f"{self.archive}:{self.members[index]}"

    def read(self, index):
        with zipfile.ZipFile(self.archive) as file:
            return Encoded(file.read(self.members[index]), int(self.labels[index]))


def open_zip(split, dir, root):
    with zipfile.ZipFile(root) as file:
        members = [name for name in file.namelist() if name.startswith(f"{split}/")]
    classes = sorted({name.split("/")[1] for name in members})
    labels = [classes.index(name.split("/")[1]) for name in members]
    return ZipSource(
        root,
        np.asarray(members),
        np.asarray(labels, np.int32),
        len(classes),
        tuple(classes),
    )


@pytest.fixture
def zipped(tmp_path, monkeypatch):
    """What a config says of an archive with images of three colours, one of them broken."""
    rng = np.random.default_rng(0)
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as file:
        for split, count in (("train", 20), ("test", 6)):
            for channel, name in enumerate(("red", "green", "blue")):
                for index in range(count):
                    pixels = rng.integers(0, 100, (9, 8, 3), np.uint8)
                    pixels[..., channel] += 150
                    data = io.BytesIO()
                    Image.fromarray(pixels).save(data, "PNG")
                    file.writestr(f"{split}/{name}/{index}.png", data.getvalue())
        file.writestr("train/red/broken.png", b"not an image")
    monkeypatch.setitem(datasets.SOURCES, "zip", open_zip)
    return {"data.name": "zip", "data.root": str(path), "data.skip_errors": True}


@pytest.mark.slow
def test_a_new_source_trains(zipped, tmp_path, caplog):
    config = pretrain_config(**zipped, **{"knn.bank": 61})
    with caplog.at_level(logging.INFO, "supcon_jax"):
        final = pretrain(config, tmp_path / "run")
    assert final["knn/top1"] > 0.8
    assert "supcon on zip: 61 training images, 3 classes" in caplog.text
    assert "Skipped: 1 images that cannot be decoded" in caplog.text
    assert f"{zipped['data.root']}:train/red/broken.png: Unknown image" in caplog.text


def test_a_new_source_has_what_the_others_have(zipped, tmp_path):
    """Subsets, noise, balanced batches, host policies, and its name in messages."""
    keys = {
        "data.validation_fraction": 0.25,
        "data.samples_per_class": 12,
        "data.classes_per_batch": 2,
        "data.label_noise": 0.5,
        "augment.policy": "auto_augment",
    }
    run = open_run(pretrain_config(**zipped, **keys), tmp_path / "run")
    assert run.train_source.num_examples == 36 and run.eval_source.num_examples == 15
    assert isinstance(run.train_source, ZipSource)
    batch = next(first_batches(run))
    assert batch["image"].shape == (16, 2, 8, 8, 3)
    assert len(set(batch["label"].tolist())) == 2
    with pytest.raises(ValueError, match="allowed: digits, .*, zip, or a TFDS name"):
        open_sources(pretrain_config(**{"data.name": "no such name"}))
    strict = pretrain_config(**zipped | {"data.skip_errors": False, "batch_size": 56})
    run = open_run(strict, tmp_path / "strict")
    with pytest.raises(ValueError, match=r"train/red/broken\.png.*skip_errors=True"):
        list(zip(range(2), first_batches(run), strict=False))
