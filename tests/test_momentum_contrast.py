"""The loss against keys: an independent loop, its limits, its edges, its refusals."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax import parallel
from supcon_jax.losses import momentum_contrast, supcon_loss
from supcon_jax.losses.momentum_contrast import EMPTY, momentum_contrast_loss

RNG = np.random.default_rng(0)
QUERIES = RNG.normal(size=(8, 5)).astype(np.float32)
KEYS = RNG.normal(size=(24, 5)).astype(np.float32)
GROUPS = (np.arange(8) % 3).astype(np.int32)
KEY_GROUPS = (np.arange(24) % 4).astype(np.int32)


def loop(queries, groups, keys, key_groups, temperature, summation, denominator):
    """The formulas with a loop a query and a loop a key, in float64."""
    unit = [np.asarray(x, np.float64) / np.linalg.norm(x) for x in queries]
    pairs = [
        (np.asarray(k, np.float64) / np.linalg.norm(k), int(g))
        for k, g in zip(keys, key_groups, strict=True)
        if g != EMPTY
    ]
    losses = []
    for query, group in zip(unit, groups, strict=True):
        positive = [np.exp(query @ k / temperature) for k, g in pairs if g == group]
        negative = sum(np.exp(query @ k / temperature) for k, g in pairs if g != group)
        if not positive or (denominator == "only_negatives" and not negative):
            continue
        bottoms = {
            "all": [sum(positive) + negative] * len(positive),
            "one_positive": [p + negative for p in positive],
            "only_negatives": [negative] * len(positive),
        }[denominator]
        ratios = [p / b for p, b in zip(positive, bottoms, strict=True)]
        outside = -np.mean(np.log(ratios))
        losses.append(outside if summation == "outside" else -np.log(np.mean(ratios)))
    return np.mean(losses)


@pytest.mark.parametrize("summation", ["outside", "inside"])
@pytest.mark.parametrize("denominator", ["all", "one_positive", "only_negatives"])
def test_equals_a_loop(summation, denominator):
    key_groups = KEY_GROUPS.copy()
    key_groups[5:9] = EMPTY
    options = {
        "temperature": 0.2,
        "summation": summation,
        "denominator": denominator,
    }
    ours = momentum_contrast_loss(
        QUERIES, GROUPS, KEYS, key_groups, block_size=3, **options
    )
    theirs = loop(QUERIES, GROUPS, KEYS, key_groups, **options)
    assert float(ours) == pytest.approx(theirs, rel=1e-5)


def test_keys_that_are_the_other_views_give_the_loss_of_first_anchors():
    """With the own first view as one more negative, `contrast_mode="one"` is the same."""
    views = RNG.normal(size=(6, 2, 5)).astype(np.float32)
    labels = np.arange(6, dtype=np.int32)
    # Every image a class: the only positive is the other view; the queue holds the others.
    keys = np.concatenate([views[:, 1], views[:, 0]])
    losses = []
    for i in range(6):
        groups = np.concatenate([labels, labels + 100])
        groups[6 + i] = EMPTY  # an anchor is not compared with itself
        losses.append(
            momentum_contrast_loss(views[i : i + 1, 0], labels[i : i + 1], keys, groups)
        )
    whole = supcon_loss(views, labels, contrast_mode="one")
    assert float(np.mean(losses)) == pytest.approx(float(whole), rel=1e-6)


def test_scale_and_no_gradient_to_keys():
    plain = momentum_contrast_loss(QUERIES, GROUPS, KEYS, KEY_GROUPS)
    for scale, factor in (("temperature", 0.1), (1.5, 1.5)):
        scaled = momentum_contrast_loss(QUERIES, GROUPS, KEYS, KEY_GROUPS, scale=scale)
        assert float(scaled) == pytest.approx(factor * float(plain), rel=1e-6)
    gradient = jax.grad(momentum_contrast_loss, argnums=(0, 2))(
        QUERIES, GROUPS, KEYS, KEY_GROUPS
    )
    assert float(jnp.max(jnp.abs(gradient[0]))) > 1e-3
    assert float(jnp.max(jnp.abs(gradient[1]))) == 0


@pytest.mark.parametrize("case", ["empty", "no positive", "zero", "equal", "cold"])
def test_edges_are_finite(case):
    queries, keys = jnp.asarray(QUERIES), jnp.asarray(KEYS)
    key_groups, temperature = jnp.asarray(KEY_GROUPS), 0.1
    if case == "empty":
        key_groups = jnp.full_like(key_groups, EMPTY)
    if case == "no positive":
        key_groups = key_groups + 100
    if case == "zero":
        queries, keys = jnp.zeros_like(queries), jnp.zeros_like(keys)
    if case == "equal":
        queries, keys = jnp.ones_like(queries), jnp.ones_like(keys)
    if case == "cold":
        temperature = 0.01
    loss, gradient = jax.value_and_grad(momentum_contrast_loss)(
        queries, GROUPS, keys, key_groups, temperature=temperature
    )
    assert np.isfinite(float(loss)) and np.all(np.isfinite(gradient))
    if case in ("empty", "no positive"):
        assert float(loss) == 0 and float(jnp.max(jnp.abs(gradient))) == 0
    if case in ("zero", "equal"):
        assert float(loss) == pytest.approx(np.log(24), rel=1e-6)


def test_bfloat16_is_computed_in_float32():
    low = [jnp.asarray(x, jnp.bfloat16) for x in (QUERIES, KEYS)]
    ours = momentum_contrast_loss(low[0], GROUPS, low[1], KEY_GROUPS)
    high = [x.astype(jnp.float32) for x in low]
    assert ours.dtype == jnp.float32
    assert float(ours) == float(
        momentum_contrast_loss(high[0], GROUPS, high[1], KEY_GROUPS)
    )


def test_diagnostics_are_of_the_keys_that_are_there():
    key_groups = np.where(np.arange(24) < 12, KEY_GROUPS, EMPTY).astype(np.int32)
    _, found = momentum_contrast_loss(
        QUERIES, GROUPS, KEYS, key_groups, with_diagnostics=True
    )
    assert float(found["mean_positives"]) == 3  # 12 keys of 4 groups
    assert float(found["collapse_loss"]) == pytest.approx(np.log(12), rel=1e-6)
    unit_queries = QUERIES / np.linalg.norm(QUERIES, axis=1, keepdims=True)
    unit_keys = KEYS[:12] / np.linalg.norm(KEYS[:12], axis=1, keepdims=True)
    cosines = unit_queries @ unit_keys.T
    same = GROUPS[:, None] == key_groups[None, :12]
    assert float(found["positive_cosine"]) == pytest.approx(
        cosines[same].mean(), rel=1e-4
    )
    assert float(found["negative_cosine"]) == pytest.approx(
        cosines[~same].mean(), rel=1e-4
    )


def test_the_same_on_one_device_and_on_four():
    mesh = parallel.create_mesh(jax.devices()[:4])
    split, everywhere = jax.P("data"), jax.P()
    sharded = jax.shard_map(
        functools.partial(momentum_contrast_loss, axis_name="data"),
        mesh=mesh,
        in_specs=(split, split, everywhere, everywhere),
        out_specs=everywhere,
    )
    grad = jax.jit(jax.value_and_grad(sharded))
    value, gradient = jax.device_get(grad(QUERIES, GROUPS, KEYS, KEY_GROUPS))
    one = jax.device_get(
        jax.value_and_grad(momentum_contrast_loss)(QUERIES, GROUPS, KEYS, KEY_GROUPS)
    )
    np.testing.assert_allclose(value, one[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, one[1], atol=1e-6)


@pytest.mark.parametrize(
    "change", [{"keys": KEYS[:, :4]}, {"groups": GROUPS[:3]}, {"key_groups": GROUPS}]
)
def test_refuses_shapes_that_do_not_fit(change):
    arrays = {
        "queries": QUERIES,
        "groups": GROUPS,
        "keys": KEYS,
        "key_groups": KEY_GROUPS,
    }
    with pytest.raises(
        ValueError, match=r"expected \[B, D\], \[B\], \[K, D\] and \[K\]"
    ):
        momentum_contrast_loss(**(arrays | change))


@pytest.mark.parametrize(
    "option",
    [{"summation": "out"}, {"denominator": "some"}, {"temperature": 0}, {"scale": "x"}],
)
def test_refuses_options_out_of_their_range(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} must be"):
        momentum_contrast_loss(QUERIES, GROUPS, KEYS, KEY_GROUPS, **option)


def test_docstring_example():
    assert doctest.testmod(momentum_contrast).failed == 0
