"""The 15 corruptions: what each does to pixels, and that it is the same every time."""

import colorsys

import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from supcon_jax.data.corruptions import SETTINGS, corrupt, corrupt_many
from supcon_jax.evaluation.corruption import CORRUPTIONS, SEVERITIES

NOISE = ("gaussian_noise", "shot_noise", "impulse_noise")
BLUR = ("defocus_blur", "motion_blur", "zoom_blur")


@pytest.fixture(scope="module")
def photos():
    """Parts of two photographs, `[4, 96, 96, 3]`."""
    parts = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    return np.stack(
        [photo[at : at + 96, at : at + 96] for photo in parts for at in (120, 260)]
    )


def grey(value, side=32):
    return np.full((side, side, 3), value, np.uint8)


def mean_change(images, corruption, severity):
    changed = corrupt_many(images, range(len(images)), corruption, severity)
    return np.abs(changed.astype(float) - images).mean()


def test_every_corruption_has_five_settings_at_three_sizes():
    assert tuple(SETTINGS) == CORRUPTIONS
    for sides in SETTINGS.values():
        assert list(sides) == [32, 64, 224]
        assert {len(settings) for settings in sides.values()} == {5}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_images_of_any_size_stay_images_and_are_the_same_every_time(corruption, photos):
    for side in (8, 33, 96):
        image = photos[0][:side, :side]
        for severity in SEVERITIES:
            found = corrupt(image, corruption, severity, seed=3, example=5)
            again = corrupt(image.copy(), corruption, severity, seed=3, example=5)
            assert found.shape == image.shape and found.dtype == np.uint8
            np.testing.assert_array_equal(found, again)
        assert np.any(found != image)


@pytest.mark.parametrize("corruption", NOISE + ("snow", "fog", "elastic_transform"))
def test_seed_example_and_severity_decide_the_random_numbers(corruption, photos):
    ours = corrupt(photos[0], corruption, 3, seed=0, example=0)
    for other in ({"seed": 1}, {"example": 1}):
        assert np.any(corrupt(photos[0], corruption, 3, **other) != ours)
    # Not the same noise, only stronger.
    if corruption == "gaussian_noise":
        weak = corrupt(grey(128), corruption, 1).astype(float) - 128
        strong = corrupt(grey(128), corruption, 5).astype(float) - 128
        assert abs(np.corrcoef(weak.ravel(), strong.ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("corruption", (*NOISE, *BLUR, "contrast", "brightness"))
@pytest.mark.parametrize("side", (32, 96))
def test_change_grows_with_severity(corruption, side, photos):
    images = photos[:, :side, :side]
    changes = [mean_change(images, corruption, severity) for severity in SEVERITIES]
    assert np.all(np.diff(changes[::2]) > 0), changes
    # The release has severities 3 and 4 of motion blur nearly alike at 32 pixels.
    assert np.all(np.diff(changes) > -0.02 * changes[0]), changes


def test_noise_has_the_moments_of_its_definition():
    for severity, deviation in zip(
        SEVERITIES, SETTINGS["gaussian_noise"][32], strict=True
    ):
        found = corrupt(grey(128), "gaussian_noise", severity).astype(float)
        assert found.std() == pytest.approx(255 * deviation, rel=0.05)
        assert found.mean() == pytest.approx(128, abs=2)
    for severity, photons in zip(SEVERITIES, SETTINGS["shot_noise"][32], strict=True):
        found = corrupt(grey(100), "shot_noise", severity).astype(float) / 255
        mean = 100 / 255
        assert found.mean() == pytest.approx(mean, rel=0.02)
        assert found.var() == pytest.approx(mean / photons, rel=0.08)
    for severity, share in zip(SEVERITIES, SETTINGS["impulse_noise"][224], strict=True):
        found = corrupt(grey(100, 224), "impulse_noise", severity)
        assert np.mean(found == 0) == pytest.approx(share / 2, rel=0.05)
        assert np.mean(found == 255) == pytest.approx(share / 2, rel=0.05)


def test_blurs_keep_what_has_one_colour():
    for corruption in (*BLUR, "glass_blur", "pixelate", "elastic_transform"):
        for severity in SEVERITIES:
            np.testing.assert_array_equal(
                corrupt(grey(77), corruption, severity), grey(77), err_msg=corruption
            )


def test_a_point_out_of_focus_is_a_disk():
    image = grey(0, 65)
    image[32, 32] = 255
    found = corrupt(image, "defocus_blur", 5).astype(float)[..., 0]  # radius 3
    distance = np.hypot(*(np.indices(found.shape) - 32))
    inside = found[distance <= 3]
    assert inside.max() - inside.min() <= 1
    assert np.all(found[distance > 4.3] == 0)
    assert inside.mean() == pytest.approx(
        255 / 29, abs=1
    )  # 29 points have distance <= 3


def test_a_moving_point_leaves_a_trail_to_one_side():
    image = grey(0, 96)
    image[48, 48] = 255
    found = corrupt(image, "motion_blur", 5).astype(float)[..., 0]
    rows, columns = np.nonzero(found)
    # Within 45 degrees of horizontal, and nothing on the right.
    assert columns.max() == 48 and np.all(np.abs(rows - 48) <= 48 - columns + 1)
    distance = np.hypot(*(np.indices(found.shape) - 48))
    weights = np.exp(-((np.arange(25) / 3) ** 2) / 2)
    expected = np.average(np.arange(25), weights=weights)
    assert np.average(distance, weights=found) == pytest.approx(expected, abs=0.4)
    assert found.sum() == pytest.approx(255, abs=5)


def test_glass_moves_pixels_no_further_than_its_reach():
    image = np.arange(32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    image[..., 0], image[..., 1] = np.indices((32, 32)) * 8
    image[..., 2] = 0
    found = corrupt(
        image, "glass_blur", 1
    )  # sigma 0.05 blurs nothing, reach 1, 1 round
    places = found[..., :2].astype(int) // 8
    moved = np.abs(places - np.moveaxis(np.indices((32, 32)), 0, -1)).max(axis=-1)
    assert np.all(found % 8 == 0) and np.mean(moved > 0) > 0.5
    assert np.mean(moved <= 1) > 0.5  # a copy of a copy has come further


def test_brightness_and_contrast_against_their_formulas(photos):
    image = photos[0][:24, :24]
    x = image / 255
    found = corrupt(image, "brightness", 3)
    for row, column in np.ndindex(image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[row, column])
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.15, 1))
        np.testing.assert_allclose(found[row, column], 255 * np.array(expected), atol=1)
    np.testing.assert_array_equal(corrupt(grey(0), "brightness", 5), grey(76))
    mean = x.mean(axis=(0, 1))
    expected = 255 * (mean + 0.15 * (x - mean))
    np.testing.assert_allclose(corrupt(image, "contrast", 5), expected, atol=0.51)


def test_zoom_is_towards_the_middle_and_weather_is_bright(photos):
    half = grey(0, 64)
    half[:, 32:] = 200
    found = corrupt(half, "zoom_blur", 5)
    np.testing.assert_array_equal(found[:, :28], 0)
    np.testing.assert_array_equal(found[:, 36:], 200)
    dark = grey(20, 64)
    for corruption in ("snow", "fog", "frost"):
        means = [
            np.mean([corrupt(dark, corruption, s, example=n) for n in range(8)])
            for s in (1, 5)
        ]
        if corruption == "fog":  # what is dark stays darker than what is lit
            assert corrupt(grey(250, 64), "fog", 5).mean() > means[1] + 20
        else:
            assert means[1] > means[0] > 20
