"""The probe by L-BFGS, either output of a run, and the features that both are made of."""

import logging
import shutil

import jax
import numpy as np
import pytest

from configs import evaluate_digits
from supcon_jax import builders, evaluate, features, linear_eval, parallel, pretrain
from supcon_jax import pretrained as pretrained_model
from supcon_jax.checkpoint import restore_encoder, restore_state, saved_steps
from supcon_jax.models import EncoderWithProjection
from supcon_jax.run import create_predictor, open_sources
from supcon_jax.tools import embeddings
from supcon_jax.writers import MetricWriter, read_metrics
from tests.runs import (
    linear_config,
    pretrain_config,
    probe_config,
    shrink,
    snapshot,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pretraining run and the probe on it."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain.pretrain(pretrain_config(**{"knn.bank": 0}), folder / "pretrain")
    linear_eval.linear_eval(probe_config(folder / "pretrain"), folder / "probe")
    return folder


def parts(runs, **changes):
    """What `features.extract` takes, of the training split of a run."""
    config = probe_config(runs / "pretrain", **changes)
    mesh = parallel.create_mesh()
    encoder = builders.build_encoder(config, "cpu")
    variables = restore_encoder(runs / "pretrain", sharding=parallel.replicated(mesh))
    return config, mesh, encoder, variables, open_sources(config)[0]


def extract(arguments, *folders):
    return features.extract(
        *arguments, name="train", folders=[str(folder) for folder in folders]
    )


def no_encoder(*arguments):
    raise AssertionError("the encoder runs")


# --- the run ---


def test_the_probe_is_a_whole_linear_evaluation(runs, tmp_path):
    """`evaluate` runs encoder and head on the images, and finds what the probe found."""
    final = read_metrics(runs / "probe")[-1]
    assert final["final"] is True and final["step"] == 1
    assert final["eval/num_examples"] == 500
    assert 0 < final["eval/top1"] <= final["eval/top5"] <= 1
    assert saved_steps(runs / "probe") == [1]
    assert not (runs / "probe/checkpoints/1/encoder").exists()
    config = shrink(evaluate_digits.get_config())
    config.pretrained = str(runs / "probe")
    found = evaluate.evaluate(config, tmp_path / "evaluation")
    for name in ("eval/top1", "eval/top5", "eval/loss", "eval/num_examples"):
        assert found[name] == pytest.approx(final[name], rel=1e-4), name


def test_a_finished_probe_is_told_again_and_left_alone(runs, monkeypatch):
    before = snapshot(runs / "probe")
    monkeypatch.setattr(features, "extract", no_encoder)
    again = linear_eval.linear_eval(probe_config(runs / "pretrain"), runs / "probe")
    assert again["eval/top1"] == read_metrics(runs / "probe")[-1]["eval/top1"]
    after = snapshot(runs / "probe")
    assert {p: d for p, d in after.items() if p.name != "lock"} == {
        p: d for p, d in before.items() if p.name != "lock"
    }
    other = probe_config(runs / "pretrain", **{"loss.label_smoothing": 0.1})
    with pytest.raises(ValueError, match="made by another config"):
        linear_eval.linear_eval(other, runs / "probe")


def test_a_probe_that_was_stopped_goes_on_with_the_features_it_has(
    runs, tmp_path, monkeypatch
):
    config = probe_config(runs / "pretrain")

    def stop(self, *arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            linear_eval.linear_eval(config, tmp_path)
    assert saved_steps(tmp_path) == [1] and not read_metrics(tmp_path)
    monkeypatch.setattr(features, "create_predictor", no_encoder)
    linear_eval.linear_eval(config, tmp_path)
    theirs, ours = (read_metrics(p)[-1] for p in (runs / "probe", tmp_path))
    assert {**ours, "wall_s": 0} == {**theirs, "wall_s": 0}


def test_few_images_and_some_without_label(runs, tmp_path):
    """Fewer than a batch; those without a label count nowhere."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8, 3), np.uint8)
    labels = np.where(np.arange(60) % 4 == 3, -1, np.arange(60) % 10)
    arrays = {f"{s}_{n}": x for s in ("train", "test") for n, x in
              (("images", images), ("labels", labels))}  # fmt: skip
    np.savez(tmp_path / "few.npz", **arrays)
    config = probe_config(
        runs / "pretrain",
        **{"data.name": "arrays", "data.root": str(tmp_path / "few.npz")},
    )
    final = linear_eval.linear_eval(config, tmp_path / "run")
    assert final["eval/num_examples"] == np.sum(labels >= 0) < 60
    assert final["eval/top1"] == final["train/top1"]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"mode": "pretrain"}, "mode='pretrain'.*allowed: 'linear_eval'"),
        ({"total_steps": 3}, r"total_steps=3.*--config\.probe\.solver=sgd"),
        ({"data.classes_per_batch": 2}, "data.classes_per_batch=2"),
        ({"data.fake": True}, "data.fake=True"),
    ],
)
def test_what_a_solver_cannot_do_is_refused(change, says, tmp_path):
    with pytest.raises(ValueError, match=says) as refusal:
        linear_eval.linear_eval(probe_config("random", **change), tmp_path / "run")
    assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


# --- either output ---


def test_projections_are_those_of_the_head(runs, tmp_path):
    """Encoder and head as one, from disk; the probe by SGD and by L-BFGS take it."""
    state = restore_state(runs / "pretrain")
    config, mesh, encoder, variables, source = parts(runs, representation="projection")
    config = pretrained_model.take_projection(config)
    assert config.projection.output_dim == 64  # of the run, not the default
    module = builders.build_representation(config, "cpu")
    assert isinstance(module, EncoderWithProjection)
    images = (source.images[:9] / 255.0 - 0.5) / 0.5
    embeddings = encoder.apply(variables, images.astype(np.float32), train=False)
    expected = np.asarray(embeddings) @ state.params["head"]["dense_out"]["kernel"]
    found = extract(
        (config, mesh, module, state.projection_variables(), source), tmp_path / "f"
    )
    np.testing.assert_allclose(found.values[:9], expected, rtol=1e-4, atol=1e-5)
    finals = [
        linear_eval.linear_eval(
            make(runs / "pretrain", representation="projection"), tmp_path / name
        )
        for name, make in (("sgd", linear_config), ("lbfgs", probe_config))
    ]
    model = pretrained_model.load_model(str(tmp_path / "lbfgs"), mesh)
    predictor = create_predictor(config, mesh, model.encoder, model.head)
    again = predictor.classify(model.variables, open_sources(config)[1])
    assert again["eval/top1"] == pytest.approx(finals[1]["eval/top1"], abs=2e-3)
    on_embeddings = read_metrics(runs / "probe")[-1]
    assert finals[1]["eval/loss"] != on_embeddings["eval/loss"]


def test_online_metrics_of_projections(tmp_path):
    """The same run, whose kNN looks at the other output."""
    finals = [
        pretrain.pretrain(
            pretrain_config(total_steps=2, representation=name), tmp_path / name
        )
        for name in embeddings.REPRESENTATIONS
    ]
    assert finals[0]["train/loss"] == finals[1]["train/loss"]
    for name in ("knn/top1", "embedding/rankme"):
        assert finals[0][name] != finals[1][name]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"mode": "evaluate"}, "mode=evaluate"),
        ({"loss.name": "cross_entropy"}, "loss.name=cross_entropy"),
        ({"encoder_average.decay": 0.9}, "an average of the encoder"),
    ],
)
def test_projections_that_there_are_not_are_refused(change, says, tmp_path):
    config = pretrain_config(representation="projection", **change)
    run = evaluate.evaluate if "mode" in change else pretrain.pretrain
    with pytest.raises(ValueError, match=f"{says}.*--config.representation"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_projection_head_is_refused(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs / "pretrain", copy)
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"supcon"', '"cross_entropy"'))
    config = probe_config(copy, representation="projection")
    with pytest.raises(ValueError, match="has no projection head"):
        linear_eval.linear_eval(config, tmp_path / "run")
    config = probe_config(
        runs / "pretrain",
        **{"representation": "projection", "encoder.normalize_embedding": True},
    )
    with pytest.raises(ValueError, match="encoder.normalize_embedding=False"):
        linear_eval.linear_eval(config, tmp_path / "run")


# --- features ---


def test_features_are_kept_beside_the_encoders_run(runs, tmp_path, monkeypatch):
    arguments = parts(runs)
    config, mesh, encoder, variables, source = arguments
    predictor = create_predictor(config, mesh, encoder, None)
    values, labels = predictor.embed({"encoder": variables}, source)
    kept = {path.name for path in (runs / "pretrain/features").iterdir()}
    assert len([name for name in kept if name.startswith("train-")]) == 1
    monkeypatch.setattr(features, "create_predictor", no_encoder)
    found = extract(arguments, runs / "pretrain/features")
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_array_equal(found.labels, labels)
    assert {path.name for path in (runs / "pretrain/features").iterdir()} == kept


@pytest.mark.parametrize(
    "change",
    [
        {"data.fraction": 0.9},
        {"data.samples_per_class": 5},
        {"data.samples_per_class": 5, "data.split_seed": 1},
        {"data.label_noise": 0.1},
        {"data.mean": (0.4, 0.5, 0.5)},
        {"data.eval_resize": 9},
    ],
    ids=str,
)
def test_other_images_or_preparations_are_other_features(runs, change):
    described = [
        features.describe(config, encoder, {}, source)
        for config, _, encoder, _, source in (parts(runs), parts(runs, **change))
    ]
    names = {features._file_name("train", facts) for facts in described}
    assert len(names) == 2


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_damaged_features_are_extracted_anew(runs, damage, tmp_path, caplog):
    arguments = parts(runs, **{"data.samples_per_class": 5})
    before = extract(arguments, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    content = bytearray(whole)
    if damage == "flipped":
        content[content.index(before.values.tobytes()) + 100] ^= 1
    path.write_bytes({"cut": whole[:-100], "empty": b""}.get(damage, bytes(content)))
    with caplog.at_level(logging.WARNING, logger="supcon_jax"):
        logging.getLogger("supcon_jax").addHandler(caplog.handler)
        after = extract(arguments, tmp_path)
        logging.getLogger("supcon_jax").removeHandler(caplog.handler)
    assert "cannot be read" in caplog.text and "extracting them anew" in caplog.text
    np.testing.assert_array_equal(after.values, before.values)
    assert path.read_bytes() == whole


def test_features_of_another_checkpoint_are_extracted_anew(runs, tmp_path, messages):
    config, mesh, encoder, variables, source = parts(
        runs, **{"data.samples_per_class": 5}
    )
    before = extract((config, mesh, encoder, variables, source), tmp_path)
    later = jax.tree.map(lambda x: 1.1 * x, variables)
    after = extract((config, mesh, encoder, later, source), tmp_path)
    assert any("are of another checkpoint; extracting" in line for line in messages)
    assert not np.array_equal(after.values, before.values)
    assert len(list(tmp_path.iterdir())) == 1  # they took the place of the others


def test_features_lie_elsewhere_where_the_run_cannot_be_written_to(
    runs, tmp_path, monkeypatch, messages
):
    (tmp_path / "closed").write_text("no folder")
    arguments = parts(runs, **{"data.samples_per_class": 5})
    folders = tmp_path / "closed/features", tmp_path / "own/features"
    found = extract(arguments, *folders)
    assert any("are not kept in" in line for line in messages)
    monkeypatch.setattr(features, "create_predictor", no_encoder)
    np.testing.assert_array_equal(extract(arguments, *folders).values, found.values)


def test_features_in_a_bucket(runs, bucket, monkeypatch):
    arguments = parts(runs, **{"data.samples_per_class": 5})
    found = extract(arguments, f"{bucket}/features")
    monkeypatch.setattr(features, "create_predictor", no_encoder)
    again = extract(arguments, f"{bucket}/features")
    np.testing.assert_array_equal(again.values, found.values)
