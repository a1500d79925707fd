"""Checkpoints of a run. The only file that knows Orbax.

A step holds these items: "encoder" (its parameters and batch statistics, all that linear
evaluation and users need), "encoder_average" (the same of the average, where the run has
one) and "training" (everything else of the TrainState).
"""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding, SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
)

from supcon_jax.metrics import BEST_METRIC
from supcon_jax.steps.state import TrainState

PyTree = Any
ITEMS = ("encoder", "encoder_average", "training")


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
    `metrics.BEST_METRIC`.
    """

    def __init__(self, workdir: str | pathlib.Path, *, keep: int = 2):
        policy = AnyPreservationPolicy(
            [
                LatestN(keep),
                BestN(
                    get_metric_fn=lambda metrics: metrics[BEST_METRIC],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            checkpoint_dir(workdir),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, create=True, cleanup_tmp_directories=True
            ),
        )

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, metrics: dict[str, float]) -> None:
        """Starts to save; returns once the device's arrays have been copied."""
        known = {BEST_METRIC: metrics[BEST_METRIC]} if BEST_METRIC in metrics else None
        items = {
            name: ocp.args.StandardSave(tree) for name, tree in _split(state).items()
        }
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=known)

    def restore(self, abstract_state: TrainState, step: int) -> TrainState:
        """Restores a step into the shapes and shardings of `abstract_state`."""
        items = {
            name: ocp.args.StandardRestore(tree)
            for name, tree in _split(abstract_state).items()
        }
        return _join(self._manager.restore(step, args=ocp.args.Composite(**items)))

    def wait(self) -> None:
        """Returns when the last save is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and lets go of the folder."""
        self._manager.close()


def checkpoint_dir(workdir: str | pathlib.Path) -> pathlib.Path:
    """Where a workdir keeps its checkpoints (absolute, as Orbax wants it)."""
    return pathlib.Path(workdir).expanduser().absolute() / "checkpoints"


def saved_steps(workdir: str | pathlib.Path) -> list[int]:
    """The steps of a workdir's complete checkpoints, oldest first."""
    directory = checkpoint_dir(workdir)
    names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
    # A save under way has a longer name until it is whole.
    return sorted(int(name) for name in names if name.isdigit())


def digest(tree: PyTree) -> str:
    """A digest of the names, types, shapes and bytes of a tree of arrays."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).data)
    return f"sha256:{sha.hexdigest()}"


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
      `{"params": ..., "batch_stats": ...}`.

    Raises:
      ValueError: no pretraining run or no checkpoint there.

    Example:
      variables = restore_encoder("runs/digits")
      encoder = create_encoder("resnet8", stem="cifar")
      embeddings = encoder.apply(variables, images, train=False)
    """
    directory = checkpoint_dir(workdir)
    if not directory.is_dir():
        raise ValueError(f"no checkpoints in {workdir}: it is not a run's workdir")
    # Handlers named here, or Orbax warns about every item that it is not asked for.
    handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
    options = ocp.CheckpointManagerOptions(create=False, save_interval_steps=0)
    with ocp.CheckpointManager(
        directory, options=options, item_handlers=handlers
    ) as manager:
        step = manager.latest_step() if step is None else step
        if step is None or step not in manager.all_steps():
            wanted = "complete checkpoint" if step is None else f"checkpoint {step}"
            raise ValueError(f"no {wanted} in {directory}; has the run saved one yet?")
        if not (directory / str(step) / "encoder").is_dir():
            raise ValueError(
                f"the run in {workdir} saved no encoder; linear evaluation keeps only "
                "its head: name the workdir of the pretraining run"
            )
        item = "encoder_average" if average else "encoder"
        if not (directory / str(step) / item).is_dir():
            raise ValueError(
                f"the run in {workdir} kept no average of its encoder "
                "(--config.encoder_average.use=False, or pretrain with "
                "--config.encoder_average.decay=0.999)"
            )
        metadata = manager.item_metadata(step)[item]
        sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            metadata,
        )
        restored = manager.restore(
            step,
            args=ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)}),
        )
    return restored[item]
