"""Augmentations against loops; their randomness by statistics."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter

from supcon_jax.data import augment, color
from supcon_jax.data.views import Augmentation
from tests.photos import photo

RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(size=(6, 5, 3)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(7), 2000)


def assert_uniform(samples, low, high, *, slack=1e-4):
    """Kolmogorov-Smirnov at a level that a right sampler fails once in 10^5 seeds."""
    samples = np.sort(np.asarray(samples, np.float64))
    assert low - slack <= samples[0] and samples[-1] <= high + slack
    expected = (samples - low) / (high - low)
    empirical = np.arange(1, len(samples) + 1) / len(samples)
    distance = np.abs(empirical - expected).max()
    assert distance < 2.47 / math.sqrt(len(samples)), distance


def assert_share(hits, probability):
    """Within 4.5 standard deviations of a binomial share."""
    spread = math.sqrt(probability * (1 - probability) / len(hits))
    assert abs(np.mean(hits) - probability) <= 4.5 * spread, np.mean(hits)


# --- crop ---


def crops(image, area):
    """The crops of one image for all of KEYS."""
    crop = functools.partial(augment.random_resized_crop, area=area)
    return np.asarray(jax.jit(jax.vmap(crop, in_axes=(0, None)))(KEYS, image))


def rectangles(size, area):
    """(top, left, height, width) of the crops, read off ramps of coordinates.

    A bilinear resize of a ramp is a ramp: pixel j shows `left + (j + 1/2) w / W - 1/2`.
    """
    rows, columns = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    ramps = np.stack([rows, columns, rows], axis=-1).astype(np.float32)
    out = crops(ramps, area).astype(np.float64)
    found = []
    middle = slice(size // 4, 3 * size // 4)  # away from the clamped border
    centers = np.arange(size)[middle] + 0.5
    for line in (out[:, middle, size // 2, 0], out[:, size // 2, middle, 1]):
        slope = (line[:, -1] - line[:, 0]) / (centers[-1] - centers[0])
        np.testing.assert_allclose(
            line, line[:, :1] + slope[:, None] * (centers - centers[0]), atol=1e-3
        )
        found.append((line[:, 0] + 0.5 - slope * centers[0], slope * size))
    (top, height), (left, width) = found
    return top, left, height, width


def test_crop_covers_a_random_share_with_a_random_aspect():
    size, area = 16, (0.1, 0.5)  # at most 0.82 of a side: every first attempt fits
    top, left, height, width = rectangles(size, area)
    assert_uniform(height * width / size**2, *area)
    assert_uniform(np.log(width / height), math.log(3 / 4), math.log(4 / 3))
    assert_uniform(top / (size - height), 0, 1)
    assert_uniform(left / (size - width), 0, 1)
    corners = np.stack([top / (size - height), left / (size - width)])
    assert abs(np.corrcoef(corners)[0, 1]) < 0.1


def test_crop_stays_inside_the_image():
    top, left, height, width = rectangles(16, (0.8, 1.0))
    assert min(top.min(), left.min()) > -1e-2
    assert max((top + height).max(), (left + width).max()) < 16 + 1e-2
    # Attempts that do not fit are drawn again, not clipped to the image.
    assert np.mean(width > 15.99) < 0.05 and np.mean(width > 15) > 0.1


@pytest.mark.parametrize(
    ("shape", "expected"), [((8, 32), (8, 32 / 3)), ((9, 9), (9, 9))]
)
def test_crop_falls_back_to_the_centre(shape, expected):
    """The whole area of a wide image fits no aspect ratio up to 4/3."""
    rows, columns = np.meshgrid(*map(np.arange, shape), indexing="ij")
    image = np.stack([rows, columns, rows], axis=-1).astype(np.float32)
    out = crops(image, (1.0, 1.0))
    np.testing.assert_array_equal(out, np.broadcast_to(out[:1], out.shape))
    first = (shape[1] - expected[1]) / 2
    assert out[0, :, :, 0].min() == 0 and out[0, :, :, 0].max() == shape[0] - 1
    np.testing.assert_allclose(out[0, :, :, 1].min(), first, atol=1e-5)
    np.testing.assert_allclose(
        out[0, :, :, 1].max(), first + expected[1] - 1, atol=1e-5
    )


def test_crop_equals_a_bilinear_loop():
    size, area = 8, (0.2, 0.9)
    image = RNG.uniform(size=(size, size, 3)).astype(np.float32)
    out = crops(image, area)
    for top, left, height, width, got in itertools.islice(
        zip(*rectangles(size, area), out, strict=True), 20
    ):
        expected = np.zeros_like(image)
        for i, j in itertools.product(range(size), repeat=2):
            y = top + np.clip((i + 0.5) * height / size - 0.5, 0, height - 1)
            x = left + np.clip((j + 0.5) * width / size - 0.5, 0, width - 1)
            y0, x0 = min(int(y), size - 2), min(int(x), size - 2)
            fy, fx = y - y0, x - x0
            upper = (1 - fx) * image[y0, x0] + fx * image[y0, x0 + 1]
            lower = (1 - fx) * image[y0 + 1, x0] + fx * image[y0 + 1, x0 + 1]
            expected[i, j] = (1 - fy) * upper + fy * lower
        np.testing.assert_allclose(got, expected, atol=2e-3)


# --- flip ---


def test_flip_mirrors_left_to_right_half_of_the_time():
    out = np.asarray(jax.vmap(augment.random_flip, in_axes=(0, None))(KEYS, IMAGE))
    mirrored = np.all(out == IMAGE[:, ::-1], axis=(1, 2, 3))
    assert np.all(mirrored | np.all(out == IMAGE, axis=(1, 2, 3)))
    assert_share(mirrored, 0.5)


# --- batches ---

BATCH = RNG.integers(0, 256, size=(4, 1, 6, 6, 3), dtype=np.uint8)
IDS = np.array([[0, 10], [0, 11], [3, 10], [3, 11]], np.int32)
ALL = {
    "crop_area": (0.3, 0.9),
    "flip": True,
    "jitter_strength": 0.5,
    "jitter_probability": 0.8,
    "grayscale_probability": 0.2,
}


NOTHING = Augmentation(crop_area=None, flip=False)


@functools.lru_cache
def compiled(seed, views, chunk_size, augmentation):
    return jax.jit(
        functools.partial(
            augment.augment_batch,
            augmentation=augmentation,
            seed=seed,
            views=views,
            chunk_size=chunk_size,
        )
    )


def augmented(images, ids, seed=0, views=3, chunk_size=None, **options):
    """Augments a batch with these options alone, or with all of them."""
    augmentation = dataclasses.replace(NOTHING, **(options or ALL))
    return np.asarray(compiled(seed, views, chunk_size, augmentation)(images, ids))


def test_shape_type_and_range():
    out = augmented(BATCH, IDS)
    assert out.shape == (4, 3, 6, 6, 3) and out.dtype == np.float32
    assert out.min() >= 0 and out.max() <= 1


def test_views_are_functions_of_seed_epoch_index_and_view_alone():
    out = augmented(BATCH, IDS)
    np.testing.assert_array_equal(augmented(BATCH, IDS), out)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(
        augmented(BATCH[order], IDS[order]), out[order], atol=1e-6
    )
    # Alone, and without a third view: the first two stay as they are.
    alone = augmented(BATCH[1:2], IDS[1:2], views=2)
    np.testing.assert_allclose(alone, out[1:2, :2], atol=1e-6)


def test_every_part_of_the_identity_matters():
    image = RNG.integers(0, 256, size=(1, 1, 16, 16, 3), dtype=np.uint8)
    same = np.repeat(image, 4, axis=0)  # large enough that no two crops are equal
    out = augmented(same, IDS)  # one image under four (epoch, index)
    other = augmented(same, IDS, seed=1)
    views = [*out.reshape(12, -1), *other.reshape(12, -1)]
    for one, two in itertools.combinations(views, 2):
        assert np.abs(one - two).max() > 0.01
    # (epoch, index) is not confused with (index, epoch).
    swapped = augmented(same[:1], IDS[2:3, ::-1].copy(), views=2)
    assert np.abs(swapped[0] - out[2, :2]).max() > 0.01


def test_keys_fold_in_epoch_index_view():
    keys = augment.view_keys(5, jnp.asarray(IDS), 2)
    fold_in = jax.random.fold_in
    expected = fold_in(fold_in(fold_in(jax.random.key(5), 3), 10), 1)
    assert keys.shape == (4, 2)
    assert keys[2, 1] == expected


def test_without_augmentation_the_pixels_pass():
    out = augmented(BATCH, IDS, jitter_probability=0.0, jitter_strength=1.0, views=3)
    assert out.shape == (4, 3, 6, 6, 3)
    expected = np.repeat(BATCH, 3, axis=1).astype(np.float32) / 255
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_views_made_by_the_host_are_refined_one_by_one():
    views = RNG.integers(0, 256, size=(4, 2, 6, 6, 3), dtype=np.uint8)
    out = augmented(views, IDS, views=2, grayscale_probability=1.0)
    luma = (views / 255.0) @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(out, np.repeat(luma[..., None], 3, -1), atol=1e-6)


def many_views(**keywords):
    """1,000 views of one image."""
    ids = np.stack([np.zeros(500), np.arange(500)], axis=1).astype(np.int32)
    images = np.repeat(BATCH[:1], 500, axis=0)
    out = augmented(images, ids, views=2, **keywords)
    return out.reshape(1000, 6, 6, 3), BATCH[0, 0] / np.float32(255)


@pytest.mark.parametrize("probability", [0.2, 1.0])
def test_grayscale_probability(probability):
    out, _ = many_views(grayscale_probability=probability)
    grey = np.all(np.ptp(out, axis=-1) < 1e-6, axis=(1, 2))
    assert_share(grey, probability)


@pytest.mark.parametrize("probability", [0.0, 0.8, 1.0])
def test_jitter_probability(probability):
    out, image = many_views(jitter_strength=0.7, jitter_probability=probability)
    unchanged = np.abs(out - image).max(axis=(1, 2, 3)) < 1e-5
    assert_share(~unchanged, probability)


@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_blur_probability(probability):
    ids = np.stack([np.zeros(300), np.arange(300)], axis=1).astype(np.int32)
    image = RNG.integers(0, 256, (1, 1, 30, 30, 3), np.uint8)
    images = np.repeat(image, 300, axis=0)
    out = augmented(images, ids, views=1, blur_probability=probability)[:, 0]
    change = np.abs(out - image[0, 0] / np.float32(255)).max(axis=(1, 2, 3))
    # The smallest twentieth of the sigmas changes nothing that float32 could hold.
    assert_share(change > 1e-6, probability * 0.953)
    assert np.ptp(change[change > 1e-6]) > 0.1  # a sigma of its own for every view


def test_the_choices_of_a_view_are_drawn_apart(monkeypatch):
    """Flipped views are not those that are jittered, nor those without colour."""
    monkeypatch.setattr(
        color,
        "apply_jitter",
        lambda image, jitter, kind: jnp.where(jitter.factors[0] == 1, image, 1 - image),
    )
    compiled.cache_clear()
    pixels = np.zeros((500, 1, 1, 2, 3), np.uint8)
    pixels[:, 0, 0, 1] = (255, 51, 51)
    ids = np.stack([np.zeros(500), np.arange(500)], axis=1).astype(np.int32)
    out = augmented(
        pixels,
        ids,
        views=2,
        flip=True,
        jitter_strength=1.0,
        jitter_probability=0.5,
        grayscale_probability=0.5,
    ).reshape(1000, 2, 3)
    compiled.cache_clear()
    inverted = np.any(np.all(out > 0.99, axis=-1), axis=-1)
    grey = np.all(np.ptp(out, axis=-1) < 1e-6, axis=-1)
    black = np.where(inverted[:, None], 1 - out[..., 1], out[..., 1]) < 1e-6
    flipped = ~black[:, 0]
    for choice in (inverted, grey, flipped):
        assert_share(choice, 0.5)
    for one, two in itertools.combinations((inverted, grey, flipped), 2):
        assert_share(one ^ two, 0.5)


def test_flip_switch():
    out, image = many_views(flip=True)
    mirrored = np.abs(out - image[:, ::-1]).max(axis=(1, 2, 3)) < 1e-6
    unchanged = np.abs(out - image).max(axis=(1, 2, 3)) < 1e-6
    assert np.all(mirrored ^ unchanged)
    assert_share(mirrored, 0.5)


def test_normalize():
    images = RNG.uniform(size=(2, 3, 3, 3)).astype(np.float32)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = augment.normalize(images, mean=mean, std=std)
    for c in range(3):
        expected = (images[..., c] - mean[c]) / std[c]
        np.testing.assert_allclose(out[..., c], expected, rtol=1e-5, atol=1e-6)


# --- blur ---


@pytest.mark.parametrize("border", ["grey", "edge"])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("shape", [(32, 32), (21, 40), (1, 1), (9, 3), (64, 2)])
def test_blur_equals_a_convolution_loop(shape, sigma, border):
    """The side of the kernel is a tenth of the height, made odd."""
    image = RNG.uniform(size=(*shape, 3))
    radius = shape[0] // 10 // 2
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    around = ((radius, radius), (radius, radius), (0, 0))
    if border == "grey":
        padded = np.pad(image, around, constant_values=0.5)
    else:
        padded = np.pad(image, around, mode="edge")
    expected = np.zeros_like(image)
    for i, j in itertools.product(range(2 * radius + 1), repeat=2):
        part = padded[i : i + shape[0], j : j + shape[1]]
        expected += weights[i] * weights[j] * part
    got = augment.gaussian_blur(
        jnp.asarray(image, jnp.float32), jnp.float32(sigma), border=border
    )
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_blur_does_not_darken_the_border():
    """The outermost row at 224 px and sigma 2, as the official code blurs it.

    Its mean goes from 0.903 to 0.740 there; with black outside it would be 0.537.
    """
    image = jnp.full((224, 224, 3), 0.903)
    blur = jax.jit(augment.gaussian_blur, static_argnames="border")
    grey = np.asarray(blur(image, jnp.float32(2.0), border="grey"))
    edge = np.asarray(blur(image, jnp.float32(2.0), border="edge"))
    assert abs(grey[0].mean() - 0.740) < 1e-3
    black = grey[0].mean() - 0.5 * (0.903 - grey[0].mean()) / (0.903 - 0.5)
    assert abs(black - 0.537) < 1e-3
    np.testing.assert_allclose(edge, 0.903, atol=1e-6)
    # Away from the border nothing depends on what lies outside.
    noise = jnp.asarray(RNG.uniform(size=(224, 224, 3)), jnp.float32)
    inner = (slice(11, -11), slice(11, -11))
    one, two = (
        np.asarray(blur(noise, jnp.float32(2.0), border=border))[inner]
        for border in ("grey", "edge")
    )
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_an_edge_blur_is_nearly_pillows():
    """Pillow's kernel is three boxes, which is why the two are not equal."""
    image = photo(side=224)
    picture = Image.fromarray((255 * image).round().astype(np.uint8))
    blur = jax.jit(augment.gaussian_blur, static_argnames="border")
    for sigma in (0.5, 1.0, 1.9):
        theirs = np.asarray(picture.filter(ImageFilter.GaussianBlur(sigma)), np.float32)
        ours = 255 * np.asarray(blur(image, jnp.float32(sigma), border="edge"))
        change = np.abs(ours - theirs)
        assert change.mean() < 1 and change[[0, -1]].mean() < 1, (sigma, change.mean())
        grey = 255 * np.asarray(blur(image, jnp.float32(sigma), border="grey"))
        assert np.abs(grey - theirs)[[0, -1]].mean() > 5


def test_an_unknown_border_is_refused():
    with pytest.raises(ValueError, match="border='black'; allowed: grey, edge"):
        augment.gaussian_blur(IMAGE, jnp.float32(1.0), border="black")


@pytest.mark.parametrize("option", ["jitter_kind", "blur_border"])
def test_kind_and_border_arrive_at_the_view(option):
    values = {
        "jitter_kind": ("torchvision", "tensorflow"),
        "blur_border": ("grey", "edge"),
    }[option]
    images = RNG.integers(0, 256, size=(4, 1, 30, 30, 3), dtype=np.uint8)
    switches = {"jitter_strength": 1.0, "blur_probability": 1.0}
    one, two = (augmented(images, IDS, **switches, **{option: v}) for v in values)
    assert np.abs(one - two).max() > 0.01


def test_blur_at_imagenet_size_has_a_kernel_of_23():
    image = np.zeros((224, 224, 3), np.float32)
    image[112, 100] = 1
    blurred = augment.gaussian_blur(image, jnp.float32(2.0), border="edge")
    out = np.asarray(blurred)[..., 0]
    rows, columns = np.nonzero(out)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (101, 123, 89, 111)
    np.testing.assert_allclose(out.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(
        out,
        out.max()
        * np.exp(
            -0.5
            * ((np.arange(224)[:, None] - 112) ** 2 + (np.arange(224) - 100) ** 2)
            / 4
        )
        * (out > 0),
        atol=1e-7,
    )


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
def test_chunks_change_nothing(chunk_size):
    out = augmented(BATCH, IDS, chunk_size=chunk_size)
    np.testing.assert_allclose(out, augmented(BATCH, IDS), atol=1e-6)


# --- extra transforms ---


def test_cutout_hides_a_square_of_half_the_side():
    image = jnp.ones((32, 32, 3))
    keys = jax.random.split(jax.random.key(0), 200)
    hidden = np.asarray(jax.vmap(lambda key: augment.cutout(key, image))(keys)) == 0.5
    assert np.all(hidden == hidden[..., :1])  # all channels alike
    sizes = hidden[..., 0].sum((1, 2))
    # 16 pixels a side, fewer at the border.
    assert sizes.max() == 16 * 16 and sizes.min() >= 8 * 8
    rows = hidden[..., 0].any(2).sum(1)
    assert set(rows) <= set(range(8, 17))
    # Every pixel is hidden at some time, the middle oftener than a corner.
    share = hidden[..., 0].mean(0)
    assert share.min() > 0 and share[16, 16] > 2 * share[0, 0]


def test_extra_transforms_come_last_and_change_nothing_else():
    images = jax.random.randint(jax.random.key(1), (4, 1, 8, 8, 3), 0, 256).astype("u1")
    ids = jnp.stack([jnp.zeros(4, jnp.int32), jnp.arange(4, dtype=jnp.int32)], 1)
    plain = Augmentation(grayscale_probability=0.5)
    with_cutout = dataclasses.replace(plain, extra=("cutout",))
    before, after = (
        augment.augment_batch(images, ids, options, seed=0, views=2)
        for options in (plain, with_cutout)
    )
    changed = np.asarray(jnp.any(before != after, -1))
    assert np.all(np.asarray(after)[changed] == 0.5)
    assert 0.05 < changed.mean() < 0.3
    assert with_cutout.host_part().extra == ()
    assert with_cutout.step_part(whole_images=False).extra == ("cutout",)
