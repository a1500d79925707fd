"""Nearest neighbours among embeddings, and classification by their weighted vote."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supcon_jax.models.heads import l2_normalize

# Puts a bank on the devices; it may split the rows over several, and add some of zeros.
Place = Callable[[np.ndarray], jax.Array]
# Numbers in one array that a device holds at a time: 256 MiB of float32.
CELLS = 2**26


def neighbours(
    bank: np.ndarray,
    queries: np.ndarray,
    *,
    k: int,
    exclude: np.ndarray | None = None,
    place: Place = jnp.asarray,
    chunk: int = 1024,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """The k nearest of a bank by cosine, the nearest first, for some queries at a time.

    Where the bank is split over devices, each finds the nearest of its own rows, and
    those of all devices are compared again.

    Args:
      bank: `[n, D]` embeddings.
      queries: `[q, D]` embeddings.
      k: neighbours; at most n, or n - 1 with `exclude`.
      exclude: `[q]`, for each query a row of the bank that is not to be found: itself.
      place: see `Place`.
      chunk: most queries at a time; fewer where the bank is large.

    Yields:
      Which queries, and their neighbours' cosines `[c, k]` and rows in the bank `[c, k]`.
    """
    placed = jax.jit(l2_normalize)(place(np.asarray(bank, np.float32)))
    sharding = placed.sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    if exclude is None:
        exclude = np.full(len(queries), -1)
    rows = len(placed) // len(sharding.device_set)
    chunk = max(1, min(chunk, len(queries), CELLS // rows))
    for start in range(0, len(queries), chunk):
        part = slice(start, min(start + chunk, len(queries)))
        count = part.stop - start
        # One shape for all chunks, so that one program is compiled.
        found = _nearest(
            placed,
            np.pad(np.asarray(queries[part], np.float32), ((0, chunk - count), (0, 0))),
            np.pad(exclude[part], (0, chunk - count)),
            len(bank),
            k=k,
            mesh=mesh,
        )
        cosines, indices = (np.asarray(x)[:count] for x in found)
        yield part, cosines, indices


@functools.partial(jax.jit, static_argnames=("k", "mesh"))
def _nearest(
    bank: jax.Array,
    queries: jax.Array,
    exclude: jax.Array,
    count: jax.Array,
    *,
    k: int,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and rows of the k nearest among the first `count` rows of a bank."""

    def compare(
        bank: jax.Array, queries: jax.Array, exclude: jax.Array, first: jax.Array | int
    ) -> tuple[jax.Array, jax.Array]:
        cosines = jnp.matmul(
            l2_normalize(queries), bank.T, precision=jax.lax.Precision.HIGHEST
        )
        row = first + jnp.arange(len(bank))
        known = (row < count) & (row != exclude[:, None])
        nearest, indices = jax.lax.top_k(
            jnp.where(known, cosines, -jnp.inf), min(k, len(bank))
        )
        return nearest, row[indices]

    if mesh is None:
        return compare(bank, queries, exclude, 0)
    axes, whole = mesh.axis_names, PartitionSpec()

    def on_device(
        bank: jax.Array, queries: jax.Array, exclude: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        first = jax.lax.axis_index(axes) * len(bank)
        return compare(bank, queries, exclude, first)

    nearest, rows = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(axes), whole, whole),
        out_specs=PartitionSpec(None, axes),
    )(bank, queries, exclude)
    nearest, rows = jax.lax.with_sharding_constraint(
        (nearest, rows), NamedSharding(mesh, whole)
    )
    nearest, order = jax.lax.top_k(nearest, k)
    return nearest, jnp.take_along_axis(rows, order, axis=1)


@functools.partial(jax.jit, static_argnames="num_classes")
def _vote(
    cosines: jax.Array,
    labels: jax.Array,
    k: jax.Array,
    temperature: jax.Array,
    *,
    num_classes: int,
) -> jax.Array:
    """Classes that the nearest k of some neighbours `[q, K]` vote for."""
    votes = jax.nn.one_hot(labels, num_classes)
    # Relative to the nearest, the weights neither overflow nor all underflow.
    weights = jnp.exp((cosines - cosines[:, :1]) / temperature)
    weights *= jnp.arange(cosines.shape[1]) < k
    return jnp.argmax(jnp.einsum("qk,qkc->qc", weights, votes), axis=-1)


def labelled(
    embeddings: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The examples whose label is not below 0."""
    embeddings, labels = np.asarray(embeddings), np.asarray(labels)
    return embeddings[labels >= 0], labels[labels >= 0]


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int,
    chunk: int = 1024,
) -> float:
    """Share of queries whose weighted vote of neighbours is their label.

    The k nearest bank embeddings by cosine vote with weight `exp(cos / temperature)`.

    Args:
      bank: `[n, D]` embeddings to compare with.
      bank_labels: `[n]` integers. Here and among the queries, examples with a label
        below 0 have none and are left out.
      queries: `[q, D]` embeddings to classify.
      query_labels: `[q]` integers.
      k: neighbours; at most those that there are.
      temperature: of the weights.
      num_classes: number of classes C.
      chunk: queries that are compared with the bank at a time.

    Returns:
      Accuracy in [0, 1].

    Raises:
      ValueError: no example of the bank, or no query, has a label.

    Example:
      >>> import numpy as np
      >>> x = np.eye(3, dtype=np.float32)
      >>> knn_accuracy(x, np.arange(3), x, np.arange(3), k=1, num_classes=3)
      1.0

    Source: Wu et al., arXiv 1805.01978, section 3.4: the weights and their temperature.
    There k is 200, with all of ImageNet in the bank. 20 is our choice: a small bank has
    fewer than 200 images of a class, and the other neighbours could only vote wrongly.
    """
    (accuracy,) = knn_accuracies(
        bank,
        bank_labels,
        queries,
        query_labels,
        ks=(k,),
        temperatures=(temperature,),
        num_classes=num_classes,
        chunk=chunk,
    ).values()
    return accuracy


def knn_accuracies(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    *,
    ks: Sequence[int],
    temperatures: Sequence[float],
    num_classes: int,
    place: Place = jnp.asarray,
    chunk: int = 1024,
) -> dict[tuple[int, float], float]:
    """`knn_accuracy` for every k and every temperature, with one search of the bank.

    Args:
      bank, bank_labels, queries, query_labels, num_classes, chunk: see `knn_accuracy`.
      ks, temperatures: of the votes.
      place: see `Place`.

    Returns:
      `(k, temperature)` -> accuracy in [0, 1].

    Raises:
      ValueError: no example of the bank, or no query, has a label.
    """
    bank, bank_labels = labelled(bank, bank_labels)
    queries, query_labels = labelled(queries, query_labels)
    if not len(bank) or not len(queries):
        raise ValueError(
            f"kNN has {len(bank)} labelled images to compare with and {len(queries)} to "
            "classify (--config.data.train_split, --config.data.eval_split, or no kNN: "
            "--config.knn.bank=0)"
        )
    most = min(max(ks), len(bank))
    chunk = max(1, min(chunk, CELLS // (most * num_classes)))  # the votes
    correct = {(k, temperature): 0 for k in ks for temperature in temperatures}
    for part, cosines, indices in neighbours(
        bank, queries, k=most, place=place, chunk=chunk
    ):
        labels = bank_labels[indices]
        for k, temperature in correct:
            predicted = _vote(cosines, labels, k, temperature, num_classes=num_classes)
            hits = np.asarray(predicted) == query_labels[part]
            correct[k, temperature] += int(np.sum(hits))
    return {pair: count / len(queries) for pair, count in correct.items()}
