"""Checkpoints of a run. The only file that knows Orbax.

A step holds these items: "encoder" (its parameters and batch statistics, all that linear
evaluation and users need), "encoder_average" (the same of the average, where the run has
one), "training" (everything else of the TrainState) and "record" (a digest of every array,
and how well the run was). Orbax notices files that are missing or cut off; a flipped bit it
restores without a word, so every array is compared with its digest after it was read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
)

from supcon_jax import storage
from supcon_jax.metrics import best_metric
from supcon_jax.steps.state import TrainState
from supcon_jax.storage import epaths

logger = logging.getLogger(__name__)
PyTree = Any
ITEMS = ("encoder", "encoder_average", "training")
RECORD = "record"


def _split(state: TrainState) -> dict[str, PyTree]:
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


def _join(items: dict[str, PyTree]) -> TrainState:
    training, encoder = items["training"], items.get("encoder", {})
    collections = {
        name: training[name] | ({"encoder": encoder[name]} if name in encoder else {})
        for name in ("params", "batch_stats")
    }
    rest = {name: training[name] for name in ("step", "opt_state", "momentum")}
    average = items.get("encoder_average", {})
    return TrainState(**rest, **collections, encoder_average=average)


class Checkpointer:
    """Saves and restores the TrainStates of one workdir, asynchronously.

    Keeps the newest `keep` steps, and beside them the one that is best by
    `metrics.best_metric` of what was measured.
    """

    def __init__(self, workdir: str | pathlib.Path, *, keep: int = 2):
        policy = AnyPreservationPolicy(
            [
                LatestN(keep),
                BestN(
                    get_metric_fn=lambda kept: kept[best_metric(kept)],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._workdir, self._directory = workdir, checkpoint_dir(workdir)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, create=True, cleanup_tmp_directories=True
        )
        with _failures_told(self._workdir, "opened"):
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        step: int,
        metrics: dict[str, float],
        *,
        health: dict[str, float] | None = None,
        told: dict[str, float] | None = None,
    ) -> None:
        """Starts to save; returns once the device's arrays have been copied.

        Args:
          state: on every device alike.
          step: its number.
          metrics: of its evaluation, if there was one; the best step is kept.
          health: what the next save is judged against, see run/health.py.
          told: the metrics of the last step of a run, for its final line.

        Raises:
          OSError: this save or the one before could not be written.
        """
        best = best_metric(metrics)
        known = None if best is None else {best: metrics[best]}
        # As arrays of the host, which Orbax writes as they are. A device's array it cuts
        # into a piece for each device, and compiles a program for each piece.
        trees = _on_host(_split(state))
        items: dict[str, Any] = {n: ocp.args.StandardSave(t) for n, t in trees.items()}
        record = {"digests": _digests(trees), "health": health or {}}
        if told:
            record["told"] = told
        items[RECORD] = ocp.args.JsonSave(record)
        with _failures_told(self._workdir, "written"):
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=known)

    def restore_newest(
        self, abstract_state: TrainState
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest step that is whole; None where nothing was saved.

        Steps after it that are damaged are moved into `damaged_checkpoints/`, with one
        warning each.

        Args:
          abstract_state: shapes and shardings to restore into.

        Returns:
          The state, and the `health` and what was `told` that were saved with it.

        Raises:
          ValueError: there are steps, and none is whole.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        abstract, reasons = _split(abstract_state), {}
        for step in steps:
            try:
                trees, record = _read(self._manager, self._directory, step, abstract)
            except Exception as error:  # Orbax and what it stands on raise all kinds
                reasons[step] = _reason(error)
                if not _any_process(True):
                    continue
            else:
                if not _any_process(False):
                    self._put_aside(reasons, step)
                    return _join(trees), record
                reasons[step] = "another process cannot read it"
        if reasons:
            newest = max(reasons)
            raise ValueError(
                f"none of the {len(reasons)} checkpoints in {self._directory} can be "
                f"restored; step {newest}: {reasons[newest]}; use another --workdir"
            )
        return None

    def _put_aside(self, reasons: dict[int, str], good: int) -> None:
        """Damaged steps would stand in the way of those that take their place."""
        if not reasons:
            return
        aside = self._directory.parent / "damaged_checkpoints"
        for step, reason in reasons.items():
            logger.warning(
                "warning: the checkpoint of step %d is damaged (%s); going on from that "
                "of step %d (the damaged one is now in %s)",
                step,
                reason,
                good,
                aside,
            )
            if jax.process_index() == 0:
                number = len(storage.names(aside))
                damaged = self._directory / str(step)
                storage.move(damaged, aside / f"{step}_{number}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints put aside")
        self._manager.reload()

    def wait(self) -> None:
        """Returns when the last save is complete on disk.

        Raises:
          OSError: it could not be written.
        """
        with _failures_told(self._workdir, "written"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and lets go of the folder.

        Raises:
          OSError: it could not be written.
        """
        with _failures_told(self._workdir, "written"):
            self._manager.close()


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
    sha = hashlib.sha256(json.dumps(_digests({"": tree}), sort_keys=True).encode())
    return f"sha256:{sha.hexdigest()}"


def _on_host(tree: PyTree) -> PyTree:
    """Arrays that are on every device alike, as the host's; all are fetched at once."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf.addressable_data(0)
        return leaf

    return jax.device_get(jax.tree.map(one, tree))


def _digests(trees: dict[str, PyTree]) -> dict[str, str]:
    """SHA-256 of every array: of its type, its shape and its bytes, by its name."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(_on_host(trees)):
        array = np.ascontiguousarray(leaf)
        sha = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
        sha.update(array.data)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = sha.hexdigest()
    return found


def _read(
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
    found = _digests(trees)
    wrong = sorted(
        n for n in found.keys() | expected if found.get(n) != expected.get(n)
    )
    if wrong:
        raise ValueError(
            f"{len(wrong)} arrays are not what was saved, such as {wrong[0]}"
        )
    return trees, restored[RECORD]


@contextlib.contextmanager
def _failures_told(workdir: str | pathlib.Path, done: str) -> Iterator[None]:
    """What Orbax and TensorStore raise for a full or broken disk, in one line.

    Raises:
      OSError: in place of theirs; of a device's failure its own.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None) or errno.EIO
        reason = _reason(error)
        if code := re.search(r"os_error_code='(\d+)'", str(error)):  # of TensorStore
            number = int(code[1])
            reason = os.strerror(number)
        kept = "none was made before"
        with contextlib.suppress(
            OSError
        ):  # what keeps it from writing may be reading too
            if steps := saved_steps(workdir):
                kept = f"step {steps[-1]} is whole"
        raise OSError(
            number,
            f"a checkpoint cannot be {done} ({reason}); {kept}",
            str(checkpoint_dir(workdir)),
        ) from error


def _any_process(failed: bool) -> bool:
    """Whether any process of the job says so; all of them must take the same step."""
    if jax.process_count() == 1:
        return failed
    return bool(np.any(multihost_utils.process_allgather(np.asarray(failed))))


def _reason(error: Exception) -> str:
    told = getattr(error, "strerror", None) or str(error)
    line = next(iter(told.strip().splitlines()), "") or type(error).__name__
    return line if len(line) < 200 else f"{line[:200]}..."


def restore_encoder(
    workdir: str | pathlib.Path,
    *,
    step: int | None = None,
    average: bool = False,
    sharding: Sharding | None = None,
) -> dict[str, PyTree]:
    """The encoder of a pretraining run, ready for `encoder.apply`.

    Args:
      workdir: the run's workdir.
      step: a saved step; the newest by default.
      average: the average over the steps (config.encoder_average) instead of the weights
        of the step.
      sharding: where the arrays go; the first local device by default.

    Returns:
      The pytree that `encoder.apply` takes, with "params" and "batch_stats".

    Raises:
      ValueError: no pretraining run or no checkpoint there, or none that is whole. A
        damaged newest step is passed over with a warning, unless `step` names it.

    Example:
      variables = restore_encoder("runs/digits")
      encoder = create_encoder("resnet8", stem="cifar")
      embeddings = encoder.apply(variables, images, train=False)
    """
    item = "encoder_average" if average else "encoder"

    def read(manager: ocp.CheckpointManager, directory: pathlib.Path, at: int) -> Any:
        return _read_encoder(manager, directory, at, item, sharding)

    return _read_newest(
        workdir,
        read,
        step=step,
        check=lambda path: _check_has_encoder(path, workdir, item),
    )


def restore_state(
    workdir: str | pathlib.Path,
    abstract_state: TrainState | None = None,
    *,
    step: int | None = None,
    sharding: Sharding | None = None,
) -> TrainState:
    """A whole state of another run, which is left as it is.

    Args:
      workdir: the run's workdir.
      abstract_state: shapes and shardings to restore into; None: as it was saved, the
        optimizer's state in plain containers.
      step: a saved step; the newest that is whole by default.
      sharding: where the arrays go then; the first local device by default.

    Raises:
      ValueError: there is no such checkpoint, or none that is whole.
    """

    def read(manager: ocp.CheckpointManager, directory: pathlib.Path, at: int) -> Any:
        if abstract_state is not None:
            abstract = _split(abstract_state)
        else:
            there = [n for n in ITEMS if storage.is_dir(directory / str(at) / n)]
            abstract = _abstract_items(manager, at, there, sharding)
        return _join(_read(manager, directory, at, abstract)[0])

    return _read_newest(workdir, read, step=step)


def _read_newest(
    workdir: str | pathlib.Path,
    read: Callable[[ocp.CheckpointManager, pathlib.Path, int], Any],
    *,
    step: int | None = None,
    check: Callable[[pathlib.Path], None] = lambda path: None,
) -> Any:
    """What `read` makes of the newest step, or of the one named, that is whole."""
    directory = checkpoint_dir(workdir)
    if not storage.is_dir(directory):
        raise ValueError(f"no checkpoints in {workdir}: it is not a run's workdir")
    # Handlers named here, or Orbax warns about every item that it is not asked for.
    handlers: dict[str, Any] = {n: ocp.StandardCheckpointHandler() for n in ITEMS}
    handlers[RECORD] = ocp.JsonCheckpointHandler()
    options = ocp.CheckpointManagerOptions(create=False, save_interval_steps=0)
    with ocp.CheckpointManager(
        directory, options=options, item_handlers=handlers
    ) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if not steps or step not in (None, *steps):
            wanted = "complete checkpoint" if step is None else f"checkpoint {step}"
            raise ValueError(f"no {wanted} in {directory}; has the run saved one yet?")
        reasons: dict[int, str] = {}
        for candidate in steps if step is None else [step]:
            check(directory / str(candidate))
            try:
                found = read(manager, directory, candidate)
            except Exception as error:  # Orbax and what it stands on raise all kinds
                reasons[candidate] = _reason(error)
                continue
            for damaged, reason in reasons.items():
                logger.warning(
                    "warning: the checkpoint of step %d in %s is damaged (%s); taking "
                    "that of step %d",
                    damaged,
                    workdir,
                    reason,
                    candidate,
                )
            return found
    newest = max(reasons)
    raise ValueError(
        f"no checkpoint in {directory} can be restored; step {newest}: {reasons[newest]}"
    )


def _check_has_encoder(path: pathlib.Path, workdir: Any, item: str) -> None:
    if not storage.is_dir(path / "training") or storage.is_dir(path / item):
        return  # it has one, or is damaged, which shows when it is read
    if storage.is_dir(path / "encoder"):
        raise ValueError(
            f"the run in {workdir} kept no average of its encoder "
            "(--config.encoder_average.use=False, or pretrain with "
            "--config.encoder_average.decay=0.999)"
        )
    raise ValueError(
        f"the run in {workdir} saved no encoder; linear evaluation keeps only its head: "
        "name the workdir of the pretraining run"
    )


def _read_encoder(
    manager: ocp.CheckpointManager,
    directory: pathlib.Path,
    step: int,
    item: str,
    sharding: Sharding | None,
) -> dict[str, PyTree]:
    abstract = _abstract_items(manager, step, [item], sharding)
    return _read(manager, directory, step, abstract)[0][item]


def _abstract_items(
    manager: ocp.CheckpointManager,
    step: int,
    items: list[str],
    sharding: Sharding | None,
) -> dict[str, PyTree]:
    """Shapes and shardings of the items of a step, as they were saved."""
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
    saved = manager.item_metadata(step)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {item: saved[item] for item in items},
    )
