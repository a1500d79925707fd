"""Which examples a step sees: arithmetic, so that any step can be the first.

An identity is (epoch, index). Step t of a run is a function of (seed, t) alone: the same
on any number of hosts, and after a resume nothing has to be skipped or stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from supcon_jax.data.sources import PADDING

# step -> [B, 2] int32, (epoch, index)
Sampler = Callable[[int], np.ndarray]


def shuffled(num_examples: int, batch_size: int, *, seed: int) -> Sampler:
    """Every example exactly once an epoch, in an order of its own each epoch.

    Position p of the endless stream is example `order(epoch)[p % n]` of epoch `p // n`,
    and step t takes positions `t B ... (t + 1) B - 1`. Epochs follow each other without
    a gap: a batch may hold the end of one and the beginning of the next, and nothing is
    dropped.

    Args:
      num_examples: n.
      batch_size: global batch size B.
      seed: seed of the orders.

    Example:
      >>> sampler = shuffled(4, 2, seed=0)
      >>> sorted(int(i) for step in (0, 1) for i in sampler(step)[:, 1])
      [0, 1, 2, 3]
    """

    # A batch may hold the end of one epoch and the beginning of the next.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(num_examples)

    def identities(step: int) -> np.ndarray:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, offsets = np.divmod(positions, num_examples)
        index = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            index[epochs == epoch] = order(int(epoch))[offsets[epochs == epoch]]
        return np.stack([epochs, index], axis=1).astype(np.int32)

    return identities


def in_order(num_examples: int, batch_size: int) -> Sampler:
    """One pass, first to last; rows after the last example have the index `PADDING`."""

    def identities(step: int) -> np.ndarray:
        index = np.arange(step * batch_size, (step + 1) * batch_size)
        index = np.where(index < num_examples, index, PADDING)
        return np.stack([np.zeros_like(index), index], axis=1).astype(np.int32)

    return identities


def class_balanced(
    labels: np.ndarray,
    num_classes: int,
    batch_size: int,
    *,
    classes: int,
    seed: int,
) -> Sampler:
    """P different classes a step and K = B / P examples of each.

    The classes come in rounds: a round is a permutation of all of them cut into
    `C // P` steps (the C mod P classes at its end are left out of this round). A class goes
    through its own n_c examples likewise: a pass is a permutation of them cut into
    `n_c // K` rounds. So no batch holds an example twice, unless a class has fewer than
    K; small classes are repeated more often than large ones, and the epoch of an
    identity is the class's own.

    Args:
      labels: `[n]`, all known.
      num_classes: C.
      batch_size: global batch size B.
      classes: P.
      seed: seed of the orders.

    Raises:
      ValueError: B is not a multiple of P, or fewer than P classes have examples.
    """
    members = [np.flatnonzero(labels == label) for label in range(num_classes)]
    present = np.asarray([label for label in range(num_classes) if len(members[label])])
    if batch_size % classes:
        raise ValueError(
            f"data.classes_per_batch={classes} does not divide the batch size "
            f"{batch_size} (--config.data.classes_per_batch, --config.batch_size)"
        )
    if classes > len(present):
        raise ValueError(
            f"data.classes_per_batch={classes} but only {len(present)} classes have "
            "training images (--config.data.classes_per_batch)"
        )
    per_class, steps_a_round = batch_size // classes, len(present) // classes

    def of_class(label: int, round_number: int) -> np.ndarray:
        rows, stream_seed = members[label], _mix(seed, 1 + label)
        whole = len(rows) // per_class * per_class
        if not whole:
            ids = shuffled(len(rows), per_class, seed=stream_seed)(round_number)
            ids[:, 1] = rows[ids[:, 1]]
            return ids
        epoch, start = divmod(round_number * per_class, whole)
        order = np.random.default_rng((stream_seed, epoch)).permutation(rows)
        index = order[start : start + per_class]
        return np.stack([np.full_like(index, epoch), index], 1).astype(np.int32)

    def identities(step: int) -> np.ndarray:
        round_number, part = divmod(step, steps_a_round)
        order = np.random.default_rng((seed, 0, round_number)).permutation(present)
        chosen = order[part * classes : (part + 1) * classes]
        ids = np.concatenate([of_class(int(label), round_number) for label in chosen])
        # Mixed, so that every part of the batch (the rows of a device or a microbatch)
        # holds several classes.
        return np.random.default_rng((seed, 1, step)).permutation(ids)

    return identities


def _mix(seed: int, number: int) -> int:
    """A seed for one of many streams."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
