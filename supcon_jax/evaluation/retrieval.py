"""Retrieval: whether the nearest embeddings have the query's class."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from supcon_jax.models.heads import l2_normalize


class Retrieval(NamedTuple):
    """Means over the queries that have at least one reference of their class.

    With R references of a query's class, and its references in order of cosine:

    Attributes:
      recall: k -> share of queries with one of their class among the nearest k.
      r_precision: share of their class among the nearest R.
      map_at_r: `1/R sum_{i <= R} P(i) [i-th is of the class]`, P(i) the precision at i.
      num_queries: queries that count.
    """

    recall: dict[int, float]
    r_precision: float
    map_at_r: float
    num_queries: int


def retrieval(
    queries: np.ndarray,
    query_labels: np.ndarray,
    references: np.ndarray | None = None,
    reference_labels: np.ndarray | None = None,
    *,
    ks: tuple[int, ...] = (1, 2, 4, 8),
    chunk: int = 1024,
) -> Retrieval:
    """Retrieval of references for queries, or within one set.

    Args:
      queries: `[q, D]` embeddings, compared by cosine.
      query_labels: `[q]` integers; examples with one below 0 have none and are left out.
      references, reference_labels: `[n, D]` and `[n]`; None: the queries, each without
        itself.
      ks: of recall at k.
      chunk: queries that are compared at a time: memory is `chunk x n`.

    Raises:
      ValueError: no query has a reference of its class.

    Example:
      >>> import numpy as np
      >>> pairs = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
      >>> retrieval(pairs, np.array([0, 0, 1, 1])).map_at_r
      1.0

    Source: Musgrave et al., A Metric Learning Reality Check, arXiv 2003.08505, sections
    2.3 and 3.1.
    """
    within = references is None
    if references is None or reference_labels is None:
        references, reference_labels = queries, query_labels
    queries, query_labels = _labelled(queries, query_labels)
    references, reference_labels = _labelled(references, reference_labels)
    classes, counts = np.unique(reference_labels, return_counts=True)
    of_class = dict(zip(classes.tolist(), counts.tolist(), strict=True))
    totals = np.array([of_class.get(c, 0) - within for c in query_labels.tolist()])
    rows = np.flatnonzero(totals > 0)
    if not len(rows):
        raise ValueError("no query has another example of its class to retrieve")
    depth = min(max(int(totals.max()), *ks), len(references) - within)
    bank = l2_normalize(jnp.asarray(references, jnp.float32))
    hits = []
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        cosine = jnp.matmul(
            l2_normalize(jnp.asarray(queries[part], jnp.float32)),
            bank.T,
            precision=jax.lax.Precision.HIGHEST,
        )
        if within:
            cosine = cosine.at[jnp.arange(len(part)), part].set(-jnp.inf)
        _, nearest = jax.lax.top_k(cosine, depth)
        found = reference_labels[np.asarray(nearest)]
        hits.append(found == query_labels[part][:, None])
    hit, total = np.concatenate(hits), totals[rows]
    rank = np.arange(1, depth + 1)
    up_to_r = hit * (rank <= total[:, None])
    precision = np.cumsum(hit, axis=1) / rank
    return Retrieval(
        recall={k: float(np.mean(hit[:, :k].any(axis=1))) for k in ks},
        r_precision=float(np.mean(up_to_r.sum(axis=1) / total)),
        map_at_r=float(np.mean((precision * up_to_r).sum(axis=1) / total)),
        num_queries=len(rows),
    )


def _labelled(
    embeddings: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    embeddings, labels = np.asarray(embeddings), np.asarray(labels)
    return embeddings[labels >= 0], labels[labels >= 0]
