"""How embeddings lie: alignment, uniformity, and the geometry of the class means."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class ClassGeometry(NamedTuple):
    """The spread of classes; with neural collapse the first two go to 0, the third too.

    Attributes:
      within_between: `tr(S_W) / tr(S_B)`, the variance within the classes over that
        between their means.
      simplex_distance: mean distance of the cosines of the centred class means from
        those of a simplex, `-1 / (C - 1)`.
      norm_spread: deviation over mean of the lengths of the centred class means.
    """

    within_between: float
    simplex_distance: float
    norm_spread: float


def alignment(embeddings: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of two different examples of one class, on the unit sphere.

    `mean of |x - y|^2` over all ordered pairs of one class; 0 where each class is a point.

    Args:
      embeddings: `[n, D]`; scaled to unit length here.
      labels: `[n]`; examples with a label below 0 have none and are left out.

    Source: Wang and Isola, arXiv 2005.10242, Equation 1 with alpha = 2, for classes.
    """
    x, labels = _unit(embeddings)[labels >= 0], labels[labels >= 0]
    total, pairs = 0.0, 0
    for c in np.unique(labels):
        members = x[labels == c]
        count = len(members)
        # sum over pairs of |x - y|^2 = 2 n sum |x|^2 - 2 |sum x|^2, and |x| = 1.
        total += 2.0 * count * count - 2.0 * float(np.sum(members.sum(axis=0) ** 2))
        pairs += count * (count - 1)
    return total / pairs if pairs else float("nan")


def uniformity(embeddings: np.ndarray, *, chunk: int = 1024) -> float:
    """`log mean exp(-2 |x - y|^2)` over all pairs of different examples, unit length.

    0 where all embeddings are equal, and the lower the more evenly they are spread.

    Source: Wang and Isola, arXiv 2005.10242, Equation 2 with t = 2.
    """
    x = jnp.asarray(_unit(embeddings), jnp.float32)
    total = sum(
        float(np.asarray(_closeness(x[start : start + chunk], x), np.float64).sum())
        for start in range(0, len(x), chunk)
    )
    pairs = len(x) * (len(x) - 1)
    return float(np.log((total - len(x)) / pairs))


@jax.jit
def _closeness(rows: jax.Array, x: jax.Array) -> jax.Array:
    """Sum of `exp(-2 |row - x|^2)` over all x, for each row; unit length."""
    cosine = jnp.matmul(rows, x.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.exp(-4.0 * (1.0 - cosine)), axis=1)


def class_geometry(embeddings: np.ndarray, labels: np.ndarray) -> ClassGeometry:
    """Variance within against between classes, and how near the means are to a simplex.

    Args:
      embeddings: `[n, D]`.
      labels: `[n]`; examples with a label below 0 have none and are left out.

    Raises:
      ValueError: fewer than two classes.

    Source: Papyan et al., arXiv 2008.08186, section 2, with traces instead of
    `tr(S_W S_B^+)`, which needs more examples than dimensions.
    """
    labels = np.asarray(labels)
    x = np.asarray(embeddings, np.float64)[labels >= 0]
    classes, place = np.unique(labels[labels >= 0], return_inverse=True)
    if len(classes) < 2:
        raise ValueError("the geometry of classes needs two of them or more")
    counts = np.bincount(place)
    means = np.zeros((len(classes), x.shape[1]))
    np.add.at(means, place, x)
    means /= counts[:, None]
    centred = means - means.mean(axis=0)
    within = np.sum((x - means[place]) ** 2) / len(x)
    between = np.sum(centred**2) / len(classes)
    lengths = np.linalg.norm(centred, axis=1)
    unit = centred / np.maximum(lengths, 1e-12)[:, None]
    cosine = (unit @ unit.T)[~np.eye(len(classes), dtype=bool)]
    return ClassGeometry(
        within_between=float(within / between) if between else float("inf"),
        simplex_distance=float(np.mean(np.abs(cosine + 1.0 / (len(classes) - 1)))),
        norm_spread=float(lengths.std() / lengths.mean()) if between else 0.0,
    )


def _unit(embeddings: np.ndarray) -> np.ndarray:
    x = np.asarray(embeddings, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
