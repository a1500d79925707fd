"""Weighted k-nearest-neighbour classification of embeddings."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from supcon_jax.models.heads import l2_normalize


@functools.partial(jax.jit, static_argnames=("k", "temperature", "num_classes"))
def _predict(
    bank: jax.Array,
    bank_labels: jax.Array,
    queries: jax.Array,
    *,
    k: int,
    temperature: float,
    num_classes: int,
) -> jax.Array:
    cosine = jnp.matmul(
        l2_normalize(queries), bank.T, precision=jax.lax.Precision.HIGHEST
    )
    nearest, indices = jax.lax.top_k(cosine, k)
    votes = jax.nn.one_hot(bank_labels[indices], num_classes)
    # Relative to the nearest, the weights neither overflow nor all underflow.
    weights = jnp.exp((nearest - nearest[:, :1]) / temperature)
    return jnp.argmax(jnp.einsum("qk,qkc->qc", weights, votes), axis=-1)


def _labelled(
    embeddings: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
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
    bank, bank_labels = _labelled(bank, bank_labels)
    queries, query_labels = _labelled(queries, query_labels)
    if not len(bank) or not len(queries):
        raise ValueError(
            f"kNN has {len(bank)} labelled images to compare with and {len(queries)} to "
            "classify (--config.data.train_split, --config.data.eval_split, or no kNN: "
            "--config.knn.bank=0)"
        )
    unit_bank, labels_of_bank = (
        l2_normalize(jnp.asarray(bank)),
        jnp.asarray(bank_labels),
    )
    correct = 0
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        # One shape for all chunks, so that one program is compiled.
        padded = np.pad(part, ((0, min(chunk, len(queries)) - len(part)), (0, 0)))
        predicted = _predict(
            unit_bank,
            labels_of_bank,
            padded,
            k=min(k, len(bank)),
            temperature=temperature,
            num_classes=num_classes,
        )
        labels = query_labels[start : start + chunk]
        correct += int(np.sum(np.asarray(predicted)[: len(part)] == labels))
    return correct / len(queries)
