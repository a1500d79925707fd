"""Labels beyond one class and hard negatives: against loops, across devices, in tiles."""

import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from supcon_jax.losses import momentum_contrast_loss, supcon_loss, tiles
from tests.test_losses import check_against_the_loop as check_against
from tests.test_losses_scaling import (
    equations,
    large_collectives,
    make_mesh,
    relative,
    scalar_loss,
    sharded,
)

SIMILARITIES = ("any", "jaccard", "inner")


def similarity(kind, a, b):
    """The definitions, class by class, in Python numbers."""
    pairs = [(float(x), float(y)) for x, y in zip(a, b, strict=True)]
    if kind == "any":
        return float(any(x > 0 and y > 0 for x, y in pairs))
    if kind == "jaccard":
        union = sum(max(pair) for pair in pairs)
        return sum(min(pair) for pair in pairs) / union if union else 0.0
    norms = [math.sqrt(sum(x * x for x in row)) for row in zip(*pairs, strict=True)]
    return sum(x * y for x, y in pairs) / math.prod(norms) if all(norms) else 0.0


def loop_loss(
    projections,
    labels,
    *,
    label_similarity="jaccard",
    hard_negative_beta=0.0,
    temperature=0.1,
    contrast_mode="all",
    summation="outside",
    denominator="all",
):
    """The definition, term by term, in float64: `[B]`."""
    x = np.asarray(projections, np.float64)
    num_images, num_views, _ = x.shape
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    views = [(b, v) for b in range(num_images) for v in range(num_views)]
    losses = np.zeros((num_images, num_views))
    for i, v in views:
        positives, negatives = [], []
        for j, w in views:
            if (j, w) == (i, v):
                continue
            logit = float(x[i, v] @ x[j, w]) / temperature
            weight = similarity(label_similarity, labels[i], labels[j])
            weight = 1.0 if i == j else weight
            if weight > 0:
                positives.append((weight, logit))
            else:
                negatives.append(logit)
        if not positives or (denominator == "only_negatives" and not negatives):
            continue
        hardness = [hard_negative_beta * s for s in negatives]
        if negatives:
            mean = np.logaddexp.reduce(hardness) - math.log(len(negatives))
            negatives = [s + h - mean for s, h in zip(negatives, hardness, strict=True)]
        total = sum(weight for weight, _ in positives)
        terms = []
        for weight, s in positives:
            in_denominator = {
                "all": [p for _, p in positives] + negatives,
                "one_positive": [s, *negatives],
                "only_negatives": negatives,
            }[denominator]
            terms.append((weight / total, s - np.logaddexp.reduce(in_denominator)))
        if summation == "outside":
            losses[i, v] = -sum(weight * term for weight, term in terms)
        else:
            losses[i, v] = -math.log(sum(w * math.exp(term) for w, term in terms))
    return losses[:, 0] if contrast_mode == "one" else losses.mean(axis=1)


def example(num_images=9, num_views=2, dimension=5, classes=4, seed=0, soft=True):
    """Projections, and rows in which a class has no weight half of the time."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_images, num_views, dimension))
    labels = rng.uniform(0.1, 1, size=(num_images, classes))
    labels *= rng.uniform(size=labels.shape) < 0.4
    labels[np.arange(num_images), rng.integers(0, classes, num_images)] = 0.7
    return x, labels if soft else (labels > 0).astype(np.float64)


check_against_the_loop = functools.partial(check_against, loop=loop_loss)


def name_of(variant):
    return ",".join(f"{k}={v}" for k, v in variant.items()) or "default"


VARIANTS = [
    {"label_similarity": "any"},
    {"label_similarity": "jaccard", "summation": "inside", "temperature": 0.01},
    {"label_similarity": "jaccard", "denominator": "one_positive"},
    {"hard_negative_beta": 1.5, "denominator": "one_positive", "summation": "inside"},
]
MORE_VARIANTS = [
    {"label_similarity": "inner", "summation": "inside"},
    {"hard_negative_beta": 0.5},
    {"label_similarity": "jaccard"},
    {"label_similarity": "inner"},
    {"label_similarity": "inner", "temperature": 0.01, "contrast_mode": "one"},
    {"denominator": "only_negatives", "summation": "inside"},
    {"hard_negative_beta": 0.5, "denominator": "only_negatives", "temperature": 0.01},
]


@pytest.mark.parametrize(
    "variant",
    [*VARIANTS, *(pytest.param(v, marks=pytest.mark.slow) for v in MORE_VARIANTS)],
    ids=name_of,
)
def test_value_and_gradient_equal_the_loop(variant):
    check_against_the_loop(*example(), variant, block_size=5)


def test_single_views_equal_the_loop():
    """Without own views, an image that shares nothing is no anchor."""
    x, labels = example(num_views=1, classes=9)
    labels[0] = 9 * [0]
    labels[:, 8] = 0
    labels[0, 8] = 1
    variant = {"label_similarity": "inner"}
    assert loop_loss(x, labels, **variant)[0] == 0
    check_against_the_loop(x, labels, variant)


# Two programs round alike as users compile them (tests/conftest.py has what jaxlib 0.10 has).
EMITTERS = (
    {"xla_cpu_use_fusion_emitters": True}
    if "emitters" in os.environ["XLA_FLAGS"]
    else {}
)
ONE_HOT_CASES = [
    ("any", {}),
    ("jaccard", {"summation": "inside"}),
    ("inner", {"temperature": 0.01}),
    *(
        pytest.param(kind, options, marks=pytest.mark.slow)
        for kind in SIMILARITIES
        for options in (
            {},
            {"summation": "inside"},
            {"hard_negative_beta": 0.5},
            {"denominator": "one_positive"},
        )
    ),
]


@pytest.mark.parametrize(("kind", "options"), ONE_HOT_CASES, ids=str)
def test_one_hot_rows_are_the_integers_to_the_last_digit(kind, options):
    x = np.random.default_rng(3).normal(size=(40, 2, 8)).astype(np.float32)
    labels = np.random.default_rng(4).integers(0, 6, 40).astype(np.int32)
    step = jax.jit(
        jax.value_and_grad(
            functools.partial(
                supcon_loss,
                label_similarity=kind,
                block_size=30,
                with_diagnostics=True,
                **options,
            ),
            has_aux=True,
        ),
        compiler_options=EMITTERS,
    )
    found = step(x, np.eye(6, dtype=np.float32)[labels])
    jax.tree.map(np.testing.assert_array_equal, found, step(x, labels))


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_similarities_of_two_rows(kind):
    """Half in common, other scales, nothing in common: numbers from the definitions."""
    labels = np.array([[2.0, 0, 2], [0, 0, 4], [0, 3, 0]])
    expected = {"any": [1, 0], "jaccard": [2 / 6, 0], "inner": [1 / math.sqrt(2), 0]}
    x = np.random.default_rng(0).normal(size=(3, 2, 4))
    z = x / np.linalg.norm(x, axis=-1, keepdims=True)
    weight = expected[kind][0]
    logits = 2 * z.reshape(6, 4) @ z[0, 0]
    total = np.log(np.exp(logits[1:]).sum())
    terms = np.array([1, weight, weight]) * (logits[1:4] - total)
    with jax.enable_x64(True):
        losses = supcon_loss(
            x, labels, temperature=0.5, label_similarity=kind,
            contrast_mode="one", reduction="none",
        )  # fmt: skip
    assert losses[0] == pytest.approx(-terms.sum() / (1 + 2 * weight), rel=1e-12)


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_gradient_equals_dense_automatic_differentiation(kind):
    x, labels = example(num_images=150, dimension=16, classes=12, seed=5)
    same = np.repeat(np.repeat(np.eye(150, dtype=bool), 2, 0), 2, 1)
    weights = np.array([[similarity(kind, a, b) for b in labels] for a in labels])
    weights = np.where(same, 1, np.repeat(np.repeat(weights, 2, 0), 2, 1))
    weights = np.where(np.eye(300, dtype=bool), 0, weights)

    def dense(x):
        z = (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).reshape(300, -1)
        logits = jnp.where(np.eye(300, dtype=bool), -1e9, z @ z.T / 0.1)
        log_probability = jax.nn.log_softmax(logits, axis=1)
        losses = -jnp.sum(weights * log_probability, axis=1) / weights.sum(1)
        return jnp.mean(losses)

    with jax.enable_x64(True):
        expected = jax.jit(jax.grad(dense))(x)
    loss = functools.partial(supcon_loss, label_similarity=kind, block_size=70)
    found = jax.jit(jax.grad(loss))(x.astype(np.float32), labels)
    assert relative(found, expected) < 3e-6


def test_diagnostics_count_a_pair_that_shares_anything():
    x, labels = example(num_images=12, classes=6, seed=2)
    loss = jax.jit(
        functools.partial(
            supcon_loss, block_size=7, label_similarity="inner", with_diagnostics=True
        )
    )
    _, got = loss(x, labels)
    z = (x / np.linalg.norm(x, axis=-1, keepdims=True)).reshape(24, -1)
    shares = np.repeat(np.repeat(labels @ labels.T > 0, 2, 0), 2, 1)
    other = ~np.eye(24, dtype=bool)
    positive, negative = shares & other, ~shares & other
    cosines = z @ z.T
    hardest = [np.where(mask, cosines, -2).max(1) for mask in (positive, negative)]
    expected = {
        "positive_cosine": cosines[positive].mean(),
        "negative_cosine": cosines[negative].mean(),
        "uniformity": np.log(np.exp(4 * cosines[other] - 4).mean()),
        "contrastive_top1": np.mean(hardest[0] > hardest[1]),
        "no_positive_fraction": 0,
        "mean_positives": positive.sum(1).mean(),
        "num_anchors": 24,
        "collapse_loss": math.log(23),
    }
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    "options",
    [
        {"label_similarity": "jaccard", "summation": "inside"},
        {"label_similarity": "inner", "hard_negative_beta": 0.5},
        pytest.param(
            {"label_similarity": "any", "temperature": 0.01}, marks=pytest.mark.slow
        ),
    ],
    ids=name_of,
)
def test_eight_devices_change_nothing(options):
    x, labels = example(num_images=40, dimension=16)
    with jax.enable_x64(True):
        one = functools.partial(supcon_loss, block_size=48, **options)
        many = sharded(8, block_size=7, **options)
        expected = jax.jit(jax.value_and_grad(one))(x, labels)
        got = jax.jit(jax.value_and_grad(many))(x, labels)
    assert relative(got[0], expected[0]) < 1e-13
    assert relative(got[1], expected[1]) < 1e-13


def test_global_arrays_under_jit():
    x, labels = example(num_images=16, dimension=8)
    x = x.astype(np.float32)
    split = jax.sharding.NamedSharding(make_mesh(8), P("data"))
    step = jax.jit(
        jax.value_and_grad(supcon_loss), in_shardings=split, out_shardings=(None, split)
    )
    got = step(jax.device_put(x, split), jax.device_put(labels, split))
    expected = jax.jit(jax.value_and_grad(supcon_loss))(x, labels)
    assert relative(got[0], expected[0]) < 5e-6
    assert relative(got[1], expected[1]) < 5e-6


@pytest.mark.slow
def test_global_arrays_with_explicit_axes():
    x, labels = example(num_images=16, dimension=8)
    x = x.astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), devices=make_mesh(8).devices.flatten())
    split = jax.sharding.NamedSharding(mesh, P("data"))
    step = jax.jit(jax.value_and_grad(supcon_loss))
    got = step(jax.device_put(x, split), jax.device_put(labels, split))
    assert relative(got[1], step(x, labels)[1]) < 5e-6


def test_backward_has_no_large_collective():
    """Labels travel with the embeddings, forwards; nothing of that size comes back."""
    split = jax.sharding.NamedSharding(make_mesh(8), P("data"))
    x = jax.ShapeDtypeStruct((64, 2, 64), jnp.float32, sharding=split)
    labels = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)
    step = jax.jit(jax.value_and_grad(sharded(8, block_size=64)))
    found = large_collectives(step.lower(x, labels).compile().as_text(), 64 * 2 * 8)
    assert set(found) == {"all-gather"} and len(found) <= 2


@pytest.mark.parametrize(
    "options",
    [*({"label_similarity": kind} for kind in SIMILARITIES), {"with_diagnostics": True}]
    + [{"hard_negative_beta": 1.0}, {"temperature": 0.01}],
    ids=name_of,
)
def test_no_array_is_n_by_n_and_every_product_is_full_float32(options, monkeypatch):
    monkeypatch.setattr(tiles, "KEPT_BYTES", 0)
    x, labels = example(num_images=256, classes=8)
    loss = functools.partial(scalar_loss, labels=labels, block_size=32, **options)
    traced = jax.make_jaxpr(jax.value_and_grad(loss))(x.astype(np.float32)).jaxpr
    found = list(equations(traced))
    assert max(v.aval.size for e in found for v in e.outvars) <= 32 * 512
    products = [e for e in found if e.primitive.name == "dot_general"]
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert all(product.params["precision"] == highest for product in products)


@pytest.mark.parametrize(
    "options",
    [
        {"label_similarity": "jaccard"},
        pytest.param({"hard_negative_beta": 1.0}, marks=pytest.mark.slow),
    ],
    ids=name_of,
)
def test_memory_is_linear(options):
    def temporary(num_images):
        x = jax.ShapeDtypeStruct((num_images, 2, 128), jnp.float32)
        labels = jax.ShapeDtypeStruct((num_images, 20), jnp.float32)
        step = jax.jit(
            jax.value_and_grad(functools.partial(supcon_loss, block_size=64, **options))
        )
        memory = step.lower(x, labels).compile().memory_analysis()
        return memory.temp_size_in_bytes

    small, large = temporary(2048), temporary(4096)
    # N = 8192: one N x N array would be 256 MiB.
    assert large < 64 * 2**20
    assert large < 2.1 * small


ROWS = st.lists(
    st.lists(
        st.one_of(st.just(0.0), st.floats(2**-13, 2**13, width=32)),
        min_size=3,
        max_size=3,
    ),
    min_size=4,
    max_size=4,
)
QUICK = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@functools.partial(jax.jit, static_argnames=("label_similarity", "summation"))
def value_and_gradient(x, labels, **options):
    return jax.value_and_grad(supcon_loss)(x, labels, **options)


@QUICK
@given(
    rows=ROWS,
    kind=st.sampled_from(SIMILARITIES),
    summation=st.sampled_from(["outside", "inside"]),
    seed=st.integers(0, 50),
)
def test_any_weights_are_right(rows, kind, summation, seed):
    """Rows of zeros too: under jit such an image has its own views alone."""
    x = np.random.default_rng(seed).normal(size=(4, 2, 4)).astype(np.float32)
    labels = np.array(rows, np.float32)
    options = {"label_similarity": kind, "summation": summation}
    loss, gradient = value_and_gradient(x, labels, **options)
    expected = loop_loss(x, labels, **options).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert np.all(np.isfinite(gradient))
    # The order of the classes means nothing, nor does a scale that all rows share.
    turned, _ = value_and_gradient(x, 4 * labels[:, ::-1], **options)
    assert float(turned) == pytest.approx(float(loss), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_nonsense_under_jit_is_finite(kind):
    """Nobody can look at traced rows: what is no weight counts as 0."""
    x = np.random.default_rng(0).normal(size=(6, 2, 4)).astype(np.float32)
    labels = np.ones((6, 3), np.float32)
    labels[0], labels[1, 0], labels[2, 1] = 0, -1, np.nan
    labels[3, 2], labels[4] = np.inf, 1e30
    valid = np.where((labels > 0) & np.isfinite(labels), labels, 0)
    for summation in ("outside", "inside"):
        options = {"label_similarity": kind, "summation": summation}
        loss, gradient = value_and_gradient(x, labels, **options)
        assert float(loss) == pytest.approx(
            loop_loss(x, valid, **options).mean(), rel=1e-5
        )
        assert np.all(np.isfinite(gradient))


def test_huge_weights_have_a_cosine_too():
    x, labels = example(4)
    options = {"label_similarity": "inner"}
    expected, _ = value_and_gradient(x, np.float32(labels), **options)
    labels[1] *= 3e38 / labels[1].max()
    loss, _ = value_and_gradient(x, np.float32(labels), **options)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("dtype", [bool, np.uint32, jnp.bfloat16])
def test_types_of_weights(dtype):
    x, labels = example(soft=False)
    expected = float(supcon_loss(x.astype(np.float32), labels))
    for rows in (labels.astype(dtype), jnp.asarray(labels.astype(dtype))):
        assert float(supcon_loss(x.astype(np.float32), rows)) == expected


X = np.ones((3, 2, 4), np.float32)


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        ([[1, 0], [0, 0], [0, 1]], {}, ("row 1", "leave that image out")),
        (jnp.array([[1, 0], [0, 0], [0, 1]]), {}, ("row 1",)),
        ([[1, 0], [0, 1], [-2, 1]], {}, ("at least 0", "-2", "class 0", "row 2")),
        ([[1, math.nan], [0, 1], [1, 1]], {}, ("finite", "nan", "class 1", "row 0")),
        ([[1, 0], [0, math.inf], [1, 1]], {}, ("finite", "inf", "row 1")),
        ([["a", "b"]] * 3, {}, ("numbers",)),
        ([[1], [2], [1]], {}, ("[B]", "at least two classes", "(3, 1)")),
        (np.ones((2, 3)), {}, ("(3,)", "(2, 3)")),
        (np.ones((3, 2, 2)), {}, ("(3,)", "(3, 2, 2)")),
        (np.eye(3), {"positives_cap": 2}, ("positives_cap", "None", "2")),
        (np.eye(3), {"label_similarity": "dice"}, ("'any', 'jaccard' or", "'dice'")),
        (None, {"hard_negative_beta": -0.1}, ("at least 0", "-0.1")),
        (None, {"hard_negative_beta": math.nan}, ("at least 0", "nan")),
        (None, {"hard_negative_beta": "1"}, ("hard_negative_beta", "'1'")),
    ],
)
def test_refusals_are_one_line(labels, options, words):
    with pytest.raises(ValueError) as error:
        supcon_loss(X, labels, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_no_hardness_is_the_ordinary_program():
    x = np.ones((4, 2, 3), np.float32)
    for options in ({}, {"denominator": "one_positive"}):
        texts = [
            jax.jit(functools.partial(supcon_loss, **options, **beta))
            .lower(x)
            .as_text()
            for beta in ({}, {"hard_negative_beta": 0.0}, {"hard_negative_beta": 0})
        ]
        assert texts[0] == texts[1] == texts[2]


def test_hard_negatives_as_the_authors_compute_them():
    """Two views, no labels: log(pos + sum of imp neg / mean of imp) - log pos."""
    x, _ = example(num_images=6)
    z = x / np.linalg.norm(x, axis=-1, keepdims=True)
    for beta in (0.5, 2.0):
        losses = []
        for i in range(6):
            for v in range(2):
                positive = np.exp(z[i, v] @ z[i, 1 - v] / 0.5)
                negative = np.exp(np.delete(z, i, 0).reshape(10, -1) @ z[i, v] / 0.5)
                importance = negative**beta
                reweighted = np.sum(importance * negative) / np.mean(importance)
                losses.append(-np.log(positive / (positive + reweighted)))
        with jax.enable_x64(True):
            found = supcon_loss(x, temperature=0.5, hard_negative_beta=beta)
        assert float(found) == pytest.approx(np.mean(losses), rel=1e-12)


@pytest.mark.slow
def test_the_hardest_negative_gets_a_larger_share_of_the_gradient():
    """Softmax weights are in the gradient: the hardest gains, the easiest is pulled in."""
    z = np.array([[1, 0], [1, 0.1], [0.8, 0.6], [-1, 0.2]])[:, None]
    labels = np.array([0, 0, 1, 2])

    def of_negatives(beta):
        with jax.enable_x64(True):
            gradient = jax.grad(
                lambda x: supcon_loss(
                    x, labels, temperature=0.5, hard_negative_beta=beta,
                    contrast_mode="one", reduction="none",
                )[0]
            )(z)  # fmt: skip
        return np.linalg.norm(gradient[2:, 0], axis=-1)

    plain, hard = of_negatives(0.0), of_negatives(1.0)
    assert hard[0] > plain[0] and hard[0] / hard[1] > plain[0] / plain[1]


def test_hard_negatives_among_the_keys_of_a_momentum_encoder():
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(4, 3)), rng.normal(size=(8, 3))
    groups, key_groups = np.arange(4) % 2, np.arange(8) % 2
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, keys)]
    logits = 2 * unit[0] @ unit[1].T
    losses = []
    for i in range(4):
        same = groups[i] == key_groups
        negative = logits[i][~same]
        weights = np.exp(negative) / np.exp(negative).mean()
        total = np.exp(logits[i][same]).sum() + (weights * np.exp(negative)).sum()
        losses.append(np.log(total) - logits[i][same].mean())
    found = momentum_contrast_loss(
        jnp.asarray(queries), jnp.asarray(groups), jnp.asarray(keys),
        jnp.asarray(key_groups), temperature=0.5, hard_negative_beta=1.0,
    )  # fmt: skip
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-5)
