"""The tool that measures a run's embeddings: its numbers are those of the functions."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from supcon_jax import linear_eval, parallel
from supcon_jax.checkpoint import restore_state
from supcon_jax.data.datasets import open_source
from supcon_jax.evaluation import embeddings as measured
from supcon_jax.pretrained import features
from supcon_jax.pretrained import model as pretrained
from supcon_jax.run.batches import create_predictor
from supcon_jax.run.splits import open_sources
from supcon_jax.tools import embeddings
from tests.runs import pretrain_config, probe_config, untrained_run

FEW = "--config.data.samples_per_class=8"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    untrained_run(folder / "pretrain")
    return folder / "pretrain"


@pytest.fixture(scope="module")
def classifier(run):
    """A linear evaluation of the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            linear_eval,
            "fit_classifier",
            lambda x, labels, num_classes, **options: linear_eval.Solution(
                np.asarray(x[: len(labels)]).T @ np.eye(num_classes)[labels],
                np.zeros(num_classes), 1.0, {}, 0,
            ),
        )  # fmt: skip
        linear_eval.linear_eval(probe_config(run), run.parent / "linear")
    return run.parent / "linear"


def main(*arguments, capsys):
    """What the tool prints, and its exit code."""
    code = 0
    try:
        embeddings.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr()
    return told.out + told.err, code


def test_its_numbers_are_those_of_the_functions(run, classifier, tmp_path, capsys):
    told, code = main(
        run, FEW, "--ood=synthetic", f"--classifier={classifier}", capsys=capsys
    )
    assert code == 0, told
    found = json.loads((run / "embeddings.json").read_text())
    config = pretrain_config(**{"data.samples_per_class": 8, "batch_size": 50})
    train, test = open_sources(config)
    state, mesh = restore_state(run), parallel.create_mesh()
    model = embeddings.open_model(str(run), [])
    predictor = create_predictor(model.config, mesh, model.encoder, None)
    sets = [
        predictor.embed({"encoder": state.encoder_variables()}, source)
        for source in (train, test, embeddings.open_other(model, "synthetic", ""))
    ]
    projected = [
        (x @ np.asarray(state.params["head"]["dense_out"]["kernel"]), labels)
        for x, labels in sets
    ]
    logits = pretrained.load_model(str(classifier), mesh)
    place = functools.partial(parallel.split_rows, mesh=mesh)
    for name, (bank, queries, other) in (
        ("embedding", sets),
        ("projection", projected),
    ):
        expected = measured.embedding_metrics(
            *bank, *queries, k=20, temperature=0.07, num_classes=10, place=place
        ) | measured.detection_metrics(
            *bank,
            queries[0],
            other[0],
            place=place,
            logits=None
            if name == "projection"
            else lambda x: logits.head.apply(
                logits.variables["head"], jnp.asarray(x), train=False
            ),
        )
        assert found[name].keys() == expected.keys()
        for metric, value in expected.items():
            assert found[name][metric] == pytest.approx(value, rel=1e-4, abs=1e-6), (
                metric
            )
    assert (found["step"], found["data"]) == (0, "digits")
    assert (found["num_train"], found["num_evaluation"]) == (80, 500)
    assert (found["ood"], found["changes"]) == (
        "synthetic",
        ["data.samples_per_class=8"],
    )
    for words in ("embedding  projection", "kNN top-1", "largest softmax: AUROC"):
        assert words in told
    assert "Next:    python main.py --config=configs/linear_digits.py" in told


def test_the_classes_that_a_run_left_out_are_foreign(run):
    model = embeddings.open_model(str(run), [])
    with pytest.raises(ValueError, match="the run has all classes"):
        embeddings.open_other(model, "other_classes", "")
    config = ConfigDict(model.config)
    config.data.classes = (0, 1, 2, 3, 4)
    other = embeddings.open_other(model._replace(config=config), "other_classes", "")
    assert other.class_names == ("5", "6", "7", "8", "9")
    assert other.num_examples == np.sum(open_source("digits", "test").labels >= 5)


def test_features_are_those_that_the_probe_kept(run, classifier, monkeypatch, capsys):
    def no_encoder(*arguments):
        raise AssertionError("the encoder runs")

    monkeypatch.setattr(features, "create_predictor", no_encoder)
    monkeypatch.setattr(embeddings, "embedding_metrics", lambda *a, **options: {})
    told, code = main(run, "--representation=projection", capsys=capsys)
    assert code == 0, told
    assert set(json.loads((run / "embeddings.json").read_text())) == {
        *("step", "data", "num_train", "num_evaluation", "ood", "projection"),
    }


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--representation=both of them"], "allowed: embedding, projection, both"),
        (["--classifier=x"], "give those too: --ood=NAME"),
        (["--classifier=nowhere", "--ood=synthetic"], "no run in 'nowhere'"),
        (["--ood=arrays"], "data.root"),
        (["--config.encoder.width=2.0"], "encoder.width=1.0"),
        (["--config.data.nme=a"], "did you mean --config.data.name"),
        (["--config.data.fake=True"], "noise"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(run, arguments, says, capsys):
    told, code = main(run, *arguments, capsys=capsys)
    assert code == 2 and says in told.splitlines()[-1], told


def test_folders_that_hold_no_such_run(run, classifier, tmp_path, capsys):
    for place, says in (
        (tmp_path, "holds no run"),
        (classifier, f"python -m supcon_jax.tools.embeddings {run}"),
    ):
        told, code = main(place, capsys=capsys)
        assert code == 2 and says in told.splitlines()[-1], told
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    told, code = main(tmp_path, capsys=capsys)
    assert code == 2 and "no checkpoints in" in told.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_classifier_of_another_encoder_is_refused(run, classifier):
    model = embeddings.open_model(str(run), [])
    later = jax.tree.map(lambda x: 1.1 * x, model.variables)
    with pytest.raises(ValueError, match="was trained on another encoder"):
        embeddings.open_classifier(model._replace(variables=later), str(classifier))


def test_a_run_without_a_classifier_names_the_command_that_makes_one(run, messages):
    model = embeddings.open_model(str(run), [])
    assert embeddings.open_classifier(model, "") is None
    assert any("no classifier; train one: python main.py" in line for line in messages)


def test_a_run_without_a_projection_head(run, tmp_path):
    model = embeddings.open_model(str(run), [])
    assert embeddings.chosen("both", model) == ["embedding", "projection"]
    model = model._replace(head=None)
    assert embeddings.chosen("both", model) == ["embedding"]
    model.config.loss.name = "cross_entropy"
    with pytest.raises(ValueError, match="has no projection head"):
        embeddings.chosen("projection", model)


def test_images_of_another_size_are_resized(run):
    model = embeddings.open_model(str(run), [])
    model.config.data.image_size = 5
    other = embeddings.open_other(model, "digits", "test")
    assert other.images.shape == (500, 5, 5, 3) and other.images.dtype == np.uint8
    whole = embeddings.open_other(
        model._replace(config=pretrain_config()), "digits", ""
    )
    assert whole.images.shape == (500, 8, 8, 3)
    np.testing.assert_allclose(other.images.mean(), whole.images.mean(), rtol=0.02)
