"""Where records begin: found once, kept, checked, made anew where it is of other data."""

import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf

from configs import digits
from supcon_jax import storage
from supcon_jax.data import index
from supcon_jax.data.datasets import open_source
from supcon_jax.data.index import Shards, find_records, record_lengths
from supcon_jax.tools.index import main as index_tool
from tests.conftest import SHARED

pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs ../shared (real data), which is not here"
)
NAME = "supcon_jax.train.index.npz"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path, cache):
    """A copy of a data set that can be written to."""
    version = tmp_path / "data" / "imagenet2012" / "5.1.0"
    version.mkdir(parents=True)
    for file in (SHARED / "data/tfds/imagenet2012/5.1.0").iterdir():
        if "train" not in file.name:
            shutil.copyfile(file, version / file.name)
    for number in range(4):  # the smaller split under the name of the other
        source = version / f"imagenet2012-validation.tfrecord-0000{number}-of-00004"
        shutil.copyfile(source, str(source).replace("validation", "train"))
    info = version / "dataset_info.json"
    info.write_text(info.read_text().replace('"100"', '"25"'))
    return version


@pytest.fixture
def walks(monkeypatch):
    """Which files were gone through."""
    seen = []
    monkeypatch.setattr(
        index,
        "find_records",
        lambda path, expected: seen.append(path) or find_records(path, expected),
    )
    return seen


def shards(folder):
    names = tuple(sorted(p.name for p in folder.glob("*train.tfrecord*")))
    return Shards(str(folder), "train", names, (25,) * 4, 12345)


def run_tool(folder, *flags):
    index_tool(
        [
            f"--config={pathlib.Path(digits.__file__)}",
            "--config.data.name=imagenet2012",
            f"--config.data.dir={folder.parent.parent}",
            *flags,
        ]
    )


def sequential(folder):
    """All records as TensorFlow reads them, file after file."""
    files = [str(path) for path in sorted(folder.glob("*train.tfrecord*"))]
    return list(tf.data.TFRecordDataset(files).as_numpy_iterator())


@pytest.mark.parametrize("chunk", [12, 1000, 10**6])
def test_records_are_those_that_tensorflow_reads(folder, chunk):
    path = sorted(folder.glob("*train.tfrecord*"))[0]
    data = path.read_bytes()
    lengths, end = index._walk(lambda a, b: data[a:b], len(data), chunk)
    assert end == len(data) and lengths == find_records(str(path), 25).tolist()
    expected = [len(record) for record in sequential(folder)[:25]]
    assert lengths == expected


def test_an_index_gives_what_reading_in_order_gives(folder, walks, capsys):
    plain = open_source("imagenet2012", "train", dir=str(folder.parent.parent))
    assert not list(folder.glob("*.npz"))  # small: found faster than anyone notices
    run_tool(folder)
    assert "train: 100 records" in capsys.readouterr().out
    assert sorted(p.name for p in folder.glob("*.npz"))[0] == NAME
    walks.clear()
    source = open_source("imagenet2012", "train", dir=str(folder.parent.parent))
    assert walks == []
    for column in ("file", "offset", "length"):
        np.testing.assert_array_equal(getattr(source, column), getattr(plain, column))
    raw = source.visit(range(100), lambda i, features: features["image"])
    images = [
        tf.train.Example.FromString(record).features.feature["image"]
        for record in sequential(folder)
    ]
    assert raw == images
    part = open_source("imagenet2012", "train[30:60]", dir=str(folder.parent.parent))
    np.testing.assert_array_equal(part.offset, plain.offset[30:60])


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text"])
def test_a_damaged_index_is_made_anew(folder, walks, messages, damage):
    expected = record_lengths(shards(folder), keep=True)
    path = folder / NAME
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "bit": whole, "empty": b"", "text": b"x"}[
            damage
        ]
    )
    walks.clear()
    found = record_lengths(shards(folder))
    assert len(walks) == 4 and any("is damaged; it is made anew" in m for m in messages)
    np.testing.assert_equal(found, expected)
    walks.clear()
    np.testing.assert_equal(record_lengths(shards(folder)), expected)
    assert walks == []


def test_an_index_of_another_version_is_made_anew(folder, walks, messages):
    """Other files, other counts, another size by TFDS's own word, other sizes on disk."""
    record_lengths(shards(folder), keep=True)
    other = Shards(str(folder), "train", shards(folder).names, (25,) * 4, 54321)
    walks.clear()
    record_lengths(other)
    assert len(walks) == 4 and any("another version of the data" in m for m in messages)
    record_lengths(shards(folder), keep=True, rebuild=True)
    # The same counts, another order of the files.
    one, two = sorted(folder.glob("*train.tfrecord*"))[:2]
    swap = one.read_bytes(), two.read_bytes()
    two.write_bytes(swap[0])
    one.write_bytes(swap[1])
    walks.clear()
    found = record_lengths(shards(folder))
    assert len(walks) == 4 and any("has another size than when" in m for m in messages)
    np.testing.assert_array_equal(found[one.name], find_records(str(one), 25))


def test_a_missing_or_damaged_file_is_still_named(folder):
    record_lengths(shards(folder), keep=True)
    first = sorted(folder.glob("*train.tfrecord*"))[0]
    first.write_bytes(first.read_bytes()[:-7])
    with pytest.raises(ValueError, match="00000-of-00004 is damaged: 25 records"):
        record_lengths(shards(folder))
    described = shards(folder)
    first.unlink()
    with pytest.raises(ValueError, match="cannot read .*00000-of-00004: No such file"):
        record_lengths(described)


def test_of_a_folder_that_is_not_ours_it_is_in_the_cache(
    folder, cache, walks, messages, monkeypatch
):
    plain = index.storage.write

    def write(path, data):
        if str(folder) in str(path):
            raise PermissionError(13, "Permission denied", path)
        plain(path, data)

    monkeypatch.setattr(index.storage, "write", write)
    expected = record_lengths(shards(folder), keep=True)
    assert not (folder / NAME).exists()
    (kept,) = cache.rglob(NAME)
    assert any(str(kept) in message for message in messages)
    walks.clear()
    np.testing.assert_equal(record_lengths(shards(folder)), expected)
    assert walks == []
    monkeypatch.setattr(index, "_places", lambda _: [str(folder / NAME)])
    np.testing.assert_equal(record_lengths(shards(folder), keep=True), expected)
    assert any("could not be kept" in message for message in messages)


def test_large_splits_keep_theirs_by_themselves(folder, monkeypatch):
    monkeypatch.setattr(index, "KEPT_FROM", 100)
    record_lengths(shards(folder))
    assert (folder / NAME).exists()


def test_the_tool_makes_it_anew_when_asked(folder, walks):
    run_tool(folder)
    walks.clear()
    run_tool(folder)
    assert walks == []
    run_tool(folder, "--rebuild")
    assert len(walks) == 8


def test_the_tool_says_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_tool(tmp_path / "imagenet2012" / "5.1.0")
    assert end.value.code == 2
    assert "--config.data.dir" in capsys.readouterr().err


def test_in_a_bucket_the_index_spares_the_second_start(
    folder, bucket, cache, walks, monkeypatch
):
    """The same records as on a disk; with an index no file is gone through again."""
    for path in folder.iterdir():
        storage.write(f"{bucket}/imagenet2012/5.1.0/{path.name}", path.read_bytes())
    plain = open_source("imagenet2012", "train", dir=str(folder.parent.parent))
    monkeypatch.setattr(index, "CHUNK_BYTES", 200_000)
    walks.clear()
    for walked in (4, 4):
        source = open_source("imagenet2012", "train", dir=bucket)
        assert len(walks) == walked
        np.testing.assert_array_equal(source.offset, plain.offset)
        np.testing.assert_array_equal(source.length, plain.length)
    assert storage.is_file(f"{bucket}/imagenet2012/5.1.0/{NAME}") and not cache.exists()
    rows = [3, 4, 5, 80, 79]
    assert source.read_many(rows) == plain.read_many(rows)
    first = f"{bucket}/imagenet2012/5.1.0/{shards(folder).names[0]}"
    storage.write(first, storage.read(first)[16:])
    with pytest.raises(ValueError, match="00000-of-00004 is damaged|cannot read"):
        open_source("imagenet2012", "train", dir=bucket)
