"""A finished run in use: its embeddings, its predictions, and the two tools for them."""

import csv
import json
import os

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import NearestNeighbors

import supcon_jax
from supcon_jax import linear_eval
from supcon_jax.checkpoint import restore_encoder
from supcon_jax.data.datasets import open_source
from supcon_jax.inference import model as inference
from supcon_jax.inference import reference
from supcon_jax.pretrained import features
from supcon_jax.tools import embed, predict
from tests.runs import OneLayer, probe_config, untrained_run

TEST = open_source("digits", "test")
TRAIN = open_source("digits", "train")


def nearest_mean(x, labels, num_classes, **options):
    """Compiles nothing, unlike the solver."""
    means = np.asarray(x[: len(labels)]).T @ np.eye(num_classes)[labels] / 100
    return linear_eval.Solution(
        means - means.mean(1, keepdims=True), np.zeros(10), 1, {}, 0
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A linear evaluation, beside the run of its encoder."""
    folder = tmp_path_factory.mktemp("runs")
    untrained_run(folder / "pretrain", next_config="configs/linear_digits.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_eval, "fit_classifier", nearest_mean)
        linear_eval.linear_eval(probe_config(folder / "pretrain"), folder / "linear")
    return folder / "linear"


@pytest.fixture(scope="module")
def model(run):
    return supcon_jax.load_model(run)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with nine digits, three of them further down, and two broken files."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep" / "er").mkdir(parents=True)
    for number in range(9):
        where = folder / "deep" / "er" if number % 3 == 0 else folder
        Image.fromarray(TEST.images[number]).save(where / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    return folder


def expected_embeddings(run, images):
    scaled = (images / np.float32(255) - 0.5) / 0.5
    variables = restore_encoder(run.parent / "pretrain")
    return OneLayer().apply(variables, scaled.astype(np.float32), train=False)


def test_embeddings_are_those_of_the_encoder(run, model, photos):
    images = TEST.images[:9]
    expected = expected_embeddings(run, images)
    found = model.embed(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    files = [photos / ("deep/er" if n % 3 == 0 else "") / f"{n}.png" for n in range(9)]
    mixed = [files[0], str(files[1]), Image.open(files[2]), images[3], *files[4:]]
    np.testing.assert_allclose(model.embed(mixed), found, rtol=1e-5, atol=1e-6)
    for one in (files[5], Image.open(files[5]), images[5]):
        np.testing.assert_allclose(model.embed(one), found[5:6], rtol=1e-5, atol=1e-6)


def test_many_images_are_encoded_in_batches(run, model):
    found = model.embed(TEST.images[:150])
    expected = expected_embeddings(run, TEST.images[:150])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert all(size <= 64 for size in model._predictors)


def test_a_pretraining_run_embeds_and_says_what_makes_a_classifier(run):
    pretrained = supcon_jax.load_model(run.parent / "pretrain")
    expected = expected_embeddings(run, TEST.images[:3])
    np.testing.assert_allclose(
        pretrained.embed(TEST.images[:3]), expected, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="no classifier; train one: python main.py "):
        pretrained.predict(TEST.images[:3])


def softmax(logits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def test_probabilities_have_the_temperature_of_least_loss(run, model):
    """Against a grid search on the logits of the whole evaluation split."""
    embeddings = np.asarray(expected_embeddings(run, TEST.images), np.float64)
    logits = np.asarray(model.logits(np.float32(embeddings)), np.float64)
    grid = np.geomspace(0.01, 100, 4001)
    rows = np.arange(len(logits))

    def loss(temperature):
        log_p = np.log(softmax(logits / temperature))
        own = log_p[rows, TEST.labels]
        others = (log_p.sum(1) - own) / 9
        return -np.mean(own * 501 / 502 + others / 502)

    best = grid[np.argmin([loss(temperature) for temperature in grid])]
    facts = model.reference.facts
    assert facts["temperature"] == pytest.approx(best, rel=3e-3)
    assert (facts["images"], facts["split"]) == (500, "test")
    found = model.predict(TEST.images[:40])
    expected = softmax(logits[:40] / facts["temperature"])
    np.testing.assert_allclose([p.probabilities for p in found], expected, atol=1e-4)
    assert [p.label for p in found] == expected.argmax(1).tolist()
    assert [p.class_name for p in found] == [str(p.label) for p in found]


def test_neighbours_and_distances_are_those_of_scikit_learn(run, model):
    bank = np.asarray(expected_embeddings(run, TRAIN.images))
    queries = np.asarray(expected_embeddings(run, TEST.images))
    bank, queries = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries)
    )
    k = model.reference.facts["neighbour"]
    assert k == 50  # the smallest class has more than 100 training images
    distances, rows = NearestNeighbors(n_neighbors=k).fit(bank).kneighbors(queries)
    threshold = np.quantile(distances[:, -1], 0.99)
    assert model.reference.facts["threshold"] == pytest.approx(threshold, rel=1e-3)
    own, _ = NearestNeighbors(n_neighbors=k + 1).fit(bank).kneighbors(bank)
    assert model.reference.facts["training_quantile"] == pytest.approx(
        np.quantile(own[:, -1], 0.99), rel=1e-3
    )
    found = model.predict(TEST.images, neighbours=4)
    np.testing.assert_allclose(
        [p.distance for p in found], distances[:, -1], rtol=1e-3, atol=1e-4
    )
    assert 0 < sum(p.unlike for p in found) <= 6
    cosines = [[n.similarity for n in p.neighbours] for p in found]
    np.testing.assert_allclose(cosines, 1 - distances[:, :4] ** 2 / 2, atol=1e-4)
    for prediction, row in zip(found, rows[:, 0], strict=True):
        nearest = prediction.neighbours[0]
        # Of two that are equally near either may be the first.
        if nearest.name == f"image {row}":
            assert nearest.label == TRAIN.labels[row]
            assert nearest.class_name == str(nearest.label)
    agreed = [
        p.neighbours[0].name == f"image {r}"
        for p, r in zip(found, rows[:, 0], strict=True)
    ]
    assert np.mean(agreed) > 0.98


def test_noise_is_unlike_the_training_images(model):
    noise = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    assert np.mean([p.unlike for p in model.predict(noise)]) > 0.5


def test_what_predictions_are_held_against_is_made_once(
    run, model, monkeypatch, messages
):
    first = model.predict(TEST.images[:2])

    def no_data(*arguments):
        raise AssertionError("data are opened")

    monkeypatch.setattr(reference, "open_sources", no_data)
    again = supcon_jax.load_model(run).predict(TEST.images[:2])
    np.testing.assert_array_equal(first[0].probabilities, again[0].probabilities)
    assert first[1][3:] == again[1][3:]
    # Another split to calibrate on, or a damaged file: made anew.
    with pytest.raises(AssertionError, match="data are opened"):
        _ = supcon_jax.load_model(run, calibration_split="train").reference
    path = run / "reference.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AssertionError, match="data are opened"):
        _ = supcon_jax.load_model(run).reference
    assert any("reference.npz cannot be read" in said for said in messages)
    path.write_bytes(whole)


def test_probabilities_can_be_calibrated_on_another_split(run, model):
    kept = (run / "reference.npz").read_bytes()
    other = supcon_jax.load_model(run, calibration_split="train").reference.facts
    assert (other["split"], other["images"]) == ("train", 1297)
    assert other["temperature"] != model.reference.facts["temperature"]
    (run / "reference.npz").write_bytes(kept)


def test_calibration_without_labels_changes_nothing():
    found = reference.calibrate(np.ones((5, 3)), np.full(5, -1))
    assert found == {"temperature": 1.0, "images": 0}


def test_an_evaluation_stands_for_the_model_that_it_evaluated(run, tmp_path):
    config = {"mode": "evaluate", "pretrained": str(run)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert supcon_jax.load_model(tmp_path).workdir == str(run)


@pytest.mark.parametrize(
    "images, says",
    [
        (["nowhere.png"], "cannot read nowhere.png: No such file"),
        ([np.zeros((8, 8, 3), np.float32)], r"float32 \[8, 8, 3\]; allowed: paths"),
        ([np.zeros((8, 8), np.uint8)], r"uint8 \[8, 8\]; allowed"),
        ([Image.new("I;16", (8, 8))], "cannot read image 0: its values have 16 bits"),
        ([], "no images were given"),
    ],
)
def test_what_is_no_image_is_refused(model, images, says):
    with pytest.raises(ValueError, match=says):
        model.embed(images)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run in .*; give the workdir"):
        supcon_jax.load_model(tmp_path)


# --- features know their images ---


def test_features_of_a_file_tell_which_images_are_missing(tmp_path, monkeypatch):
    """A second process has them from the file alone."""
    config = probe_config("random", **{"data.samples_per_class": 2})
    values = np.arange(19 * 3, dtype=np.float32).reshape(19, 3)

    class OneMissing:
        def embed(self, variables, source, label):
            source.unreadable.reasons["image 7"] = "cut off"
            return values, np.delete(source.labels, 7)

    monkeypatch.setattr(features, "create_predictor", lambda *_: OneMissing())

    def extract():
        source = open_source("digits", "train").take_rows(np.arange(20))
        found = features.extract(
            config, None, OneLayer(), {"params": {"x": np.ones(3)}}, source,
            name="train", folders=[str(tmp_path)],
        )  # fmt: skip
        return found, features.names(source, len(found.values))

    first, names = extract()
    assert names == [f"image {n}" for n in range(20) if n != 7]
    monkeypatch.setattr(features, "create_predictor", None)
    again, same = extract()
    np.testing.assert_array_equal(first.values, again.values)
    assert names == same


# --- tools.predict ---


def tool(main, *arguments, capsys):
    """What a tool prints, what it says of mistakes, and its exit code."""
    code = 0
    capsys.readouterr()
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr()
    return told.out, told.err, code


def test_predictions_for_people(run, photos, capsys):
    out, _, code = tool(predict.main, run, photos / "1.png", capsys=capsys)
    assert code == 0
    head, *near, note = out.strip().splitlines()
    assert head.startswith(f"{photos / '1.png'}: ") and "%" in head
    assert sum("image " in line for line in near) == 3
    assert "calibrated on the 500 images of 'test'" in note


def test_predictions_for_programs(run, model, photos, capsys):
    """A folder is all images in it; what cannot be read does not stop the others."""
    out, err, code = tool(predict.main, run, photos, "--json", capsys=capsys)
    assert code == 2 and "2 of 11 images cannot be read" in err
    found = json.loads(out)
    assert set(found["unreadable"]) == {
        str(photos / name) for name in ("broken.jpg", "empty.png")
    }
    assert len(found["images"]) == 9
    for entry in found["images"]:
        number = int(entry["file"].removesuffix(".png")[-1])
        (expected,) = model.predict(TEST.images[number], neighbours=3)
        assert entry["class"] == expected.class_name
        assert entry["classes"][0]["probability"] == pytest.approx(
            expected.probabilities.max(), rel=1e-4
        )
        assert [n["image"] for n in entry["nearest"]] == [
            n.name for n in expected.neighbours
        ]
        assert entry["unlike_training"] == expected.unlike
    assert found["calibration"]["images"] == 500


@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            ("{pretrain}", "{photos}"),
            "--config=configs/linear_digits.py --config.pretr",
        ),
        (("{run}", "{photos}", "--neighbours=-1"), "allowed: 0 or more"),
        (("{run}", "{photos}", "--config.seed=1"), "allowed: data.dir, data.root"),
        (("{run}/no", "{photos}"), "no run in"),
    ],
)
def test_mistakes_of_predict_are_one_line(run, photos, arguments, says, capsys):
    places = {"run": run, "pretrain": run.parent / "pretrain", "photos": photos}
    filled = [argument.format(**places) for argument in arguments]
    out, err, code = tool(predict.main, *filled, capsys=capsys)
    assert code == 2 and says in err and err.count("\n") == 1


# --- tools.embed ---


def test_a_folder_is_embedded_whole(run, model, photos, tmp_path, capsys):
    out = tmp_path / "features.npz"
    told, _, code = tool(embed.main, run, photos, f"--out={out}", capsys=capsys)
    assert code == 0, told
    assert "wrote" in told and "9 images" in told and "broken.jpg: " in told
    with np.load(out) as file:
        names, embeddings = file["names"].tolist(), file["embeddings"]
        assert json.loads(str(file["facts"]))["step"] == model.trained.step
    assert len(names) == 9 and names[:3] == ["1.png", "2.png", "4.png"]
    assert "deep/er/0.png" in names
    numbers = [int(name.removesuffix(".png")[-1]) for name in names]
    expected = expected_embeddings(run, TEST.images[numbers])
    np.testing.assert_allclose(embeddings, expected, rtol=1e-4, atol=1e-5)
    with (tmp_path / "features.unreadable.csv").open() as file:
        rows = dict(list(csv.reader(file))[1:])
    assert set(rows) == {"broken.jpg", "empty.png"} and rows["empty.png"] == (
        "the file is empty"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "features.npz", "features.unreadable.csv",
    ]  # fmt: skip


def test_embedding_goes_on_after_a_kill(run, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embed, "PART", 3)
    whole, out = tmp_path / "whole.npz", tmp_path / "features.npz"
    tool(embed.main, run, photos, f"--out={whole}", capsys=capsys)
    encode, calls = inference.Model.encode, []

    def killed(self, pixels):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(inference.Model, "encode", killed)
    _, _, code = tool(embed.main, run, photos, f"--out={out}", capsys=capsys)
    assert code == 130 and not out.exists()
    done = len(list((tmp_path / "features.npz.parts").glob("*.npz")))
    assert done == 2
    calls.clear()
    monkeypatch.setattr(
        inference.Model,
        "encode",
        lambda self, pixels: calls.append(len(pixels)) or encode(self, pixels),
    )
    told, _, code = tool(embed.main, run, photos, f"--out={out}", capsys=capsys)
    assert code == 0 and "6 are done" in told
    assert sum(calls) < 9
    with np.load(whole) as one, np.load(out) as other:
        assert one["names"].tolist() == other["names"].tolist()
        np.testing.assert_allclose(one["embeddings"], other["embeddings"], rtol=1e-5)


def test_parquet_holds_the_same(run, photos, tmp_path, capsys):
    pq = pytest.importorskip("pyarrow.parquet")
    for suffix in ("npz", "parquet"):
        out = tmp_path / f"features.{suffix}"
        _, _, code = tool(embed.main, run, photos, f"--out={out}", capsys=capsys)
        assert code == 0
    table = pq.read_table(tmp_path / "features.parquet")
    with np.load(tmp_path / "features.npz") as file:
        assert table["file"].to_pylist() == file["names"].tolist()
        np.testing.assert_array_equal(
            np.float32(table["embedding"].to_pylist()), file["embeddings"]
        )
        assert json.loads(table.schema.metadata[b"supcon_jax"]) == json.loads(
            str(file["facts"])
        )


@pytest.mark.parametrize(
    "folder, out, says",
    [
        ("{photos}", "a.csv", "allowed: names that end in .npz or .parquet"),
        ("{photos}/no", "a.npz", "no folder"),
        ("{photos}/text", "a.npz", "holds no images"),
        ("{photos}", "there.npz", "is there already; remove it"),
        ("{photos}", "gs://bucket/a.npz", "allowed: a file on a local disk"),
    ],
)
def test_mistakes_of_embed_are_one_line(
    run, photos, tmp_path, folder, out, says, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (photos / "text").mkdir(exist_ok=True)
    (tmp_path / "there.npz").write_bytes(b"")
    _, err, code = tool(
        embed.main, run, folder.format(photos=photos), f"--out={out}", capsys=capsys
    )
    assert code == 2 and says in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.npz"]


def test_parquet_without_pyarrow_is_refused(monkeypatch):
    monkeypatch.setattr(embed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install pyarrow, or --out=a.npz"):
        embed.writer_of("a.parquet")


def test_a_photo_whose_name_is_not_utf_8_is_embedded(run, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for name in (b"plain.png", b"caf\xe9.png"):
        Image.fromarray(TEST.images[0]).save(tmp_path / "plain.png")
        path = os.fsencode(tmp_path / "photos") + b"/" + name
        os.replace(tmp_path / "plain.png", path)
    with open(os.fsencode(tmp_path / "photos") + b"/br\xe9.png", "wb"):
        pass
    for suffix in ("npz", "parquet"):
        if suffix == "parquet":
            pytest.importorskip("pyarrow")
        out = tmp_path / f"features.{suffix}"
        _, _, code = tool(
            embed.main, run, tmp_path / "photos", f"--out={out}", capsys=capsys
        )
        assert code == 0 and out.exists()
    with np.load(tmp_path / "features.npz") as file:
        assert file["names"].tolist() == [r"caf\udce9.png", "plain.png"]
        assert len(file["embeddings"]) == 2
    listed = (tmp_path / "features.unreadable.csv").read_text(encoding="utf-8")
    assert r"br\udce9.png" in listed
