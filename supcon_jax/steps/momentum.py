"""Averages over the steps, and the queue of a momentum encoder's keys.

They are parts of the TrainState. The encoder of the keys is an average of the trained one over the steps (MoCo). Its keys
of earlier steps stay in a queue with their labels, so that few images a step are compared
with many. The queue is replicated; the newest keys come first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supcon_jax.losses.momentum_contrast import EMPTY

PyTree = Any
# The group of an unlabelled image's key in later steps, in which no anchor has it.
NO_MATCH = np.iinfo(np.int32).min + 1


def init_momentum(params: PyTree, *, queue_size: int, output_dim: int) -> PyTree:
    """The state of step 0: the average equals the parameters, the queue is empty.

    Args:
      params: of encoder and projection head.
      queue_size: number K of keys; 0: only those of the step at hand.
      output_dim: dimension D of a key.

    Returns:
      `{"average": like params, "queue": {"keys": [K, D], "groups": [K]}}`.
    """
    queue = {
        "keys": jnp.zeros((queue_size, output_dim)),
        "groups": jnp.full((queue_size,), EMPTY, jnp.int32),
    }
    # Copied: a step gives its state's memory away, each array once.
    return {"average": jax.tree.map(jnp.copy, params), "queue": queue}


def update_average(average: PyTree, params: PyTree, decay: float | jax.Array) -> PyTree:
    """`decay * average + (1 - decay) * params`."""
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


def update_encoder_average(
    average: PyTree, variables: PyTree, decay: float, step: jax.Array
) -> PyTree:
    """The average of the encoder for use, after a step.

    `average = d average + (1 - d) variables` with `d = min(decay, (1 + t) / (10 + t))`
    at step t = 0, 1, ...: young averages forget the random start sooner.

    Args:
      average: of parameters and batch statistics, before the step.
      variables: after the step.
      decay: of a long run.
      step: number t of the step.

    Source: the rule of TensorFlow's `tf.train.ExponentialMovingAverage(num_updates=t)`.
    """
    step = step.astype(jnp.float32)
    return update_average(
        average, variables, jnp.minimum(decay, (1 + step) / (10 + step))
    )


def enqueue(queue: PyTree, keys: jax.Array, groups: jax.Array) -> PyTree:
    """Puts keys `[n, D]` and their groups `[n]` before the others; the oldest leave.

    A queue of size 0 has no memory: it becomes the n keys.
    """
    size = len(queue["keys"]) or len(keys)
    new = {"keys": keys, "groups": groups}
    return {name: jnp.concatenate([new[name], queue[name]])[:size] for name in new}


def remember(queue: PyTree, keys: jax.Array, groups: jax.Array) -> PyTree:
    """The queue after a step: as `enqueue`, but unlabelled keys are positives no longer."""
    if not len(queue["keys"]):
        return queue
    return enqueue(queue, keys, jnp.where(groups < 0, NO_MATCH, groups))
