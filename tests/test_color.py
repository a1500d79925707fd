"""Colours against colorsys, Pillow and formulas; the jitters by their statistics."""

import colorsys
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from supcon_jax.data import color
from tests.photos import photo
from tests.test_augment import assert_share, assert_uniform

RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(size=(6, 5, 3)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(7), 2000)


def test_grayscale_is_the_luma():
    expected = IMAGE @ np.array([0.299, 0.587, 0.114])
    out = color.to_grayscale(IMAGE)
    np.testing.assert_allclose(out, np.repeat(expected[..., None], 3, -1), rtol=1e-6)


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.7])
@pytest.mark.parametrize(
    ("adjust", "enhancer"),
    [
        (color.adjust_brightness, ImageEnhance.Brightness),
        (color.adjust_contrast, ImageEnhance.Contrast),
        (color.adjust_saturation, ImageEnhance.Color),
    ],
)
def test_factors_equal_pillow(adjust, enhancer, factor):
    """Pillow rounds the grey it blends with, and the result, to integers."""
    pixels = RNG.integers(0, 256, size=(7, 9, 3), dtype=np.uint8)
    expected = np.asarray(enhancer(Image.fromarray(pixels)).enhance(factor), float)
    out = adjust(pixels.astype(np.float32) / 255, factor)
    np.testing.assert_allclose(out, expected / 255, atol=2.01 / 255)
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.8])
def test_factors_equal_their_formulas(factor):
    luma = IMAGE.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    for adjust, other in [
        (color.adjust_brightness, 0.0),
        (color.adjust_contrast, luma.mean()),
        (color.adjust_saturation, luma[..., None]),
    ]:
        expected = np.clip(factor * IMAGE + (1 - factor) * other, 0, 1)
        np.testing.assert_allclose(adjust(IMAGE, factor), expected, atol=1e-6)


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.07, 1 / 3, 0.9])
def test_hue_equals_colorsys(shift):
    corners = np.array(list(itertools.product([0.0, 0.5, 1.0], repeat=3)))
    pixels = np.concatenate([corners, RNG.uniform(size=(200, 3))])
    expected = []
    for rgb in pixels:
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        expected.append(colorsys.hsv_to_rgb((hue + shift) % 1.0, saturation, value))
    out = color.adjust_hue(jnp.asarray(pixels, jnp.float32)[None], shift)[0]
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_identities():
    for adjust in (
        color.adjust_brightness,
        color.adjust_contrast,
        color.adjust_saturation,
    ):
        np.testing.assert_allclose(adjust(IMAGE, 1.0), IMAGE, atol=1e-6)
    np.testing.assert_allclose(color.adjust_hue(IMAGE, 0.0), IMAGE, atol=1e-6)
    np.testing.assert_allclose(color.adjust_hue(IMAGE, 1.0), IMAGE, atol=2e-6)


def drawn_jitter(strength):
    """Factors `[n, 4]` (the last is the hue's shift) and places `[n, 4]`."""
    draw = functools.partial(color.draw_jitter, strength=strength)
    factors, shift, place = jax.jit(jax.vmap(draw))(KEYS)
    return np.concatenate([factors, shift[:, None]], axis=1), np.asarray(place)


def test_jitter_factors_and_order():
    factors, places = drawn_jitter(strength=0.5)
    for position in range(3):
        assert_uniform(factors[:, position], 0.6, 1.4)
    assert_uniform(factors[:, 3], -0.1, 0.1)
    correlation = np.corrcoef(factors.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.1  # drawn apart
    found, counts = np.unique(places, axis=0, return_counts=True)
    assert {tuple(p) for p in found} == set(itertools.permutations(range(4)))
    assert counts.min() > len(KEYS) / 24 / 2


def test_jitter_factors_are_never_negative():
    factors, _ = drawn_jitter(strength=2.0)
    for position in range(3):
        assert_uniform(factors[:, position], 0.0, 2.6)


def test_jitter_is_its_operations_one_after_the_other():
    """In each of the 24 orders, the four functions called in that order."""
    operations = (
        color.adjust_brightness,
        color.adjust_contrast,
        color.adjust_saturation,
        color.adjust_hue,
    )
    apply = jax.jit(color.apply_jitter)
    outcomes = set()
    for place in itertools.permutations(range(4)):
        factors, shift = np.array([1.3, 0.5, 1.4], np.float32), np.float32(0.13)
        expected = jnp.asarray(IMAGE)
        for turn in range(4):
            which = place.index(turn)
            expected = operations[which](expected, [*factors, shift][which])
        got = apply(IMAGE, color.Jitter(factors, shift, np.asarray(place)))
        np.testing.assert_allclose(got, expected, atol=2e-6)
        outcomes.add(np.round(np.asarray(got), 4).tobytes())
    assert len(outcomes) >= 12  # the order matters


def test_jitter_applies_the_operations():
    """A grey image knows brightness only; the rest must leave it alone."""
    grey = jnp.full((2, 2, 3), 0.3)
    jitter = functools.partial(color.color_jitter, strength=0.5)
    out = np.asarray(jax.jit(jax.vmap(jitter, in_axes=(0, None)))(KEYS, grey))
    np.testing.assert_allclose(out, out[:, :1, :1, :1] + 0 * out, atol=1e-6)
    assert_uniform(out[:, 0, 0, 0] / 0.3, 0.6, 1.4)
    # The hue of one flat colour is turned by the shift, whatever else happens.
    brown = jnp.broadcast_to(jnp.array([0.4, 0.3, 0.25]), (2, 2, 3))
    out = np.asarray(jax.jit(jax.vmap(jitter, in_axes=(0, None)))(KEYS, brown))
    hue = np.array([colorsys.rgb_to_hsv(*pixel)[0] for pixel in out[:, 0, 0]])
    before = colorsys.rgb_to_hsv(0.4, 0.3, 0.25)[0]
    assert_uniform((hue - before + 0.5) % 1.0 - 0.5, -0.1, 0.1)


# --- the jitter of TensorFlow ---


def saturate(pixel, factor):
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    return colorsys.hsv_to_rgb(hue, min(factor * saturation, 1.0), value)


def turn(pixel, shift):
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    return colorsys.hsv_to_rgb((hue + shift) % 1.0, saturation, value)


def by_pixel(function, image, amount):
    return np.array([[function(pixel, amount) for pixel in row] for row in image])


# Brightness, contrast, saturation and hue in float64, without the clipping.
TENSORFLOW = (
    lambda image, delta: image + delta,
    lambda image, factor: (
        image.mean(axis=(0, 1)) + factor * (image - image.mean(axis=(0, 1)))
    ),
    functools.partial(by_pixel, saturate),
    functools.partial(by_pixel, turn),
)


@pytest.mark.parametrize("brightness", [-0.4, 0.3])
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.7])
def test_tensorflow_jitter_is_its_operations_one_after_the_other(brightness, factor):
    """In each of the 24 orders, on the corners and the grey axis of the colours too."""
    corners = np.array(list(itertools.product([0.0, 0.5, 1.0], repeat=3)))
    image = np.concatenate([corners, RNG.uniform(size=(9, 3))]).reshape(6, 6, 3)
    amounts = np.array([brightness, factor, 2.1 - factor, 0.13], np.float32)
    jitters, expected = [], []
    for place in itertools.permutations(range(4)):
        jitters.append(color.Jitter(amounts[:3], amounts[3], np.asarray(place)))
        after = image
        for turn_number in range(4):
            which = place.index(turn_number)
            after = np.clip(TENSORFLOW[which](after, float(amounts[which])), 0, 1)
        expected.append(after)
    apply = jax.vmap(
        functools.partial(color.apply_jitter, kind="tensorflow"), in_axes=(None, 0)
    )
    jitters = jax.tree.map(lambda *leaves: np.stack(leaves), *jitters)
    got = jax.jit(apply)(image.astype(np.float32), jitters)
    # Where rounding decides which channel is largest, the hue of a near-grey pixel may
    # differ; it changes the pixel by no more than its colour.
    np.testing.assert_allclose(got, expected, atol=5e-6)


def test_tensorflow_jitter_draws_what_it_adds():
    draw = functools.partial(color.draw_jitter, strength=0.5, kind="tensorflow")
    factors, shift, place = jax.jit(jax.vmap(draw))(KEYS)
    assert_uniform(factors[:, 0], -0.4, 0.4)
    for position in (1, 2):
        assert_uniform(factors[:, position], 0.6, 1.4)
    assert_uniform(shift, -0.1, 0.1)
    assert len(np.unique(place, axis=0)) == 24


def test_an_unknown_kind_of_jitter_is_refused():
    for call in (
        lambda: color.draw_jitter(KEYS[0], strength=1.0, kind="pillow"),
        lambda: color.color_jitter(KEYS[0], IMAGE, strength=1.0, kind="pillow"),
    ):
        with pytest.raises(
            ValueError, match="kind='pillow'; allowed: torchvision, ten"
        ):
            call()


@pytest.mark.parametrize("kind", ["torchvision", "tensorflow"])
def test_views_that_are_not_jittered_stay_as_they_are(kind):
    jitter = functools.partial(
        color.color_jitter, strength=1.0, probability=0.5, kind=kind
    )
    out = np.asarray(jax.jit(jax.vmap(jitter, in_axes=(0, None)))(KEYS[:400], IMAGE))
    unchanged = np.abs(out - IMAGE).max(axis=(1, 2, 3)) < 2e-6
    assert_share(unchanged, 0.5)


# Of 1,500 views of one photo of 64 px at s = 1: the standard deviation of a view's mean,
# the mean absolute change of a pixel, the share of clipped values, the share of views with
# more than 80 % of them. Measured with other random numbers, once with the official code's
# operations and once with torchvision's, and perhaps on another photo. So the tolerances
# are two standard deviations of 1,500 draws, and as much again for the photo.
MEASURED = {
    "tensorflow": (0.306, 0.285, 0.32, 0.034),
    "torchvision": (0.193, 0.198, 0.19, 0.0),
}
TOLERANCE = (0.015, 0.012, 0.02, 0.015)


@pytest.mark.parametrize("kind", MEASURED)
def test_the_views_are_as_bright_and_as_clipped_as_measured(kind):
    image = photo()
    jitter = functools.partial(color.color_jitter, strength=1.0, kind=kind)
    out = np.asarray(jax.jit(jax.vmap(jitter, in_axes=(0, None)))(KEYS[:1500], image))
    clipped = ((out <= 0) | (out >= 1)).mean(axis=(1, 2, 3))
    found = (
        out.mean(axis=(1, 2, 3)).std(),
        np.abs(out - image).mean(),
        clipped.mean(),
        np.mean(clipped > 0.8),
    )
    for value, expected, tolerance in zip(
        found, MEASURED[kind], TOLERANCE, strict=True
    ):
        assert abs(value - expected) < tolerance, found
