"""A split of a TFDS dataset: its images and labels, by what TFDS says of the features.

TFDS says what a dataset is and prepares it (prepared.py); its TFRecord files are then read
by index (records.py), so that any order costs the same and a resumed run starts at once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from supcon_jax.data.index import Shards, record_lengths
from supcon_jax.data.names import number_labels, numbering, pick_split
from supcon_jax.data.prepared import find_builder
from supcon_jax.data.records import FOOTER_BYTES, HEADER_BYTES, RecordSource
from supcon_jax.data.sources import READERS, UNLABELLED, UNREAD
from supcon_jax.data.tensorflow_imports import import_tensorflow_datasets

logger = logging.getLogger(__name__)


def open_tfds(
    name: str,
    split: str,
    dir: str,
    *,
    image_key: str = "image",
    label_key: str = "label",
    built_in: Sequence[str] = (),
) -> RecordSource:
    """Opens one split of a prepared TFDS dataset, downloading it where that is allowed.

    Args:
      name, dir, built_in: as for `find_builder`.
      split: a split, a slice of it, or several, "train[:90%]+test".
      image_key, label_key: names of the two features; without a `label_key` ("") no
        image has a label.

    Raises:
      ValueError: one line that says what is missing and which flag to change.
    """
    builder = find_builder(name, dir, built_in=built_in)
    tfds, features = import_tensorflow_datasets(), builder.info.features
    image = _image_feature(tfds, name, features, image_key)
    label = _label_feature(tfds, name, features, label_key)
    for part in split.split("+"):
        pick_split(part.split("[")[0].strip(), [*builder.info.splits, "all"])
    source = _open_records(builder, split, image_key, label_key)
    source = dataclasses.replace(source, image_shape=image.shape)
    if label is None:
        return dataclasses.replace(
            source, labels=np.full(source.num_examples, UNLABELLED, np.int32)
        )
    if isinstance(label, tfds.features.ClassLabel) and label.num_classes:
        return dataclasses.replace(
            source,
            num_classes=label.num_classes,
            class_names=tuple(label.names or ()),
        )
    return _number_records(builder, source, np.dtype(label.np_dtype) == np.uint64)


def index_tfds(name: str, dir: str, *, rebuild: bool) -> dict[str, int]:
    """Keeps where the records of all splits begin in a file (index.py).

    Args:
      name, dir: as for `find_builder`.
      rebuild: whether to find them anew where they are known.

    Returns:
      How many records each split has.

    Raises:
      ValueError: the dataset is not there, or a file is damaged.
    """
    splits = _shards(find_builder(name, dir))
    for shards in splits:
        record_lengths(shards, keep=True, rebuild=rebuild)
    return {shards.split: sum(shards.records) for shards in splits}


# --- which features hold image and label ---


def _image_feature(tfds: Any, name: str, features: Any, key: str) -> Any:
    """The feature that holds the image.

    Raises:
      ValueError: there is none of that name, or it is no image of 8 bits.
    """
    feature = _find_feature(tfds, features, key)
    # Its subclass LabeledImage is a mask, whose pixels are classes.
    if type(feature) is tfds.features.Image and feature.np_dtype == np.uint8:
        return feature
    raise ValueError(
        f"dataset {name} has {_described(features)}; data.image_key={key!r} must name an "
        "Image of uint8 (--config.data.image_key, --config.data.name)"
    )


def _label_feature(tfds: Any, name: str, features: Any, key: str) -> Any:
    """The feature that holds the class; None where no name is given.

    Raises:
      ValueError: there is none of that name, or it is not one class an image.
    """
    if not key:
        return None
    feature = _find_feature(tfds, features, key)
    # A sequence of labels looks like a label, so the type has to be looked at.
    if isinstance(feature, tfds.features.Tensor) and feature.shape == ():
        kind = np.dtype(feature.np_dtype).kind
        if kind in "biu" or isinstance(feature, tfds.features.Text):
            return feature
    raise ValueError(
        f"dataset {name} has {_described(features)}; data.label_key={key!r} must name one "
        "class an image: a ClassLabel, or a single integer or text "
        "(--config.data.label_key, --config.data.name; '' for a dataset without labels)"
    )


def _find_feature(tfds: Any, features: Any, key: str) -> Any:
    """The feature of a name, "part/inner" of one inside another; None without one."""
    for name in key.split("/"):
        inside = isinstance(features, tfds.features.FeaturesDict)
        if not inside or name not in features:
            return None
        features = features[name]
    return features


def _described(features: Any) -> str:
    """`image: Image uint8 [None, None, 3], label: ClassLabel int64 []`, and so on."""

    def one(feature: Any) -> str:
        kind = type(feature).__name__
        if isinstance(feature.shape, dict):
            return kind
        inner = getattr(feature, "feature", None)  # of a Sequence
        of = f" of {type(inner).__name__}" if inner is not None else ""
        return f"{kind}{of} {np.dtype(feature.np_dtype).name} {list(feature.shape)}"

    return ", ".join(f"{key}: {one(feature)}" for key, feature in features.items())


# --- where the records are ---


def _open_records(
    builder: Any, split: str, image_key: str, label_key: str
) -> RecordSource:
    """The records of a split, their labels unread.

    Raises:
      ValueError: there is no such split, or a file is missing or damaged.
    """
    try:
        parts = builder.info.splits[split].file_instructions
    except Exception as error:
        raise ValueError(
            f"cannot read split {split!r} of {builder.name}: "
            f"{str(error).splitlines()[0]} "
            "(--config.data.train_split, --config.data.eval_split)"
        ) from None
    lengths: dict[str, np.ndarray] = {}
    for shards in _shards(builder):
        paths = {shards.path(name): name for name in shards.names}
        if any(str(part.filename) in paths for part in parts):
            found = record_lengths(shards)
            lengths |= {path: found[name] for path, name in paths.items()}
    columns = [_records_of(part, lengths[str(part.filename)]) for part in parts]
    offset, length = (
        np.concatenate([column[i] for column in columns]) if columns else np.empty(0)
        for i in (0, 1)
    )
    return RecordSource(
        files=tuple(str(part.filename) for part in parts),
        file=np.repeat(np.arange(len(parts)), [len(column[0]) for column in columns]),
        offset=offset,
        length=length,
        labels=np.full(len(offset), UNREAD, np.int32),
        num_classes=1,
        image_key=image_key,
        label_key=label_key,
        shuffled=not builder.info.disable_shuffling,
    )


def _shards(builder: Any) -> list[Shards]:
    """The files of every split of a prepared dataset."""
    return [
        Shards(
            directory=str(builder.info.data_dir),
            split=name,
            names=tuple(sorted(split.filenames)),
            records=tuple(split.shard_lengths),
            num_bytes=int(split.num_bytes),
        )
        for name, split in builder.info.splits.items()
    ]


def _records_of(part: Any, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the records of one file's share of a split begin, and how long they are."""
    end = np.cumsum(HEADER_BYTES + length + FOOTER_BYTES)
    begin = end - FOOTER_BYTES - length
    take = slice(part.skip, None if part.take == -1 else part.skip + part.take)
    return begin[take], length[take]


# --- labels that are no ClassLabel ---


def _number_records(builder: Any, source: RecordSource, unsigned: bool) -> RecordSource:
    """The source with numbers 0 to C - 1 for ids or words that are no ClassLabel.

    The ids of all splits are read, so that the splits agree on the numbers.

    Raises:
      ValueError: a record cannot be read.
    """
    logger.info(
        "reading all labels of %s, since the dataset does not say how many classes "
        "there are",
        builder.name,
    )
    places: list[tuple[str, int]] = []
    ids: list[int | str] = []
    for split in builder.info.splits:
        records = _open_records(builder, split, source.image_key, source.label_key)
        places += _places(records)
        ids += _read_ids(records, unsigned)
    if any(isinstance(id, str) for id in ids):
        ids = [id if isinstance(id, str) else "" for id in ids]
    numbers, num_classes, names = number_labels({"labels": np.asarray(ids)})
    known = dict(zip(places, numbers["labels"].tolist(), strict=True))
    return dataclasses.replace(
        source,
        labels=np.asarray([known[place] for place in _places(source)], np.int32),
        num_classes=num_classes,
        class_names=names,
        notes=numbering(names),
    )


def _places(source: RecordSource) -> list[tuple[str, int]]:
    """File and offset of every record."""
    files = [source.files[number] for number in source.file]
    return list(zip(files, source.offset.tolist(), strict=True))


def _read_ids(source: RecordSource, unsigned: bool) -> list[int | str]:
    """What each record has as its label; "" or -1 where it has none.

    Raises:
      ValueError: it cannot be read, or is an unsigned number that int64 cannot hold.
    """

    def id_of(index: int, features: Any) -> int | str:
        feature = features[source.label_key]
        if feature.bytes_list.value:
            return feature.bytes_list.value[0].decode(errors="replace")
        if not feature.int64_list.value:
            return UNLABELLED
        label = int(feature.int64_list.value[0])
        if unsigned and label < 0:
            raise ValueError(
                f"the label of {source.name(index)} is {label % 2**64}; allowed: up to "
                f"{2**63 - 1} (--config.data.label_key)"
            )
        return label

    with ThreadPoolExecutor(READERS) as pool:
        ids = source.visit(range(source.num_examples), id_of, pool.map)
    for index, id in enumerate(ids):
        if isinstance(id, OSError):
            raise ValueError(
                f"cannot read {source.name(index)}: {id} (--config.data.dir)"
            )
    return ids
