"""Where images come from: arrays in memory (digits, .npz) or TFDS.

A source says how many examples and classes a split has; `pipeline.py` turns it into
batches. Every failure here is one line that names the flag to change.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import pathlib
import re
import zlib
from typing import Any
from zipfile import BadZipFile

import numpy as np

logger = logging.getLogger(__name__)
TFDS_HOME = "~/tensorflow_datasets"
NO_DATA_NEEDED = "configs/digits.py runs without any data"


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A split held in memory.

    Attributes:
      images: `[n, H, W, 3]` uint8.
      labels: `[n]` int32, in `[0, num_classes)`.
      num_classes: number of classes C.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int

    @property
    def num_examples(self) -> int:
        """Examples in the split."""
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A split of a prepared TFDS data set, read as encoded images.

    Attributes:
      builder: the `tfds.core.DatasetBuilder`.
      split: split name, TFDS slicing included ("train[:90%]").
      num_examples: examples in the split.
      num_classes: number of classes C.
    """

    builder: Any
    split: str
    num_examples: int
    num_classes: int


Source = ArraySource | TfdsSource


def open_source(name: str, split: str, *, dir: str = "", root: str = "") -> Source:
    """Opens one split of a data set.

    Args:
      name: "digits" (scikit-learn's, embedded), "arrays" (an .npz file with
        `{split}_images` and `{split}_labels`) or any TFDS image-classification set.
      split: "train", "test", ...; for TFDS also slices such as "train[:90%]".
      dir: TFDS data directory; "" is TFDS's own default, downloading what it can.
      root: path of the .npz file for "arrays".

    Raises:
      ValueError: one line that says what is missing and which flag to change.
    """
    if name == "digits":
        return _open_digits(split)
    if name == "arrays":
        return _open_arrays(root, split)
    return _open_tfds(name, split, dir)


def take_subset(source: Source, count: int, *, seed: int = 0) -> Source:
    """At most `count` examples of a source, always the same ones for a seed.

    Arrays are drawn at random, as they may be sorted by class. Of a TFDS split the
    first ones are taken: TFDS shuffles when it prepares a data set.
    """
    if count >= source.num_examples:
        return source
    if isinstance(source, TfdsSource):
        return dataclasses.replace(source, num_examples=count)
    rows = np.random.default_rng(seed).permutation(source.num_examples)[:count]
    return dataclasses.replace(
        source, images=source.images[rows], labels=source.labels[rows]
    )


def _pick_split(split: str, available: list[str]) -> str:
    if split not in available:
        raise ValueError(
            f"unknown split {split!r}; available: {', '.join(available)} "
            "(--config.data.train_split, --config.data.eval_split)"
        )
    return split


def _open_digits(split: str) -> ArraySource:
    """1,797 handwritten digits, 8x8, grey levels 0..16 scaled to 0..255.

    The split is fixed: of each class, in the order of the data set, the share
    500/1797 that scikit-learn's stratified splitter draws with random_state=0 is the
    test set. 1,297 train and 500 test.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ValueError(
            "data.name='digits' needs scikit-learn; pip install scikit-learn"
        ) from None
    _pick_split(split, ["train", "test"])
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


def _open_arrays(root: str, split: str) -> ArraySource:
    path = pathlib.Path(root).expanduser()
    if not root or not path.is_file():
        raise ValueError(
            f"data.name='arrays' needs an .npz file with train_images, train_labels, "
            f"...; got {root!r} (--config.data.root)"
        )
    try:
        # Pickled objects could run code; arrays of numbers need none.
        with np.load(path, allow_pickle=False) as file:
            keys = list(file)
            wanted = {f"{split}_images", *(k for k in keys if k.endswith("_labels"))}
            arrays = {key: file[key] for key in keys if key in wanted}
    except (ValueError, TypeError, OSError, EOFError, BadZipFile, zlib.error) as error:
        raise ValueError(
            f"cannot read {path} as .npz: {error} (--config.data.root)"
        ) from None
    splits = sorted(k.removesuffix("_images") for k in keys if k.endswith("_images"))
    _pick_split(split, [s for s in splits if f"{s}_labels" in keys])
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{path}: {split}_images is {images.dtype} {images.shape}; "
            "expected uint8 [n, H, W, 3]"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path}: {split}_labels is {labels.dtype} {labels.shape}; "
            f"expected integers [{len(images)}]"
        )
    # All splits count, so that train and test agree on the number of classes.
    every = [arrays[f"{s}_labels"] for s in splits if f"{s}_labels" in keys]
    if min(part.min(initial=0) for part in every) < 0:
        raise ValueError(f"{path}: labels below 0; expected 0 <= label < C")
    num_classes = 1 + int(max(part.max(initial=0) for part in every))
    return ArraySource(images, labels.astype(np.int32), num_classes)


def import_tensorflow_datasets() -> tuple[Any, Any]:
    """Imports TensorFlow (kept off the accelerators) and TFDS."""
    # Set before the import: TensorFlow prints a banner for every CPU feature. oneDNN
    # serves matrix products, which input pipelines have none of; its banner stays.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"reading TFDS data needs TensorFlow ({error}); pip install -r "
            f"requirements.txt, or use data.name='arrays'; {NO_DATA_NEEDED}"
        ) from None
    # TensorFlow would otherwise take the accelerator's memory from JAX.
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf, tfds


def _prepared_version(directory: pathlib.Path, name: str) -> pathlib.Path | None:
    """The newest prepared version of a data set below a TFDS directory."""
    infos = [
        *directory.joinpath(name).glob("*/dataset_info.json"),
        *directory.joinpath(name).glob("*/*/dataset_info.json"),
    ]
    versions = [
        info.parent for info in infos if re.fullmatch(r"[\d.]+", info.parent.name)
    ]
    return max(
        versions, key=lambda p: tuple(int(x) for x in p.name.split(".")), default=None
    )


def _open_tfds(name: str, split: str, dir: str) -> TfdsSource:
    if not re.fullmatch(r"[a-zA-Z][\w/]*", name):
        raise ValueError(
            f"unknown data set {name!r}; allowed: digits, arrays, or a TFDS name "
            "(--config.data.name)"
        )
    directory = pathlib.Path(
        dir or os.environ.get("TFDS_DATA_DIR", TFDS_HOME)
    ).expanduser()
    how = _how_to_get(name)
    if dir and not directory.is_dir():
        raise ValueError(
            f"data directory {dir} does not exist (--config.data.dir); {how}"
        )
    prepared = _prepared_version(directory, name)
    if prepared is None and dir:
        others = sorted(
            p.parent.parent.name for p in directory.glob("*/*/dataset_info.json")
        )
        holds = f"it holds {', '.join(others)}" if others else "it holds no data set"
        raise ValueError(
            f"data directory {dir} has no {name}; {holds} (--config.data.dir); {how}"
        )
    if prepared is None and name == "imagenet2012":
        raise ValueError(f"no {name} in {directory} (--config.data.dir); {how}")
    _, tfds = import_tensorflow_datasets()
    if prepared is not None:
        builder = tfds.builder_from_directory(prepared)
    else:
        builder = _download(tfds, name, directory, how)
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not hasattr(
        features["label"], "num_classes"
    ):
        raise ValueError(
            f"data set {name} has features {', '.join(features)}; image classification "
            "needs image and label (--config.data.name)"
        )
    _pick_split(split.split("[")[0], list(builder.info.splits))
    try:
        num_examples = builder.info.splits[split].num_examples
    except Exception as error:
        raise ValueError(
            f"cannot read split {split!r} of {name}: {str(error).splitlines()[0]} "
            "(--config.data.train_split, --config.data.eval_split)"
        ) from None
    return TfdsSource(builder, split, num_examples, features["label"].num_classes)


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


def _download(tfds: Any, name: str, directory: pathlib.Path, how: str) -> Any:
    """Lets TFDS download and prepare a data set into its default directory."""
    import jax

    known = tfds.list_builders(with_community_datasets=False)
    if name.split("/")[0] not in known:
        nearest = difflib.get_close_matches(name, [*known, "digits", "arrays"], n=3)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise ValueError(f"unknown data set {name!r}{hint} (--config.data.name)")
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
