"""How well scores find the images of each class, where an image may show several."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from supcon_jax.evaluation.knn import CELLS, neighbours


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Mean over the relevant examples of the precision at each one's score.

    `AP = sum_k (R_k - R_(k-1)) P_k` over the different scores from the largest on, with
    precision P and recall R of the examples that have at least that score; examples of one
    score come together.

    Args:
      scores: `[n]`, larger for what is likelier relevant.
      relevant: `[n]` booleans.

    Returns:
      In [0, 1]; NaN where nothing is relevant.

    Source: as scikit-learn's `average_precision_score`.
    """
    order = np.argsort(-scores, kind="stable")
    scores, relevant = scores[order], relevant[order]
    last = np.append(scores[1:] != scores[:-1], True)  # of those with one score
    found = np.cumsum(relevant)[last]
    if not len(found) or not found[-1]:
        return float("nan")
    precision = found / (np.flatnonzero(last) + 1)
    return float(np.sum(np.diff(found, prepend=0) * precision) / found[-1])


def mean_average_precision(scores: np.ndarray, weights: np.ndarray) -> float:
    """Mean over the classes of the average precision with which scores find their images.

    Args:
      scores: `[n, C]`.
      weights: `[n, C]` of the classes in each image; above 0: it shows the class. Images
        without any have no label and are left out, and so are classes without an image.

    Returns:
      In [0, 1].

    Raises:
      ValueError: no image has a label.
    """
    labelled = np.any(weights > 0, axis=1)
    if not np.any(labelled):
        raise ValueError("no image to evaluate has a label (--config.data.eval_split)")
    scores, relevant = np.asarray(scores)[labelled], weights[labelled] > 0
    present = np.flatnonzero(np.any(relevant, axis=0))
    return float(
        np.mean([average_precision(scores[:, c], relevant[:, c]) for c in present])
    )


def multilabel_metrics(logits: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """`eval/` map, loss and num_examples of a classifier of several classes an image.

    Args:
      logits: `[n, C]`, of each class against its absence.
      weights: `[n, C]`, see `mean_average_precision`; the loss is that of
        `binary_cross_entropy_of_views`.

    Raises:
      ValueError: no image has a label.
    """
    labelled = np.any(weights > 0, axis=1)
    metrics = {"eval/map": mean_average_precision(logits, weights)}
    x, targets = np.float64(logits[labelled]), np.clip(weights[labelled], 0, 1)
    metrics["eval/loss"] = float(np.mean(np.logaddexp(0, x) - targets * x))
    return metrics | {"eval/num_examples": int(np.sum(labelled))}


def knn_mean_average_precision(
    bank: np.ndarray,
    bank_weights: np.ndarray,
    queries: np.ndarray,
    query_weights: np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> float:
    """`mean_average_precision` of the classes that the nearest neighbours show.

    The score of a class is the mean of its weights in the k nearest bank embeddings by
    cosine, each weighted with `exp(cos / temperature)`.

    Args:
      bank: `[n, D]` embeddings to compare with.
      bank_weights: `[n, C]` of the classes in each; rows of zeros are left out.
      queries: `[q, D]` embeddings to find the classes of.
      query_weights: `[q, C]`.
      k: neighbours; at most those that there are.
      temperature: of the weights.
      chunk: queries that are compared with the bank at a time.

    Returns:
      In [0, 1].

    Raises:
      ValueError: no example of the bank, or no query, has a label.

    Source: the vote of Wu et al., arXiv 1805.01978, section 3.4, for each class.
    """
    labelled = np.any(bank_weights > 0, axis=1)
    bank, bank_weights = bank[labelled], bank_weights[labelled]
    if not len(bank):
        raise ValueError(
            "kNN has no labelled images to compare with (--config.data.train_split, or "
            "no kNN: --config.knn.bank=0)"
        )
    k = min(k, len(bank))
    classes = bank_weights.shape[1]
    scores = np.zeros((len(queries), classes), np.float32)
    chunk = max(1, min(chunk, CELLS // (k * classes)))
    for part, cosines, indices in neighbours(bank, queries, k=k, chunk=chunk):
        scores[part] = _vote(cosines, bank_weights[indices], temperature)
    return mean_average_precision(scores, query_weights)


@jax.jit
def _vote(cosines: jax.Array, weights: jax.Array, temperature: jax.Array) -> jax.Array:
    """Scores `[q, C]` from cosines `[q, k]` and the neighbours' weights `[q, k, C]`."""
    shares = jax.nn.softmax(cosines / temperature, axis=1)
    return jnp.einsum("qk,qkc->qc", shares, weights, precision="highest")
