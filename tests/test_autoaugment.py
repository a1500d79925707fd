"""AutoAugment and RandAugment against golden outputs, Pillow and the paper's tables."""

import functools
import itertools
import pathlib
import re

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

tf = pytest.importorskip("tensorflow")

from supcon_jax.data import autoaugment, color  # noqa: E402  (after TensorFlow)
from tests.photos import photo  # noqa: E402

GOLDEN = pathlib.Path(__file__).parent / "testdata" / "autoaugment_ops.npz"
RNG = np.random.default_rng(0)
PHOTO = np.clip(
    np.cumsum(RNG.normal(size=(40, 52, 3)), axis=1) * 25 + 120, 0, 255
).astype(np.uint8)
FLAT = np.full((7, 9, 3), 77, np.uint8)
PIXEL = np.array([[[10, 200, 30]]], np.uint8)
IMAGES = {"photo": PHOTO, "flat": FLAT, "pixel": PIXEL}


def difference(ours, theirs):
    return np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max()


# --- operations ---

# Grey levels by which an operation may differ from the official code's output.
SLACK = {"color": 1, "sharpness": 1}


def check_operations(images, outputs):
    """`outputs` maps "operation/argument" to what the official code made of `images`."""
    seen = set()
    for key, expected in outputs.items():
        name, _, argument = key.partition("/")
        if name == "contrast":
            continue  # see test_contrast_is_pillows
        operation = getattr(autoaugment, name)
        arguments = (float(argument),) if argument else ()
        for image, output in zip(images, expected, strict=True):
            got = operation(tf.constant(image), *arguments)
            assert difference(got, output) <= SLACK.get(name, 0), key
        seen.add(name)
    return seen


def golden(kind):
    """Images and outputs of one kind in tests/testdata, see the README there."""
    with np.load(GOLDEN) as file:
        arrays = {
            key.removeprefix(f"{kind}/"): file[key]
            for key in file.files
            if key.startswith(f"{kind}/")
        }
    return arrays.pop("images"), arrays


def test_operations_on_pixels_equal_the_official_ones():
    assert len(check_operations(*golden("pixels"))) == 8


def test_operations_fill_what_the_official_ones_fill():
    image, outputs = golden("flat")
    outputs = {key: output[None] for key, output in outputs.items()}
    assert len(check_operations(image[None], outputs)) == 14


def test_operations_on_photographs_equal_the_official_ones(shared_dir):
    with np.load(shared_dir / "golden" / "autoaugment_ops.npz") as file:
        outputs = {key: file[key] for key in file.files}
    assert len(check_operations(outputs.pop("images"), outputs)) == 14


def test_contrast_is_pillows():
    """The official mean is the number of pixels / 256; ours is the mean."""
    images, outputs = golden("pixels")
    for image in images:
        for factor in (0.1, 0.64, 1.9):
            theirs = ImageEnhance.Contrast(Image.fromarray(image)).enhance(factor)
            assert difference(autoaugment.contrast(image, factor), theirs) <= 1
    assert difference(outputs["contrast/0.64"], images) > 40


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_operations_equal_pillow(image):
    picture = Image.fromarray(image)
    exact = {
        "invert": (autoaugment.invert(image), ImageOps.invert(picture)),
        "equalize": (autoaugment.equalize(image), ImageOps.equalize(picture)),
    }
    for bits in (1, 3, 7):
        exact[f"posterize {bits}"] = (
            autoaugment.posterize(image, bits),
            ImageOps.posterize(picture, bits),
        )
    for threshold in (0, 76, 255):
        exact[f"solarize {threshold}"] = (
            autoaugment.solarize(image, threshold),
            ImageOps.solarize(picture, threshold),
        )
    for name, (ours, theirs) in exact.items():
        assert difference(ours, theirs) == 0, name
    near = {
        "autocontrast": (
            autoaugment.autocontrast(image),
            ImageOps.autocontrast(picture),
        )
    }
    for name in ("Brightness", "Color", "Contrast", "Sharpness"):
        for factor in (0.1, 0.6, 1.0, 1.9):
            near[f"{name} {factor}"] = (
                getattr(autoaugment, name.lower())(image, factor),
                getattr(ImageEnhance, name)(picture).enhance(factor),
            )
    for name, (ours, theirs) in near.items():
        assert ours.shape == image.shape
        assert difference(ours, theirs) <= 1, name


def test_black_and_whole_posterize():
    """AutoAugment's level 2 keeps no bit at all."""
    assert np.all(autoaugment.posterize(PHOTO, 0) == 0)
    np.testing.assert_array_equal(autoaugment.posterize(PHOTO, 8), PHOTO)


def test_solarize_add_equals_its_formula():
    for addition in (0, 33, 110, 255):
        x = PHOTO.astype(int)
        expected = np.where(x < 128, np.clip(x + addition, 0, 255), x)
        assert difference(autoaugment.solarize_add(PHOTO, addition), expected) == 0


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_geometry_equals_a_loop(image):
    """Nearest neighbours, outside 128; the centre of a rotation stays where it is."""
    height, width = image.shape[:2]
    cos, sin = np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20))
    cy, cx = (height - 1) / 2, (width - 1) / 2
    maps = {
        "shear_x": (0.21, lambda x, y: (x + 0.21 * y, y)),
        "shear_y": (-0.21, lambda x, y: (x, y - 0.21 * x)),
        "translate_x": (3.0, lambda x, y: (x + 3, y)),
        "translate_y": (-2.0, lambda x, y: (x, y - 2)),
        "rotate": (
            20.0,
            lambda x, y: (
                cos * (x - cx) - sin * (y - cy) + cx,
                sin * (x - cx) + cos * (y - cy) + cy,
            ),
        ),
    }
    for name, (argument, source) in maps.items():
        got = getattr(autoaugment, name)(tf.constant(image), argument).numpy()
        wrong = 0
        for y in range(height):
            for x in range(width):
                sx, sy = (int(np.floor(v + 0.5)) for v in source(x, y))
                inside = 0 <= sx < width and 0 <= sy < height
                expected = image[sy, sx] if inside else 128
                wrong += np.any(got[y, x] != expected)
        # float32 may see a pixel's border from its other side.
        assert wrong <= 0.002 * height * width, name


def test_cutout_greys_a_square():
    seen = []
    for seed in range(40):
        out = autoaugment.cutout(PHOTO, 6, [seed, 0]).numpy()
        gone = np.all(out == 128, axis=-1) & np.any(out != PHOTO, axis=-1)
        np.testing.assert_array_equal(out[~gone], PHOTO[~gone])
        rows, columns = np.flatnonzero(gone.any(1)), np.flatnonzero(gone.any(0))
        assert 6 <= len(rows) <= 12 and 6 <= len(columns) <= 12
        assert gone.sum() >= 0.98 * len(rows) * len(columns)
        seen.append((rows[0], columns[0]))
    assert len(set(seen)) > 30
    np.testing.assert_array_equal(autoaugment.cutout(PHOTO, 0, [0, 0]), PHOTO)


# --- policies ---

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
    function = getattr(autoaugment, function)
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
def compiled(name, **options):
    policy = functools.partial(getattr(autoaugment, name), **options)
    return tf.function(policy)


def outcomes(name, count, image=PHOTO, **options):
    policy = compiled(name, **options)
    image = tf.constant(image)
    return [policy(image, tf.constant([seed, 7])).numpy() for seed in range(count)]


@pytest.mark.parametrize("name", ["auto_augment", "rand_augment"])
def test_policies_are_functions_of_the_seed(name):
    one, two = outcomes(name, 30), outcomes(name, 30)
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
        outcomes("rand_augment", 30, layers=1, magnitude=m) for m in (10.0, 3.0)
    )
    differ = [not np.array_equal(a, b) for a, b in zip(strong, mild, strict=True)]
    # All operations but three and the identity have a magnitude.
    assert 0.5 < np.mean(differ) < 1


# --- jitter on the host ---


def test_host_jitter_switches():
    for options in ({"strength": 1.0, "probability": 0.0},):
        for out in outcomes("color_jitter", 5, **options):
            np.testing.assert_array_equal(out, PHOTO)
    for out in outcomes("color_jitter", 5, strength=0.0, probability=1.0):
        assert difference(out, PHOTO) <= 1
    outs = outcomes("color_jitter", 300, strength=0.5, probability=0.8)
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
    on_host = tf.function(functools.partial(autoaugment.apply_jitter, kind=kind))
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
    out = autoaugment.apply_jitter(
        tf.constant(levels), list(map(tf.constant, neutral)), tf.range(4), kind=kind
    )
    np.testing.assert_array_equal(out, levels)


def test_host_jitter_draws_as_the_step_does():
    """Brightness of a grey picture: uniform in [1 - 0.8 s, 1 + 0.8 s]."""
    grey = np.full((2, 2, 3), 100, np.uint8)
    outs = outcomes("color_jitter", 400, grey, strength=0.5, probability=1.0)
    factors = np.sort([out[0, 0, 0] / 100 for out in outs])
    assert factors[0] >= 0.58 and factors[-1] <= 1.41
    uniform = np.linspace(0.6, 1.4, 400)
    assert np.abs(factors - uniform).max() < 0.8 * 2.47 / np.sqrt(400)


def test_host_jitter_of_tensorflow_adds_to_the_brightness():
    """Of a grey picture: uniform in +-0.8 s, whatever the order."""
    grey = np.full((2, 2, 3), 128, np.uint8)
    options = {"strength": 0.5, "probability": 1.0, "kind": "tensorflow"}
    added = np.sort(
        [o[0, 0, 0] / 255 for o in outcomes("color_jitter", 400, grey, **options)]
    )
    uniform = 128 / 255 + np.linspace(-0.4, 0.4, 400)
    assert np.abs(added - uniform).max() < 0.8 * 2.47 / np.sqrt(400)
