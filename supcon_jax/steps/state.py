"""The state that a train step takes and returns."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

PyTree = Any


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step depends on besides its batch.

    Attributes:
      step: scalar int32, the number of updates made.
      params: `{"encoder": ..., "head": ...}` (linear evaluation: `{"head": ...}`).
      batch_stats: BatchNorm's running statistics, with the same keys.
      opt_state: the optimizer's state.
      momentum: momentum encoder and queue, see momentum.py; empty without them.
      encoder_average: an average of the encoder's parameters and batch statistics over
        the steps, `{"params": ..., "batch_stats": ...}`; empty without one.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    momentum: PyTree = flax.struct.field(default_factory=dict)
    encoder_average: PyTree = flax.struct.field(default_factory=dict)

    def encoder_variables(self, *, average: bool = False) -> PyTree:
        """What `encoder.apply` takes: of the last step, or of the average."""
        if average:
            return self.encoder_average
        collections = {"params": self.params, "batch_stats": self.batch_stats}
        return {name: tree["encoder"] for name, tree in collections.items()}

    def with_encoder(self, variables: PyTree) -> TrainState:
        """The same state with another encoder, and with an average that begins there.

        Args:
          variables: `{"params": ..., "batch_stats": ...}`.
        """
        average = self.encoder_average
        if average:
            # Copied: a step gives its state's memory away, each array once.
            average = jax.tree.map(jnp.copy, variables)
        return self.replace(
            params=self.params | {"encoder": variables["params"]},
            batch_stats=self.batch_stats | {"encoder": variables["batch_stats"]},
            encoder_average=average,
        )

    def projection_variables(self) -> PyTree:
        """What `EncoderWithProjection.apply` takes."""
        parts = ("encoder", "head")
        collections = {"params": self.params, "batch_stats": self.batch_stats}
        return {
            name: {part: tree[part] for part in parts if tree.get(part)}
            for name, tree in collections.items()
        }

    def apply_gradients(
        self,
        gradients: PyTree,
        *,
        optimizer: optax.GradientTransformation,
        batch_stats: PyTree,
    ) -> TrainState:
        """The state after one update with these gradients and new statistics."""
        updates, opt_state = optimizer.update(gradients, self.opt_state, self.params)
        return self.replace(
            step=self.step + 1,
            params=optax.apply_updates(self.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )


def _choose_by_element(finite: jax.Array, before: PyTree, after: PyTree) -> PyTree:
    """Fused with the update; no device waits for the decision."""
    return jax.tree.map(lambda old, new: jnp.where(finite, new, old), before, after)


def _choose_by_branch(finite: jax.Array, before: PyTree, after: PyTree) -> PyTree:
    """A CPU rounds an update differently when it is fused with a choice."""
    return jax.lax.cond(finite, lambda: after, lambda: before)


def keep_finite(
    before: TrainState, after: TrainState, metrics: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after a step, or the one before where loss or gradient is not finite.

    Decided on the device, so nobody waits; only the number of the step moves on, and
    with it the place on the schedule of the learning rate, which the optimizer counts.

    Args:
      before, after: the step.
      metrics: with "train/loss" and "optim/gradient_norm".

    Returns:
      The state to keep, and the metrics with "optim/skipped", 1 where it is `before`.
    """
    finite = jnp.isfinite(metrics["train/loss"])
    finite &= jnp.isfinite(metrics["optim/gradient_norm"])
    kept = jax.lax.platform_dependent(
        finite, before, after, cpu=_choose_by_branch, default=_choose_by_element
    )
    # Other counts are of updates that were made: Adam's corrections stay with its means.
    opt_state = jax.tree.map(
        lambda new, old: new if _counts_steps(new) else old,
        after.opt_state,
        kept.opt_state,
        is_leaf=_counts_steps,
    )
    skipped = 1.0 - finite.astype(jnp.float32)
    kept = kept.replace(step=after.step, opt_state=opt_state)
    return kept, metrics | {"optim/skipped": skipped}


def _counts_steps(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)
