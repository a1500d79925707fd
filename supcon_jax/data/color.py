"""Colours in JAX, inside the jitted step: luma, hue, and both colour jitters.

Images are floats in [0, 1]; every operation is clipped to that range.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from supcon_jax.data.operations import LUMA
from supcon_jax.data.views import JITTER_KINDS


def luma(image: jax.Array, axis: int = -1) -> jax.Array:
    """The luma of images, with a last axis of length 1 (or a first one: axis=0)."""
    red, green, blue = jnp.split(image, 3, axis=axis)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def to_grayscale(image: jax.Array) -> jax.Array:
    """The luma of an image `[H, W, 3]`, in all three channels."""
    return jnp.broadcast_to(luma(image), image.shape)


def _blend(image: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(other + factor * (image - other), 0.0, 1.0)


def adjust_brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales all values: `clip(factor x)`."""
    return _blend(image, jnp.zeros((), image.dtype), factor)


def adjust_contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales the distance to the mean luma: `clip(m + factor (x - m))`."""
    return _blend(image, jnp.mean(luma(image)), factor)


def adjust_saturation(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales the distance to the pixel's luma: `clip(l + factor (x - l))`."""
    return _blend(image, luma(image), factor)


def adjust_hue(image: jax.Array, shift: jax.Array, axis: int = -1) -> jax.Array:
    """Turns the hue of the HSV colour by `shift` (1 is the whole circle)."""
    red, green, blue = jnp.split(image, 3, axis=axis)
    largest = jnp.maximum(jnp.maximum(red, green), blue)
    smallest = jnp.minimum(jnp.minimum(red, green), blue)
    chroma = largest - smallest
    per_chroma = 1.0 / jnp.where(chroma > 0, chroma, 1.0)
    # Which is the largest is asked of the channels, and not of `largest == red`: a compiler
    # that computes red twice may round it in two ways, and then none is the largest.
    sixth = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) * per_chroma,
        jnp.where(
            green >= blue,
            2 + (blue - red) * per_chroma,
            4 + (red - green) * per_chroma,
        ),
    )
    # Colour n of (5, 3, 1) at hue h: V - C max(0, min(k, 4 - k, 1)), k = (n + h) mod 6.
    turned = sixth + 6 * shift
    channels = []
    for number in (5.0, 3.0, 1.0):
        k = turned + number
        k = k - 6.0 * jnp.floor(k / 6.0)
        falloff = jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)
        channels.append(largest - chroma * falloff)
    return jnp.concatenate(channels, axis=axis)


class Jitter(NamedTuple):
    """What a colour jitter does to one view.

    Attributes:
      factors: `[3]`, of brightness, contrast and saturation. TensorFlow's jitter adds the
        first instead of multiplying by it.
      shift: of the hue.
      place: `[4]`: the position (0..3) in the order of brightness, contrast, saturation
        and hue.
    """

    factors: jax.Array
    shift: jax.Array
    place: jax.Array


def _is_tensorflow(kind: str) -> bool:
    if kind not in JITTER_KINDS:
        raise ValueError(f"got kind={kind!r}; allowed: {', '.join(JITTER_KINDS)}")
    return kind == "tensorflow"


def _neutral_factors(kind: str) -> jax.Array:
    """`[3]`: of brightness, contrast and saturation, those that change nothing."""
    return jnp.array([0.0 if _is_tensorflow(kind) else 1.0, 1.0, 1.0])


def draw_jitter(
    key: jax.Array, *, strength: float, kind: str = "torchvision"
) -> Jitter:
    """Draws factors in `[max(0, 1 - 0.8 s), 1 + 0.8 s]`, a hue in +-0.2 s, an order.

    What TensorFlow's jitter adds to the brightness is uniform in `[-0.8 s, 0.8 s]`.
    """
    draws = jax.random.uniform(key, (8,))
    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    order = draws[4:]
    place = jnp.sum(order[:, None] > order, axis=1)
    factors = low + (high - low) * draws[:3]
    if _is_tensorflow(kind):
        factors = factors.at[0].set(0.8 * strength * (2 * draws[0] - 1))
    return Jitter(factors, 0.2 * strength * (2 * draws[3] - 1), place)


def _torchvision_operation(
    image: jax.Array, which: jax.Array, factor: jax.Array
) -> jax.Array:
    """Operation 0, 1 or 2 on an image `[3, H, W]`: see `apply_jitter`."""
    grey = luma(image, axis=0)
    other = jnp.where(which == 2, grey, 0.0)
    other = other + jnp.where(which == 1, jnp.mean(grey), 0.0)
    return _blend(image, other, factor)


def _tensorflow_operation(
    image: jax.Array, which: jax.Array, factor: jax.Array
) -> jax.Array:
    """Operation 0, 1 or 2 on an image `[3, H, W]`: see `apply_jitter`."""
    # Maxima of three arrays: a third of the time of a reduction over them on a CPU.
    red, green, blue = jnp.split(image, 3)
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    mean = jnp.mean(image, axis=(1, 2), keepdims=True)
    # S = C / V may not exceed 1. A pixel without colour has none to scale.
    most = jnp.where(chroma > 0, value / jnp.where(chroma > 0, chroma, 1.0), 1.0)
    other = jnp.where(which == 2, value, jnp.where(which == 1, mean, 0.0))
    scale = jnp.where(which == 2, jnp.minimum(factor, most), factor)
    scale = jnp.where(which == 0, 1.0, scale)
    added = jnp.where(which == 0, factor, 0.0)
    return jnp.clip(other + scale * (image - other) + added, 0.0, 1.0)


def apply_jitter(
    image: jax.Array, jitter: Jitter, *, kind: str = "torchvision"
) -> jax.Array:
    """The four operations in the jitter's order, clipped to [0, 1] after each.

    With f the factor of the operation:

    | | torchvision | tensorflow |
    |---|---|---|
    | brightness | `f x` | `x + f` |
    | contrast | `m + f (x - m)`, m the mean luma | m the mean of each channel |
    | saturation | `l + f (x - l)`, l the pixel's luma | `S <- min(f S, 1)` in HSV |
    | hue | `H <- H + shift` in HSV | the same |

    There are no branches, since under vmap all of them would run at all four positions
    (ten times the work). Brightness, contrast and saturation are one blend,
    `clip(o + f (x - o))`. For torchvision o is zero, the mean luma or the luma. For
    TensorFlow it is zero (with f = 1 and the sum after it), the channel's mean, or the
    pixel's largest value V: a pixel is `V - C t` with C = S V, so scaling S scales its
    distance to V. Three blends come before the hue and three after it. A blend changes
    nothing if the order has its operation on the other side of the hue.

    Args:
      image: `[H, W, 3]`.
      jitter: factors, shift and order, as `draw_jitter` draws them for this kind.
      kind: a name in `views.JITTER_KINDS`.

    Raises:
      ValueError: there is no such kind.

    Source: torchvision's ColorJitter; google-research/supcon, preprocessing.py.
    """
    tensorflow = _is_tensorflow(kind)
    operation = _tensorflow_operation if tensorflow else _torchvision_operation
    neutral = _neutral_factors(kind)
    factors, shift, place = jitter
    hue_place = place[3]
    # The operation (0, 1, 2) that is j-th among the three blends.
    rank = place[:3] - (place[:3] > hue_place)
    chosen = jnp.argsort(rank)

    def blends(image: jax.Array, before: bool) -> jax.Array:
        for position in range(3):
            here = (position < hue_place) == before
            which = chosen[position]
            factor = jnp.where(here, factors[which], neutral[which])
            image = operation(image, which, factor)
        return image

    # Channels first takes half the time on a CPU.
    image = jnp.moveaxis(image, -1, 0)
    image = blends(adjust_hue(blends(image, True), shift, axis=0), False)
    return jnp.moveaxis(image, 0, -1)


def color_jitter(
    key: jax.Array,
    image: jax.Array,
    *,
    strength: float,
    probability: float = 1.0,
    kind: str = "torchvision",
) -> jax.Array:
    """Changes brightness, contrast, saturation and hue in random order.

    With s the strength: factors uniform in `[max(0, 1 - 0.8 s), 1 + 0.8 s]`, the hue
    shift in `[-0.2 s, 0.2 s]`; values are clipped to [0, 1] after each operation. With
    probability 1 - p nothing changes. `apply_jitter` has the formulas of both kinds.

    Source: Chen et al., arXiv 2002.05709, appendix A.
    """
    jitter_key, chance_key = jax.random.split(key)
    jitter = draw_jitter(jitter_key, strength=strength, kind=kind)
    if probability < 1:
        # Factors that change nothing cost less than choosing between two images.
        some = jax.random.bernoulli(chance_key, probability)
        factors = jnp.where(some, jitter.factors, _neutral_factors(kind))
        jitter = jitter._replace(factors=factors, shift=jitter.shift * some)
    return apply_jitter(image, jitter, kind=kind)
