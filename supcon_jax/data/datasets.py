"""Opening a dataset by name, and refusing what cannot be opened.

Every failure here is one line that names the flag to change. `SOURCES`, at the end of the
file, says which names are opened how.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import numpy as np

from supcon_jax.data.arrays import open_arrays
from supcon_jax.data.corrupted import open_corrupted
from supcon_jax.data.folders import open_folder
from supcon_jax.data.multilabel import open_multilabel
from supcon_jax.data.names import pick_split
from supcon_jax.data.sources import (
    UNLABELLED,
    UNREAD,
    ArraySource,
    Source,
    SyntheticSource,
    Unreadable,
    check_label,
)
from supcon_jax.data.tfds import open_tfds

logger = logging.getLogger(__name__)
# Of "synthetic": as many images and classes as ImageNet has.
SYNTHETIC_EXAMPLES = {"train": 1_281_167, "test": 1_000}
SYNTHETIC_CLASSES = 1000
# Of "two_digits": images of each of its hundred classes.
TWO_DIGITS_EXAMPLES = {"train": 50, "test": 10}
# (split, dir, root) -> one split; raises ValueError with the flag to change.
Opener = Callable[[str, str, str], Source]


def open_source(
    name: str,
    split: str,
    *,
    dir: str = "",
    root: str = "",
    image_key: str = "image",
    label_key: str = "label",
    skip_errors: bool = False,
) -> Source:
    """Opens one split of a dataset.

    Args:
      name: a key of `SOURCES`, or a TFDS name.
      split: "train", "test", ...; of TFDS also slices and sums, "train[:90%]+test".
      dir: TFDS data directory; "" is TFDS's own default, downloading what it can.
      root: path of the .npz file for "arrays", of the folder for "folder", "multilabel"
        and "corrupted".
      image_key, label_key: names of the two features of a TFDS dataset; "" for one
        without labels.
      skip_errors: whether to go on without images that cannot be decoded, which the
        source then lists (`Source.unreadable`); if not, the first one is an error.

    Raises:
      ValueError: one line that says what is missing and which flag to change.
    """
    try:
        if name in SOURCES:
            source = SOURCES[name](split, dir, root)
        else:
            keys = {"image_key": image_key, "label_key": label_key}
            source = open_tfds(name, split, dir, **keys, built_in=tuple(SOURCES))
    except PermissionError as error:  # of a bucket; local ones are told by the openers
        raise ValueError(
            f"cannot read {error.filename}: {error.strerror} (--config.data.dir, "
            "--config.data.root)"
        ) from None
    labels = _checked_labels(source)
    return dataclasses.replace(
        source, labels=labels, unreadable=Unreadable(skip=skip_errors)
    )


def _checked_labels(source: Source) -> np.ndarray:
    """The labels as int32, those below 0 as `UNLABELLED`; refuses what no class has."""
    labels = source.labels
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)}; allowed: integers [n] "
            "(--config.data.name)"
        )
    for index in np.flatnonzero(labels >= source.num_classes)[:1]:
        check_label(source, int(index), int(labels[index]))
    none = (labels < 0) & (labels != UNREAD)
    return np.where(none, UNLABELLED, labels).astype(np.int32)


def _open_digits(split: str, dir: str, root: str) -> ArraySource:
    """1,797 handwritten digits, 8x8, grey levels 0..16 scaled to 0..255.

    The split is fixed: of each class, in the order of the dataset, the share
    500/1797 that scikit-learn's stratified splitter draws with random_state=0 is the
    test set. 1,297 train and 500 test.
    """
    del dir, root
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ValueError(
            "data.name='digits' needs scikit-learn; pip install scikit-learn"
        ) from None
    pick_split(split, ["train", "test"])
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)),
        test_size=500,
        stratify=digits.target,
        random_state=0,
    )
    rows = np.sort(train if split == "train" else test)
    grey = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    return ArraySource(images, digits.target[rows].astype(np.int32), num_classes=10)


def _open_two_digits(split: str, dir: str, root: str) -> ArraySource:
    """The numbers 00 to 99, 16x16: a hundred classes that need no download.

    Two of "digits" side by side, each twice as high. 5,000 train, of the training digits,
    and 1,000 test, of the test digits; which ones is drawn with the same seed always.
    """
    digits = _open_digits(split, dir, root)
    rng = np.random.default_rng(0)
    numbers = np.repeat(np.arange(100, dtype=np.int32), TWO_DIGITS_EXAMPLES[split])
    halves = []
    for sought in (numbers // 10, numbers % 10):
        rows = [rng.choice(np.flatnonzero(digits.labels == digit)) for digit in sought]
        halves.append(np.repeat(digits.images[rows], 2, axis=1))
    names = tuple(f"{number:02d}" for number in range(100))
    return ArraySource(np.concatenate(halves, axis=2), numbers, 100, names)


def _open_synthetic(split: str, dir: str, root: str) -> SyntheticSource:
    del dir, root
    pick_split(split, list(SYNTHETIC_EXAMPLES))
    labels = np.full(SYNTHETIC_EXAMPLES[split], UNREAD, np.int32)
    return SyntheticSource(labels, SYNTHETIC_CLASSES)


# data.name -> what opens it. All other names are TFDS's.
SOURCES: dict[str, Opener] = {
    "digits": _open_digits,
    "two_digits": _open_two_digits,
    "arrays": open_arrays,
    "folder": open_folder,
    "multilabel": open_multilabel,
    "corrupted": open_corrupted,
    "synthetic": _open_synthetic,
}
