"""The matrix of logits in tiles: what they are made of, how it is cut, visiting them all.

A tile is a block of rows against a block of columns, and the whole matrix is never there.
What is computed of each tile is up to the caller: streaming.py is the loss.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from supcon_jax.losses.labels import pair_weights
from supcon_jax.losses.options import CPU_BLOCK_SIZE, AxisName, LossOptions

# Tiles of exponentials that the forward pass keeps for the backward pass, together at
# most this much; a larger batch computes them again. With them the program's temporary
# memory must stay below 32 MiB: the C library returns a larger block to the operating
# system after every call, and getting its pages again took 16 ms beside a loss of 24 ms
# (N = 2048 on a CPU).
KEPT_BYTES = 16 * 2**20

# A lone tile is cut in two from this many views on (measured on CPU cores).
_HALVE_FROM = 512

Tree = Any  # arrays, alone or in tuples and dictionaries
Shift = jax.Array | float  # what logits are shifted by: a number, or one for each row


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


class Tile(NamedTuple):
    """One tile of the matrix: r rows, c columns.

    Attributes:
      rows, rows_t, columns: `[r, D]`, `[D, r]`, `[c, D]`, the embeddings whose products it
        holds.
      positive: `[r, c]`, which pairs are positives.
      weights: `[r, c]`, of the positives; None where each has the weight 1.
      logits: `[r, c]`, -inf for pairs that do not count: a view with itself, and padding.
        None where only the kept exponentials are there.
      exponentials: `[r, c]`, exp(logits - bound), None without a bound.
    """

    rows: jax.Array
    rows_t: jax.Array
    columns: jax.Array
    positive: jax.Array
    weights: jax.Array | None
    logits: jax.Array | None
    exponentials: jax.Array | None

    def exp(self, top: Shift) -> jax.Array:
        """`[r, c]`: exp(logits - top); with a bound, the bound is the top."""
        if self.exponentials is not None:
            return self.exponentials
        assert self.logits is not None
        return jnp.exp(self.logits - top)

    def weighted(self, x: jax.Array | float) -> jax.Array:
        """`[r, c]`: x times the weight for the positives, 0 for other pairs."""
        return jnp.where(self.positive, _times(x, self.weights), 0)

    def positive_exp(self, top: Shift) -> jax.Array:
        """`[r, c]`: `weighted` of `exp`, whose top is now that of the positives."""
        if self.exponentials is not None:
            return self.weighted(self.exponentials)
        assert self.logits is not None
        # Masked first, because the logits of other pairs may exceed the top.
        exponentials = jnp.exp(jnp.where(self.positive, self.logits - top, -jnp.inf))
        return _times(exponentials, self.weights)


def _times(x: Any, weights: jax.Array | None) -> Any:
    return x if weights is None else x * weights


# See `sweep`.
Step = Callable[[Tree, Tile, jax.Array, jax.Array, bool], tuple[Tree, Tree]]


class Grid(NamedTuple):
    """How the matrix is cut: sides of a tile, and whether tiles stand for mirror images."""

    rows: int
    columns: int
    symmetric: bool


def create_grid(plan: Plan, rows: Views, columns: Views) -> Grid:
    """Equal blocks, none longer than `block_size`, with least padding.

    Args:
      plan: of the loss.
      rows: this device's n views.
      columns: the N views of the global batch.
    """
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
    return Grid(
        rows=math.ceil(num_rows / row_blocks),
        columns=math.ceil(num_columns / column_blocks),
        symmetric=symmetric,
    )


def keeps_exponentials(plan: Plan, rows: Views, columns: Views) -> bool:
    """Whether the tiles of exponentials are kept between the passes.

    Args:
      plan, rows, columns: as for `create_grid`.
    """
    grid = create_grid(plan, rows, columns)
    num_rows, num_columns = rows.group.shape[0], columns.group.shape[0]
    size = num_rows * num_columns
    if grid.symmetric:
        size = num_rows * (num_columns + grid.columns) // 2
    fits = size * rows.embedding.dtype.itemsize <= KEPT_BYTES
    # Without a bound, rows and columns shift a logit differently: nothing to share.
    return fits and plan.bound is not None


def sweep(
    plan: Plan,
    rows: Views,
    columns: Views,
    start: Tree,
    step: Step,
    kept: list[Tree] | None = None,
) -> tuple[Tree, list[Tree]]:
    """Goes through all tiles, of mirror images through one, and folds `step` over them.

    Args:
      plan, rows, columns: as for `create_grid`.
      start: the first carry.
      step: `(carry, tile, i, j, both) -> (carry, output)` for the tile of row block i and
        column block j; `both` says that it stands for its mirror image too.
      kept: tiles of exponentials, as an earlier sweep returned them.

    Returns:
      The last carry; and the outputs, stacked, of the tiles that were visited in one loop.
    """
    grid = create_grid(plan, rows, columns)
    row_blocks = into_blocks(rows, grid.rows)
    column_blocks = into_blocks(columns, grid.columns)
    num_rows, num_columns = row_blocks.group.shape[0], column_blocks.group.shape[0]
    rows_t = row_blocks.embedding.swapaxes(1, 2)
    padded = rows.group.shape[0] % grid.rows or columns.group.shape[0] % grid.columns

    def fold(
        carry: Tree, pair_and_kept: Tree, *, masked: bool, both: bool
    ) -> tuple[Tree, Tree]:
        (i, j), exponentials = pair_and_kept
        row, column = take_block(row_blocks, i), take_block(column_blocks, j)
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
        tile = Tile(
            rows=row.embedding,
            rows_t=take_block(rows_t, i),
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


def into_blocks(tree: Tree, length: int) -> Tree:
    """Cuts the leading axis of arrays: `[n, ...]` becomes `[blocks, length, ...]`.

    Integers are padded with -1, the rest with 0.
    """

    def cut(x: jax.Array) -> jax.Array:
        padding = [(0, -x.shape[0] % length)] + [(0, 0)] * (x.ndim - 1)
        fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        x = jnp.pad(x, padding, constant_values=fill)
        return x.reshape(-1, length, *x.shape[1:])

    return jax.tree.map(cut, tree)


def blocks_of_both(
    plan: Plan, rows: Views, columns: Views, tree: Tree
) -> tuple[Tree, Tree]:
    """What belongs to each anchor, in blocks: for the rows, and gathered for columns.

    Args:
      plan, rows, columns: as for `create_grid`.
      tree: arrays `[n, ...]` of this device's views.
    """
    grid = create_grid(plan, rows, columns)
    of_rows = into_blocks(tree, grid.rows)
    return of_rows, into_blocks(for_columns(tree, plan), grid.columns)


def for_columns(tree: Tree, plan: Plan) -> Tree:
    """Of arrays `[n, ...]` for this device's views: `[N, ...]`, for the global batch."""
    if plan.options.axis_name is not None:
        return gather(tree, plan.options.axis_name)
    # On one device both are the same numbers, but the compiler must not know it: on a
    # CPU, a tile whose rows and columns read one array becomes scalar code, eight times
    # slower.
    return lax.optimization_barrier(tree)


def take_block(tree: Tree, i: jax.Array, expand: int | None = None) -> Tree:
    """Block i of arrays `[blocks, length, ...]`: `[length, ...]`.

    With `expand` the array has an axis more, to broadcast along that axis of a tile.
    """

    def take(x: jax.Array) -> jax.Array:
        x = lax.dynamic_index_in_dim(x, i, keepdims=False)
        return x if expand is None else jnp.expand_dims(x, expand)

    return jax.tree.map(take, tree)


def update_block(
    x: jax.Array, i: jax.Array, combine: Callable, value: jax.Array
) -> jax.Array:
    """x `[blocks, ...]` with `value` added (or what `combine` does) to its block i."""
    value = combine(lax.dynamic_index_in_dim(x, i, keepdims=False), value)
    return lax.dynamic_update_index_in_dim(x, value, i, 0)


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Matrix product in full float32."""
    # The default is one bfloat16 pass on a TPU and TF32 on a GPU, and the temperature
    # and the cancellation between classes magnify what those drop.
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def gather(tree: Tree, axis_name: AxisName) -> Tree:
    """The global batch from each device's part, along the leading axis."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: lax.all_gather(x, axis_name, tiled=True), tree)
