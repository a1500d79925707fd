"""What a split of a data set is: examples by index, in memory or as encoded files.

Every source has the same few attributes (`num_examples`, `num_classes`, `labels`), so
subsets, held-out splits and label noise are the same functions for all of them.
Reading is by index: an example can be fetched without touching those before it.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

logger = logging.getLogger(__name__)
# Of a label that stands in a record which nobody has read yet.
UNREAD = -1
# The index of a row that pads a batch, or of an image that cannot be decoded.
NOBODY = -1
# Threads that wait for files; they hold no lock while they do.
READERS = 16
# The EXIF tag that says how a camera was held.
ORIENTATION = 0x0112


class Encoded(NamedTuple):
    """An encoded image, its label, and how to turn it upright (EXIF, 1..8)."""

    image: bytes
    label: int
    orientation: int = 1


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A split held in memory.

    Attributes:
      images: `[n, H, W, 3]` uint8.
      labels: `[n]` int32, in `[0, num_classes)`.
      num_classes: number of classes C.
      class_names: names of the classes, where the data set has some.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] = ()

    @property
    def num_examples(self) -> int:
        """Examples in the split."""
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class FileSource:
    """A split of image files, one an example.

    Attributes:
      paths: `[n]` strings.
      labels: `[n]` int32.
      class_names: folder names, in the order of the labels.
    """

    paths: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def num_examples(self) -> int:
        """Examples in the split."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)

    def name(self, index: int) -> str:
        """The file of an example."""
        return str(self.paths[index])

    def read(self, index: int) -> Encoded:
        """An example, encoded.

        Raises:
          OSError: the file cannot be read.
        """
        with open(self.paths[index], "rb") as file:
            image = file.read()
        return Encoded(image, int(self.labels[index]), _orientation(image))


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """A split of `tf.train.Example`s in TFRecord files, as TFDS prepares them.

    Attributes:
      files: paths of the TFRecord files.
      file: `[n]` which of the files holds an example.
      offset, length: `[n]` where its record's data begin in the file, and bytes.
      labels: `[n]` int32; `UNREAD` where only the record says it.
      num_classes: number of classes C.
      class_names: names of the classes, where the data set has some.
      image_shape: `(H, W, 3)`, with None where images differ.
    """

    files: tuple[str, ...]
    file: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] = ()
    image_shape: tuple[int | None, ...] = (None, None, 3)

    @property
    def num_examples(self) -> int:
        """Examples in the split."""
        return len(self.labels)

    def name(self, index: int) -> str:
        """The file of an example and its place there."""
        return f"{self.files[self.file[index]]} (byte {self.offset[index]})"

    def read(self, index: int) -> Encoded:
        """An example, encoded; TFDS images stay as the camera held them.

        Raises:
          OSError: the file cannot be read, or the record is no example.
        """
        # Loaded already by whoever opened the data set.
        import tensorflow as tf

        with open(self.files[self.file[index]], "rb", buffering=0) as file:
            record = os.pread(
                file.fileno(), int(self.length[index]), int(self.offset[index])
            )
        try:
            features = tf.train.Example.FromString(record).features.feature
        except Exception as error:  # protobuf's DecodeError is not the same everywhere
            raise OSError(f"not a tf.train.Example: {error}") from None
        label = int(self.labels[index])
        if label == UNREAD:
            label = int(features["label"].int64_list.value[0])
        return Encoded(features["image"].bytes_list.value[0], label)


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """Noise instead of images, made once: a step without the cost of its input.

    Attributes:
      num_examples: examples that it pretends to have.
      num_classes: number of classes C.
      class_names: none.
    """

    num_examples: int
    num_classes: int
    class_names: tuple[str, ...] = ()


EncodedSource = FileSource | RecordSource
Source = ArraySource | FileSource | RecordSource | SyntheticSource


def _orientation(image: bytes) -> int:
    """How a camera was held (EXIF), 1 where the file does not say."""
    if b"Exif" not in image[:4096]:
        return 1  # Pillow takes thirty times as long to find out.
    from PIL import Image

    try:
        orientation = Image.open(io.BytesIO(image)).getexif().get(ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, struct.error):
        return 1  # The decoder will say what is wrong with the file, if anything is.
    return orientation if orientation in range(1, 9) else 1


def take_rows(source: Source, rows: np.ndarray) -> Source:
    """The examples of a source with these indices, in this order."""
    if isinstance(source, SyntheticSource):
        return dataclasses.replace(source, num_examples=len(rows))
    columns = {
        field.name: getattr(source, field.name)[rows]
        for field in dataclasses.fields(source)
        if isinstance(getattr(source, field.name), np.ndarray)
    }
    return dataclasses.replace(source, **columns)


def take_subset(source: Source, count: int, *, seed: int = 0) -> Source:
    """At most `count` examples, drawn at random, always the same ones for a seed."""
    if count >= source.num_examples:
        return source
    rows = np.random.default_rng(seed).permutation(source.num_examples)[:count]
    return take_rows(source, np.sort(rows))


def read_labels(source: Source) -> Source:
    """The same source with all labels known; reads through TFRecord files once."""
    if not isinstance(source, RecordSource) or UNREAD not in source.labels:
        return source
    logger.info(
        "reading the labels of %s examples from %d files",
        f"{source.num_examples:,}",
        len(source.files),
    )
    with ThreadPoolExecutor(READERS) as pool:
        examples = pool.map(source.read, range(source.num_examples))
        labels = np.fromiter((example.label for example in examples), np.int32)
    return dataclasses.replace(source, labels=labels)


def take_fraction(source: Source, fraction: float, *, seed: int) -> Source:
    """A share of a training split, at random: of every class where labels are known.

    Raises:
      ValueError: nothing would be left.
    """
    if fraction == 1.0:
        return source
    kept, _ = _split_rows(source, 1.0 - fraction, seed=seed)
    if not len(kept):
        raise ValueError(
            f"data.fraction={fraction} of {source.num_examples} examples leaves none "
            "(--config.data.fraction)"
        )
    return take_rows(source, kept)


def take_per_class(source: Source, count: int, *, seed: int) -> Source:
    """`count` examples of every class, at random.

    Raises:
      ValueError: a class has fewer.
    """
    source = read_labels(source)
    rows = []
    for label, members in enumerate(_rows_by_class(source)):
        if len(members) < count:
            raise ValueError(
                f"data.samples_per_class={count} but class {label} has "
                f"{len(members)} examples (--config.data.samples_per_class)"
            )
        rows.append(np.random.default_rng((seed, label)).permutation(members)[:count])
    return take_rows(source, np.sort(np.concatenate(rows)))


def hold_out(source: Source, fraction: float, *, seed: int) -> tuple[Source, Source]:
    """A training split without a random share of it, and that share.

    Of every class the same share is taken where labels are known without reading the
    files; a TFDS split is divided at random.

    Raises:
      ValueError: one of the two would be empty.
    """
    kept, held = _split_rows(source, fraction, seed=seed)
    if not len(kept) or not len(held):
        raise ValueError(
            f"data.validation_fraction={fraction} of {source.num_examples} examples "
            f"leaves {len(kept)} to train on and {len(held)} to evaluate "
            "(--config.data.validation_fraction)"
        )
    return take_rows(source, kept), take_rows(source, held)


def add_label_noise(source: Source, share: float, *, seed: int) -> Source:
    """Gives a share of the examples a class drawn at random from all of them.

    One in C of those draws is the right class again, as in the official code.
    """
    if share == 0 or isinstance(source, SyntheticSource):
        return source
    rng = np.random.default_rng((seed, 1))
    chosen = rng.random(source.num_examples) < share
    drawn = rng.integers(0, source.num_classes, source.num_examples, dtype=np.int32)
    return dataclasses.replace(source, labels=np.where(chosen, drawn, source.labels))


def check_labels(
    labels: np.ndarray, num_classes: int, names: Sequence[str] | None = None
) -> None:
    """Refuses labels outside `[0, num_classes)`, naming the first such example."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        where = f" of {names[wrong[0]]}" if names else ""
        raise ValueError(
            f"label {labels[wrong[0]]}{where} is out of range; allowed: 0 to "
            f"{num_classes - 1} (--config.data.name)"
        )


def _rows_by_class(source: Source) -> list[np.ndarray]:
    return [np.flatnonzero(source.labels == c) for c in range(source.num_classes)]


def _split_rows(
    source: Source, fraction: float, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that stay and rows that go, both in order; `fraction` of them go."""
    count = source.num_examples
    if isinstance(source, SyntheticSource) or UNREAD in source.labels:
        groups: Iterable[np.ndarray] = [np.arange(count)]
    else:
        groups = _rows_by_class(source)
    gone = np.zeros(count, bool)
    owed = 0.0  # fractions of an example, carried on so that small classes count too
    for number, members in enumerate(groups):
        owed += fraction * len(members)
        take = min(round(owed), len(members))
        owed -= take
        order = np.random.default_rng((seed, number)).permutation(members)
        gone[order[:take]] = True
    return np.flatnonzero(~gone), np.flatnonzero(gone)
