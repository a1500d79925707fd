"""What the loss does at the edges: extreme embeddings, types of numbers, refusals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax.losses import supcon_loss
from tests.test_losses import VARIANTS, compiled_loss, example, loop_loss, name_of


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32])
def test_label_types(dtype):
    x, _ = example(num_images=200, num_views=1)
    labels = np.arange(200) % 100
    expected = compiled_loss(x, labels.astype(np.int32))
    assert compiled_loss(x, labels.astype(dtype)) == pytest.approx(float(expected))
    # 200 unlabelled images do not fit into int8.
    if np.issubdtype(dtype, np.signedinteger):
        assert compiled_loss(x, np.full(200, -1, dtype)) == 0


EDGE_INPUTS = {
    "zeros": (np.zeros((4, 2, 3)), [0, 0, 1, 2]),
    "one zero row": (np.eye(8)[:, :3].reshape(4, 2, 3), [0, 0, 1, 2]),
    "identical": (np.ones((4, 2, 3)), [0, 0, 1, 2]),
    "one class": (example(4, dimension=3)[0], [1, 1, 1, 1]),
    "unlabelled": (example(4, dimension=3)[0], [-1, -1, -1, -1]),
    "huge": (example(4, dimension=3)[0] * 1e30, [0, 0, 1, 1]),
    "one huge row": (
        example(4, dimension=3)[0] * np.array([4e38, 1, 1, 1])[:, None, None],
        [0, 0, 1, 1],
    ),
    "tiny": (example(4, dimension=3)[0] * 1e-30, [0, 0, 1, 1]),
    "two views in all": (example(1, dimension=3)[0], [0]),
    "no positives": (example(2, 1, dimension=3)[0], [0, 1]),
    "a single view": (example(1, 1, dimension=3)[0], [0]),
}


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e38])
def test_rows_of_any_length_have_the_same_direction(factor):
    """Under jit too, where a division by a number is a product with its reciprocal."""
    x, labels = example(4, dimension=3)[0], np.array([0, 0, 1, 1])
    x /= np.abs(x).max(axis=2, keepdims=True)
    expected = loop_loss(x, labels).mean()
    x[0] *= factor
    assert compiled_loss(np.float32(x), labels) == pytest.approx(expected, rel=1e-5)


@functools.partial(jax.jit, static_argnums=2)
def value_and_gradient(x, labels, options):
    return jax.value_and_grad(lambda x: supcon_loss(x, labels, **dict(options)))(x)


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.get("contrast_mode") != "one"], ids=name_of
)
def test_edge_cases_are_finite(variant):
    for name, (x, labels) in EDGE_INPUTS.items():
        if variant.get("normalize") is False and "huge" in name:
            continue  # The logits themselves leave the range of float32.
        if len(x) < 4 and len(variant) == 2:
            continue  # Each shape is another compilation.
        loss, gradient = value_and_gradient(
            np.float32(x), np.array(labels), tuple(variant.items())
        )
        assert np.isfinite(loss), name
        assert np.all(np.isfinite(gradient)), name
        if name in ("no positives", "a single view"):
            assert loss == 0
            np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_floating_types(dtype):
    x, labels = example()
    with jax.enable_x64(True):
        x = jnp.asarray(x, dtype)
        loss, gradient = jax.jit(jax.value_and_grad(supcon_loss))(x, labels)
        expected = loop_loss(np.asarray(x, np.float64), labels).mean()
    assert gradient.dtype == dtype
    assert np.all(np.isfinite(np.asarray(gradient, np.float32)))
    # Half-precision inputs are computed in float32.
    assert loss.dtype == ("float64" if dtype == "float64" else "float32")
    assert loss == pytest.approx(expected, rel=1e-12 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize("summation", ["outside", "inside"])
def test_opposite_embeddings_at_low_temperature(summation):
    """Every logit is -100, far below what a fixed shift leaves in float32."""
    x = np.array([[[1.0, 0]], [[-1, 0]]], np.float32)
    options = {"temperature": 0.01, "summation": summation}
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda x: supcon_loss(x, np.zeros(2, int), **options))
    )(x)
    assert loss == pytest.approx(0, abs=1e-5)
    assert np.all(np.isfinite(gradient))


def test_large_logits_without_normalisation():
    x, labels = example()
    x = 30 * np.float32(x)
    losses = compiled_loss(x, labels, normalize=False, reduction="none", block_size=5)
    expected = loop_loss(x, labels, normalize=False)
    assert expected.max() > 1000
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-2)


GOOD = np.ones((4, 2, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((np.ones((4, 3)),), {}, ("[B, V, D]", "(4, 3)")),
        ((np.ones((0, 2, 3)),), {}, ("[B, V, D]", "(0, 2, 3)")),
        ((np.ones((4, 2, 3), int),), {}, ("floating", "int")),
        ((GOOD, np.zeros(5, int)), {}, ("(4,)", "(5,)")),
        ((GOOD, np.zeros((4, 2), int)), {}, ("(4,)", "(4, 2)")),
        ((GOOD, np.zeros(4)), {}, ("integers", "float")),
        ((GOOD,), {"temperature": 0.0}, ("positive", "0.0")),
        ((GOOD,), {"temperature": -1}, ("positive", "-1")),
        ((GOOD,), {"temperature": math.nan}, ("positive", "nan")),
        ((GOOD,), {"temperature": np.ones(3)}, ("scalar", "[1., 1., 1.]")),
        ((GOOD,), {"temperature": "hot"}, ("scalar", "'hot'")),
        ((GOOD,), {"contrast_mode": "ALL"}, ("'all'", "'one'", "'ALL'")),
        ((GOOD,), {"summation": "out"}, ("'outside'", "'inside'", "'out'")),
        ((GOOD,), {"denominator": None}, ("'only_negatives'", "None")),
        ((GOOD,), {"reduction": "sum"}, ("'mean'", "'none'", "'sum'")),
        ((GOOD,), {"scale": "pytorch"}, ("'temperature'", "'pytorch'")),
        ((GOOD,), {"scale": -1.0}, ("positive number", "-1.0")),
        ((GOOD,), {"scale": None}, ("'none'", "None")),
        ((GOOD,), {"positives_cap": 3}, ("multiple of the 2 views", "3")),
        ((GOOD,), {"positives_cap": -2}, ("multiple of the 2 views", "-2")),
        ((GOOD,), {"positives_cap": 2.0}, ("multiple of the 2 views", "2.0")),
        ((GOOD,), {"positives_key": 0}, ("positives_cap", "None")),
        ((GOOD,), {"block_size": 0}, ("block_size", "0")),
    ],
)
def test_refusals_name_what_was_got_and_what_is_allowed(arguments, options, words):
    with pytest.raises(ValueError) as error:
        supcon_loss(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
