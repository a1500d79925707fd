"""The options that the contrastive losses share, and the checks of their values."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...] | None
Temperature = float | jax.Array

# Largest sides of a tile. Measured on CPU cores, where a tile (1 MiB) should stay in a
# core's cache; an accelerator needs fewer and larger tiles to be busy.
CPU_BLOCK_SIZE, ACCELERATOR_BLOCK_SIZE = 512, 2048

_CHOICES = {
    "contrast_mode": ("all", "one"),
    "summation": ("outside", "inside"),
    "denominator": ("all", "one_positive", "only_negatives"),
    "reduction": ("mean", "none"),
    "label_similarity": ("any", "jaccard", "inner"),
}


class LossOptions(NamedTuple):
    """What is fixed when a loss is traced; `supcon_loss` explains every option.

    Attributes:
      summation: "outside" or "inside".
      denominator: "all", "one_positive" or "only_negatives".
      scale: "none", "temperature" or a positive number.
      axis_name: the mesh axis (or axes) over which the batch is split, or None.
      block_size: the largest side of a tile.
      with_diagnostics: whether to measure what the diagnostics need.
      contrast_mode: "all" or "one".
      positives_cap: positives kept besides the anchor's own views, None for all.
      normalize: whether projections are scaled to unit length.
      reduction: "mean" or "none".
      num_views: V; the views of an image lie side by side.
      label_similarity: what two rows of class weights make of a pair.
      hard_negative_beta: how much the hard negatives of the denominator weigh, 0 for
        all alike.
    """

    summation: str
    denominator: str
    scale: str | float
    axis_name: AxisName
    block_size: int
    with_diagnostics: bool
    contrast_mode: str = "all"
    positives_cap: int | None = None
    normalize: bool = True
    reduction: str = "mean"
    num_views: int = 1
    label_similarity: str = "jaccard"
    hard_negative_beta: float = 0.0

    def factor(self, temperature: Temperature) -> Temperature:
        """The number that multiplies the loss."""
        if isinstance(self.scale, str):
            return temperature if self.scale == "temperature" else 1.0
        return self.scale


def default_block_size(platform: str | None = None) -> int:
    """The largest side of a tile of logits, where the caller names none.

    Args:
      platform: of the devices that will run the loss; None: JAX's default.
    """
    on_cpu = (platform or jax.default_backend()) == "cpu"
    return CPU_BLOCK_SIZE if on_cpu else ACCELERATOR_BLOCK_SIZE


def check_choices(**options: str) -> None:
    """Raises ValueError for an option with a value that it does not have."""
    for name, value in options.items():
        if value not in _CHOICES[name]:
            *most, last = map(repr, _CHOICES[name])
            allowed = f"{', '.join(most)} or {last}"
            raise ValueError(f"{name} must be {allowed}; got {value!r}.")


def check_numbers(
    temperature: Any, scale: Any, block_size: Any, hard_negative_beta: Any
) -> None:
    """Raises ValueError for a number among the options that is out of its range."""
    if isinstance(temperature, str) or jnp.ndim(temperature) != 0:
        raise ValueError(f"temperature must be a scalar; got {temperature!r}.")
    traced = isinstance(temperature, jax.core.Tracer)
    if not traced and not 0 < float(temperature) < math.inf:
        raise ValueError(f"temperature must be positive; got {temperature}.")
    named = scale in ("none", "temperature") if isinstance(scale, str) else False
    number = isinstance(scale, numbers.Real) and 0 < float(scale) < math.inf
    if not named and not number:
        raise ValueError(
            f"scale must be 'none', 'temperature' or a positive number; got {scale!r}."
        )
    if block_size is not None and not is_integer(block_size, at_least=1):
        raise ValueError(
            f"block_size must be None or a positive integer; got {block_size!r}."
        )
    beta = hard_negative_beta
    if not (isinstance(beta, numbers.Real) and 0 <= float(beta) < math.inf):
        raise ValueError(
            f"hard_negative_beta must be a number of at least 0; got {beta!r}."
        )


def is_integer(x: Any, *, at_least: int) -> bool:
    """Whether x is a whole number, and large enough."""
    return isinstance(x, numbers.Integral) and int(x) >= at_least
