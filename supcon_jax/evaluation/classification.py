"""Top-k accuracy and loss over a split, every example counted once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from supcon_jax.losses.cross_entropy import cross_entropy_loss


def classification_sums(
    logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    """Sums over one batch: hits at 1 and 5, cross-entropy, labelled examples; by class.

    An example is a hit at k when fewer than k classes have a logit above its label's;
    equal logits share the place, each of n classes tied for it counting 1/n of a hit.

    Args:
      logits: `[B, C]`.
      labels: `[B]` integers; an example with one below 0 has none and does not count.
      mask: `[B]`, 1 for examples and 0 for padding.

    Returns:
      Scalars "top1", "top5", "loss" and "num_examples", and `[C]` "class_hits" (at 1) and
      "class_examples".
    """
    mask = jnp.where(labels >= 0, mask, 0)
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    # The label's own logit is not compared with itself: a compiler that computes it twice may
    # round it in two ways.
    others = jnp.arange(logits.shape[-1]) != labels[:, None]
    # Not `logits > own`: logits that are not numbers must count as misses.
    above = jnp.sum(others & ~(logits <= own), axis=-1)
    above = jnp.where(jnp.isnan(own[:, 0]), logits.shape[-1], above)
    tied = 1 + jnp.sum(others & (logits == own), axis=-1)
    top1, top5 = (mask * jnp.clip((k - above) / tied, 0, 1) for k in (1, 5))
    losses = jnp.where(mask > 0, cross_entropy_loss(logits, labels), 0.0)
    none = jnp.zeros(logits.shape[-1])
    return {
        "top1": jnp.sum(top1),
        "top5": jnp.sum(top5),
        "loss": jnp.sum(losses),
        "num_examples": jnp.sum(mask),
        # What has no label adds 0, to whatever class.
        "class_hits": none.at[labels].add(top1),
        "class_examples": none.at[labels].add(mask),
    }


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How often an example of class i was taken for class j, `[C, C]` counts."""
    count = logits.shape[1]
    predicted = np.argmax(logits, axis=1)
    cells = np.bincount(np.asarray(labels) * count + predicted, minlength=count * count)
    return cells.reshape(count, count)


def class_accuracies(matrix: np.ndarray) -> np.ndarray:
    """Share of each class that was recognised, `[C]`; NaN where it has no example."""
    with np.errstate(invalid="ignore"):
        return np.diag(matrix) / matrix.sum(axis=1)


def summarize(sums: Iterable[dict[str, jax.Array]]) -> dict[str, float]:
    """Means over a split from the sums of its batches, as `eval/*` metrics.

    `eval/mean_class_accuracy` is the mean over the classes that have an example.

    Raises:
      ValueError: no example has a label and could be read.
    """
    total: dict[str, Any] = {}
    for batch in sums:
        for name, value in batch.items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
    count = float(total.pop("num_examples", 0.0))
    if not count:
        raise ValueError(
            "no image of the evaluation split has a label (--config.data.eval_split)"
        )
    by_class = [total.pop(name, None) for name in ("class_hits", "class_examples")]
    means = {f"eval/{name}": float(value) / count for name, value in total.items()}
    if by_class[0] is not None:
        hits, examples = (values[by_class[1] > 0] for values in by_class)
        means["eval/mean_class_accuracy"] = float(np.mean(hits / examples))
    return means | {"eval/num_examples": round(count)}
