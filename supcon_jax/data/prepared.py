"""The datasets that TFDS has prepared in a folder: finding them, and downloading others.

What is found is TFDS's own description of a dataset, a builder; tfds.py reads its records.
"""

from __future__ import annotations

import difflib
import logging
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from supcon_jax import storage
from supcon_jax.data.tensorflow_imports import (
    NO_DATA_NEEDED,
    import_tensorflow_datasets,
)
from supcon_jax.storage import epaths

logger = logging.getLogger(__name__)
TFDS_HOME = "~/tensorflow_datasets"


def find_builder(name: str, dir: str, *, built_in: Sequence[str] = ()) -> Any:
    """The TFDS builder of a prepared dataset, which is downloaded where that is allowed.

    Args:
      name: as TFDS writes it, "cifar10", "cifar10:3.0.2" or "name/config"; without a
        version the newest prepared one is taken.
      dir: TFDS data directory; "" is TFDS's own default.
      built_in: names that mean something else, for messages about unknown ones.

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
    versions = prepared_versions(directory, name)
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
    tfds = import_tensorflow_datasets()
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


def prepared_versions(directory: str, name: str) -> dict[str, str]:
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
