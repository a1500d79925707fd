"""Opening: the fixed digits split, .npz files, folders, TFDS, and every refusal."""

import builtins
import hashlib
import json
import os
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from supcon_jax.data import tensorflow_imports
from supcon_jax.data.datasets import open_source
from supcon_jax.data.prepared import prepared_versions
from supcon_jax.data.records import RecordSource


def refusal(*args, **kwargs):
    """The message of the ValueError, which must be one line."""
    with pytest.raises(ValueError) as error:
        open_source(*args, **kwargs)
    message = str(error.value)
    assert message and "\n" not in message
    return message


# --- digits ---


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


def test_digits_refuses_other_splits():
    message = refusal("digits", "validation")
    assert "'validation'" in message and "train, test" in message
    assert "--config.data.train_split" in message


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in refusal("digits", "train")


# --- arrays ---

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


# --- TFDS folders, refused before TensorFlow is imported ---


@pytest.fixture
def no_tensorflow(monkeypatch):
    def fail():
        raise AssertionError("TensorFlow was imported")

    monkeypatch.setattr(tensorflow_imports, "import_tensorflow", fail)


def test_tfds_refuses_a_missing_directory(no_tensorflow, tmp_path):
    message = refusal("cifar10", "train", dir=str(tmp_path / "nowhere"))
    assert "nowhere does not exist (--config.data.dir)" in message
    assert "configs/digits.py runs without any data" in message


def test_tfds_refuses_an_empty_directory(no_tensorflow, tmp_path):
    message = refusal("cifar10", "train", dir=str(tmp_path))
    assert f"{tmp_path} has no cifar10; it holds no dataset" in message
    assert "--config.data.dir" in message and "configs/digits.py" in message


def test_tfds_names_what_the_directory_holds(no_tensorflow, tmp_path):
    for name in ("mnist/3.0.1", "cifar100/3.0.2"):
        prepare(tmp_path, name)
    message = refusal("cifar10", "train", dir=str(tmp_path))
    assert "has no cifar10; it holds cifar100, mnist" in message


def test_tfds_refuses_a_half_prepared_dataset(no_tensorflow, tmp_path):
    """TFDS writes dataset_info.json last; a folder without it is a broken download."""
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    (tmp_path / "cifar10" / "incomplete.ABC_3.0.2").mkdir()
    assert "has no cifar10" in refusal("cifar10", "train", dir=str(tmp_path))


def test_imagenet_says_how_to_get_it(no_tensorflow, tmp_path, monkeypatch):
    message = refusal("imagenet2012", "train", dir=str(tmp_path))
    for part in ("image-net.org", "--manual_dir", "configs/digits.py"):
        assert part in message
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    message = refusal("imagenet2012", "train")
    assert "image-net.org" in message and "--config.data.dir" in message


@pytest.mark.parametrize("name", ["", "../secret", "cifar 10", "10cifar"])
def test_tfds_refuses_names_that_are_none(no_tensorflow, name):
    message = refusal(name, "train")
    assert repr(name) in message and "--config.data.name" in message


def prepare(directory, name):
    version = directory / name
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text(json.dumps({"name": name}))


@pytest.mark.parametrize("config", ["", "plain_text/"])
def test_the_newest_version_by_number_is_chosen(tmp_path, config):
    for version in ("9.0.0", "10.0.0", "3.10.9", "incomplete.11.0.0"):
        prepare(tmp_path, f"caltech/{config}{version}")
    found = prepared_versions(str(tmp_path), "caltech")
    assert list(found) == ["10.0.0", "9.0.0", "3.10.9"]
    assert found["10.0.0"] == str(tmp_path / "caltech" / config / "10.0.0")
    assert prepared_versions(str(tmp_path), "other") == {}


def test_another_version_is_refused_and_the_prepared_ones_named(tmp_path):
    for version in ("5.0.0", "5.1.0"):
        prepare(tmp_path, f"imagenet2012/{version}")
    message = refusal("imagenet2012:6.0.0", "train", dir=str(tmp_path))
    assert "has imagenet2012 5.1.0, 5.0.0, not 6.0.0" in message
    assert "--config.data.name" in message


def test_tensorflow_missing(monkeypatch, tmp_path):
    prepare(tmp_path, "cifar10/3.0.2")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    message = refusal("cifar10", "train", dir=str(tmp_path))
    assert "needs TensorFlow" in message and "data.name='arrays'" in message


@pytest.mark.parametrize(
    ("before", "after"), [(None, "3"), ("1", "3"), ("0", "0"), ("2", "2")]
)
def test_tensorflow_is_quiet_unless_told_otherwise(monkeypatch, before, after):
    """JAX sets 1 when it is imported, which is nobody's choice."""
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", before or "")
    if before is None:
        monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    tensorflow_imports.import_tensorflow()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == after


# --- TFDS on real data ---


def test_tfds_opens_splits_and_slices(tfds_dir):
    source = open_source("cifar10", "test", dir=tfds_dir)
    assert isinstance(source, RecordSource)
    assert (source.num_examples, source.num_classes) == (10_000, 10)
    slice_ = open_source("cifar10", "train[:10%]", dir=tfds_dir)
    assert slice_.num_examples == 5_000
    imagenet = open_source("imagenet2012", "validation", dir=tfds_dir)
    assert (imagenet.num_examples, imagenet.num_classes) == (100, 1000)


def test_tfds_data_dir_variable(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    assert open_source("cifar10", "test[:7]").num_examples == 7


def test_tfds_opens_the_newest_of_several_versions(tfds_dir, tmp_path):
    """Older and unfinished versions beside it would fail if they were opened."""
    for version in ("1.10.0", "3.0.1", "incomplete.9.0.0"):
        prepare(tmp_path, f"cifar10/{version}")
    real = next(iter(pathlib.Path(tfds_dir, "cifar10").iterdir()))
    (tmp_path / "cifar10" / real.name).symlink_to(real)
    source = open_source("cifar10", "test", dir=str(tmp_path))
    assert source.num_examples == 10_000


@pytest.mark.parametrize("split", ["valid", "test[:", "test[:10]x", "test[:200%]"])
def test_tfds_refuses_unknown_splits(tfds_dir, split):
    message = refusal("cifar10", split, dir=tfds_dir)
    assert "split" in message and "--config.data.eval_split" in message


# --- downloads, with no network ---


@pytest.fixture
def tfds(tfds_dir, monkeypatch, tmp_path):
    """TFDS with a home folder that is empty."""
    del tfds_dir  # only where there are TFDS tests at all
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tensorflow_imports.import_tensorflow_datasets()


def test_an_unknown_name_lists_the_nearest(tfds):
    message = refusal("cifar11", "train")
    assert "unknown dataset 'cifar11'" in message and "cifar10" in message
    assert "--config.data.name" in message
    assert "digits" in refusal("digit", "train")


def test_a_download_that_fails_is_one_line(tfds, monkeypatch, tmp_path):
    def fail(name, data_dir):
        raise OSError(f"no route to host\nfor {name} and more lines")

    monkeypatch.setattr(tfds, "builder", fail)
    message = refusal("cifar10", "train")
    assert f"could not download cifar10 into {tmp_path}: no route to host;" in message
    assert "--config.data.dir" in message


def test_a_download_goes_where_tfds_keeps_its_data(tfds, monkeypatch, tmp_path):
    prepared = []

    class Builder:
        def __init__(self, name, data_dir):
            self.arguments = (name, str(data_dir))

        def download_and_prepare(self):
            prepared.append(self.arguments)
            raise OSError("stop here")

    monkeypatch.setattr(tfds, "builder", Builder)
    refusal("cifar10", "train")
    assert prepared == [("cifar10", str(tmp_path))]


def test_several_hosts_do_not_download(tfds, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    message = refusal("cifar10", "train")
    assert "tfds build cifar10" in message and "--config.data.dir" in message


# --- records ---


def copy_of_cifar(tfds_dir, folder):
    (real,) = pathlib.Path(tfds_dir, "cifar10").iterdir()
    copy = folder / "cifar10" / real.name
    shutil.copytree(real, copy)
    return copy


def test_records_are_found_where_tfds_finds_them(tfds_dir):
    """Labels, images and order of a slice that begins and ends inside files."""
    import tensorflow_datasets

    source = open_source("cifar10", "test[2490:2510]", dir=tfds_dir)
    dataset = tensorflow_datasets.load(
        "cifar10",
        split="test[2490:2510]",
        data_dir=tfds_dir,
        decoders={"image": tensorflow_datasets.decode.SkipDecoding()},
    )
    examples = list(tensorflow_datasets.as_numpy(dataset))
    assert len(examples) == source.num_examples == 20
    assert len(set(source.file.tolist())) == 2
    for index, example in enumerate(examples):
        ours = source.read(index)
        assert ours.image == example["image"] and ours.label == example["label"]
    assert source.class_names[:2] == ("airplane", "automobile")


def test_a_version_can_be_asked_for(tfds_dir):
    assert open_source("cifar10:3.0.2", "test[:5]", dir=tfds_dir).num_examples == 5


@pytest.mark.parametrize("cut", [5, 5000])
def test_a_damaged_record_file_is_refused(tfds_dir, tmp_path, cut):
    """A download that broke off: the last record is cut, or whole ones are missing."""
    version = copy_of_cifar(tfds_dir, tmp_path)
    file = sorted(version.glob("*test*tfrecord*"))[1]
    file.write_bytes(file.read_bytes()[:-cut])
    message = refusal("cifar10", "test", dir=str(tmp_path))
    assert str(file) in message and "is damaged" in message


def test_a_missing_record_file_is_refused(tfds_dir, tmp_path):
    version = copy_of_cifar(tfds_dir, tmp_path)
    sorted(version.glob("*test*tfrecord*"))[1].unlink()
    message = refusal("cifar10", "test", dir=str(tmp_path))
    assert "No such file" in message and "--config.data.dir" in message


# --- image folders ---


def image_folder(path, classes, *, count=3, size=(6, 4)):
    """`classes` folders of JPEGs, each of one colour."""
    for number, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for index in range(count):
            image = Image.new("RGB", size, (40 * number, 10 * index, 0))
            image.save(path / name / f"{index}.jpg")


def test_folder_with_train_and_val(tmp_path):
    image_folder(tmp_path / "train", ["cat", "ant", "dog"])
    image_folder(tmp_path / "val", ["dog", "ant"], count=2)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "ant" / ".hidden.jpg").write_text("not an image")
    (tmp_path / "train" / "ant" / "more").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "train" / "ant" / "more" / "big.JPEG")
    train = open_source("folder", "train", root=str(tmp_path))
    val = open_source("folder", "val", root=str(tmp_path))
    assert train.class_names == val.class_names == ("ant", "cat", "dog")
    assert train.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    assert val.labels.tolist() == [0, 0, 2, 2]  # numbered as in train
    assert train.num_examples == 10 and train.num_classes == 3
    example = train.read(4)
    assert example.label == 1 and example.orientation == 1
    assert example.image == (tmp_path / "train" / "cat" / "0.jpg").read_bytes()
    assert train.notes == (f"{tmp_path / 'train'}: left alone 1 .txt",)
    assert val.notes == ()
    assert "--config.data.eval_split" in refusal("folder", "odd", root=str(tmp_path))


def test_folder_without_splits(tmp_path):
    image_folder(tmp_path, ["ant", "cat"])
    assert open_source("folder", "train", root=str(tmp_path)).num_examples == 6
    message = refusal("folder", "val", root=str(tmp_path))
    assert "--config.data.validation_fraction" in message


def test_folder_refuses_what_it_cannot_use(tmp_path):
    assert "--config.data.root" in refusal("folder", "train", root="")
    assert "/nowhere" in refusal("folder", "train", root="/nowhere")
    message = refusal("folder", "train", root=str(tmp_path))
    assert "holds no folders" in message and "--config.data.root" in message
    image_folder(tmp_path / "train", ["ant", "cat"])
    image_folder(tmp_path / "val", ["ant", "cow"])
    message = refusal("folder", "val", root=str(tmp_path))
    assert "'cow'" in message and "lacks" in message
    (tmp_path / "train" / "empty").mkdir()
    message = refusal("folder", "train", root=str(tmp_path))
    assert f"{tmp_path / 'train' / 'empty'} holds no images" in message


@pytest.mark.parametrize(
    ("train", "held", "asked"),
    [
        ("train", "val", "test"),
        ("train", "test", "val"),
        ("train", "test", "validation"),
        ("Train", "Test", "test"),
        ("TRAIN", "Valid", "test"),
        ("training", "validation", "val"),
        ("Training", "testing", "test"),
    ],
)
def test_splits_go_by_their_usual_names(tmp_path, messages, train, held, asked):
    image_folder(tmp_path / train, ["ant", "cat"])
    image_folder(tmp_path / held, ["ant", "cat"], count=2)
    assert open_source("folder", "train", root=str(tmp_path)).num_examples == 6
    source = open_source("folder", asked, root=str(tmp_path))
    assert source.num_examples == 4 and held in source.name(0)
    said = f"there is no split {asked!r}: taking {held!r}"
    assert (said in messages) == (asked != held.lower())


def test_a_split_that_is_there_is_not_replaced(tmp_path, messages):
    for count, name in enumerate(("train", "val", "test", "holdout"), start=1):
        image_folder(tmp_path / name, ["ant", "cat"], count=count)
    for count, name in enumerate(("train", "val", "test", "holdout"), start=1):
        source = open_source("folder", name, root=str(tmp_path))
        assert source.num_examples == 2 * count
    assert messages == []


@pytest.mark.parametrize("way", ["flowers", "a/b"])
def test_the_splits_or_classes_may_lie_further_down(tmp_path, messages, way):
    for split in ("train", "val"):
        image_folder(tmp_path / "splits" / way / split, ["ant", "cat"])
    image_folder(tmp_path / "classes" / way, ["ant", "cat"])
    (tmp_path / "classes" / "__MACOSX" / "ant").mkdir(parents=True)
    for root in ("splits", "classes"):
        source = open_source("folder", "train", root=str(tmp_path / root))
        assert source.class_names == ("ant", "cat") and source.num_examples == 6
        below = tmp_path / root / way
        assert any(str(below) in message for message in messages)


def test_a_class_alone_is_no_folder_to_look_into(tmp_path):
    image_folder(tmp_path, ["ant"])
    source = open_source("folder", "train", root=str(tmp_path))
    assert source.class_names == ("ant",)


def test_splits_without_training_images_are_no_classes(tmp_path):
    for split in ("test", "val"):
        image_folder(tmp_path / split, ["ant", "cat"])
    message = refusal("folder", "train", root=str(tmp_path))
    assert "has test, val and no folder 'train'" in message
    image_folder(tmp_path / "train", ["ant", "cat"])
    message = refusal("folder", "test", root=str(tmp_path / "train"))
    assert f"or give {tmp_path} (--config.data.root)" in message


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "@eaDir", ".thumbs"])
def test_hidden_folders_and_files_are_no_data(tmp_path, hidden):
    image_folder(tmp_path / "train", ["ant", "cat"])
    picture = tmp_path / "train" / "cat" / "0.jpg"
    for place in ("", "train", "train/ant", "train/ant/deeper"):
        folder = tmp_path / place / hidden
        folder.mkdir(parents=True)
        shutil.copy(picture, folder / "0.jpg")
        for name in ("._0.jpg", "@0.jpg"):
            shutil.copy(picture, tmp_path / place / name)
    source = open_source("folder", "train", root=str(tmp_path))
    assert source.class_names == ("ant", "cat")
    assert source.num_examples == 6 and source.notes == ()


def test_links_are_followed_and_loops_are_not(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    image_folder(elsewhere, ["many", "cat"])
    root = tmp_path / "root"
    image_folder(root / "train", ["ant"])
    (root / "train" / "cat").symlink_to(elsewhere / "cat")
    (root / "train" / "ant" / "more").symlink_to(elsewhere / "many")
    (root / "train" / "ant" / "up").symlink_to(root / "train")
    (root / "train" / "ant" / "here").symlink_to(root / "train" / "ant")
    (elsewhere / "many" / "back").symlink_to(root)
    (elsewhere / "many" / "self").symlink_to(elsewhere / "many")
    (root / "train" / "ant" / "link.jpg").symlink_to(elsewhere / "cat" / "0.jpg")
    source = open_source("folder", "train", root=str(root))
    assert np.bincount(source.labels).tolist() == [7, 3]
    assert not any("back" in path or "up" in path for path in source.paths)


def test_what_is_left_alone_is_counted(tmp_path):
    image_folder(tmp_path / "train", ["ant", "cat"])
    for name in ("ant/a.heic", "ant/b.HEIC", "cat/c.heic", "cat/README", "cat/d.txt"):
        (tmp_path / "train" / name).write_text("")
    shutil.copy(tmp_path / "train" / "ant" / "0.jpg", tmp_path / "train" / "stray.jpg")
    (note,) = open_source("folder", "train", root=str(tmp_path)).notes
    assert "left alone 3 .heic, " in note and "1 .txt" in note
    assert "1 without a suffix" in note and "1 images beside the folders" in note
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "e.heic").write_text("")
    message = refusal("folder", "train", root=str(tmp_path))
    assert "dog holds no images" in message and "it has 1 .heic" in message


def test_synthetic_needs_nothing(no_tensorflow):
    train, test = (open_source("synthetic", split) for split in ("train", "test"))
    assert train.num_classes == test.num_classes == 1000
    assert train.num_examples == 1_281_167
    assert "train, test" in refusal("synthetic", "val")
