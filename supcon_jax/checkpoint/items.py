"""What a step of a checkpoint holds, and how it is read.

Its items: "encoder" (its parameters and batch statistics, all that linear evaluation and
users need), "encoder_average" (the same of the average, where the run has one), "training"
(everything else of the TrainState) and "record" (a digest of every array, and how well the
run was). Orbax notices files that are missing or cut off; a flipped bit it restores without
a word, so every array is compared with its digest after it was read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import pathlib
import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from supcon_jax import storage
from supcon_jax.steps.state import TrainState
from supcon_jax.storage import epaths

logger = logging.getLogger(__name__)
PyTree = Any
ITEMS = ("encoder", "encoder_average", "training")
RECORD = "record"


def split(state: TrainState) -> dict[str, PyTree]:
    """The state as the items that are saved."""
    encoder: dict[str, PyTree] = {}
    training = {
        name: getattr(state, name) for name in ("step", "opt_state", "momentum")
    }
    for collection in ("params", "batch_stats"):
        tree = dict(getattr(state, collection))
        if "encoder" in tree:
            encoder[collection] = tree.pop("encoder")
        training[collection] = tree
    items = {"encoder": encoder, "encoder_average": state.encoder_average}
    return {name: tree for name, tree in items.items() if tree} | {"training": training}


def join(items: dict[str, PyTree]) -> TrainState:
    """The state of its items."""
    training, encoder = items["training"], items.get("encoder", {})
    collections = {
        name: training[name] | ({"encoder": encoder[name]} if name in encoder else {})
        for name in ("params", "batch_stats")
    }
    rest = {name: training[name] for name in ("step", "opt_state", "momentum")}
    average = items.get("encoder_average", {})
    return TrainState(**rest, **collections, encoder_average=average)


def checkpoint_dir(workdir: str | pathlib.Path) -> pathlib.Path:
    """Where a workdir keeps its checkpoints (absolute, as Orbax wants it)."""
    return epaths.as_path(workdir) / "checkpoints"


def saved_steps(workdir: str | pathlib.Path) -> list[int]:
    """The steps of a workdir's complete checkpoints, oldest first."""
    directory = storage.join(storage.absolute(workdir), "checkpoints")
    # A save under way has a longer name until it is whole. In a bucket nothing can be
    # renamed, and a save is whole when Orbax has written this file.
    if storage.is_remote(directory):
        whole = [name.split("/") for name in storage.walk(directory)]
        names = [name[0] for name in whole if name[1:] == ["commit_success.txt"]]
    else:
        names = storage.names(directory)
    return sorted(int(name) for name in names if name.isdigit())


def digest(tree: PyTree) -> str:
    """A digest of the names, types, shapes and bytes of a tree of arrays."""
    sha = hashlib.sha256(json.dumps(digests({"": tree}), sort_keys=True).encode())
    return f"sha256:{sha.hexdigest()}"


def on_host(tree: PyTree) -> PyTree:
    """Arrays that are on every device alike, as the host's; all are fetched at once."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf.addressable_data(0)
        return leaf

    return jax.device_get(jax.tree.map(one, tree))


def digests(trees: dict[str, PyTree]) -> dict[str, str]:
    """SHA-256 of every array: of its type, its shape and its bytes, by its name."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(on_host(trees)):
        array = np.ascontiguousarray(leaf)
        sha = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
        sha.update(array.data)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = sha.hexdigest()
    return found


def read_step(
    manager: ocp.CheckpointManager,
    directory: pathlib.Path,
    step: int,
    abstract: dict[str, PyTree],
) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Items of a step and its record, the arrays compared with their digests.

    Raises:
      ValueError: an array is not what was saved.
      Exception: whatever Orbax raises for files that it cannot read.
    """
    items: dict[str, Any] = {
        name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()
    }
    recorded = storage.is_dir(directory / str(step) / RECORD)
    if recorded:
        items[RECORD] = ocp.args.JsonRestore()
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    trees = {name: restored[name] for name in abstract}
    if not recorded:
        logger.warning(
            "warning: the checkpoint of step %d has no digests (an older version made "
            "it), so damage to it would not be noticed",
            step,
        )
        return trees, {}
    expected = {
        name: value
        for name, value in restored[RECORD]["digests"].items()
        if name.split("/")[0] in trees
    }
    found = digests(trees)
    wrong = sorted(
        n for n in found.keys() | expected if found.get(n) != expected.get(n)
    )
    if wrong:
        raise ValueError(
            f"{len(wrong)} arrays are not what was saved, such as {wrong[0]}"
        )
    return trees, restored[RECORD]


def is_damage(error: Exception) -> bool:
    """Whether what was saved is at fault, and not that it cannot be read just now.

    A network file system that hangs, a bucket that does not answer, and a device without
    memory say nothing of the files.
    """
    if isinstance(error, jax.errors.JaxRuntimeError | MemoryError):
        return False
    missing = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError) or error.errno in (None, *missing)
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # of TensorStore
        return int(code[1]) in missing
    return not re.search(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED)\b", str(error))


def first_line(error: Exception) -> str:
    """What an error says, short enough for a warning of one line."""
    told = getattr(error, "strerror", None) or str(error)
    line = next(iter(told.strip().splitlines()), "") or type(error).__name__
    return line if len(line) < 200 else f"{line[:200]}..."
