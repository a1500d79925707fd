"""The folder of a study: whether its results are of this study, and who writes to it."""

from __future__ import annotations

import json
import logging
import pathlib
import time
from typing import Any

from supcon_jax import storage
from supcon_jax.run.stop import StopRequests
from supcon_jax.run.workdir import differing_keys
from supcon_jax.storage.lock import Lock
from supcon_jax.study.definition import describe
from supcon_jax.study.grid import Study, slug

logger = logging.getLogger(__name__)
WAIT_S = 5.0  # between two looks at what other runners have


def open_folder(study: Study, out: pathlib.Path, stop: StopRequests) -> None:
    """Makes the study's folder, or checks that its results are of this study.

    Raises:
      ValueError: it holds results of another one; the first difference is named.
    """
    path = out / "study.json"
    ours = json.loads(json.dumps(describe(study)))
    if path.exists():  # before anything is written
        _check_same(path, ours)
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_when_free(out, "opens the study", stop)
    try:
        if path.exists():
            theirs = _check_same(path, ours)
            # Cells that were added meanwhile join those that are there.
            for part in ("cells", "configs"):
                ours[part] = theirs.get(part, {}) | ours[part]
        storage.write(path, (json.dumps(ours, indent=2) + "\n").encode())
    finally:
        lock.release()


def _check_same(path: pathlib.Path, ours: dict[str, Any]) -> dict[str, Any]:
    theirs = json.loads(path.read_text())
    if difference := _difference(theirs, ours):
        raise ValueError(
            f"{path.parent} has results of another version of this study, or of another "
            f"one: {difference}; use another --out, or remove the folder"
        )
    return theirs


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What is not the same in two descriptions; cells may be added, and taken away."""
    tuned = any(cell["trials"] for cell in ours["cells"].values())
    tuning = ("held_out", "tune_seeds", "tuned_by") if tuned else ()
    for key in ("prepare", *tuning):
        if theirs[key] != ours[key]:
            return f"{key} was {theirs[key]!r} and is {ours[key]!r}"
    for file, now in ours["configs"].items():
        # Folders of older versions do not have them.
        was = theirs.get("configs", {}).get(file, now)
        if keys := differing_keys(now, was):
            key = keys[0]
            return f"{key} in {file} was {was.get(key)!r} and is {now.get(key)!r}"
    before, after = (
        {slug(label): (label, cell) for label, cell in described["cells"].items()}
        for described in (theirs, ours)
    )
    if before and not before.keys() & after.keys():
        return f"its cells are {'; '.join(theirs['cells'])}, of which this one has none"
    for folder, (label, cell) in before.items():
        now = after.get(folder, (label, cell))[1]
        for part in cell:
            for name in {**cell[part], **now[part]}:
                was, is_now = cell[part].get(name), now[part].get(name)
                if was != is_now:
                    return f"{part} of cell {label!r}, {name!r}, was {was!r} and is {is_now!r}"
    return ""


def lock_when_free(folder: pathlib.Path, does: str, stop: StopRequests) -> Lock:
    """The lock of a folder, waiting for a runner that `does` something there."""
    told = False
    while True:
        try:
            return Lock(folder)
        except ValueError:
            if not told:
                told = True
                logger.info("another runner %s; waiting", does)
            with stop.interruptible():
                time.sleep(WAIT_S)
