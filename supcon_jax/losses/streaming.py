"""The loss with the full denominator, tile by tile: exact, and linear in memory.

The N x N matrix of logits is visited in tiles and never stored. Its gradient needs no
automatic differentiation: with l_i the log-sum-exp of row i, k_i its positives and g_i
the cotangent of its loss,

    dL/du_i = sum_{j != i} W_ij u_j,
    W_ij = a_i e_ij + a_j e_ji - [j in P(i)] (b_i + b_j)         (summation outside)
    W_ij = a_i e_ij + a_j e_ji - [j in P(i)] (c_i p_ij + c_j p_ji)       (inside)

where a_i e_ij = g_i exp(s_ij - l_i), c_i p_ij = g_i exp(s_ij - l+_i) and b_i = g_i / k_i.
Positives that weigh w_ij = w_ji each are in l+_i and p_ij with that factor, k_i is the sum
of the weights, and w_ij takes the place of [j in P(i)]. W is symmetric. On one device each tile therefore serves its rows and its columns, and
half of the tiles suffice; across devices each one has all it needs for its own rows
once two numbers per anchor were gathered, and no N x D gradient travels.

The positives are masked inside the tile on purpose. Class sums give the same gradient
on paper, but their terms cancel when classes collapse: errors 30 to 600 times larger,
15 % of the gradient at worst (the accuracy table in docs/losses.md).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from supcon_jax.losses import tiles
from supcon_jax.losses.diagnostics import AnchorStatistics
from supcon_jax.losses.options import Temperature
from supcon_jax.losses.tiles import Plan, Views

_MAXIMA = ("hardest", "hardest_positive", "hardest_negative")
# What the diagnostics need of weighted positives: each pair counts as one there.
_COUNTS = {"logit_sum", "num_positives"}


def streaming_losses(
    plan: Plan, views: Views, temperature: Temperature
) -> tuple[jax.Array, jax.Array, AnchorStatistics | None]:
    """Loss of each of this device's views against all others of the global batch.

    Args:
      plan: the static choices.
      views: this device's n views.
      temperature: scalar, read only by the statistics.

    Returns:
      Losses `[n]`, 0 where a view has no positive; `[n]` booleans, whether it has one;
      and statistics (None without `with_diagnostics`), to which no gradient flows.
    """
    return _losses(plan, *views, lax.stop_gradient(temperature))


def _compiled_once(function):
    """Outside of jit a loop over tiles would be compiled at each call."""
    compiled = jax.jit(function, static_argnums=0)

    @functools.wraps(function)
    def call(plan, *arrays):
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays))
        alone = not traced and plan.options.axis_name is None
        return (compiled if alone else function)(plan, *arrays)

    return call


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(plan, embedding, group, position, labels, temperature):
    return _forward(plan, embedding, group, position, labels, temperature)[0]


@_compiled_once
def _forward(plan, embedding, group, position, labels, temperature):
    rows = Views(embedding, group, position, labels)
    columns = tiles.for_columns(rows, plan)
    measure = functools.partial(_measure, plan, rows, columns, temperature)
    outside = plan.options.summation == "outside"
    needed = {"total", "positive_sum" if outside else "positive_total"}
    if plan.options.with_diagnostics:
        needed |= {"gaussian_sum", "hardest", "hardest_negative"}
        needed |= {"positive_sum"} if labels is None else _COUNTS
    if labels is not None:
        needed |= {"weight"}
    if plan.bound is None:
        # Each row subtracts its own maximum; a row without terms subtracts 0.
        first = {"hardest"} if outside else {"hardest", "hardest_positive"}
        maxima, _ = measure(first, None)
        tops = (maxima["hardest"], maxima.get("hardest_positive", maxima["hardest"]))
        tops = tuple(jnp.where(jnp.isneginf(x), 0, x) for x in tops)
        measured, kept = measure(needed - first, tops)
        measured |= maxima
    else:
        tops = (plan.bound, plan.bound)
        measured, kept = measure(needed, None)

    if labels is None:
        num_positives = _group_sizes(group, columns.group) - 1
        has_positive = num_positives > 0
        count = jnp.maximum(num_positives, 1).astype(embedding.dtype)
    else:
        num_positives = measured.get("num_positives")
        has_positive = measured["weight"] > 0
        count = jnp.where(has_positive, measured["weight"], 1)
    log_total = tops[0] + jnp.log(jnp.where(has_positive, measured["total"], 1))
    if outside:
        losses = log_total - measured["positive_sum"] / count
        positive_scale = 1 / count
    else:
        positive_total = jnp.where(has_positive, measured["positive_total"], 1)
        losses = log_total - tops[1] - jnp.log(positive_total / count)
        positive_scale = 1 / positive_total
    losses = jnp.where(has_positive, losses, 0)

    statistics = None
    if plan.options.with_diagnostics:
        positive_sum = measured["positive_sum" if labels is None else "logit_sum"]
        statistics = AnchorStatistics(
            num_positives=num_positives,
            num_negatives=columns.group.shape[0] - 1 - num_positives,
            positive_sum=positive_sum,
            negative_sum=tiles.matmul(embedding, columns.embedding.sum(0))
            - jnp.sum(embedding**2, axis=1)
            - positive_sum,
            # The largest logit of all belongs to a positive if it is above that of the
            # negatives. It needs no mask, as that of the positives would.
            nearest_is_positive=measured["hardest"] > measured["hardest_negative"],
            gaussian_sum=measured["gaussian_sum"] * math.exp(-4),
        )
    # d loss / d (sum of exponentials), and the same for what stands for the positives.
    scales = (jnp.exp(tops[0] - log_total), positive_scale)
    scales = tuple(jnp.where(has_positive, x, 0) for x in scales)
    row_tops = tops if plan.bound is None else None
    residuals = (rows, columns, scales, row_tops, kept)
    return (losses, has_positive, statistics), residuals


@_compiled_once
def _backward(plan, residuals, cotangents):
    rows, columns, scales, row_tops, kept = residuals
    weights = tuple(cotangents[0] * scale for scale in scales)
    of_rows, of_columns = tiles.blocks_of_both(plan, rows, columns, (weights, row_tops))

    def step(carry, tile, i, j, both):
        gradient, mirrored = carry
        (a_i, b_i), tops_i = tiles.take_block(of_rows, i, 1)
        (a_j, b_j), tops_j = tiles.take_block(of_columns, j, 0)
        top_i, positive_top_i = tops_i or (plan.bound, plan.bound)
        top_j, positive_top_j = tops_j or (plan.bound, plan.bound)
        w = a_i * tile.exp(top_i) + a_j * tile.exp(top_j)
        if plan.options.summation == "outside":
            w -= tile.weighted(b_i + b_j)
        else:
            w -= b_i * tile.positive_exp(positive_top_i)
            w -= b_j * tile.positive_exp(positive_top_j)
        gradient = tiles.update_block(
            gradient, i, jnp.add, tiles.matmul(w, tile.columns)
        )
        if both:
            # Transposed, because W^T U is a third slower on CPU cores than U^T W.
            mirrored = tiles.update_block(
                mirrored, j, jnp.add, tiles.matmul(tile.rows_t, w)
            )
        return (gradient, mirrored), None

    grid = tiles.create_grid(plan, rows, columns)
    start = jnp.zeros_like(tiles.into_blocks(rows.embedding, grid.rows))
    (gradient, mirrored), _ = tiles.sweep(
        plan, rows, columns, (start, start.swapaxes(1, 2)), step, kept
    )
    gradient += mirrored.swapaxes(1, 2)
    gradient = gradient.reshape(-1, gradient.shape[-1])[: rows.group.shape[0]]
    return gradient, None, None, None, None


_losses.defvjp(_forward, _backward)


def _measure(plan, rows, columns, temperature, names, row_tops):
    """Sums and maxima over each row of the matrix, `{name: [n]}`, and kept tiles."""
    of_rows, of_columns = tiles.blocks_of_both(plan, rows, columns, row_tops)
    shared_tops = (plan.bound, plan.bound)
    keep = tiles.keeps_exponentials(plan, rows, columns)

    def values(name, tile, tops):
        if name == "total":
            return tile.exp(tops[0])
        if name == "positive_total":
            return tile.positive_exp(tops[1])
        if name == "positive_sum":
            return tile.weighted(tile.logits)
        if name == "weight":
            return tile.weighted(1)
        if name == "logit_sum":
            return jnp.where(tile.positive, tile.logits, 0)
        if name == "num_positives":
            return tile.positive.astype(tile.logits.dtype)
        if name == "gaussian_sum":
            # |z_i - z_j|^2 = 2 - 2 cos for unit vectors; the factor exp(-4) comes later.
            return jnp.exp(4 * temperature * tile.logits)
        if name == "hardest":
            return tile.logits
        mask = tile.positive if name == "hardest_positive" else ~tile.positive
        return jnp.where(mask, tile.logits, -jnp.inf)

    def step(measured, tile, i, j, both):
        tops_i = tiles.take_block(of_rows, i, 1) or shared_tops
        tops_j = tiles.take_block(of_columns, j, 0) or shared_tops
        measured = dict(measured)
        for name in measured:
            reduce, combine = (
                (jnp.max, jnp.maximum) if name in _MAXIMA else (jnp.sum, jnp.add)
            )
            by_row = reduce(values(name, tile, tops_i), axis=1)
            mirror = both
            if name == "gaussian_sum" and plan.options.contrast_mode == "all":
                # Only the sum over all anchors is used, so the row may count the pair
                # for both of its views.
                by_row, mirror = by_row * (2 if both else 1), False
            measured[name] = tiles.update_block(measured[name], i, combine, by_row)
            if mirror:
                by_column = reduce(values(name, tile, tops_j), axis=0)
                measured[name] = tiles.update_block(
                    measured[name], j, combine, by_column
                )
        return measured, tile.exponentials if keep else None

    grid = tiles.create_grid(plan, rows, columns)
    zero = jnp.zeros_like(tiles.into_blocks(rows.embedding[:, 0], grid.rows))
    start = {n: zero - jnp.inf if n in _MAXIMA else zero for n in sorted(names)}
    measured, kept = tiles.sweep(plan, rows, columns, start, step)
    measured = {k: x.reshape(-1)[: rows.group.shape[0]] for k, x in measured.items()}
    return measured, kept if keep else None


def _group_sizes(group, all_groups):
    """How many of `all_groups` equal each of `group`: a sort, not an N x N mask."""
    ordered = jnp.sort(all_groups)
    first = jnp.searchsorted(ordered, group, side="left")
    return jnp.searchsorted(ordered, group, side="right") - first
