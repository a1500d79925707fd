"""Batches: each example once an epoch, exact resume, processes, padded evaluation."""

import io
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from supcon_jax.data.datasets import open_source
from supcon_jax.data.pipeline import (
    check_image_size,
    eval_batches,
    num_eval_batches,
    process_rows,
    train_batches,
)
from supcon_jax.data.sampler import shuffled
from supcon_jax.data.sources import ArraySource
from supcon_jax.data.views import Augmentation


def array_source(count=10, size=2):
    """Image i is filled with i and has the label i mod 3."""
    index = np.arange(count)
    images = np.broadcast_to(
        index[:, None, None, None].astype(np.uint8), (count, size, size, 3)
    )
    return ArraySource(images, (index % 3).astype(np.int32), num_classes=3)


def train(
    source,
    steps,
    *,
    batch_size,
    start_step=0,
    seed=0,
    image_size=2,
    views=2,
    **augmentation,
):
    batches = train_batches(
        source,
        shuffled(source.num_examples, batch_size, seed=seed),
        batch_size=batch_size,
        image_size=image_size,
        views=views,
        augmentation=Augmentation(**{"crop_area": (0.2, 1.0)} | augmentation),
        seed=seed,
        start_step=start_step,
    )
    return list(itertools.islice(batches, steps))


def joined(batches, key):
    return np.concatenate([batch[key] for batch in batches])


def assert_equal_batches(one, two):
    assert len(one) == len(two) > 0
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            assert left[key].dtype == right[key].dtype
            np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def be_process(monkeypatch, index, count):
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: count)


def by_process(monkeypatch, count, make):
    """What each of several processes makes of the same arguments."""
    parts = []
    for index in range(count):
        with monkeypatch.context() as patch:
            be_process(patch, index, count)
            parts.append(make())
    return parts


def assert_parts_make_the_whole(parts, whole):
    """The processes' rows, one after the other, are the global batch."""
    for step, batch in enumerate(whole):
        for key in batch:
            rows = [part[step][key] for part in parts]
            assert len({len(row) for row in rows}) == 1
            np.testing.assert_array_equal(np.concatenate(rows), batch[key], key)


# --- arrays ---


def test_array_batches_hold_image_label_and_identity():
    (batch,) = train(array_source(), 1, batch_size=4)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((4, 1, 2, 2, 3), np.uint8),
        "label": ((4,), np.int32),
        "id": ((4, 2), np.int32),
    }
    index = batch["id"][:, 1]
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0, 0], index)
    np.testing.assert_array_equal(batch["label"], index % 3)


@pytest.mark.parametrize("batch_size", [4, 10, 16, 25])
def test_each_example_comes_once_an_epoch(batch_size):
    """Batches straddle epochs of 10 (or hold several); none is cut short."""
    epochs = 8
    steps = 10 * epochs // batch_size + 1
    batches = train(array_source(10), steps, batch_size=batch_size)
    assert all(len(batch["id"]) == batch_size for batch in batches)
    ids = joined(batches, "id")[: 10 * epochs]
    np.testing.assert_array_equal(ids[:, 0], np.repeat(np.arange(epochs), 10))
    for epoch in range(epochs):
        assert sorted(ids[10 * epoch : 10 * epoch + 10, 1]) == list(range(10))


def orders(seed, epochs=3, count=20):
    ids = joined(train(array_source(count), epochs, batch_size=count, seed=seed), "id")
    return [tuple(order) for order in ids[:, 1].reshape(epochs, count)]


def test_order_differs_between_epochs_and_seeds_and_is_repeatable():
    found = orders(0) + orders(1)
    assert len(set(found)) == 6
    assert tuple(range(20)) not in found
    assert orders(0) == found[:3]


@pytest.mark.parametrize("start_step", [1, 2, 3, 7, 1000])
def test_array_batches_after_a_resume_are_the_same(start_step):
    whole = train(array_source(), start_step + 5, batch_size=4)
    resumed = train(array_source(), 5, batch_size=4, start_step=start_step)
    assert_equal_batches(resumed, whole[start_step:])


def test_processes_share_the_array_batches(monkeypatch):
    def make():
        return train(array_source(), 6, batch_size=8)

    whole = make()
    parts = by_process(monkeypatch, 4, make)
    assert_parts_make_the_whole(parts, whole)
    assert len(parts[0][0]["label"]) == 2
    for step in range(6):
        ids = [{tuple(i) for i in part[step]["id"]} for part in parts]
        assert sum(map(len, ids)) == len(set.union(*ids)) == 8


def test_process_rows(monkeypatch):
    assert process_rows(12) == slice(0, 12)
    rows = by_process(monkeypatch, 3, lambda: process_rows(12))
    assert rows == [slice(0, 4), slice(4, 8), slice(8, 12)]


@pytest.mark.parametrize(
    ("count", "batch_size", "num_batches"), [(10, 4, 3), (8, 4, 2), (3, 8, 1)]
)
def test_eval_pads_and_masks_the_last_batch(count, batch_size, num_batches):
    source = array_source(count)
    batches = list(eval_batches(source, batch_size=batch_size, image_size=2, resize=2))
    assert len(batches) == num_eval_batches(source, batch_size) == num_batches
    for batch in batches:
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            "image": ((batch_size, 1, 2, 2, 3), np.uint8),
            "label": ((batch_size,), np.int32),
            "mask": ((batch_size,), np.float32),
        }
    mask = joined(batches, "mask")
    padding = num_batches * batch_size - count
    np.testing.assert_array_equal(mask, [1] * count + [0] * padding)
    images = joined(batches, "image")[mask > 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(images, np.arange(count))
    np.testing.assert_array_equal(joined(batches, "label")[mask > 0], source.labels)
    assert joined(batches, "image")[mask == 0].sum() == 0


def test_eval_processes_share_each_batch(monkeypatch):
    def make():
        return list(eval_batches(array_source(), batch_size=4, image_size=2, resize=2))

    whole = make()
    # The last process's rows of the last batch are all padding, yet they come.
    assert_parts_make_the_whole(by_process(monkeypatch, 2, make), whole)


def test_image_size_of_arrays_is_checked():
    message = "data.image_size is 4 but the images are 2x2; set --config.data.image_"
    for refused in (
        lambda: check_image_size(array_source(), 4),
        lambda: train(array_source(), 1, batch_size=4, image_size=4),
        lambda: next(
            eval_batches(array_source(), batch_size=4, image_size=4, resize=4)
        ),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    check_image_size(array_source(), 2)


# --- TFDS, on real data ---

COUNT = 60  # examples of the CIFAR-10 slice
STEPS = 7  # of 16 images: nearly two epochs


@pytest.fixture(scope="module")
def cifar(tfds_dir):
    return open_source("cifar10", f"test[:{COUNT}]", dir=tfds_dir)


@pytest.fixture(scope="module")
def imagenet(tfds_dir):
    return open_source("imagenet2012", "validation", dir=tfds_dir)


def cifar_train(source, steps=STEPS, *, batch_size=16, **changes):
    return train(source, steps, batch_size=batch_size, image_size=12, **changes)


@pytest.fixture(scope="module")
def cifar_whole(cifar):
    return cifar_train(cifar)


@pytest.fixture(scope="module")
def raw_cifar(tfds_dir):
    """Pixels and labels of the slice by TFDS alone, in file order."""
    import tensorflow_datasets as tfds

    dataset = tfds.load(
        "cifar10", split=f"test[:{COUNT}]", data_dir=tfds_dir, download=False
    )
    examples = list(tfds.as_numpy(dataset))
    return np.stack([e["image"] for e in examples]), [e["label"] for e in examples]


def test_tfds_batches(cifar_whole):
    assert {k: (v.shape, v.dtype) for k, v in cifar_whole[0].items()} == {
        "image": ((16, 2, 12, 12, 3), np.uint8),
        "label": ((16,), np.int32),
        "id": ((16, 2), np.int32),
    }


def test_tfds_each_example_comes_once_an_epoch(cifar, cifar_whole, raw_cifar):
    ids = joined(cifar_whole, "id")
    np.testing.assert_array_equal(ids[:, 0], np.arange(len(ids)) // COUNT)
    first, second = ids[:COUNT, 1], ids[COUNT:, 1]
    assert sorted(first) == list(range(COUNT))
    assert len(set(second)) == len(second) == 16 * STEPS - COUNT
    assert list(first) != sorted(first)
    assert list(first[: len(second)]) != list(second)
    labels = joined(cifar_whole, "label")
    np.testing.assert_array_equal(labels, np.asarray(raw_cifar[1])[ids[:, 1]])
    other_seed = cifar_train(cifar, 1, seed=1)
    assert not np.array_equal(other_seed[0]["id"], cifar_whole[0]["id"])


def test_tfds_is_repeatable(cifar, cifar_whole):
    assert_equal_batches(cifar_train(cifar), cifar_whole)


@pytest.mark.parametrize("start_step", [1, 3, 4, 6])
def test_tfds_batches_after_a_resume_are_the_same(cifar, cifar_whole, start_step):
    """Step 3 straddles the epochs, step 4 is the first that begins in the second."""
    resumed = cifar_train(cifar, STEPS - start_step, start_step=start_step)
    assert_equal_batches(resumed, cifar_whole[start_step:])


def test_tfds_processes_share_the_batches(monkeypatch, cifar, cifar_whole):
    parts = by_process(monkeypatch, 2, lambda: cifar_train(cifar))
    assert_parts_make_the_whole(parts, cifar_whole)


def test_tfds_views_are_functions_of_the_example_alone(cifar, cifar_whole):
    """Other batches, another number of views: the same crops of (epoch, index)."""
    others = cifar_train(cifar, 3, batch_size=5, views=3)
    crops = {
        tuple(identity): views
        for identity, views in zip(
            joined(cifar_whole, "id"), joined(cifar_whole, "image"), strict=True
        )
    }
    for identity, views in zip(
        joined(others, "id"), joined(others, "image"), strict=True
    ):
        np.testing.assert_array_equal(views[:2], crops[tuple(identity)])
        assert not np.array_equal(views[2], views[0])


def test_tfds_views_differ(cifar_whole):
    images = joined(cifar_whole, "image").astype(int)
    difference = np.abs(images[:, 0] - images[:, 1]).mean(axis=(1, 2, 3))
    assert np.mean(difference > 1) > 0.9
    # The same example in the next epoch.
    ids = [tuple(i) for i in joined(cifar_whole, "id")]
    index = ids[-1][1]
    before = images[ids.index((0, index))]
    assert np.abs(before - images[-1]).mean() > 1


def test_tfds_without_crop_and_flip_the_pixels_pass(cifar, raw_cifar):
    """An area of exactly one leaves no choice: the whole image, at its own size."""
    (batch,) = train(
        cifar, 1, batch_size=16, image_size=32, crop_area=(1.0, 1.0), flip=False
    )
    expected = raw_cifar[0][batch["id"][:, 1]]
    np.testing.assert_array_equal(batch["image"][:, 0], expected)
    np.testing.assert_array_equal(batch["image"][:, 1], expected)
    (flipped,) = train(
        cifar, 1, batch_size=16, image_size=32, crop_area=(1.0, 1.0), flip=True
    )
    views = flipped["image"].reshape(32, 32, 32, 3)
    twice = np.repeat(expected, 2, axis=0)
    same = np.all(views == twice, axis=(1, 2, 3))
    mirrored = np.all(views == twice[:, :, ::-1], axis=(1, 2, 3))
    assert np.all(same ^ mirrored) and 6 <= mirrored.sum() <= 26


def test_tfds_crop_area_is_respected(cifar, raw_cifar):
    """Small crops of an image vary less than the whole; all colours come from it."""
    (batch,) = train(
        cifar, 1, batch_size=48, image_size=32, crop_area=(0.1, 0.15), flip=False
    )
    originals = raw_cifar[0][batch["id"][:, 1]].astype(float)
    crops = batch["image"][:, 0].astype(float)
    assert np.all(crops.min((1, 2)) >= originals.min((1, 2)) - 0.5)
    assert np.all(crops.max((1, 2)) <= originals.max((1, 2)) + 0.5)
    # Magnified about three times, neighbours differ by about a third of before.
    step = np.abs(np.diff(crops, axis=2)).mean()
    assert 0.1 < step / np.abs(np.diff(originals, axis=2)).mean() < 0.5


def test_tfds_eval_counts_every_example_once(cifar, raw_cifar):
    batches = list(eval_batches(cifar, batch_size=16, image_size=32, resize=32))
    assert len(batches) == 4
    mask = joined(batches, "mask")
    np.testing.assert_array_equal(mask, [1] * COUNT + [0] * 4)
    np.testing.assert_array_equal(joined(batches, "image")[mask > 0, 0], raw_cifar[0])
    np.testing.assert_array_equal(joined(batches, "label")[mask > 0], raw_cifar[1])


def test_tfds_eval_of_a_subset_stops_there(cifar, raw_cifar):
    subset = cifar.take_rows(np.arange(10))
    batches = list(eval_batches(subset, batch_size=8, image_size=32, resize=32))
    mask = joined(batches, "mask")
    assert mask.sum() == 10
    np.testing.assert_array_equal(
        joined(batches, "image")[mask > 0, 0], raw_cifar[0][:10]
    )


def test_tfds_training_on_a_subset_sees_only_it(cifar):
    batches = cifar_train(cifar.take_rows(np.arange(10)), 2, batch_size=10)
    for epoch, batch in enumerate(batches):
        assert sorted(batch["id"][:, 1]) == list(range(10))
        assert set(batch["id"][:, 0]) == {epoch}


def test_tfds_eval_processes_share_each_batch(monkeypatch, cifar):
    def make():
        return list(eval_batches(cifar, batch_size=24, image_size=32, resize=32))

    whole = make()
    assert_parts_make_the_whole(by_process(monkeypatch, 2, make), whole)


def test_eval_crop_equals_pillow(imagenet, tfds_dir):
    """Short side to 80 (bilinear, no antialiasing), then the central 64."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    dataset = tfds.load(
        "imagenet2012",
        split="validation[:6]",
        data_dir=tfds_dir,
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    (batch,) = eval_batches(
        imagenet.take_rows(np.arange(6)), batch_size=6, image_size=64, resize=80
    )
    shapes = set()
    for example, got, label in zip(
        tfds.as_numpy(dataset), batch["image"][:, 0], batch["label"], strict=True
    ):
        # Decoders differ by a level or two, and are not what is tested here.
        pixels = tf.io.decode_image(example["image"], channels=3).numpy()
        own = np.asarray(Image.open(io.BytesIO(example["image"])).convert("RGB"))
        assert np.abs(own.astype(int) - pixels).mean() < 3
        image = Image.fromarray(pixels)
        width, height = image.size
        shapes.add(width > height)
        short = min(width, height)
        target = round(width * 80 / short), round(height * 80 / short)
        resized = image.transform(
            target,
            Image.Transform.EXTENT,
            (0, 0, width, height),
            resample=Image.Resampling.BILINEAR,
        )
        left, top = (target[0] - 64) // 2, (target[1] - 64) // 2
        expected = np.asarray(resized.crop((left, top, left + 64, top + 64)))
        difference = np.abs(expected.astype(int) - got)
        assert difference.max() <= 1  # Pillow cuts fractions off, we round
        assert label == example["label"]
    assert shapes == {True, False}  # landscape and portrait


def test_imagenet_resumes_across_shards_and_epochs(imagenet):
    """Images of all sizes, 100 of them in four shards; epochs end inside a batch."""

    def make(steps, start_step=0):
        return train(
            imagenet, steps, batch_size=40, image_size=32, start_step=start_step
        )

    whole = make(3)
    ids = joined(whole, "id")
    assert sorted(ids[:100, 1]) == list(range(100))
    assert set(ids[100:, 0]) == {1}
    assert_equal_batches(make(1, start_step=2), whole[2:])
