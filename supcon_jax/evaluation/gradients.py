"""What each pair of views gives to the gradient: hard pairs much, easy ones nothing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class PairGradients(NamedTuple):
    """Of every ordered pair of an anchor i and another view j, all `[N, N]`.

    Attributes:
      cosine: of their projections; 1 on the diagonal.
      weight: `dL_i / d(z_i . z_j)`, by which the loss of the anchor changes with the
        cosine: negative where it pulls together. 0 on the diagonal.
      norm: length of the pair's part of `dL_i / dw_i`.
      positive, negative: which pairs are of one class, and which are not; the diagonal is
        neither.
    """

    cosine: np.ndarray
    weight: np.ndarray
    norm: np.ndarray
    positive: np.ndarray
    negative: np.ndarray


class CosineBin(NamedTuple):
    """Pairs with a cosine in [low, high), and the lengths of their parts.

    Attributes:
      low, high: of the bin; the last one holds 1 too.
      pairs: how many it holds.
      mean, least, most: of the lengths: mean, 10th and 90th percentile.
    """

    low: float
    high: float
    pairs: int
    mean: float
    least: float
    most: float


def pair_gradients(
    projections: np.ndarray,
    groups: np.ndarray,
    *,
    temperature: float = 0.1,
    summation: str = "outside",
) -> PairGradients:
    """The parts that pairs have in the gradient of each anchor's loss.

    With `z = w / |w|`, the loss `L_i` of anchor i has the gradient

        dL_i / dw_i = sum_j W_ij (z_j - (z_i . z_j) z_i) / |w_i|,
        W_ij = (p_ij - x_ij) / temperature,

    where p_ij is the softmax of anchor i over all other views, and x_ij is 0 for a
    negative. For a positive it is 1 / |P(i)| in L_out, and in L_in the softmax over the
    positives alone. The vector in brackets has the length `sqrt(1 - (z_i . z_j)^2)`: a
    pair with a cosine near 1 or -1 gives nothing, however large its weight.

    Args:
      projections: `[N, D]`, not normalised.
      groups: `[N]`; views with the same number are positives.
      temperature: of the loss.
      summation: "outside" (L_out, Eq. 2) or "inside" (L_in, Eq. 3).

    Returns:
      In float64. The parts of an anchor without a positive are 0.

    Raises:
      ValueError: another summation.

    Source: Khosla et al., arXiv 2004.11362, section 3.2.3 and Equations 4 to 6 and 16 to
    24 of the supplementary.
    """
    if summation not in ("outside", "inside"):
        raise ValueError(f"summation must be 'outside' or 'inside'; got {summation!r}.")
    w, groups = np.asarray(projections, np.float64), np.asarray(groups)
    lengths = np.maximum(np.linalg.norm(w, axis=1), 1e-300)
    z = w / lengths[:, None]
    cosine = z @ z.T
    others = ~np.eye(len(z), dtype=bool)
    positive = (groups[:, None] == groups) & others
    logits = cosine / temperature
    share = _softmax(logits, others)
    if summation == "inside":
        wanted = _softmax(logits, positive)
    else:
        wanted = positive / np.maximum(positive.sum(axis=1, keepdims=True), 1)
    counts = positive.any(axis=1, keepdims=True)
    weight = counts * (share - wanted) / temperature
    # Of unit vectors the cosine may be 1 + 1e-16.
    tangent = np.sqrt(np.maximum(1.0 - cosine**2, 0.0))
    return PairGradients(
        cosine=cosine,
        weight=weight,
        norm=np.abs(weight) * tangent / lengths[:, None],
        positive=positive,
        negative=others & ~positive,
    )


def anchor_gradients(projections: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The sum of all pairs' parts for each anchor, `[N, D]`.

    Args:
      projections: `[N, D]`, not normalised.
      weight: `[N, N]` of `pair_gradients`: the result is `dL_i / dw_i`. Its sum with its
        transpose, over the number of anchors that have a positive, gives the gradient of
        the whole loss, in which a view is an anchor and a contrast to other anchors.
    """
    w = np.asarray(projections, np.float64)
    lengths = np.maximum(np.linalg.norm(w, axis=1, keepdims=True), 1e-300)
    z = w / lengths
    along = np.sum(weight * (z @ z.T), axis=1, keepdims=True)
    return (weight @ z - along * z) / lengths


def by_cosine(
    cosine: np.ndarray, norm: np.ndarray, *, bins: int = 20
) -> list[CosineBin]:
    """Lengths of the parts of pairs, by their cosine.

    Args:
      cosine, norm: `[n]`, one entry a pair.
      bins: of equal width between -1 and 1.

    Returns:
      The bins that hold a pair, in order.
    """
    place = np.clip(((cosine + 1.0) * bins / 2).astype(int), 0, bins - 1)
    found = []
    for number in np.unique(place).tolist():
        inside = norm[place == number]
        least, most = np.percentile(inside, [10, 90])
        low, high = (round(2 * n / bins - 1, 6) for n in (number, number + 1))
        mean = float(inside.mean())
        found.append(CosineBin(low, high, len(inside), mean, float(least), float(most)))
    return found


class HardAndEasy(NamedTuple):
    """The tenth of pairs that are hardest, and that of the easiest.

    Attributes:
      hard_cosine, easy_cosine: the mean cosine of each.
      hard, easy: the mean length of their parts.
      share: of all lengths together, those of the hardest tenth.
    """

    hard_cosine: float
    easy_cosine: float
    hard: float
    easy: float
    share: float


def hard_and_easy(
    cosine: np.ndarray, norm: np.ndarray, *, positive: bool
) -> HardAndEasy:
    """Compares hard pairs with easy ones.

    Args:
      cosine, norm: `[n]`, one entry a pair.
      positive: whether they are positives, of which those with a small cosine are hard;
        of negatives it is those with a large one.
    """
    order = np.argsort(cosine if positive else -cosine, kind="stable")
    tenth = max(len(order) // 10, 1)
    hard, easy = order[:tenth], order[-tenth:]
    return HardAndEasy(
        hard_cosine=float(cosine[hard].mean()),
        easy_cosine=float(cosine[easy].mean()),
        hard=float(norm[hard].mean()),
        easy=float(norm[easy].mean()),
        share=float(norm[hard].sum() / max(norm.sum(), 1e-300)),
    )


def _softmax(logits: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Softmax of each row among some of its entries; 0 elsewhere, and in empty rows."""
    most = np.max(logits, axis=1, keepdims=True, where=among, initial=-np.inf)
    shifted = np.exp(logits - np.where(np.isfinite(most), most, 0.0)) * among
    return shifted / np.maximum(shifted.sum(axis=1, keepdims=True), 1e-300)
