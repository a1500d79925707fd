"""Whether a run is well: what is looked at, and the rule by which a state is saved."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any
# Parameters below it may grow as they like: a classifier that begins with zeros does.
SMALL = 0.1


class Health(NamedTuple):
    """What is measured of a state.

    Attributes:
      loss: of the last step that led to it.
      norm: of all parameters together.
      finite: whether all parameters and statistics are numbers.
      small: the norm of as many parameters that are all `SMALL`.
    """

    loss: float
    norm: float
    finite: bool = True
    small: float = 0.0


@jax.jit
def _look(params: PyTree, batch_stats: PyTree) -> tuple[jax.Array, jax.Array]:
    leaves = jax.tree.leaves(params)
    square = sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves)
    everything = [*leaves, *jax.tree.leaves(batch_stats)]
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in everything]))
    return jnp.sqrt(square), finite


def measure(params: PyTree, batch_stats: PyTree, loss: float) -> Health:
    """The health of a state; waits for the device."""
    norm, finite = jax.device_get(_look(params, batch_stats))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Health(loss, float(norm), bool(finite), SMALL * math.sqrt(count))


def judge(
    now: Health, before: Health, *, loss_rise: float, norm_growth: float
) -> str | None:
    """Why a state should not be saved, or None where it should.

    It must be finite, its loss L must not be far above the loss L0 at the last save,
    `L <= L0 + loss_rise max(1, |L0|)`, and the norm of its parameters must not have
    exploded, `P <= norm_growth max(P0, S)`, with S that of small parameters.

    Args:
      now: of the state.
      before: of the last state that was saved, or of the first.
      loss_rise, norm_growth: of the rule; 0 leaves that part out.

    Example:
      >>> judge(Health(2.0, 30.0), Health(1.5, 20.0), loss_rise=3.0, norm_growth=10.0)
      >>> judge(Health(9.0, 30.0), Health(1.5, 20.0), loss_rise=3.0, norm_growth=10.0)
      'the loss is 9, it was 1.5'
    """
    if not now.finite:
        return "parameters are not finite"
    if loss_rise and not now.loss <= before.loss + loss_rise * max(1, abs(before.loss)):
        return f"the loss is {now.loss:.4g}, it was {before.loss:.4g}"
    if norm_growth and not now.norm <= norm_growth * max(before.norm, now.small):
        return f"the parameters' norm is {now.norm:.3g}, it was {before.norm:.3g}"
    return None
