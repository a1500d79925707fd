"""Every number of the embeddings of a training and an evaluation split."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from supcon_jax.evaluation import geometry, ood
from supcon_jax.evaluation.knn import Place, knn_accuracies, labelled
from supcon_jax.evaluation.rankme import rankme
from supcon_jax.evaluation.retrieval import retrieval

# Of the votes of neighbours, beside those asked for.
KS, TEMPERATURES = (1, 5, 20, 100, 200), (0.02, 0.07, 0.2)


def embedding_metrics(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    k: int,
    temperature: float,
    num_classes: int,
    place: Place = jnp.asarray,
) -> dict[str, float]:
    """kNN, retrieval and geometry, as `metrics.METRICS` names them.

    Without labels in both splits there is only what needs none.

    Args:
      train, test: `[n, D]` and `[q, D]` embeddings.
      train_labels, test_labels: `[n]` and `[q]`; below 0 where an image has none.
      k, temperature: of "knn/top1"; "knn/top1_k5_t0.07" and so on are of a grid.
      num_classes: C.
      place: puts a bank on the devices, see `knn.Place`.
    """
    metrics = {
        "embedding/rankme": rankme(test),
        "embedding/uniformity": geometry.uniformity(test),
    }
    bank, queries = labelled(train, train_labels), labelled(test, test_labels)
    if not len(bank[1]) or not len(queries[1]):
        return metrics
    accuracies = knn_accuracies(
        *bank,
        *queries,
        ks=sorted({min(k, len(bank[1])) for k in (*KS, k)}),
        temperatures=sorted({*TEMPERATURES, temperature}),
        num_classes=num_classes,
        place=place,
    )
    metrics["knn/top1"] = accuracies[min(k, len(bank[1])), temperature]
    metrics |= {f"knn/top1_k{k}_t{t:g}": x for (k, t), x in accuracies.items()}
    for name, references in (("test", (None, None)), ("train", bank)):
        found = retrieval(*queries, *references, place=place)
        recalls = {f"recall_at_{k}": share for k, share in found.recall.items()}
        of_r = {"r_precision": found.r_precision, "map_at_r": found.map_at_r}
        metrics |= {f"retrieval/{name}_{n}": x for n, x in (recalls | of_r).items()}
    metrics["embedding/alignment"] = geometry.alignment(*queries)
    shape = geometry.class_geometry(*queries)._asdict()
    return metrics | {f"embedding/{name}": x for name, x in shape.items()}


def detection_metrics(
    train: np.ndarray,
    train_labels: np.ndarray,
    inside: np.ndarray,
    outside: np.ndarray,
    *,
    k: int = 0,
    logits: Callable[[np.ndarray], np.ndarray] | None = None,
    place: Place = jnp.asarray,
) -> dict[str, float]:
    """How well images of the run's classes are told from others, by each score.

    Args:
      train, train_labels: `[n, D]` embeddings and `[n]` labels of training images.
      inside, outside: embeddings `[q, D]` of other images of these classes, and `[m, D]`
        of images that are of none of them.
      k: neighbour whose distance counts; 0: `ood.default_neighbour`.
      logits: a classifier of embeddings, for the largest softmax; None: without it.
      place: puts a bank on the devices, see `knn.Place`.
    """
    bank = labelled(train, train_labels)
    k = k or ood.default_neighbour(train_labels)
    scores = {
        "knn": [ood.knn_scores(train, x, k=k, place=place) for x in (inside, outside)]
    }
    if len(bank[1]):
        scores["mahalanobis"] = [
            ood.mahalanobis_scores(*bank, x) for x in (inside, outside)
        ]
    if logits is not None:
        scores["softmax"] = [
            ood.max_softmax_scores(logits(x)) for x in (inside, outside)
        ]
    return {
        f"ood/{name}_{key}": value
        for name, pair in scores.items()
        for key, value in ood.detection(*pair)._asdict().items()
    }
