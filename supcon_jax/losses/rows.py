"""Every variant of the loss, in checkpointed blocks of anchors.

The path for the options that have no symmetric gradient (the other denominators, capped
positives). Automatic differentiation does the work; a block of anchors against all
columns is recomputed in the backward pass, so memory stays linear in N.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from supcon_jax.losses.diagnostics import AnchorStatistics
from supcon_jax.losses.streaming import Views, matmul


def rowwise_losses(
    rows: Views,
    columns: Views,
    *,
    temperature: float | jax.Array,
    summation: str,
    denominator: str,
    positives_cap: int | None,
    cap_order: jax.Array | None,
    num_views: int,
    block_size: int,
    with_statistics: bool,
) -> tuple[jax.Array, jax.Array, AnchorStatistics | None]:
    """Loss of each anchor in `rows` against all `columns`, block after block.

    Args:
      rows: this device's n views.
      columns: the N views that they are compared with, those of the global batch or
        others; one with an index below 0 is a gap and counts for nothing.
      temperature: only to turn logits back into cosines for the diagnostics.
      summation: "outside" or "inside".
      denominator: "all", "one_positive" or "only_negatives".
      positives_cap: positives kept besides the anchor's own views, None for all.
      cap_order: `[B]` a random order of the images: each anchor keeps those that come
        next after its own, going round. None keeps the lowest batch indices.
      num_views: V; the views of an image lie side by side.
      block_size: anchors a block.
      with_statistics: whether to measure what the diagnostics need.

    Returns:
      Losses `[n]`; `[n]` booleans, whether an anchor has one (a positive, and a
      denominator that is not empty), else its loss is 0; and statistics or None.
    """
    num_rows = rows.group.shape[0]
    num_blocks = -(-num_rows // block_size)
    padding = num_blocks * block_size - num_rows

    def blocked(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(num_blocks, block_size, *x.shape[1:])

    block_losses = functools.partial(
        _block_losses,
        temperature=temperature,
        summation=summation,
        denominator=denominator,
        positives_cap=positives_cap,
        cap_order=cap_order,
        num_views=num_views,
        with_statistics=with_statistics,
    )
    # Without the checkpoint, every block would keep its tile: N x N again.
    result = lax.map(
        lambda block: jax.checkpoint(block_losses)(block, columns),
        jax.tree.map(blocked, rows),
    )
    return jax.tree.map(lambda x: x.reshape(-1)[:num_rows], result)


def _block_losses(
    rows: Views,
    columns: Views,
    *,
    temperature: float | jax.Array,
    summation: str,
    denominator: str,
    positives_cap: int | None,
    cap_order: jax.Array | None,
    num_views: int,
    with_statistics: bool,
) -> tuple[jax.Array, jax.Array, AnchorStatistics | None]:
    logits = matmul(rows.embedding, columns.embedding.T)
    other = (rows.index[:, None] != columns.index) & (columns.index >= 0)
    same = rows.group[:, None] == columns.group[None, :]
    positive, negative = same & other, ~same & other
    if positives_cap is not None:
        positive &= _kept(
            rows, columns, positives_cap // num_views, cap_order, num_views
        )

    num_positives = jnp.sum(positive, axis=1)
    num_negatives = jnp.sum(negative, axis=1)
    statistics = None
    if with_statistics:
        statistics = _statistics(logits, positive, negative, other, temperature)

    # An empty denominator has no logarithm: such an anchor is worth 0, like one without
    # a positive.
    defined = num_positives > 0
    if denominator == "only_negatives":
        defined &= num_negatives > 0
    positive &= defined[:, None]
    negative_lse = _masked_logsumexp(logits, negative)
    if denominator == "all":
        log_denominator = _masked_logsumexp(logits, positive | negative)[:, None]
    elif denominator == "only_negatives":
        log_denominator = negative_lse[:, None]
    else:
        log_denominator = jnp.logaddexp(logits, negative_lse[:, None])
    # Selected before use: a logit outside the mask must not reach the gradient, not
    # even as 0 * inf.
    log_probability = jnp.where(positive, logits - log_denominator, 0.0)
    count = jnp.maximum(num_positives, 1).astype(logits.dtype)
    if summation == "outside":
        losses = -jnp.sum(log_probability, axis=1) / count
    else:
        losses = jnp.log(count) - _masked_logsumexp(log_probability, positive)
    return jnp.where(defined, losses, 0.0), defined, statistics


def _kept(
    rows: Views,
    columns: Views,
    num_kept: int,
    cap_order: jax.Array | None,
    num_views: int,
) -> jax.Array:
    """`[n, N]`: the columns that a cap of `num_kept` other images leaves as positives."""
    row_sample, sample = (
        rows.index // num_views,
        columns.index[::num_views] // num_views,
    )
    own = row_sample[:, None] == sample[None, :]
    same = (rows.group[:, None] == columns.group[None, ::num_views]) & ~own
    num_samples = sample.shape[0]
    if cap_order is None:
        rank = jnp.broadcast_to(sample[None, :], same.shape)
    else:
        # One permutation for the batch, read by each anchor from its own place on: a
        # uniform choice for every anchor, without N x B random numbers.
        rank = (cap_order[None, :] - cap_order[row_sample][:, None]) % num_samples
    # Whole images are kept, with all their views; ranks are distinct.
    score = jnp.where(same, num_samples - rank, 0)
    if num_kept < num_samples:
        best = lax.top_k(score, num_kept + 1)[0]
        same &= score > best[:, -1:]
    return jnp.repeat(own | same, num_views, axis=1)


def _statistics(
    logits: jax.Array,
    positive: jax.Array,
    negative: jax.Array,
    other: jax.Array,
    temperature: float | jax.Array,
) -> AnchorStatistics:
    logits = lax.stop_gradient(logits)
    cosines = logits * lax.stop_gradient(temperature)
    return AnchorStatistics(
        num_positives=jnp.sum(positive, axis=1),
        num_negatives=jnp.sum(negative, axis=1),
        positive_sum=jnp.sum(logits, axis=1, where=positive),
        negative_sum=jnp.sum(logits, axis=1, where=negative),
        hardest_positive=jnp.max(logits, 1, initial=-jnp.inf, where=positive),
        hardest_negative=jnp.max(logits, 1, initial=-jnp.inf, where=negative),
        gaussian_sum=jnp.sum(jnp.exp(4 * cosines - 4), axis=1, where=other),
    )


def _masked_logsumexp(x: jax.Array, mask: jax.Array) -> jax.Array:
    """log sum exp over the mask; -inf where the mask is empty, with a zero gradient."""
    some = jnp.any(mask, axis=1)
    top = jnp.max(x, axis=1, initial=-jnp.inf, where=mask)
    top = lax.stop_gradient(jnp.where(some, top, 0.0))
    total = jnp.sum(jnp.exp(jnp.where(mask, x - top[:, None], -jnp.inf)), axis=1)
    return jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
