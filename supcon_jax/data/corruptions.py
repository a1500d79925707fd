"""The 15 common corruptions of ImageNet-C and CIFAR-10-C, for images of any size.

Each is written from its definition, and its five severities are those of the released
data: the tables below hold what the release was made with at 32, 64 and 224 pixels, and an
image has those of the nearest size. Pictures differ from the release in detail (other
random numbers, other interpolation, frost without photographs): docs/evaluation.md.

Source: Hendrycks and Dietterich, arXiv 1903.12261, Appendix B; values:
github.com/hendrycks/robustness, ImageNet-C/create_c, make_cifar_c.py,
make_tinyimagenet_c.py and make_imagenet_c.py.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import convolve1d, gaussian_filter, map_coordinates
from scipy.signal import fftconvolve

from supcon_jax.data.textures import FROST_COLOURS, frost_texture, plasma
from supcon_jax.evaluation.corruption import CORRUPTIONS

# Less is no picture any more: the least that pixelate and elastic_transform can change.
SMALLEST = 8
# Corruption -> side that the release has -> one value a severity.
SETTINGS: dict[str, dict[int, tuple]] = {
    # standard deviation
    "gaussian_noise": {
        32: (0.04, 0.06, 0.08, 0.09, 0.10),
        64: (0.04, 0.08, 0.12, 0.15, 0.18),
        224: (0.08, 0.12, 0.18, 0.26, 0.38),
    },
    # photons that white stands for
    "shot_noise": {
        32: (500, 250, 100, 75, 50),
        64: (250, 100, 50, 30, 15),
        224: (60, 25, 12, 5, 3),
    },
    # share of values replaced by black or white
    "impulse_noise": {
        32: (0.01, 0.02, 0.03, 0.05, 0.07),
        64: (0.01, 0.02, 0.05, 0.08, 0.14),
        224: (0.03, 0.06, 0.09, 0.17, 0.27),
    },
    # radius of the disk, sigma that softens its edge
    "defocus_blur": {
        32: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        64: ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        224: ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    },
    # sigma, reach in pixels, rounds
    "glass_blur": {
        32: ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        64: ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        224: ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    },
    # radius, sigma
    "motion_blur": {
        32: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        64: ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        224: ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    },
    # step between zoom factors from 1 on, number of them
    "zoom_blur": {
        32: ((0.01, 7), (0.01, 12), (0.01, 16), (0.01, 21), (0.01, 26)),
        64: ((0.01, 7), (0.01, 12), (0.01, 16), (0.01, 21), (0.01, 26)),
        224: ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11)),
    },
    # mean, deviation, zoom, threshold of the flakes; radius, sigma of their fall; share
    # of the image that is not whitened
    "snow": {
        32: (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        64: (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
        224: (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    },
    # weight of the image, of the frost
    "frost": {
        32: ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        64: ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
        224: ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    },
    # thickness, decay of the finer structures
    "fog": {
        32: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        64: ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        224: ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    },
    # added to V of HSV
    "brightness": {
        32: (0.05, 0.1, 0.15, 0.2, 0.3),
        64: (0.1, 0.2, 0.3, 0.4, 0.5),
        224: (0.1, 0.2, 0.3, 0.4, 0.5),
    },
    # share of the distance from the mean that is left
    "contrast": {
        32: (0.75, 0.5, 0.4, 0.3, 0.15),
        64: (0.4, 0.3, 0.2, 0.1, 0.05),
        224: (0.4, 0.3, 0.2, 0.1, 0.05),
    },
    # strength, sigma of the displacement; most that a corner is moved; shares of the side
    "elastic_transform": {
        32: (
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
        64: (
            (0, 0, 0.08),
            (0.05, 0.3, 0.06),
            (0.1, 0.08, 0.06),
            (0.1, 0.03, 0.03),
            (0.16, 0.03, 0.02),
        ),
        # The release has 244 pixels in its formulas where the images have 224.
        224: tuple(
            tuple(244 / 224 * share for share in setting)
            for setting in (
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            )
        ),
    },
    # share of the side that is left
    "pixelate": {
        32: (0.95, 0.9, 0.85, 0.75, 0.65),
        64: (0.9, 0.8, 0.7, 0.6, 0.5),
        224: (0.6, 0.5, 0.4, 0.3, 0.25),
    },
    # quality
    "jpeg_compression": {
        32: (80, 65, 58, 50, 40),
        64: (65, 58, 50, 40, 25),
        224: (25, 18, 15, 10, 7),
    },
}


def corrupt(
    image: np.ndarray,
    corruption: str,
    severity: int,
    *,
    seed: int = 0,
    example: int = 0,
) -> np.ndarray:
    """One corrupted image; always the same for a seed and an example.

    Args:
      image: uint8 `[S, S, 3]`, S at least `SMALLEST`.
      corruption: a key of `SETTINGS`.
      severity: 1 to 5.
      seed: of all random numbers.
      example: number of the image in its split.

    Returns:
      uint8 `[S, S, 3]`.
    """
    sides = SETTINGS[corruption]
    nearest = min(sides, key=lambda side: abs(math.log(side / len(image))))
    setting = sides[nearest][severity - 1]
    rng = np.random.default_rng(
        (seed, CORRUPTIONS.index(corruption), severity, example)
    )
    pixels = image.astype(np.float32) / np.float32(255)
    changed = _FUNCTIONS[corruption](pixels, setting, rng)
    return np.round(255 * np.clip(changed, 0, 1)).astype(np.uint8)


def corrupt_many(
    images: np.ndarray,
    examples: Sequence[int],
    corruption: str,
    severity: int,
    *,
    seed: int = 0,
) -> np.ndarray:
    """`corrupt` for images `[n, S, S, 3]` with the numbers `[n]`."""
    return np.stack(
        [
            corrupt(image, corruption, severity, seed=seed, example=int(example))
            for image, example in zip(images, examples, strict=True)
        ]
    )


# Below: pixels [S, S, 3] float32 in [0, 1], the setting of a severity, random numbers ->
# pixels, which `corrupt` clips.


def _gaussian_noise(x: np.ndarray, deviation: float, rng: Any) -> np.ndarray:
    return x + deviation * rng.standard_normal(x.shape, np.float32)


def _shot_noise(x: np.ndarray, photons: int, rng: Any) -> np.ndarray:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, share: float, rng: Any) -> np.ndarray:
    chance = rng.random(x.shape)
    return np.where(chance < share / 2, 0, np.where(chance < share, 1, x))


def _defocus_blur(x: np.ndarray, setting: tuple[float, float], rng: Any) -> np.ndarray:
    radius, softness = setting
    taps = 1 if radius <= 8 else 2
    line = np.arange(-int(radius) - taps, int(radius) + taps + 1)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.float32)
    soft = np.exp(-((np.arange(-taps, taps + 1) / softness) ** 2) / 2)
    for axis in (0, 1):
        disk = convolve1d(disk, soft / soft.sum(), axis, mode="constant")
    reach = len(line) // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    kernel = (disk / disk.sum())[..., None]
    return fftconvolve(padded, kernel, mode="valid", axes=(0, 1))


def _glass_blur(x: np.ndarray, setting: tuple[float, int, int], rng: Any) -> np.ndarray:
    sigma, reach, rounds = setting
    x = gaussian_filter(x, (sigma, sigma, 0), mode="nearest")
    side = len(x)
    inner = np.arange(side - reach, reach, -1)
    places = (side * inner[:, None] + inner).ravel()
    # In the release two pixels are to change places, but one of them is overwritten before
    # it is read, so that it is copied; a later pixel may copy a copy. Hence the loop.
    taken = list(range(side * side))
    for _ in range(rounds):
        shifts = rng.integers(-reach, reach, (2, len(places)))
        others = places + side * shifts[0] + shifts[1]
        for place, other in zip(places.tolist(), others.tolist(), strict=True):
            taken[place] = taken[other]
    x = x.reshape(side * side, 3)[taken].reshape(x.shape)
    return gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _motion_blur(x: np.ndarray, setting: tuple[int, float], rng: Any) -> np.ndarray:
    return _smear(x, *setting, degrees=rng.uniform(-45, 45))


def _zoom_blur(x: np.ndarray, setting: tuple[float, int], rng: Any) -> np.ndarray:
    step, count = setting
    zoomed = [_zoom(x, 1 + step * number) for number in range(count)]
    return (x + np.sum(zoomed, axis=0)) / (count + 1)


def _snow(x: np.ndarray, setting: tuple, rng: Any) -> np.ndarray:
    mean, deviation, zoom, threshold, radius, sigma, kept = setting
    flakes = rng.normal(mean, deviation, x.shape[:2]).astype(np.float32)
    flakes = _zoom(flakes[..., None], zoom)
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))
    flakes = _smear(flakes, radius, sigma, degrees=rng.uniform(-135, -45))
    grey = x @ np.array([[0.299], [0.587], [0.114]], np.float32)
    whitened = kept * x + (1 - kept) * np.maximum(x, 1.5 * grey + 0.5)
    return whitened + flakes + np.rot90(flakes, 2)


def _frost(x: np.ndarray, setting: tuple[float, float], rng: Any) -> np.ndarray:
    image_weight, frost_weight = setting
    side = len(x)
    texture = frost_texture(int(rng.integers(len(FROST_COLOURS))), 2 * side)
    top, left = rng.integers(0, side + 1, 2)
    window = texture[top : top + side, left : left + side]
    return image_weight * x + frost_weight * np.rot90(window, rng.integers(4))


def _fog(x: np.ndarray, setting: tuple[float, float], rng: Any) -> np.ndarray:
    thickness, decay = setting
    side, brightest = len(x), x.max()
    fog = thickness * plasma(side, decay, rng)[:side, :side, None]
    return (x + fog) * brightest / (brightest + thickness)


def _brightness(x: np.ndarray, added: float, rng: Any) -> np.ndarray:
    # Hue and saturation stay where all channels are scaled alike; black has neither.
    value = x.max(axis=-1, keepdims=True)
    brighter = np.minimum(value + added, 1)
    return np.where(value > 0, x * (brighter / np.maximum(value, 1e-6)), brighter)


def _contrast(x: np.ndarray, share: float, rng: Any) -> np.ndarray:
    mean = x.mean(axis=(0, 1), keepdims=True)
    return mean + share * (x - mean)


def _elastic_transform(
    x: np.ndarray, setting: tuple[float, float, float], rng: Any
) -> np.ndarray:
    strength, sigma, corner = (len(x) * share for share in setting)
    centre, arm = len(x) // 2, len(x) // 3
    square = centre + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = square + rng.uniform(-corner, corner, square.shape)
    # Rows of an affine map from where a pixel is shown to where it is taken from.
    affine = np.linalg.solve(np.column_stack([moved, np.ones(3)]), square)
    places = np.indices(x.shape[:2]).astype(np.float64)
    if strength:
        noise = rng.uniform(-1, 1, places.shape)
        smooth = gaussian_filter(noise, (0, sigma, sigma), mode="reflect", truncate=3)
        places += strength * smooth
    rows, columns = np.einsum("ij,ihw->jhw", affine[:2], places)
    taken = [rows + affine[2, 0], columns + affine[2, 1]]
    channels = [
        map_coordinates(x[..., channel], taken, order=1, mode="mirror")
        for channel in range(3)
    ]
    return np.stack(channels, axis=-1)


def _pixelate(x: np.ndarray, share: float, rng: Any) -> np.ndarray:
    from PIL.Image import Resampling

    side = len(x)
    small = _image(x).resize((int(side * share),) * 2, Resampling.BOX)
    return np.asarray(small.resize((side, side), Resampling.BOX)) / np.float32(255)


def _jpeg_compression(x: np.ndarray, quality: int, rng: Any) -> np.ndarray:
    from PIL import Image

    content = io.BytesIO()
    _image(x).save(content, "JPEG", quality=quality)
    with Image.open(content) as image:
        return np.asarray(image) / np.float32(255)


_FUNCTIONS: dict[str, Callable[[np.ndarray, Any, Any], np.ndarray]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}


def _image(x: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(np.round(255 * x).astype(np.uint8))


def _smear(x: np.ndarray, radius: int, sigma: float, *, degrees: float) -> np.ndarray:
    """Each pixel becomes a mean of those behind it, half a Gaussian of `2 radius + 1`.

    That is how ImageMagick blurs by motion: to one side, on whole pixels.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-((steps / sigma) ** 2) / 2).astype(np.float32)
    weights /= weights.sum()
    angle, reach = math.radians(degrees), 2 * radius
    rows, columns = (
        reach + np.ceil(steps * part - 0.5).astype(int)
        for part in (math.sin(angle), math.cos(angle))
    )
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    height, width = x.shape[:2]
    return np.sum(
        [
            weight * padded[row : row + height, column : column + width]
            for weight, row, column in zip(weights, rows, columns, strict=True)
        ],
        axis=0,
    )


def _zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of `[S, S, c]`, enlarged to the whole, linearly interpolated."""
    from PIL import Image

    side = len(x)
    left = (side - side / factor) / 2
    box = (left, left, side - left, side - left)
    channels = [
        Image.fromarray(np.ascontiguousarray(x[..., channel])).resize(
            (side, side), Image.Resampling.BILINEAR, box=box
        )
        for channel in range(x.shape[-1])
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)
