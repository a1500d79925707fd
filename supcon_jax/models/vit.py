"""Vision Transformers: patches in, one token or the mean of all out.

As in Dosovitskiy et al., arXiv 2010.11929, in the sizes of Touvron et al.,
arXiv 2012.12877, Table 1, with the details of timm's `vit_*` models, so that their weights
fit (supcon_jax/weights): LayerNorm before attention and MLP with epsilon 1e-6, the exact
GELU, queries, keys and values of one matrix, learned positions. Every layer has a bias.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from supcon_jax.models.convolution import convolve, scaled_channels

_HEAD_CHANNELS = 64
# A view's key has other uses (data/augment.py): numbers from here on are the blocks'.
_STREAM = 10_000
_init = nn.initializers.truncated_normal(0.02)
# The variance in one pass loses digits where the mean is large.
_norm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


class TransformerBlock(nn.Module):
    """Attention and an MLP of four times the width, each beside a shortcut.

    Attributes:
      heads: of the attention.
      drop: share of the images that skip attention or MLP in training.
      number: of the block, which its random numbers depend on.
      dtype: compute type.
    """

    heads: int
    drop: float
    number: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Maps tokens `[N, T, D]` to `[N, T, D]`; without `keys` `[N]` none is skipped."""
        count, tokens, width = x.shape
        dense = functools.partial(nn.Dense, kernel_init=_init, dtype=self.dtype)
        norm = functools.partial(_norm, dtype=self.dtype)
        y = dense(3 * width, name="qkv")(norm(name="norm1")(x))
        q, k, v = jnp.moveaxis(y.reshape(count, tokens, 3, self.heads, -1), 2, 0)
        y = jax.nn.dot_product_attention(q, k, v).reshape(count, tokens, width)
        x = x + self._kept(dense(width, name="proj")(y), keys, 0)
        y = dense(4 * width, name="fc1")(norm(name="norm2")(x))
        y = dense(width, name="fc2")(nn.gelu(y, approximate=False))
        return x + self._kept(y, keys, 1)

    def _kept(self, y: jax.Array, keys: jax.Array | None, branch: int) -> jax.Array:
        """A branch, zero for the images that skip it and larger for the others."""
        if keys is None or not self.drop:
            return y
        stream = _STREAM + 2 * self.number + branch

        def kept(key: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(key, stream), 1 - self.drop)

        keep = jax.vmap(kept)(keys)
        return y * (keep / (1 - self.drop)).astype(y.dtype)[:, None, None]


class VisionTransformer(nn.Module):
    """A Vision Transformer without its classifier.

    The parts that fine-tuning counts are the patches with token and positions, and each
    block.

    Attributes:
      patch_size: side of a patch in pixels.
      channels: width D of the tokens, a multiple of `heads`.
      heads: of the attention.
      depth: number of blocks.
      class_token: the embedding is what a learned token has become; False: there is no
        such token, and it is the mean of all patches.
      stochastic_depth: share of the images that skip the last block's attention, and its
        MLP, in training; in the blocks before it rises evenly from 0.
      dtype, remat: see `ResNet`.
      frozen_parts: see `ResNet`; in them nothing is skipped.
    """

    patch_size: int
    channels: int
    heads: int
    depth: int = 12
    class_token: bool = True
    stochastic_depth: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False
    frozen_parts: int = 0

    @property
    def num_stages(self) -> int:
        """Blocks, each a part of its own in fine-tuning."""
        return self.depth

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        """Embeds images `[N, S, S, 3]` (normalised) as float32 `[N, D]`.

        Args:
          images: as many pixels wide and high as the positions were made for.
          train: whether images may skip blocks.
          keys: `[N]` random keys, one an image; without them none skips any.
        """
        size = (self.patch_size, self.patch_size)
        x = nn.Conv(
            self.channels,
            size,
            size,
            padding=((0, 0), (0, 0)),
            dtype=self.dtype,
            conv_general_dilated=convolve,
            name="conv_stem",
        )(images.astype(self.dtype))
        x = x.reshape(images.shape[0], -1, self.channels)
        if self.class_token:
            token = self.param(
                "token_stem", nn.initializers.normal(1e-6), (1, 1, self.channels)
            )
            first = jnp.broadcast_to(token, (images.shape[0], 1, self.channels))
            x = jnp.concatenate([first.astype(self.dtype), x], axis=1)
        positions = self.param("positions_stem", _init, (1, *x.shape[1:]))
        x = x + positions.astype(self.dtype)
        block = nn.remat(TransformerBlock) if self.remat else TransformerBlock
        for number in range(1, self.depth + 1):
            if number == self.frozen_parts:
                x = jax.lax.stop_gradient(x)
            rate = self.stochastic_depth * (number - 1) / max(self.depth - 1, 1)
            skips = train and number >= self.frozen_parts
            x = block(
                self.heads, rate, number, self.dtype, name=f"stage{number}_block"
            )(x, keys if skips else None)
        norm = _norm(dtype=jnp.float32, name="norm_out")
        return norm(x)[:, 0] if self.class_token else norm(jnp.mean(x, axis=1))


def resize_positions(positions: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Positions for images of another size, by antialiased bicubic interpolation.

    What both have beyond a square number of patches, the token's, stays as it is.

    Args:
      positions: `[1, T, D]`.
      shape: `(1, T', D)`.

    Returns:
      `[1, T', D]`; the positions as they are, where the two differ in more than the number
      of patches, so that a comparison of arrays names them.

    Source: timm, `resample_abs_pos_embed`; Keys' kernel with a = -1/2, as there.
    """
    (old, token), (new, new_token) = _square(positions.shape[1]), _square(shape[1])
    alike = token == new_token and positions.shape[::2] == (shape[0], shape[2])
    if not alike or 0 in (old, new) or old == new:
        return positions
    channels = shape[-1]
    grid = positions[:, token:].reshape(old, old, channels)
    grid = jax.image.resize(grid, (new, new, channels), "cubic", antialias=True)
    return jnp.concatenate(
        [positions[:, :token], grid.reshape(1, -1, channels)], axis=1
    )


def _square(tokens: int) -> tuple[int, int]:
    """Side of the square of patches, 0 where it is none, and the tokens before it."""
    for extra in (0, 1):
        side = math.isqrt(tokens - extra)
        if side**2 == tokens - extra:
            return side, extra
    return 0, 0


def build_vit(
    heads: int,
    patch_size: int,
    *,
    width: float,
    image_size: int,
    stem: str,
    axis_name: str | None,
    **options: Any,
) -> VisionTransformer:
    """A Vision Transformer with `width` times its channels, for `create_encoder`.

    Raises:
      ValueError: the image is no whole number of patches, or another stem is asked for.
    """
    del axis_name  # no image looks at others
    if image_size % patch_size:
        raise ValueError(
            f"images of {image_size} pixels are no whole number of patches of "
            f"{patch_size}; allowed: a multiple (--config.data.image_size, "
            "--config.encoder.name)"
        )
    if stem != "imagenet":
        raise ValueError(
            f"got stem {stem!r} for a Vision Transformer, whose patch size is in its "
            "name; allowed: 'imagenet' (--config.encoder.stem, --config.encoder.name)"
        )
    channels = heads * scaled_channels(_HEAD_CHANNELS, width)
    return VisionTransformer(patch_size, channels, heads, **options)


# Heads of 64 channels each: 192, 384 and 768 in all.
_HEADS = {"tiny": 3, "small": 6, "base": 12}
VITS: dict[str, Callable[..., nn.Module]] = {
    f"vit_{size}_patch{patch}": functools.partial(build_vit, heads, patch)
    for size, heads in _HEADS.items()
    for patch in (4, 8, 16, 32)
}
