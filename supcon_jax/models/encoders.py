"""Encoders by name. A new one is a Flax module and an entry in `ENCODERS`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from supcon_jax.models.resnet import RESNETS
from supcon_jax.models.vit import VITS
from supcon_jax.models.wide_resnet import WIDE_RESNETS

STEMS = ("imagenet", "cifar")
# Name -> a function of `create_encoder`'s keywords. The module maps images [N, S, S, 3] to
# embeddings [N, D] when called with `train`. It may use BatchNorm, whose statistics cross
# devices where `axis_name` is given, or any other normalisation.
ENCODERS: dict[str, Callable[..., nn.Module]] = RESNETS | WIDE_RESNETS | VITS


def create_encoder(
    name: str,
    *,
    image_size: int = 32,
    width: float = 1.0,
    stem: str = "imagenet",
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    remat: bool = False,
) -> nn.Module:
    """Builds an encoder by name.

    Args:
      name: a key of `ENCODERS`.
      image_size: side S of the images, for encoders that are made for one.
      width: multiplies every channel count.
      stem: "imagenet" (7x7 stride 2, then 3x3 max-pool stride 2) or "cifar" (3x3).
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

    Source: He et al., arXiv 1512.03385, "v1.5" as in the paper's official code;
    Zagoruyko & Komodakis, arXiv 1605.07146 (wrn28_10: depth 28, widening factor 10);
    Dosovitskiy et al., arXiv 2010.11929 (vit_small_patch16: patches of 16 pixels).
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
    return ENCODERS[name](
        image_size=image_size,
        width=width,
        stem=stem,
        dtype=dtype,
        axis_name=axis_name,
        remat=remat,
    )


def part_of(name: str, num_stages: int) -> int:
    """Which part of an encoder a module or parameter is in: 0 the stem, s stage s.

    What stands after the stages belongs to the last of them.

    Example:
      >>> [part_of(n, 3) for n in ("conv_stem", "stage2_block1", "batch_norm_out")]
      [0, 2, 3]
    """
    found = re.match(r"stage(\d+)_", name)
    if found:
        return int(found[1])
    return 0 if name.split("/")[0].endswith("_stem") else num_stages
