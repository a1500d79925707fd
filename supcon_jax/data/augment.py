"""Augmentations in JAX, inside the jitted step.

Images are floats in [0, 1]. Every random choice of a view is a function of
(seed, epoch, example index, view) alone, so a resumed run and a run on another number
of devices see the same pixels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Weights of red, green and blue in the luma (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)


def view_keys(seed: int, ids: jax.Array, views: int) -> jax.Array:
    """One PRNG key for every view: `fold_in(fold_in(fold_in(seed, epoch), index), v)`.

    Args:
      seed: the run's seed.
      ids: `[B, 2]` int32, epoch and example index.
      views: number of views V.

    Returns:
      `[B, V]` keys.
    """
    base = jax.random.key(seed)

    def fold(example: jax.Array, view: jax.Array) -> jax.Array:
        key = jax.random.fold_in(base, example[0])
        return jax.random.fold_in(jax.random.fold_in(key, example[1]), view)

    over_views = jax.vmap(fold, in_axes=(None, 0))
    return jax.vmap(over_views, in_axes=(0, None))(ids, jnp.arange(views))


def random_resized_crop(
    key: jax.Array, image: jax.Array, *, area: tuple[float, float]
) -> jax.Array:
    """Crops a random rectangle and resizes it (bilinear) to the image's own size.

    The rectangle covers a share of the area uniform in `area`, with an aspect ratio
    log-uniform in [3/4, 4/3]; sides are clipped to the image.

    Args:
      key: PRNG key.
      image: `[H, W, 3]`.
      area: smallest and largest share of the image's area.

    Source: Szegedy et al., arXiv 1409.4842; torchvision's RandomResizedCrop.
    """
    height, width, _ = image.shape
    area_key, aspect_key, y_key, x_key = jax.random.split(key, 4)
    share = jax.random.uniform(area_key, (), minval=area[0], maxval=area[1])
    log_aspect = jax.random.uniform(
        aspect_key, (), minval=jnp.log(3 / 4), maxval=jnp.log(4 / 3)
    )
    crop_h = jnp.minimum(jnp.sqrt(share * jnp.exp(-log_aspect)), 1.0) * height
    crop_w = jnp.minimum(jnp.sqrt(share * jnp.exp(log_aspect)), 1.0) * width
    top = jax.random.uniform(y_key) * (height - crop_h)
    left = jax.random.uniform(x_key) * (width - crop_w)
    scale = jnp.stack([height / crop_h, width / crop_w])
    return jax.image.scale_and_translate(
        image,
        image.shape,
        (0, 1),
        scale,
        -jnp.stack([top, left]) * scale,
        method="linear",
        antialias=False,
    )


def random_flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """Mirrors an image `[H, W, 3]` left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def to_grayscale(image: jax.Array) -> jax.Array:
    """The luma of an image `[H, W, 3]`, in all three channels."""
    luma = jnp.sum(image * jnp.asarray(LUMA, image.dtype), axis=-1, keepdims=True)
    return jnp.broadcast_to(luma, image.shape)


def _blend(image: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(other + factor * (image - other), 0.0, 1.0)


def adjust_brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales all values: `clip(factor x)`."""
    return _blend(image, jnp.zeros_like(image), factor)


def adjust_contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales the distance to the mean luma: `clip(m + factor (x - m))`."""
    return _blend(image, jnp.mean(to_grayscale(image)), factor)


def adjust_saturation(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales the distance to the pixel's luma: `clip(l + factor (x - l))`."""
    return _blend(image, to_grayscale(image), factor)


def adjust_hue(image: jax.Array, shift: jax.Array) -> jax.Array:
    """Turns the hue of the HSV colour by `shift` (1 is the whole circle)."""
    largest, smallest = jnp.max(image, axis=-1), jnp.min(image, axis=-1)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    chroma = largest - smallest
    safe = jnp.where(chroma > 0, chroma, 1.0)
    sixth = jnp.where(
        largest == red,
        (green - blue) / safe,
        jnp.where(largest == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    # Colour n of (5, 3, 1) at hue h: V - C max(0, min(k, 4 - k, 1)), k = (n + h) mod 6.
    turned = sixth + 6 * shift
    k = jnp.mod(jnp.asarray([5.0, 3.0, 1.0], image.dtype) + turned[..., None], 6.0)
    falloff = jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)
    return largest[..., None] - chroma[..., None] * falloff


def color_jitter(key: jax.Array, image: jax.Array, *, strength: float) -> jax.Array:
    """Changes brightness, contrast, saturation and hue in random order.

    With s the strength: factors uniform in `[max(0, 1 - 0.8 s), 1 + 0.8 s]`, the hue
    shift in `[-0.2 s, 0.2 s]`; values are clipped to [0, 1] after each operation.

    Source: Chen et al., arXiv 2002.05709, appendix A.
    """
    order_key, factor_key, hue_key = jax.random.split(key, 3)
    spread = 0.8 * strength
    factors = jax.random.uniform(
        factor_key, (3,), minval=max(0.0, 1 - spread), maxval=1 + spread
    )
    shift = jax.random.uniform(
        hue_key, (), minval=-0.2 * strength, maxval=0.2 * strength
    )
    operations = (
        lambda x: adjust_brightness(x, factors[0]),
        lambda x: adjust_contrast(x, factors[1]),
        lambda x: adjust_saturation(x, factors[2]),
        lambda x: adjust_hue(x, shift),
    )
    for choice in jax.random.permutation(order_key, len(operations)):
        image = jax.lax.switch(choice, operations, image)
    return image


def _maybe(key: jax.Array, probability: float, new: jax.Array, old: jax.Array):
    return jnp.where(jax.random.bernoulli(key, probability), new, old)


def augment_view(
    key: jax.Array,
    image: jax.Array,
    *,
    crop_area: tuple[float, float] | None,
    flip: bool,
    jitter_strength: float,
    jitter_probability: float,
    grayscale_probability: float,
) -> jax.Array:
    """One view `[H, W, 3]` of one image: crop, flip, colour jitter, grayscale.

    `crop_area=None` and `flip=False` leave the geometry alone (the host cropped).
    """
    crop_key, flip_key, chance_key, jitter_key, gray_key = jax.random.split(key, 5)
    if crop_area is not None:
        image = random_resized_crop(crop_key, image, area=crop_area)
    if flip:
        image = random_flip(flip_key, image)
    if jitter_strength > 0 and jitter_probability > 0:
        jittered = color_jitter(jitter_key, image, strength=jitter_strength)
        image = _maybe(chance_key, jitter_probability, jittered, image)
    if grayscale_probability > 0:
        image = _maybe(gray_key, grayscale_probability, to_grayscale(image), image)
    return image


def augment_batch(
    images: jax.Array,
    ids: jax.Array,
    *,
    seed: int,
    views: int,
    crop_area: tuple[float, float] | None = None,
    flip: bool = False,
    jitter_strength: float = 0.0,
    jitter_probability: float = 0.8,
    grayscale_probability: float = 0.0,
) -> jax.Array:
    """Augments a batch; several views are made of one image, or refined one by one.

    Args:
      images: `[B, 1, H, W, 3]` uint8 whole images, or `[B, V, H, W, 3]` views that
        the host has cropped and flipped already.
      ids: `[B, 2]` int32, epoch and example index (the source of randomness).
      seed: the run's seed.
      views: number of views V.
      crop_area: shares of the area for `random_resized_crop`; None for no crop.
      flip: mirror at random.
      jitter_strength: s of `color_jitter`; 0 turns it off.
      jitter_probability: share of views that are jittered.
      grayscale_probability: share of views that lose their colour.

    Returns:
      `[B, V, H, W, 3]` float32 in [0, 1].
    """
    keys = view_keys(seed, ids, views)
    images = images.astype(jnp.float32) / 255.0
    images = jnp.broadcast_to(images, (images.shape[0], views, *images.shape[2:]))
    one = functools.partial(
        augment_view,
        crop_area=crop_area,
        flip=flip,
        jitter_strength=jitter_strength,
        jitter_probability=jitter_probability,
        grayscale_probability=grayscale_probability,
    )
    return jax.vmap(jax.vmap(one))(keys, images)


def normalize(
    images: jax.Array, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """`(x - mean) / std` for each channel of images in [0, 1]."""
    return (images - jnp.asarray(mean)) / jnp.asarray(std)
