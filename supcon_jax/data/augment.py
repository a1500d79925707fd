"""Augmentations in JAX, inside the jitted step.

Images are floats in [0, 1]. Every random choice of a view is a function of
(seed, epoch, example index, view) alone, so a resumed run and a run on another number
of devices see the same pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from supcon_jax.data.color import color_jitter, to_grayscale
from supcon_jax.data.policies import apply_policy
from supcon_jax.data.views import BLUR_BORDERS, TORCHVISION_CROP, Augmentation

# The number of the random stream of Mixup and CutMix. A view's own augmentation uses
# other keys, so that the two are drawn apart.
MIXING_STREAM = 1000
EXTRA_STREAM = 2000
POLICY_STREAM = 3000


def view_keys(seed: int | jax.Array, ids: jax.Array, views: int) -> jax.Array:
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

    The rectangle is drawn as `views.TORCHVISION_CROP` says: a share of the area uniform
    in `area` and an aspect ratio log-uniform in [3/4, 4/3], ten times. The first that
    fits is taken, or else the largest central one with an aspect ratio in that range.
    Corners may lie between pixels.

    Args:
      key: PRNG key.
      image: `[H, W, 3]`.
      area: smallest and largest share of the image's area.

    Source: Szegedy et al., arXiv 1409.4842; torchvision's RandomResizedCrop.
    """
    height, width, _ = image.shape
    least, most = TORCHVISION_CROP.aspect_ratios
    shape_key, place_key = jax.random.split(key)
    draws = jax.random.uniform(shape_key, (2, TORCHVISION_CROP.attempts))
    share = area[0] + (area[1] - area[0]) * draws[0]
    aspect = jnp.exp(jnp.log(least / most) * (draws[1] - 0.5))
    crop_w = jnp.sqrt(share * height * width * aspect)
    crop_h = jnp.sqrt(share * height * width / aspect)
    fits = (crop_w <= width) & (crop_h <= height)
    first = jnp.argmax(fits)
    found = jnp.any(fits)
    ratio = min(max(width / height, least), most)
    crop_w = jnp.where(found, crop_w[first], min(width, height * ratio))
    crop_h = jnp.where(found, crop_h[first], min(height, width / ratio))
    place = jnp.where(found, jax.random.uniform(place_key, (2,)), 0.5)
    top, left = place * jnp.stack([height - crop_h, width - crop_w])
    rows = _bilinear(top, crop_h, height, image.dtype)
    columns = _bilinear(left, crop_w, width, image.dtype)
    return jnp.einsum(
        "yi,ijc,xj->yxc", rows, image, columns, precision=jax.lax.Precision.HIGHEST
    )


def _bilinear(
    start: jax.Array, length: jax.Array, size: int, dtype: jnp.dtype
) -> jax.Array:
    """`[size, size]`: weights that stretch `length` pixels from `start` over all.

    Pixel centres lie at halves; outside the crop its outermost pixels count on.
    """
    source = (jnp.arange(size) + 0.5) * length / size - 0.5
    source = start + jnp.clip(source, 0.0, jnp.maximum(length - 1, 0.0))
    distance = jnp.abs(source[:, None] - jnp.arange(size))
    return jnp.maximum(1.0 - distance, 0.0).astype(dtype)


def random_flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """Mirrors an image `[H, W, 3]` left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def gaussian_blur(
    image: jax.Array, sigma: jax.Array, *, border: str = "grey"
) -> jax.Array:
    """Blurs an image `[H, W, 3]` with a Gaussian of standard deviation `sigma` pixels.

    The kernel is cut off at a side of H // 10, made odd (23 at 224 pixels). The blur is two
    products with banded matrices: accelerators are fastest at these, and a CPU takes a
    seventh of the time of a convolution channel by channel.

    Args:
      image: `[H, W, 3]` in [0, 1].
      sigma: standard deviation in pixels.
      border: what lies outside the image. "grey": 0.5 everywhere, as in the official code,
        which blurs pixels in [-1, 1] and fills with zeros. "edge": the nearest pixel of
        the image, as in Pillow's blur. (Pillow makes its kernel of three boxes, which
        differs a little from a Gaussian.)

    Raises:
      ValueError: there is no such border.

    Source: Chen et al., arXiv 2002.05709, appendix A; google-research/supcon,
    preprocessing.py; facebookresearch/moco, moco/loader.py.
    """
    if border not in BLUR_BORDERS:
        raise ValueError(f"got border={border!r}; allowed: {', '.join(BLUR_BORDERS)}")
    outside = 0.5 if border == "grey" else 0.0
    radius = (image.shape[0] // 10) // 2
    offsets = jnp.arange(-radius, radius + 1)
    kernel = jnp.exp(-0.5 * (offsets / sigma) ** 2)
    total = jnp.sum(kernel)

    def band(size: int) -> jax.Array:
        pixels = jnp.arange(size)
        distance = pixels[:, None] - pixels
        weights = jnp.exp(-0.5 * (distance / sigma) ** 2) / total
        weights = jnp.where(jnp.abs(distance) <= radius, weights, 0.0)
        if border == "grey":
            return weights
        # The weights of all pixels before the first count for the first, likewise the last.
        reached = pixels[:, None] + offsets
        before = jnp.sum(jnp.where(reached < 0, kernel, 0.0), axis=1) / total
        after = jnp.sum(jnp.where(reached >= size, kernel, 0.0), axis=1) / total
        weights = weights + before[:, None] * (pixels == 0)
        return weights + after[:, None] * (pixels == size - 1)

    blurred = jnp.einsum(
        "yi,ijc,xj->yxc",
        band(image.shape[0]).astype(image.dtype),
        image - outside,
        band(image.shape[1]).astype(image.dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    return blurred + outside


def random_blur(key: jax.Array, image: jax.Array, *, border: str = "grey") -> jax.Array:
    """`gaussian_blur` with sigma uniform in [0.1, 2].

    Drawn for every view; the official code on TPU drew one sigma for a core's batch.
    """
    sigma = jax.random.uniform(key, (), minval=0.1, maxval=2.0)
    return gaussian_blur(image, sigma, border=border)


def _maybe(key: jax.Array, probability: float, new: jax.Array, old: jax.Array):
    return jnp.where(jax.random.bernoulli(key, probability), new, old)


def cutout(key: jax.Array, image: jax.Array) -> jax.Array:
    """Hides a square of half the image's side behind mid grey.

    Its centre is uniform over the pixels; what lies outside the image is cut off.

    Source: DeVries & Taylor, arXiv 1708.04552 (16 pixels on CIFAR-10).
    """
    height, width, _ = image.shape
    place = jax.random.uniform(key, (2,))
    inside = []
    for size, part in ((height, place[0]), (width, place[1])):
        from_start = jnp.arange(size) - jnp.floor(size * part) + size // 4
        inside.append((from_start >= 0) & (from_start < size // 2))
    return jnp.where((inside[0][:, None] & inside[1])[..., None], 0.5, image)


# What `augment.extra` of a config names: `(key, image [H, W, 3] in [0, 1]) -> image`. A new
# augmentation is a function and an entry.
TRANSFORMS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"cutout": cutout}


def augment_view(
    key: jax.Array, image: jax.Array, augmentation: Augmentation
) -> jax.Array:
    """One view `[H, W, 3]`: crop, flip, jitter, policy, grayscale, blur, extra ones.

    A policy works on whole numbers in 0..255, so a view is rounded before it, and after a
    jitter before it, where and as the host rounds it.
    """
    options = augmentation
    keys = jax.random.split(key, 6)
    crop_key, flip_key, jitter_key, gray_key, some_key, blur_key = keys
    if options.crop_area is not None:
        image = random_resized_crop(crop_key, image, area=options.crop_area)
    if options.flip:
        image = random_flip(flip_key, image)
    policy = options.policy != "none"
    if policy:
        image = jnp.floor(255.0 * image + 0.5) / 255.0
    if options.jitters:
        image = color_jitter(
            jitter_key,
            image,
            strength=options.jitter_strength,
            probability=options.jitter_probability,
            kind=options.jitter_kind,
        )
    if policy:
        # 255.5 keeps every value that the jitter left alone, see host_color.apply_jitter.
        levels = jnp.floor(255.5 * image)
        policy_key = jax.random.fold_in(key, POLICY_STREAM)
        image = apply_policy(policy_key, levels, options).astype(image.dtype) / 255.0
    if options.grayscale_probability > 0:
        grey = to_grayscale(image)
        image = _maybe(gray_key, options.grayscale_probability, grey, image)
    if options.blur_probability > 0:
        blurred = random_blur(blur_key, image, border=options.blur_border)
        image = _maybe(some_key, options.blur_probability, blurred, image)
    for number, name in enumerate(options.extra):
        extra_key = jax.random.fold_in(key, EXTRA_STREAM + number)
        image = TRANSFORMS[name](extra_key, image)
    return image


def augment_batch(
    images: jax.Array,
    ids: jax.Array,
    augmentation: Augmentation,
    *,
    seed: int | jax.Array,
    views: int,
    chunk_size: int | None = None,
) -> jax.Array:
    """Augments a batch; several views are made of one image, or refined one by one.

    Args:
      images: `[B, 1, H, W, 3]` uint8 whole images, or `[B, V, H, W, 3]` views that
        the host has cropped and flipped already.
      ids: `[B, 2]` int32, epoch and example index (the source of randomness).
      augmentation: what is done to each view.
      seed: the run's seed.
      views: number of views V.
      chunk_size: images augmented at a time; None: all at once.

    Returns:
      `[B, V, H, W, 3]` float32 in [0, 1].
    """
    view = functools.partial(augment_view, augmentation=augmentation)

    def example(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        image, keys = inputs
        image = image.astype(jnp.float32) / 255.0
        return jax.vmap(view)(keys, jnp.broadcast_to(image, (views, *image.shape[1:])))

    inputs = images, view_keys(seed, ids, views)
    if chunk_size is None or chunk_size >= len(images):
        return jax.vmap(example)(inputs)
    return jax.lax.map(example, inputs, batch_size=chunk_size)


def mix_examples(
    images: jax.Array,
    labels: jax.Array,
    ids: jax.Array,
    *,
    seed: int | jax.Array,
    num_classes: int,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Mixup and CutMix: each image with its neighbour in the batch.

    Images 0 and 1, 2 and 3, ... are mixed with each other, so that no device needs
    another's images (of an odd number the last one stays alone).

    Mixup: `x = l x_i + (1 - l) x_j`, `q = l onehot(y_i) + (1 - l) onehot(y_j)`, with
    l ~ Beta(alpha, alpha). CutMix: a box of share 1 - l of the area, about a random pixel
    and cut off at the border, shows x_j; l is then the share that still shows x_i. With
    both, each image draws one of them. All views of an image have the same l and box.

    Args:
      images: `[B, V, H, W, 3]`.
      labels: `[B]` integers.
      ids: `[B, 2]` int32, epoch and example index (the source of randomness).
      seed: the run's seed.
      num_classes: C.
      mixup_alpha, cutmix_alpha: 0 turns one off.

    Returns:
      Images like `images`, and targets `[B, C]` float32 whose rows sum to 1.

    Raises:
      ValueError: both alphas are 0.

    Source: Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899.
    """
    if mixup_alpha <= 0 and cutmix_alpha <= 0:
        raise ValueError("got mixup_alpha=0 and cutmix_alpha=0; one must be above 0")
    height, width = images.shape[2:4]

    def shares(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What each pixel `[H, W]` and the target keep of the first image."""
        kind_key, beta_key, place_key = jax.random.split(key, 3)
        cut = jax.random.bernoulli(kind_key) if mixup_alpha > 0 else True
        cut = cut if cutmix_alpha > 0 else False
        alpha = jnp.where(cut, cutmix_alpha, mixup_alpha)
        kept = jax.random.beta(beta_key, alpha, alpha)
        half = jnp.sqrt(1 - kept) / 2
        place = jax.random.uniform(place_key, (2,))
        inside = [
            jnp.abs(jnp.arange(size) + 0.5 - centre * size) < half * size
            for size, centre in ((height, place[0]), (width, place[1]))
        ]
        box = inside[0][:, None] & inside[1]
        mask = jnp.where(cut, 1.0 - box, kept)
        return mask, jnp.where(cut, jnp.mean(mask), kept)

    keys = jax.vmap(lambda key: jax.random.fold_in(key, MIXING_STREAM))(
        view_keys(seed, ids, 1)[:, 0]
    )
    mask, kept = jax.vmap(shares)(keys)
    mask, kept = mask[:, None, :, :, None].astype(images.dtype), kept[:, None]
    neighbour = np.minimum(np.arange(len(images)) ^ 1, len(images) - 1)
    onehot = jax.nn.one_hot(labels, num_classes)
    return (
        mask * images + (1 - mask) * images[neighbour],
        kept * onehot + (1 - kept) * onehot[neighbour],
    )


def normalize(
    images: jax.Array, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """`(x - mean) / std` for each channel of images in [0, 1]."""
    return (images - jnp.asarray(mean)) / jnp.asarray(std)
