"""The table of metrics, and that runs write what it lists."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import evaluate_digits, robustness_digits
from supcon_jax import evaluate, linear_eval, metrics, pretrain
from supcon_jax.checkpoint import saved_steps
from supcon_jax.data.datasets import open_source
from supcon_jax.evaluation.embeddings import detection_metrics, embedding_metrics
from supcon_jax.metrics import LINE_FIELDS, METRICS
from supcon_jax.robustness import robustness
from supcon_jax.writers import read_metrics
from tests.runs import linear_config, pretrain_config, shrink, write_corrupted
from tests.test_multilabel import colours


@pytest.mark.slow
def test_everything_that_runs_write_is_listed(tmp_path):
    """And all that is listed is written by one of these runs."""
    runs = {
        "supcon": pretrain_config(
            **{"probe.learning_rate": 0.1, "encoder_average.decay": 0.9}
        ),
        "joint": pretrain_config(**{"loss.cross_entropy_weight": 1.0}),
        "cross_entropy": pretrain_config(**{"loss.name": "cross_entropy"}),
    }
    several = tmp_path.with_name("several")
    colours(several / "train", 48, seed=0)
    colours(several / "test", 24, seed=1)
    of_several = {
        "data.name": "multilabel",
        "data.root": str(several),
        "data.image_size": 8,
        "data.eval_resize": 8,
    }
    runs["several"] = pretrain_config(**of_several, **{"encoder_average.decay": 0.9})
    written = set()
    for name, config in runs.items():
        pretrain.pretrain(config, tmp_path / name)
    linear_eval.linear_eval(linear_config(tmp_path / "supcon"), tmp_path / "linear")
    config = linear_config(tmp_path / "several", **of_several)
    linear_eval.linear_eval(config, tmp_path / "linear_several")
    solved = linear_config(tmp_path / "supcon", **{"probe.solver": "lbfgs"})
    solved.total_steps = 0
    linear_eval.linear_eval(solved, tmp_path / "solved")
    config = shrink(evaluate_digits.get_config())
    config.pretrained = str(tmp_path / "linear")
    evaluate.evaluate(config, tmp_path / "evaluation")
    digits = open_source("digits", "test")
    data = write_corrupted(
        tmp_path.with_name("corrupted"),
        digits.images,
        digits.labels,
    )
    config = shrink(robustness_digits.get_config())
    config.update_from_flattened_dict(
        {"pretrained": str(tmp_path / "linear"), "robustness.data": str(data)}
    )
    robustness(config, tmp_path / "robustness")
    reference = tmp_path.with_name("reference")
    reference.mkdir()
    results = json.loads((tmp_path / "robustness/robustness.json").read_text())
    results["clean"]["top1"] = 1.0  # of a classifier that each corruption harms
    (reference / "robustness.json").write_text(json.dumps(results))
    config.robustness.reference = str(reference)
    robustness(config, tmp_path / "robustness")
    for workdir in tmp_path.iterdir():
        for record in read_metrics(workdir):
            written |= record.keys()
    written |= {name for name in offline() if not name.startswith("knn/top1_k")}
    assert written - {*LINE_FIELDS} == set(METRICS)


def offline():
    """What the tool for embeddings writes, of random ones."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(40, 4)).astype(np.float32), np.arange(40) % 2
    sets, options = (x, labels, x, labels), {"k": 1, "temperature": 1.0}
    return embedding_metrics(*sets, num_classes=2, **options) | detection_metrics(
        x, labels, x, x, logits=jnp.asarray
    )


def test_entries_can_be_shown():
    for name, metric in METRICS.items():
        assert metric.text.format(0.5).strip(), name
        label, value = metrics.label_and_value(name, 0.5)
        assert value and f"{label} {value}".strip() in metric.text.format(0.5)
        assert metric.panel in ("", "loss", "accuracy")
        # A panel's axis is in percent, or it is not.
        assert (metric.panel == "accuracy") <= metric.is_share, name
    assert metrics.best_metric({"knn/top1": 0.1, "eval/top1": 0.2}) == "knn/top1"
    assert metrics.best_metric({"knn/map": 0.1}) == "knn/map"
    assert metrics.best_metric({"train/loss": 0.1}) is None


def test_lines_show_what_the_table_says_in_its_order():
    values = {"knn/top1": 0.5, "eval/num_examples": 500, "train/loss": 1.0, "new": 3.0}
    assert metrics.on_end(values) == ["kNN top-1 50.00%", "on 500 images"]
    assert metrics.on_progress(values) == ["loss 1.0000"]


@pytest.mark.parametrize(
    ("name", "result", "share"),
    [
        ("knn/top1", True, True),
        ("train/loss", True, False),
        ("train/images_per_sec", False, False),
        ("wall_s", False, False),
        ("somebody/else", True, False),
    ],
)
def test_kinds(name, result, share):
    assert metrics.is_result(name) is result
    assert metrics.is_share(name) is share


def test_a_metric_added_later_may_be_the_best(monkeypatch, tmp_path):
    monkeypatch.setitem(
        METRICS,
        "embedding/rankme",
        METRICS["embedding/rankme"]._replace(is_best_by=True),
    )
    both = {"embedding/rankme": 20.0, "knn/top1": 0.5}
    assert metrics.best_metric(both) == "embedding/rankme"
    config = pretrain_config(eval_every=2, checkpoint_every=2, keep_checkpoints=1)
    pretrain.pretrain(config, tmp_path)
    ranks = {
        r["step"]: r["embedding/rankme"]
        for r in read_metrics(tmp_path)
        if "embedding/rankme" in r
    }
    best = max(ranks, key=ranks.__getitem__)
    assert saved_steps(tmp_path) == sorted({best, 12})
