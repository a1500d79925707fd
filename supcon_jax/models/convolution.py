"""The convolution of all encoders; its backward pass is fast on a CPU, in loops too."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
# Where published ResNets differ: the paper's official code, and torchvision's and timm's.
CONVENTIONS = ("official", "torchvision")
_NHWC = ("NHWC", "HWIO", "NHWC")


def conv(
    features: int, size: int, strides: int = 1, *, dtype: Any, name: str
) -> nn.Conv:
    """A square convolution without bias, padded alike on both sides.

    "SAME" padding would not be symmetric where a convolution has strides.

    Args:
      features: channels that come out.
      size: side of the kernel.
      strides: in both directions.
      dtype: compute type; the kernel is float32.
      name: of its parameters.
    """
    pad = (size - 1) // 2
    return nn.Conv(
        features,
        (size, size),
        (strides, strides),
        padding=((pad, size - 1 - pad),) * 2,
        use_bias=False,
        kernel_init=_INIT,
        dtype=dtype,
        conv_general_dilated=convolve,
        name=name,
    )


def stem_pool(images: jax.Array, convention: str) -> jax.Array:
    """The 3x3 max-pool with stride 2 behind the "imagenet" stem.

    Args:
      images: `[N, H, W, C]`.
      convention: a name of `CONVENTIONS`. "official" pads behind, as TensorFlow does,
        "torchvision" on both sides: the windows lie one pixel apart.
    """
    padding = "SAME"
    if convention != "official":
        # By hand, because jax2onnx leaves out a max-pool's padding by numbers.
        sides = ((0, 0), (1, 1), (1, 1), (0, 0))
        images, padding = jnp.pad(images, sides, constant_values=-jnp.inf), "VALID"
    # By name, because jax2onnx takes its place by that.
    return nn.max_pool(images, window_shape=(3, 3), strides=(2, 2), padding=padding)


def scaled_channels(base_width: int, width: float) -> int:
    """Channels of a network whose width is multiplied.

    Raises:
      ValueError: none would be left.
    """
    channels = round(base_width * width)
    if channels < 1:
        raise ValueError(
            f"encoder width {width} leaves no channel of {base_width}; use a width of "
            f"at least {1 / base_width} (--config.encoder.width)"
        )
    return channels


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of images `[N, H, W, C]`, for `flax.linen.Conv`.

    XLA's fast convolution on a CPU wants this one layout. Automatic
    differentiation leaves it, and XLA (jaxlib 0.10) goes back only outside of loops:
    in a scan over microbatches the gradients ran about eleven times slower. So, on a
    CPU, the gradients are written in it here. Reverse mode only.

    Args:
      images: `[N, H, W, C]`.
      kernel: `[h, w, C, D]`.
      strides: two numbers.
      padding: two pairs.
      options: what Flax passes beside them: no dilation and one group.

    Returns:
      `[N, H', W', D]`.
    """
    for name in ("lhs_dilation", "rhs_dilation"):
        if set(options.get(name) or (1,)) != {1}:
            raise ValueError(f"got {name}={options[name]}; allowed: 1")
    if options.get("feature_group_count", 1) != 1:
        raise ValueError("got feature groups; allowed: one")
    return _convolve(tuple(strides), tuple(map(tuple, padding)), images, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(strides, padding, images, kernel):
    return lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=_NHWC
    )


def _forward(strides, padding, images, kernel):
    return _convolve(strides, padding, images, kernel), (images, kernel)


def _backward(strides, padding, residuals, cotangent):
    return lax.platform_dependent(
        *residuals,
        cotangent,
        cpu=functools.partial(_gradients, strides, padding),
        default=functools.partial(_automatic_gradients, strides, padding),
    )


_convolve.defvjp(_forward, _backward)


def _automatic_gradients(strides, padding, images, kernel, cotangent):
    plain = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=_NHWC,
    )
    return jax.vjp(plain, images, kernel)[1](cotangent)


def _gradients(strides, padding, images, kernel, cotangent):
    """With respect to images and kernel, each one convolution in the layout NHWC."""
    spread_padding, window_padding = [], []
    for axis in (0, 1):
        low, size = padding[axis][0], kernel.shape[axis]
        length = images.shape[1 + axis]
        # The cotangent with stride - 1 zeros between its entries.
        spread = (cotangent.shape[1 + axis] - 1) * strides[axis] + 1
        before = size - 1 - low
        spread_padding.append((before, length + size - 1 - spread - before))
        window_padding.append((low, spread + size - 1 - length - low))
    of_images = lax.conv_general_dilated(
        cotangent,
        jnp.transpose(kernel[::-1, ::-1], (0, 1, 3, 2)),
        (1, 1),
        spread_padding,
        lhs_dilation=strides,
        dimension_numbers=_NHWC,
    )
    # Channels take the place of the batch, and the batch that of the channels.
    of_kernel = lax.conv_general_dilated(
        jnp.transpose(images, (3, 1, 2, 0)),
        jnp.transpose(cotangent, (1, 2, 0, 3)),
        (1, 1),
        window_padding,
        rhs_dilation=strides,
        dimension_numbers=_NHWC,
    )
    return of_images, jnp.transpose(of_kernel, (1, 2, 0, 3))
