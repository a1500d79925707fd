"""Robustness to common corruptions: mCE and relative mCE, and what the paper printed.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", arXiv 1903.12261, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

SEVERITIES = (1, 2, 3, 4, 5)


class Reference(NamedTuple):
    """The classifier by whose errors those of another are divided.

    Attributes:
      name: what it is called.
      errors: corruption -> mean error over the severities.
      clean: error on the images without corruption.
    """

    name: str
    errors: Mapping[str, float]
    clean: float


# On ImageNet-C at 224 pixels, and there alone. Errors: AugMix's code, which quotes
# github.com/hendrycks/robustness; the clean error: google-research/robustness_metrics,
# reports/imagenet_variants.py (43.5 % in the paper's Table 1).
ALEXNET = Reference(
    "AlexNet",
    {
        "gaussian_noise": 0.886428,
        "shot_noise": 0.894468,
        "impulse_noise": 0.922640,
        "defocus_blur": 0.819880,
        "glass_blur": 0.826268,
        "motion_blur": 0.785948,
        "zoom_blur": 0.798360,
        "snow": 0.866816,
        "frost": 0.826572,
        "fog": 0.819324,
        "brightness": 0.564592,
        "contrast": 0.853204,
        "elastic_transform": 0.646056,
        "pixelate": 0.717840,
        "jpeg_compression": 0.606500,
    },
    0.4348,
)
# The 15 of the benchmark, in its order; the number of each seeds its random numbers.
CORRUPTIONS = tuple(ALEXNET.errors)


class Published(NamedTuple):
    """What the SupCon paper printed of a classifier on ImageNet and ImageNet-C.

    Attributes:
      top1, ece: clean, then severity 1 to 5 (Table 6).
      mce, relative_mce: Figure 3.
    """

    top1: tuple[float, ...]
    ece: tuple[float, ...]
    mce: float
    relative_mce: float


# Source: Khosla et al., arXiv 2004.11362, Table 6 and Figure 3. The number of bins of its
# ECE is not stated.
PUBLISHED = {
    "SupCon R50": Published(
        (0.7881, 0.6539, 0.5555, 0.4864, 0.3727, 0.2692),
        (0.024, 0.026, 0.034, 0.048, 0.071, 0.100),
        0.672,
        0.946,
    ),
    "CE R50": Published(
        (0.7824, 0.6506, 0.5496, 0.4764, 0.3593, 0.2538),
        (0.039, 0.033, 0.032, 0.047, 0.072, 0.098),
        0.686,
        0.962,
    ),
    "SupCon R200": Published(
        (0.8138, 0.7329, 0.6616, 0.6180, 0.5401, 0.4571),
        (0.041, 0.047, 0.061, 0.071, 0.086, 0.103),
        0.506,
        0.665,
    ),
    "CE R200": Published(
        (0.8081, 0.7289, 0.6528, 0.6055, 0.5200, 0.4311),
        (0.045, 0.048, 0.036, 0.040, 0.042, 0.052),
        0.524,
        0.691,
    ),
}


def corruption_errors(
    errors: Mapping[str, Sequence[float]], reference: Reference
) -> dict[str, float]:
    """CE of each corruption: `sum_s E_s / sum_s E_s^reference`.

    Args:
      errors: corruption -> error at each severity, all five of them.
      reference: what they are divided by; it has errors of the same corruptions.

    Returns:
      Shares of 1, which the papers print in percent; NaN where the reference makes no
      error.
    """
    return {
        name: _ratio(float(np.mean(values)), reference.errors[name])
        for name, values in errors.items()
    }


def relative_corruption_errors(
    errors: Mapping[str, Sequence[float]], clean: float, reference: Reference
) -> dict[str, float]:
    """Relative CE: `sum_s (E_s - E_clean) / sum_s (E_s^reference - E_clean^reference)`.

    It says how much a corruption adds to the error of clean images.

    Args:
      errors, reference: as for `corruption_errors`.
      clean: error on the images without corruption.

    Returns:
      Shares of 1; NaN where the corruption does the reference no harm, which leaves
      nothing to divide by.
    """
    return {
        name: _ratio(
            float(np.mean(values)) - clean, reference.errors[name] - reference.clean
        )
        for name, values in errors.items()
    }


def mean_corruption_error(
    errors: Mapping[str, Sequence[float]], reference: Reference
) -> float:
    """mCE: the mean of `corruption_errors` over the corruptions.

    Example:
      >>> half = {name: [error / 2] * 5 for name, error in ALEXNET.errors.items()}
      >>> round(mean_corruption_error(half, ALEXNET), 6)
      0.5
    """
    return float(np.mean(list(corruption_errors(errors, reference).values())))


def relative_mean_corruption_error(
    errors: Mapping[str, Sequence[float]], clean: float, reference: Reference
) -> float:
    """Relative mCE: the mean of `relative_corruption_errors` over the corruptions."""
    values = relative_corruption_errors(errors, clean, reference).values()
    return float(np.mean(list(values)))


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs > 0 else float("nan")
