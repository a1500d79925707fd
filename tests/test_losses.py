"""The meaning of the loss: formulas, golden values, special cases, diagnostics.

Against three independent witnesses: a loop in plain Python and float64, values known
by analysis, and numbers from the authors' TensorFlow code.
"""

import doctest
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supcon_jax.losses import supcon, supcon_loss

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "testdata" / "official_losses.npz"

VARIANTS = [
    {},
    {"contrast_mode": "one"},
    {"summation": "inside"},
    {"summation": "inside", "contrast_mode": "one"},
    {"denominator": "one_positive"},
    {"denominator": "one_positive", "summation": "inside"},
    {"denominator": "only_negatives"},
    {"denominator": "only_negatives", "summation": "inside"},
    {"positives_cap": 0},
    {"positives_cap": 2},
    {"positives_cap": 2, "summation": "inside", "contrast_mode": "one"},
    {"positives_cap": 4, "denominator": "one_positive"},
    {"normalize": False, "temperature": 2.0},
    {"normalize": False, "temperature": 2.0, "summation": "inside"},
    {"temperature": 0.01},
    {"temperature": 0.01, "summation": "inside"},
]


def name_of(variant):
    return ",".join(f"{k}={v}" for k, v in variant.items()) or "default"


def loop_loss(
    projections,
    labels=None,
    *,
    temperature=0.1,
    contrast_mode="all",
    summation="outside",
    denominator="all",
    positives_cap=None,
    normalize=True,
):
    """The definition, term by term, in float64: `[B]`."""
    x = np.asarray(projections, np.float64)
    num_images, num_views, _ = x.shape
    if normalize:
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    if labels is None:
        labels = [-1] * num_images
    views = [(b, v) for b in range(num_images) for v in range(num_views)]
    losses = np.zeros((num_images, num_views))
    for i, v in views:
        mates = [j for j in range(num_images) if j != i and labels[j] == labels[i] >= 0]
        kept = mates if positives_cap is None else mates[: positives_cap // num_views]
        positives, negatives = [], []
        for j, w in views:
            logit = float(x[i, v] @ x[j, w]) / temperature
            if j == i and w == v:
                continue
            if j == i or j in kept:
                positives.append(logit)
            elif j not in mates:
                negatives.append(logit)
        if not positives or (denominator == "only_negatives" and not negatives):
            continue
        log_ratios = []
        for s in positives:
            terms = {
                "all": positives + negatives,
                "one_positive": [s, *negatives],
                "only_negatives": negatives,
            }[denominator]
            log_ratios.append(s - np.logaddexp.reduce(terms))
        if summation == "outside":
            losses[i, v] = -np.mean(log_ratios)
        else:
            losses[i, v] = math.log(len(positives)) - np.logaddexp.reduce(log_ratios)
    return losses[:, 0] if contrast_mode == "one" else losses.mean(axis=1)


def example(num_images=9, num_views=2, dimension=5, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_images, num_views, dimension))
    labels = rng.integers(0, classes, num_images)
    labels[2:3] = -1
    return x, labels.astype(np.int32)


# One program instead of one for every operation. Called eagerly, as a user may, in
# test_published_unit_test_values, test_triplet_is_a_special_case and the docstring.
compiled_loss = jax.jit(
    supcon_loss,
    static_argnames=(
        "temperature",
        "normalize",
        "contrast_mode",
        "summation",
        "denominator",
        "positives_cap",
        "scale",
        "reduction",
        "block_size",
        "with_diagnostics",
    ),
)


@functools.partial(jax.jit, static_argnums=3)
def losses_and_pullback(x, labels, weight, options):
    losses, pull_back = jax.vjp(
        lambda x: supcon_loss(x, labels, reduction="none", **dict(options)), x
    )
    return losses, pull_back(weight.astype(losses.dtype))[0]


def check_against_the_loop(x, labels, variant, *, loop=None, **options):
    """Values to 1e-12, the gradient along a random direction to a difference quotient."""
    loop = loop or loop_loss
    rng = np.random.default_rng(1)
    weight, direction = rng.normal(size=len(x)), rng.normal(size=x.shape)
    with jax.enable_x64(True):
        losses, gradient = losses_and_pullback(
            x, labels, weight, tuple((variant | options).items())
        )
        slope = float(jnp.vdot(gradient, direction))
    np.testing.assert_allclose(
        losses, loop(x, labels, **variant), rtol=1e-12, atol=1e-12
    )
    step = 1e-5
    change = loop(x + step * direction, labels, **variant)
    change -= loop(x - step * direction, labels, **variant)
    # A difference quotient carries a rounding and a third-order error.
    expected = weight @ change / (2 * step)
    assert slope == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_value_and_gradient_equal_the_loop(variant):
    x, labels = example()
    check_against_the_loop(x, labels, variant, block_size=5)


@pytest.mark.parametrize("num_views", [1, 3])
@pytest.mark.parametrize(
    "variant",
    [{}, {"summation": "inside", "temperature": 0.01}, {"positives_cap": 3}],
    ids=name_of,
)
def test_other_numbers_of_views_equal_the_loop(num_views, variant):
    x, labels = example(num_views=num_views)
    check_against_the_loop(x, labels, variant)


@pytest.mark.parametrize("variant", [{}, {"denominator": "one_positive"}], ids=name_of)
def test_without_labels_equals_the_loop(variant):
    x, _ = example()
    check_against_the_loop(x, None, variant)


GOLDEN_OPTIONS = json.loads(GOLDEN.with_suffix(".json").read_text())


@pytest.mark.parametrize("case", GOLDEN_OPTIONS)
def test_golden_values_of_the_official_code(case):
    options = GOLDEN_OPTIONS[case]
    with np.load(GOLDEN) as file:
        data = {k: file[f"{case}/{k}"] for k in ("features", "labels", "loss", "grad")}
    labels = data["labels"] if options["supervised"] else None

    sets = {
        "temperature": options["temperature"],
        "contrast_mode": {"ALL_VIEWS": "all", "ONE_VIEW": "one"}[
            options["contrast_mode"]
        ],
        "summation": options["summation"].lower(),
        "denominator": options["denominator"].lower(),
        "positives_cap": None
        if options["positives_cap"] < 0
        else options["positives_cap"],
        "scale": "temperature" if options["scale_by_temperature"] else "none",
    }
    weight = np.full(len(data["loss"]), 1 / len(data["loss"]), np.float32)
    if options["V"] == 1:
        # The official code divides by the number of positives a second time here.
        same = data["labels"][:, None] == data["labels"][None, :]
        count = np.maximum(same.sum(1) - 1, 1)
        data["loss"], weight = data["loss"] * count, weight / count
    value, gradient = losses_and_pullback(
        data["features"], labels, weight, tuple(sets.items())
    )
    np.testing.assert_allclose(value, data["loss"], rtol=1e-5)
    error = np.abs(gradient - data["grad"]).max() / np.abs(data["grad"]).max()
    assert error < 1e-4


# The worked example in the official unit test, at temperature 1.
OFFICIAL_FEATURES = np.array(
    [
        [[0.01, 0.02, 0.14], [0.38, 0.61, 0.50]],
        [[0.86, 0.97, 0.33], [0.26, 0.68, 0.45]],
        [[0.32, 0.64, 0.28], [0.45, 0.74, 0.73]],
    ]
)


@pytest.mark.parametrize(
    ("options", "labels", "expected"),
    [
        ({"positives_cap": 2}, (0, 0, 0), (1.1385298, 1.1824025, 1.1557417)),
        (
            {"denominator": "only_negatives", "summation": "inside"},
            (0, 0, 1),
            (0.756611, 0.93170905, 1.3529458),
        ),
    ],
)
def test_published_unit_test_values(options, labels, expected):
    losses = supcon_loss(
        OFFICIAL_FEATURES, np.array(labels), temperature=1.0, reduction="none",
        normalize=False, **options,
    )  # fmt: skip
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("summation", ["outside", "inside"])
def test_collapsed_embeddings_give_the_logarithm(summation):
    x = np.ones((12, 2, 7), np.float32)
    labels = np.arange(12) % 3
    loss, diagnostics = compiled_loss(
        x, labels, summation=summation, scale=2.0, block_size=5, with_diagnostics=True
    )
    assert loss == pytest.approx(2 * math.log(23), rel=1e-6)
    assert diagnostics["collapse_loss"] == pytest.approx(2 * math.log(23), rel=1e-6)
    assert diagnostics["contrastive_top1"] == 0
    assert diagnostics["uniformity"] == pytest.approx(0, abs=1e-5)
    assert diagnostics["positive_cosine"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("denominator", ["one_positive", "only_negatives"])
def test_collapse_level_of_the_other_denominators(denominator):
    x, labels = np.ones((8, 2, 3), np.float32), np.arange(8) % 2
    loss, diagnostics = compiled_loss(
        x, labels, denominator=denominator, with_diagnostics=True
    )
    assert loss == pytest.approx(float(diagnostics["collapse_loss"]), rel=1e-5)


def test_orthogonal_classes():
    """Two views at one corner each, three classes: log(e^(1/T) + 4) - 1/T."""
    x = np.repeat(np.eye(3, dtype=np.float32)[:, None], 2, axis=1)
    loss = compiled_loss(x, np.arange(3), temperature=0.5)
    assert loss == pytest.approx(math.log(math.exp(2) + 4) - 2, rel=1e-5)


def test_n_pairs_is_a_special_case():
    """One positive, from another image, temperature 1 (paper, section 9)."""
    x, _ = example(num_images=10, num_views=1)
    z = x[:, 0] / np.linalg.norm(x[:, 0], axis=1, keepdims=True)
    logits = z @ z.T
    expected = []
    for i in range(10):
        ratios = [np.exp(logits[i, j] - logits[i, i ^ 1]) for j in range(10) if j != i]
        expected.append(np.log(np.sum(ratios)))
    losses = compiled_loss(x, np.arange(10) // 2, temperature=1.0, reduction="none")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_triplet_is_a_special_case():
    """One positive, one negative: a soft margin on squared distances (section 8)."""
    x, _ = example(num_images=3, num_views=1)
    anchor, positive, negative = x[:, 0] / np.linalg.norm(x[:, 0], axis=1)[:, None]
    gap = np.sum((anchor - positive) ** 2) - np.sum((anchor - negative) ** 2)
    loss = supcon_loss(x, np.array([0, 0, 1]), temperature=0.3, reduction="none")[0]
    assert loss == pytest.approx(np.log1p(np.exp(gap / (2 * 0.3))), rel=1e-5)


def test_relations_in_the_documentation():
    """The table in docs/losses.md, number by number."""
    b, v, d = np.indices((6, 2, 4))
    x, labels = np.sin(1.0 + 7 * b + 3 * v + d**2), np.array([0, 0, 0, 1, 1, 2])
    losses = {
        "L_out": compiled_loss(x, labels),
        "L_in": compiled_loss(x, labels, summation="inside"),
        "L_out x T": compiled_loss(x, labels, scale="temperature"),
        "L_out x T / 0.07": compiled_loss(x, labels, scale=0.1 / 0.07),
        "one positive": compiled_loss(x, labels, denominator="one_positive"),
        "SimCLR": compiled_loss(x),
    }
    per_image = compiled_loss(x, labels, summation="inside", reduction="none")
    num_positives = 2 * np.bincount(labels)[labels] - 1
    losses["sum of positives"] = np.mean(per_image - np.log(num_positives))
    text = (ROOT / "docs" / "losses.md").read_text()
    for name, value in losses.items():
        assert f"| {name} | {float(value):.4f} |" in text, f"{name}: {value:.4f}"
    assert losses["L_in"] < losses["L_out"]


def test_scale_and_reduction():
    x, labels = example()
    losses = compiled_loss(x, labels, reduction="none")
    assert compiled_loss(x, labels) == pytest.approx(float(jnp.mean(losses)), rel=1e-6)
    for scale, factor in [("temperature", 0.1), (0.1 / 0.07, 0.1 / 0.07), (3, 3)]:
        scaled = compiled_loss(x, labels, scale=scale, reduction="none")
        np.testing.assert_allclose(scaled, factor * losses, rtol=1e-6)


def test_anchors_without_positives_do_not_count():
    x, _ = example(num_images=6, num_views=1)
    labels = np.array([0, 0, 0, 1, 2, -1])
    loss, diagnostics = compiled_loss(x, labels, with_diagnostics=True)
    losses = compiled_loss(x, labels, reduction="none")
    np.testing.assert_array_equal(losses[3:], 0)
    assert loss == pytest.approx(float(losses[:3].mean()), rel=1e-6)
    assert diagnostics["num_anchors"] == 3
    assert diagnostics["no_positive_fraction"] == 0.5
    assert diagnostics["mean_positives"] == 1


def test_unlabelled_images_are_groups_of_their_own():
    x, _ = example(num_images=5)
    mixed = compiled_loss(x, np.array([4, -1, 4, -1, -9]), reduction="none")
    named = compiled_loss(x, np.array([4, 0, 4, 1, 2]), reduction="none")
    np.testing.assert_array_equal(mixed, named)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "temperature"},
        {"summation": "inside"},
        {"denominator": "one_positive"},
    ],
    ids=name_of,
)
def test_temperature_may_be_traced_and_learned(options):
    x, labels = example()
    with jax.enable_x64(True):
        loss = jax.jit(
            jax.value_and_grad(
                lambda t: supcon_loss(x, labels, temperature=t, **options)
            )
        )
        value, slope = loss(0.07)
        step = 1e-6
        expected = (loss(0.07 + step)[0] - loss(0.07 - step)[0]) / (2 * step)
        static = jax.jit(lambda x: supcon_loss(x, labels, temperature=0.07, **options))(
            x
        )
    assert value == pytest.approx(float(static), rel=1e-12)
    assert slope == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_a_known_array_is_a_temperature_inside_jit(temperature):
    x, labels = example(4)
    known = jnp.asarray(temperature)
    loss = jax.jit(lambda x: supcon_loss(x, labels, temperature=known))(x)
    expected = compiled_loss(x, labels, temperature=temperature)
    assert loss == pytest.approx(float(expected), rel=1e-6)


def test_random_cap_keeps_a_uniform_choice():
    """One class of five, cap of one image: each other image is kept equally often."""
    x, _ = example(num_images=6, num_views=2)
    labels = np.array([0, 0, 0, 0, 0, 1])
    options = {"positives_cap": 2, "reduction": "none", "denominator": "only_negatives"}
    z = x / np.linalg.norm(x, axis=-1, keepdims=True)

    def with_partner(partner):
        views = [z[0, 1], *z[partner]]
        negatives = np.logaddexp.reduce(z[5] @ z[0, 0] / 0.1)
        return negatives - np.mean([z[0, 0] @ p / 0.1 for p in views])

    choices = np.array([with_partner(j) for j in (1, 2, 3, 4)])
    loss = jax.jit(
        jax.vmap(
            lambda key: supcon_loss(
                x, labels, positives_key=key, contrast_mode="one", **options
            )[0]
        )
    )
    values = np.asarray(loss(jax.random.split(jax.random.key(0), 400)))
    distance = np.abs(values[:, None] - choices)
    assert distance.min(axis=1).max() < 1e-4
    counts = np.bincount(distance.argmin(axis=1), minlength=4)
    # 400 draws of four: 100 each, standard deviation 8.7.
    assert np.abs(counts - 100).max() < 45


def test_cap_without_effect_equals_no_cap():
    x, labels = example()
    for key in (None, jax.random.key(3)):
        capped = compiled_loss(x, labels, positives_cap=100, positives_key=key)
        assert capped == pytest.approx(float(compiled_loss(x, labels)), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.01},
        {"summation": "inside"},
        {"contrast_mode": "one"},
        {"denominator": "one_positive"},
        {"denominator": "one_positive", "contrast_mode": "one"},
    ],
    ids=name_of,
)
def test_diagnostics_equal_their_definitions(options):
    x, labels = example(num_images=12)
    _, got = compiled_loss(x, labels, block_size=7, with_diagnostics=True, **options)
    z = (x / np.linalg.norm(x, axis=-1, keepdims=True)).reshape(24, -1)
    anchors = slice(None, None, 2 if "contrast_mode" in options else 1)
    group = np.repeat(np.where(labels < 0, -1 - np.arange(12), labels), 2)
    other = ~np.eye(24, dtype=bool)[anchors]
    positive = (group[anchors, None] == group) & other
    negative = other & ~positive
    cosines = z[anchors] @ z.T
    squared = ((z[anchors, None] - z[None]) ** 2).sum(-1)
    hardest = np.where(positive, cosines, -2).max(1)
    expected = {
        "positive_cosine": cosines[positive].mean(),
        "negative_cosine": cosines[negative].mean(),
        "alignment": squared[positive].mean(),
        "uniformity": np.log(np.exp(-2 * squared[other]).mean()),
        "contrastive_top1": np.mean(hardest > np.where(negative, cosines, -2).max(1)),
        "no_positive_fraction": 0,
        "mean_positives": positive.sum(1).mean(),
        "num_anchors": len(other),
    }
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert all(v.dtype == jnp.float32 and v.shape == () for v in got.values())
    if "denominator" not in options:
        assert got["collapse_loss"] == pytest.approx(math.log(23), rel=1e-6)


def test_diagnostics_change_neither_value_nor_gradient():
    x, labels = example()
    plain = jax.jit(jax.value_and_grad(supcon_loss))(x.astype(np.float32), labels)
    (loss, _), gradient = jax.jit(
        jax.value_and_grad(
            lambda x: supcon_loss(x, labels, with_diagnostics=True), has_aux=True
        )
    )(x.astype(np.float32))
    np.testing.assert_array_equal(plain[0], loss)
    np.testing.assert_array_equal(plain[1], gradient)


def test_outside_of_jit_it_is_compiled_once_for_each_choice(caplog):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 2, 3)).astype(np.float32)
    choices = [
        {},
        {"temperature": 0.5},
        {"positives_cap": 2},
        {"with_diagnostics": True},
    ]
    gradient = jax.grad(supcon_loss)

    def values(labels):
        found = [supcon_loss(x, labels, **options) for options in choices]
        return [*found, gradient(jnp.asarray(x), labels)]

    first = values([0, 1, 0, 1, 2])
    with jax.log_compiles():
        again = values(np.array([3, 4, 3, 4, 5]))
    assert "Compiling" not in caplog.text
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert first[0] != first[1]


def test_docstring_example_runs():
    finder = doctest.DocTestFinder(recurse=False)
    (found,) = finder.find(supcon.supcon_loss, "supcon_loss", globs={})
    assert doctest.DocTestRunner().run(found).failed == 0
