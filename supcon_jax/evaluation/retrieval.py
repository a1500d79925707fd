"""Retrieval: whether the nearest embeddings have the query's class."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from supcon_jax.evaluation.knn import Place, labelled, neighbours


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
    place: Place = jnp.asarray,
    chunk: int = 1024,
) -> Retrieval:
    """Retrieval of references for queries, or within one set.

    Args:
      queries: `[q, D]` embeddings, compared by cosine.
      query_labels: `[q]` integers; examples with one below 0 have none and are left out.
      references, reference_labels: `[n, D]` and `[n]`; None: the queries, each without
        itself.
      ks: of recall at k.
      place: puts the references on the devices, see `knn.Place`.
      chunk: most queries at a time; fewer where there are many references.

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
    queries, query_labels = labelled(queries, query_labels)
    references, reference_labels = labelled(references, reference_labels)
    classes, counts = np.unique(reference_labels, return_counts=True)
    of_class = dict(zip(classes.tolist(), counts.tolist(), strict=True))
    totals = np.array([of_class.get(c, 0) - within for c in query_labels.tolist()])
    rows = np.flatnonzero(totals > 0)
    if not len(rows):
        raise ValueError("no query has another example of its class to retrieve")
    depth = min(max(int(totals.max()), *ks), len(references) - within)
    rank = np.arange(1, depth + 1)
    recalled, r_precision, map_at_r = dict.fromkeys(ks, 0), 0.0, 0.0
    for part, _, nearest in neighbours(
        references,
        queries[rows],
        k=depth,
        exclude=rows if within else None,
        place=place,
        chunk=chunk,
    ):
        hit = reference_labels[nearest] == query_labels[rows[part]][:, None]
        total = totals[rows[part]]
        up_to_r = hit * (rank <= total[:, None])
        precision = np.cumsum(hit, axis=1) / rank
        for k in ks:
            recalled[k] += int(np.sum(hit[:, :k].any(axis=1)))
        r_precision += float(np.sum(up_to_r.sum(axis=1) / total))
        map_at_r += float(np.sum((precision * up_to_r).sum(axis=1) / total))
    return Retrieval(
        recall={k: count / len(rows) for k, count in recalled.items()},
        r_precision=r_precision / len(rows),
        map_at_r=map_at_r / len(rows),
        num_queries=len(rows),
    )
