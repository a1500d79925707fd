"""Saves the states of a run while it goes on, and restores them when it is resumed."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
)

from supcon_jax import storage
from supcon_jax.checkpoint.items import (
    RECORD,
    checkpoint_dir,
    digests,
    first_line,
    join,
    on_host,
    read_step,
    saved_steps,
    split,
)
from supcon_jax.metrics import best_metric
from supcon_jax.steps.state import TrainState

logger = logging.getLogger(__name__)


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
        trees = on_host(split(state))
        items: dict[str, Any] = {n: ocp.args.StandardSave(t) for n, t in trees.items()}
        record = {"digests": digests(trees), "health": health or {}}
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
        abstract, reasons = split(abstract_state), {}
        for step in steps:
            try:
                trees, record = read_step(
                    self._manager, self._directory, step, abstract
                )
            except Exception as error:  # Orbax and what it stands on raise all kinds
                reasons[step] = first_line(error)
                if not _any_process(True):
                    continue
            else:
                if not _any_process(False):
                    self._put_aside(reasons, step)
                    return join(trees), record
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
        reason = first_line(error)
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
