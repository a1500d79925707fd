"""Every variant of the loss, in checkpointed blocks of anchors.

The path for the options that have no symmetric gradient (the other denominators, capped
positives, hard negatives). Automatic differentiation does the work; a block of anchors against all
columns is recomputed in the backward pass, so memory stays linear in N.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from supcon_jax.losses.diagnostics import AnchorStatistics
from supcon_jax.losses.options import LossOptions, Temperature
from supcon_jax.losses.tiles import Views, matmul


class Columns(NamedTuple):
    """What every anchor is compared with.

    Attributes:
      views: the N views, those of the global batch or others; one with a position below 0
        is a gap and counts for nothing.
      temperature: only to turn logits back into cosines for the diagnostics.
      cap_order: `[B]` a random order of the images, for `positives_cap`: each anchor
        keeps those that come next after its own, going round. None keeps the lowest
        batch indices.
    """

    views: Views
    temperature: Temperature
    cap_order: jax.Array | None = None


def rowwise_losses(
    options: LossOptions, rows: Views, columns: Columns
) -> tuple[jax.Array, jax.Array, AnchorStatistics | None]:
    """Loss of each anchor in `rows` against all `columns`, block after block.

    Args:
      options: of the loss; a block has at most `block_size` anchors.
      rows: this device's n views.
      columns: what they are compared with.

    Returns:
      Losses `[n]`; `[n]` booleans, whether an anchor has one (a positive, and a
      denominator that is not empty), else its loss is 0; and statistics or None.
    """
    num_rows = rows.group.shape[0]
    num_blocks = math.ceil(num_rows / options.block_size)
    # Equal blocks: a few rows, as one of many devices has them, fill no whole block.
    block_size = math.ceil(num_rows / num_blocks)
    padding = num_blocks * block_size - num_rows

    def blocked(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(num_blocks, block_size, *x.shape[1:])

    # Without the checkpoint, every block would keep its tile: N x N again.
    @jax.checkpoint
    def losses_of(block: Views) -> tuple[jax.Array, jax.Array, AnchorStatistics | None]:
        return _block_losses(options, block, columns)

    result = lax.map(losses_of, jax.tree.map(blocked, rows))
    return jax.tree.map(lambda x: x.reshape(-1)[:num_rows], result)


def _block_losses(
    options: LossOptions, rows: Views, columns: Columns
) -> tuple[jax.Array, jax.Array, AnchorStatistics | None]:
    others = columns.views
    logits = matmul(rows.embedding, others.embedding.T)
    position = others.position[None, :]
    other = (rows.position[:, None] != position) & (position >= 0)
    same, weights = rows.pairs(others, options.label_similarity)
    positive, negative = same & other, ~same & other
    if options.positives_cap is not None:
        positive &= _kept(options, rows, columns)

    num_positives = jnp.sum(positive, axis=1)
    num_negatives = jnp.sum(negative, axis=1)
    statistics = None
    if options.with_diagnostics:
        statistics = _statistics(
            logits, (positive, negative, other), columns.temperature
        )

    # An empty denominator has no logarithm: such an anchor is worth 0, like one without
    # a positive.
    defined = num_positives > 0
    if options.denominator == "only_negatives":
        defined &= num_negatives > 0
    positive &= defined[:, None]
    negative_lse = _masked_logsumexp(logits, negative)
    if options.hard_negative_beta:
        negative_lse = _hardened_logsumexp(
            logits, negative, beta=options.hard_negative_beta
        )
    if options.denominator == "all" and options.hard_negative_beta:
        positive_lse = _masked_logsumexp(logits, positive)
        log_denominator = jnp.logaddexp(positive_lse, negative_lse)[:, None]
    elif options.denominator == "all":
        log_denominator = _masked_logsumexp(logits, positive | negative)[:, None]
    elif options.denominator == "only_negatives":
        log_denominator = negative_lse[:, None]
    else:
        log_denominator = jnp.logaddexp(logits, negative_lse[:, None])
    # Selected before use: a logit outside the mask must not reach the gradient, not
    # even as 0 * inf.
    log_probability = jnp.where(positive, logits - log_denominator, 0.0)
    count = jnp.maximum(num_positives, 1).astype(logits.dtype)
    if weights is not None:
        count = jnp.where(defined, jnp.sum(weights, axis=1, where=positive), 1)
    if options.summation == "outside":
        if weights is not None:
            log_probability *= weights
        losses = -jnp.sum(log_probability, axis=1) / count
    else:
        if weights is not None:
            log_probability += jnp.log(jnp.where(positive, weights, 1))
        losses = jnp.log(count) - _masked_logsumexp(log_probability, positive)
    return jnp.where(defined, losses, 0.0), defined, statistics


def _kept(options: LossOptions, rows: Views, columns: Columns) -> jax.Array:
    """`[n, N]`: the columns that the cap leaves as positives, the own views included."""
    num_views, cap_order = options.num_views, columns.cap_order
    num_kept = (options.positives_cap or 0) // num_views
    row_image = rows.position // num_views
    image = columns.views.position[::num_views] // num_views
    own = row_image[:, None] == image[None, :]
    same = (rows.group[:, None] == columns.views.group[None, ::num_views]) & ~own
    num_images = image.shape[0]
    if cap_order is None:
        rank = jnp.broadcast_to(image[None, :], same.shape)
    else:
        # One permutation for the batch, read by each anchor from its own place on: a
        # uniform choice for every anchor, without N x B random numbers.
        rank = (cap_order[None, :] - cap_order[row_image][:, None]) % num_images
    # Whole images are kept, with all their views; ranks are distinct.
    score = jnp.where(same, num_images - rank, 0)
    if num_kept < num_images:
        best = lax.top_k(score, num_kept + 1)[0]
        same &= score > best[:, -1:]
    return jnp.repeat(own | same, num_views, axis=1)


def _statistics(
    logits: jax.Array,
    masks: tuple[jax.Array, jax.Array, jax.Array],
    temperature: Temperature,
) -> AnchorStatistics:
    positive, negative, other = masks
    logits = lax.stop_gradient(logits)
    cosines = logits * lax.stop_gradient(temperature)
    hardest = [
        jnp.max(logits, 1, initial=-jnp.inf, where=mask)
        for mask in (positive, negative)
    ]
    return AnchorStatistics(
        num_positives=jnp.sum(positive, axis=1),
        num_negatives=jnp.sum(negative, axis=1),
        positive_sum=jnp.sum(logits, axis=1, where=positive),
        negative_sum=jnp.sum(logits, axis=1, where=negative),
        nearest_is_positive=hardest[0] > hardest[1],
        gaussian_sum=jnp.sum(jnp.exp(4 * cosines - 4), axis=1, where=other),
    )


def _hardened_logsumexp(x: jax.Array, mask: jax.Array, *, beta: float) -> jax.Array:
    """The log of the sum of `w_j exp(x_j)` over the mask, `w_j` of mean 1 and ~ exp(beta x_j).

    The gradient takes the weights with it, as in the code of the authors.
    """
    # sum of w exp(x) = n sum of exp((1 + beta) x) / sum of exp(beta x)
    count = jnp.sum(mask, axis=1)
    harder, weights = (_masked_logsumexp(k * x, mask) for k in (1 + beta, beta))
    # An empty mask has -inf for both.
    weights = jnp.where(count > 0, weights, 0)
    return harder - weights + jnp.log(jnp.maximum(count, 1).astype(x.dtype))


def _masked_logsumexp(x: jax.Array, mask: jax.Array) -> jax.Array:
    """log sum exp over the mask; -inf where the mask is empty, with a zero gradient."""
    some = jnp.any(mask, axis=1)
    top = jnp.max(x, axis=1, initial=-jnp.inf, where=mask)
    top = lax.stop_gradient(jnp.where(some, top, 0.0))
    total = jnp.sum(jnp.exp(jnp.where(mask, x - top[:, None], -jnp.inf)), axis=1)
    return jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
