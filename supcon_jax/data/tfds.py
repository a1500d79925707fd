"""Datasets of TensorFlow Datasets: finding, downloading and indexing them.

TFDS says what a dataset is and downloads it; its TFRecord files are then read by
index, so that any order costs the same and a resumed run starts at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import pathlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from supcon_jax import storage
from supcon_jax.data.index import Shards, record_lengths
from supcon_jax.data.names import number_labels, numbering, pick_split
from supcon_jax.data.records import FOOTER_BYTES, HEADER_BYTES, RecordSource
from supcon_jax.data.sources import READERS, UNLABELLED, UNREAD
from supcon_jax.storage import epaths

logger = logging.getLogger(__name__)
TFDS_HOME = "~/tensorflow_datasets"
NO_DATA_NEEDED = "configs/digits.py runs without any data"


def import_tensorflow() -> Any:
    """Imports TensorFlow, quiet and kept off the accelerators.

    Raises:
      ValueError: it is not installed.
    """
    # Both are read when TensorFlow is imported. At its default level it prints a banner
    # about the CPU, and lines of its own for every broken image. JAX sets level 1 when it
    # is imported, so every other level is the user's choice. oneDNN speeds up matrix
    # products, which an input pipeline does not need, and prints a banner too.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise _needs("TensorFlow", error) from None
    # TensorFlow would otherwise take the accelerator's memory from JAX.
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf


def _import_tensorflow_datasets() -> Any:
    import_tensorflow()
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise _needs("TensorFlow Datasets", error) from None
    return tfds


def _needs(package: str, error: ImportError) -> ValueError:
    return ValueError(
        f"reading image files needs {package} ({error}); pip install -r "
        f"requirements.txt, or use data.name='arrays'; {NO_DATA_NEEDED}"
    )


def _prepared_configs(directory: str, name: str) -> dict[str, dict[str, str]]:
    """Config -> its prepared versions below a TFDS directory, newest first.

    A dataset without configs has one with the name "".
    """
    found: dict[str, dict[str, str]] = {}
    dataset = storage.join(directory, name)
    for place in _with_info(dataset):
        config, _, version = place.rpartition("/")
        if re.fullmatch(r"\d+(\.\d+)*", version):
            found.setdefault(config, {})[version] = storage.join(dataset, place)

    def newest_first(versions: dict[str, str]) -> dict[str, str]:
        def number(version: str) -> tuple[int, ...]:
            return tuple(int(x) for x in version.split("."))

        return {v: versions[v] for v in sorted(versions, key=number, reverse=True)}

    return {config: newest_first(found[config]) for config in sorted(found)}


def _with_info(dataset: str) -> list[str]:
    """The folders one or two below a dataset's that hold its dataset_info.json."""
    if storage.is_remote(dataset):
        folders = [path.split("/") for path in storage.walk(dataset)]
    else:
        patterns = ("*/dataset_info.json", "*/*/dataset_info.json")
        root = pathlib.Path(dataset)
        found = [path for pattern in patterns for path in root.glob(pattern)]
        folders = [list(path.relative_to(root).parts) for path in found]
    return [
        "/".join(folder)
        for *folder, name in folders
        if name == "dataset_info.json" and len(folder) in (1, 2)
    ]


def _prepared_versions(directory: str, name: str) -> dict[str, str]:
    """The prepared versions of a dataset, "name" or "name/config", newest first.

    Raises:
      ValueError: another config is prepared, or several and none was named.
    """
    name, _, config = name.partition("/")
    configs = _prepared_configs(directory, name)
    if not configs or config in configs:
        return configs.get(config, {})
    choices = [f"{name}/{known}" if known else name for known in configs]
    if config or len(configs) > 1:
        got = f"not {name}/{config}" if config else "and none was chosen"
        raise ValueError(
            f"{directory} has {', '.join(choices)}, {got} "
            f"(--config.data.name={choices[0]}, --config.data.dir)"
        )
    logger.info("taking %s, the only config of %s in %s", choices[0], name, directory)
    return configs[next(iter(configs))]


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
      name: as TFDS writes it, "cifar10", "cifar10:3.0.2" or "name/config"; without a
        version the newest prepared one is taken.
      split: a split, a slice of it, or several, "train[:90%]+test".
      dir: TFDS data directory; "" is TFDS's own default.
      image_key, label_key: names of the two features; without a `label_key` ("") no
        image has a label.
      built_in: names that mean something else, for messages about unknown ones.

    Raises:
      ValueError: one line that says what is missing and which flag to change.
    """
    builder = find_builder(name, dir, built_in=built_in)
    tfds, features = _import_tensorflow_datasets(), builder.info.features
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


def find_builder(name: str, dir: str, *, built_in: Sequence[str] = ()) -> Any:
    """The TFDS builder of a prepared dataset, which is downloaded where that is allowed.

    Args:
      name, dir, built_in: as for `open_tfds`.

    Raises:
      ValueError: one line that says what is missing and which flag to change.
    """
    match = re.fullmatch(r"([a-zA-Z]\w*(?:/[\w.+-]*\w)?)(?::(\d+\.\d+\.\d+))?", name)
    if not match:
        raise ValueError(
            f"unknown dataset {name!r}; allowed: {', '.join(built_in)}, or a TFDS name, "
            "NAME, NAME/CONFIG or NAME:VERSION (--config.data.name)"
        )
    name, version = match.groups()
    directory = _directory(dir)
    how = _how_to_get(name)
    if dir and not storage.is_dir(directory):
        raise ValueError(
            f"data directory {dir} does not exist (--config.data.dir); {how}"
        )
    versions = _prepared_versions(directory, name)
    prepared = versions.get(version) if version else next(iter(versions.values()), None)
    if prepared is None and versions:
        raise ValueError(
            f"{directory} has {name} {', '.join(versions)}, not {version} "
            "(--config.data.name, --config.data.dir)"
        )
    if prepared is None and dir:
        others = sorted(
            entry
            for entry in storage.names(directory)
            if _prepared_configs(directory, entry)
        )
        holds = f"it holds {', '.join(others)}" if others else "it holds no dataset"
        raise ValueError(
            f"data directory {dir} has no {name}; {holds} (--config.data.dir); {how}"
        )
    if prepared is None and name == "imagenet2012":
        raise ValueError(f"no {name} in {directory} (--config.data.dir); {how}")
    tfds = _import_tensorflow_datasets()
    if prepared is not None:
        builder = tfds.builder_from_directory(epaths.as_path(prepared))
    else:
        builder = _download(tfds, name, directory, built_in)
    if builder.info.file_format.value != "tfrecord":
        raise ValueError(
            f"{name} in {directory} is prepared as {builder.info.file_format.value}; "
            "this program reads tfrecord (--config.data.dir)"
        )
    return builder


def prepared_configs(name: str, dir: str) -> list[str]:
    """The configs of a dataset that are prepared in a TFDS data directory."""
    return [config for config in _prepared_configs(_directory(dir), name) if config]


def _directory(dir: str) -> str:
    """A TFDS data directory; "" is TFDS's own default."""
    directory = dir or os.environ.get("TFDS_DATA_DIR", TFDS_HOME)
    if storage.is_remote(directory):
        return storage.absolute(directory)
    return os.path.expanduser(directory)


def index_tfds(name: str, dir: str, *, rebuild: bool) -> dict[str, int]:
    """Keeps where the records of all splits begin in a file (index.py).

    Args:
      name, dir: as for `open_tfds`.
      rebuild: whether to find them anew where they are known.

    Returns:
      How many records each split has.

    Raises:
      ValueError: the dataset is not there, or a file is damaged.
    """
    splits = describe(find_builder(name, dir))
    for shards in splits:
        record_lengths(shards, keep=True, rebuild=rebuild)
    return {shards.split: sum(shards.records) for shards in splits}


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
    for shards in describe(builder):
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


def describe(builder: Any) -> list[Shards]:
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


def _how_to_get(name: str) -> str:
    if name == "imagenet2012":
        return (
            "ImageNet must be prepared by hand: get the two tar files from "
            "image-net.org, run `tfds build imagenet2012 --manual_dir=TARS` and give "
            f"its data directory; {NO_DATA_NEEDED}"
        )
    return (
        f"leave data.dir empty to let TFDS download {name} into {TFDS_HOME}; "
        f"{NO_DATA_NEEDED}"
    )


def _download(tfds: Any, name: str, directory: str, built_in: Sequence[str]) -> Any:
    """Lets TFDS download and prepare a dataset into its default directory."""
    import jax

    known = tfds.list_builders(with_community_datasets=False)
    if name.split("/")[0] not in known:
        nearest = difflib.get_close_matches(name, [*known, *built_in], n=3)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise ValueError(f"unknown dataset {name!r}{hint} (--config.data.name)")
    configs = [config.name for config in tfds.builder_cls(name).BUILDER_CONFIGS]
    if "/" not in name and len(configs) > 1:
        raise ValueError(
            f"{name} has the configs {', '.join(configs[:20])}"
            f"{', ...' if len(configs) > 20 else ''}; choose one: "
            f"--config.data.name={name}/{configs[0]}"
        )
    if jax.process_count() > 1:
        # Several hosts that download at once destroy each other's files.
        raise ValueError(
            f"no {name} in {directory}; prepare it once before a multi-host job: "
            f"`tfds build {name} --data_dir=DIR`, then --config.data.dir=DIR"
        )
    logger.info("downloading %s into %s", name, directory)
    try:
        builder = tfds.builder(name, data_dir=directory)
        builder.download_and_prepare()
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"could not download {name} into {directory}: {reason}; give a directory "
            f"that holds it (--config.data.dir); {NO_DATA_NEEDED}"
        ) from None
    return builder
