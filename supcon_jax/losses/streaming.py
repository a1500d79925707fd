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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supcon_jax.losses.diagnostics import AnchorStatistics
from supcon_jax.losses.labels import pair_weights
from supcon_jax.losses.options import (
    CPU_BLOCK_SIZE,
    AxisName,
    LossOptions,
    Temperature,
)

# Tiles of exponentials that the forward pass keeps for the backward pass, together at
# most this much; a larger batch computes them again. With them the program's temporary
# memory must stay below 32 MiB: the C library returns a larger block to the operating
# system after every call, and getting its pages again took 16 ms beside a loss of 24 ms
# (N = 2048 on a CPU).
KEPT_BYTES = 16 * 2**20

# A lone tile is cut in two from this many views on (measured on CPU cores).
_HALVE_FROM = 512

_MAXIMA = ("hardest", "hardest_positive", "hardest_negative")
# What the diagnostics need of weighted positives: each pair counts as one there.
_COUNTS = {"logit_sum", "num_positives"}


class Plan(NamedTuple):
    """What is fixed when the loss is traced.

    Attributes:
      options: of the loss.
      bound: a number that no logit exceeds, close enough to all of them that
        exp(logit - bound) stays in range. None makes every row find its own maximum
        first.
    """

    options: LossOptions
    bound: float | None


class Views(NamedTuple):
    """Views, one a row: `[n, D]` vectors, twice `[n]` integers, perhaps labels.

    Attributes:
      embedding: divided by the square root of the temperature, so that u_i . u_j is a
        logit.
      group: views of one group are positives of each other, with the weight 1.
      position: the place in the global batch.
      labels: `[n, C]`, from `prepare_weights`: views of two groups are positives of each
        other with the weight `pair_weights`. None: only groups count.
    """

    embedding: jax.Array
    group: jax.Array
    position: jax.Array
    labels: jax.Array | None = None

    def pairs(
        self, others: "Views", similarity: str
    ) -> tuple[jax.Array, jax.Array | None]:
        """`[n, m]`: which pairs are positives, and the weights that these have.

        A view is a positive of itself here. Without labels each weight is 1: None.
        """
        same = self.group[:, None] == others.group[None, :]
        if self.labels is None or others.labels is None:
            return same, None
        weights = pair_weights(similarity, self.labels, others.labels)
        weights = jnp.where(same, 1, weights)
        return weights > 0, weights


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(plan, embedding, group, position, labels, temperature):
    return _forward(plan, embedding, group, position, labels, temperature)[0]


def _forward(plan, embedding, group, position, labels, temperature):
    rows = Views(embedding, group, position, labels)
    columns = _for_columns(rows, plan)
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
            negative_sum=matmul(embedding, columns.embedding.sum(0))
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


def _backward(plan, residuals, cotangents):
    rows, columns, scales, row_tops, kept = residuals
    weights = tuple(cotangents[0] * scale for scale in scales)
    of_rows, of_columns = _blocked_pair(plan, rows, columns, (weights, row_tops))

    def step(carry, tile, i, j, both):
        gradient, mirrored = carry
        (a_i, b_i), tops_i = _take(of_rows, i, 1)
        (a_j, b_j), tops_j = _take(of_columns, j, 0)
        top_i, positive_top_i = tops_i or (plan.bound, plan.bound)
        top_j, positive_top_j = tops_j or (plan.bound, plan.bound)
        w = a_i * tile.exp(top_i) + a_j * tile.exp(top_j)
        if plan.options.summation == "outside":
            w -= tile.weighted(b_i + b_j)
        else:
            w -= b_i * tile.positive_exp(positive_top_i)
            w -= b_j * tile.positive_exp(positive_top_j)
        gradient = _update(gradient, i, jnp.add, matmul(w, tile.columns))
        if both:
            # Transposed, because W^T U is a third slower on CPU cores than U^T W.
            mirrored = _update(mirrored, j, jnp.add, matmul(tile.rows_t, w))
        return (gradient, mirrored), None

    start = jnp.zeros_like(_block(rows.embedding, _grid(plan, rows, columns).rows))
    (gradient, mirrored), _ = _sweep(
        plan, rows, columns, (start, start.swapaxes(1, 2)), step, kept
    )
    gradient += mirrored.swapaxes(1, 2)
    gradient = gradient.reshape(-1, gradient.shape[-1])[: rows.group.shape[0]]
    return gradient, None, None, None, None


_losses.defvjp(_forward, _backward)


class _Tile(NamedTuple):
    """One tile of the matrix.

    Attributes:
      rows, rows_t, columns: the embeddings whose products it holds.
      positive: which pairs are positives.
      weights: of the positives; None where each has the weight 1.
      logits: -inf for pairs that do not count: a view with itself, and padding. None
        where only the kept exponentials are there.
      exponentials: exp(logits - bound), None without a bound.
    """

    rows: jax.Array
    rows_t: jax.Array
    columns: jax.Array
    positive: jax.Array
    weights: jax.Array | None
    logits: jax.Array | None
    exponentials: jax.Array | None

    def exp(self, top):
        if self.exponentials is not None:
            return self.exponentials
        return jnp.exp(self.logits - top)

    def weighted(self, x):
        """x times the weight for the positives, 0 for other pairs."""
        return jnp.where(self.positive, _times(x, self.weights), 0)

    def positive_exp(self, top):
        if self.exponentials is not None:
            return self.weighted(self.exponentials)
        # Masked first: the top is that of the positives, and others may exceed it.
        exponentials = jnp.exp(jnp.where(self.positive, self.logits - top, -jnp.inf))
        return _times(exponentials, self.weights)


def _times(x, weights):
    return x if weights is None else x * weights


def _measure(plan, rows, columns, temperature, names, row_tops):
    """Sums and maxima over each row of the matrix, `{name: [n]}`, and kept tiles."""
    of_rows, of_columns = _blocked_pair(plan, rows, columns, row_tops)
    shared_tops = (plan.bound, plan.bound)
    keep = _keeps(plan, rows, columns)

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
            return tile.positive.astype(temperature.dtype)
        if name == "gaussian_sum":
            # |z_i - z_j|^2 = 2 - 2 cos for unit vectors; the factor exp(-4) comes later.
            return jnp.exp(4 * temperature * tile.logits)
        if name == "hardest":
            return tile.logits
        mask = tile.positive if name == "hardest_positive" else ~tile.positive
        return jnp.where(mask, tile.logits, -jnp.inf)

    def step(measured, tile, i, j, both):
        tops_i = _take(of_rows, i, 1) or shared_tops
        tops_j = _take(of_columns, j, 0) or shared_tops
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
            measured[name] = _update(measured[name], i, combine, by_row)
            if mirror:
                by_column = reduce(values(name, tile, tops_j), axis=0)
                measured[name] = _update(measured[name], j, combine, by_column)
        return measured, tile.exponentials if keep else None

    grid = _grid(plan, rows, columns)
    zero = jnp.zeros_like(_block(rows.embedding[:, 0], grid.rows))
    start = {n: zero - jnp.inf if n in _MAXIMA else zero for n in sorted(names)}
    measured, kept = _sweep(plan, rows, columns, start, step)
    measured = {k: x.reshape(-1)[: rows.group.shape[0]] for k, x in measured.items()}
    return measured, kept if keep else None


def _sweep(plan, rows, columns, start, step, kept=None):
    """Fold `step(carry, tile, i, j, both)` over the tiles: the last carry, all outputs.

    `both` says that the tile stands for its mirror image too. `kept` are tiles of
    exponentials, as an earlier sweep returned them.
    """
    grid = _grid(plan, rows, columns)
    row_blocks = _block(rows, grid.rows)
    column_blocks = _block(columns, grid.columns)
    num_rows, num_columns = row_blocks.group.shape[0], column_blocks.group.shape[0]
    rows_t = row_blocks.embedding.swapaxes(1, 2)
    padded = rows.group.shape[0] % grid.rows or columns.group.shape[0] % grid.columns

    def fold(carry, pair_and_kept, *, masked, both):
        (i, j), exponentials = pair_and_kept
        row, column = _take(row_blocks, i), _take(column_blocks, j)
        positive, weights = row.pairs(column, plan.options.label_similarity)
        if masked:
            other = row.position[:, None] != column.position[None, :]
            if padded:
                other &= (row.position[:, None] >= 0) & (column.position[None, :] >= 0)
            positive &= other
        logits = None
        if exponentials is None:
            logits = matmul(row.embedding, column.embedding.T)
            if masked:
                logits = jnp.where(other, logits, -jnp.inf)
            if plan.bound is not None:
                exponentials = jnp.exp(logits - plan.bound)
        tile = _Tile(
            rows=row.embedding,
            rows_t=_take(rows_t, i),
            columns=column.embedding,
            positive=positive,
            weights=weights,
            logits=logits,
            exponentials=exponentials,
        )
        return step(carry, tile, i, j, both)

    if grid.symmetric:
        # Only tiles on the diagonal hold pairs of a view with itself.
        diagonal = np.tile(np.arange(num_rows, dtype=np.int32), (2, 1))
        above = np.stack(np.triu_indices(num_rows, 1)).astype(np.int32)
        sweeps = [(diagonal, True, False), (above, bool(padded), True)]
    else:
        pairs = np.indices((num_rows, num_columns), np.int32).reshape(2, -1)
        sweeps = [(pairs, True, False)]
    outputs = []
    for (pairs, masked, both), tiles in zip(
        sweeps, kept or [None] * len(sweeps), strict=True
    ):
        body = functools.partial(fold, masked=masked, both=both)
        start, output = lax.scan(body, start, (tuple(jnp.asarray(pairs)), tiles))
        outputs.append(output)
    return start, outputs


class _Grid(NamedTuple):
    """How the matrix is cut: sides of a tile, and whether tiles stand for mirror images."""

    rows: int
    columns: int
    symmetric: bool


def _grid(plan, rows, columns):
    """Equal blocks, none longer than `block_size`, with least padding."""
    num_rows, num_columns = rows.group.shape[0], columns.group.shape[0]
    row_blocks, column_blocks = (
        math.ceil(size / plan.options.block_size) for size in (num_rows, num_columns)
    )
    symmetric = plan.options.axis_name is None and row_blocks > 1
    if plan.options.block_size <= CPU_BLOCK_SIZE:
        # On a CPU, XLA makes straight code of a loop with one turn and then computes what
        # belongs to an anchor again for each of its pairs. So no sweep over a larger
        # matrix has one turn: two by two blocks have a single tile above the diagonal.
        if symmetric:
            row_blocks = column_blocks = min(max(row_blocks, 4), num_rows)
        elif row_blocks * column_blocks == 1 and num_rows >= _HALVE_FROM:
            row_blocks = 2
    return _Grid(
        rows=math.ceil(num_rows / row_blocks),
        columns=math.ceil(num_columns / column_blocks),
        symmetric=symmetric,
    )


def _keeps(plan, rows, columns):
    """Whether the tiles of exponentials are kept between the passes."""
    grid = _grid(plan, rows, columns)
    num_rows, num_columns = rows.group.shape[0], columns.group.shape[0]
    size = num_rows * num_columns
    if grid.symmetric:
        size = num_rows * (num_columns + grid.columns) // 2
    fits = size * rows.embedding.dtype.itemsize <= KEPT_BYTES
    # Without a bound, rows and columns shift a logit differently: nothing to share.
    return fits and plan.bound is not None


def _block(tree, length):
    """Cut the leading axis into blocks; integers are padded with -1, the rest with 0."""

    def cut(x):
        padding = [(0, -x.shape[0] % length)] + [(0, 0)] * (x.ndim - 1)
        fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        x = jnp.pad(x, padding, constant_values=fill)
        return x.reshape(-1, length, *x.shape[1:])

    return jax.tree.map(cut, tree)


def _blocked_pair(plan, rows, columns, tree):
    """What belongs to each anchor, in blocks: for the rows, and gathered for columns."""
    grid = _grid(plan, rows, columns)
    return _block(tree, grid.rows), _block(_for_columns(tree, plan), grid.columns)


def _for_columns(tree, plan):
    """What belongs to this device's views, for all views of the global batch."""
    if plan.options.axis_name is not None:
        return gather(tree, plan.options.axis_name)
    # On one device both are the same numbers, but the compiler must not know it: on a
    # CPU, a tile whose rows and columns read one array becomes scalar code, eight times
    # slower.
    return lax.optimization_barrier(tree)


def _take(tree, i, expand=None):
    """Block i; with `expand`, ready to broadcast along that axis of a tile."""

    def take(x):
        x = lax.dynamic_index_in_dim(x, i, keepdims=False)
        return x if expand is None else jnp.expand_dims(x, expand)

    return jax.tree.map(take, tree)


def _update(x, i, combine, value):
    """x with `value` added (or whatever `combine` does) to its block i."""
    value = combine(lax.dynamic_index_in_dim(x, i, keepdims=False), value)
    return lax.dynamic_update_index_in_dim(x, value, i, 0)


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Matrix product in full float32."""
    # The default is one bfloat16 pass on a TPU and TF32 on a GPU, and the temperature
    # and the cancellation between classes magnify what those drop.
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def gather(tree, axis_name: AxisName):
    """The global batch from each device's part, along the leading axis."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: lax.all_gather(x, axis_name, tiled=True), tree)


def _group_sizes(group, all_groups):
    """How many of `all_groups` equal each of `group`: a sort, not an N x N mask."""
    ordered = jnp.sort(all_groups)
    first = jnp.searchsorted(ordered, group, side="left")
    return jnp.searchsorted(ordered, group, side="right") - first
