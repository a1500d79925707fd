"""A run's folder: what made it, and whether a config may go on with it."""

from __future__ import annotations

import contextlib
import json
import pathlib
import secrets
import socket
import time
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from supcon_jax import hosts, storage
from supcon_jax.checkpoint import saved_steps
from supcon_jax.config.check import flatten
from supcon_jax.config.keys import KEYS
from supcon_jax.storage import epaths
from supcon_jax.storage.lock import Lock
from supcon_jax.storage.mirror import Mirror
from supcon_jax.writers import read_metrics

# Keys that set the length of a run, which its schedule depends on from the first step.
LENGTH_KEYS = ("epochs", "total_steps")
# Keys that say where an encoder is; what it is, its digest says.
SOURCE_KEYS = ("pretrained", "encoder.init_from")


class _Open(NamedTuple):
    """A workdir that this process writes to; `mirror` where it is in a bucket."""

    lock: Lock
    mirror: Mirror | None


_OPEN: dict[str, _Open] = {}


def read_config(workdir: str | pathlib.Path) -> dict[str, Any] | None:
    """The config that made a workdir, or None where there is none.

    Raises:
      ValueError: there is one that cannot be read.
    """
    return _read_json(storage.join(storage.absolute(workdir), "config.json"))


def read_facts(workdir: str | pathlib.Path) -> dict[str, Any]:
    """What a workdir's run.json says of its data and of the arrays that it was given."""
    return _read_json(storage.join(storage.absolute(workdir), "run.json")) or {}


def open_workdir(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    frozen: str = "",
    data: dict[str, Any] | None = None,
    begun: bool = False,
) -> pathlib.Path:
    """Creates a workdir with its config, or checks that this config may go on with it.

    A workdir that has a checkpoint or is finished belongs to its config: keys that
    change the result must have the values they had (a key that did not exist then: its
    default). Keys with `Key.free` may change. A workdir without a checkpoint is bound by
    nothing.

    Args:
      config: a checked config.
      workdir: a path; made where it does not exist.
      frozen: digest of the arrays of another run that it reads, or starts from; it takes
        the place of `SOURCE_KEYS`, so that a pretraining run may be moved. "": what was
        noted at the start stays, if anything was.
      data: `identity.identify` of each split, by its name.
      begun: whether it holds results of this config beside checkpoints and metrics.

    Raises:
      ValueError: another config or other data made it (what differs is named), or it
        cannot be written.
    """
    path = epaths.as_path(workdir)
    ours = json.loads(json.dumps(config.to_dict()))
    theirs = read_config(path)
    started, known = bool(saved_steps(path)), ""
    if theirs is None and started:
        raise ValueError(
            f"{path} has checkpoints but no config.json, so it is not known what made "
            "them; use another --workdir"
        )
    if theirs is not None and (started or begun or finished_metrics(path)):
        facts = read_facts(path)
        known = facts.get("frozen", "")
        free = set(SOURCE_KEYS) if frozen and known == frozen else set()
        _refuse_other_config(path, flatten(ours), flatten(theirs), free)
        if known and frozen and known != frozen:
            raise ValueError(
                f"workdir {path} was made with another encoder than the one that is now "
                f"in {config.pretrained or config.encoder.init_from!r} (another run, a "
                "later step of the same, or other weights); use another --workdir, or "
                "another --config.pretrained or --config.encoder.init_from"
            )
        refuse_other_data(path, data or {}, facts.get("data", {}))
    if jax.process_index() == 0:
        try:
            _enter(path)
            _write_json(storage.join(path, "config.json"), ours)
            facts = {"frozen": frozen or known, "data": data or {}}
            _write_json(storage.join(path, "run.json"), facts)
        except OSError as error:
            raise ValueError(
                f"cannot write to workdir {path}: {error.strerror} (--workdir)"
            ) from None
    return path


def _enter(path: pathlib.Path) -> None:
    """Locks a workdir; makes it, and where it is in a bucket its local copy.

    Raises:
      ValueError: another process is in it.
    """
    if str(path) in _OPEN:
        return
    if not storage.is_remote(path):
        path.mkdir(parents=True, exist_ok=True)
    lock = Lock(path)
    mirror = None
    if storage.is_remote(path):
        mirror = Mirror(str(path), is_ours=lambda: not lock.is_lost())
    _OPEN[str(path)] = _Open(lock, mirror)


def local_folder(path: pathlib.Path) -> pathlib.Path:
    """Where metrics, log and figures of a workdir are written: itself, or its mirror."""
    entered = _OPEN.get(str(path))
    return entered.mirror.folder if entered and entered.mirror else path


def before_save(path: pathlib.Path) -> None:
    """What a save relies on: the workdir is ours, and the lines before it are there.

    Raises:
      ValueError: another process has taken it over.
    """
    if entered := _OPEN.get(str(path)):
        entered.lock.held()
        if entered.mirror:
            entered.mirror.flush(patience_s=5.0)


def leave(path: pathlib.Path) -> None:
    """Uploads what is left, and lets the next run into a workdir."""
    if entered := _OPEN.pop(str(path), None):
        if entered.mirror:
            entered.mirror.close()
        entered.lock.release()


def check_shared(workdir: str | pathlib.Path, *, wait_s: float = 5.0) -> None:
    """Refuses a workdir that the processes of a job do not share; leaves no trace.

    Process 0 writes a file with a random name there, and the others look for it. A folder
    that each host has for itself would hang the first save.

    Args:
      workdir: a path.
      wait_s: how long a network file system may take to show the file.

    Raises:
      ValueError: in every process, naming one that does not see the file.
    """
    if hosts.count() == 1:
        return
    path = storage.absolute(workdir)
    problem, made, name = "", [], f".seen-by-all-{secrets.token_hex(8)}"
    try:
        if hosts.index() == 0:
            try:
                if not storage.is_remote(path):
                    folder = pathlib.Path(path)
                    made = [p for p in (folder, *folder.parents) if not p.exists()]
                    folder.mkdir(parents=True, exist_ok=True)
                storage.write(storage.join(path, name), b"")
            except OSError as error:
                problem = f"cannot write to workdir {path}: {error.strerror}"
        name = hosts.from_first("workdir", name)
        until = time.monotonic() + wait_s
        while not problem and not storage.is_file(storage.join(path, name)):
            if time.monotonic() > until:
                problem = (
                    f"process {hosts.index()} ({socket.gethostname()}) does not see in its "
                    f"workdir {path} what process 0 writes there"
                )
            time.sleep(0.1)
        hosts.refuse_together(
            problem, on="workdir", cure="give all of them one shared folder (--workdir)"
        )
    finally:
        if hosts.index() == 0:
            with contextlib.suppress(OSError):
                storage.remove(storage.join(path, name))
                for folder in made:
                    folder.rmdir()


def finished_metrics(workdir: str | pathlib.Path) -> dict[str, Any] | None:
    """The final metrics of a run that is already complete."""
    records = read_metrics(workdir)
    return records[-1] if records and records[-1].get("final") else None


def differing_keys(
    ours: dict[str, Any],
    theirs: dict[str, Any],
    ignored: AbstractSet[str] = frozenset(),
) -> list[str]:
    """Keys of two flat configs whose values give different results.

    A key that one of them lacks, because a version of the program without it wrote it,
    has its default there.
    """

    def value(flat: dict[str, Any], key: str) -> Any:
        default = KEYS[key].default if key in KEYS else None
        found = flat.get(key, default)
        # config.json holds lists where a ConfigDict holds tuples.
        return list(found) if isinstance(found, tuple) else found

    return [
        key
        for key in sorted(ours.keys() | theirs.keys())
        if key not in ignored
        and not (key in KEYS and KEYS[key].free)
        and value(ours, key) != value(theirs, key)
    ]


def _refuse_other_config(
    path: pathlib.Path, ours: dict[str, Any], theirs: dict[str, Any], free: set[str]
) -> None:
    differing = differing_keys(ours, theirs, free)
    if not differing:
        return
    told = ", ".join(
        f"{key} (there {theirs.get(key)!r}, now {ours.get(key)!r})" for key in differing
    )
    length = ""
    if set(differing) & set(LENGTH_KEYS):
        length = (
            " (a run cannot go on for longer: its learning rate depends on the length "
            "from the first step)"
        )
    raise ValueError(
        f"workdir {path} was made by another config; differing: {told}{length}; use "
        "another --workdir"
    )


def refuse_other_data(
    path: str | pathlib.Path, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """Refuses splits that are not those that made a workdir.

    Args:
      path: of the workdir.
      ours: name of a split -> what `identify` says of it now.
      theirs: the same of the workdir's run.json; an older version wrote nothing about the
        data, and then any are taken.

    Raises:
      ValueError: naming the split and what differs.
    """
    for split in sorted(ours.keys() & theirs.keys()):
        if ours[split] != theirs[split]:
            there, now = (
                f"{facts['examples']:,} examples of {facts['classes']} classes, digest "
                f"{facts['digest']}"
                for facts in (theirs[split], ours[split])
            )
            raise ValueError(
                f"workdir {path} was made with other data; {split} split: there {there}, "
                f"now {now}; use another --workdir, or the data of that run "
                "(--config.data.root, --config.data.dir)"
            )


def _read_json(path: str) -> dict[str, Any] | None:
    try:
        return json.loads(storage.read(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot read {path}: {reason}; is it a workdir?") from None


def _write_json(path: str, content: dict[str, Any]) -> None:
    storage.write(path, (json.dumps(content, indent=2) + "\n").encode())
