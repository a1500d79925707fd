"""ResNet v1.5 encoders: images in, embeddings (the spatial mean) out.

Details follow the paper's official code: the stride sits on the 3x3 convolution
(v1.5), every stage opens with a projection shortcut, strided convolutions pad
symmetrically (with the convention "torchvision" the max-pool too, and a shortcut is a
projection only where shapes differ), BatchNorm has momentum 0.9 and epsilon 1e-5 and the last one of each
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

from supcon_jax.models.convolution import conv, scaled_channels, stem_pool


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
        layer = functools.partial(conv, dtype=self.dtype)
        y = layer(self.width, 3, self.strides, name="conv1")(x)
        y = nn.relu(self.norm(name="batch_norm1")(y))
        y = layer(self.width, 3, name="conv2")(y)
        y = self.norm(name="batch_norm2", scale_init=nn.initializers.zeros)(y)
        if self.project:
            x = layer(self.width, 1, self.strides, name="conv_shortcut")(x)
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
        layer = functools.partial(conv, dtype=self.dtype)
        features = self.width * self.expansion
        y = layer(self.width, 1, name="conv1")(x)
        y = nn.relu(self.norm(name="batch_norm1")(y))
        y = layer(self.width, 3, self.strides, name="conv2")(y)
        y = nn.relu(self.norm(name="batch_norm2")(y))
        y = layer(features, 1, name="conv3")(y)
        y = self.norm(name="batch_norm3", scale_init=nn.initializers.zeros)(y)
        if self.project:
            x = layer(features, 1, self.strides, name="conv_shortcut")(x)
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
      batch_norm_momentum: share of the running statistics that a step keeps.
      frozen_parts: how many parts from the images on are not trained, the stem first and
        then the stages: their BatchNorm is in inference mode, and no gradient reaches
        them.
      convention: "official" or "torchvision": where the max-pool pads, and whether the
        first stage of ResNet-18 and -34 opens with a projection; weights fit one of them.
    """

    stage_sizes: Sequence[int]
    block: type[BasicBlock | BottleneckBlock]
    base_width: int = 64
    stem: str = "imagenet"
    dtype: Any = jnp.float32
    axis_name: str | None = None
    remat: bool = False
    batch_norm_momentum: float = 0.9
    frozen_parts: int = 0
    convention: str = "official"

    @property
    def num_stages(self) -> int:
        """Stages after the stem."""
        return len(self.stage_sizes)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Embeds images `[N, H, W, 3]` (normalised) as float32 `[N, D]`.

        With `train=True` BatchNorm uses the statistics of these N images, and the
        running ones are updated when the "batch_stats" collection is mutable.
        """

        def norm_of(part: int) -> Callable[..., nn.Module]:
            return functools.partial(
                nn.BatchNorm,
                use_running_average=not train or part < self.frozen_parts,
                momentum=self.batch_norm_momentum,
                epsilon=1e-5,
                dtype=self.dtype,
                axis_name=self.axis_name,
            )

        block = nn.remat(self.block) if self.remat else self.block
        x = images.astype(self.dtype)
        if self.stem == "imagenet":
            x = conv(self.base_width, 7, 2, dtype=self.dtype, name="conv_stem")(x)
        else:
            x = conv(self.base_width, 3, dtype=self.dtype, name="conv_stem")(x)
        x = nn.relu(norm_of(0)(name="batch_norm_stem")(x))
        if self.stem == "imagenet":
            x = stem_pool(x, self.convention)
        for stage, num_blocks in enumerate(self.stage_sizes):
            if stage + 1 == self.frozen_parts:
                x = jax.lax.stop_gradient(x)
            width = self.base_width * 2**stage
            changes = stage > 0 or x.shape[-1] != width * self.block.expansion
            for index in range(num_blocks):
                x = block(
                    width=width,
                    strides=2 if stage > 0 and index == 0 else 1,
                    project=index == 0 and (changes or self.convention == "official"),
                    dtype=self.dtype,
                    norm=norm_of(stage + 1),
                    name=f"stage{stage + 1}_block{index + 1}",
                )(x)
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def build_resnet(
    block: type[BasicBlock | BottleneckBlock],
    stage_sizes: Sequence[int],
    base_width: int,
    *,
    width: float,
    image_size: int,
    **options: Any,
) -> ResNet:
    """A ResNet with `width` times the usual channels, for `create_encoder`."""
    del image_size  # any will do
    return ResNet(stage_sizes, block, scaled_channels(base_width, width), **options)


# Blocks, blocks in each stage, channels of the first. resnet8 is the three-stage network
# of the CIFAR experiments in He et al. (2015), small enough for a laptop's CPU.
RESNETS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": functools.partial(build_resnet, BasicBlock, (1, 1, 1), 16),
    "resnet18": functools.partial(build_resnet, BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": functools.partial(build_resnet, BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": functools.partial(build_resnet, BottleneckBlock, (3, 4, 6, 3), 64),
    "resnet101": functools.partial(build_resnet, BottleneckBlock, (3, 4, 23, 3), 64),
    "resnet152": functools.partial(build_resnet, BottleneckBlock, (3, 8, 36, 3), 64),
    "resnet200": functools.partial(build_resnet, BottleneckBlock, (3, 24, 36, 3), 64),
}
