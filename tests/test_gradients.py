"""The parts of pairs in the gradient, against automatic differentiation; the tool."""

import csv
import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from supcon_jax import pretrain, supcon_loss
from supcon_jax.evaluation.gradients import (
    anchor_gradients,
    by_cosine,
    hard_and_easy,
    pair_gradients,
)
from supcon_jax.run.opening import open_run
from supcon_jax.tools import gradients
from tests.runs import first_batches, pretrain_config, save_made_up, snapshot


def batch(seed=0, count=12, dimension=6):
    """Projections of any length, and labels of which one stands alone."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    labels[0] = 7
    return rng.normal(size=(count, dimension)) * rng.uniform(0.3, 3, (count, 1)), labels


@pytest.mark.parametrize("summation", ["outside", "inside"])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_parts_add_up_to_the_gradient(summation, temperature):
    """Of each anchor's loss alone, and of the whole loss with both roles of a view."""
    options = {"temperature": temperature, "summation": summation}
    w, labels = batch()
    pairs = pair_gradients(w, labels, **options)

    def losses(w, reduction):
        return supcon_loss(w[:, None], labels, reduction=reduction, **options)

    with jax.enable_x64(True):
        # What an anchor's own projection changes of its own loss.
        jacobian = np.asarray(
            jax.jacrev(functools.partial(losses, reduction="none"))(w)
        )
        own = jacobian[np.arange(len(w)), np.arange(len(w))]
        whole = np.asarray(jax.grad(functools.partial(losses, reduction="mean"))(w))
    assert own.dtype == np.float64
    np.testing.assert_allclose(
        anchor_gradients(w, pairs.weight), own, rtol=1e-6, atol=1e-12
    )
    both = (pairs.weight + pairs.weight.T) / np.sum(pairs.positive.any(axis=1))
    np.testing.assert_allclose(anchor_gradients(w, both), whole, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("summation", ["outside", "inside"])
def test_norms_are_those_of_single_parts(summation):
    """A loop over pairs, with the vectors written out."""
    w, labels = batch(1)
    pairs = pair_gradients(w, labels, temperature=0.2, summation=summation)
    z = [row / np.sqrt(np.sum(row * row)) for row in w]
    for i in range(len(w)):
        for j in range(len(w)):
            tangent = z[j] - np.dot(z[i], z[j]) * z[i]
            part = pairs.weight[i, j] * tangent / np.sqrt(np.sum(w[i] * w[i]))
            np.testing.assert_allclose(
                pairs.norm[i, j], np.sqrt(np.sum(part * part)), atol=1e-9
            )
            same = i != j and labels[i] == labels[j]
            assert pairs.positive[i, j] == same
            assert pairs.negative[i, j] == (i != j and not same)
    assert not pairs.norm[0].any()  # its label stands alone: no loss, no gradient
    assert np.all(pairs.weight[pairs.negative] >= 0)


def test_easy_pairs_give_nothing_and_another_sum_is_refused():
    w = np.array([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    pairs = pair_gradients(w, np.array([0, 0, 0, 1]))
    assert pairs.norm[0, 1] == 0  # the same direction
    assert pairs.norm[0, 3] == 0  # the opposite one
    assert pairs.norm[0, 2] > 1  # a hard positive
    with pytest.raises(ValueError, match="'outside' or 'inside'; got 'both'"):
        pair_gradients(w, np.zeros(4), summation="both")


def test_bins_and_tenths_are_those_of_loops():
    rng = np.random.default_rng(2)
    cosine, norm = rng.uniform(-1, 1, 500), rng.exponential(size=500)
    cosine[0], norm[0] = 1.0, 3.0
    found = by_cosine(cosine, norm)
    assert sum(one.pairs for one in found) == 500
    for one in found:
        last = one.high == 1
        inside = [
            n
            for c, n in zip(cosine, norm, strict=True)
            if one.low <= c and (c < one.high or last)
        ]
        assert len(inside) == one.pairs
        assert one.mean == pytest.approx(sum(inside) / len(inside))
        assert min(inside) <= one.least <= one.mean <= max(inside)
    order = sorted(range(500), key=lambda i: cosine[i])
    low, high = order[:50], order[-50:]
    for positive, hard, easy in ((True, low, high), (False, high, low)):
        told = hard_and_easy(cosine, norm, positive=positive)
        assert told.hard == pytest.approx(np.mean([norm[i] for i in hard]))
        assert told.easy == pytest.approx(np.mean([norm[i] for i in easy]))
        assert told.hard_cosine == pytest.approx(np.mean([cosine[i] for i in hard]))
        assert told.share == pytest.approx(sum(norm[i] for i in hard) / norm.sum())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with a checkpoint of step 12."""
    path = tmp_path_factory.mktemp("runs") / "run"
    save_made_up(pretrain_config(), path)
    return path


def test_command_writes_picture_table_and_means(workdir, tmp_path, capsys):
    out = tmp_path / "parts.png"
    gradients.main([str(workdir), f"--out={out}", "--batches=2"])
    said = capsys.readouterr().out
    assert "initial state" in said and "step 12" in said and f"wrote {out} and" in said
    with Image.open(out) as picture:
        assert picture.width > 700
    with (tmp_path / "parts.csv").open() as file:
        rows = list(csv.DictReader(file))
    pairs = {}
    for row in rows:
        key = row["state"], row["kind"], row["loss"]
        pairs[key] = pairs.get(key, 0) + int(row["pairs"])
    for state in ("initial state", "step 12"):
        for loss in ("L_out", "L_in"):
            total = pairs[state, "positive", loss] + pairs[state, "negative", loss]
            assert total == 2 * 32 * 31  # two batches of 16 images, two views
    # Two states have the same pairs, and other parts.
    first, later = (
        [row for row in rows if row["state"] == state]
        for state in ("initial state", "step 12")
    )
    assert [row["mean"] for row in first] != [row["mean"] for row in later]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{tmp}"], "no run in"),
        (["{run}", "--steps=3"], "has 12, and 0, the initial state"),
        (["{run}", "--steps=soon"], "early and late name two of them"),
        (["{run}", "--batches=0"], "--batches must be 1 or more"),
        (["{run}", "--out={tmp}/no/parts.png"], "no folder"),
        (["{run}", "--config.seed=1"], "allowed: data.dir, data.root"),
        (["{tmp}/linear"], "has no projections: its mode is linear_eval"),
        (["{tmp}/baseline"], "and its loss cross_entropy"),
    ],
)
def test_refusals_are_one_line(workdir, arguments, message, tmp_path, capsys):
    for name, config in (
        ("linear", {"mode": "linear_eval"}),
        ("baseline", {"loss": {"name": "cross_entropy"}}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    before = snapshot(tmp_path), snapshot(workdir)
    with pytest.raises(SystemExit) as exit:
        gradients.main([a.format(run=workdir, tmp=tmp_path) for a in arguments])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert (snapshot(tmp_path), snapshot(workdir)) == before


@pytest.mark.slow
def test_projections_are_those_of_the_first_step(tmp_path):
    """The loss of the first batch stands in the run's first line."""
    config = pretrain_config(**{"knn.bank": 0, "total_steps": 1})
    pretrain.pretrain(config, tmp_path / "run")
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    run = open_run(config, tmp_path / "other")
    batch = next(first_batches(run))
    projections = gradients.build_projection(run.plan)(run.plan.init(), batch)
    loss = supcon_loss(projections.reshape(16, 2, -1), batch["label"])
    np.testing.assert_allclose(loss, line["train/loss"], rtol=1e-5)
