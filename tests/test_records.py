"""CIFAR-10 and ImageNet as TFDS prepared them: splits, records, damaged files."""

import pathlib
import shutil

import pytest

from supcon_jax.data.datasets import open_source
from supcon_jax.data.records import RecordSource
from tests.test_datasets import refusal


def test_tfds_opens_splits_and_slices(tfds_dir):
    source = open_source("cifar10", "test", dir=tfds_dir)
    assert isinstance(source, RecordSource)
    assert (source.num_examples, source.num_classes) == (10_000, 10)
    slice_ = open_source("cifar10", "train[:10%]", dir=tfds_dir)
    assert slice_.num_examples == 5_000
    imagenet = open_source("imagenet2012", "validation", dir=tfds_dir)
    assert (imagenet.num_examples, imagenet.num_classes) == (100, 1000)


@pytest.mark.parametrize("split", ["valid", "test[:", "test[:10]x", "test[:200%]"])
def test_tfds_refuses_unknown_splits(tfds_dir, split):
    message = refusal("cifar10", split, dir=tfds_dir)
    assert "split" in message and "--config.data.eval_split" in message


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
