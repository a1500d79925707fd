"""The convolution against JAX's own, value and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax.models.convolution import convolve

NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    "shape, size, stride",
    [
        ((8, 8), 3, 1),
        ((8, 8), 3, 2),
        ((7, 9), 3, 2),
        ((8, 7), 1, 2),
        ((9, 12), 7, 2),
        ((2, 2), 3, 2),
        ((1, 1), 3, 1),
    ],
)
def test_gradients_equal_those_of_jax(shape, size, stride):
    low = (size - 1) // 2
    padding, strides = ((low, size - 1 - low),) * 2, (stride, stride)
    keys = jax.random.split(jax.random.key(0), 2)
    images = jax.random.normal(keys[0], (3, *shape, 4))
    kernel = jax.random.normal(keys[1], (size, size, 4, 5))
    theirs = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=NHWC,
    )

    def ours(images, kernel):
        return convolve(images, kernel, strides, padding)

    results = [
        jax.value_and_grad(lambda x, k, f=f: jnp.sum(jnp.sin(f(x, k))), (0, 1))(
            images, kernel
        )
        for f in (ours, theirs)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), *results
    )


def test_gradients_in_a_loop_keep_the_fast_layout():
    def loss(kernel, parts):
        def part(total, images):
            y = convolve(images, kernel, (2, 2), ((1, 1), (1, 1)))
            return total + jnp.sum(jnp.square(y)), None

        return jax.lax.scan(jax.checkpoint(part), 0.0, parts)[0]

    parts = jnp.ones((3, 4, 8, 8, 16))
    program = jax.jit(jax.grad(loss)).lower(jnp.ones((3, 3, 16, 16)), parts).compile()
    lines = [x for x in program.as_text().splitlines() if " convolution(" in x]
    assert lines and all("dim_labels=b01f_01io->b01f" in line for line in lines)


def test_groups_and_dilation_are_refused():
    images, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))
    padding = ((1, 1), (1, 1))
    with pytest.raises(ValueError, match="groups"):
        convolve(images, kernel, (1, 1), padding, feature_group_count=2)
    with pytest.raises(ValueError, match="rhs_dilation"):
        convolve(images, kernel, (1, 1), padding, rhs_dilation=(2, 2))
