"""Labels of any integer type in supcon_loss: right against a float64 loop, or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import export

from supcon_jax import supcon_loss
from supcon_jax.losses import momentum_contrast_loss

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def loop(projections, labels, temperature=0.5):
    """Eq. 2 in float64, anchor by anchor; labels are compared as Python integers."""
    z = projections.astype(np.float64)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    images, views, _ = z.shape
    rows = [(i, v) for i in range(images) for v in range(views)]
    losses = []
    for i, v in rows:
        others = [(j, w) for j, w in rows if (j, w) != (i, v)]
        positive = [
            j == i or (int(labels[i]) >= 0 and int(labels[j]) == int(labels[i]))
            for j, _ in others
        ]
        logits = np.array([z[i, v] @ z[j, w] for j, w in others]) / temperature
        if any(positive):
            losses.append(np.log(np.exp(logits).sum()) - logits[positive].mean())
    return np.mean(losses) if losses else 0.0


@st.composite
def batches(draw):
    dtype = np.dtype(draw(st.sampled_from(INTEGERS)))
    limits = np.iinfo(dtype)
    few = draw(
        st.lists(st.integers(int(limits.min), int(limits.max)), min_size=1, max_size=4)
    )
    count = draw(st.integers(1, 6))
    labels = draw(st.lists(st.sampled_from(few), min_size=count, max_size=count))
    shape = (count, draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    seed = draw(st.integers(0, 100))
    return np.random.default_rng(seed).normal(size=shape), np.array(labels, dtype)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(batches())
def test_any_integers_are_right(batch):
    projections, labels = batch
    expected = loop(projections, labels)
    projections = projections.astype(np.float32)
    for given_labels in (labels, labels.tolist()):
        found = supcon_loss(projections, given_labels, temperature=0.5)
        assert float(found) == pytest.approx(expected, rel=2e-4, abs=2e-5)


@pytest.mark.parametrize(
    "ids",
    [[5, 5 + 2**32, 5, 7], [2**31, 2**31, 1, 2**31 + 1], [2**63 - 1, -3, 0, 2**63 - 1]],
)
def test_wide_ids_are_not_merged(ids):
    projections = np.random.default_rng(0).normal(size=(4, 2, 8)).astype(np.float32)
    found = supcon_loss(projections, np.array(ids), temperature=0.5)
    assert float(found) == pytest.approx(loop(projections, ids), rel=1e-5)


@pytest.mark.parametrize("dtype", ["uint32", "uint16", "int8", "int32"])
def test_traced_types_are_not_merged(dtype):
    """uint32 from 2^31 on would be negative numbers, which mean: no label."""
    top = np.iinfo(dtype).max
    labels = np.array([top, 1, top, top - 1], dtype)
    projections = np.random.default_rng(0).normal(size=(4, 2, 8)).astype(np.float32)
    traced = jax.jit(lambda x, y: supcon_loss(x, y, temperature=0.5))
    found = traced(projections, labels)
    assert float(found) == pytest.approx(loop(projections, labels), rel=1e-5)


def test_64_bits_in_jaxs_64_bit_mode():
    ids = np.array([5, 5 + 2**32, 5, -1])
    projections = np.random.default_rng(0).normal(size=(4, 2, 8)).astype(np.float32)
    with jax.enable_x64(True):
        for labels in (jnp.asarray(ids), jnp.asarray(np.abs(ids).astype(np.uint64))):
            found = jax.jit(lambda x, y: supcon_loss(x, y, temperature=0.5))(
                jnp.asarray(projections), labels
            )
            expected = loop(projections, np.asarray(labels))
            assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "labels",
    [[0.0, 1.0], [True, False], ["a", "b"], [[0, 1]], [0], [0, 1, 2], [None, 1]],
    ids=repr,
)
def test_what_is_no_label_is_refused(labels):
    projections = np.ones((2, 2, 3), np.float32)
    with pytest.raises(ValueError, match="labels must be"):
        supcon_loss(projections, labels)


# --- the loss in other people's settings ---

PATHS = [
    {},
    {"summation": "inside"},
    {"denominator": "one_positive"},
    {"denominator": "only_negatives"},
    {"contrast_mode": "one"},
    {"scale": "temperature"},
    {"normalize": False},
    {"temperature": 0.01},
    {"reduction": "none"},
]


@pytest.mark.parametrize("options", PATHS, ids=str)
def test_strict_promotion_of_ranks_and_types(options):
    rng = np.random.default_rng(0)
    projections = jnp.asarray(rng.normal(size=(6, 2, 8)), jnp.float32)
    labels = jnp.arange(6) % 3

    def value(x):
        loss, metrics = supcon_loss(x, labels, with_diagnostics=True, **options)
        return jnp.sum(loss), metrics

    expected = jax.value_and_grad(value, has_aux=True)(projections)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found = jax.jit(jax.value_and_grad(value, has_aux=True))(projections)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found,
        expected,
    )


TYPES = [
    (False, "bfloat16"),
    (True, "float16"),
    (True, "float32"),
    (True, "float64"),
]


@pytest.mark.parametrize(("x64", "dtype"), TYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"denominator": "one_positive"}], ids=str)
def test_strict_promotion_of_other_types(x64, dtype, options):
    """Of the projections and of the temperature, known or traced; with rows of weights."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.1, 1, (4, 3)).astype(np.float32)

    def value(x, temperature):
        return supcon_loss(
            x,
            weights,
            temperature=temperature,
            scale=np.float64(2),
            with_diagnostics=True,
            **options,
        )

    gradient = jax.value_and_grad(value, has_aux=True)
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        x = jnp.asarray(rng.normal(size=(4, 2, 3))).astype(dtype)
        known = [0.1, 1, np.float64(0.1), jnp.float32(0.1)]
        found = [
            jax.eval_shape(lambda x, t=number: gradient(x, t), x) for number in known
        ]
        traced = [jnp.bfloat16(0.1), jnp.float32(0.1), jnp.int32(1)]
        found += [jax.eval_shape(gradient, x, number) for number in traced]
    for (loss, metrics), slope in found:
        assert slope.dtype == dtype
        assert loss.dtype == (np.float64 if dtype == "float64" else np.float32)
        assert {value.dtype for value in metrics.values()} == {np.dtype(np.float32)}


def test_a_momentum_encoder_takes_any_types_too():
    groups = jnp.arange(2, dtype=jnp.int32)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        loss, metrics = momentum_contrast_loss(
            jnp.eye(2, dtype=jnp.bfloat16), groups, jnp.eye(2), groups,
            temperature=np.float64(0.5), scale=np.float64(2), with_diagnostics=True,
        )  # fmt: skip
    assert loss.dtype == np.float32
    assert float(loss) == pytest.approx(2 * np.log(1 + np.exp(-2)), rel=1e-6)
    assert float(metrics["positive_cosine"]) == pytest.approx(1, rel=1e-6)


def test_forward_mode_is_refused_by_jax():
    """docs/losses.md says so: the gradient is written for reverse mode."""
    x = jnp.ones((2, 2, 3))
    with pytest.raises(TypeError, match="forward-mode|jvp"):
        jax.jvp(supcon_loss, (x,), (x,))


def test_named_axes_of_vmap_and_pmap():
    """As shard_map's: each part's loss is that of the whole batch."""
    rng = np.random.default_rng(0)
    projections = rng.normal(size=(16, 2, 8)).astype(np.float32)
    labels = np.arange(16, dtype=np.int32) % 4
    whole = float(supcon_loss(projections, labels))
    parts = projections.reshape(4, 4, 2, 8), labels.reshape(4, 4)
    loss = functools.partial(supcon_loss, axis_name="d")
    for mapped in (jax.vmap(loss, axis_name="d"), jax.pmap(loss, axis_name="d")):
        np.testing.assert_allclose(mapped(*parts), [whole] * 4, rtol=1e-6)
    each = [float(supcon_loss(x, y)) for x, y in zip(*parts, strict=True)]
    np.testing.assert_allclose(jax.vmap(supcon_loss)(*parts), each, rtol=1e-6)


def test_export_of_a_fixed_and_of_a_symbolic_batch():
    projections = np.random.default_rng(0).normal(size=(4, 2, 8)).astype(np.float32)
    labels = np.array([0, 0, 1, 1], np.int32)
    exported = export.export(jax.jit(supcon_loss))(projections, labels)
    expected = float(supcon_loss(projections, labels))
    assert float(exported.call(projections, labels)) == pytest.approx(
        expected, rel=1e-6
    )
    (size,) = export.symbolic_shape("b")
    shapes = [
        jax.ShapeDtypeStruct((size, 2, 8), np.float32),
        jax.ShapeDtypeStruct((size,), np.int32),
    ]
    with pytest.raises(TypeError):
        export.export(jax.jit(supcon_loss))(*shapes)
