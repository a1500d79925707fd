"""Finding what TFDS has prepared: versions, downloads, and refusals without TensorFlow."""

import json
import os
import pathlib
import sys

import jax
import pytest

from supcon_jax.data import tensorflow_imports
from supcon_jax.data.datasets import open_source
from supcon_jax.data.prepared import prepared_versions
from tests.test_datasets import refusal


def prepare(directory, name):
    version = directory / name
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text(json.dumps({"name": name}))


# --- before TensorFlow is imported ---


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


# --- versions ---


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


def test_tfds_opens_the_newest_of_several_versions(tfds_dir, tmp_path):
    """Older and unfinished versions beside it would fail if they were opened."""
    for version in ("1.10.0", "3.0.1", "incomplete.9.0.0"):
        prepare(tmp_path, f"cifar10/{version}")
    real = next(iter(pathlib.Path(tfds_dir, "cifar10").iterdir()))
    (tmp_path / "cifar10" / real.name).symlink_to(real)
    source = open_source("cifar10", "test", dir=str(tmp_path))
    assert source.num_examples == 10_000


def test_a_version_can_be_asked_for(tfds_dir):
    assert open_source("cifar10:3.0.2", "test[:5]", dir=tfds_dir).num_examples == 5


def test_tfds_data_dir_variable(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    assert open_source("cifar10", "test[:7]").num_examples == 7


# --- TensorFlow itself ---


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
