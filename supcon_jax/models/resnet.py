"""ResNet v1.5 encoders: images in, embeddings (the spatial mean) out.

Details follow the paper's official code: the stride sits on the 3x3 convolution
(v1.5), every stage opens with a projection shortcut, strided convolutions pad
symmetrically, BatchNorm has momentum 0.9 and epsilon 1e-5 and the last one of each
residual branch starts at scale zero, convolutions have no bias and are initialised
with `variance_scaling(1, "fan_in", "truncated_normal")`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from supcon_jax.models.convolution import convolve

STEMS = ("imagenet", "cifar")

# Explicit padding keeps a strided convolution symmetric; "SAME" would not be.
_conv_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def _conv(
    features: int, size: int, strides: int = 1, *, dtype: Any, name: str
) -> nn.Conv:
    pad = (size - 1) // 2
    return nn.Conv(
        features,
        (size, size),
        (strides, strides),
        padding=((pad, size - 1 - pad),) * 2,
        use_bias=False,
        kernel_init=_conv_init,
        dtype=dtype,
        conv_general_dilated=convolve,
        name=name,
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and -34)."""

    width: int
    strides: int
    project: bool
    dtype: Any
    norm: Callable[..., nn.Module]
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H / strides, W / strides, width]`."""
        conv = functools.partial(_conv, dtype=self.dtype)
        y = conv(self.width, 3, self.strides, name="conv1")(x)
        y = nn.relu(self.norm(name="batch_norm1")(y))
        y = conv(self.width, 3, name="conv2")(y)
        y = self.norm(name="batch_norm2", scale_init=nn.initializers.zeros)(y)
        if self.project:
            x = conv(self.width, 1, self.strides, name="conv_shortcut")(x)
            x = self.norm(name="batch_norm_shortcut")(x)
        return nn.relu(x + y)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolutions and a shortcut (ResNet-50 and deeper)."""

    width: int
    strides: int
    project: bool
    dtype: Any
    norm: Callable[..., nn.Module]
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H / strides, W / strides, 4 width]`."""
        conv = functools.partial(_conv, dtype=self.dtype)
        features = self.width * self.expansion
        y = conv(self.width, 1, name="conv1")(x)
        y = nn.relu(self.norm(name="batch_norm1")(y))
        y = conv(self.width, 3, self.strides, name="conv2")(y)
        y = nn.relu(self.norm(name="batch_norm2")(y))
        y = conv(features, 1, name="conv3")(y)
        y = self.norm(name="batch_norm3", scale_init=nn.initializers.zeros)(y)
        if self.project:
            x = conv(features, 1, self.strides, name="conv_shortcut")(x)
            x = self.norm(name="batch_norm_shortcut")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet v1.5 without its classifier.

    Attributes:
      stage_sizes: blocks in each stage; stage s has `base_width * 2**s` channels.
      block: `BasicBlock` or `BottleneckBlock`.
      base_width: channels of the stem and of the first stage.
      stem: "imagenet" (7x7 stride 2, then 3x3 max-pool stride 2) or "cifar"
        (3x3 stride 1, no pool).
      dtype: compute type of convolutions; parameters and BatchNorm statistics stay
        float32.
      axis_name: inside `jax.shard_map`, the mesh axis over which BatchNorm takes its
        statistics in training; None: those of this device's images.
      remat: keep only what goes into each block, and compute the rest again in the
        backward pass.
    """

    stage_sizes: Sequence[int]
    block: type[nn.Module]
    base_width: int = 64
    stem: str = "imagenet"
    dtype: Any = jnp.float32
    axis_name: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Embeds images `[N, H, W, 3]` (normalised) as float32 `[N, D]`.

        With `train=True` BatchNorm uses the statistics of these N images, and the
        running ones are updated when the "batch_stats" collection is mutable.
        """
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        block = nn.remat(self.block) if self.remat else self.block
        x = images.astype(self.dtype)
        if self.stem == "imagenet":
            x = _conv(self.base_width, 7, 2, dtype=self.dtype, name="conv_stem")(x)
        else:
            x = _conv(self.base_width, 3, dtype=self.dtype, name="conv_stem")(x)
        x = nn.relu(norm(name="batch_norm_stem")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, num_blocks in enumerate(self.stage_sizes):
            for index in range(num_blocks):
                x = block(
                    width=self.base_width * 2**stage,
                    strides=2 if stage > 0 and index == 0 else 1,
                    project=index == 0,
                    dtype=self.dtype,
                    norm=norm,
                    name=f"stage{stage + 1}_block{index + 1}",
                )(x)
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


# name: (block, blocks per stage, base width). resnet8 is the three-stage network of
# the CIFAR experiments in He et al. (2015), small enough for a laptop's processor.
ENCODERS = {
    "resnet8": (BasicBlock, (1, 1, 1), 16),
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": (BottleneckBlock, (3, 4, 6, 3), 64),
    "resnet101": (BottleneckBlock, (3, 4, 23, 3), 64),
    "resnet152": (BottleneckBlock, (3, 8, 36, 3), 64),
    "resnet200": (BottleneckBlock, (3, 24, 36, 3), 64),
}


def create_encoder(
    name: str,
    *,
    width: float = 1.0,
    stem: str = "imagenet",
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    remat: bool = False,
) -> ResNet:
    """Builds an encoder by name.

    Args:
      name: a key of `ENCODERS`.
      width: multiplies every channel count.
      stem: "imagenet" or "cifar".
      dtype: compute type of the convolutions.
      axis_name, remat: see `ResNet`.

    Raises:
      ValueError: unknown name or stem, or a width that leaves no channel.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> encoder = create_encoder("resnet50")
      >>> images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
      >>> init = lambda x: encoder.init_with_output(jax.random.key(0), x, train=True)
      >>> jax.eval_shape(init, images)[0].shape
      (2, 2048)

    Source: He et al., arXiv 1512.03385; "v1.5" as in the paper's official code.
    """
    if name not in ENCODERS:
        raise ValueError(
            f"unknown encoder {name!r}; available: {', '.join(ENCODERS)} "
            "(--config.encoder.name)"
        )
    if stem not in STEMS:
        raise ValueError(
            f"unknown stem {stem!r}; available: {', '.join(STEMS)} "
            "(--config.encoder.stem)"
        )
    block, stage_sizes, base_width = ENCODERS[name]
    channels = round(base_width * width)
    if channels < 1:
        raise ValueError(
            f"encoder width {width} leaves no channel of {base_width}; use a width of "
            f"at least {1 / base_width} (--config.encoder.width)"
        )
    return ResNet(stage_sizes, block, channels, stem, dtype, axis_name, remat)
