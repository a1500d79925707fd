"""Floating-point operations of a JAX function, counted without compiling it.

Only matrix products and convolutions count, two operations a multiply-add, as in the
utilisation that papers report. The compiler's own `cost_analysis` also counts what is
done element by element, but the body of a loop once: the tiles of the loss and the
microbatches are loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Operations of `function(*arguments)` on all devices of its mesh together.

    Args:
      function: traced, not run.
      arguments: trees of arrays or `jax.ShapeDtypeStruct`.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    # What nobody reads is not computed, as the gradient with respect to the images.
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _of_jaxpr(used)


def loss_flops(views: int, dimension: int, devices: int = 1) -> int:
    """Forward and backward of the contrastive loss over N views (docs/losses.md).

    `4 N^2 D` on one device, where a tile of the matrix stands for its mirror image: the
    forward makes half of the logits, `N^2 D`; the backward makes them again and
    multiplies each tile with its rows and its columns, `3 N^2 D`. Of P devices each
    makes its own rows of the whole matrix three times, `6 N^2 D / P`, together
    `6 N^2 D`.
    """
    return (4 if devices == 1 else 6) * views**2 * dimension


def _of_jaxpr(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        depth = math.prod(left[axis] for axis in contracted)
        return 2 * depth * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    counts = [_of_jaxpr(inner) for inner in _inner_jaxprs(params)]
    if name == "cond":
        return max(counts)
    if name == "scan":
        return params["length"] * sum(counts)
    if name == "shard_map":  # its body is what one device does
        return params["mesh"].size * sum(counts)
    if name == "while" and sum(counts):
        raise ValueError("cannot count a while loop, whose length is not known")
    return sum(counts)


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _of_convolution(equation: Any) -> int:
    """Twice the pairs of an output and a tap on a real pixel, times the channels.

    The transpose of a strided convolution spreads its input with zeros in between:
    they, and the padding, cost nothing here.
    """
    left, right = (x.aval.shape for x in equation.invars[:2])
    out, params = equation.outvars[0].aval.shape, equation.params
    numbers = params["dimension_numbers"]
    pairs = 1
    for axis, (low, _) in enumerate(params["padding"]):
        size = left[numbers.lhs_spec[2 + axis]]
        spread = params["lhs_dilation"][axis]
        taps = np.arange(right[numbers.rhs_spec[2 + axis]])
        starts = np.arange(out[numbers.out_spec[2 + axis]])
        place = starts[:, None] * params["window_strides"][axis] - low
        place = place + taps[None, :] * params["rhs_dilation"][axis]
        inside = (place >= 0) & (place <= (size - 1) * spread) & (place % spread == 0)
        pairs *= int(inside.sum())
    channels = right[numbers.rhs_spec[0]] * right[numbers.rhs_spec[1]]
    images = left[numbers.lhs_spec[0]] // params["batch_group_count"]
    return 2 * images * channels * pairs
