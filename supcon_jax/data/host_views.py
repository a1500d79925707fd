"""One encoded image to uint8 views, or to its centre, in TensorFlow.

What host.py does with each image on all cores. TensorFlow is imported at the top, so nothing
imports this module before host.py does.
"""

from __future__ import annotations

import functools

import tensorflow as tf

from supcon_jax.data import autoaugment, host_color
from supcon_jax.data.views import TENSORFLOW_CROP, Augmentation

# An image whose long side is more than so many short ones is cropped as it is resized.
THIN = 4


def decode(encoded: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """RGB `[H, W, 3]` uint8 of a JPEG, PNG, WebP, BMP or GIF (its first frame).

    Grey, palette and CMYK images become RGB, an alpha channel is dropped. Where this
    differs from what Pillow shows, `images.for_tensorflow` has seen to it before.

    Args:
      encoded: the bytes.
      orientation: EXIF code 1..8; the image is turned upright.
    """
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    # An animated WebP has its frames on a first axis in spite of expand_animations.
    image = tf.cond(tf.rank(image) == 4, lambda: image[0], lambda: image)
    image = tf.ensure_shape(image, (None, None, 3))
    upright = {
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: tf.transpose(x, (1, 0, 2)),
        6: lambda x: tf.transpose(x, (1, 0, 2))[:, ::-1],
        7: lambda x: tf.transpose(x, (1, 0, 2))[::-1, ::-1],
        8: lambda x: tf.transpose(x, (1, 0, 2))[::-1],
    }
    branches = [
        functools.partial(upright.get(code, lambda x: x), image) for code in range(9)
    ]
    return tf.cond(
        orientation == 1,
        lambda: image,
        lambda: tf.switch_case(orientation, branches),
    )


def crop_and_augment(
    image: tf.Tensor,
    identity: tf.Tensor,
    augmentation: Augmentation,
    *,
    image_size: int,
    views: int,
    seed: int,
) -> tf.Tensor:
    """V random views `[V, S, S, 3]` of one decoded image `[H, W, 3]`, all uint8.

    Every choice is a function of (seed, epoch, index, view). The crop is drawn as
    `views.TENSORFLOW_CROP` says and resized bilinearly, without antialiasing. Unlike the
    official code, pixel centres lie at halves and values are rounded (docs/data.md). Then
    comes the flip and the policy, with the jitter before it.

    Args:
      image: `[H, W, 3]`.
      identity: `[2]` int32, (epoch, index).
      augmentation: the host's part, with a crop.
      image_size: side S.
      views: V.
      seed: the run's seed.
    """
    fold_in = tf.random.fold_in
    key = fold_in(tf.constant([seed, 0], tf.int32), identity[0])
    key = fold_in(key, identity[1])
    stack = []
    for number in range(views):
        view_key = fold_in(key, number)
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.shape(image),
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            fold_in(view_key, 0),
            min_object_covered=TENSORFLOW_CROP.least_covered,
            aspect_ratio_range=TENSORFLOW_CROP.aspect_ratios,
            area_range=augmentation.crop_area,
            max_attempts=TENSORFLOW_CROP.attempts,
        )
        view = _resize(tf.slice(image, begin, size), (image_size, image_size))
        view = _round_to_uint8(view)
        if augmentation.flip:
            mirror = tf.random.stateless_uniform([], fold_in(view_key, 1)) < 0.5
            view = _flip_if(mirror, view)
        stack.append(apply_policy(view, fold_in(view_key, 2), augmentation))
    return tf.stack(stack)


def apply_policy(
    view: tf.Tensor, seed: tf.Tensor, augmentation: Augmentation
) -> tf.Tensor:
    """The host's part after crop and flip: colour jitter, then the policy."""
    fold_in = tf.random.fold_in
    if augmentation.jitters:
        view = host_color.color_jitter(
            view,
            fold_in(seed, 0),
            strength=augmentation.jitter_strength,
            probability=augmentation.jitter_probability,
            kind=augmentation.jitter_kind,
        )
    if augmentation.policy == "auto_augment":
        return autoaugment.auto_augment(view, fold_in(seed, 1))
    if augmentation.policy == "trivial_augment":
        return autoaugment.trivial_augment(view, fold_in(seed, 1))
    if augmentation.policy == "rand_augment":
        return autoaugment.rand_augment(
            view,
            fold_in(seed, 1),
            layers=augmentation.layers,
            magnitude=augmentation.magnitude,
        )
    return view


def central_crop(
    image: tf.Tensor, identity: tf.Tensor, *, image_size: int, resize: int
) -> tf.Tensor:
    """The evaluation crop `[1, S, S, 3]`: short side to `resize`, then the centre.

    The official code truncates where this rounds, and its centre is half a pixel further
    if the rest is odd (docs/data.md).
    """
    del identity
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    target = tf.cast(tf.round(shape * resize / tf.reduce_min(shape)), tf.int32)
    first = (target - image_size) // 2

    def whole() -> tf.Tensor:
        top, left = tf.unstack(first)
        resized = _resize(image, target)
        return resized[top : top + image_size, left : left + image_size]

    # The resized image of a strip could fill the memory.
    thin = tf.reduce_max(target) > THIN * resize
    crop = tf.cond(thin, lambda: _resize_part(image, target, first, image_size), whole)
    return _round_to_uint8(crop)[None]


def _resize_part(
    image: tf.Tensor, target: tf.Tensor, first: tf.Tensor, size: int
) -> tf.Tensor:
    """A square `[size, size, 3]` of `_resize(image, target)`, bit for bit.

    Of an ordinary image, `tf.image.resize` makes the whole in a third of the time.

    Args:
      image: `[H, W, 3]`.
      target: `[2]` int32, height and width after the resize.
      first: `[2]` int32, where the square begins.
      size: its side.
    """
    sides = tf.shape(image)[:2]
    scale = tf.cast(sides, tf.float32) / tf.cast(target, tf.float32)
    centre = tf.cast(first[:, None] + tf.range(size), tf.float32) + 0.5
    place = centre * scale[:, None] - 0.5
    before = tf.floor(place)
    down, right = tf.unstack(place - before)
    (top, left), (bottom, other) = (
        tf.unstack(tf.clip_by_value(tf.cast(x, tf.int32), 0, sides[:, None] - 1))
        for x in (before, tf.math.ceil(place))
    )

    def row(index: tf.Tensor) -> tf.Tensor:
        pixels = tf.gather(image, index)
        a, b = (
            tf.cast(tf.gather(pixels, columns, axis=1), tf.float32)
            for columns in (left, other)
        )
        return a + (b - a) * right[None, :, None]

    above, below = row(top), row(bottom)
    return above + (below - above) * down[:, None, None]


def _resize(image: tf.Tensor, size) -> tf.Tensor:
    return tf.image.resize(image, size, method="bilinear")


def _round_to_uint8(image: tf.Tensor) -> tf.Tensor:
    # Bilinear values lie between those of the pixels, so rounding cannot leave 0..255.
    return tf.cast(image + 0.5, tf.uint8)


def _flip_if(mirror: tf.Tensor, view: tf.Tensor) -> tf.Tensor:
    return tf.cond(mirror, lambda: tf.reverse(view, [1]), lambda: view)
