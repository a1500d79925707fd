"""What host and step share: each operation is done once, and the crops are as stated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from supcon_jax import builders
from supcon_jax.data import augment, views
from supcon_jax.data.views import Augmentation
from tests.test_augment import assert_uniform

EVERYTHING = Augmentation(
    crop_area=(0.2, 0.9),
    flip=True,
    jitter_strength=0.5,
    jitter_probability=0.7,
    grayscale_probability=0.2,
    blur_probability=0.4,
    extra=("cutout",),
)


def work(augmentation):
    """The operations that an augmentation does."""
    switches = {
        "crop": augmentation.crop_area is not None,
        "flip": augmentation.flip,
        "jitter": augmentation.jitters,
        "policy": augmentation.policy != "none",
        "grayscale": augmentation.grayscale_probability > 0,
        "blur": augmentation.blur_probability > 0,
        "extra": len(augmentation.extra) > 0,
    }
    return {name for name, done in switches.items() if done}


@pytest.mark.parametrize("policy", views.POLICIES)
def test_host_and_step_do_each_operation_once(policy):
    options = dataclasses.replace(EVERYTHING, policy=policy)
    host, step = options.host_part(), options.step_part(whole_images=False)
    assert work(host) | work(step) == work(options)
    assert not work(host) & work(step)
    # Jitter comes before a policy, so it runs where the policy runs.
    assert ("jitter" in work(host)) == (policy != "none")
    assert host.crop_area == options.crop_area


@pytest.mark.parametrize("policy", views.POLICIES)
def test_the_step_does_all_for_whole_images(policy):
    options = dataclasses.replace(EVERYTHING, policy=policy)
    assert options.step_part(whole_images=True) == options


def test_no_probability_is_no_jitter():
    assert not dataclasses.replace(EVERYTHING, jitter_probability=0.0).jitters
    assert not dataclasses.replace(EVERYTHING, jitter_strength=0.0).jitters


def test_every_key_of_the_config_is_an_option():
    """Values that differ from each other and from the defaults arrive where they belong."""
    config = common.get_config()
    values = {
        "crop_area": (0.3, 0.6),
        "flip": False,
        "jitter_strength": 0.35,
        "jitter_probability": 0.45,
        "jitter_kind": "tensorflow",
        "policy": "rand_augment",
        "rand_augment_layers": 3,
        "rand_augment_magnitude": 7.0,
        "grayscale_probability": 0.15,
        "blur_probability": 0.25,
        "blur_border": "edge",
        "extra": ("cutout",),
    }
    mixing = {"mixup_alpha", "cutmix_alpha"}
    assert set(config.augment) == set(values) | mixing
    assert len(values) == len(dataclasses.fields(Augmentation))
    config.augment.update(values)
    built = builders.build_view_augmentation(config)
    for name, value in values.items():
        assert getattr(built, name.removeprefix("rand_augment_")) == value


# --- crops ---


@pytest.mark.slow
def test_the_crop_of_the_step_makes_as_many_attempts_as_stated(monkeypatch):
    """Few rectangles of nearly the whole area fit; the fallback is the whole image."""
    keys = jax.random.split(jax.random.key(0), 500)
    image = jnp.asarray(np.random.default_rng(0).uniform(size=(9, 9, 3)), jnp.float32)

    def whole_images():
        crop = functools.partial(augment.random_resized_crop, area=(0.99, 1.0))
        out = jax.vmap(crop, in_axes=(0, None))(keys, image)
        return np.mean(np.abs(out - image).max(axis=(1, 2, 3)) < 1e-6)

    assert views.TORCHVISION_CROP.attempts == 10
    usual = whole_images()
    for attempts, more in ((1, True), (100, False)):
        spec = dataclasses.replace(views.TORCHVISION_CROP, attempts=attempts)
        monkeypatch.setattr(augment, "TORCHVISION_CROP", spec)
        assert (whole_images() > usual) == more
        assert (whole_images() < usual) != more


@pytest.fixture(scope="module")
def host():
    pytest.importorskip("tensorflow")
    from supcon_jax.data.pipeline import _import_host

    return _import_host()[1]


def host_rectangles(host, monkeypatch, shape, area, count):
    """Heights and widths `[n]` of the crops that the host takes of an image."""
    import tensorflow as tf

    sizes = []

    def record(image, size):
        sizes.append(tuple(image.shape[:2]))
        return tf.zeros((*size, 3))

    with monkeypatch.context() as patch:
        patch.setattr(host, "_resize", record)
        for index in range(count):
            host.crop_and_augment(
                tf.zeros((*shape, 3), tf.uint8),
                tf.constant([0, index]),
                Augmentation(crop_area=area, flip=False),
                image_size=2,
                views=1,
                seed=0,
            )
    return np.asarray(sizes).T


def test_the_crop_of_the_host_is_drawn_as_stated(host, monkeypatch):
    """The aspect ratio is uniform, then the height among those the area allows."""
    side, area = 1000, (0.15, 0.5)  # at most 0.82 of a side: every attempt fits
    height, width = host_rectangles(host, monkeypatch, (side, side), area, 1500)
    aspect = width / height
    assert_uniform(aspect, 3 / 4, 4 / 3, slack=0.003)  # of whole pixels
    least, most = (side * np.sqrt(share / aspect) for share in area)
    assert_uniform((height - least) / (most - least), 0, 1, slack=0.01)
    # So the area is not uniform, as it is in the step.
    assert np.mean(height * width / side**2) < np.mean(area) - 0.015


def test_the_crop_of_the_host_covers_its_least_share(host, monkeypatch):
    height, width = host_rectangles(host, monkeypatch, (100, 100), (0.05, 0.2), 300)
    share = height * width / 100**2
    assert views.TENSORFLOW_CROP.least_covered == 0.1
    assert 0.1 <= share.min() < 0.11 and 0.19 < share.max() <= 0.2


def test_the_host_falls_back_to_the_whole_image(host, monkeypatch):
    """Of a wide image, the whole area fits no aspect ratio up to 4/3."""
    height, width = host_rectangles(host, monkeypatch, (8, 32), (1.0, 1.0), 5)
    assert set(height) == {8} and set(width) == {32}


def test_the_host_makes_as_many_attempts_as_stated(host, monkeypatch):
    """Few attempts at an area that is hard to meet end with the whole image."""

    def whole_images():
        height, width = host_rectangles(host, monkeypatch, (40, 40), (0.97, 0.99), 60)
        return np.mean((height == 40) & (width == 40))

    assert views.TENSORFLOW_CROP.attempts == 100
    usual = whole_images()
    spec = dataclasses.replace(views.TENSORFLOW_CROP, attempts=1)
    monkeypatch.setattr(host, "TENSORFLOW_CROP", spec)
    assert usual < 0.2 and whole_images() > 0.6
