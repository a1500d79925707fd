"""What a split of a dataset is: examples by index, in memory or as encoded files.

Every source has the same few attributes (`Source`), so subsets, held-out splits and label
noise are the same functions for all of them. Reading is by index: an example can be
fetched without touching those before it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np

from supcon_jax import storage
from supcon_jax.data.images import for_tensorflow

logger = logging.getLogger(__name__)
# The label of an image that has none.
UNLABELLED = -1
# The label of an example whose record has not been read yet.
UNREAD = np.iinfo(np.int32).min
# Labels that only the records know are read at the start up to this size of a split.
READ_AT_START_BYTES = 2**30
# The index of a row in which no example stands: it pads a batch, or its image cannot be
# decoded.
PADDING = -1
# Threads that read files; Python's lock is free while they wait for the disk.
READERS = 16
# `map`, or that of a pool of threads.
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


class Encoded(NamedTuple):
    """An encoded image, its label, and how to turn it upright (EXIF, 1..8).

    A label below 0 says that the image has none.
    """

    image: bytes
    label: int
    orientation: int = 1


@dataclasses.dataclass(frozen=True)
class LabelSets:
    """Labels beyond one class: what an image with a label of that number shows.

    A source numbers the different sets of classes that its images show, so that a label
    stays one number on its way through samplers, subsets and batches of evaluation.

    Attributes:
      class_names: names of the C classes.
      members: for each of the S sets the numbers of its classes and their weights.
    """

    class_names: tuple[str, ...]
    members: tuple[tuple[tuple[int, float], ...], ...]

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """Weights of the classes in each set, and a row of zeros: no label."""
        table = np.zeros((len(self.members) + 1, len(self.class_names)), np.float32)
        for number, members in enumerate(self.members):
            for label, weight in members:
                table[number, label] = weight
        return table

    def weights(self, labels: np.ndarray) -> np.ndarray:
        """Weights of the classes `[n, C]` float32 for labels `[n]`; 0 where there is none."""
        return self._table[np.where(labels < 0, len(self.members), labels)]


@dataclasses.dataclass
class Unreadable:
    """The images of a split that cannot be decoded.

    A split and all its subsets share one record, and what they meet is added to it.

    Attributes:
      skip: whether a run goes on without such images; if not, the first is an error.
      reasons: name of each image found so far -> why it cannot be decoded.
    """

    skip: bool = False
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, found: Mapping[str, str]) -> None:
        """Notes images that cannot be decoded, each with a warning the first time.

        Raises:
          ValueError: such images are not to be skipped.
        """
        if not self.skip:
            name, reason = next(iter(found.items()))
            raise ValueError(
                f"cannot decode {name}: {reason}; repair or remove it, or go on "
                "without such images: --config.data.skip_errors=True"
            )
        for name, reason in found.items():
            if name not in self.reasons:
                logger.warning("warning: skipping %s: %s", name, reason)
        self.reasons |= found


class Source(Protocol):
    """One split of a dataset: all that the rest of the program knows of it.

    A new kind of source is a frozen dataclass that derives from this class, and a
    function that opens it in `datasets.SOURCES`. Its fields that are arrays have one row
    an example. Images in memory need no new kind: they are an `ArraySource`.

    Attributes:
      labels: `[n]` int32 in `[0, num_classes)`; `UNLABELLED` where an image has none,
        `UNREAD` where only `read` knows it.
      num_classes: number of classes C.
      class_names: names of the classes, where the dataset has some; where its own ids
        are not 0 to C - 1, those ids.
      images: `[n, H, W, 3]` uint8 of a source held in memory; None where `read` has
        each image encoded.
      image_shape: `(H, W, 3)` of encoded images, with None where they differ.
      synthetic: the source has no examples at all. Noise stands for images and labels,
        and nothing is read.
      unreadable: the images that cannot be decoded.
      notes: what a run should say of it at its start.
      label_sets: where an image may show several classes: what each label stands for.
        The "classes" above are such sets then. None: a label is a class.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]
    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]
    images: np.ndarray | None
    image_shape: tuple[int | None, ...] = (None, None, 3)
    synthetic: bool = False
    unreadable: Unreadable
    notes: tuple[str, ...] = ()
    label_sets: LabelSets | None = None

    @property
    def num_examples(self) -> int:
        """Examples in the split."""
        return len(self.labels)

    @property
    def num_unlabelled(self) -> int | None:
        """Examples without a label; None where not all labels are known."""
        if UNREAD in self.labels:
            return None
        return int(np.sum(self.labels < 0))

    @property
    def num_bytes(self) -> int | None:
        """What reading all encoded examples reads; None where that is not known."""
        return None

    def take_rows(self, rows: np.ndarray) -> Self:
        """The examples with these indices, in this order."""
        columns = {
            field.name: getattr(self, field.name)[rows]
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), np.ndarray)
        }
        return dataclasses.replace(self, **columns)

    def name(self, index: int) -> str:
        """What messages call an example."""
        return f"image {index}"

    def read(self, index: int) -> Encoded:
        """An example, encoded. Called from several threads at a time.

        Raises:
          OSError: it cannot be read.
        """
        raise TypeError(f"{type(self).__name__} has no encoded images")

    def runs(self, indices: np.ndarray) -> Iterable[np.ndarray]:
        """Examples cut into parts, in order, each of which is best read at once."""
        return indices[:, None]

    def read_many(
        self, indices: Iterable[int], map: Map = map
    ) -> list[Encoded | OSError]:
        """Examples in the order asked for; for one that cannot be read, the error.

        Args:
          indices: which.
          map: how to do the work; the `map` of a pool does it in parallel.
        """

        def read(index: int) -> Encoded | OSError:
            try:
                return self.read(index)
            except OSError as error:
                return error

        return list(map(read, (int(index) for index in indices)))


@dataclasses.dataclass(frozen=True)
class ArraySource(Source):
    """A split held in memory.

    Attributes:
      images: `[n, H, W, 3]` uint8.
      labels, num_classes, class_names, unreadable, notes: see `Source`.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] = ()
    unreadable: Unreadable = dataclasses.field(default_factory=Unreadable)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FileSource(Source):
    """A split of image files, one an example.

    Attributes:
      paths: `[n]` strings.
      labels: `[n]` int32.
      class_names: folder names, in the order of the labels.
      unreadable, notes, label_sets: see `Source`.
    """

    images = None
    paths: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    unreadable: Unreadable = dataclasses.field(default_factory=Unreadable)
    notes: tuple[str, ...] = ()
    label_sets: LabelSets | None = None

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of classes C."""
        return len(self.class_names)

    def name(self, index: int) -> str:
        """The file of an example."""
        return str(self.paths[index])

    def read(self, index: int) -> Encoded:
        """An example, encoded.

        Raises:
          OSError: the file cannot be read, or is no image.
        """
        with storage.open_file(str(self.paths[index])) as file:
            image, orientation = for_tensorflow(file)
        return Encoded(image, int(self.labels[index]), orientation)


@dataclasses.dataclass(frozen=True)
class SyntheticSource(Source):
    """Noise instead of images: a step without the cost of its input.

    Attributes:
      labels: `[n]`, all `UNREAD`; there are as many as the examples it pretends to have.
      num_classes, class_names, unreadable: see `Source`.
    """

    images = None
    synthetic = True
    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] = ()
    unreadable: Unreadable = dataclasses.field(default_factory=Unreadable)


def images_by_class(source: Source) -> np.ndarray:
    """How many examples show each class, `[C]`; those with a known label count."""
    labels = source.labels[source.labels >= 0]
    if source.label_sets is not None:
        return np.sum(source.label_sets.weights(labels) > 0, axis=0)
    return np.bincount(labels, minlength=1)


def read_labels(source: Source) -> Source:
    """The same source with all labels known; reads through it once where they are not.

    Raises:
      ValueError: an example cannot be read and the source does not skip such ones, or
        its label is out of range.
    """
    if source.synthetic or UNREAD not in source.labels:
        return source
    logger.info("reading the labels of %s examples", f"{source.num_examples:,}")

    labels = np.full(source.num_examples, UNLABELLED, np.int32)
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, source.num_examples, 256):
            indices = range(start, min(start + 256, source.num_examples))
            for index, example in zip(
                indices, source.read_many(indices, pool.map), strict=True
            ):
                if isinstance(example, OSError):
                    reason = example.strerror or str(example)
                    source.unreadable.add({source.name(index): reason})
                else:
                    check_label(source, index, example.label)
                    labels[index] = max(example.label, UNLABELLED)
    return dataclasses.replace(source, labels=labels)


def read_labels_at_start(source: Source) -> Source:
    """`read_labels` of a split that is read in seconds; a larger one is left as it is."""
    size = source.num_bytes
    if size is None or size > READ_AT_START_BYTES:
        return source
    return read_labels(source)


def check_label(source: Source, index: int, label: int) -> None:
    """Refuses a label that no class has; one below 0 says that there is none.

    Raises:
      ValueError: naming the example.
    """
    if label >= source.num_classes:
        raise ValueError(
            f"label {label} of {source.name(index)} is out of range; allowed: 0 to "
            f"{source.num_classes - 1}, below 0 for none (--config.data.name)"
        )


def has_labels(source: Source) -> bool:
    """Whether any example has a label; unread records are read up to the first that has."""
    if source.synthetic or np.any(source.labels >= 0):
        return True
    if UNREAD not in source.labels:
        return False
    for index in range(source.num_examples):
        try:
            if source.read(index).label >= 0:
                return True
        except OSError:
            continue  # whoever needs the image says so
    return False
