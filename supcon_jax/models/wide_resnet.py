"""Wide ResNet encoders, the workhorse of CIFAR: shallow, wide, normalised before use.

As in Zagoruyko & Komodakis, arXiv 1605.07146, Table 1 and section 2: after a 3x3
convolution to 16 channels, three groups of `(depth - 4) / 6` basic blocks with 16 k, 32 k
and 64 k channels, the second and third opening with stride 2; in a block BatchNorm and
ReLU come before each convolution (He et al., arXiv 1603.05027); a last BatchNorm and ReLU
stand before the spatial mean. Where a block changes the number of channels, its shortcut
is a 1x1 convolution of the normalised input. No dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from supcon_jax.models.convolution import conv, scaled_channels, stem_pool


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, and a shortcut."""

    channels: int
    strides: int
    dtype: Any
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H / strides, W / strides, channels]`."""
        layer = functools.partial(conv, dtype=self.dtype)
        y = nn.relu(self.norm(name="batch_norm1")(x))
        if x.shape[-1] != self.channels:
            x = layer(self.channels, 1, self.strides, name="conv_shortcut")(y)
        y = layer(self.channels, 3, self.strides, name="conv1")(y)
        y = nn.relu(self.norm(name="batch_norm2")(y))
        return x + layer(self.channels, 3, name="conv2")(y)


class WideResNet(nn.Module):
    """A wide ResNet without its classifier.

    Attributes:
      depth: convolutions, 4 more than a multiple of 6.
      channels: of the three groups; 16 k, 32 k and 64 k for WRN-depth-k.
      stem_channels: of the convolution before them.
      stem, dtype, axis_name, remat, batch_norm_momentum, frozen_parts, convention: see
        `ResNet`; the last BatchNorm belongs to the last group.
    """

    depth: int
    channels: Sequence[int]
    stem_channels: int = 16
    stem: str = "cifar"
    dtype: Any = jnp.float32
    axis_name: str | None = None
    remat: bool = False
    batch_norm_momentum: float = 0.9
    frozen_parts: int = 0
    convention: str = "official"

    @property
    def num_stages(self) -> int:
        """Groups after the stem."""
        return len(self.channels)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Embeds images `[N, H, W, 3]` (normalised) as float32 `[N, 64 k]`."""

        def norm_of(part: int) -> Callable[..., nn.Module]:
            return functools.partial(
                nn.BatchNorm,
                use_running_average=not train or part < self.frozen_parts,
                momentum=self.batch_norm_momentum,
                epsilon=1e-5,
                dtype=self.dtype,
                axis_name=self.axis_name,
            )

        block = nn.remat(PreActivationBlock) if self.remat else PreActivationBlock
        x = images.astype(self.dtype)
        size, strides = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = conv(self.stem_channels, size, strides, dtype=self.dtype, name="conv_stem")(
            x
        )
        if self.stem == "imagenet":
            x = stem_pool(x, self.convention)
        for group, channels in enumerate(self.channels, start=1):
            if group == self.frozen_parts:
                x = jax.lax.stop_gradient(x)
            for index in range((self.depth - 4) // 6):
                x = block(
                    channels=channels,
                    strides=2 if group > 1 and index == 0 else 1,
                    dtype=self.dtype,
                    norm=norm_of(group),
                    name=f"stage{group}_block{index + 1}",
                )(x)
        x = nn.relu(norm_of(self.num_stages)(name="batch_norm_out")(x))
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def build_wide_resnet(
    depth: int, widening: int, *, width: float, image_size: int, **options: Any
) -> WideResNet:
    """WRN-depth-widening with `width` times its channels, for `create_encoder`."""
    del image_size  # any will do
    stem, *groups = (
        scaled_channels(base, width)
        for base in (16, 16 * widening, 32 * widening, 64 * widening)
    )
    return WideResNet(depth, tuple(groups), stem, **options)


WIDE_RESNETS: dict[str, Callable[..., nn.Module]] = {
    f"wrn{depth}_{widening}": functools.partial(build_wide_resnet, depth, widening)
    for depth, widening in (
        *((16, 4), (16, 8), (22, 8), (28, 2), (28, 10), (40, 2), (40, 4)),
    )
}
