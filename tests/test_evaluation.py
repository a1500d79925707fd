"""kNN, top-k and whole splits, against loops; every example counted once."""

import doctest
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax import parallel
from supcon_jax.data.sources import ArraySource
from supcon_jax.evaluation import knn, predict
from supcon_jax.evaluation import rankme as rankme_module
from supcon_jax.evaluation.classification import classification_sums, summarize
from supcon_jax.evaluation.knn import knn_accuracy
from supcon_jax.evaluation.predict import Predictor
from supcon_jax.evaluation.rankme import rankme
from supcon_jax.models import Classifier, create_encoder

RNG = np.random.default_rng(0)


# --- kNN ---


def loop_knn(bank, bank_labels, queries, query_labels, k, temperature, num_classes):
    correct = 0
    for query, label in zip(queries, query_labels, strict=True):
        cosines = [
            float(query @ b) / math.sqrt(float(query @ query) * float(b @ b))
            for b in bank
        ]
        votes = [0.0] * num_classes
        for index in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
            votes[bank_labels[index]] += math.exp(cosines[index] / temperature)
        correct += votes.index(max(votes)) == label
    return correct / len(queries)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (9, 0.5)])
def test_knn_equals_a_loop(k, temperature):
    centers = RNG.normal(size=(4, 6))
    bank_labels, labels = RNG.integers(0, 4, 40), RNG.integers(0, 4, 33)
    bank = (centers[bank_labels] + 1.2 * RNG.normal(size=(40, 6))).astype(np.float32)
    queries = (centers[labels] + 1.2 * RNG.normal(size=(33, 6))).astype(np.float32)
    arguments = (bank, bank_labels, queries, labels)
    expected = loop_knn(*arguments, k, temperature, 4)
    assert 0.3 < expected < 1.0
    for chunk in (1024, 33, 10):  # one chunk, exactly one, and a padded last one
        got = knn_accuracy(
            *arguments, k=k, temperature=temperature, num_classes=4, chunk=chunk
        )
        assert got == expected


def unit(degrees):
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=-1).astype(np.float32)


def test_knn_weights_follow_the_temperature():
    """One near neighbour of class 0 against two far ones of class 1."""
    bank, labels = unit([5, 60, -60]), np.array([0, 1, 1])
    query = unit([0])

    def accuracy(temperature, k=3):
        return knn_accuracy(
            bank, labels, query, [0], k=k, temperature=temperature, num_classes=2
        )

    # exp(cos 5 / t) against 2 exp(cos 60 / t): equal at t = 0.496 / ln 2 = 0.716.
    assert accuracy(0.70) == 1.0
    assert accuracy(0.73) == 0.0
    assert accuracy(0.73, k=1) == 1.0
    assert accuracy(0.001) == 1.0  # weights of exp(1000) would overflow


def test_knn_uses_cosine_not_distance():
    bank, labels = np.array([[10.0, 0], [0.1, 0.2]], np.float32), np.array([0, 1])
    query = np.array([[0.2, 0.1]], np.float32)  # nearer to the second, along the first
    assert knn_accuracy(bank, labels, query, [0], k=1, num_classes=2) == 1.0


def test_knn_with_fewer_examples_than_k():
    bank, labels = unit([0, 90, 95]), np.array([0, 1, 1])
    got = knn_accuracy(bank, labels, unit([92, 1]), [1, 0], k=20, num_classes=2)
    assert got == 1.0


def test_knn_docstring_example():
    assert doctest.testmod(knn).failed == 0


# --- top-k ---


# --- RankMe ---


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_of_equal_directions_is_their_number(rank):
    """Orthogonal directions of equal weight: each has the share 1 / rank."""
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    embeddings = np.tile(directions[:rank], (5, 1))
    assert rankme(embeddings) == pytest.approx(rank, rel=1e-4)


def test_rankme_equals_its_definition():
    embeddings = np.random.default_rng(1).normal(size=(40, 6)) @ np.diag(range(6))
    gram = embeddings.T @ embeddings
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    shares = values / values.sum() + 1e-7
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert rankme(embeddings) == pytest.approx(expected, rel=1e-4)
    # The scale of the embeddings does not matter, their spread over directions does.
    assert rankme(100 * embeddings) == pytest.approx(expected, rel=1e-4)
    assert rankme(np.outer(np.ones(40), np.arange(6.0))) == pytest.approx(1, rel=1e-4)
    assert rankme(np.zeros((5, 3))) == 0.0
    assert rankme(1e37 * embeddings) == pytest.approx(expected, rel=1e-4)
    assert rankme(1e-37 * embeddings) == pytest.approx(expected, rel=1e-4)
    for value in (np.nan, np.inf):
        assert np.isnan(rankme(np.where(embeddings > 0, embeddings, value)))


def test_rankme_docstring_example():
    assert doctest.testmod(rankme_module).failed == 0


# --- classification ---


def test_classification_equals_a_loop():
    logits = RNG.normal(size=(20, 9)).astype(np.float32)
    labels = RNG.integers(0, 9, 20)
    mask = (RNG.uniform(size=20) < 0.7).astype(np.float32)
    expected = {"top1": 0, "top5": 0, "loss": 0.0, "num_examples": 0}
    for row, label, counts in zip(logits.astype(float), labels, mask, strict=True):
        if counts:
            ranking = sorted(range(9), key=lambda c: -row[c])
            expected["top1"] += label == ranking[0]
            expected["top5"] += label in ranking[:5]
            expected["loss"] += math.log(np.exp(row).sum()) - row[label]
            expected["num_examples"] += 1
    assert 0 < expected["top1"] < expected["top5"] < expected["num_examples"] < 20
    sums = classification_sums(logits, labels, mask)
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5)


def test_equal_logits_share_the_place():
    """A constant classifier gets chance, not 100 %; classes below do not matter."""
    labels, mask = jnp.array([0, 3, 7]), jnp.ones(3)
    sums = classification_sums(jnp.zeros((3, 10)), labels, mask)
    np.testing.assert_allclose(sums["top1"], 3 * 0.1, rtol=1e-6)
    np.testing.assert_allclose(sums["top5"], 3 * 0.5, rtol=1e-6)
    # Fifth and sixth place shared by two: half a hit at 5.
    logits = jnp.array([[9.0, 8, 7, 6, 5, 5, 1, 0]])
    sums = classification_sums(logits, jnp.array([4]), jnp.ones(1))
    assert float(sums["top1"]) == 0 and float(sums["top5"]) == 0.5


def test_fewer_than_five_classes():
    logits = jnp.array([[0.0, 1.0, 2.0]] * 3)
    sums = classification_sums(logits, jnp.array([0, 1, 2]), jnp.ones(3))
    assert float(sums["top1"]) == 1 and float(sums["top5"]) == 3


def test_logits_that_are_not_numbers_are_misses():
    logits = jnp.full((2, 8), jnp.nan)
    sums = classification_sums(logits, jnp.array([0, 5]), jnp.ones(2))
    assert float(sums["top1"]) == 0 and float(sums["top5"]) == 0
    assert math.isnan(float(sums["loss"]))


def test_padding_does_not_count_even_if_it_is_not_a_number():
    logits = jnp.array([[0.0, 2.0], [jnp.nan, jnp.nan]])
    sums = classification_sums(logits, jnp.array([1, 0]), jnp.array([1.0, 0.0]))
    assert float(sums["top1"]) == 1 and float(sums["num_examples"]) == 1
    np.testing.assert_allclose(sums["loss"], math.log(1 + math.exp(-2)), rtol=1e-6)


def test_summarize_weighs_batches_by_their_examples():
    batches = [
        {"top1": 3.0, "loss": 8.0, "num_examples": 4.0},
        {"top1": 0.0, "loss": 1.0, "num_examples": 1.0},
    ]
    assert summarize(iter(batches)) == {
        "eval/top1": 0.6,
        "eval/loss": 1.8,
        "eval/num_examples": 5,
    }


# --- whole splits ---


class Pixels(nn.Module):
    """Embeds an image as its pixels."""

    @nn.compact
    def __call__(self, images, *, train):
        assert not train
        return images.reshape(len(images), -1)


@pytest.fixture(scope="module")
def source():
    images = RNG.integers(0, 256, size=(21, 2, 2, 3), dtype=np.uint8)
    return ArraySource(images, RNG.integers(0, 7, 21).astype(np.int32), 7)


def predictor(encoder, head=None, *, batch_size=8, image_size=2):
    return Predictor(
        encoder,
        head,
        normalize=lambda x: (x - 0.5) / 0.25,
        mesh=parallel.create_mesh(),
        batch_size=batch_size,
        image_size=image_size,
        resize=image_size,
    )


@pytest.mark.parametrize("batch_size", [8, 24])
def test_embed_returns_every_example_once_in_order(source, batch_size):
    model = predictor(Pixels(), batch_size=batch_size)
    embeddings, labels = model.embed({"encoder": {}}, source)
    np.testing.assert_array_equal(labels, source.labels)
    expected = (source.images.reshape(21, 12) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


@pytest.mark.parametrize("batch_size", [8, 24])
def test_classify_counts_every_example_once(source, batch_size):
    kernel = RNG.normal(size=(12, 7)).astype(np.float32)
    bias = RNG.normal(size=7).astype(np.float32)
    variables = {
        "encoder": {},
        "head": {"params": {"dense_out": {"kernel": kernel, "bias": bias}}},
    }
    model = predictor(Pixels(), Classifier(7), batch_size=batch_size)
    metrics = model.classify(variables, source)
    x = (source.images.reshape(21, 12) / 255 - 0.5) / 0.25
    logits = x @ kernel + bias
    own = logits[np.arange(21), source.labels][:, None]
    place = (logits > own).sum(axis=1)
    log_softmax = own[:, 0] - np.log(np.exp(logits).sum(axis=1))
    assert metrics["eval/num_examples"] == 21
    np.testing.assert_allclose(metrics["eval/top1"], (place < 1).mean())
    np.testing.assert_allclose(metrics["eval/top5"], (place < 5).mean())
    np.testing.assert_allclose(metrics["eval/loss"], -log_softmax.mean(), rtol=1e-5)


def test_a_predictor_without_a_head_embeds_only(source):
    with pytest.raises(ValueError, match="has no head"):
        predictor(Pixels()).classify({"encoder": {}}, source)


def test_batch_norm_stays_in_inference_mode():
    """The same image embeds the same in whatever batch it comes."""
    encoder = create_encoder("resnet8", stem="cifar", width=0.25)
    images = RNG.integers(0, 256, size=(12, 8, 8, 3), dtype=np.uint8)
    labels = np.zeros(12, np.int32)

    def init(x):
        return encoder.init(jax.random.key(0), x, train=False)

    shapes = jax.eval_shape(init, jnp.zeros((1, 8, 8, 3)))
    variables = {
        "encoder": jax.tree.map(
            lambda leaf: RNG.uniform(0.2, 1, leaf.shape).astype(np.float32), shapes
        )
    }
    model = predictor(encoder, image_size=8)
    together, _ = model.embed(variables, ArraySource(images, labels, 1))
    alone, _ = model.embed(variables, ArraySource(images[9:10], labels[9:10], 1))
    assert np.ptp(together, axis=0).max() > 0
    np.testing.assert_allclose(together[9:10], alone, rtol=1e-5)


def test_steps_are_pure_functions(source):
    batch = {
        "image": source.images[:8, None],
        "label": source.labels[:8],
        "mask": np.ones(8, np.float32),
    }
    embeddings, labels, mask = predict.embed_step(
        {"encoder": {}}, batch, encoder=Pixels(), normalize=lambda x: x
    )
    np.testing.assert_allclose(
        embeddings, source.images[:8].reshape(8, 12) / 255, rtol=1e-6
    )
    assert labels is batch["label"] and mask is batch["mask"]
