"""Evaluation of a finished classifier, from its run's folder."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    log_loss,
    top_k_accuracy_score,
)

from configs import evaluate_digits
from supcon_jax import evaluate, linear_eval, parallel, pretrain
from supcon_jax.checkpoint import digest, restore_encoder
from supcon_jax.pretrained.model import SavedEncoder, find_encoder
from tests.runs import linear_config, pretrain_config, shrink, snapshot


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pretraining run, its linear evaluation, and a cross-entropy run."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain.pretrain(pretrain_config(**{"knn.bank": 0}), folder / "pretrain")
    linear_eval.linear_eval(linear_config(folder / "pretrain"), folder / "linear")
    baseline = pretrain_config(**{"loss.name": "cross_entropy", "knn.bank": 0})
    pretrain.pretrain(baseline, folder / "baseline")
    return folder


def config_for(run, **overrides):
    config = shrink(evaluate_digits.get_config())
    config.pretrained = str(run)
    config.update_from_flattened_dict(overrides)
    return config


@pytest.mark.parametrize("name", ["linear", "baseline"])
def test_metrics_are_those_of_the_run_and_of_scikit_learn(runs, name, tmp_path):
    found = evaluate.evaluate(config_for(runs / name), tmp_path / "out")
    final = json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1])
    for metric in ("eval/top1", "eval/top5", "eval/loss", "eval/num_examples"):
        np.testing.assert_allclose(found[metric], final[metric], rtol=1e-5)
    with np.load(tmp_path / "out/predictions.npz") as file:
        assert sorted(file) == ["ids", "labels", "logits"]
        logits, labels, ids = (file[key] for key in ("logits", "labels", "ids"))
    np.testing.assert_array_equal(ids, np.arange(500))
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    expected = {
        "eval/top1": top_k_accuracy_score(labels, p, k=1),
        "eval/top5": top_k_accuracy_score(labels, p, k=5),
        "eval/loss": log_loss(labels, p),
        "eval/mean_class_accuracy": balanced_accuracy_score(labels, p.argmax(1)),
    }
    for metric, value in expected.items():
        np.testing.assert_allclose(found[metric], value, atol=1e-6)
    line = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert line["final"] and line["step"] == 12
    assert {k: v for k, v in line.items() if k.startswith("eval/")} == {
        k: pytest.approx(v) for k, v in found.items()
    }
    with (tmp_path / "out/confusion.csv").open() as file:
        rows = [[int(x) for x in row[1:]] for row in list(csv.reader(file))[1:]]
    np.testing.assert_array_equal(rows, confusion_matrix(labels, p.argmax(1)))
    for picture in ("reliability", "confusion"):
        content = (tmp_path / "out/figures" / f"{picture}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000


def test_one_device_and_eight_count_alike(runs, tmp_path, monkeypatch):
    eight = evaluate.evaluate(config_for(runs / "linear"), tmp_path / "eight")
    mesh = parallel.create_mesh(jax.devices()[:1])
    monkeypatch.setattr(parallel, "create_mesh", lambda: mesh)
    one = evaluate.evaluate(config_for(runs / "linear"), tmp_path / "one")
    for name in ("eval/top1", "eval/top5", "eval/num_examples"):
        assert one[name] == eight[name]
    assert one == pytest.approx(eight, rel=1e-4, abs=1e-6)


def test_a_finished_evaluation_is_told_again_and_left_alone(runs, tmp_path):
    config = config_for(runs / "baseline")
    first = evaluate.evaluate(config, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    again = evaluate.evaluate(config, tmp_path / "out")
    assert {k: again[k] for k in first} == first
    after = snapshot(tmp_path / "out")
    assert {p: d for p, d in after.items() if p.name != "lock"} == {
        p: d for p, d in before.items() if p.name != "lock"
    }
    with pytest.raises(ValueError, match="made by another config|another encoder"):
        evaluate.evaluate(config_for(runs / "linear"), tmp_path / "out")


def test_the_encoder_of_a_run_of_any_mode(runs, tmp_path):
    evaluate.evaluate(config_for(runs / "linear"), tmp_path / "out")
    expected = SavedEncoder(str(runs / "pretrain"), 12, False)
    variables = restore_encoder(runs / "pretrain")
    assert find_encoder(str(runs / "pretrain")) == (expected, "")
    for workdir in (runs / "linear", tmp_path / "out"):
        assert find_encoder(str(workdir)) == (expected, digest((variables,)))
    with pytest.raises(ValueError, match="no run in"):
        find_encoder(str(tmp_path))
    # Its own name is that of the run that is gone.
    shutil.copytree(runs / "linear", tmp_path / "moved/pretrain")
    config = json.loads((runs / "linear/config.json").read_text())
    (tmp_path / "moved/pretrain/config.json").write_text(
        json.dumps(config | {"pretrained": "gone/pretrain"})
    )
    with pytest.raises(ValueError, match="the run gone/pretrain .* is gone"):
        find_encoder(str(tmp_path / "moved/pretrain"))


def test_runs_that_were_moved_together(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "moved")
    config = json.loads((tmp_path / "moved/linear/config.json").read_text())
    gone = config | {"pretrained": "nowhere/pretrain"}
    (tmp_path / "moved/linear/config.json").write_text(json.dumps(gone))
    found = evaluate.evaluate(config_for(tmp_path / "moved/linear"), tmp_path / "a")
    there = evaluate.evaluate(config_for(runs / "linear"), tmp_path / "b")
    assert found == there
    shutil.rmtree(tmp_path / "moved/pretrain")
    with pytest.raises(ValueError, match="move that run there"):
        evaluate.evaluate(config_for(tmp_path / "moved/linear"), tmp_path / "c")
    shutil.copytree(runs / "baseline", tmp_path / "moved/pretrain")
    with pytest.raises(ValueError, match="is not the one that the classifier"):
        evaluate.evaluate(config_for(tmp_path / "moved/linear"), tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"pretrained": ""}, "no run in ''"),
        ({"pretrained": "nowhere"}, "no run in 'nowhere'"),
        ({"encoder.width": 0.5}, "encoder.width=1.0"),
        ({"data.name": "arrays"}, "data.root"),
        ({"encoder_average.use": True}, "kept no average"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(runs, change, says, tmp_path):
    config = config_for(runs / "baseline", **change)
    with pytest.raises(ValueError, match=says) as refusal:
        evaluate.evaluate(config, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_classifier_names_the_command_that_makes_one(runs, tmp_path):
    with pytest.raises(ValueError, match="no classifier; train one: python main.py"):
        evaluate.evaluate(config_for(runs / "pretrain"), tmp_path / "out")


def test_another_number_of_classes_is_refused(runs, tmp_path):
    images = np.zeros((40, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "three.npz", test_images=images, test_labels=np.arange(40) % 3)
    config = config_for(
        runs / "baseline",
        **{"data.name": "arrays", "data.root": str(tmp_path / "three.npz")},
    )
    with pytest.raises(ValueError, match="has 3 classes, the classifier in .* 10"):
        evaluate.evaluate(config, tmp_path / "out")


def test_no_training_split_is_needed_and_missing_labels_are_left_out(runs, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 3), np.uint8)
    labels = np.where(np.arange(40) % 5 == 0, -1, np.arange(40) % 10)
    labels[:10] = np.arange(10)
    np.savez(tmp_path / "test.npz", test_images=images, test_labels=labels)
    config = config_for(
        runs / "baseline",
        **{"data.name": "arrays", "data.root": str(tmp_path / "test.npz")},
    )
    found = evaluate.evaluate(config, tmp_path / "out")
    assert found["eval/num_examples"] == np.sum(labels >= 0)
    with np.load(tmp_path / "out/predictions.npz") as file:
        np.testing.assert_array_equal(file["ids"], np.flatnonzero(labels >= 0))
        np.testing.assert_array_equal(file["labels"], labels[labels >= 0])
