"""Policies inside the step: what the host makes of a view, bit for bit, and its draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax import builders
from supcon_jax.data import augment, operations, pipeline, policies
from supcon_jax.data.views import POLICIES, Augmentation
from supcon_jax.run.opening import open_run
from tests.photos import photo
from tests.runs import first_batches, pretrain_config

RNG = np.random.default_rng(0)
NAMES = POLICIES[1:]


def images(height, width):
    """Noise, a photo, one with few levels, one of a single colour."""
    noise = RNG.integers(0, 256, (height, width, 3), np.uint8)
    picture = photo()[20 : 20 + height, 20 : 20 + width]
    flat = np.broadcast_to(np.uint8([10, 200, 30]), noise.shape)
    picture = (255 * picture).round().astype(np.uint8)
    return np.stack([noise, picture, noise // 64 + 100, flat])


BLOCK = 64


@jax.jit
def outputs_of_block(batch, parameters, place):
    def apply(row, negative, image):
        image = jnp.moveaxis(image, -1, 0).astype(jnp.int32)
        out = policies.apply_operation(image, parameters, row, negative, place)
        return jnp.moveaxis(out, 0, -1)

    over_images = jax.vmap(apply, (None, None, 0))
    over_signs = jax.vmap(over_images, (None, 0, None))
    signs = jnp.array([False, True])
    return jax.vmap(over_signs, (0, None, None))(jnp.arange(BLOCK), signs, batch)


def in_step(batch, rows, place=(0.0, 0.0)):
    """`[R, 2, n, H, W, 3]`: each row with either sign on each image.

    In blocks of rows, so that one program serves all for images of a size.
    """
    found = []
    for start in range(0, len(rows), BLOCK):
        block = tuple(rows[start : start + BLOCK])
        padded = (*block, *[policies.IDENTITY] * (BLOCK - len(block)))
        parameters = policies.build_parameters(padded, *batch.shape[1:3])
        out = outputs_of_block(batch, parameters, np.float32(place))
        found.append(np.asarray(out)[: len(block)])
    return np.concatenate(found)


# --- operations ---


@pytest.fixture(scope="module")
def host_operations():
    pytest.importorskip("tensorflow")
    from supcon_jax.data import host_operations

    return host_operations


SIZES = [(7, 10), (32, 32)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_operation_is_the_hosts_at_every_level(size, host_operations):
    """Of all that the policies can draw; not one pixel differs."""
    import tensorflow as tf

    batch = images(*size)
    rows = [row for policy in NAMES for row in policies.policy_rows(policy)]
    rows += policies.policy_rows("rand_augment", 3.7)
    rows = tuple(dict.fromkeys(rows))
    got = in_step(batch, rows)
    # Every image meets every operation; TensorFlow takes too long for all levels of all.
    shown = 0
    for (name, argument), both in zip(rows, got, strict=True):
        if name in ("Identity", "Cutout"):
            continue
        for sign, outputs in zip((1, -1), both, strict=True):
            if sign < 0 and name not in SIGNED:
                continue
            value = tf.constant(sign * argument, tf.float32)
            shown = (shown + 1) % len(batch)
            theirs = host_operations.FUNCTIONS[name](tf.constant(batch[shown]), value)
            np.testing.assert_array_equal(outputs[shown], theirs, f"{name} {value}")
    np.testing.assert_array_equal(got[rows.index(policies.IDENTITY), 0], batch)


SIGNED = {
    name
    for rules in (
        operations.official_rules(translate=1.0, cutout=1.0),
        operations.WIDE_RULES,
    )
    for name, rule in rules.items()
    if rule.signed
}


def test_signed_operations():
    assert SIGNED == {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}


def test_operations_equal_the_official_ones():
    """The golden outputs that the host is tested against, with its tolerances."""
    from tests.test_host_operations import SLACK, golden

    for kind, count in (("pixels", 8), ("flat", 14)):
        batch, outputs = golden(kind)
        batch = np.broadcast_to(batch, (2, 96, 96, 3))
        keys = [key for key in outputs if not key.startswith("contrast")]
        names = [key.split("/")[0] for key in keys]
        rows = tuple(
            (name.title().replace("_", ""), float(key.partition("/")[2] or 0))
            for name, key in zip(names, keys, strict=True)
        )
        rows = tuple((n.replace("Autoc", "AutoC"), value) for n, value in rows)
        got = in_step(batch, rows)[:, 0]
        for name, key, output in zip(names, keys, got, strict=True):
            differs = np.abs(output - outputs[key].astype(int)).max()
            assert differs <= SLACK.get(name, 0), key
        assert len(set(names)) == count


def test_cutout_greys_the_hosts_square():
    batch = images(32, 32)
    rows = (("Cutout", 6.0),)
    for place in ((0.0, 0.5), (0.99, 0.3)):
        got = in_step(batch, rows, place)[0, 0, 0]
        top, left = (int(32 * part) for part in place)
        expected = batch[0].copy()
        expected[max(0, top - 6) : top + 6, max(0, left - 6) : left + 6] = 128
        np.testing.assert_array_equal(got, expected)


# --- the wide space ---

# Argument at the levels 0, 15 and 30, by hand.
WIDE = {
    "Rotate": (0, 67, 135),
    "PillowSolarize": (256, 128, 0),
    "Color": (0.01, 1.005, 2.0),
    "Posterize": (8, 5, 2),
    "Contrast": (0.01, 1.005, 2.0),
    "Brightness": (0.01, 1.005, 2.0),
    "Sharpness": (0.01, 1.005, 2.0),
    "ShearX": (0, 0.495, 0.99),
    "ShearY": (0, 0.495, 0.99),
    "TranslateX": (0, 16, 32),
    "TranslateY": (0, 16, 32),
}


def test_the_wide_space_is_its_authors():
    rows = policies.policy_rows("trivial_augment")
    for name, expected in WIDE.items():
        arguments = [argument for row, argument in rows if row == name]
        assert len(arguments) == 31
        np.testing.assert_allclose(
            [arguments[m] for m in (0, 15, 30)], expected, atol=1e-5
        )
    assert {name for name, _ in rows} - WIDE.keys() == {
        "Identity",
        "AutoContrast",
        "Equalize",
    }
    assert operations.WIDE_RULES.keys() == {n for n, _ in rows} - {"Identity"}


def test_pillow_leaves_the_image_alone_at_its_highest_threshold(host_operations):
    import tensorflow as tf

    batch = images(32, 32)
    image = batch[0]
    np.testing.assert_array_equal(host_operations.pillow_solarize(image, 256), image)
    got = in_step(batch, (("PillowSolarize", 256.0),))[0, 0]
    np.testing.assert_array_equal(got, batch)
    opposite = host_operations.solarize(tf.constant(image), 256)
    np.testing.assert_array_equal(opposite, 255 - image)


# --- draws ---

COUNT = 20_000


@functools.lru_cache
def drawn(policy, **options):
    """Rows, signs and places of many keys, as arrays."""
    augmentation = Augmentation(policy=policy, **options)
    keys = jax.random.split(jax.random.key(1), COUNT)
    draw = functools.partial(policies.draw, augmentation=augmentation)
    return policies.Drawn(*map(np.asarray, jax.jit(jax.vmap(draw))(keys)))


def assert_share(found, expected, what=""):
    spread = np.sqrt(max(expected * (1 - expected), 1e-9) / COUNT)
    assert abs(np.mean(found) - expected) <= 4.5 * spread, what


def test_auto_augment_draws_as_the_table_says():
    rows = policies.policy_rows("auto_augment")
    row = drawn("auto_augment").row
    assert row.shape == (COUNT, 2)
    pairs = {}
    for number, (one, two) in enumerate(operations.POLICY_V0):
        first, second = 1 + 2 * number, 2 + 2 * number
        assert (rows[first][0], rows[second][0]) == (one[0], two[0])
        for a, p in ((first, one[1]), (0, 1 - one[1])):
            for b, q in ((second, two[1]), (0, 1 - two[1])):
                pairs[a, b] = pairs.get((a, b), 0) + p * q / 25
    for (a, b), chance in pairs.items():
        assert_share((row[:, 0] == a) & (row[:, 1] == b), chance, (rows[a], rows[b]))
    assert sum(pairs.values()) == pytest.approx(1)


@pytest.mark.parametrize("layers", [1, 3])
def test_rand_augment_draws_uniformly(layers):
    row = drawn("rand_augment", layers=layers).row
    assert row.shape == (COUNT, layers)
    for layer in range(layers):
        for number in range(17):
            assert_share(row[:, layer] == number, 1 / 17, number)
    if layers > 1:  # layers are drawn apart
        assert_share((row[:, 0] == 3) & (row[:, 1] == 5), 1 / 17**2)


def test_trivial_augment_draws_operation_and_level_uniformly():
    row = drawn("trivial_augment").row[:, 0]
    assert_share(row == 0, 1 / 14)
    number, level = np.divmod(row[row > 0] - 1, 31)
    for operation in range(13):
        assert_share(np.mean(number == operation) * 13 / 14, 1 / 14)
    for step in range(31):
        assert_share(np.mean(level == step) * 13 / 14, 13 / 14 / 31)
    assert np.corrcoef(number, level)[0, 1] < 0.03


@pytest.mark.parametrize("policy", NAMES)
def test_signs_and_places_are_drawn_apart(policy):
    found = drawn(policy)
    for layer in range(found.row.shape[1]):
        assert_share(found.negative[:, layer], 0.5)
        place = np.sort(found.place[:, layer], axis=0)
        uniform = np.linspace(0, 1, COUNT)[:, None]
        assert np.abs(place - uniform).max() < 2 / np.sqrt(COUNT)
        for other in (found.negative[:, layer], found.place[:, layer, 0]):
            assert abs(np.corrcoef(found.row[:, layer], other)[0, 1]) < 0.04


# --- in the step ---

BATCH = RNG.integers(0, 256, (4, 1, 8, 8, 3), np.uint8)
IDS = np.array([[0, 10], [0, 11], [3, 10], [3, 11]], np.int32)


@functools.lru_cache
def compiled(augmentation):
    return jax.jit(
        functools.partial(
            augment.augment_batch,
            augmentation=augmentation,
            seed=0,
            views=2,
            chunk_size=2,
        )
    )


def test_views_are_functions_of_epoch_index_and_view_alone():
    """So a resumed run, and one on other devices, sees the same."""
    options = Augmentation(crop_area=None, flip=False, policy="auto_augment")
    out = np.asarray(compiled(options)(BATCH, IDS))
    assert out.shape == (4, 2, 8, 8, 3)
    assert np.any(out[:, 0] != out[:, 1]) and np.any(out != BATCH / np.float32(255))
    levels = 255 * out
    np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
    order = np.array([2, 0, 3, 1])
    shuffled = compiled(options)(BATCH[order], IDS[order])
    np.testing.assert_array_equal(shuffled, out[order])


@pytest.mark.parametrize("policy", NAMES)
def test_a_run_in_memory_needs_no_tensorflow(policy, monkeypatch, tmp_path):
    """Whole images go into the step, whatever the policy."""

    def fail():
        raise AssertionError("the host was asked for")

    monkeypatch.setattr(pipeline, "_import_host", fail)
    run = open_run(pretrain_config(**{"augment.policy": policy}), tmp_path)
    assert run.plan.whole_images
    batch = next(first_batches(run))
    assert batch["image"].shape[1] == 1
    assert run.plan.abstract_batch()["image"].shape == batch["image"].shape
    step = builders.build_view_augmentation(run.config).step_part(whole_images=True)
    assert step.policy == policy and step.crop_area


def test_the_policy_comes_after_crop_flip_and_jitter_and_before_grey():
    """The same view, made of its parts with the same keys."""
    crop = Augmentation(crop_area=(0.3, 0.9))
    jitter = Augmentation(crop_area=None, flip=False, jitter_strength=0.5)
    policy = dataclasses.replace(
        crop, jitter_strength=0.5, policy="trivial_augment", extra=("cutout",)
    )

    @jax.jit
    def views(key, image):
        cropped = jnp.floor(255 * augment.augment_view(key, image, crop) + 0.5)
        jittered = augment.augment_view(key, cropped / 255, jitter)
        levels = jnp.floor(255.5 * jittered)
        policy_key = jax.random.fold_in(key, augment.POLICY_STREAM)
        sent = policies.apply_policy(policy_key, levels, policy) / 255
        cutout_key = jax.random.fold_in(key, augment.EXTRA_STREAM)
        return (
            augment.augment_view(key, image, policy),
            augment.cutout(cutout_key, sent),
            augment.cutout(cutout_key, jittered),
        )

    image = jnp.asarray(images(8, 8)[1], jnp.float32) / 255
    changed = 0
    for seed in range(6):
        got, expected, without = views(jax.random.key(seed), image)
        np.testing.assert_allclose(got, expected, atol=1e-6)
        changed += bool(np.any(np.abs(got - without) > 0.02))
    assert changed >= 4
