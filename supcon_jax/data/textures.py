"""Textures that two of the corruptions lay over an image: clouds, and frost on a window."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

# Mean and deviation of red, green and blue in the five photographs of frost that the
# release draws from.
FROST_COLOURS = (
    ((78, 149, 166), (27, 16, 15)),
    ((201, 205, 214), (21, 22, 23)),
    ((138, 153, 165), (28, 28, 30)),
    ((112, 123, 135), (44, 43, 42)),
    ((71, 95, 105), (35, 43, 47)),
)


def plasma(side: int, decay: float, rng: Any) -> np.ndarray:
    """Clouds in [0, 1], at least `[side, side]`: a fractal by midpoints, without a seam.

    Each round doubles the side. New points are means of the four nearest, moved at random
    by an amount that falls by `decay^2` from round to round.

    Args:
      side: the least side, in pixels; what is returned has the next power of two.
      decay: above 1; larger is smoother.
      rng: of the random numbers.
    """
    height, amount = np.zeros((1, 1)), 1.0
    while len(height) < side:

        def move(total: np.ndarray, amount: float = amount) -> np.ndarray:
            return total / 4 + amount * rng.uniform(-1, 1, total.shape)

        right = height + np.roll(height, -1, axis=1)
        down = height + np.roll(height, -1, axis=0)
        centres = move(right + np.roll(right, -1, axis=0))
        finer = np.empty((2 * len(height), 2 * len(height)))
        finer[::2, ::2], finer[1::2, 1::2] = height, centres
        finer[::2, 1::2] = move(right + centres + np.roll(centres, 1, axis=0))
        finer[1::2, ::2] = move(down + centres + np.roll(centres, 1, axis=1))
        height, amount = finer, amount / decay**2
    height -= height.min()
    return height / height.max()


@functools.lru_cache(maxsize=8)
def frost_texture(number: int, side: int) -> np.ndarray:
    """Crystals of ice `[side, side, 3]` in [0, 1], the same in every process.

    The release blends photographs of frosted windows in. These are drawn: needles with
    side branches over clouds, with the colours of one of the photographs.

    Args:
      number: of the photograph, an index of `FROST_COLOURS`.
      side: in pixels.
    """
    from PIL import Image, ImageDraw

    rng = np.random.default_rng((8191, number))
    canvas = Image.new("F", (side, side))
    draw = ImageDraw.Draw(canvas)

    def grow(at: np.ndarray, direction: float, length: float, order: int) -> None:
        """A needle with two rows of shorter ones at 60 degrees."""
        step = np.array([math.cos(direction), math.sin(direction)])
        end = at + length * step
        draw.line([*at, *end], fill=1.0 / (1 + order), width=1)
        if order == 2 or length < 3:
            return
        for share in np.arange(0.1, 0.95, 0.12):
            for turn in (-math.pi / 3, math.pi / 3):
                branch = length * (0.45 if order == 0 else 0.35) * (1 - share)
                grow(at + share * length * step, direction + turn, branch, order + 1)

    for _ in range(40):
        grow(
            rng.uniform(0, side, 2),
            rng.uniform(0, 2 * math.pi),
            side * rng.uniform(0.1, 0.45),
            0,
        )
    needles = gaussian_filter(np.asarray(canvas), side / 600)
    ice = needles / needles.std() + _normalised(plasma(side, 1.6, rng))[:side, :side]
    mean, deviation = (np.array(colour) / 255 for colour in FROST_COLOURS[number])
    coloured = mean + deviation * _normalised(ice)[..., None]
    return np.clip(coloured, 0, 1).astype(np.float32)


def _normalised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / x.std()
