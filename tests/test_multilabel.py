"""Images of several classes: labels.csv, batches, training, kNN and a linear classifier."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

from supcon_jax import linear_eval, pretrain, storage, supcon_loss
from supcon_jax.config.check import check_config
from supcon_jax.config.loading import load_config
from supcon_jax.data.datasets import open_source
from supcon_jax.data.selection import hide_labels, hold_out, take_subset
from supcon_jax.data.sources import images_by_class
from supcon_jax.evaluation.multilabel import (
    average_precision,
    knn_mean_average_precision,
    mean_average_precision,
    multilabel_metrics,
)
from supcon_jax.losses.cross_entropy import binary_cross_entropy_of_views
from supcon_jax.objectives import OBJECTIVES
from supcon_jax.parallel import create_mesh
from supcon_jax.pretrained.model import load_model
from supcon_jax.run.batches import build_sampler, build_train_batches
from supcon_jax.run.splits import open_sources
from supcon_jax.run.workdir import read_facts
from tests.runs import linear_config, pretrain_config

COLOURS = ("blue", "green", "red")


def write_images(folder, names, side=8):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (side, side)).save(folder / name)


def write_csv(folder, text, names=("a.png", "b.png", "c.png")):
    write_images(folder, names)
    (folder / "labels.csv").write_text(text)
    return str(folder)


def colours(folder, count, seed):
    """Images with a patch of each of their colours."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = ["file,labels"]
    for number in range(count):
        shown = [rng.random() < 0.5 for _ in COLOURS]
        shown[number % 3] = True
        image = rng.integers(60, 120, (8, 8, 3)).astype(np.uint8)
        for channel, present in enumerate(shown):
            if present:
                row = rng.integers(0, 5)
                image[row : row + 4, :, 2 - channel] = 255
        Image.fromarray(image).save(folder / f"{number}.png")
        names = [c for c, present in zip(COLOURS, shown, strict=True) if present]
        lines.append(f"{number}.png,{';'.join(names)}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


# --- labels.csv ---


def test_files_and_weights_are_those_of_the_csv(tmp_path):
    root = write_csv(
        tmp_path,
        '\ufefffile,labels\r\nc.png, cat ; dog\r\n./a.png,cat=0.25;"b"\r\n'
        '"sub/x,y.png","dog;cat"\r\n',
        ("a.png", "sub/x,y.png", "c.png"),
    )
    source = open_source("multilabel", "train", root=root)
    assert [p.removeprefix(root + "/") for p in source.paths] == [
        "c.png",
        "a.png",
        "sub/x,y.png",
    ]
    assert source.label_sets.class_names == ('"b"', "cat", "dog")
    np.testing.assert_array_equal(
        source.label_sets.weights(source.labels),
        np.float32([[0, 1, 1], [1, 0.25, 0], [0, 1, 1]]),
    )
    np.testing.assert_array_equal(source.label_sets.weights(np.array([-1])), 0)
    assert source.labels[0] == source.labels[2] != source.labels[1]
    assert source.class_names[source.labels[0]] == "cat;dog"
    assert images_by_class(source).tolist() == [1, 3, 2]
    assert source.read(1).label == source.labels[1]


def test_splits_share_their_classes(tmp_path):
    write_csv(
        tmp_path / "Train", "file,labels\na.png,x\nb.png,x;y\n", ["a.png", "b.png"]
    )
    write_csv(tmp_path / "val", "labels,file\ny,a.png\nx;y,b.png\n", ["a.png", "b.png"])
    train, test = (
        open_source("multilabel", split, root=str(tmp_path))
        for split in ("train", "test")
    )
    assert train.label_sets.class_names == test.label_sets.class_names == ("x", "y")
    # A set that the training split has too has the number that it has there.
    assert test.labels[1] == train.labels[1] and test.labels[0] not in train.labels
    np.testing.assert_array_equal(
        test.label_sets.weights(test.labels), [[0, 1], [1, 1]]
    )
    (tmp_path / "val/labels.csv").write_text("file,labels\na.png,z\nb.png,x\n")
    with pytest.raises(ValueError, match="has the class 'z', which .*Train/labels.csv"):
        open_source("multilabel", "val", root=str(tmp_path))


HEADER = "file,labels\n"
GOOD = "a.png,x\nb.png,x;y\nc.png,y\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEADER + GOOD.replace("c.png", "d.png"), r"line 4: there is no image 'd.png'"),
        (
            HEADER + GOOD + "a.png,y\n",
            r"line 5: 'a.png' is there twice, first on line 2",
        ),
        (HEADER + GOOD.replace("x;y", ""), r"line 3: 'b.png' has no labels"),
        (HEADER + GOOD.replace("x;y", " ; "), r"line 3: 'b.png' has no labels"),
        (HEADER + "a.png,x\n", r"no line for 'b.png' and 1 others; add one"),
        (
            HEADER + GOOD.replace("x;y", "x;x"),
            r"line 3: 'b.png' has the label 'x' twice",
        ),
        (HEADER + GOOD.replace("x;y", "x=0"), r"line 3: .*'x=0'; allowed: .* above 0"),
        (HEADER + GOOD.replace("x;y", "x=-1"), r"'x=-1'; allowed"),
        (HEADER + GOOD.replace("x;y", "x=two"), r"'x=two'; allowed"),
        (HEADER + GOOD.replace("x;y", "=1"), r"'=1'; allowed"),
        (HEADER + GOOD.replace("x;y", "x,y"), r"line 3: expected 2 fields"),
        (HEADER + GOOD.replace("b.png,x;y", "b.png"), r"line 3: expected 2 fields"),
        (HEADER + GOOD.replace("y", "x").replace("x;x", "x"), "one class alone, 'x'"),
        ("file,labels,box\n" + GOOD, r"line 1: unknown column 'box'; allowed: file, l"),
        ("file\na.png\n", "line 1: the header needs one column 'labels'"),
        ("file,labels,labels\n", "line 1: the header needs one column 'labels'"),
        ("", "line 1: the header needs one column 'file'"),
        (HEADER + 'a.png,"x\n', "labels.csv line .: unexpected end of data"),
    ],
)
def test_a_wrong_csv_is_refused_in_one_line(tmp_path, text, says):
    root = write_csv(tmp_path, text)
    with pytest.raises(ValueError, match=says) as refusal:
        open_source("multilabel", "train", root=root)
    assert "\n" not in str(refusal.value) and "--config." in str(refusal.value)


def test_missing_things_are_refused_in_one_line(tmp_path):
    def refusal(split="train", root=tmp_path, name="multilabel"):
        with pytest.raises(ValueError) as error:
            open_source(name, split, root=str(root))
        assert "\n" not in str(error.value) and "--config." in str(error.value)
        return str(error.value)

    assert "there is no" in refusal() and "file,labels" in refusal()
    assert "needs a folder with a labels.csv; got ''" in refusal(root="")
    assert "/nowhere" in refusal(root="/nowhere")
    write_csv(tmp_path, HEADER, [])
    assert "lists no images" in refusal()
    assert "validation_fraction" in refusal("test")
    assert "data.name=multilabel" in refusal(name="folder")
    (tmp_path / "labels.csv").write_bytes(b"file,labels\n\xff\n")
    assert "no UTF-8 text" in refusal()
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "labels.csv").mkdir()
    assert "cannot read" in refusal()


def test_a_bucket(tmp_path, monkeypatch):
    """Of a bucket all is listed, and the file is read with the client of buckets."""
    names = ["t/train/labels.csv", "t/train/a.png", "t/train/deep/b.png"]
    monkeypatch.setattr(
        storage, "walk", lambda url: (n.removeprefix("t/") for n in names)
    )
    text = b"file,labels\na.png,x\ndeep/b.png,x;y\n"
    monkeypatch.setattr(
        storage, "open_file", lambda path: open_bytes(tmp_path, text, path)
    )
    source = open_source("multilabel", "train", root="gs://bucket/t")
    assert source.paths.tolist() == [
        "gs://bucket/t/train/a.png",
        "gs://bucket/t/train/deep/b.png",
    ]


def open_bytes(folder, content, path):
    assert path == "gs://bucket/t/train/labels.csv"
    (folder / "copy").write_bytes(content)
    return open(folder / "copy", "rb")


# --- subsets and batches ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    colours(root / "train", 48, seed=0)
    colours(root / "test", 24, seed=1)
    return root


def settings(root, **overrides):
    return {
        "data.name": "multilabel",
        "data.root": str(root),
        "data.image_size": 8,
        "data.eval_resize": 8,
        "encoder.name": "one_layer",
        "encoder.width": 1.0,
        **overrides,
    }


def test_sets_of_one_image_can_be_held_out(tmp_path):
    """Divided at random: a set is no class that must stay in training."""
    names = [f"{n}.png" for n in range(8)]
    lines = [f"{n}.png,x;c{n}\n" for n in range(8)]
    source = open_source(
        "multilabel", "train", root=write_csv(tmp_path, HEADER + "".join(lines), names)
    )
    train, held = hold_out(source, 0.25, seed=0)
    assert (train.num_examples, held.num_examples) == (6, 2)
    assert held.label_sets == source.label_sets
    assert take_subset(source, 3).label_sets == source.label_sets
    hidden = hide_labels(source, fraction=0.5, seed=0)
    weights = hidden.label_sets.weights(hidden.labels)
    assert np.sum(np.any(weights, axis=1)) == 4


@pytest.mark.slow
def test_batches_hold_rows_of_weights(folder):
    config = pretrain_config(**settings(folder))
    train, evaluation = open_sources(config)
    batch = next(build_train_batches(config, train, build_sampler(config, train)))
    assert batch["label"].shape == (16, 3) and batch["label"].dtype == np.float32
    expected = train.label_sets.weights(train.labels)[batch["id"][:, 1]]
    np.testing.assert_array_equal(batch["label"], expected)
    assert evaluation.label_sets.class_names == COLOURS


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss.name": "cross_entropy"}, "loss.name='cross_entropy'"),
        ({"loss.positives_cap": 2}, "loss.positives_cap=2"),
        ({"probe.learning_rate": 0.1}, "probe.learning_rate=0.1"),
        ({"loss.cross_entropy_weight": 1.0}, "loss.cross_entropy_weight=1.0"),
        ({"data.classes_per_batch": 4}, "data.classes_per_batch=4"),
        ({"data.label_noise": 0.1}, "data.label_noise=0.1"),
        ({"data.samples_per_class": 3}, "data.samples_per_class=3"),
        ({"data.labelled_per_class": 3}, "data.labelled_per_class=3"),
        ({"data.classes": (0, 1)}, r"data.classes=\(0, 1\)"),
        (
            {"momentum_encoder.decay": 0.9, "loss.contrast_mode": "one"},
            "momentum_encoder.decay=0.9",
        ),
        ({"mode": "linear_eval", "probe.solver": "lbfgs", "total_steps": 0}, "'sgd'"),
        ({"mode": "linear_eval", "loss.label_smoothing": 0.1}, "label_smoothing=0.1"),
        ({"mode": "evaluate"}, "mode='evaluate'"),
        ({"mode": "finetune", "loss.name": "cross_entropy"}, "mode='finetune'"),
    ],
    ids=str,
)
def test_what_needs_one_class_is_refused(changes, says, tmp_path):
    changed = pretrain_config(**{**settings(tmp_path), "encoder.name": "resnet8"})
    changed.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=f"{says}.*multilabel|multilabel.*{says}") as e:
        check_config(changed)
    assert "\n" not in str(e.value) and "allowed" in str(e.value)


# --- metrics ---


def test_average_precision_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 6, 40) / 7  # many are equal
        relevant = rng.random(40) < 0.3
        expected = average_precision_score(relevant, scores)
        assert average_precision(scores, relevant) == pytest.approx(expected, rel=1e-12)
    assert np.isnan(average_precision(np.ones(3), np.zeros(3, bool)))


def test_mean_average_precision_is_that_of_scikit_learn():
    rng = np.random.default_rng(1)
    scores, weights = rng.normal(size=(50, 5)), rng.random((50, 5)) - 0.6
    weights = np.maximum(weights, 0)
    weights[:, 3] = 0  # no image shows it
    labelled = np.any(weights > 0, axis=1)
    assert 0 < labelled.sum() < 50
    shown = [0, 1, 2, 4]
    expected = average_precision_score(
        weights[labelled][:, shown] > 0, scores[labelled][:, shown], average="macro"
    )
    assert mean_average_precision(scores, weights) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="no image to evaluate has a label"):
        mean_average_precision(scores, 0 * weights)


def test_knn_scores_are_means_over_the_neighbours():
    rng = np.random.default_rng(2)
    bank, queries = rng.normal(size=(30, 4)), rng.normal(size=(20, 4))
    bank_weights = rng.random((30, 3)) * (rng.random((30, 3)) < 0.5)
    bank_weights[:4] = 0  # without a label
    query_weights = (rng.random((20, 3)) < 0.5).astype(float)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries)]
    scores = np.zeros((20, 3))
    for q, cosines in enumerate(unit[1] @ unit[0].T):
        nearest = [n for n in np.argsort(-cosines) if bank_weights[n].any()][:5]
        shares = np.exp(cosines[nearest] / 0.2)
        scores[q] = shares @ bank_weights[nearest] / shares.sum()
    labelled = query_weights.any(1)
    expected = average_precision_score(
        query_weights[labelled], scores[labelled], average="macro"
    )
    found = knn_mean_average_precision(
        bank, bank_weights, queries, query_weights, k=5, temperature=0.2, chunk=8
    )
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="no labelled images"):
        knn_mean_average_precision(bank, 0 * bank_weights, queries, query_weights)


def test_binary_cross_entropy_counts_labelled_images():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(4, 2, 3))
    weights = np.array([[1, 0, 0], [0, 0, 0], [0.3, 1, 0], [0, 2, 1]])
    terms = []
    for b in (0, 2, 3):
        for v in range(2):
            for c in range(3):
                p = 1 / (1 + np.exp(-logits[b, v, c]))
                q = min(weights[b, c], 1)
                terms.append(-q * np.log(p) - (1 - q) * np.log(1 - p))
    loss, _ = binary_cross_entropy_of_views(jnp.asarray(logits), jnp.asarray(weights))
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)
    metrics = multilabel_metrics(logits[:, 0], weights)
    first_views = np.reshape(terms, (3, 2, 3))[:, 0]
    assert metrics["eval/loss"] == pytest.approx(np.mean(first_views), rel=1e-9)
    assert metrics["eval/num_examples"] == 3
    none, _ = binary_cross_entropy_of_views(jnp.asarray(logits), jnp.zeros((4, 3)))
    assert float(none) == 0


# --- runs ---


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """Pretraining, and a linear classifier on it; the final metrics of both."""
    root = tmp_path_factory.mktemp("runs")
    config = pretrain_config(**settings(folder), total_steps=4)
    first = pretrain.pretrain(config, root / "supcon")
    config = linear_config(root / "supcon", **settings(folder), total_steps=20)
    config.optimizer.learning_rate = 0.5
    second = linear_eval.linear_eval(config, root / "linear")
    return root, first, second


def test_pretraining_reports_the_map_of_neighbours(runs):
    root, final, _ = runs
    assert 0.5 < final["knn/map"] <= 1 and "knn/top1" not in final
    assert np.isfinite(final["train/loss"]) and final["train/mean_positives"] > 1
    assert read_facts(root / "supcon")["data"]["train"]["label_classes"] == 3


def test_a_linear_classifier_finds_several_classes(runs):
    root, _, final = runs
    assert 0.6 < final["eval/map"] <= 1 and final["eval/num_examples"] == 24
    assert "eval/top1" not in final
    lines = (root / "linear/metrics.jsonl").read_text().splitlines()
    losses = [r["train/loss"] for r in map(json.loads, lines) if "train/loss" in r]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="finds several classes an image"):
        load_model(str(root / "linear"), jax.make_mesh((1,), ("data",)))


def test_the_folder_configs_go_on_from_each_other(folder, tmp_path, messages):
    """The second command is the one that the first prints, but for what makes it quick."""
    quick = ["total_steps=2", "compilation_cache=False", "encoder.dtype=float32"]
    quick += ["encoder.name=one_layer", "data.image_size=8", f"data.root={folder}"]
    config = load_config("configs/supcon_folder.py:multilabel", quick)
    pretrain.pretrain(config, tmp_path / "supcon")
    command = next(m for m in messages if m.startswith("Next: ")).split()
    name = next(w for w in command if w.startswith("--config="))[len("--config=") :]
    assert name == "configs/linear_folder.py:multilabel"
    changes = [w[len("--config.") :] for w in command if w.startswith("--config.")]
    config = load_config(name, [*quick, *changes])
    final = linear_eval.linear_eval(config, tmp_path / "linear")
    assert 0 < final["eval/map"] <= 1 and final["eval/num_examples"] == 24
    assert sum(m.startswith("Next: ") for m in messages) == 1


def test_the_similarity_of_labels_is_that_of_the_config():
    x = jax.random.normal(jax.random.key(0), (4, 2, 4))
    labels = jnp.asarray([[1, 1, 0], [1, 0, 0.5], [0, 1, 1], [0, 0, 1]])
    mesh = create_mesh(jax.devices()[:1])
    config = pretrain_config(**{"loss.label_similarity": "inner"})
    loss = OBJECTIVES["supcon"].build_loss(config, mesh)
    step = jax.shard_map(
        lambda x, y: loss(x, y)[0],
        mesh=mesh,
        in_specs=jax.P("data"),
        out_specs=jax.P(),
    )
    expected, default = (
        float(jax.jit(functools.partial(supcon_loss, **options))(x, labels))
        for options in ({"label_similarity": "inner"}, {})
    )
    assert float(jax.jit(step)(x, labels)) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(default, rel=1e-3)
