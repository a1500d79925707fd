"""Where the records of a split begin: found once, then kept in a file.

A TFRecord file says how long a record is only where the record begins, so finding all of
them means to go through the files. What is kept are the lengths, a few megabytes for
ImageNet, beside the shards or, where that folder cannot be written to, in the user's
cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from supcon_jax import storage
from supcon_jax.data.records import FOOTER_BYTES, HEADER_BYTES
from supcon_jax.data.sources import READERS
from supcon_jax.logs import progress

logger = logging.getLogger(__name__)
# Smaller splits on a disk are gone through faster than anyone notices.
KEPT_FROM = 100_000
# Of a split in a bucket the sizes of so many files are compared, of one on a disk all.
COMPARED = 16
# A request of a bucket costs more than reading the records between two headers.
CHUNK_BYTES = 8 * 2**20
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of one split, as TFDS describes them.

    Attributes:
      directory: where they lie.
      split: name of the split.
      names: of the files.
      records: how many each of them holds.
      num_bytes: size of the split, as TFDS counts it.
    """

    directory: str
    split: str
    names: tuple[str, ...]
    records: tuple[int, ...]
    num_bytes: int

    def path(self, name: str) -> str:
        """Path of a file."""
        return storage.join(self.directory, name)

    @property
    def facts(self) -> str:
        """By what an index is known to be of these files, as JSON."""
        facts = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps({k: facts[k] for k in sorted(facts) if k != "directory"})


def record_lengths(
    shards: Shards, *, keep: bool = False, rebuild: bool = False
) -> dict[str, np.ndarray]:
    """The lengths of the records of each file, by its name.

    Args:
      shards: the files.
      keep: whether to keep them in a file even where finding them is quick.
      rebuild: whether to find them anew.

    Raises:
      ValueError: a file is missing or damaged.
    """
    for place in () if rebuild else _places(shards):
        lengths = _load(place, shards)
        if lengths is not None:
            return lengths
        keep |= storage.is_file(place)  # one that is damaged or of other data
    lengths = _find_all(shards)
    slow = storage.is_remote(shards.directory) or sum(shards.records) >= KEPT_FROM
    if keep or slow:
        _save(shards, lengths)
    return lengths


def _places(shards: Shards) -> list[str]:
    """Where an index may be: beside the files, in the user's cache."""
    name = f"supcon_jax.{shards.split}.index.npz"
    directory = shards.directory
    if not storage.is_remote(directory):
        directory = os.path.abspath(directory)
    places = [storage.join(directory, name)]
    try:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # nobody's home is known
        return places
    own = hashlib.sha256(directory.encode()).hexdigest()[:16]
    return [*places, str(home / "supcon_jax" / "index" / own / name)]


# --- finding them ---


def _find_all(shards: Shards) -> dict[str, np.ndarray]:
    """Goes through all files, several at a time."""

    def find(file: tuple[str, int]) -> np.ndarray:
        name, expected = file
        return find_records(shards.path(name), expected)

    files = list(zip(shards.names, shards.records, strict=True))
    with ThreadPoolExecutor(READERS) as pool:
        found = progress(
            pool.map(find, files),
            total=len(files),
            label=f"finding the records of {shards.split}: files",
        )
        return dict(zip(shards.names, found, strict=True))


def find_records(path: str, expected: int) -> np.ndarray:
    """The lengths of the records of one file, `[expected]` int64.

    On a disk only the lengths are read, a few bytes a record. A file in a bucket is read
    from end to end, in parts of megabytes.

    Raises:
      ValueError: the file ends too early or holds another number of records.
    """
    try:
        size = storage.size(path)
        if storage.is_remote(path):
            lengths, end = _walk(
                lambda start, stop: storage.read_ranges(path, [(start, stop)])[0],
                size,
                CHUNK_BYTES,
            )
        else:
            with open(path, "rb", buffering=0) as file:
                number = file.fileno()
                lengths, end = _walk(
                    lambda start, stop: os.pread(number, stop - start, start),
                    size,
                    HEADER_BYTES,
                )
    except OSError as error:
        raise _unreadable(path, error) from None
    if end != size or len(lengths) != expected:
        raise ValueError(
            f"{path} is damaged: {len(lengths)} records in {size} bytes, expected "
            f"{expected} (--config.data.dir)"
        )
    return np.asarray(lengths, np.int64)


def _walk(
    read: Callable[[int, int], bytes], size: int, chunk: int
) -> tuple[list[int], int]:
    """The lengths of the records of a file, and where the last one ends.

    Args:
      read: the bytes of the file between two places.
      size: of the file.
      chunk: bytes to read at a time.
    """
    lengths: list[int] = []
    begin, data, start = 0, b"", 0
    while begin < size:
        if begin + HEADER_BYTES > start + len(data):
            data, start = read(begin, min(begin + chunk, size)), begin
        length = int.from_bytes(data[begin - start : begin - start + 8], "little")
        lengths.append(length)
        begin += HEADER_BYTES + length + FOOTER_BYTES
    return lengths, begin


def _unreadable(path: str, error: OSError) -> ValueError:
    return ValueError(
        f"cannot read {path}: {error.strerror or error} (--config.data.dir)"
    )


# --- keeping them ---


def _save(shards: Shards, lengths: dict[str, np.ndarray]) -> None:
    """Writes an index to the first place that can be written to."""
    everything = np.concatenate([lengths[name] for name in shards.names])
    kind = np.uint32 if everything.max(initial=0) < 2**32 else np.uint64
    file = io.BytesIO()
    np.savez_compressed(
        file, facts=np.asarray(shards.facts), lengths=everything.astype(kind)
    )
    for place in _places(shards):
        try:
            if not storage.is_remote(place):
                pathlib.Path(place).parent.mkdir(parents=True, exist_ok=True)
            storage.write(place, file.getvalue())
        except (OSError, ValueError):
            continue  # not ours to write to
        logger.info("kept where the records of %s begin in %s", shards.split, place)
        return
    logger.info("where the records of %s begin could not be kept", shards.split)


def _load(place: str, shards: Shards) -> dict[str, np.ndarray] | None:
    """What an index says, if it is there and is of these files.

    Raises:
      ValueError: one of the files cannot be read.
    """
    try:
        content = storage.read(place)
    except (OSError, ValueError):
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            facts, everything = str(file["facts"]), file["lengths"].astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        logger.info("%s is damaged; it is made anew", place)
        return None
    if facts != shards.facts or len(everything) != sum(shards.records):
        logger.info("%s is of another version of the data; it is made anew", place)
        return None
    parts = np.split(everything, np.cumsum(shards.records)[:-1])
    lengths = dict(zip(shards.names, parts, strict=True))
    differing = _of_another_size(shards, lengths)
    if differing:
        logger.info(
            "%s has another size than when %s was made; it is made anew",
            shards.path(differing),
            place,
        )
        return None
    return lengths


def _of_another_size(shards: Shards, lengths: dict[str, np.ndarray]) -> str:
    """The first file that does not end with its last record; "" where there is none.

    In a bucket it takes many requests to find the size of a file, so there it is looked
    at whether in some of the files the last record begins where it should.
    """
    remote = storage.is_remote(shards.directory)
    names = np.asarray(shards.names)
    if remote:
        names = names[
            np.linspace(0, len(names) - 1, min(COMPARED, len(names)), dtype=int)
        ]

    def fits(name: str) -> bool:
        path, length = shards.path(name), lengths[name]
        size = int(np.sum(HEADER_BYTES + length + FOOTER_BYTES))
        try:
            if not remote:
                return storage.size(path) == size
            if not size:
                return True
            start = size - FOOTER_BYTES - int(length[-1]) - HEADER_BYTES
            (header,) = storage.read_ranges(path, [(start, start + 8)])
            return int.from_bytes(header, "little") == length[-1]
        except FileNotFoundError as error:
            raise _unreadable(path, error) from None
        except OSError:
            return False  # making the index anew says what is wrong

    with ThreadPoolExecutor(READERS) as pool:
        fitting = zip(names.tolist(), pool.map(fits, names.tolist()), strict=True)
        return next((name for name, good in fitting if not good), "")
