"""Multinomial logistic regression on fixed features: a classifier with nothing to tune.

    mean_i -log softmax(x_i W + b)[y_i] + l2 / 2 |W|^2

The problem is convex, so it has one solution and no learning rate: L-BFGS finds it. What
is left to choose, the weight `l2` of the regularisation, is chosen on examples that the
solution has not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from supcon_jax.losses.cross_entropy import cross_entropy_loss

# From a classifier that hardly moves to one that is hardly held, two values a decade.
GRID = tuple(float(10.0 ** (power / 2)) for power in range(2, -13, -1))
# Where most examples are the only ones of their class, so that few can be held out.
FALLBACK_L2 = 1e-2
# Up to this many examples each is held out once, in `FOLDS` solutions for a value of l2;
# with more, a `FOLDS`-th of them is enough to tell the values apart.
FOLDS, CROSS_VALIDATED = 5, 10_000
# Values of l2 in a row that are worse than the best before the grid is left.
PATIENCE = 4

Params = dict[str, jax.Array | np.ndarray]


class Solution(NamedTuple):
    """A linear classifier of features `[n, D]` as they were given.

    Attributes:
      kernel: W, `[D, C]`.
      bias: b, `[C]`.
      l2: the weight of the regularisation, for features of unit variance.
      validation_loss: mean cross-entropy of the examples held out, by l2; empty where
        none could be.
      iterations: of L-BFGS, in the last fit.
    """

    kernel: np.ndarray
    bias: np.ndarray
    l2: float
    validation_loss: dict[float, float]
    iterations: int


def fit_classifier(
    features: jax.Array,
    labels: np.ndarray,
    *,
    num_classes: int,
    label_smoothing: float = 0.0,
    grid: tuple[float, ...] = GRID,
    seed: int = 0,
    on_fit: Callable[[float], None] = lambda l2: None,
) -> Solution:
    """Chooses l2 on held-out examples, then fits all of them.

    Inside, features are centred and divided by one number, so that l2 means the same
    whatever their size; what is returned takes them as they are. Each feature divided by
    a deviation of its own is worse with few examples, see docs/evaluation.md.

    Args:
      features: `[m, D]`, m >= n, on any devices; rows from n on are padding.
      labels: `[n]` integers in `[0, C)`; examples with one below 0 are left out.
      num_classes: C.
      label_smoothing: see `cross_entropy_loss`.
      grid: values of l2, falling.
      seed: of what is held out.
      on_fit: called with each l2 before it is fitted.

    Raises:
      ValueError: no example has a label.

    Example:
      found = fit_classifier(jnp.asarray(features), labels, num_classes=10)
      logits = features @ found.kernel + found.bias
    """
    labels = np.pad(labels, (0, len(features) - len(labels)), constant_values=-1)
    if not np.any(labels >= 0):
        raise ValueError("no training image has a label (--config.data.train_split)")
    mean, scale = moments(features, np.float32(labels >= 0))
    data = (features - mean) / scale, np.maximum(labels, 0)
    options = {"label_smoothing": label_smoothing}
    zeros = _zeros(features, num_classes)
    folds = assign_folds(labels, FOLDS, seed=seed)
    l2, start = FALLBACK_L2, zeros
    losses: dict[float, float] = {}
    if 2 * np.sum(folds >= 0) >= np.sum(labels >= 0):
        held_out = range(FOLDS if np.sum(labels >= 0) <= CROSS_VALIDATED else 1)
        l2, start, losses = _choose(
            zeros, data, labels, folds, held_out, grid, on_fit, options
        )
    on_fit(l2)
    known = np.float32(labels >= 0)
    params, iterations = solve(
        start, *data, known, np.float32(l2), tolerance=1e-7, **options
    )
    kernel = params["kernel"] / scale
    return Solution(
        kernel=np.asarray(kernel),
        bias=np.asarray(params["bias"] - mean @ kernel),
        l2=l2,
        validation_loss=losses,
        iterations=int(iterations),
    )


def _zeros(features: jax.Array, num_classes: int) -> Params:
    """Where L-BFGS begins, on all devices of the features."""
    zeros: Params = {
        "kernel": np.zeros((features.shape[1], num_classes), np.float32),
        "bias": np.zeros(num_classes, np.float32),
    }
    if isinstance(features.sharding, NamedSharding):
        whole = NamedSharding(features.sharding.mesh, PartitionSpec())
        return jax.device_put(zeros, whole)
    return zeros


def assign_folds(labels: np.ndarray, folds: int, *, seed: int) -> np.ndarray:
    """Part of each example `[n]`: each class is spread over all of 0 ... folds - 1.

    -1 where an example is never held out: the only one of its class, or without a label.
    """
    rng = np.random.default_rng(seed)
    found = np.full(len(labels), -1)
    for label in np.unique(labels[labels >= 0]):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) > 1:
            # Small classes begin at different parts, or the first would have them all.
            found[members] = (np.arange(len(members)) + label) % folds
    return found


def _choose(
    zeros: Params,
    data: tuple[jax.Array, jax.Array],
    labels: np.ndarray,
    folds: np.ndarray,
    held_out: range,
    grid: tuple[float, ...],
    on_fit: Callable[[float], None],
    options: dict[str, float],
) -> tuple[float, Params, dict[float, float]]:
    """The l2 with the least loss of what is held out, its parameters, all losses."""
    params = dict.fromkeys(held_out, zeros)
    losses: dict[float, float] = {}
    best, start = grid[0], zeros
    for number, l2 in enumerate(grid):
        on_fit(l2)
        total = 0.0
        for fold in held_out:
            known = np.float32((labels >= 0) & (folds != fold))
            # From the solution of the value before, which is near.
            params[fold], _ = solve(
                params[fold], *data, known, np.float32(l2), tolerance=1e-5, **options
            )
            total += float(_loss(params[fold], *data, np.float32(folds == fold)))
        losses[l2] = total / int(np.sum(np.isin(folds, held_out)))
        if losses[l2] <= losses[best]:
            best, start = l2, params[held_out[0]]
        if number - grid.index(best) >= PATIENCE:
            break
    return best, start, losses


@jax.jit
def moments(features: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted mean `[D]`, and the root of the mean variance of a feature."""
    weights = weights / jnp.sum(weights)
    mean = jnp.matmul(weights, features, precision="highest")
    variance = jnp.matmul(weights, jnp.square(features - mean), precision="highest")
    # Equal features, of a collapsed encoder, stay as they are.
    scale = jnp.sqrt(jnp.mean(variance))
    return mean, jnp.where(scale > 0, scale, 1.0)


@functools.partial(jax.jit, static_argnames=("max_iterations", "label_smoothing"))
def solve(
    start: Params,
    features: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    l2: jax.Array,
    *,
    tolerance: float,
    max_iterations: int = 1000,
    label_smoothing: float = 0.0,
) -> tuple[Params, jax.Array]:
    """The least of the module's loss, examples weighted, by L-BFGS.

    It ends where the largest element of the gradient is at most `tolerance`, or where
    that has not become smaller for 50 iterations: float32 has no more.

    Args:
      start: {"kernel": `[D, C]`, "bias": `[C]`} to begin at.
      features, labels: `[n, D]` and `[n]`.
      weights: `[n]`, 0 for examples that are left out.
      l2: scalar.
      tolerance, max_iterations: see above.
      label_smoothing: see `cross_entropy_loss`.

    Returns:
      Parameters like `start`, and iterations.

    Source: Liu and Nocedal 1989, On the limited memory BFGS method.
    """

    def objective(params: Params) -> jax.Array:
        loss = _loss(params, features, labels, weights, label_smoothing)
        return loss / jnp.sum(weights) + 0.5 * l2 * jnp.sum(params["kernel"] ** 2)

    optimizer = optax.lbfgs()
    value_and_gradient = optax.value_and_grad_from_state(objective)

    def iterate(carry: tuple) -> tuple:
        params, state, best, least, count, since = carry
        value, gradient = value_and_gradient(params, state=state)
        updates, state = optimizer.update(
            gradient, state, params, value=value, grad=gradient, value_fn=objective
        )
        params = optax.apply_updates(params, updates)
        largest = optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)
        smaller = largest < least
        best = jax.tree.map(lambda new, old: jnp.where(smaller, new, old), params, best)
        least = jnp.minimum(largest, least)
        return params, state, best, least, count + 1, jnp.where(smaller, 0, since + 1)

    def goes_on(carry: tuple) -> jax.Array:
        *_, least, count, since = carry
        return (least > tolerance) & (count < max_iterations) & (since < 50)

    carry = start, optimizer.init(start), start, jnp.inf, jnp.int32(0), 0
    _, _, best, _, count, _ = jax.lax.while_loop(goes_on, iterate, carry)
    return best, count


@functools.partial(jax.jit, static_argnames="label_smoothing")
def _loss(
    params: Params,
    features: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Weighted sum of the examples' cross-entropy."""
    logits = jnp.matmul(features, params["kernel"], precision="highest")
    losses = cross_entropy_loss(
        logits + params["bias"], labels, label_smoothing=label_smoothing
    )
    return jnp.sum(weights * losses)
