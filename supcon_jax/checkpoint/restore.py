"""Reads what another run has saved, which is left as it is."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding, SingleDeviceSharding

from supcon_jax import storage
from supcon_jax.checkpoint.items import (
    ITEMS,
    RECORD,
    PyTree,
    checkpoint_dir,
    first_line,
    is_damage,
    join,
    read_step,
    split,
)
from supcon_jax.steps.state import TrainState

logger = logging.getLogger(__name__)


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
            abstract = split(abstract_state)
        else:
            there = [n for n in ITEMS if storage.is_dir(directory / str(at) / n)]
            abstract = _abstract_items(manager, at, there, sharding)
        return join(read_step(manager, directory, at, abstract)[0])

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
                if not is_damage(error):  # an older step would be another result
                    raise
                reasons[candidate] = first_line(error)
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
    return read_step(manager, directory, step, abstract)[0][item]


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
