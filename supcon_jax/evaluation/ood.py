"""Out-of-distribution detection: whether an image is unlike those of the training."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from supcon_jax.evaluation.knn import Place, neighbours


class Detection(NamedTuple):
    """How well a score tells in-distribution examples, the positives, from others.

    Attributes:
      auroc: chance that an in-distribution example has the higher score; ties count
        half.
      fpr95: share of the others whose score is at least the largest threshold that 95 %
        of the in-distribution examples reach.
      aupr: average precision, `sum_k (R_k - R_{k-1}) P_k` over falling thresholds.
    """

    auroc: float
    fpr95: float
    aupr: float


def detection(inside: np.ndarray, outside: np.ndarray) -> Detection:
    """Compares the scores of in-distribution examples with those of others.

    Args:
      inside: `[n]`, higher for what is more like the training images.
      outside: `[m]`, of a second source of data.

    Source: Hendrycks and Gimpel, arXiv 1610.02136, section 2; FPR at 95 % TPR as in
    Liang et al., arXiv 1706.02690.
    """
    scores = np.concatenate([inside, outside]).astype(np.float64)
    is_inside = np.arange(len(scores)) < len(inside)
    order = np.argsort(-scores, kind="stable")
    scores, is_inside = scores[order], is_inside[order]
    # One threshold for each distinct score: what is tied is taken together.
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    true = np.cumsum(is_inside)[last].astype(np.float64)
    false = np.cumsum(~is_inside)[last].astype(np.float64)
    recall, fpr = true / len(inside), false / len(outside)
    steps = np.diff(np.append(0.0, recall))
    return Detection(
        auroc=float(np.trapezoid(np.append(0.0, recall), np.append(0.0, fpr))),
        fpr95=float(fpr[np.argmax(recall >= 0.95)]),
        aupr=float(np.sum(steps * true / (true + false))),
    )


def max_softmax_scores(logits: np.ndarray) -> np.ndarray:
    """The largest probability of each example, `[n]`.

    Source: Hendrycks and Gimpel, arXiv 1610.02136.
    """
    return np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)).max(axis=-1))


def default_neighbour(labels: np.ndarray) -> int:
    """50, as for CIFAR, or half of the smallest class: beyond lie images of other classes.

    Args:
      labels: `[n]` of the training images; those below 0 do not count.
    """
    counts = np.unique(labels[labels >= 0], return_counts=True)[1]
    return 50 if not len(counts) else max(1, min(50, int(counts.min()) // 2))


def knn_scores(
    bank: np.ndarray,
    queries: np.ndarray,
    *,
    k: int = 50,
    exclude: np.ndarray | None = None,
    place: Place = jnp.asarray,
    chunk: int = 1024,
) -> np.ndarray:
    """Minus the distance to the k-th nearest training embedding, of unit length, `[n]`.

    Args:
      bank: `[n, D]` training embeddings.
      queries: `[q, D]`.
      k: neighbour; at most those that there are.
      exclude: `[q]`, for each query the row of the bank that is the query itself.
      place: puts the bank on the devices, see `knn.Place`.
      chunk: most queries at a time.

    Source: Sun et al., Out-of-Distribution Detection with Deep Nearest Neighbors, arXiv
    2204.06507; k = 50 is theirs for CIFAR.
    """
    k = min(k, len(bank) - (exclude is not None))
    found = neighbours(bank, queries, k=k, exclude=exclude, place=place, chunk=chunk)
    kth = np.concatenate([cosines[:, -1] for _, cosines, _ in found])
    return -np.sqrt(np.maximum(2.0 - 2.0 * kth, 0.0))


def mahalanobis_scores(
    bank: np.ndarray, bank_labels: np.ndarray, queries: np.ndarray
) -> np.ndarray:
    """Minus the squared Mahalanobis distance to the nearest class mean, `[n]`.

    `-min_c (x - m_c)^T S^+ (x - m_c)` with the covariance S of all classes about their
    means, and its pseudo-inverse where embeddings do not fill their dimensions.

    Args:
      bank: `[n, D]` training embeddings.
      bank_labels: `[n]`; examples with a label below 0 have none and are left out.
      queries: `[q, D]`.

    Source: Lee et al., arXiv 1807.03888, Equation 2, on the last embedding.
    """
    labels = np.asarray(bank_labels)
    x = np.asarray(bank, np.float64)[labels >= 0]
    _, place = np.unique(labels[labels >= 0], return_inverse=True)
    means = np.stack([x[place == c].mean(axis=0) for c in range(place.max() + 1)])
    centred = x - means[place]
    precision = np.linalg.pinv(centred.T @ centred / len(x), hermitian=True)
    # |W^T (x - m)|^2 with precision = W W^T: no [q, C, D] array.
    values, vectors = np.linalg.eigh(precision)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    q, m = np.asarray(queries, np.float64) @ root, means @ root
    squared = np.sum(q**2, 1)[:, None] - 2.0 * q @ m.T + np.sum(m**2, 1)
    return -np.maximum(squared, 0.0).min(axis=1)
