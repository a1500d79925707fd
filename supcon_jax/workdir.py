"""A run's folder: what made it, and whether a config may go on with it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Set as AbstractSet
from typing import Any, TextIO

import jax
from ml_collections import ConfigDict

from supcon_jax import hosts
from supcon_jax.checkpoint import saved_steps
from supcon_jax.config import KEYS, flatten
from supcon_jax.writers import read_metrics

# Keys that set the length of a run, which its schedule depends on from the first step.
LENGTH_KEYS = ("epochs", "total_steps")
# Workdirs that this process is in.
_LOCKS: dict[pathlib.Path, TextIO] = {}


def read_config(workdir: str | pathlib.Path) -> dict[str, Any] | None:
    """The config that made a workdir, or None where there is none.

    Raises:
      ValueError: there is one that cannot be read.
    """
    return _read_json(pathlib.Path(workdir).expanduser() / "config.json")


def read_facts(workdir: str | pathlib.Path) -> dict[str, Any]:
    """What a workdir's run.json says of its data and of the arrays that it was given."""
    return _read_json(pathlib.Path(workdir).expanduser() / "run.json") or {}


def open_workdir(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    frozen: str = "",
    data: dict[str, Any] | None = None,
) -> pathlib.Path:
    """Creates a workdir with its config, or checks that this config may go on with it.

    A workdir that has a checkpoint or is finished belongs to its config: keys that
    change the result must have the values they had (a key that did not exist then: its
    default). Keys with `Key.free` may change. A workdir without a checkpoint is bound by
    nothing.

    Args:
      config: a checked config.
      workdir: a path; made where it does not exist.
      frozen: digest of the arrays that the run reads and does not train; it takes the
        place of `pretrained`, so that a pretraining run may be moved.
      data: `identity.identify` of each split, by its name.

    Raises:
      ValueError: another config or other data made it (what differs is named), or it
        cannot be written.
    """
    if "://" in str(workdir):
        raise ValueError(
            f"cannot write to {workdir}: --workdir takes a local or mounted path "
            "(a bucket can be mounted with Cloud Storage FUSE)"
        )
    path = pathlib.Path(workdir).expanduser().absolute()
    ours = json.loads(json.dumps(config.to_dict()))
    theirs = read_config(path)
    started = bool(saved_steps(path))
    if theirs is None and started:
        raise ValueError(
            f"{path} has checkpoints but no config.json, so it is not known what made "
            "them; use another --workdir"
        )
    if theirs is not None and (started or finished_metrics(path)):
        facts = read_facts(path)
        known = facts.get("frozen", "")
        free = {"pretrained"} if frozen and known == frozen else set()
        _refuse_other_config(path, flatten(ours), flatten(theirs), free)
        if known and frozen and known != frozen:
            raise ValueError(
                f"workdir {path} was made with another encoder than the one that is now "
                f"in {config.pretrained!r} (another run, or a later step of the same); "
                "use another --workdir, or another --config.pretrained"
            )
        _refuse_other_data(path, data or {}, facts.get("data", {}))
    if jax.process_index() == 0:
        try:
            path.mkdir(parents=True, exist_ok=True)
            _lock(path)
            _write_json(path / "config.json", ours)
            _write_json(path / "run.json", {"frozen": frozen, "data": data or {}})
        except OSError as error:
            raise ValueError(
                f"cannot write to workdir {path}: {error.strerror} (--workdir)"
            ) from None
    return path


def _lock(path: pathlib.Path) -> None:
    """Keeps a second process out of a workdir until this one unlocks it, or ends.

    The operating system holds the lock, so a crash leaves none behind. Network file
    systems pass it on to other machines where they support flock (NFS 4, Lustre with
    -o flock); where they do not, two machines are not kept apart.

    Raises:
      ValueError: another process is in it.
    """
    if path in _LOCKS:
        return
    file = (path / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read().strip()
        file.close()
        raise ValueError(
            f"workdir {path} is in use by another run ({who}); wait for it, or use "
            "another --workdir"
        ) from None
    except OSError:  # a file system without locks
        file.close()
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _LOCKS[path] = file


def unlock(path: pathlib.Path) -> None:
    """Lets the next run into a workdir."""
    if file := _LOCKS.pop(path, None):
        file.close()


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
    if hosts.count() == 1 or "://" in str(workdir):
        return
    path = pathlib.Path(workdir).expanduser().absolute()
    problem, made, name = "", [], f".seen-by-all-{secrets.token_hex(8)}"
    try:
        if hosts.index() == 0:
            try:
                made = [p for p in (path, *path.parents) if not p.exists()]
                path.mkdir(parents=True, exist_ok=True)
                (path / name).touch()
            except OSError as error:
                problem = f"cannot write to workdir {path}: {error.strerror}"
        name = hosts.from_first("workdir", name)
        until = time.monotonic() + wait_s
        while not problem and not (path / name).exists():
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
                (path / name).unlink(missing_ok=True)
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


def _refuse_other_data(
    path: pathlib.Path, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """An older version wrote nothing about the data: then any are taken."""
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


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}; is it a workdir?") from None


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
