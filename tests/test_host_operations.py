"""The host's operations against golden outputs of the official code, Pillow and loops."""

import pathlib

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

tf = pytest.importorskip("tensorflow")

from supcon_jax.data import host_operations  # noqa: E402  (after TensorFlow)

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


# Grey levels by which an operation may differ from the official code's output.
SLACK = {"color": 1, "sharpness": 1}


def check_operations(images, outputs):
    """`outputs` maps "operation/argument" to what the official code made of `images`."""
    seen = set()
    for key, expected in outputs.items():
        name, _, argument = key.partition("/")
        if name == "contrast":
            continue  # see test_contrast_is_pillows
        operation = getattr(host_operations, name)
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
            assert difference(host_operations.contrast(image, factor), theirs) <= 1
    assert difference(outputs["contrast/0.64"], images) > 40


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_operations_equal_pillow(image):
    picture = Image.fromarray(image)
    exact = {
        "invert": (host_operations.invert(image), ImageOps.invert(picture)),
        "equalize": (host_operations.equalize(image), ImageOps.equalize(picture)),
    }
    for bits in (1, 3, 7):
        exact[f"posterize {bits}"] = (
            host_operations.posterize(image, bits),
            ImageOps.posterize(picture, bits),
        )
    for threshold in (0, 76, 255):
        exact[f"solarize {threshold}"] = (
            host_operations.solarize(image, threshold),
            ImageOps.solarize(picture, threshold),
        )
    for name, (ours, theirs) in exact.items():
        assert difference(ours, theirs) == 0, name
    near = {
        "autocontrast": (
            host_operations.autocontrast(image),
            ImageOps.autocontrast(picture),
        )
    }
    for name in ("Brightness", "Color", "Contrast", "Sharpness"):
        for factor in (0.1, 0.6, 1.0, 1.9):
            near[f"{name} {factor}"] = (
                getattr(host_operations, name.lower())(image, factor),
                getattr(ImageEnhance, name)(picture).enhance(factor),
            )
    for name, (ours, theirs) in near.items():
        assert ours.shape == image.shape
        assert difference(ours, theirs) <= 1, name


def test_black_and_whole_posterize():
    """AutoAugment's level 2 keeps no bit at all."""
    assert np.all(host_operations.posterize(PHOTO, 0) == 0)
    np.testing.assert_array_equal(host_operations.posterize(PHOTO, 8), PHOTO)


def test_solarize_add_equals_its_formula():
    for addition in (0, 33, 110, 255):
        x = PHOTO.astype(int)
        expected = np.where(x < 128, np.clip(x + addition, 0, 255), x)
        assert difference(host_operations.solarize_add(PHOTO, addition), expected) == 0


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
        got = getattr(host_operations, name)(tf.constant(image), argument).numpy()
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
        out = host_operations.cutout(PHOTO, 6, [seed, 0]).numpy()
        gone = np.all(out == 128, axis=-1) & np.any(out != PHOTO, axis=-1)
        np.testing.assert_array_equal(out[~gone], PHOTO[~gone])
        rows, columns = np.flatnonzero(gone.any(1)), np.flatnonzero(gone.any(0))
        assert 6 <= len(rows) <= 12 and 6 <= len(columns) <= 12
        assert gone.sum() >= 0.98 * len(rows) * len(columns)
        seen.append((rows[0], columns[0]))
    assert len(set(seen)) > 30
    np.testing.assert_array_equal(host_operations.cutout(PHOTO, 0, [0, 0]), PHOTO)
