"""AutoAugment and RandAugment: the paper's table, levels, and how often each is drawn."""

import functools
import re

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from supcon_jax.data import autoaugment, host_operations  # noqa: E402  (after TensorFlow)
from tests.test_host_operations import PHOTO, difference  # noqa: E402

# The table of the spec: first and second operation of each sub-policy.
TABLE = """
Equalize .8 1 ShearY .8 4        | Color .4 9 Equalize .6 3
Color .4 1 Rotate .6 8           | Solarize .8 3 Equalize .4 7
Solarize .4 2 Solarize .6 2      | Color .2 0 Equalize .8 8
Equalize .4 8 SolarizeAdd .8 3   | ShearX .2 9 Rotate .6 8
Color .6 1 Equalize 1.0 2        | Invert .4 9 Rotate .6 0
Equalize 1.0 9 ShearY .6 3       | Color .4 7 Equalize .6 0
Posterize .4 6 AutoContrast .4 7 | Solarize .6 8 Color .6 9
Solarize .2 4 Rotate .8 9        | Rotate 1.0 7 TranslateY .8 9
ShearX 0.0 0 Solarize .8 4       | ShearY .8 0 Color .6 4
Color 1.0 0 Rotate .6 2          | Equalize .8 4 Equalize 0.0 8
Equalize 1.0 4 AutoContrast .6 2 | ShearY .4 7 SolarizeAdd .6 7
Posterize .8 2 Solarize .6 10    | Solarize .6 8 Equalize .6 1
Color .8 6 Rotate .4 5
"""


def test_the_policy_is_the_papers():
    pairs = []
    for part in re.split(r"[|\n]", TABLE.strip()):
        words = part.split()
        pairs.append(
            tuple((words[i], float(words[i + 1]), int(words[i + 2])) for i in (0, 3))
        )
    assert pairs == list(autoaugment.POLICY_V0)
    assert len(autoaugment.OPERATIONS) == 16


# (operation, level) -> (function, its arguments with either sign), by hand.
LEVELS = {
    ("Rotate", 8): ("rotate", (24.0, -24.0)),
    ("ShearX", 9): ("shear_x", (0.27, -0.27)),
    ("ShearY", 4): ("shear_y", (0.12, -0.12)),
    ("TranslateX", 5): ("translate_x", (25.0, -25.0)),
    ("TranslateY", 1): ("translate_y", (5.0, -5.0)),
    ("Color", 9): ("color", (1.72,)),
    ("Contrast", 3): ("contrast", (0.64,)),
    ("Brightness", 0): ("brightness", (0.1,)),
    ("Sharpness", 10): ("sharpness", (1.9,)),
    ("Posterize", 6): ("posterize", (2,)),
    ("Posterize", 2): ("posterize", (0,)),
    ("Solarize", 8): ("solarize", (204,)),
    ("Solarize", 4): ("solarize", (102,)),
    ("SolarizeAdd", 3): ("solarize_add", (33,)),
    ("SolarizeAdd", 10): ("solarize_add", (110,)),
    ("AutoContrast", 7): ("autocontrast", ()),
    ("Equalize", 7): ("equalize", ()),
    ("Invert", 7): ("invert", ()),
}


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_levels_mean_what_the_spec_says(name, level):
    function, arguments = LEVELS[name, level]
    function = getattr(host_operations, function)
    image = tf.constant(PHOTO)
    expected = [function(image, *a) for a in zip(arguments, strict=True)] or [
        function(image)
    ]
    operation = autoaugment.OPERATIONS[name]
    seen = set()
    for seed in range(12):
        got = operation(image, tf.constant(float(level)), [seed, 1], 50.0, 40.0)
        # A factor in float32 may end on the other side of a grey level.
        seen |= {i for i, want in enumerate(expected) if difference(got, want) <= 1}
        assert min(difference(got, want) for want in expected) <= 1
    assert len(seen) == len(expected)  # both signs come


@functools.cache
def compiled(augment, **options):
    return tf.function(functools.partial(augment, **options))


def outcomes(augment, count, image=PHOTO, **options):
    augment = compiled(augment, **options)
    image = tf.constant(image)
    return [augment(image, tf.constant([seed, 7])).numpy() for seed in range(count)]


@pytest.mark.parametrize("name", ["auto_augment", "rand_augment"])
def test_policies_are_functions_of_the_seed(name):
    policy = getattr(autoaugment, name)
    one, two = outcomes(policy, 30), outcomes(policy, 30)
    for a, b in zip(one, two, strict=True):
        assert a.shape == PHOTO.shape and a.dtype == np.uint8
        np.testing.assert_array_equal(a, b)
    assert len({a.tobytes() for a in one}) > 10


def recorded(monkeypatch, policy, count, **options):
    """Which operations run, in order, for many seeds (their number and level)."""
    names = autoaugment.NAMES

    def record(position, image, level, seed, translate, half):
        step = tf.cast(image[0, 0, 0], tf.int32)  # how many have run
        mark = tf.cast(position + 1, tf.uint8)
        return tf.tensor_scatter_nd_update(
            image, [[0, step + 1, 0], [0, 0, 0]], [mark, tf.cast(step + 1, tf.uint8)]
        )

    stand_ins = {n: functools.partial(record, i) for i, n in enumerate(names)}
    monkeypatch.setattr(autoaugment, "OPERATIONS", stand_ins)
    function = tf.function(functools.partial(policy, **options))
    image = tf.zeros((1, 5, 3), tf.uint8)
    found = []
    for seed in range(count):
        row = function(image, tf.constant([seed, 3])).numpy()[0, :, 0]
        found.append(tuple(names[i - 1] for i in row[1 : 1 + row[0]]))
    return found


def test_auto_augment_draws_as_the_table_says(monkeypatch):
    found = recorded(monkeypatch, autoaugment.auto_augment, 1500)
    expected, spread = {}, 4.5 * 0.5 / np.sqrt(1500)
    for (a, p, _), (b, q, _) in autoaugment.POLICY_V0:
        for outcome, chance in (
            ((a, b), p * q),
            ((a,), p * (1 - q)),
            ((b,), (1 - p) * q),
            ((), (1 - p) * (1 - q)),
        ):
            expected[outcome] = expected.get(outcome, 0) + chance / 25
    assert set(found) <= {outcome for outcome, chance in expected.items() if chance > 0}
    for outcome, chance in expected.items():
        assert abs(found.count(outcome) / 1500 - chance) < spread, outcome


@pytest.mark.parametrize("layers", [1, 3])
def test_rand_augment_draws_uniformly(monkeypatch, layers):
    found = recorded(monkeypatch, autoaugment.rand_augment, 1000, layers=layers)
    lengths = [len(names) for names in found]
    assert max(lengths) == layers and min(lengths) < layers  # the identity is drawn too
    names = [name for names in found for name in names]
    assert abs(len(names) / (1000 * layers) - 16 / 17) < 0.035
    counts = [names.count(name) for name in autoaugment.NAMES]
    expected = 1000 * layers / 17
    assert min(counts) > expected - 4.5 * np.sqrt(expected)
    assert max(counts) < expected + 4.5 * np.sqrt(expected)


def test_rand_augment_magnitude():
    strong, mild = (
        outcomes(autoaugment.rand_augment, 30, layers=1, magnitude=m)
        for m in (10.0, 3.0)
    )
    differ = [not np.array_equal(a, b) for a, b in zip(strong, mild, strict=True)]
    # All operations but three and the identity have a magnitude.
    assert 0.5 < np.mean(differ) < 1
