"""Opening .npz files: names, labels and images of all kinds, and every refusal."""

import builtins

import numpy as np
import pytest

from supcon_jax.data.datasets import open_source
from tests.test_datasets import refusal

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
LABELS = np.array([0, 2, 1, 1, 0, 2])


def save(path, **changes):
    arrays = {
        "train_images": IMAGES,
        "train_labels": LABELS,
        "test_images": IMAGES[:2],
        "test_labels": np.array([3, 0]),
    } | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def test_arrays(tmp_path):
    root = save(tmp_path / "data.npz")
    train, test = (
        open_source("arrays", split, root=root) for split in ("train", "test")
    )
    np.testing.assert_array_equal(train.images, IMAGES)
    np.testing.assert_array_equal(train.labels, LABELS)
    assert train.labels.dtype == np.int32
    np.testing.assert_array_equal(test.labels, [3, 0])
    # Class 3 occurs in the test split only; both must agree on four classes.
    assert train.num_classes == test.num_classes == 4


def test_arrays_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "data.npz")
    assert open_source("arrays", "train", root="~/data.npz").num_examples == 6


@pytest.mark.parametrize("root", ["", "/no/such/file.npz", "."])
def test_arrays_refuses_a_missing_file(root):
    message = refusal("arrays", "train", root=root)
    assert repr(root) in message and "--config.data.root" in message


def test_arrays_refuses_what_is_no_npz(tmp_path):
    path = tmp_path / "data.npz"
    save(path)
    whole = path.read_bytes()
    np.save(tmp_path / "one.npy", IMAGES)
    damaged = bytearray(whole)
    damaged[200:300] = bytes(100)  # inside the pixels: the checksum of the archive
    for content in (
        b"",
        b"not an archive",
        b"PK\x03\x04 broken",
        whole[:300],
        bytes(damaged),
        (tmp_path / "one.npy").read_bytes(),
    ):
        path.write_bytes(content)
        message = refusal("arrays", "train", root=str(path))
        assert f"cannot read {path} as .npz" in message
        assert "--config.data.root" in message


def test_arrays_refuses_pickles(tmp_path):
    """Loading a pickled object would run its code."""
    path = tmp_path / "data.npz"

    class Evil:
        def __reduce__(self):
            return (builtins.exec, ("raise SystemExit('ran')",))

    np.savez(path, train_images=IMAGES, train_labels=np.array([Evil()], dtype=object))
    message = refusal("arrays", "train", root=str(path))
    assert str(path) in message


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"train_images": IMAGES / 255}, "train_images is float64"),
        ({"train_images": IMAGES[0]}, "expected integers [4]"),
        ({"train_images": IMAGES[0, 0]}, "expected uint8 [n, H, W, 3]"),
        ({"train_images": IMAGES[..., :2]}, "expected uint8 [n, H, W, 3]"),
        ({"train_images": np.moveaxis(IMAGES, -1, 1)}, "np.moveaxis(images, 1, -1)"),
        ({"train_images": IMAGES / np.float32(255)}, "np.round(x * 255)"),
        ({"train_images": IMAGES.astype(np.float32) - 99}, "x.max() - x.min()"),
        ({"train_images": IMAGES.astype(np.float64)}, "np.round(x).astype(np.uint8)"),
        ({"train_images": IMAGES.astype(np.uint16) * 257}, "0 to 65535"),
        (
            {"train_images": np.where(np.arange(6) == 4, np.nan, 1.0)[:, None, None]},
            "image 4 has values that are no number",
        ),
        ({"train_labels": LABELS[:4]}, "expected integers [6]"),
        ({"train_labels": LABELS / 2}, "expected integers [6]"),
        ({"train_labels": np.where(LABELS, np.nan, 1)}, "number 1 is not finite"),
        ({"train_labels": np.eye(3)[LABELS]}, "labels.argmax(axis=1)"),
        ({"train_labels": np.array(list("abcabc"))}, "numbers and words"),
        ({"train_labels": np.array(LABELS, object)}, "np.asarray(words, dtype=str)"),
        ({"train_labels": LABELS + 1j}, "expected integers [6]: or words"),
        (
            {"train_labels": None},
            "unknown split 'train'; available: test; the arrays are train_images, "
            "test_images, test_labels; wanted: train_images and train_labels, or x_train "
            "and y_train",
        ),
    ],
)
def test_arrays_refuses_other_contents(tmp_path, changes, part):
    root = save(tmp_path / "data.npz", **changes)
    message = refusal("arrays", "train", root=root)
    assert part in message
    assert root in message or "--config.data.train_split" in message


@pytest.mark.parametrize(
    ("train", "test", "names"),
    [
        (LABELS + 1, [1, 3], ("1", "2", "3")),
        (LABELS * 10_000_000 + 7, [7, 20_000_007], ("7", "10000007", "20000007")),
        (
            LABELS.astype(np.int64) * 2**40 + 2**32,
            [2**32, 2**41 + 2**32],
            tuple(str(2**32 + 2**40 * n) for n in range(3)),
        ),
        (
            LABELS.astype(np.uint64) + np.uint64(2**63),
            np.array([2**63, 2**63 + 2], np.uint64),
            tuple(str(2**63 + n) for n in range(3)),
        ),
        (
            np.array(["ant", "cat", "dog"])[LABELS],
            ["ant", "dog"],
            ("ant", "cat", "dog"),
        ),
        (np.array([b"ant", b"cat", b"dog"])[LABELS], [b"ant", b"dog"], None),
        (LABELS[:, None], [[0], [2]], ()),
        (LABELS.astype(np.uint8), [0, 2], ()),
        (LABELS.astype(np.float32), [0.0, 2.0], ()),
    ],
    ids=[
        "from one",
        "gaps",
        "64 bits",
        "unsigned",
        "words",
        "bytes",
        "column",
        "8",
        "f",
    ],
)
def test_ids_of_any_kind_become_numbers_of_classes(tmp_path, train, test, names):
    """Different ids stay different, and the source knows what they were."""
    root = save(tmp_path / "d.npz", train_labels=train, test_labels=np.asarray(test))
    sources = [open_source("arrays", split, root=root) for split in ("train", "test")]
    for source, expected in zip(sources, (LABELS, [0, 2]), strict=True):
        np.testing.assert_array_equal(source.labels, expected)
        assert source.labels.dtype == np.int32 and source.num_classes == 3
        known = ("ant", "cat", "dog") if names is None else names
        assert source.class_names == known
        assert [", ".join(known) in note for note in source.notes] == [True] * bool(
            known
        )


def test_labels_below_0_and_empty_words_say_that_there_is_none(tmp_path):
    for labels in (
        np.where(LABELS == 1, -7, LABELS),
        np.array(["a", "b", ""])[[0, 1, 2]],
    ):
        images = IMAGES[: len(labels)]
        changes = {
            "train_images": images,
            "train_labels": labels,
            "test_labels": labels[:2],
        }
        root = save(tmp_path / "data.npz", **changes)
        source = open_source("arrays", "train", root=root)
        none = np.isin(labels.astype(str), ["", "-7"])
        assert none.any()
        np.testing.assert_array_equal(source.labels == -1, none)
        assert source.num_classes == 2


def test_grey_and_transparent_arrays_become_rgb(tmp_path):
    grey = IMAGES[..., 0]
    repeated = np.repeat(grey[..., None], 3, axis=-1)
    for images, expected in (
        (grey, repeated),
        (grey[..., None], repeated),
        (grey.astype(np.int64), repeated),
        (grey > 100, np.where(repeated > 100, 255, 0)),
        (np.concatenate([IMAGES, IMAGES[..., :1]], axis=-1), IMAGES),
    ):
        root = save(tmp_path / "data.npz", train_images=images)
        source = open_source("arrays", "train", root=root)
        np.testing.assert_array_equal(source.images, expected)
        assert source.images.dtype == np.uint8


@pytest.mark.parametrize(
    "keys",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("X_train", "Y_train", "X_val", "Y_val"),
        ("train_images", "train_labels", "val_images", "val_labels"),
        ("training_x", "training_y", "validation_x", "validation_y"),
        ("Train_Images", "Train_Labels", "Test_Images", "Test_Labels"),
    ],
    ids=lambda keys: keys[0],
)
def test_names_of_keras_medmnist_and_others(tmp_path, keys):
    arrays = dict(zip(keys, (IMAGES, LABELS, IMAGES[:2], [0, 1]), strict=True))
    np.savez(tmp_path / "data.npz", other=np.zeros(3), **arrays)
    root = str(tmp_path / "data.npz")
    assert open_source("arrays", "train", root=root).num_examples == 6
    assert open_source("arrays", "test", root=root).num_examples == 2


def test_arrays_without_splits_are_the_training_split(tmp_path):
    np.savez(tmp_path / "data.npz", images=IMAGES, labels=LABELS)
    root = str(tmp_path / "data.npz")
    assert open_source("arrays", "train", root=root).num_examples == 6
    message = refusal("arrays", "test", root=root)
    assert "--config.data.validation_fraction" in message


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "data.npz"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "git lfs pull" in refusal("arrays", "train", root=str(path))
