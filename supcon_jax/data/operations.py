"""AutoAugment, RandAugment and TrivialAugment as data: policies, levels and constants.

The host (autoaugment.py, in TensorFlow) and the jitted step (policies.py, in JAX) both
read what is here, so that they cannot drift apart. This module imports neither.

Source: Cubuk et al., arXiv 1805.09501 and 1909.13719, with the constants of
tensorflow/models, official/legacy/image_classification/augment.py, which the official
code of SupCon uses; Müller & Hutter, arXiv 2103.10158, with those of their code,
automl/trivialaugment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

# The value of pixels that come from outside the image.
FILL = 128
# Red, green and blue in the luma (ITU-R BT.601), as Pillow has them.
LUMA = (0.299, 0.587, 0.114)
LUMA_PER_MILLE = (299, 587, 114)
# The factors of Color and Sharpness are rounded to multiples of 1 / FACTOR_STEPS. Sums of
# at most 1024 then have 23 bits, so that float32 holds them exactly, and no order of
# summation and no fused multiply-add of some machine changes a pixel. The error is below
# 0.05 grey levels.
FACTOR_STEPS = 2**13

# 25 pairs of (operation, probability, level 0..10); one pair is drawn for a view.
POLICY_V0 = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
    (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)
# Pixels that a translation at level 10 moves, and half the side of its cutout.
AUTO_AUGMENT_TRANSLATE, AUTO_AUGMENT_CUTOUT = 250.0, 100.0
RAND_AUGMENT_TRANSLATE, RAND_AUGMENT_CUTOUT = 100.0, 40.0


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a level becomes the argument of an operation: `offset + scale level`.

    Attributes:
      scale, offset: in the unit of the argument.
      whole: whether `scale level` is rounded down.
      falling: whether it is taken from the offset instead of added.
      signed: whether the argument is negated with probability 1/2.
    """

    scale: float = 0.0
    offset: float = 0.0
    whole: bool = False
    falling: bool = False
    signed: bool = False

    def __call__(self, level: Any, floor: Callable[[Any], Any] = np.floor) -> Any:
        """The argument without its sign.

        Args:
          level: float32, of NumPy or TensorFlow.
          floor: rounds it down.
        """
        value = self.scale * level
        if self.whole:
            # In float32, 1.1 * 10 is a little less than 11; the summand corrects that.
            value = floor(value + 1e-4)
        return self.offset - value if self.falling else value + self.offset


def official_rules(*, translate: float, cutout: float) -> dict[str, Rule]:
    """The 16 operations of AutoAugment and RandAugment, for levels 0..10.

    Args:
      translate: pixels that a translation at level 10 moves.
      cutout: half the side of the square that is cut out at level 10.
    """
    factor = Rule(0.18, 0.1)
    shear = Rule(0.03, signed=True)
    moved = Rule(translate / 10, signed=True)
    return {
        "AutoContrast": Rule(),
        "Equalize": Rule(),
        "Invert": Rule(),
        "Rotate": Rule(3.0, signed=True),
        "Posterize": Rule(0.4, whole=True),
        "Solarize": Rule(25.6, whole=True),
        "Color": factor,
        "Contrast": factor,
        "Brightness": factor,
        "Sharpness": factor,
        "ShearX": shear,
        "ShearY": shear,
        "TranslateX": moved,
        "TranslateY": moved,
        "Cutout": Rule(cutout / 10, whole=True),
        "SolarizeAdd": Rule(11.0, whole=True),
    }


NAMES = tuple(official_rules(translate=0.0, cutout=0.0))

# TrivialAugment draws one of these or the identity, and one of the levels 0..30, all
# uniformly: the "wide" space of its authors.
#
# | operation | argument at level m |
# |---|---|
# | AutoContrast, Equalize | none |
# | Rotate | +-floor(135 m / 30) degrees |
# | ShearX, ShearY | +-0.99 m / 30 |
# | TranslateX, TranslateY | +-floor(32 m / 30) pixels, whatever the image's size |
# | Posterize | 8 - floor(6 m / 30) bits: 8 to 2 |
# | Solarize | threshold 256 - floor(256 m / 30): none to all values are inverted |
# | Color, Contrast, Brightness, Sharpness | factor 0.01 + 1.99 m / 30 |
#
# Empty pixels are 128 here, as in the other policies, and black in the authors' code.
# torchvision's TrivialAugmentWide differs in the factors, 1 +- 0.99 m / 30, in thresholds
# from 255 on, in angles that are not rounded and in posterizing with rounded bits.
WIDE_LEVELS = 31
_WIDE_FACTOR = Rule(1.99 / 30, 0.01)
_WIDE_SHEAR = Rule(0.99 / 30, signed=True)
_WIDE_MOVED = Rule(32 / 30, whole=True, signed=True)
WIDE_RULES: dict[str, Rule] = {
    "AutoContrast": Rule(),
    "Equalize": Rule(),
    "Rotate": Rule(4.5, whole=True, signed=True),
    "PillowSolarize": Rule(256 / 30, 256.0, whole=True, falling=True),
    "Color": _WIDE_FACTOR,
    "Posterize": Rule(0.2, 8.0, whole=True, falling=True),
    "Contrast": _WIDE_FACTOR,
    "Brightness": _WIDE_FACTOR,
    "Sharpness": _WIDE_FACTOR,
    "ShearX": _WIDE_SHEAR,
    "ShearY": _WIDE_SHEAR,
    "TranslateX": _WIDE_MOVED,
    "TranslateY": _WIDE_MOVED,
}
