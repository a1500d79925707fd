"""Operations on an image in TensorFlow, of which the policies on the host are made.

They take one view `[H, W, 3]` uint8 and an argument in their own unit; what that is at the
levels of a policy, operations.py says. TensorFlow is imported at the top, so nothing
imports this module before host.py does. policies.py has the same operations in the jitted
step, bit for bit.

Source: tensorflow/models, official/legacy/image_classification/augment.py, which the
official code of SupCon uses. Contrast alone differs from it, see `contrast`.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from supcon_jax.data.operations import FACTOR_STEPS, FILL, LUMA, LUMA_PER_MILLE


def _truncate_to_uint8(values: tf.Tensor) -> tf.Tensor:
    # Not rounded: Pillow and the official code cut off the fraction.
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


def _rows(image: tf.Tensor) -> tf.Tensor:
    """`[H, W, 3]` as `[H, 3 W]`: TensorFlow is slow where the last axis has length 3."""
    shape = tf.shape(image)
    return tf.reshape(image, [shape[0], shape[1] * 3])


def _for_rows(channels: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
    """A value a channel, `[3]`, as it meets the columns of `_rows`, `[3 W]`."""
    return tf.tile(channels, tf.shape(image)[1:2])


def _over_pixels(reduce: Callable, image: tf.Tensor) -> tf.Tensor:
    """`[3]`: a reduction over all pixels of each channel, as floats."""
    columns = tf.reshape(reduce(_rows(image), axis=0), [-1, 3])
    return tf.cast(reduce(columns, axis=0), tf.float32)


def autocontrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel to 0..255; a channel of one value stays."""
    low = _over_pixels(tf.reduce_min, image)
    high = _over_pixels(tf.reduce_max, image)
    scale = tf.where(high > low, 255.0 / tf.maximum(high - low, 1.0), 1.0)
    shift = tf.where(high > low, -low * scale, 0.0)
    x = tf.cast(_rows(image), tf.float32)
    stretched = x * _for_rows(scale, image) + _for_rows(shift, image)
    return tf.reshape(_truncate_to_uint8(stretched), tf.shape(image))


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Makes each channel's histogram as flat as a map of its levels can.

    With h the histogram, s = (sum of h without its last non-empty level) // 255:
    `table[v] = (s // 2 + sum_{u < v} h[u]) // s`; nothing changes where s is 0.
    """
    offset = _for_rows(tf.constant([0, 256, 512]), image)
    index = tf.reshape(tf.cast(_rows(image), tf.int32) + offset, [-1])
    counts = tf.math.bincount(index, minlength=768, maxlength=768)
    counts = tf.reshape(counts, [3, 256])
    levels = tf.range(256)
    last = tf.reduce_max(tf.where(counts > 0, levels, -1), axis=1)
    step = (tf.reduce_sum(counts, 1) - tf.gather(counts, last, batch_dims=1)) // 255
    before = tf.cumsum(counts, axis=1, exclusive=True)
    table = (before + step[:, None] // 2) // tf.maximum(step, 1)[:, None]
    table = tf.where(step[:, None] > 0, tf.clip_by_value(table, 0, 255), levels)
    table = tf.reshape(tf.cast(table, tf.uint8), [-1])
    return tf.reshape(tf.gather(table, index), tf.shape(image))


def invert(image: tf.Tensor) -> tf.Tensor:
    """`255 - x`."""
    return 255 - image


def posterize(image: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keeps the highest `bits` of 8; with 0 the image is black."""
    mask = tf.cast(
        256 - tf.bitwise.left_shift(1, 8 - tf.cast(bits, tf.int32)), tf.uint8
    )
    return tf.bitwise.bitwise_and(image, mask)


def solarize(image: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
    """Inverts values at or above `threshold`; 256 counts as 0.

    So it is in the official code, whose 8-bit threshold overflows: at level 10 it inverts
    the whole image, which Pillow would leave alone.
    """
    return pillow_solarize(image, tf.cast(threshold, tf.int32) % 256)


def pillow_solarize(image: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
    """Inverts values at or above `threshold`; 256 leaves the image alone."""
    threshold = tf.cast(threshold, tf.int32)
    some = tf.cast(threshold < 256, tf.uint8)
    # Of 256 only the lowest 8 bits are left.
    reached = tf.cast(image >= tf.cast(threshold % 256, tf.uint8), tf.uint8)
    # 255 - x flips every bit; tf.where is ten times slower than arithmetic.
    return tf.bitwise.bitwise_xor(image, 255 * some * reached)


def solarize_add(
    image: tf.Tensor, addition: tf.Tensor, threshold: int = 128
) -> tf.Tensor:
    """Adds `addition` (0..255) to values below `threshold`."""
    addition = tf.cast(addition, tf.uint8)
    below = tf.cast(image < threshold, tf.uint8)
    return image + below * tf.minimum(addition, 255 - image)


def _in_steps(factor: tf.Tensor) -> tf.Tensor:
    """Rounded to what operations.py calls steps, so that sums of products are exact."""
    return tf.round(factor * FACTOR_STEPS) / FACTOR_STEPS


def color(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Saturation: `luma + factor (x - luma)`; 0 is grey, 1 the image."""
    x = tf.cast(tf.reshape(image, [-1, 3]), tf.float32)
    weights = _in_steps((1.0 - _in_steps(factor)) * tf.constant(LUMA))
    # One product with a 3 x 3 matrix: each channel gets the weighted luma and of itself
    # what makes the weights' sum 1, so that grey stays as it is.
    mixture = weights[:, None] + (1.0 - tf.reduce_sum(weights)) * tf.eye(3)
    mixed = tf.matmul(x, mixture) + 2.0**-10
    return tf.reshape(_truncate_to_uint8(mixed), tf.shape(image))


def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """`m + factor (x - m)`, with m the mean luma; 0 is flat, 1 the image.

    As Pillow. The official code takes (number of pixels) / 256 for m, a defect: 196 for
    every image at 224 x 224.
    """
    columns = tf.reduce_sum(tf.cast(_rows(image), tf.int32), axis=0)
    sums = tf.cast(tf.reduce_sum(tf.reshape(columns, [-1, 3]), axis=0), tf.int64)
    # In whole numbers, so that no rounding of floats decides between two levels.
    pixels = tf.cast(tf.size(image) // 3, tf.int64)
    total = tf.reduce_sum(sums * tf.constant(LUMA_PER_MILLE, tf.int64))
    luma = tf.cast((2 * total + 1000 * pixels) // (2000 * pixels), tf.float32)
    return _truncate_to_uint8(
        tf.cast(image, tf.float32) * factor + luma * (1.0 - factor)
    )


def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """`factor x`; 0 is black, 1 the image."""
    return _truncate_to_uint8(tf.cast(image, tf.float32) * factor)


def sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """`s + factor (x - s)`, with s smoothed by [1 1 1; 1 5 1; 1 1 1] / 13.

    The outermost pixels, where the filter does not fit, stay.
    """
    x = tf.cast(image, tf.float32)
    factor = _in_steps(factor)
    height, width = tf.shape(image)[0], tf.shape(image)[1]

    def sharpened() -> tf.Tensor:
        columns = x[:-2] + x[1:-1] + x[2:]
        box = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:]
        inner = x[1:-1, 1:-1]
        smooth = tf.floor((box + 4.0 * inner) / 13.0 + 0.5)
        inner = _truncate_to_uint8(smooth + factor * (inner - smooth))
        middle = tf.concat([image[1:-1, :1], inner, image[1:-1, -1:]], axis=1)
        return tf.concat([image[:1], middle, image[-1:]], axis=0)

    return tf.cond(tf.minimum(height, width) < 3, lambda: image, sharpened)


def _transform(image: tf.Tensor, matrix: list[tf.Tensor | float]) -> tf.Tensor:
    """`out[y, x] = in[y', x']`, (x', y') = matrix (x, y, 1); nearest neighbour.

    Pixels are gathered whole: half the time of TensorFlow's ImageProjectiveTransform.
    """
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    a, b, c, d, e, f = matrix
    x = tf.range(tf.cast(width, tf.float32))[None]
    y = tf.range(tf.cast(height, tf.float32))[:, None]
    x, y = a * x + b * y + c, d * x + e * y + f
    column = tf.cast(tf.floor(x + 0.5), tf.int32)
    row = tf.cast(tf.floor(y + 0.5), tf.int32)
    # Halves are rounded away from zero, so a coordinate of -0.5 lies outside.
    inside = (x > -0.5) & (column < width) & (y > -0.5) & (row < height)
    # One pixel of filling is appended after the last pixel of the image.
    index = tf.where(inside, row * width + column, height * width)
    pixels = tf.reshape(image, [-1, 3])
    pixels = tf.concat([pixels, tf.fill([1, 3], tf.constant(FILL, tf.uint8))], axis=0)
    return tf.gather(pixels, index)


def rotate(image: tf.Tensor, degrees: tf.Tensor) -> tf.Tensor:
    """Turns the image about its centre, counter-clockwise."""
    radians = degrees * (3.141592653589793 / 180)
    cos, sin = tf.cos(radians), tf.sin(radians)
    shape = tf.cast(tf.shape(image), tf.float32) - 1
    height, width = shape[0], shape[1]
    x = (width - (cos * width - sin * height)) / 2
    y = (height - (sin * width + cos * height)) / 2
    return _transform(image, [cos, -sin, x, sin, cos, y])


def shear_x(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    """`out[y, x] = in[y, x + level y]`."""
    return _transform(image, [1, level, 0, 0, 1, 0])


def shear_y(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    """`out[y, x] = in[y + level x, x]`."""
    return _transform(image, [1, 0, 0, level, 1, 0])


def translate_x(image: tf.Tensor, pixels: tf.Tensor) -> tf.Tensor:
    """`out[y, x] = in[y, x + pixels]`."""
    return _transform(image, [1, 0, pixels, 0, 1, 0])


def translate_y(image: tf.Tensor, pixels: tf.Tensor) -> tf.Tensor:
    """`out[y, x] = in[y + pixels, x]`."""
    return _transform(image, [1, 0, 0, 0, 1, pixels])


def cutout(image: tf.Tensor, half: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Greys a square of side `2 half` about a random pixel, cut off at the border."""
    half = tf.cast(half, tf.int32)
    size = tf.shape(image)[:2]
    centre = tf.cast(
        tf.random.stateless_uniform([2], seed) * tf.cast(size, tf.float32), tf.int32
    )
    row, column = (
        tf.cast(
            (place >= centre[axis] - half) & (place < centre[axis] + half), tf.uint8
        )
        for axis, place in enumerate((tf.range(size[0]), tf.range(size[1])))
    )
    inside = row[:, None] * tf.repeat(column, 3)[None]
    cut = _rows(image) * (1 - inside) + FILL * inside
    return tf.reshape(cut, tf.shape(image))


# name -> (view, argument in its own unit) -> view. Cutout needs a seed as well.
FUNCTIONS: dict[str, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = {
    "AutoContrast": lambda image, _: autocontrast(image),
    "Equalize": lambda image, _: equalize(image),
    "Invert": lambda image, _: invert(image),
    "Rotate": rotate,
    "Posterize": posterize,
    "Solarize": solarize,
    "PillowSolarize": pillow_solarize,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "SolarizeAdd": solarize_add,
}
