"""Evaluation of a finished classifier, from its run's folder."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    log_loss,
    top_k_accuracy_score,
)

import supcon_jax
from configs import evaluate_digits
from supcon_jax import evaluate, linear_eval, parallel, pretrain
from supcon_jax.checkpoint import digest, restore_encoder
from supcon_jax.data.datasets import open_source
from supcon_jax.inference.model_card import write_card
from supcon_jax.pretrained.model import SavedEncoder, find_encoder
from supcon_jax.run.opening import open_run
from supcon_jax.run.workdir import leave, read_facts
from tests.runs import (
    assert_trees_equal,
    linear_config,
    pretrain_config,
    save_made_up,
    shrink,
    snapshot,
)


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


def test_a_model_in_use_is_the_one_that_was_evaluated(tmp_path):
    """The raw encoder of a run, and the average where an evaluation says so."""
    average = {"encoder_average.decay": 0.5}
    baseline = {"loss.name": "cross_entropy", **average}
    save_made_up(pretrain_config(**baseline), tmp_path / "baseline")
    use = {"encoder_average.use": True}
    evaluate.evaluate(config_for(tmp_path / "baseline", **use), tmp_path / "averaged")
    evaluate.evaluate(config_for(tmp_path / "baseline"), tmp_path / "raw")
    start = {"mode": "finetune", "pretrained": str(tmp_path / "baseline"), **use}
    for decay in (0.0, 0.5):  # it starts from the average, and keeps one of its own
        config = pretrain_config(**baseline | start | {"encoder_average.decay": decay})
        save_made_up(config, tmp_path / f"tuned_{decay}")
    for name, run, averaged in (
        ("averaged", "baseline", True),
        ("raw", "baseline", False),
        ("tuned_0.0", "tuned_0.0", False),
        ("tuned_0.5", "tuned_0.5", False),
    ):
        used = supcon_jax.load_model(tmp_path / name)
        assert_trees_equal(
            used.trained.variables["encoder"],
            restore_encoder(tmp_path / run, average=averaged),
        )
        assert used.average == averaged
        assert find_encoder(str(tmp_path / name))[0] == SavedEncoder(
            str(tmp_path / run), 12, averaged
        )
    with np.load(tmp_path / "averaged/predictions.npz") as file:
        expected = file["logits"][:3]
    used = supcon_jax.load_model(tmp_path / "averaged")
    images = open_source("digits", "test").images[:3]
    np.testing.assert_allclose(used.logits(used.embed(images)), expected, rtol=1e-4)
    # Nor does its card give the numbers of the raw encoder.
    for name in ("averaged", "raw"):
        card = write_card(supcon_jax.load_model(tmp_path / name), "digits", [])
        assert ("the average of its steps" in card) == (name == "averaged")
        assert ("`knn/top1`" in card) == (name == "raw")


def test_an_evaluation_of_a_frozen_encoder_has_the_one_of_its_probe(runs, tmp_path):
    use = {"encoder_average.use": True}
    evaluate.evaluate(config_for(runs / "linear", **use), tmp_path / "out")
    saved, noted = find_encoder(str(tmp_path / "out"))
    assert not saved.average
    assert noted == digest((restore_encoder(saved.workdir),))


def without_names(run, folder):
    """The run as an older version left it, which noted no names."""
    shutil.copytree(run, folder)
    facts = json.loads((folder / "run.json").read_text())
    del facts["class_names"]
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def test_other_classes_of_the_same_data_are_refused(tmp_path):
    baseline = {"loss.name": "cross_entropy", "data.classes": (3, 5)}
    save_made_up(pretrain_config(**baseline), tmp_path / "run")
    old = without_names(tmp_path / "run", tmp_path / "old")
    for run in (tmp_path / "run", old):
        for classes, says in (
            ((5, 3), "in another order: class 0 is '5', there '3'"),
            ((1, 2), "does not know: '1', '2'; it knows '3', '5'"),
        ):
            says = "has \\(3, 5\\); set --config.data.classes" if run == old else says
            config = config_for(run, **{"data.classes": classes})
            with pytest.raises(ValueError, match=says) as refusal:
                evaluate.evaluate(config, tmp_path / "out")
            assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
    # Digits have their numbers as names, and none in an array of the two classes.
    images, labels = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 2
    np.savez(tmp_path / "two.npz", test_images=images, test_labels=labels)
    two = {"data.name": "arrays", "data.root": str(tmp_path / "two.npz")}
    for n, change in enumerate([{"data.classes": (3, 5)}, two]):
        evaluate.evaluate(config_for(old, **change), tmp_path / f"fits{n}")


def test_folders_with_other_names_are_refused(tmp_path):
    """As many classes, and labels that mean others: they were counted as wrong."""

    def photos(root, names):
        for split in ("train", "test"):
            for name in names:
                folder = tmp_path / root / split / name
                folder.mkdir(parents=True)
                for number in range(8):
                    Image.new("RGB", (8, 8), (number, 0, 0)).save(
                        folder / f"{number}.png"
                    )
        return {"data.name": "folder", "data.root": str(tmp_path / root)}

    trained = photos("a", ("bird", "cat", "dog"))
    baseline = {"loss.name": "cross_entropy", "data.eval_split": "test"}
    config = pretrain_config(**baseline, **trained)
    save_made_up(config, tmp_path / "run")
    other = config_for(tmp_path / "run", **photos("b", ("cat", "dog", "fox")))
    with pytest.raises(ValueError, match="does not know: 'fox'; it knows 'bird', "):
        evaluate.evaluate(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    same = photos("c", ("bird", "cat", "dog"))
    evaluate.evaluate(config_for(tmp_path / "run", **same), tmp_path / "c")
    old = without_names(tmp_path / "run", tmp_path / "old")
    evaluate.evaluate(config_for(old, **same), tmp_path / "d")
    # Nor does a run that has no names yet refuse to go on: it notes them.
    leave(tmp_path / "run")
    open_run(config, old)
    assert read_facts(old)["class_names"] == ["bird", "cat", "dog"]
    leave(old)


def test_an_encoder_at_a_size_that_it_is_not_for_is_refused(runs, tmp_path):
    """As a Vision Transformer, one layer has arrays of the image size."""
    sizes = {"data.image_size": 12, "data.eval_resize": 12}
    images = np.zeros((20, 12, 12, 3), np.uint8)
    labels = np.arange(20) % 10
    np.savez(tmp_path / "twelve.npz", test_images=images, test_labels=labels)
    data = {"data.name": "arrays", "data.root": str(tmp_path / "twelve.npz")}
    config = config_for(runs / "baseline", **sizes, **data)
    with pytest.raises(ValueError, match="set --config.data.image_size=8") as refusal:
        evaluate.evaluate(config, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_an_image_without_finite_logits_is_counted_and_told(
    runs, tmp_path, monkeypatch, messages
):
    logits = np.float32(np.random.default_rng(0).normal(size=(30, 10)))
    logits[3, 2] = np.nan

    class Predictor:
        def predict(self, variables, source):
            return logits, np.arange(30) % 10, np.arange(30)

    monkeypatch.setattr(evaluate, "create_predictor", lambda *args: Predictor())
    found = evaluate.evaluate(config_for(runs / "baseline"), tmp_path / "out")
    assert 0 < found["eval/ece"] < 1
    assert any("1 images have logits that are not finite" in said for said in messages)
    assert (tmp_path / "out/figures/reliability.png").exists()
