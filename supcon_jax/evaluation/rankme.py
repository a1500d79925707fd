"""RankMe: how many dimensions the embeddings use."""

from __future__ import annotations

import numpy as np


def rankme(embeddings: np.ndarray, *, epsilon: float = 1e-7) -> float:
    """The effective rank of embeddings; a collapsed encoder has one near 1.

    `exp(-sum_k p_k log p_k)` with `p_k = s_k / sum_j s_j + epsilon`, where s are the
    singular values of the matrix of embeddings.

    Args:
      embeddings: `[n, D]`.
      epsilon: keeps the logarithm finite.

    Returns:
      A number between 1 and about `min(n, D)`; 0 where all embeddings are zero, NaN where
      some are not finite.

    Example:
      >>> import numpy as np
      >>> round(rankme(np.eye(4)), 3)
      4.0

    Source: Garrido et al., arXiv 2210.02885, Equation 1.
    """
    embeddings = np.asarray(embeddings, np.float32)
    largest = np.max(np.abs(embeddings), initial=0.0)
    if not np.isfinite(largest):
        return float("nan")
    # By a power of two, which changes no share: squares of large numbers are not finite.
    embeddings = np.ldexp(embeddings, -np.frexp(largest)[1])
    values = np.linalg.svd(embeddings, compute_uv=False)
    total = float(np.sum(values, dtype=np.float64))
    if total == 0:
        return 0.0
    shares = values.astype(np.float64) / total + epsilon
    return float(np.exp(-np.sum(shares * np.log(shares))))
