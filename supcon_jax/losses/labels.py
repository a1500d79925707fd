"""What labels say of two images: whether they are positives, and how much so."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike


def check_labels(labels: ArrayLike, num_images: int) -> tuple[jax.Array, bool]:
    """Labels as an array, and whether every image has one whatever the number's sign.

    Args:
      labels: `[B]` integers, or `[B, C]` weights of the classes in each image.
      num_images: B.

    Returns:
      Signed integers `[B]`, or weights `[B, C]` of the type they had.

    Raises:
      ValueError: another shape or type; where the values are known, a weight that is
        negative or not finite, or a row without a weight above 0.
    """
    concrete = not isinstance(labels, jax.Array)
    found: Any = np.asarray(labels) if concrete else labels
    fits = found.ndim in (1, 2) and found.shape[0] == num_images
    if not fits or found.shape[1:] in ((0,), (1,)):
        raise ValueError(
            f"labels must be [B] = {(num_images,)}, one an image, or [B, C], weights of "
            f"at least two classes; got shape {found.shape}."
        )
    if found.ndim == 2:
        return _checked_weights(found), True
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(f"labels must be integers; got {found.dtype}.")
    if concrete:
        found = jnp.asarray(_narrowed(found))
    unsigned = bool(jnp.issubdtype(found.dtype, jnp.unsignedinteger))
    if unsigned and found.dtype.itemsize >= 4:
        # The same bits as a signed number: distinct labels stay distinct.
        signed = jnp.int32 if found.dtype.itemsize == 4 else jnp.int64
        return lax.bitcast_convert_type(found, signed), True
    if found.dtype.itemsize < 4:
        found = found.astype(jnp.int32)
    return found, unsigned


def _narrowed(labels: np.ndarray) -> np.ndarray:
    """Labels as int32; ids that do not fit are numbered, and those below 0 are -1.

    Only JAX's own 64-bit mode keeps wider integers: it would cut ids off otherwise, and
    two classes would become one.
    """
    limits = np.iinfo(np.int32)
    if limits.min <= labels.min() and labels.max() <= limits.max:
        return labels.astype(np.int32)
    _, numbers = np.unique(labels, return_inverse=True)
    return np.where(labels < 0, -1, numbers).astype(np.int32)


def _checked_weights(weights: Any) -> jax.Array:
    """Rows of weights; refused where their values are known and make no sense."""
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(weights.dtype, kind) for kind in kinds):
        raise ValueError(f"labels [B, C] must be numbers; got {weights.dtype}.")
    traced = isinstance(weights, jax.core.Tracer)
    if not traced and getattr(weights, "is_fully_addressable", True):
        # What bfloat16 holds, float64 holds too, and NumPy knows its infinities.
        values = np.asarray(weights).astype(np.float64)
        wrong = ~((values >= 0) & np.isfinite(values))
        for row, column in np.argwhere(wrong)[:1]:
            raise ValueError(
                f"labels {values.shape} are weights of classes and must be finite and at "
                f"least 0; got {values[row, column]:g} for class {column} in row {row}."
            )
        for row in np.flatnonzero(~np.any(values > 0, axis=1))[:1]:
            raise ValueError(
                f"labels {values.shape} are weights of classes, and row {row} has none "
                f"above 0: leave that image out; one class an image is "
                f"{values.shape[:1]} integers."
            )
    return jnp.asarray(weights)


def prepare_weights(similarity: str, weights: jax.Array, dtype: Any) -> jax.Array:
    """Rows of weights in the form in which `pair_weights` takes them.

    What is negative or no finite number counts as 0. A row that is empty then is similar
    to none.
    """
    weights = lax.stop_gradient(weights.astype(dtype))
    valid = (weights > 0) & (weights < jnp.inf)
    if similarity == "any":
        return valid.astype(dtype)
    weights = jnp.where(valid, weights, 0)
    if similarity == "jaccard":
        return weights
    # Scaled twice: the squares of small or large weights leave the range of float32.
    largest = jnp.max(weights, axis=1, keepdims=True)
    fits = fit_factor(largest)
    weights, largest = weights * fits, largest * fits
    weights /= jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(weights**2, axis=1, keepdims=True))
    return weights / jnp.where(norm > 0, norm, 1)


def fit_factor(largest: jax.Array) -> jax.Array:
    """A power of two for each row, 1 for most, after which one may divide by `largest`.

    Compilers multiply by the reciprocal, which is too small to be a normal number where
    `largest` is huge, and 0 then.
    """
    return jnp.where(largest > 2.0**64, 2.0**-64, 1).astype(largest.dtype)


def pair_weights(similarity: str, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """How much each row of labels is a positive of each column: 0 to 1.

    `any`: 1 if some class is in both. `jaccard`: sum_c min(y_ic, y_jc) over
    sum_c max(y_ic, y_jc). `inner`: y_i . y_j / (|y_i| |y_j|).

    Args:
      similarity: which of them.
      rows, columns: `[n, C]` and `[m, C]`, from `prepare_weights`.

    Returns:
      `[n, m]`.
    """
    if similarity == "jaccard":
        shared = _sum_of_minima(rows, columns)
        # min + max of two numbers is their sum.
        union = jnp.sum(rows, axis=1)[:, None] + jnp.sum(columns, axis=1)[None, :]
        union -= shared
        return jnp.where(shared > 0, shared / jnp.where(union > 0, union, 1), 0)
    inner = jnp.matmul(rows, columns.T, precision=lax.Precision.HIGHEST)
    return (inner > 0).astype(inner.dtype) if similarity == "any" else inner


def _sum_of_minima(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Class by class, so that nothing larger than the result `[n, m]` is held."""

    def add(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        row, column = pair
        return total + jnp.minimum(row[:, None], column[None, :]), None

    # Zeros of the inputs' own kind: on a mesh they vary over its axes as those do.
    start = 0 * (rows[:, :1] + columns[:, :1].T)
    return lax.scan(add, start, (rows.T, columns.T))[0]
