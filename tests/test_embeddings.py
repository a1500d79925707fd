"""Retrieval, geometry and out-of-distribution scores against loops and scikit-learn."""

import functools
import itertools

import numpy as np
import pytest
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.neighbors import NearestNeighbors

from supcon_jax import parallel
from supcon_jax.evaluation import geometry, knn, ood
from supcon_jax.evaluation.knn import neighbours
from supcon_jax.evaluation.retrieval import retrieval

RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(5, 6))
LABELS = RNG.integers(0, 5, 80)
X = (CENTRES[LABELS] + 0.9 * RNG.normal(size=(80, 6))).astype(np.float32)
QUERY_LABELS = RNG.integers(0, 6, 30)  # one class has no reference
QUERIES = RNG.normal(size=(30, 6)).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def retrieval_by_hand(queries, labels, references, reference_labels, within):
    """The definitions, one query at a time."""
    recall = {k: [] for k in (1, 2, 4, 8)}
    r_precision, map_at_r = [], []
    for number, (query, label) in enumerate(zip(unit(queries), labels, strict=True)):
        others = [n for n in range(len(references)) if not (within and n == number)]
        others.sort(key=lambda n: -float(query @ unit(references)[n]))
        hits = [reference_labels[n] == label for n in others]
        total = sum(hits)
        if label < 0 or not total:
            continue
        for k in recall:
            recall[k].append(any(hits[:k]))
        r_precision.append(sum(hits[:total]) / total)
        precision = [sum(hits[: i + 1]) / (i + 1) for i in range(total) if hits[i]]
        map_at_r.append(sum(precision) / total)
    return (
        {k: np.mean(v) for k, v in recall.items()},
        np.mean(r_precision),
        np.mean(map_at_r),
        len(map_at_r),
    )


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_retrieval_equals_a_loop(within, chunk):
    sets = (X, LABELS, X, LABELS) if within else (QUERIES, QUERY_LABELS, X, LABELS)
    recall, r_precision, map_at_r, count = retrieval_by_hand(*sets, within)
    found = retrieval(*(sets[:2] if within else sets), chunk=chunk)
    assert found.num_queries == count
    assert found.recall == pytest.approx(recall, abs=1e-6)
    np.testing.assert_allclose(found.r_precision, r_precision, atol=1e-6)
    np.testing.assert_allclose(found.map_at_r, map_at_r, atol=1e-6)


@pytest.mark.parametrize("within", [True, False])
def test_neighbours_on_eight_devices_are_those_of_one(within):
    """80 rows lie on them evenly, 77 do not; a device has fewer rows than neighbours."""
    mesh = parallel.create_mesh()
    place = functools.partial(parallel.split_rows, mesh=mesh)
    bank, queries = X[:77], X[:77] if within else QUERIES
    exclude = np.arange(77) if within else None
    cosines = unit(queries.astype(np.float64)) @ unit(bank.astype(np.float64)).T
    if within:
        np.fill_diagonal(cosines, -np.inf)
    expected = np.argsort(-cosines, axis=1)[:, :20]
    for part, nearest, rows in neighbours(
        bank, queries, k=20, exclude=exclude, place=place, chunk=40
    ):
        np.testing.assert_array_equal(rows, expected[part])
        sorted_cosines = np.take_along_axis(cosines, expected, axis=1)[part]
        np.testing.assert_allclose(nearest, sorted_cosines, atol=1e-5)


def test_a_large_bank_is_compared_with_few_queries_at_a_time(monkeypatch):
    monkeypatch.setattr(knn, "CELLS", 200)
    parts = [part for part, _, _ in neighbours(X, QUERIES, k=3)]
    assert {part.stop - part.start for part in parts} == {2}
    assert parts[-1].stop == len(QUERIES)


def test_knn_over_a_grid_is_each_knn():
    sets = (X, LABELS, QUERIES, QUERY_LABELS % 5)
    ks, temperatures = (1, 7, 200), (0.05, 1.0)
    found = knn.knn_accuracies(*sets, ks=ks, temperatures=temperatures, num_classes=5)
    assert found == {
        (k, t): knn.knn_accuracy(*sets, k=k, temperature=t, num_classes=5)
        for k in ks
        for t in temperatures
    }
    assert len(set(found.values())) > 2


def test_retrieval_leaves_out_what_has_no_label():
    labels = np.where(np.arange(80) % 4 == 0, -1, LABELS)
    kept = labels >= 0
    assert retrieval(X, labels) == retrieval(X[kept], labels[kept])
    with pytest.raises(ValueError, match="no query has another example"):
        retrieval(X[:3], np.array([0, 1, 2]))


def test_alignment_and_uniformity_equal_loops():
    x, labels = unit(X.astype(np.float64)), np.where(np.arange(80) % 9 == 0, -1, LABELS)
    same = [
        np.sum((x[i] - x[j]) ** 2)
        for i, j in itertools.permutations(range(80), 2)
        if labels[i] == labels[j] >= 0
    ]
    np.testing.assert_allclose(geometry.alignment(X, labels), np.mean(same), atol=1e-6)
    pairs = [
        np.exp(-2 * np.sum((x[i] - x[j]) ** 2))
        for i, j in itertools.permutations(range(80), 2)
    ]
    expected = np.log(np.mean(pairs))
    np.testing.assert_allclose(geometry.uniformity(X, chunk=9), expected, atol=1e-6)


def test_collapsed_classes_are_a_simplex():
    """C orthogonal directions less their mean are one, and no class has a spread."""
    labels = np.repeat(np.arange(4), 5)
    collapsed = np.eye(4)[labels]
    found = geometry.class_geometry(collapsed, labels)
    np.testing.assert_allclose(found, (0, 0, 0), atol=1e-9)
    assert geometry.alignment(collapsed, labels) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="two of them"):
        geometry.class_geometry(collapsed, np.zeros(20, int))


def test_class_geometry_equals_a_loop():
    means = np.array([X[LABELS == c].mean(axis=0, dtype=np.float64) for c in range(5)])
    within = np.mean([np.sum((X[i] - means[LABELS[i]]) ** 2) for i in range(80)])
    centred = means - means.mean(axis=0)
    between = np.mean([m @ m for m in centred])
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in itertools.combinations(centred, 2)
    ]
    found = geometry.class_geometry(X, LABELS)
    np.testing.assert_allclose(found.within_between, within / between, rtol=1e-6)
    distance = np.mean([abs(c + 1 / 4) for c in cosines])
    np.testing.assert_allclose(found.simplex_distance, distance, rtol=1e-6)


@pytest.mark.parametrize("decimals", [1, 9])
def test_detection_equals_scikit_learn(decimals):
    """With many ties, and with none."""
    inside = RNG.normal(1.0, size=300).round(decimals)
    outside = RNG.normal(0.0, size=200).round(decimals)
    truth = np.repeat([1, 0], [300, 200])
    scores = np.concatenate([inside, outside])
    found = ood.detection(inside, outside)
    np.testing.assert_allclose(found.auroc, roc_auc_score(truth, scores), atol=1e-9)
    expected = average_precision_score(truth, scores)
    np.testing.assert_allclose(found.aupr, expected, atol=1e-9)
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    np.testing.assert_allclose(found.fpr95, fpr[tpr >= 0.95].min(), atol=1e-9)


def test_the_default_neighbour_lies_within_a_class():
    labels = np.repeat([0, 1, -1], [200, 8, 30])
    assert ood.default_neighbour(labels) == 4
    assert ood.default_neighbour(labels[:200]) == 50
    assert ood.default_neighbour(np.array([0, 1])) == 1
    assert ood.default_neighbour(np.array([-1])) == 50


@pytest.mark.parametrize("k", [1, 5, 999])
def test_knn_scores_equal_scikit_learn(k):
    finder = NearestNeighbors(n_neighbors=min(k, 80)).fit(unit(X))
    expected = -finder.kneighbors(unit(QUERIES))[0][:, -1]
    found = ood.knn_scores(X, QUERIES, k=k, chunk=11)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_mahalanobis_scores_equal_scikit_learn():
    labels = np.where(np.arange(80) % 9 == 0, -1, LABELS)
    known = labels >= 0
    means = [X[labels == c].mean(axis=0) for c in range(5)]
    centred = X[known] - np.array(means)[labels[known]]
    model = EmpiricalCovariance(assume_centered=True).fit(centred)
    distances = [model.mahalanobis(QUERIES - mean) for mean in means]
    found = ood.mahalanobis_scores(X, labels, QUERIES)
    np.testing.assert_allclose(found, -np.min(distances, axis=0), rtol=1e-4)


def test_mahalanobis_where_embeddings_fill_few_dimensions():
    """As those of a collapsed encoder; along the others nothing is known."""
    flat = np.concatenate([X[:, :2], np.zeros((80, 4))], axis=1)
    found = ood.mahalanobis_scores(flat, LABELS, flat[:5])
    np.testing.assert_allclose(
        found, ood.mahalanobis_scores(X[:, :2], LABELS, X[:5, :2]), rtol=1e-4
    )


def test_max_softmax_scores():
    logits = RNG.normal(size=(9, 4))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(ood.max_softmax_scores(logits), p.max(1), rtol=1e-5)
