"""Colour jitter on the host, in TensorFlow: for views whose policy comes after it.

The twin of color.py, which jitters inside the jitted step. TensorFlow is imported at the
top, so nothing imports this module before host.py does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import tensorflow as tf

from supcon_jax.data.operations import LUMA

# The operations take float images in [0, 1]. `color.apply_jitter` has their formulas.


def _luma(image: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(image * LUMA, axis=-1, keepdims=True)


def _contrast_of_luma(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    mean = tf.reduce_mean(_luma(image))
    return mean + factor * (image - mean)


def _saturation_of_luma(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    luma = _luma(image)
    return luma + factor * (image - luma)


# For each of views.JITTER_KINDS: brightness, contrast, saturation, hue.
JITTER_OPERATIONS: dict[
    str, tuple[Callable[[tf.Tensor, tf.Tensor], tf.Tensor], ...]
] = {
    "torchvision": (
        lambda image, factor: factor * image,
        _contrast_of_luma,
        _saturation_of_luma,
        tf.image.adjust_hue,
    ),
    "tensorflow": (
        tf.image.adjust_brightness,
        tf.image.adjust_contrast,
        tf.image.adjust_saturation,
        tf.image.adjust_hue,
    ),
}


def apply_jitter(
    image: tf.Tensor, amounts: list[tf.Tensor], order: tf.Tensor, *, kind: str
) -> tf.Tensor:
    """The four operations one after the other, clipped to [0, 1] after each.

    They run on floats. The view becomes 8 bits again once, after the last of them, as in
    the official code; done after each, the views would be a grey level darker.

    Args:
      image: `[H, W, 3]` uint8.
      amounts: of brightness, contrast, saturation and hue.
      order: `[4]`, the numbers 0..3 of the operations in the order in which they run.
      kind: a name in `views.JITTER_KINDS`.

    Returns:
      `[H, W, 3]` uint8.
    """
    x = tf.cast(image, tf.float32) / 255.0
    for place in range(4):
        branches = [
            functools.partial(operation, x, amount)
            for operation, amount in zip(JITTER_OPERATIONS[kind], amounts, strict=True)
        ]
        x = tf.ensure_shape(tf.switch_case(order[place], branches), image.shape)
        x = tf.clip_by_value(x, 0.0, 1.0)
    # As tf.image.convert_image_dtype: what the jitter leaves alone keeps its value.
    return tf.cast(x * 255.5, tf.uint8)


def color_jitter(
    image: tf.Tensor,
    seed: tf.Tensor,
    *,
    strength: float,
    probability: float,
    kind: str = "torchvision",
) -> tf.Tensor:
    """`color.color_jitter` for a view whose policy comes after it, on the host.

    Args:
      image: `[H, W, 3]` uint8.
      seed: `[2]` integers.
      strength: s: factors in `[max(0, 1 - 0.8 s), 1 + 0.8 s]`, hue in +-0.2 s. What
        TensorFlow's jitter adds to the brightness is in +-0.8 s.
      probability: of jittering at all.
      kind: a name in `views.JITTER_KINDS`.
    """
    drawn = tf.random.stateless_uniform([5], tf.random.fold_in(seed, 0))
    order = tf.random.experimental.stateless_shuffle(
        tf.range(4), tf.cast(tf.random.fold_in(seed, 1), tf.int32)
    )
    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    factor = low + (high - low) * drawn[:3]
    bright = factor[0]
    if kind == "tensorflow":
        bright = 0.8 * strength * (2 * drawn[0] - 1)
    amounts = [bright, factor[1], factor[2], 0.2 * strength * (2 * drawn[3] - 1)]
    return tf.cond(
        drawn[4] < probability,
        lambda: apply_jitter(image, amounts, order, kind=kind),
        lambda: image,
    )
