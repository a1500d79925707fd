"""Image files of all kinds, broken ones among them, through the tf.data part."""

import errno
import io
import itertools
import logging
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from supcon_jax.data import host, host_views, images
from supcon_jax.data.datasets import open_source
from supcon_jax.data.pipeline import (
    eval_batches,
    load_small,
    train_batches,
)
from supcon_jax.data.sampler import shuffled
from supcon_jax.data.sources import Encoded, FileSource
from supcon_jax.data.views import Augmentation

RNG = np.random.default_rng(0)
REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def photo(size=(40, 30)):
    """A smooth picture, so that lossy formats change little."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return Image.fromarray(
        (255 * np.stack([x, y, (x + y) / 2], axis=-1)).astype(np.uint8)
    )


def evaluated(path, side=30):
    """The central crop of one image file."""
    source = FileSource(np.asarray([str(path)]), np.zeros(1, np.int32), ("a",))
    (batch,) = eval_batches(source, batch_size=1, image_size=side, resize=side)
    assert batch["mask"].tolist() == [1]
    return batch["image"][0, 0].astype(int)


FORMATS = {
    "jpeg": ("jpg", "RGB", {"quality": 95}),
    "grey jpeg": ("jpg", "L", {"quality": 95}),
    "cmyk jpeg": ("jpg", "CMYK", {"quality": 95}),
    "png": ("png", "RGB", {}),
    "palette png": ("png", "P", {}),
    "alpha png": ("png", "RGBA", {}),
    "grey alpha png": ("png", "LA", {}),
    "webp": ("webp", "RGB", {"lossless": True}),
    "bmp": ("bmp", "RGB", {}),
    "gif": ("gif", "P", {}),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_give_what_pillow_gives(kind, tmp_path):
    suffix, mode, options = FORMATS[kind]
    path = tmp_path / f"image.{suffix}"
    photo((30, 30)).convert(mode).save(path, **options)
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    got = evaluated(path)
    assert got.shape == (30, 30, 3)
    # JPEG decoders upsample colour in ways of their own.
    error = np.abs(got - expected)
    assert (error.mean() < 3) if suffix == "jpg" else (error.max() == 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation, tmp_path):
    """A viewer shows all eight files the same way up, and so does the pipeline."""
    image = photo((30, 30))
    held = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.jpg"
    stored = image if held is None else image.transpose(held)
    stored.save(path, quality=98, subsampling=0, exif=exif)
    error = np.abs(evaluated(path) - np.asarray(image))
    assert error.mean() < 2 and error.max() <= 12


def test_one_pixel_is_an_image(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (1, 1), (10, 20, 30)).save(path)
    assert evaluated(path, side=8).reshape(-1, 3).tolist() == [[10, 20, 30]] * 64
    source = FileSource(np.asarray([str(path)]), np.zeros(1, np.int32), ("a",))
    views = next(
        train_batches(
            source,
            shuffled(1, 2, seed=0),
            batch_size=2,
            image_size=8,
            views=2,
            augmentation=Augmentation(),
            seed=0,
        )
    )["image"]
    assert views.reshape(-1, 3).tolist() == [[10, 20, 30]] * (4 * 64)


# --- broken files ---


@pytest.fixture
def folder(tmp_path):
    """20 images of two classes; number 7 is cut short, 12 is text, 13 is empty."""
    for index in range(20):
        path = tmp_path / "train" / "ab"[index % 2] / f"{index:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(RNG.integers(0, 256, (24, 24, 3), np.uint8)).save(
            buffer, "JPEG"
        )
        data = buffer.getvalue()
        broken = {7: data[: len(data) // 2], 12: b"not an image", 13: b""}
        path.write_bytes(broken.get(index, data))
    return tmp_path


BROKEN = {"b/07.jpg", "a/12.jpg", "b/13.jpg"}


def endings(names):
    return {"/".join(name.split("/")[-2:]) for name in names}


def open_folder(folder, *, skip_errors=True):
    return open_source("folder", "train", root=str(folder), skip_errors=skip_errors)


def batches(source, *, start=0, steps=15):
    stream = train_batches(
        source,
        shuffled(20, 4, seed=0),
        batch_size=4,
        image_size=8,
        views=2,
        augmentation=Augmentation(),
        seed=0,
        start_step=start,
    )
    return list(itertools.islice(stream, steps))


def test_a_broken_file_stops_the_run_with_its_name(folder):
    with pytest.raises(ValueError, match="cannot decode") as error:
        batches(open_folder(folder, skip_errors=False))
    message = str(error.value)
    assert "\n" not in message and "--config.data.skip_errors=True" in message
    assert any(name in message for name in BROKEN)


def test_broken_files_are_skipped_counted_and_replaced(folder, caplog):
    source = open_folder(folder)
    with caplog.at_level(logging.WARNING, "supcon_jax"):
        found = batches(source)
    skipped = source.unreadable.reasons
    assert endings(skipped) == BROKEN
    assert all(reason and "\n" not in reason for reason in skipped.values())
    assert "the file is empty" in skipped.values()
    assert sum("skipping" in record.message for record in caplog.records) == 3
    ids = np.concatenate([batch["id"] for batch in found])
    assert sorted(ids[:20, 1]) == list(range(20))  # steps and order stay as they were
    images = np.concatenate([batch["image"] for batch in found])
    assert (images.reshape(len(images), -1).std(axis=1) > 10).all()
    # After a resume, before the broken files are known, the same.
    for a, b in zip(
        batches(open_folder(folder), start=3, steps=5), found[3:], strict=False
    ):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_a_file_that_vanished_is_named(folder):
    source = open_source("folder", "train", root=str(folder))
    (folder / "train" / "a" / "00.jpg").unlink()
    with pytest.raises(ValueError, match=r"00\.jpg: No such file"):
        list(eval_batches(source, batch_size=4, image_size=8, resize=8))


@pytest.mark.parametrize("skip_errors", [True, False])
def test_a_file_that_cannot_be_read_for_a_moment_ends_no_run(
    folder, caplog, skip_errors
):
    """TensorFlow's error did, which names no file: the file was read to find out why."""
    for name in BROKEN:
        (folder / "train" / name).write_bytes((folder / "train/a/00.jpg").read_bytes())
    whole = open_folder(folder, skip_errors=skip_errors)
    columns = whole.paths, whole.labels, whole.class_names, whole.unreadable
    asked = []  # why it could not be read, which `_diagnose` alone does one by one

    class Flaky(FileSource):
        def read(self, index):
            if index == 3:
                asked.append(index)
            return super().read(index)

        def read_many(self, indices, map=map):
            broken = OSError(errno.EIO, "Input/output error")
            return [
                broken
                if index == 3 and len(asked) < fails
                else super(Flaky, self).read(index)
                for index in indices
            ]

    flaky = Flaky(*columns)
    expected = batches(whole, steps=5)
    fails = 2
    with caplog.at_level(logging.WARNING, "supcon_jax"):
        found = batches(flaky, steps=5)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["id"], other["id"])
    said = f"warning: cannot read {whole.name(3)}: Input/output error; now it can be"
    assert [r.getMessage().startswith(said) for r in caplog.records] == [True] * 2
    assert whole.unreadable.reasons == {}
    fails = 10
    with pytest.raises(ValueError, match="Input/output error; it failed 3") as error:
        batches(flaky, steps=5)
    assert whole.name(3) in str(error.value) and "\n" not in str(error.value)


def test_evaluation_masks_broken_files(folder):
    source = open_folder(folder)
    found = list(eval_batches(source, batch_size=8, image_size=8, resize=8))
    assert endings(source.unreadable.reasons) == BROKEN
    assert len(found) == 3
    mask = np.concatenate([batch["mask"] for batch in found])
    assert mask.sum() == 17 and mask[20:].sum() == 0
    labels = np.concatenate([batch["label"] for batch in found])
    good = np.flatnonzero(mask[:20])
    np.testing.assert_array_equal(labels[good], source.labels[good])


def test_nothing_but_broken_files(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "train" / "a" / name).write_text("no")
    source = open_folder(tmp_path)
    stream = train_batches(
        source,
        shuffled(2, 2, seed=0),
        batch_size=2,
        image_size=8,
        views=1,
        augmentation=Augmentation(),
        seed=0,
    )
    with pytest.raises(ValueError, match="none of the images can be decoded"):
        next(stream)


def test_labels_out_of_range_are_named(tfds_dir):
    import dataclasses

    source = open_source("cifar10", "test[:9]", dir=tfds_dir)
    fewer = dataclasses.replace(source, num_classes=3)
    with pytest.raises(ValueError, match=r"label \d of .*tfrecord.*allowed: 0 to 2"):
        list(eval_batches(fewer, batch_size=3, image_size=32, resize=32))


def one_image(tmp_path, label):
    path = tmp_path / "image.png"
    photo().save(path)
    return FileSource(np.asarray([str(path)]), np.asarray([label], np.int32), ("a",))


def test_a_label_out_of_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label 2 of .*image\.png is out of"):
        list(eval_batches(one_image(tmp_path, 2), batch_size=2, image_size=8, resize=8))


def test_an_image_without_a_label_is_never_taken_for_padding(tmp_path):
    """It was black, and did not count."""
    source = one_image(tmp_path, -1)
    (batch,) = eval_batches(source, batch_size=2, image_size=8, resize=8)
    assert batch["mask"].tolist() == [1, 0] and batch["label"].tolist() == [-1, 0]
    labelled = one_image(tmp_path, 0)
    (same,) = eval_batches(labelled, batch_size=2, image_size=8, resize=8)
    np.testing.assert_array_equal(batch["image"], same["image"])
    assert batch["image"][0].std() > 10 and batch["image"][1].sum() == 0
    stream = train_batches(
        source,
        shuffled(1, 2, seed=0),
        batch_size=2,
        image_size=8,
        views=2,
        augmentation=Augmentation(),
        seed=0,
    )
    batch = next(stream)
    assert batch["label"].tolist() == [-1, -1]
    assert (batch["image"].reshape(4, -1).std(axis=1) > 5).all()


# --- the end of a process ---

# Threads of TensorFlow's that were still reading hung about every third process.
ENDS = """
import sys
import tests.test_host as host

def stream(root):
    source = host.open_source("folder", "train", root=root)
    return host.train_batches(
        source, host.shuffled(source.num_examples, 4, seed=0), batch_size=4,
        image_size=8, views=2, augmentation=host.Augmentation(), seed=0,
    )

left_open = stream(sys.argv[1] + "/good")
next(left_open)
try:
    list(stream(sys.argv[1] + "/broken"))
except ValueError as error:
    print(error)
    sys.exit(2)
"""


def test_a_process_ends_while_images_are_read(tmp_path):
    """By an error, which is kept until the end, and with a stream left open."""
    for name in ("good", "broken"):
        folder = tmp_path / name / "train" / "a"
        folder.mkdir(parents=True)
        for index in range(40):
            photo().save(folder / f"{index:02}.jpg")
    (folder / "20.jpg").write_text("no")
    result = subprocess.run(
        [sys.executable, "-c", ENDS, str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    assert "cannot decode" in result.stdout and "20.jpg" in result.stdout
    for noise in ("Traceback", "interpreter"):
        assert noise not in result.stderr


# --- the crop of evaluation ---


def test_a_part_of_a_resized_image_is_that_of_the_whole():
    """Bit for bit, whatever the sizes: thin images are cropped as the others."""
    rng = np.random.default_rng(0)
    sizes = [(1, 1, 8, 9), (1, 60, 8, 9), (60, 1, 8, 8), (33, 33, 33, 33)]
    for _ in range(40):
        size = int(rng.integers(1, 64))
        sizes.append((*rng.integers(1, 400, 2), size, size + int(rng.integers(8))))
    for height, width, size, resize in sizes:
        image = tf.constant(rng.integers(0, 256, (height, width, 3), np.uint8))
        short = min(height, width)
        target = np.round(np.asarray([height, width]) * resize / short).astype(np.int32)
        first = (target - size) // 2
        (top, left), ends = first, first + size
        whole = host_views._resize(image, target)[top : ends[0], left : ends[1]]
        part = host_views._resize_part(
            image, tf.constant(target), tf.constant(first), size
        )
        np.testing.assert_array_equal(part, whole)


@pytest.mark.parametrize("shape", [(1, 5000, 3), (5000, 1, 3)])
def test_the_crop_of_a_strip_takes_little_memory(shape, monkeypatch):
    """Its resized image would have 256 x 1,280,000 pixels, 3.9 GB."""
    monkeypatch.setattr(host_views, "_resize", None)
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    options = {"image_size": 224, "resize": 256}
    crop = host_views.central_crop(tf.constant(image), None, **options)
    np.testing.assert_array_equal(crop[0], images.central_crop(image, **options))


# --- small splits in memory ---


def test_small_images_are_decoded_once(tfds_dir):
    encoded = open_source("cifar10", "test[:1234]", dir=tfds_dir)
    loaded = load_small(encoded, 32)
    assert loaded.images.shape == (1234, 32, 32, 3)
    assert loaded.class_names == encoded.class_names
    options = {"batch_size": 500, "image_size": 32, "resize": 32}
    for a, b in zip(
        eval_batches(encoded, **options), eval_batches(loaded, **options), strict=True
    ):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_other_sizes_and_files_are_not_loaded(tfds_dir, folder, monkeypatch):
    encoded = open_source("cifar10", "test[:9]", dir=tfds_dir)
    assert load_small(encoded, 24) is encoded
    files = open_source("folder", "train", root=str(folder))
    assert load_small(files, 24) is files
    monkeypatch.setattr("supcon_jax.data.pipeline.IN_MEMORY_BYTES", 9 * 32 * 32 * 3 - 1)
    assert load_small(encoded, 32) is encoded


def test_of_large_images_only_a_few_are_held(monkeypatch):
    """Photos handed on as pixels: a batch of 1,000 needs no more memory than one of 50."""
    read = []

    class Large(FileSource):
        def read(self, index):
            read.append(index)
            return Encoded(bytes(1000), index % 7, 1)

    source = Large(np.asarray(["x"] * 1000), np.zeros(1000, np.int32), ("a",))
    monkeypatch.setattr(host, "CHUNK_BYTES", 20_000)

    def rows(step):
        ids = np.stack([np.full(1000, step), np.arange(1000)], axis=1)
        return ids, ids[:, 1]

    chunks = host._read_encoded(source, rows, range(2), most=512, unread={})
    images, labels, _, is_example, ids = next(chunks)
    assert len(images) == 20 and len(read) <= 20 + 2 * host.READERS
    for chunk in chunks:
        labels = np.append(labels, chunk[1])
        ids = np.append(ids, chunk[4], axis=0)
        assert len(chunk[0]) == 20 and chunk[3].all()
    np.testing.assert_array_equal(ids[:, 1], np.tile(np.arange(1000), 2))
    np.testing.assert_array_equal(ids[:, 0], np.repeat([0, 1], 1000))
    np.testing.assert_array_equal(labels, ids[:, 1] % 7)
