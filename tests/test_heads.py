"""Heads: their formulas, how they start, zero embeddings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax.models import Classifier, ProjectionHead
from supcon_jax.models.heads import l2_normalize


def test_projection_head_formula():
    head = ProjectionHead(hidden_dims=(6, 5), output_dim=4)
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    params = head.init(jax.random.key(0), x, train=True)["params"]
    params = jax.tree.map(lambda p: p + 0.1, params)  # biases start at zero
    y = np.maximum(x @ params["dense1"]["kernel"] + params["dense1"]["bias"], 0)
    y = np.maximum(y @ params["dense2"]["kernel"] + params["dense2"]["bias"], 0)
    expected = y @ params["dense_out"]["kernel"]
    out = head.apply({"params": params}, x, train=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    assert out.shape == (7, 4)


def test_projection_head_bias_of_the_last_layer():
    x = np.ones((2, 3), np.float32)
    shapes = {}
    for bias in (False, True):
        head = ProjectionHead((4,), 5, bias=bias)
        variables = head.init(jax.random.key(0), x, train=True)
        shapes[bias] = jax.tree.map(np.shape, variables["params"]["dense_out"])
    assert shapes == {False: {"kernel": (4, 5)}, True: {"bias": (5,), "kernel": (4, 5)}}
    variables["params"]["dense_out"]["bias"] += 2.0
    shifted = head.apply(variables, x, train=True)
    variables["params"]["dense_out"]["bias"] *= 0.0
    np.testing.assert_allclose(
        shifted, head.apply(variables, x, train=True) + 2, rtol=1e-5
    )


def test_without_a_head_the_embedding_itself_is_compared():
    x = np.array([[3.0, 4.0]], np.float32)
    for normalize, expected in ((False, x), (True, x / 5)):
        head = ProjectionHead(output_dim=0, normalize_embedding=normalize)
        out, variables = head.init_with_output(jax.random.key(0), x, train=True)
        assert not jax.tree.leaves(variables)
        np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_projection_head_normalizes_what_comes_in_not_what_goes_out():
    head = ProjectionHead(output_dim=4, normalize_embedding=True)
    x = np.array([[3.0, 4.0], [0.6, 0.8]], np.float32)  # the same direction
    variables = head.init(jax.random.key(0), x, train=True)
    out = head.apply(variables, x, train=True)
    expected = np.array([0.6, 0.8]) @ variables["params"]["dense_out"]["kernel"]
    np.testing.assert_allclose(out, [expected, expected], rtol=1e-5)
    raw = ProjectionHead(output_dim=4).apply(variables, x, train=True)
    np.testing.assert_allclose(raw[0], 5 * expected, rtol=1e-5)


def test_projection_head_initial_values():
    head = ProjectionHead(hidden_dims=(512,), output_dim=128)
    params = head.init(jax.random.key(0), jnp.zeros((1, 512)), train=True)["params"]
    assert set(params) == {"dense1", "dense_out"}
    assert set(params["dense_out"]) == {"kernel"}  # no bias on the last layer
    assert np.all(params["dense1"]["bias"] == 0)
    for layer in params.values():
        kernel = np.asarray(layer["kernel"])
        np.testing.assert_allclose(kernel.std(), 0.01, rtol=0.02)
        assert abs(kernel.mean()) < 1e-4
        assert np.abs(kernel).max() > 0.035  # not truncated


def test_projection_head_batch_norm():
    """Each hidden unit is standardised before its ReLU; no bias of its own."""
    head = ProjectionHead(hidden_dims=(6,), output_dim=4, batch_norm=True)
    x = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    variables = head.init(jax.random.key(1), x, train=True)
    params = jax.tree.map(lambda p: p * 50, variables["params"])
    assert set(params["dense1"]) == {"kernel"}
    params["batch_norm1"] = variables["params"]["batch_norm1"]
    out, updated = head.apply(
        variables | {"params": params}, x, train=True, mutable=["batch_stats"]
    )
    y = np.asarray(x @ params["dense1"]["kernel"], np.float64)
    mean, var = y.mean(0), y.var(0)
    hidden = np.maximum((y - mean) / np.sqrt(var + 1e-5), 0)
    np.testing.assert_allclose(
        out, hidden @ params["dense_out"]["kernel"], rtol=1e-3, atol=1e-4
    )
    stats = updated["batch_stats"]["batch_norm1"]
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=1e-4)


def test_l2_normalize_values_and_zero_rows():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]])
    np.testing.assert_allclose(l2_normalize(x), [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(l2_normalize(x) * 2.0))(x)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    "model",
    [ProjectionHead(normalize_embedding=True), Classifier(3, normalize_embedding=True)],
)
def test_gradient_through_a_zero_embedding_is_finite(model):
    x = jnp.zeros((2, 4)).at[0, 0].set(1.0)
    variables = model.init(jax.random.key(0), x, train=True)
    gradient = jax.grad(
        lambda v, x: jnp.sum(jnp.sin(model.apply(v, x, train=True) + 1)), argnums=(0, 1)
    )(variables, x)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_classifier():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    zero = Classifier(4, init_name="zeros")
    variables = zero.init(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(
        zero.apply(variables, x, train=True), np.zeros((5, 4))
    )
    kernel = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    bias = np.array([1.0, 0, 0, -1], np.float32)
    variables = {"params": {"dense_out": {"kernel": kernel, "bias": bias}}}
    np.testing.assert_allclose(
        zero.apply(variables, x, train=False), x @ kernel + bias, rtol=1e-5
    )
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    normalized = Classifier(4, normalize_embedding=True)
    np.testing.assert_allclose(
        normalized.apply(variables, x, train=False), unit @ kernel + bias, rtol=1e-5
    )


def test_classifier_glorot_start():
    model = Classifier(256)
    params = model.init(jax.random.key(0), jnp.zeros((1, 128)), train=True)["params"]
    kernel = np.asarray(params["dense_out"]["kernel"])
    limit = math.sqrt(6 / (128 + 256))
    assert 0.99 * limit < np.abs(kernel).max() <= limit
    np.testing.assert_allclose(kernel.std(), limit / math.sqrt(3), rtol=0.02)
    assert np.all(params["dense_out"]["bias"] == 0)
