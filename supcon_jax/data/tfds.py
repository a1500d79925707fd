"""Datasets of TensorFlow Datasets: finding, downloading and indexing them.

TFDS says what a dataset is and downloads it; its TFRecord files are then read by
index, so that any order costs the same and a resumed run starts at once.
"""

from __future__ import annotations

import difflib
import logging
import os
import pathlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from supcon_jax.data.names import pick_split
from supcon_jax.data.sources import READERS, UNREAD, RecordSource

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


def _prepared_versions(directory: pathlib.Path, name: str) -> dict[str, pathlib.Path]:
    """The prepared versions of a dataset below a TFDS directory, newest first."""
    infos = [
        *directory.joinpath(name).glob("*/dataset_info.json"),
        *directory.joinpath(name).glob("*/*/dataset_info.json"),
    ]
    versions = {
        info.parent.name: info.parent
        for info in infos
        if re.fullmatch(r"[\d.]+", info.parent.name)
    }
    newest_first = sorted(
        versions, key=lambda v: tuple(int(x) for x in v.split(".")), reverse=True
    )
    return {version: versions[version] for version in newest_first}


def open_tfds(
    name: str, split: str, dir: str, *, built_in: Sequence[str] = ()
) -> RecordSource:
    """Opens one split of a prepared TFDS dataset, downloading it where that is allowed.

    Args:
      name: as TFDS writes it, "cifar10" or "cifar10:3.0.2"; without a version the
        newest prepared one is taken.
      split: a split or a slice of it, "train[:90%]".
      dir: TFDS data directory; "" is TFDS's own default.
      built_in: names that mean something else, for messages about unknown ones.

    Raises:
      ValueError: one line that says what is missing and which flag to change.
    """
    match = re.fullmatch(r"([a-zA-Z][\w/]*)(?::(\d+\.\d+\.\d+))?", name)
    if not match:
        raise ValueError(
            f"unknown dataset {name!r}; allowed: {', '.join(built_in)}, or a TFDS name "
            "(--config.data.name)"
        )
    name, version = match.groups()
    directory = pathlib.Path(
        dir or os.environ.get("TFDS_DATA_DIR", TFDS_HOME)
    ).expanduser()
    how = _how_to_get(name)
    if dir and not directory.is_dir():
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
            p.parent.parent.name for p in directory.glob("*/*/dataset_info.json")
        )
        holds = f"it holds {', '.join(others)}" if others else "it holds no dataset"
        raise ValueError(
            f"data directory {dir} has no {name}; {holds} (--config.data.dir); {how}"
        )
    if prepared is None and name == "imagenet2012":
        raise ValueError(f"no {name} in {directory} (--config.data.dir); {how}")
    tfds = _import_tensorflow_datasets()
    if prepared is not None:
        builder = tfds.builder_from_directory(prepared)
    else:
        builder = _download(tfds, name, directory, built_in)
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not hasattr(
        features["label"], "num_classes"
    ):
        raise ValueError(
            f"dataset {name} has features {', '.join(features)}; image classification "
            "needs image and label (--config.data.name)"
        )
    if builder.info.file_format.value != "tfrecord":
        raise ValueError(
            f"{name} in {directory} is prepared as {builder.info.file_format.value}; "
            "this program reads tfrecord (--config.data.dir)"
        )
    pick_split(split.split("[")[0], list(builder.info.splits))
    labels = features["label"]
    try:
        parts = builder.info.splits[split].file_instructions
    except Exception as error:
        raise ValueError(
            f"cannot read split {split!r} of {name}: {str(error).splitlines()[0]} "
            "(--config.data.train_split, --config.data.eval_split)"
        ) from None
    with ThreadPoolExecutor(READERS) as pool:
        indices = list(pool.map(_index_records, parts))
    offset, length = (
        np.concatenate([index[column] for index in indices]) if indices else np.empty(0)
        for column in (0, 1)
    )
    return RecordSource(
        files=tuple(str(part.filename) for part in parts),
        file=np.repeat(np.arange(len(parts)), [len(index[0]) for index in indices]),
        offset=offset,
        length=length,
        labels=np.full(len(offset), UNREAD, np.int32),
        num_classes=labels.num_classes,
        class_names=tuple(labels.names or ()),
        image_shape=features["image"].shape,
    )


def _index_records(part: Any) -> tuple[np.ndarray, np.ndarray]:
    """Where the records of one file's share of a split begin, and how long they are.

    A record is its length (8 bytes), a checksum (4), the data, a checksum (4). Only the
    lengths are read.

    Raises:
      ValueError: the file ends too early or holds another number of records.
    """
    path = str(part.filename)
    begin, offset, length = 0, [], []
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while begin < size:
                header = os.pread(file.fileno(), 12, begin)
                data = int.from_bytes(header[:8], "little")
                offset.append(begin + 12)
                length.append(data)
                begin += 12 + data + 4
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror} (--config.data.dir)"
        ) from None
    if begin != size or len(offset) != part.examples_in_shard:
        raise ValueError(
            f"{path} is damaged: {len(offset)} records in {size} bytes, expected "
            f"{part.examples_in_shard} (--config.data.dir)"
        )
    take = slice(part.skip, None if part.take == -1 else part.skip + part.take)
    return np.asarray(offset)[take], np.asarray(length)[take]


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


def _download(
    tfds: Any, name: str, directory: pathlib.Path, built_in: Sequence[str]
) -> Any:
    """Lets TFDS download and prepare a dataset into its default directory."""
    import jax

    known = tfds.list_builders(with_community_datasets=False)
    if name.split("/")[0] not in known:
        nearest = difflib.get_close_matches(name, [*known, *built_in], n=3)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise ValueError(f"unknown dataset {name!r}{hint} (--config.data.name)")
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
