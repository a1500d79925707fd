"""The loss with the full denominator, tile by tile: exact, and linear in memory.

The N x N matrix of logits is visited in tiles and never stored. Its gradient needs no
automatic differentiation: with l_i the log-sum-exp of row i, k_i its positives and g_i
the cotangent of its loss,

    dL/du_i = sum_{j != i} W_ij u_j,
    W_ij = a_i e_ij + a_j e_ji - [j in P(i)] (b_i + b_j)         (summation outside)
    W_ij = a_i e_ij + a_j e_ji - [j in P(i)] (c_i p_ij + c_j p_ji)       (inside)

where a_i e_ij = g_i exp(s_ij - l_i), c_i p_ij = g_i exp(s_ij - l+_i) and b_i = g_i / k_i.
W is symmetric. On one device each tile therefore serves its rows and its columns, and
half of the tiles suffice; across devices each one has all it needs for its own rows
once two numbers per anchor were gathered, and no N x D gradient travels.

The positives are masked inside the tile on purpose. Class sums give the same gradient
on paper, but their terms cancel when classes collapse: errors 30 to 600 times larger,
15 % of the gradient at worst (the accuracy table in docs/losses.md).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supcon_jax.losses.diagnostics import AnchorStatistics

_SUMS = ("total", "positive_total", "positive_sum", "gaussian_sum")
_MAXIMA = ("hardest_positive", "hardest_negative")


class Plan(NamedTuple):
    """What is fixed when the loss is traced.

    `bound` is a number that no logit exceeds, close enough to all of them that
    exp(logit - bound) stays in range; None makes every row find its own maximum first.
    """

    summation: str
    bound: float | None
    block_size: int
    axis_name: str | tuple[str, ...] | None
    with_statistics: bool


class Views(NamedTuple):
    """Views, one a row: `[n, D]` vectors and twice `[n]` integers.

    `embedding` is divided by the square root of the temperature, so that u_i . u_j is a
    logit; views of one `group` are positives of each other; `index` is the place in the
    global batch.
    """

    embedding: jax.Array
    group: jax.Array
    index: jax.Array


def streaming_losses(
    plan: Plan, views: Views, temperature: float | jax.Array
) -> tuple[jax.Array, jax.Array, AnchorStatistics | None]:
    """Loss of each of this device's views against all others of the global batch.

    Args:
      plan: the static choices.
      views: this device's n views.
      temperature: scalar, read only by the statistics.

    Returns:
      Losses `[n]`, 0 where a view has no positive; `[n]` booleans, whether it has one;
      and statistics (None without `plan.with_statistics`), to which no gradient flows.
    """
    return _losses(plan, *views, lax.stop_gradient(temperature))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(plan, embedding, group, index, temperature):
    return _forward(plan, embedding, group, index, temperature)[0]


def _forward(plan, embedding, group, index, temperature):
    rows = Views(embedding, group, index)
    columns = gather(rows, plan.axis_name)
    measure = functools.partial(_measure, plan, rows, columns, temperature)
    needed = {"positive_sum" if plan.summation == "outside" else "positive_total"}
    if plan.with_statistics:
        needed |= {"positive_sum", "gaussian_sum", *_MAXIMA}
    if plan.bound is None:
        maxima = measure(_MAXIMA, None)
        tops = (jnp.maximum(*maxima.values()), maxima["hardest_positive"])
        # An empty row has no maximum, and nothing to subtract it from.
        tops = tuple(jnp.where(jnp.isneginf(x), 0, x) for x in tops)
        measured = measure(sorted(needed - maxima.keys() | {"total"}), tops) | maxima
    else:
        tops = (plan.bound, plan.bound)
        measured = measure(sorted(needed | {"total"}), None)

    num_positives = _group_sizes(group, columns.group) - 1
    has_positive = num_positives > 0
    count = jnp.maximum(num_positives, 1).astype(embedding.dtype)
    log_total = tops[0] + jnp.log(jnp.where(has_positive, measured["total"], 1))
    if plan.summation == "outside":
        losses = log_total - measured["positive_sum"] / count
        positive_scale = 1 / count
    else:
        positive_total = jnp.where(has_positive, measured["positive_total"], 1)
        losses = log_total - tops[1] - jnp.log(positive_total / count)
        positive_scale = 1 / positive_total
    losses = jnp.where(has_positive, losses, 0)

    statistics = None
    if plan.with_statistics:
        statistics = AnchorStatistics(
            num_positives=num_positives,
            num_negatives=columns.group.shape[0] - 1 - num_positives,
            positive_sum=measured["positive_sum"],
            negative_sum=matmul(embedding, columns.embedding.sum(0))
            - jnp.sum(embedding**2, axis=1)
            - measured["positive_sum"],
            hardest_positive=measured["hardest_positive"],
            hardest_negative=measured["hardest_negative"],
            gaussian_sum=measured["gaussian_sum"],
        )
    # d loss / d (sum of exponentials), and the same for what stands for the positives.
    scales = (jnp.exp(tops[0] - log_total), positive_scale)
    scales = tuple(jnp.where(has_positive, x, 0) for x in scales)
    row_tops = tops if plan.bound is None else None
    return (losses, has_positive, statistics), (rows, columns, scales, row_tops)


def _backward(plan, residuals, cotangents):
    rows, columns, scales, row_tops = residuals
    weights = tuple(cotangents[0] * scale for scale in scales)
    of_rows, of_columns = _blocked_pair(plan, rows, columns, (weights, row_tops))

    def step(carry, tile, i, j, both):
        gradient, mirrored = carry
        (a_i, b_i), tops_i = _take(of_rows, i, 1)
        (a_j, b_j), tops_j = _take(of_columns, j, 0)
        top_i, positive_top_i = tops_i or (plan.bound, plan.bound)
        top_j, positive_top_j = tops_j or (plan.bound, plan.bound)
        w = a_i * tile.exp(top_i) + a_j * tile.exp(top_j)
        if plan.summation == "outside":
            w -= jnp.where(tile.positive, b_i + b_j, 0)
        else:
            w -= b_i * tile.positive_exp(positive_top_i)
            w -= b_j * tile.positive_exp(positive_top_j)
        gradient = _update(gradient, i, jnp.add, matmul(w, tile.columns))
        if both:
            # Transposed, because W^T U is a third slower on CPU cores than U^T W.
            mirrored = _update(mirrored, j, jnp.add, matmul(tile.rows_t, w))
        return gradient, mirrored

    start = jnp.zeros_like(_block(rows.embedding, _block_length(plan, rows)))
    gradient, mirrored = _sweep(
        plan, rows, columns, (start, start.swapaxes(1, 2)), step
    )
    gradient += mirrored.swapaxes(1, 2)
    gradient = gradient.reshape(-1, gradient.shape[-1])[: rows.group.shape[0]]
    return gradient, None, None, None


_losses.defvjp(_forward, _backward)


class _Tile(NamedTuple):
    """One tile of the matrix; `other` is None where all its pairs count."""

    rows: jax.Array
    rows_t: jax.Array
    columns: jax.Array
    logits: jax.Array
    positive: jax.Array
    other: jax.Array | None

    def exp(self, top):
        exponent = self.logits - top
        if self.other is not None:
            exponent = jnp.where(self.other, exponent, -jnp.inf)
        return jnp.exp(exponent)

    def positive_exp(self, top):
        return jnp.exp(jnp.where(self.positive, self.logits - top, -jnp.inf))


def _measure(plan, rows, columns, temperature, names, row_tops):
    """Sums and maxima over each row of the matrix, `{name: [n]}`."""
    of_rows, of_columns = _blocked_pair(plan, rows, columns, row_tops)
    shared_tops = (plan.bound, plan.bound)

    def values(name, tile, tops):
        if name == "total":
            return tile.exp(tops[0])
        if name == "positive_total":
            return tile.positive_exp(tops[1])
        if name == "positive_sum":
            return jnp.where(tile.positive, tile.logits, 0)
        if name == "gaussian_sum":
            # |z_i - z_j|^2 = 2 - 2 cos for unit vectors.
            gaussian = jnp.exp(4 * (temperature * tile.logits - 1))
            return gaussian if tile.other is None else gaussian * tile.other
        if name == "hardest_positive":
            return jnp.where(tile.positive, tile.logits, -jnp.inf)
        hidden = tile.positive if tile.other is None else tile.positive | ~tile.other
        return jnp.where(hidden, -jnp.inf, tile.logits)

    def step(measured, tile, i, j, both):
        tops_i = _take(of_rows, i, 1) or shared_tops
        tops_j = _take(of_columns, j, 0) or shared_tops
        measured = dict(measured)
        for name in measured:
            reduce, combine = (
                (jnp.sum, jnp.add) if name in _SUMS else (jnp.max, jnp.maximum)
            )
            by_row = reduce(values(name, tile, tops_i), axis=1)
            measured[name] = _update(measured[name], i, combine, by_row)
            if both:
                by_column = reduce(values(name, tile, tops_j), axis=0)
                measured[name] = _update(measured[name], j, combine, by_column)
        return measured

    zero = jnp.zeros_like(_block(rows.embedding[:, 0], _block_length(plan, rows)))
    start = {name: zero if name in _SUMS else zero - jnp.inf for name in names}
    measured = _sweep(plan, rows, columns, start, step)
    return {k: x.reshape(-1)[: rows.group.shape[0]] for k, x in measured.items()}


def _sweep(plan, rows, columns, start, step):
    """Fold `step(carry, tile, i, j, both)` over the tiles.

    `both` says that the tile stands for its mirror image too.
    """
    row_length, column_length = (_block_length(plan, x) for x in (rows, columns))
    row_blocks = _block(rows, row_length)
    column_blocks = _block(columns, column_length)
    num_rows, num_columns = row_blocks.group.shape[0], column_blocks.group.shape[0]
    rows_t = row_blocks.embedding.swapaxes(1, 2)
    padded = rows.group.shape[0] % row_length or columns.group.shape[0] % column_length

    def fold(carry, pair, *, masked, both):
        i, j = pair
        row, column = _take(row_blocks, i), _take(column_blocks, j)
        logits = matmul(row.embedding, column.embedding.T)
        positive = row.group[:, None] == column.group[None, :]
        other = None
        if masked:
            other = row.index[:, None] != column.index[None, :]
            other &= (row.index[:, None] >= 0) & (column.index[None, :] >= 0)
            positive &= other
        tile = _Tile(
            row.embedding, _take(rows_t, i), column.embedding, logits, positive, other
        )
        return step(carry, tile, i, j, both), None

    if plan.axis_name is not None:
        pairs = np.indices((num_rows, num_columns), np.int32).reshape(2, -1)
        sweeps = [(pairs, True, False)]
    else:
        # Only tiles on the diagonal hold pairs of a view with itself.
        diagonal = np.tile(np.arange(num_rows, dtype=np.int32), (2, 1))
        above = np.stack(np.triu_indices(num_rows, 1)).astype(np.int32)
        sweeps = [(diagonal, True, False), (above, bool(padded), True)]
    for pairs, masked, both in sweeps:
        body = functools.partial(fold, masked=masked, both=both)
        if pairs.size:
            start, _ = lax.scan(body, start, tuple(jnp.asarray(pairs)))
    return start


def _block_length(plan, views):
    """The length of equal blocks, none longer than asked for, with least padding."""
    size = views.group.shape[0]
    num_blocks = -(-size // plan.block_size)
    return -(-size // num_blocks)


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
    return (
        _block(tree, _block_length(plan, rows)),
        _block(gather(tree, plan.axis_name), _block_length(plan, columns)),
    )


def _take(tree, i, expand=None):
    """Block i; with `expand`, ready to broadcast along that axis of a tile."""

    def take(x):
        x = lax.dynamic_index_in_dim(x, i, keepdims=False)
        return x if expand is None else jnp.expand_dims(x, expand)

    return jax.tree.map(take, tree)


def _update(x, i, combine, value):
    value = combine(lax.dynamic_index_in_dim(x, i, keepdims=False), value)
    return lax.dynamic_update_index_in_dim(x, value, i, 0)


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Matrix product in full float32."""
    # The default is one bfloat16 pass on a TPU and TF32 on a GPU, and the temperature
    # and the cancellation between classes magnify what those drop.
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def gather(tree, axis_name: str | tuple[str, ...] | None):
    """The global batch from each device's part, along the leading axis."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: lax.all_gather(x, axis_name, tiled=True), tree)


def _group_sizes(group, all_groups):
    """How many of `all_groups` equal each of `group`: a sort, not an N x N mask."""
    ordered = jnp.sort(all_groups)
    first = jnp.searchsorted(ordered, group, side="left")
    return jnp.searchsorted(ordered, group, side="right") - first
