"""A split of TFRecord files, read by index: single records or ranges of megabytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from supcon_jax import storage
from supcon_jax.data.sources import UNLABELLED, UNREAD, Encoded, Map, Source, Unreadable

# A record is its length (8 bytes), a checksum (4), the data, a checksum (4).
HEADER_BYTES, FOOTER_BYTES = 12, 4
# Records that lie together are read with one request up to this size.
REQUEST_BYTES = 8 * 2**20
# The same of records that are wanted one after the other: many such parts are read ahead.
RUN_BYTES = 2 * 2**20


@dataclasses.dataclass(frozen=True)
class RecordSource(Source):
    """A split of `tf.train.Example`s in TFRecord files, as TFDS prepares them.

    Attributes:
      files: paths of the TFRecord files.
      file: `[n]` which of the files holds an example.
      offset, length: `[n]` where its record's data begin in the file, and bytes.
      labels: `[n]` int32; `UNREAD` where only the record says it.
      num_classes, class_names, image_shape, unreadable, notes: see `Source`.
      image_key, label_key: names of the two in a record.
      shuffled: whether the records lie in a random order, as TFDS writes them unless a
        dataset forbids it.
    """

    images = None
    files: tuple[str, ...]
    file: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] = ()
    image_shape: tuple[int | None, ...] = (None, None, 3)
    unreadable: Unreadable = dataclasses.field(default_factory=Unreadable)
    notes: tuple[str, ...] = ()
    image_key: str = "image"
    label_key: str = "label"
    shuffled: bool = True

    @property
    def num_bytes(self) -> int:
        """Length of all records."""
        return int(self.length.sum())

    def name(self, index: int) -> str:
        """The file of an example and its place there."""
        return f"{self.files[self.file[index]]} (byte {self.offset[index]})"

    def read(self, index: int) -> Encoded:
        """An example, encoded; TFDS images stay as the camera held them.

        Raises:
          OSError: the file cannot be read, or the record is no such example.
        """
        (example,) = self.read_many([index])
        if isinstance(example, OSError):
            raise example
        return example

    def read_many(
        self, indices: Iterable[int], map: Map = map
    ) -> list[Encoded | OSError]:
        """Examples in the order asked for; records that lie together with one request."""

        def encode(index: int, features: Any) -> Encoded:
            if not features[self.image_key].bytes_list.value:
                raise OSError(f"the record has no {self.image_key!r}")
            image = features[self.image_key].bytes_list.value[0]
            label, own = self.labels[index], features[self.label_key].int64_list.value
            # An image without a label has none under label noise either.
            if label == UNREAD or (own and own[0] < 0):
                label = max(own[0], UNLABELLED) if own else UNLABELLED
            return Encoded(image, int(label))

        return self.visit(indices, encode, map)

    def visit(
        self,
        indices: Iterable[int],
        function: Callable[[int, Any], Any],
        map: Map = map,
    ) -> list[Any]:
        """`function(index, features)` of records, or the OSError in its place.

        Args:
          indices: of the examples.
          function: of the index of an example and what its record holds, by name.
          map: how to do the work; the `map` of a pool does it in parallel.
        """
        indices = np.asarray(list(indices), np.int64)
        found: list[Any] = [None] * len(indices)

        def visit(rows: np.ndarray) -> None:
            wanted = indices[rows]
            try:
                records: Iterable[Any] = self._read_range(wanted)
            except OSError as error:
                records = [error] * len(rows)
            for row, index, record in zip(rows, wanted, records, strict=True):
                try:
                    found[row] = function(int(index), _parse(record))
                except OSError as error:
                    found[row] = error

        for _ in map(visit, self._together(indices)):
            pass
        return found

    def runs(self, indices: np.ndarray) -> list[np.ndarray]:
        """Examples cut into parts, in order, each of which lies in one place."""
        return [indices[part] for part in self._cut(indices, RUN_BYTES)]

    def _together(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Places of those among some examples that are read with one request."""
        order = np.lexsort((self.offset[indices], self.file[indices]))
        for part in self._cut(indices[order], REQUEST_BYTES):
            yield order[part]

    def _cut(self, indices: np.ndarray, most: int) -> list[slice]:
        """Parts of at most so many bytes, of examples that lie behind each other.

        What lies between two of them is read with them if it is no longer than the
        first: that costs less than a request of its own.
        """
        file, offset, length = (
            column[indices] for column in (self.file, self.offset, self.length)
        )
        between = offset[1:] - (offset + length)[:-1] - HEADER_BYTES - FOOTER_BYTES
        joined = (file[1:] == file[:-1]) & (between >= 0) & (between <= length[:-1])
        parts, first = [], 0
        for place in range(1, len(indices)):
            size = offset[place] + length[place] - offset[first]
            if not joined[place - 1] or size > most:
                parts.append(slice(first, place))
                first = place
        return [*parts, slice(first, len(indices))] if len(indices) else []

    def _read_range(self, indices: np.ndarray) -> Iterator[bytes | OSError]:
        """Records of one file that lie together, in the order of the file."""
        begin = self.offset[indices] - HEADER_BYTES
        end = self.offset[indices] + self.length[indices]
        start = int(begin[0])
        path = self.files[self.file[indices[0]]]
        (data,) = storage.read_ranges(path, [(start, int(end.max()))])
        for a, b in zip((begin - start).tolist(), (end - start).tolist(), strict=True):
            header = int.from_bytes(data[a : a + 8], "little")
            # Another version of the file is never read as this one.
            if len(data) < b or header != b - a - HEADER_BYTES:
                yield OSError(
                    "no record begins there: the file has changed since it was indexed "
                    "(python -m supcon_jax.tools.index --rebuild)"
                )
            else:
                yield data[a + HEADER_BYTES : b]


def _parse(record: bytes | OSError) -> Any:
    """The features of a record.

    Raises:
      OSError: it is no example, or could not be read.
    """
    if isinstance(record, OSError):
        raise record
    # Opening the dataset has imported it already.
    import tensorflow as tf

    try:
        return tf.train.Example.FromString(record).features.feature
    except Exception as error:  # the class of protobuf's error depends on its version
        raise OSError(f"not a tf.train.Example: {error}") from None
