"""Robustness of a finished classifier, from its run's folder and a corrupted dataset."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from configs import evaluate_digits, robustness_digits
from supcon_jax import evaluate, pretrain
from supcon_jax.data.corrupted import ALL_SPLITS, class_numbers, find_splits
from supcon_jax.data.datasets import open_source
from supcon_jax.data.sources import ArraySource
from supcon_jax.evaluation.corruption import ALEXNET, CORRUPTIONS, PUBLISHED
from supcon_jax.evaluation.predict import Predictor
from supcon_jax.evaluation.robustness_table import as_text, summarize, table
from supcon_jax.robustness import robustness
from supcon_jax.writers import read_metrics
from tests.runs import pretrain_config, shrink, snapshot, write_corrupted


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cross-entropy run, 30 digits, and corrupted versions as CIFAR-10-C has them."""
    folder = tmp_path_factory.mktemp("robustness")
    config = pretrain_config(**{"loss.name": "cross_entropy", "knn.bank": 0})
    pretrain.pretrain(config, folder / "run")
    digits = open_source("digits", "test")
    images, labels = digits.images[:30], digits.labels[:30]
    assert len(np.unique(labels)) == 10
    rng = np.random.default_rng(0)
    noise = rng.integers(-255, 256, images.shape)
    write_corrupted(
        folder / "c",
        images,
        labels,
        lambda x, severity: np.clip(x + severity * noise // 5, 0, 255).astype(np.uint8),
    )
    np.savez(folder / "clean.npz", test_images=images, test_labels=labels)
    return folder


def config_for(made, **overrides):
    config = shrink(robustness_digits.get_config())
    config.update_from_flattened_dict(
        {
            "pretrained": str(made / "run"),
            "data.name": "arrays",
            "data.root": str(made / "clean.npz"),
            "robustness.data": str(made / "c"),
            "writers": (),
            **overrides,
        }
    )
    return config


@pytest.fixture(scope="module")
def done(made):
    """The metrics of a whole evaluation in `made / "whole"`."""
    return robustness(config_for(made), made / "whole")


def results_of(workdir):
    return json.loads((workdir / "robustness.json").read_text())


def test_a_split_has_what_evaluate_finds_on_the_same_arrays(made, done, tmp_path):
    config = shrink(evaluate_digits.get_config())
    config.update_from_flattened_dict(
        {
            "pretrained": str(made / "run"),
            "data.name": "corrupted",
            "data.root": str(made / "c"),
            "data.eval_split": "fog_4",
            "writers": (),
        }
    )
    found = evaluate.evaluate(config, tmp_path / "fog_4")
    ours = results_of(made / "whole")["fog_4"]
    assert ours["top1"] == found["eval/top1"]
    assert ours["ece"] == found["eval/ece"]
    assert ours["num_examples"] == found["eval/num_examples"] == 30


def test_means_are_those_of_loops(made, done):
    results = results_of(made / "whole")
    assert set(results) == {"clean", *ALL_SPLITS}
    assert done["robustness/clean_top1"] == results["clean"]["top1"]
    for severity in range(1, 6):
        for key in ("top1", "ece"):
            total = 0.0
            for corruption in CORRUPTIONS:
                total += results[f"{corruption}_{severity}"][key]
            found = done[f"robustness/{key}_severity_{severity}"]
            assert found == pytest.approx(total / 15, abs=1e-12)
    everything = [results[name]["top1"] for name in ALL_SPLITS]
    assert done["robustness/top1"] == pytest.approx(sum(everything) / 75)
    assert done["robustness/mean_error"] == pytest.approx(1 - sum(everything) / 75)
    assert done["robustness/top1_snow"] == pytest.approx(
        sum(results[f"snow_{severity}"]["top1"] for severity in range(1, 6)) / 5
    )
    assert "robustness/mce" not in done  # nobody's errors were named
    line = read_metrics(made / "whole")[-1]
    assert line["final"] and {k: v for k, v in line.items() if "/" in k} == done
    with (made / "whole/robustness.csv").open() as file:
        rows = {row["corruption"]: row for row in csv.DictReader(file)}
    assert list(rows) == [*CORRUPTIONS, "clean"]
    assert float(rows["frost"]["top1_3"]) == pytest.approx(
        results["frost_3"]["top1"], abs=1e-6
    )
    assert rows["frost"]["ce"] == ""
    picture = (made / "whole/figures/robustness.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def count_predictions(monkeypatch, *, until=10**6):
    seen, predict = [], Predictor.predict

    def counted(self, variables, source, **options):
        if len(seen) == until:
            raise KeyboardInterrupt
        seen.append((options["label"], options["resize"]))
        return predict(self, variables, source, **options)

    monkeypatch.setattr(Predictor, "predict", counted)
    return seen


def test_a_killed_run_goes_on_with_what_is_missing(made, done, tmp_path, monkeypatch):
    first = count_predictions(monkeypatch, until=9)
    config = config_for(made, **{"data.eval_resize": 12})
    with pytest.raises(KeyboardInterrupt):
        robustness(config, tmp_path / "out")
    assert len(results_of(tmp_path / "out")) == 9
    assert not (tmp_path / "out/metrics.jsonl").exists()
    with pytest.raises(ValueError, match="made by another config.*batch_size"):
        robustness(config_for(made, **{"batch_size": 8}), tmp_path / "out")
    monkeypatch.undo()
    rest = count_predictions(monkeypatch)
    assert robustness(config, tmp_path / "out") == done
    assert [name for name, _ in first + rest] == ["clean", *ALL_SPLITS]
    # Corrupted images are crops already; they are not enlarged first.
    assert {size for name, size in first + rest if name == "clean"} == {12}
    assert {size for name, size in rest} == {8}


def test_a_finished_run_is_told_again_and_left_alone(made, done, monkeypatch):
    before = snapshot(made / "whole")
    seen = count_predictions(monkeypatch)
    assert robustness(config_for(made), made / "whole") == done
    assert not seen
    changed = {
        path.name
        for path, data in snapshot(made / "whole").items()
        if before.get(path) != data
    }
    assert changed <= {"lock", "log.txt"}


def test_another_run_as_reference(made, done, tmp_path):
    """The reference is free: the same results, divided by what it says now."""
    shutil.copytree(made / "whole", tmp_path / "reference")
    theirs = results_of(made / "whole")
    rng = np.random.default_rng(1)
    theirs["clean"]["top1"] = 0.95
    for name in ALL_SPLITS:
        theirs[name]["top1"] = float(rng.uniform(0.1, 0.7))
    (tmp_path / "reference/robustness.json").write_text(json.dumps(theirs))
    shutil.copytree(made / "whole", tmp_path / "out")
    config = config_for(made, **{"robustness.reference": str(tmp_path / "reference")})
    found = robustness(config, tmp_path / "out")
    ours, ratios, relative = results_of(tmp_path / "out"), [], []
    for corruption in CORRUPTIONS:
        names = [f"{corruption}_{severity}" for severity in range(1, 6)]
        errors = sum(1 - ours[name]["top1"] for name in names)
        their_errors = sum(1 - theirs[name]["top1"] for name in names)
        ratios.append(errors / their_errors)
        clean, their_clean = 1 - ours["clean"]["top1"], 0.05
        relative.append((errors - 5 * clean) / (their_errors - 5 * their_clean))
    assert found["robustness/mce"] == pytest.approx(sum(ratios) / 15)
    assert found["robustness/relative_mce"] == pytest.approx(sum(relative) / 15)
    assert read_metrics(tmp_path / "out")[-1]["robustness/mce"] == pytest.approx(
        sum(ratios) / 15
    )
    assert len(read_metrics(tmp_path / "out")) == 1
    theirs["fog_2"]["digest"] = "other"
    (tmp_path / "reference/robustness.json").write_text(json.dumps(theirs))
    with pytest.raises(ValueError, match="made with other images of fog_2"):
        robustness(config, tmp_path / "out")


def test_missing_corruptions_are_listed_and_there_is_no_mce(made, tmp_path, messages):
    (tmp_path / "c").mkdir()
    for name in ("frost", "contrast", "labels"):
        shutil.copy(made / f"c/{name}.npy", tmp_path / "c")
    config = config_for(made, **{"robustness.data": str(tmp_path / "c")})
    found = robustness(config, tmp_path / "out")
    said = " ".join(messages)
    assert "lacks 13 of 15 corruptions: gaussian_noise, shot_noise, " in said
    assert "mCE and the means over all are not given, since 65 of 75" in said
    assert "robustness/top1_frost" in found
    assert not {"robustness/top1", "robustness/mce", "robustness/top1_fog"} & {*found}
    with (tmp_path / "out/robustness.csv").open() as file:
        rows = {row["corruption"]: row for row in csv.DictReader(file)}
    assert rows["fog"]["top1_1"] == "" and rows["frost"]["top1_mean"] != ""
    # Once more are there, the same command takes them up.
    shutil.copy(made / "c/fog.npy", tmp_path / "c")
    again = robustness(config, tmp_path / "out")
    assert again["robustness/top1_frost"] == found["robustness/top1_frost"]
    assert "robustness/top1_fog" in again
    assert len(read_metrics(tmp_path / "out")) == 1


def test_other_images_than_those_of_the_results(made, done, tmp_path):
    shutil.copytree(made / "c", tmp_path / "c")
    shutil.copytree(made / "whole", tmp_path / "out")
    images = np.load(tmp_path / "c/fog.npy")
    np.save(tmp_path / "c/fog.npy", 255 - images)
    before = snapshot(tmp_path / "out")
    with pytest.raises(ValueError, match="results of another fog_1"):
        robustness(
            config_for(made, **{"robustness.data": str(tmp_path / "c")}),
            tmp_path / "out",
        )
    assert snapshot(tmp_path / "out") == before


def write_png(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"robustness.data": ""}, "needs corrupted images.*--config.robustness.data"),
        ({"robustness.data": "no-where"}, "no folder 'no-where'.*robustness.data"),
        ({"robustness.data": "{empty}"}, "holds no corruption; expected"),
        (
            {"robustness.data": "{nine}"},
            "fog_1 of .*nine has 9 classes.* clean data 10",
        ),
        ({"robustness.data": "{gap}"}, "has fog without severity 2, which others have"),
        ({"robustness.data": "{bare}"}, "fog has no folders 1 to 5"),
        ({"robustness.data": "{twice}"}, "has fog_1 twice"),
        ({"robustness.data": "{short}"}, "29 images and labels.npy 150 labels"),
        ({"robustness.data": "{broken}"}, "cannot read .*fog.npy.*robustness.data"),
        ({"robustness.reference": "alexnet"}, "10 classes and 8 pixels; allowed"),
        ({"robustness.reference": "nobody"}, "'nobody' is no finished robustness run"),
        ({"pretrained": "nobody"}, "no run in 'nobody'"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(made, change, says, tmp_path):
    names = ("empty", "nine", "gap", "bare", "twice", "short", "broken")
    labels, images = (np.load(made / f"c/{name}.npy") for name in ("labels", "fog"))
    for name in names:
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "labels.npy", labels)
    np.save(tmp_path / "nine/labels.npy", np.minimum(labels, 8))
    np.save(tmp_path / "nine/fog.npy", images)
    np.save(tmp_path / "short/fog.npy", images[:29])
    (tmp_path / "broken/fog.npy").write_bytes(b"\x93NUMPY")
    for path in ("gap/fog/1", "gap/blur/snow/1", "gap/blur/snow/2", "twice/fog/1"):
        write_png(tmp_path / path / "a/1.png")
    write_png(tmp_path / "twice/weather/fog/1/a/1.png")
    (tmp_path / "bare/fog").mkdir()
    folders = {name: tmp_path / name for name in names}
    change = {key: value.format(**folders) for key, value in change.items()}
    with pytest.raises(ValueError, match=says) as refusal:
        robustness(config_for(made, **change), tmp_path / "out")
    assert "\n" not in str(refusal.value) and "data.root" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_classifier_names_the_command(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["loss"]["name"] = "supcon"
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no classifier; train one: python main.py"):
        robustness(config_for(made, pretrained=str(tmp_path / "run")), tmp_path / "out")


def test_folders_as_released_with_and_without_their_groups(tmp_path):
    for number, wnid in enumerate(("n02", "n01", "n03")):
        for path in ("noise/shot_noise", "snow", "extra/spatter"):
            for severity in (1, 2):
                name = tmp_path / "c" / path / str(severity) / wnid / "1.JPEG"
                write_png(name, value=10 * number)
    (tmp_path / "c/figures").mkdir()
    places, others = find_splits(str(tmp_path / "c"), dir="", split="test")
    assert list(places) == ["shot_noise_1", "shot_noise_2", "snow_1", "snow_2"]
    assert others == ("spatter",)
    source = open_source(**places["shot_noise_2"])
    assert source.class_names == ("n01", "n02", "n03")
    assert [path.split("/")[-2] for path in source.paths] == ["n01", "n02", "n03"]
    np.testing.assert_array_equal(source.labels, [0, 1, 2])
    with pytest.raises(
        ValueError, match="unknown split 'fog_1'; available: shot_noise"
    ):
        open_source("corrupted", "fog_1", root=str(tmp_path / "c"))


def test_classes_go_by_their_names():
    def source(*names, count=3):
        images = np.zeros((4, 8, 8, 3), np.uint8)
        return ArraySource(images, np.zeros(4, np.int32), count, names)

    def numbers(ours, theirs):
        return class_numbers(theirs, ours, name="fog_1").tolist()

    words = source("zebra", "ant", "moth")
    assert numbers(words, source("ant", "moth", "zebra")) == [1, 2, 0]
    assert numbers(words, source()) == [0, 1, 2]
    assert numbers(words, source("00000", "00001", "00002")) == [0, 1, 2]
    assert numbers(source("0", "1", "2"), source("ant", "bee", "cat")) == [0, 1, 2]
    with pytest.raises(ValueError, match="has the class 'bee'.*zebra, ant, moth"):
        numbers(words, source("ant", "bee", "zebra"))
    with pytest.raises(ValueError, match="fog_1 has 2 classes, the clean data 3"):
        numbers(words, source(count=2))


def test_the_papers_figures_stand_beside_imagenet_c():
    """With the paper's own numbers as results, ours equal its columns."""
    paper = PUBLISHED["SupCon R50"]
    results = {"clean": {"top1": paper.top1[0], "ece": paper.ece[0]}}
    for name in ALL_SPLITS:
        severity = int(name[-1])
        results[name] = {"top1": paper.top1[severity], "ece": paper.ece[severity]}
    metrics = summarize(results, ALEXNET)
    lines = as_text(results, ALEXNET, metrics)
    shown = {line[:21].strip(): line[21:].split() for line in lines}
    for place in range(6):
        name = f"severity {place}" if place else "clean"
        for key in ("top1", "ece"):
            assert shown[f"{key}, {name}"][0] == shown[f"{key}, {name}"][1]
    assert shown["top1, severity 5"] == ["26.92", "26.92", "25.38", "45.71", "43.11"]
    assert shown["mce"][1:] == ["67.20", "68.60", "50.60", "52.40"]
    assert shown["relative_mce"][1:] == ["94.60", "96.20", "66.50", "69.10"]
    rows = table(results, ALEXNET)
    assert rows[1][:2] == ["gaussian_noise", "0.653900"]
    errors = 1 - np.mean(paper.top1[1:])
    assert float(rows[10][14]) == pytest.approx(errors / 0.819324, abs=1e-6)


@pytest.mark.slow
def test_png_folders_give_what_the_arrays_give(made, done, tmp_path):
    for name in ALL_SPLITS:
        source = open_source("corrupted", name, root=str(made / "c"))
        corruption, severity = name.rsplit("_", 1)
        for number, (image, label) in enumerate(
            zip(source.images, source.labels, strict=True)
        ):
            folder = tmp_path / "c/group" / corruption / severity / f"{label:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(image)).save(folder / f"{number:03d}.png")
    config = config_for(made, **{"robustness.data": str(tmp_path / "c")})
    assert robustness(config, tmp_path / "out") == pytest.approx(done, abs=1e-6)
