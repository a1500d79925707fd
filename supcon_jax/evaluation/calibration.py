"""Calibration: whether a classifier is right as often as it says.

Every function takes the logits `[n, C]` and labels `[n]` of one split, all of them at once
and labelled; NumPy, in float64. An image with a logit that is not finite has no confidence: it
is wrong, with 0, and plays no part in a temperature.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar


def log_probabilities(logits: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
    """`log softmax(logits / temperature)`, `[n, C]` float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    with np.errstate(invalid="ignore"):  # a row that is not finite becomes NaN
        scaled = scaled - scaled.max(axis=1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))


def negative_log_likelihood(
    logits: np.ndarray, labels: np.ndarray, *, temperature: float = 1.0
) -> float:
    """Mean of `-log p(label)`: the cross-entropy without label smoothing."""
    log_p = log_probabilities(logits, temperature=temperature)
    return float(-np.mean(log_p[np.arange(len(labels)), labels]))


def brier_score(
    logits: np.ndarray, labels: np.ndarray, *, temperature: float = 1.0
) -> float:
    """Mean over examples of `sum_c (p_c - [c = label])^2`, between 0 and 2.

    Source: Brier, Monthly Weather Review 78 (1950), for several classes.
    """
    p = np.exp(log_probabilities(logits, temperature=temperature))
    p[np.arange(len(labels)), labels] -= 1.0
    return float(np.mean(np.sum(p**2, axis=1)))


def reliability(
    confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions by confidence, in bins of equal width: what a reliability diagram shows.

    Bin b holds `b / bins < confidence <= (b + 1) / bins`.

    Args:
      confidence: `[n]` in [0, 1].
      correct: `[n]`, whether each prediction is right.
      bins: number of bins M.

    Returns:
      `[M]` counts, `[M]` mean confidence and `[M]` share that is right; of an empty bin
      both are NaN.
    """
    confidence, correct = _known(confidence, correct)
    place = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1).astype(int)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean, share = (
            np.bincount(place, weights=values, minlength=bins) / counts
            for values in (confidence, correct)
        )
    return counts, mean, share


def expected_calibration_error(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    bins: int = 15,
    temperature: float = 1.0,
) -> float:
    """ECE: `sum_b (n_b / n) |right_b - confidence_b|` over bins of equal width.

    The confidence of a prediction is its largest probability. The paper does not say how
    many bins it has; 15 is usual.

    Example:
      >>> import numpy as np
      >>> sure, wrong_half_of_the_time = np.array([[9.0, -9.0]] * 4), np.array([0, 0, 1, 1])
      >>> round(expected_calibration_error(sure, wrong_half_of_the_time), 3)
      0.5

    Source: Guo et al., arXiv 1706.04599, Equation 3.
    """
    confidence, correct = _top_prediction(logits, labels, temperature)
    return _gap(*reliability(confidence, correct, bins=bins))


def adaptive_calibration_error(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    bins: int = 15,
    temperature: float = 1.0,
) -> float:
    """ECE over bins of equally many predictions, in order of confidence.

    Bins of equal width are mostly empty where a classifier is nearly always sure.

    Source: Nixon et al., arXiv 1904.01685, section 3, for the top prediction alone.
    """
    confidence, correct = _top_prediction(logits, labels, temperature)
    order = np.argsort(confidence, kind="stable")
    gaps = [
        abs(np.sum(correct[part] - confidence[part]))
        for part in np.array_split(order, min(bins, len(order)))
    ]
    return float(np.sum(gaps) / len(order))


def classwise_calibration_error(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    bins: int = 15,
    temperature: float = 1.0,
) -> float:
    """Mean over classes of the ECE of "the label is c" with its probability `p_c`.

    Source: Kull et al., arXiv 1910.12656, section 2.
    """
    p = np.exp(log_probabilities(logits, temperature=temperature))
    errors = [
        _gap(*reliability(p[:, c], np.asarray(labels) == c, bins=bins))
        for c in range(p.shape[1])
    ]
    return float(np.mean(errors))


def fit_temperature(
    logits: np.ndarray, labels: np.ndarray, *, smooth: bool = False
) -> float:
    """The temperature in [0.01, 100] with the least negative log-likelihood.

    Fit it on data that neither trained nor evaluate the classifier. Accuracy does not
    change, because no order of logits does.

    Args:
      logits: `[n, C]`.
      labels: `[n]`.
      smooth: give `1 / (n + 2)` of each target to the classes that are not the label,
        evenly: the chance of a mistake that n examples leave open. Without it, examples
        that are all recognised ask for a temperature of 0.

    Source: Guo et al., arXiv 1706.04599, section 4.2; the smoothing: Platt, Probabilistic
    Outputs for Support Vector Machines (1999), section 2.1.
    """
    finite = np.isfinite(logits).all(axis=1)
    logits, labels = np.asarray(logits)[finite], np.asarray(labels)[finite]
    if not len(labels):
        return 1.0
    rows, others = np.arange(len(labels)), max(np.shape(logits)[1] - 1, 1)
    share = 1.0 / (len(labels) + 2) if smooth else 0.0

    def loss(log_temperature: float) -> float:
        log_p = log_probabilities(logits, temperature=float(np.exp(log_temperature)))
        own = log_p[rows, labels]
        rest = (log_p.sum(axis=1) - own) / others
        return -float(np.mean((1.0 - share) * own + share * rest))

    found = minimize_scalar(
        loss,
        bounds=(np.log(0.01), np.log(100.0)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def scale_by_halves(
    logits: np.ndarray, labels: np.ndarray, *, seed: int = 0, smooth: bool = False
) -> tuple[np.ndarray, float]:
    """Logits, each divided by a temperature that was fitted without it.

    The split is cut into two halves at random, and each half is scaled by the temperature
    of the other. So no example is judged by a temperature that has seen its label, and
    none is lost to the fit. `smooth` is that of `fit_temperature`.

    Returns:
      Scaled logits `[n, C]`, and the geometric mean of the two temperatures.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    halves = np.array_split(order, 2)
    scaled = np.array(logits, np.float64)
    temperatures = []
    for own, other in (halves, halves[::-1]):
        found = fit_temperature(logits[other], labels[other], smooth=smooth)
        temperatures.append(found)
        scaled[own] /= temperatures[-1]
    return scaled, float(np.sqrt(temperatures[0] * temperatures[1]))


def _top_prediction(
    logits: np.ndarray, labels: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of each prediction, and whether it is right."""
    p = np.exp(log_probabilities(logits, temperature=temperature))
    predicted = p.argmax(axis=1)
    return _known(p.max(axis=1), predicted == np.asarray(labels))


def _known(
    confidence: np.ndarray, correct: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64; a confidence that is not finite is 0, and its prediction wrong."""
    known = np.isfinite(confidence)
    return np.where(known, confidence, 0.0), np.where(known, correct, False).astype(
        float
    )


def _gap(counts: np.ndarray, mean: np.ndarray, share: np.ndarray) -> float:
    """Mean distance of confidence and share that is right, weighted by counts."""
    full = counts > 0
    return float(np.average(np.abs(share - mean)[full], weights=counts[full]))
