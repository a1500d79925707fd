"""Saves the states of a run while it goes on, and restores them when it is resumed."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from supcon_jax import storage
from supcon_jax.checkpoint.items import (
    RECORD,
    checkpoint_dir,
    digests,
    first_line,
    is_damage,
    join,
    on_host,
    read_step,
    saved_steps,
    split,
)
from supcon_jax.metrics import best_metric
from supcon_jax.steps.state import TrainState
from supcon_jax.writers import read_metrics

logger = logging.getLogger(__name__)
# What a process finds where it reads a step.
WHOLE, DAMAGED, UNREADABLE = range(3)


class _Manager(ocp.CheckpointManager):
    """Orbax's, which does not ask whether the job was preempted.

    It would ask with the number of the training step; the loop asks with another number, and
    JAX stops at the largest that it was asked with, which would then never be reached.
    """

    def reached_preemption(self, step: int) -> bool:
        """False: see run/stop.py, which answers signals."""
        return False


class _NewestAndBest(PreservationPolicy):
    """Keeps the newest steps, and the best of those that were measured.

    Orbax's own policy knows the measurements of this process alone, so that a resumed run
    would delete the best step.
    """

    def __init__(self, keep: int):
        self._keep = keep
        self.values: dict[int, float] = {}

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        """Which of the checkpoints are kept."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(sorted(steps)[-self._keep :])
        if known := [step for step in steps if step in self.values]:
            kept.add(max(known, key=lambda step: (self.values[step], step)))
        return [step in kept for step in steps]


class Checkpointer:
    """Saves and restores the TrainStates of one workdir, asynchronously.

    Keeps the newest `keep` steps, and beside them the one that is best by
    `metrics.best_metric` of what was measured.
    """

    def __init__(self, workdir: str | pathlib.Path, *, keep: int = 2):
        self._workdir, self._directory = workdir, checkpoint_dir(workdir)
        self._policy = _NewestAndBest(keep)
        for record in read_metrics(workdir):
            self.measured(record["step"], record)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy, create=True, cleanup_tmp_directories=True
        )
        with _failures_told(self._workdir, "opened"):
            self._manager = _Manager(self._directory, options=options)

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def measured(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes down how good a step is, where its evaluation says so."""
        best = best_metric(metrics)
        if best and math.isfinite(metrics[best]):
            self._policy.values[step] = metrics[best]

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
        self.measured(step, metrics)
        # As arrays of the host, which Orbax writes as they are. A device's array it cuts
        # into a piece for each device, and compiles a program for each piece.
        trees = on_host(split(state))
        items: dict[str, Any] = {n: ocp.args.StandardSave(t) for n, t in trees.items()}
        record = {"digests": digests(trees), "health": health or {}}
        if told:
            record["told"] = told
        items[RECORD] = ocp.args.JsonSave(record)
        with _failures_told(self._workdir, "written"):
            self._manager.save(step, args=ocp.args.Composite(**items))

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
          OSError: a step cannot be read now, which says nothing of it; it stays.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        abstract, reasons = split(abstract_state), {}
        for step in steps:
            try:
                trees, record = read_step(
                    self._manager, self._directory, step, abstract
                )
            except Exception as error:  # Orbax and what it stands on raise all kinds
                found = DAMAGED if is_damage(error) else UNREADABLE
                reasons[step] = first_line(error)
                if _worst_of_all(found) == UNREADABLE:
                    if isinstance(error, jax.errors.JaxRuntimeError | MemoryError):
                        raise
                    raise self._unreadable(step, error) from error
            else:
                worst = _worst_of_all(WHOLE)
                if worst == WHOLE:
                    self._put_aside(reasons, step)
                    return join(trees), record
                reasons[step] = "another process cannot read it"
                if worst == UNREADABLE:
                    raise self._unreadable(step, ValueError(reasons[step]))
        if reasons:
            newest = max(reasons)
            raise ValueError(
                f"none of the {len(reasons)} checkpoints in {self._directory} can be "
                f"restored; step {newest}: {reasons[newest]}; use another --workdir"
            )
        return None

    def _unreadable(self, step: int, error: Exception) -> OSError:
        return OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"the checkpoint of step {step} cannot be read now ({first_line(error)}); it "
            "stays as it is, and the same command tries again",
            str(self._directory),
        )

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


def _worst_of_all(found: int) -> int:
    """The worst that any process of the job has found; all must take the same step."""
    if jax.process_count() == 1:
        return found
    return int(np.max(multihost_utils.process_allgather(np.asarray(found))))
