"""Corrupted versions of a dataset: one split for each corruption and severity, "fog_3".

A folder has them in one of three layouts: `fog/3/CLASS/IMAGE` (ImageNet-C as released, with
or without the folders noise, blur, weather and digital in between), `fog.npy` of all
severities beside `labels.npy` (CIFAR-10-C as released), or `fog_3.npz` (what
supcon_jax.tools.corrupt makes of small images). TFDS has each as a config of a dataset.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
import zlib
from collections.abc import Collection, Iterable
from typing import Any
from zipfile import BadZipFile

import numpy as np

from supcon_jax import storage
from supcon_jax.data.arrays import to_rgb
from supcon_jax.data.folders import open_classes
from supcon_jax.data.names import are_names, pick_split
from supcon_jax.data.prepared import prepared_configs
from supcon_jax.data.sources import ArraySource, Source
from supcon_jax.evaluation.corruption import CORRUPTIONS, SEVERITIES

logger = logging.getLogger(__name__)
# What TFDS calls two of them.
ALIASES = {"frosted_glass_blur": "glass_blur", "elastic": "elastic_transform"}
# Groups of corruptions and what archives were unpacked into; a folder with more folders
# than that has something else in them.
DEPTH, MOST_FOLDERS = 2, 40
LABELS = "labels.npy"
# What supcon_jax.tools.corrupt notes of the folder that it makes.
MANIFEST = "corruptions.json"


def split_name(corruption: str, severity: int) -> str:
    """The split of a corruption and a severity: "fog_3"."""
    return f"{corruption}_{severity}"


# In the order of the benchmark.
ALL_SPLITS = tuple(split_name(c, s) for c in CORRUPTIONS for s in SEVERITIES)


def check_corruptions(names: Iterable[str]) -> None:
    """Refuses names that no corruption has.

    Raises:
      ValueError: naming the nearest that there is, and all.
    """
    for name in names:
        if name not in CORRUPTIONS:
            nearest = difflib.get_close_matches(name, CORRUPTIONS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(
                f"unknown corruption {name!r}{hint} Allowed: {', '.join(CORRUPTIONS)}"
            )


def find_splits(
    place: str, *, dir: str, split: str
) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """What there is of a corrupted dataset, without opening it.

    Args:
      place: a folder, or the name of a TFDS dataset whose configs are the corruptions.
      dir: TFDS data directory.
      split: of a TFDS dataset.

    Returns:
      Split -> how `datasets.open_source` opens it, in the order of the benchmark; and what
      was left alone.

    Raises:
      ValueError: there is no corruption.
    """
    if storage.is_dir(storage.absolute(place)):
        paths, others = _find(place)
        return {
            name: {"name": "corrupted", "split": name, "root": place}
            for name in ALL_SPLITS
            if name in paths
        }, others
    match = re.fullmatch(r"([a-zA-Z]\w*)(:\d+\.\d+\.\d+)?", place)
    if not match:
        raise ValueError(f"there is no folder {place!r} (--config.data.root)")
    name, version = match[1], match[2] or ""
    prepared = prepared_configs(name, dir)
    if prepared and not any(map(_split_of_config, prepared)):
        raise ValueError(
            f"{name} has the configs {', '.join(prepared[:10])}, none of which is a "
            "corruption with its severity (--config.data.name)"
        )
    # Where nothing is prepared, TFDS downloads it or says why it cannot.
    configs = {_split_of_config(c): c for c in prepared or ALL_SPLITS}
    if not prepared and name == "cifar10_corrupted":
        known = {own: theirs for theirs, own in ALIASES.items()}
        configs = {
            split_name(c, s): split_name(known.get(c, c), s)
            for c in CORRUPTIONS
            for s in SEVERITIES
        }
    return {
        own: {"name": f"{name}/{configs[own]}{version}", "split": split, "dir": dir}
        for own in ALL_SPLITS
        if own in configs
    }, tuple(c for c in prepared if not _split_of_config(c))


def is_released(place: str) -> bool:
    """Whether images were not made anew, by us or by TFDS, as far as can be seen."""
    root = storage.absolute(place)
    if storage.is_dir(root):
        return not storage.is_file(storage.join(root, MANIFEST))
    return not place.startswith("imagenet2012_corrupted")


def check_whole(splits: Collection[str], place: str) -> None:
    """Warns of corruptions and severities that a dataset lacks.

    Args:
      splits: those that it has.
      place: where it is.

    Raises:
      ValueError: a corruption lacks severities that others have.
    """
    has = {
        corruption: [s for s in SEVERITIES if split_name(corruption, s) in splits]
        for corruption in CORRUPTIONS
    }
    severities = sorted({severity for found in has.values() for severity in found})
    for corruption, found in has.items():
        missing = ", ".join(str(s) for s in severities if s not in found)
        if found and missing:
            raise ValueError(
                f"{place} has {corruption} without severity {missing}, which others have; "
                "unpack it whole or remove it (--config.data.root)"
            )
    if lacking := [corruption for corruption, found in has.items() if not found]:
        logger.warning(
            "warning: %s lacks %d of 15 corruptions: %s",
            place,
            len(lacking),
            ", ".join(lacking),
        )
    if len(severities) < len(SEVERITIES):
        logger.warning(
            "warning: %s has no severity but %s", place, ", ".join(map(str, severities))
        )


def open_corrupted(split: str, dir: str, root: str) -> Source:
    """One corruption and severity, "fog_3", of a folder in any of the three layouts.

    Raises:
      ValueError: one line that says what is missing there.
    """
    del dir
    if not root or not storage.is_dir(storage.absolute(root)):
        raise ValueError(
            "data.name='corrupted' needs a folder of corrupted images; got "
            f"{root!r} (--config.data.root)"
        )
    paths, _ = _find(root)
    path = paths[pick_split(split, [name for name in ALL_SPLITS if name in paths])]
    if storage.is_dir(path):
        return open_classes(path, _manifest(root).get("classes", ()))
    if path.endswith(".npz"):
        return _open_npz(path)
    return _open_npy(path, severity=int(split[-1]))


def class_numbers(source: Source, clean: Source, *, name: str) -> np.ndarray:
    """Which class of the clean data each class of corrupted data is, `[C]`.

    Names decide where both have some; numbers, or no names at all, are in order.

    Raises:
      ValueError: they have not the same classes.
    """
    count = clean.num_classes
    if source.num_classes != count:
        raise ValueError(
            f"{name} has {source.num_classes} classes, the clean data {count} "
            "(--config.data.root, --config.data.name)"
        )
    ours, theirs = clean.class_names, source.class_names
    if not (are_names(ours) and are_names(theirs)):
        return np.arange(count)
    for own in theirs:
        if own not in ours:
            raise ValueError(
                f"{name} has the class {own!r}, which the clean data lack; they have "
                f"{', '.join(ours[:5])}, ... (--config.data.root, --config.data.name)"
            )
    return np.asarray([ours.index(own) for own in theirs])


def _split_of_config(config: str) -> str:
    """Our name of a TFDS config; "" where it is none of the benchmark's."""
    corruption, _, severity = config.rpartition("_")
    name = f"{ALIASES.get(corruption, corruption)}_{severity}"
    return name if name in ALL_SPLITS else ""


def _find(root: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Split -> its folder or file below a folder; and other corruptions that lie there.

    Raises:
      ValueError: a corruption lies there twice or lacks its severities, or there is none.
    """
    root = storage.absolute(root)
    found: dict[str, str] = {}
    others: list[str] = []

    def add(name: str, path: str) -> None:
        if name in found:
            raise ValueError(
                f"{root} has {name} twice, {found[name]} and {path}; remove one "
                "(--config.data.root)"
            )
        found[name] = path

    def look(folder: str, depth: int) -> None:
        names = storage.names(folder)
        deeper = []
        for name in names:
            path = storage.join(folder, name)
            stem, _, suffix = name.rpartition(".")
            if suffix == "npz" and stem in ALL_SPLITS:
                add(stem, path)
            elif suffix == "npy" and stem in CORRUPTIONS and LABELS in names:
                for severity in SEVERITIES:
                    add(split_name(stem, severity), path)
            elif suffix == "npy" and LABELS in names and name != LABELS:
                others.append(stem)
            elif name in CORRUPTIONS and storage.is_dir(path):
                severities = [s for s in SEVERITIES if str(s) in storage.names(path)]
                if not severities:
                    raise ValueError(
                        f"{path} has no folders 1 to 5, its severities; unpack it or "
                        "remove it (--config.data.root)"
                    )
                for severity in severities:
                    add(split_name(name, severity), storage.join(path, str(severity)))
            elif "." not in name and storage.is_dir(path):
                deeper.append(path)
        for path in deeper[: MOST_FOLDERS if len(deeper) <= MOST_FOLDERS else 0]:
            if "1" in storage.names(path):
                others.append(storage.name(path))
            elif depth:
                look(path, depth - 1)

    look(root, DEPTH)
    if not found:
        raise ValueError(
            f"{root} holds no corruption; expected fog/3/CLASS/IMAGE (ImageNet-C), "
            "fog.npy and labels.npy (CIFAR-10-C), or fog_3.npz, and so on "
            "(--config.data.root)"
        )
    return found, tuple(others)


def _manifest(root: str) -> dict[str, Any]:
    path = storage.join(storage.absolute(root), MANIFEST)
    try:
        return json.loads(storage.read(path)) if storage.is_file(path) else {}
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error} (--config.data.root)") from None


def _open_npz(path: str) -> ArraySource:
    """`images` `[n, H, W, 3]`, `labels` `[n]` and, where they are there, the classes."""
    arrays = _load(path)
    for key in ("images", "labels"):
        if key not in arrays:
            raise ValueError(f"{path} has no array {key!r} (--config.data.root)")
    return _source(
        path,
        arrays["images"],
        arrays["labels"],
        int(arrays.get("num_classes", 0)),
        tuple(str(name) for name in arrays.get("class_names", ())),
    )


def _open_npy(path: str, *, severity: int) -> ArraySource:
    """The n images of a severity, of an array with those of all five in their order."""
    labels = _load(storage.join(path.rpartition("/")[0], LABELS))
    images = _load(path)
    if len(images) != len(labels) or len(labels) % len(SEVERITIES):
        raise ValueError(
            f"{path} has {len(images):,} images and {LABELS} {len(labels):,} labels; "
            "expected as many, those of severity 1, then of 2, up to 5 "
            "(--config.data.root)"
        )
    count = len(labels) // len(SEVERITIES)
    rows = slice((severity - 1) * count, severity * count)
    return _source(path, images[rows], labels[rows])


def _load(path: str) -> Any:
    """The array of a .npy file, the arrays of a .npz file by name.

    A local .npy file stays on the disk until its rows are asked for.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        if path.endswith(".npy") and not storage.is_remote(path):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with storage.open_file(path) as content:
            found = np.load(content, allow_pickle=False)
            return dict(found) if path.endswith(".npz") else found
    except (ValueError, TypeError, OSError, EOFError, BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {path}: {reason} (--config.data.root)") from None


def _source(
    path: str,
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int = 0,
    class_names: tuple[str, ...] = (),
) -> ArraySource:
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}: the labels are {labels.dtype} {list(labels.shape)}; expected "
            f"integers [{len(images)}] (--config.data.root)"
        )
    if not len(labels):
        raise ValueError(f"{path} holds no images (--config.data.root)")
    return ArraySource(
        to_rgb(path, images),
        np.asarray(labels, np.int32),
        num_classes or int(labels.max()) + 1,
        class_names,
    )
