"""The host's jitter: the jitter of the step, TensorFlow's operations, its statistics."""

import functools
import itertools

import jax
import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from supcon_jax.data import color, host_color  # noqa: E402  (after TensorFlow)
from tests.photos import photo  # noqa: E402
from tests.test_autoaugment import outcomes  # noqa: E402
from tests.test_host_operations import PHOTO, difference  # noqa: E402


def test_host_jitter_switches():
    for options in ({"strength": 1.0, "probability": 0.0},):
        for out in outcomes(host_color.color_jitter, 5, **options):
            np.testing.assert_array_equal(out, PHOTO)
    for out in outcomes(host_color.color_jitter, 5, strength=0.0, probability=1.0):
        assert difference(out, PHOTO) <= 1
    outs = outcomes(host_color.color_jitter, 300, strength=0.5, probability=0.8)
    changed = np.mean([difference(out, PHOTO) > 1 for out in outs])
    assert abs(changed - 0.8) < 0.11


# Brightness, contrast, saturation and hue as TensorFlow has them.
TENSORFLOW = (
    tf.image.adjust_brightness,
    tf.image.adjust_contrast,
    tf.image.adjust_saturation,
    tf.image.adjust_hue,
)
NEUTRAL = (0.0, 1.0, 1.0, 0.0)
jitter_in_step = jax.jit(color.apply_jitter, static_argnames="kind")


@pytest.mark.parametrize("name", ["china", "flower"])
@pytest.mark.parametrize(
    ("which", "amounts"),
    [
        (0, (-0.7, 0.2)),
        (1, (0.0, 0.3, 1.8)),
        (2, (0.0, 0.3, 1.8)),
        (3, (-0.2, 0.05, 0.5)),
    ],
)
def test_jitter_in_the_step_equals_tensorflows_operations(name, which, amounts):
    image = photo(name)
    for amount in amounts:
        expected = tf.clip_by_value(TENSORFLOW[which](image, amount), 0, 1)
        changes = [*NEUTRAL[:which], amount, *NEUTRAL[which + 1 :]]
        jitter = color.Jitter(np.float32(changes[:3]), changes[3], np.arange(4))
        got = jitter_in_step(image, jitter, kind="tensorflow")
        np.testing.assert_allclose(got, expected, atol=3e-6)
        assert np.abs(image - got).max() > 0.05


def jitters(kind, count):
    """Amounts and places, the 24 orders in turn."""
    rng = np.random.default_rng(3)
    orders = itertools.cycle(itertools.permutations(range(4)))
    for place in itertools.islice(orders, count):
        bright = rng.uniform(-0.8, 0.8) if kind == "tensorflow" else rng.uniform(0, 1.8)
        amounts = [bright, *rng.uniform(0.2, 1.8, 2), rng.uniform(-0.2, 0.2)]
        yield np.float32(amounts), np.asarray(place)


@pytest.mark.parametrize("kind", ["torchvision", "tensorflow"])
def test_host_jitter_is_the_jitter_of_the_step(kind):
    """The same operations in the same order give the same view, and none is darker.

    The host ends with 8 bits: `floor(255.5 x)`, on average a quarter of a grey level less
    than 255 x. Made 8 bits after each operation, a view would be 1.1 levels darker.
    """
    levels = (255 * photo()).round().astype(np.uint8)
    on_host = tf.function(functools.partial(host_color.apply_jitter, kind=kind))
    darker = []
    for amounts, place in jitters(kind, 48):
        jitter = color.Jitter(amounts[:3], amounts[3], place)
        image = levels / np.float32(255)
        theirs = np.asarray(jitter_in_step(image, jitter, kind=kind))
        order = tf.constant(np.argsort(place), tf.int32)
        ours = on_host(tf.constant(levels), list(tf.unstack(amounts)), order).numpy()
        assert difference(ours, np.floor(255.5 * theirs)) <= 1
        # Rounding may decide where a value lies on the border of two levels.
        assert np.mean(ours == np.floor(255.5 * theirs)) > 0.995
        darker.append(np.mean(255 * theirs - ours))
    assert -0.05 < np.mean(darker) < 0.3 and max(darker) < 0.55


@pytest.mark.parametrize("kind", ["torchvision", "tensorflow"])
def test_host_jitter_that_changes_nothing_keeps_every_level(kind):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    neutral = [0.0 if kind == "tensorflow" else 1.0, 1.0, 1.0, 0.0]
    out = host_color.apply_jitter(
        tf.constant(levels), list(map(tf.constant, neutral)), tf.range(4), kind=kind
    )
    np.testing.assert_array_equal(out, levels)


def test_host_jitter_draws_as_the_step_does():
    """Brightness of a grey picture: uniform in [1 - 0.8 s, 1 + 0.8 s]."""
    grey = np.full((2, 2, 3), 100, np.uint8)
    outs = outcomes(host_color.color_jitter, 400, grey, strength=0.5, probability=1.0)
    factors = np.sort([out[0, 0, 0] / 100 for out in outs])
    assert factors[0] >= 0.58 and factors[-1] <= 1.41
    uniform = np.linspace(0.6, 1.4, 400)
    assert np.abs(factors - uniform).max() < 0.8 * 2.47 / np.sqrt(400)


def test_host_jitter_of_tensorflow_adds_to_the_brightness():
    """Of a grey picture: uniform in +-0.8 s, whatever the order."""
    grey = np.full((2, 2, 3), 128, np.uint8)
    options = {"strength": 0.5, "probability": 1.0, "kind": "tensorflow"}
    added = np.sort(
        [
            o[0, 0, 0] / 255
            for o in outcomes(host_color.color_jitter, 400, grey, **options)
        ]
    )
    uniform = 128 / 255 + np.linspace(-0.4, 0.4, 400)
    assert np.abs(added - uniform).max() < 0.8 * 2.47 / np.sqrt(400)
