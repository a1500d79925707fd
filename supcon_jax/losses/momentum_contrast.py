"""The loss of anchors against keys that another encoder made, now or in earlier steps."""

import math
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supcon_jax.losses.diagnostics import summarize
from supcon_jax.losses.options import (
    AxisName,
    LossOptions,
    check_choices,
    check_numbers,
    default_block_size,
)
from supcon_jax.losses.rows import Columns, rowwise_losses
from supcon_jax.losses.supcon import Diagnostics, l2_normalize, mean_over_anchors
from supcon_jax.losses.tiles import Views

# The group of a place in the queue that no key has taken yet.
EMPTY = np.iinfo(np.int32).min


@overload
def momentum_contrast_loss(
    queries: jax.Array,
    groups: jax.Array,
    keys: jax.Array,
    key_groups: jax.Array,
    *,
    temperature: float = 0.1,
    summation: str = "outside",
    denominator: str = "all",
    scale: str | float = "none",
    axis_name: AxisName = None,
    block_size: int | None = None,
    hard_negative_beta: float = 0.0,
    with_diagnostics: Literal[False] = False,
) -> jax.Array: ...


@overload
def momentum_contrast_loss(
    queries: jax.Array,
    groups: jax.Array,
    keys: jax.Array,
    key_groups: jax.Array,
    *,
    temperature: float = 0.1,
    summation: str = "outside",
    denominator: str = "all",
    scale: str | float = "none",
    axis_name: AxisName = None,
    block_size: int | None = None,
    hard_negative_beta: float = 0.0,
    with_diagnostics: Literal[True],
) -> tuple[jax.Array, Diagnostics]: ...


@overload
def momentum_contrast_loss(
    queries: jax.Array,
    groups: jax.Array,
    keys: jax.Array,
    key_groups: jax.Array,
    *,
    temperature: float = 0.1,
    summation: str = "outside",
    denominator: str = "all",
    scale: str | float = "none",
    axis_name: AxisName = None,
    block_size: int | None = None,
    hard_negative_beta: float = 0.0,
    with_diagnostics: bool,
) -> jax.Array | tuple[jax.Array, Diagnostics]: ...


def momentum_contrast_loss(
    queries: jax.Array,
    groups: jax.Array,
    keys: jax.Array,
    key_groups: jax.Array,
    *,
    temperature: float = 0.1,
    summation: str = "outside",
    denominator: str = "all",
    scale: str | float = "none",
    axis_name: AxisName = None,
    block_size: int | None = None,
    hard_negative_beta: float = 0.0,
    with_diagnostics: bool = False,
) -> jax.Array | tuple[jax.Array, Diagnostics]:
    r"""Supervised Contrastive loss of queries against keys (MoCo with labels).

    With s_ij the cosine of query i and key j over the temperature, and P(i) the keys of
    the query's group,

    .. math::
      L_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
        \log \frac{\exp(s_{ip})}{\sum_{j} \exp(s_{ij})}

    and the loss is the mean over the queries that have a positive. No gradient flows to
    the keys. Queries are not compared with each other.

    Args:
      queries: `[B, D]`, one anchor an image; any floating type, computed in float32.
      groups: `[B]` int32; keys of the same group are positives. A label, or a number of
        its own for an image without one.
      keys: `[K, D]`, the same on every device.
      key_groups: `[K]` int32; `EMPTY` marks a place that counts for nothing.
      temperature: positive scalar.
      summation: "outside" (Eq. 2) or "inside" (Eq. 3), see `supcon_loss`.
      denominator: "all", "one_positive" or "only_negatives", see `supcon_loss`.
      scale: factor on the loss: "none", "temperature" or a number.
      axis_name: inside `jax.shard_map`, the mesh axis over which queries are split.
      block_size: anchors whose logits are held at a time; None chooses.
      hard_negative_beta: weighs the negatives in the denominator, see `supcon_loss`.
      with_diagnostics: whether to return the diagnostics of `supcon_loss` too.

    Returns:
      The loss, a scalar, the same on every device; with `with_diagnostics`, a pair of
      it and a dictionary of scalars.

    Raises:
      ValueError: for shapes that do not fit, or an option out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> queries, keys = jnp.eye(2), jnp.eye(2)
      >>> labels = jnp.array([0, 1], jnp.int32)
      >>> loss = momentum_contrast_loss(queries, labels, keys, labels, temperature=1.0)
      >>> round(float(loss), 4)  # log(1 + exp(-1))
      0.3133

    Source: He et al., arXiv 1911.05722, with the positives of Khosla et al., arXiv
    2004.11362, Eq. 2. The code behind the paper's 79.1 % was not released.
    """
    check_choices(summation=summation, denominator=denominator)
    check_numbers(temperature, scale, block_size, hard_negative_beta)
    temperature = float(temperature)
    fits = queries.ndim == keys.ndim == 2 and queries.shape[1] == keys.shape[1]
    if not fits or (groups.shape, key_groups.shape) != (
        queries.shape[:1],
        keys.shape[:1],
    ):
        raise ValueError(
            f"got queries {queries.shape}, groups {groups.shape}, keys {keys.shape} and "
            f"key_groups {key_groups.shape}; expected [B, D], [B], [K, D] and [K]"
        )

    options = LossOptions(
        summation=summation,
        denominator=denominator,
        scale=scale if isinstance(scale, str) else float(scale),
        axis_name=axis_name,
        block_size=block_size or default_block_size(),
        with_diagnostics=with_diagnostics,
        hard_negative_beta=float(hard_negative_beta),
    )

    def embed(x: jax.Array) -> jax.Array:
        # With the temperature inside the vectors, their products are the logits.
        return l2_normalize(x.astype(jnp.float32)) / math.sqrt(temperature)

    places = jnp.arange(len(keys), dtype=jnp.int32)
    # A query is none of the keys, so its position is none of theirs.
    rows = Views(embed(queries), groups, jnp.full_like(groups, len(keys)))
    key_views = Views(
        embed(lax.stop_gradient(keys)),
        key_groups,
        jnp.where(key_groups == EMPTY, -1, places),
    )
    losses, counted, statistics = rowwise_losses(
        options, rows, Columns(key_views, temperature)
    )
    losses = options.factor(temperature) * losses
    loss = mean_over_anchors(losses, counted, axis_name)
    if statistics is None:
        return loss
    return loss, summarize(
        statistics, counted, temperature=temperature, options=options
    )
