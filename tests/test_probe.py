"""The probe by L-BFGS: a whole linear evaluation; and the projections of a run."""

import functools
import json

import numpy as np
import pytest
import scipy.optimize

from configs import evaluate_digits
from supcon_jax import builders, evaluate, linear_eval, parallel, pretrain
from supcon_jax.checkpoint import Checkpointer, restore_state, saved_steps
from supcon_jax.models import EncoderWithProjection
from supcon_jax.pretrained import features
from supcon_jax.pretrained import model as pretrained_model
from supcon_jax.run.batches import create_predictor
from supcon_jax.run.loop import restore_or_init
from supcon_jax.run.opening import open_run
from supcon_jax.run.splits import open_sources
from supcon_jax.writers import MetricWriter, read_metrics
from tests.runs import (
    linear_config,
    pretrain_config,
    probe_config,
    snapshot,
    untrained_run,
)


@pytest.fixture(scope="module", autouse=True)
def two_values_of_l2():
    """Instead of fifteen, in five folds each."""
    few = functools.partial(linear_eval.fit_classifier, grid=(1e-2, 1e-3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_eval, "fit_classifier", few)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pretraining run and the probe on it."""
    folder = tmp_path_factory.mktemp("runs")
    untrained_run(folder / "pretrain")
    linear_eval.linear_eval(probe_config(folder / "pretrain"), folder / "probe")
    return folder


def no_encoder(*arguments, **options):
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
    config = evaluate_digits.get_config()
    config.encoder.name, config.pretrained = "one_layer", str(runs / "probe")
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


def test_the_solution_with_logit_adjustment_is_that_of_the_adjusted_loss(
    runs, tmp_path, monkeypatch
):
    """SciPy minimises the loss as it is written; the probe shifts the plain solution."""
    fits = []
    fit = linear_eval.fit_classifier

    def kept(values, labels, **options):
        solution = fit(values, labels, **options)
        fits.append((np.asarray(values, np.float64), labels, solution))
        return solution

    monkeypatch.setattr(linear_eval, "fit_classifier", kept)
    digits = np.load(write_digits(tmp_path / "some.npz", unlabelled=0))
    rows = np.flatnonzero((digits["train_labels"] > 2) | (np.arange(1297) % 9 == 0))
    rows = rows[digits["train_labels"][rows] < 5]
    np.savez(
        tmp_path / "unequal.npz",
        **{n: digits[n][rows] for n in ("train_images", "train_labels")},
        **{
            n: digits[n][digits["test_labels"] < 5]
            for n in ("test_images", "test_labels")
        },
    )
    data = {"data.name": "arrays", "data.root": str(tmp_path / "unequal.npz")}
    config = probe_config(
        runs / "pretrain", **data, **{"classifier.logit_adjustment": 1.5}
    )
    linear_eval.linear_eval(config, tmp_path / "adjusted")
    ((x, y, plain),) = fits
    counts = np.bincount(y)
    assert counts.max() > 5 * counts.min()
    scale = np.sqrt(np.mean((x - x.mean(0)) ** 2))

    def loss(flat):
        kernel, bias = flat[:-5].reshape(-1, 5), flat[-5:]
        z = x @ kernel + bias + 1.5 * np.log(counts / counts.sum())
        log_total = np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1)
        p = np.exp(z - log_total[:, None]) - np.eye(5)[y]
        weight = plain.l2 * scale**2
        gradient = np.concatenate(
            [(x.T @ p / len(x) + weight * kernel).ravel(), p.mean(0)]
        )
        own = z[np.arange(len(y)), y]
        return np.mean(log_total - own) + weight / 2 * np.sum(kernel**2), gradient

    found = scipy.optimize.minimize(
        loss, np.zeros(x.shape[1] * 5 + 5), jac=True, method="BFGS", tol=1e-7
    ).x
    head = restore_state(tmp_path / "adjusted").params["head"]["dense_out"]
    np.testing.assert_allclose(head["kernel"], found[:-5].reshape(-1, 5), atol=2e-3)
    bias = np.asarray(head["bias"])
    np.testing.assert_allclose(
        bias - bias.mean(), found[-5:] - found[-5:].mean(), atol=2e-3
    )


def test_fewer_images_than_a_batch_and_some_without_label(runs, tmp_path):
    """Those without a label count nowhere."""
    digits = np.load(write_digits(tmp_path / "some.npz", unlabelled=100))
    config = probe_config(
        runs / "pretrain",
        **{
            "data.name": "arrays",
            "data.root": str(tmp_path / "some.npz"),
            "batch_size": 2000,
        },
    )
    final = linear_eval.linear_eval(config, tmp_path / "run")
    assert len(digits["train_labels"]) == 1397 and final["eval/num_examples"] == 500
    theirs = read_metrics(runs / "probe")[-1]
    for name in ("eval/top1", "train/loss", "probe/l2"):  # those of all that have one
        assert final[name] == pytest.approx(theirs[name], rel=1e-4), name


def write_digits(path, *, unlabelled):
    """The digits as arrays, with more training images that have no label."""
    train, test = open_sources(probe_config("random"))
    noise = np.random.default_rng(0).integers(0, 256, (unlabelled, 8, 8, 3), np.uint8)
    np.savez(
        path,
        train_images=np.concatenate([noise, train.images]),
        train_labels=np.concatenate([np.full(unlabelled, -1), train.labels]),
        test_images=test.images,
        test_labels=test.labels,
    )
    return path


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
    config = probe_config(runs / "pretrain", representation="projection")
    config = pretrained_model.take_projection(config)
    assert config.projection.output_dim == 64  # of the run, not the default
    module = builders.build_representation(config, "cpu")
    assert isinstance(module, EncoderWithProjection)
    train, test = open_sources(config)
    images = ((train.images[:9] / 255.0 - 0.5) / 0.5).astype(np.float32)
    embeddings = module.encoder.apply(state.encoder_variables(), images, train=False)
    expected = np.asarray(embeddings) @ state.params["head"]["dense_out"]["kernel"]
    mesh, variables = parallel.create_mesh(), state.projection_variables()
    found = features.extract(
        config,
        mesh,
        module,
        variables,
        train,
        name="train",
        folders=[str(runs / "pretrain/features")],
    )
    np.testing.assert_allclose(found.values[:9], expected, rtol=1e-4, atol=1e-6)
    solved = probe_config(runs / "pretrain", representation="projection")
    final = linear_eval.linear_eval(solved, tmp_path / "lbfgs")
    assert final["eval/loss"] != read_metrics(runs / "probe")[-1]["eval/loss"]
    model = pretrained_model.load_model(str(tmp_path / "lbfgs"), mesh)
    predictor = create_predictor(config, mesh, model.encoder, model.head)
    again = predictor.classify(model.variables, test)
    assert again["eval/loss"] == pytest.approx(final["eval/loss"], rel=1e-4)


def test_steps_of_sgd_on_projections(runs, tmp_path):
    one_step = {"total_steps": 1, "batch_size": 16, "knn.bank": 0}
    config = linear_config(runs / "pretrain", representation="projection", **one_step)
    config.encoder.name, config.encoder.width = "one_layer", 1.0
    final = linear_eval.linear_eval(config, tmp_path)
    model = pretrained_model.load_model(str(tmp_path), parallel.create_mesh())
    assert model.head.num_classes == 10
    kernel = model.variables["head"]["params"]["dense_out"]["kernel"]
    assert kernel.shape == (64, 10) and final["eval/num_examples"] == 500


def test_online_metrics_look_at_either_output(tmp_path):
    found = {}
    for name in ("embedding", "projection"):
        config = pretrain_config(representation=name, **{"encoder.name": "one_layer"})
        run = open_run(config, tmp_path / name)
        state, _ = restore_or_init(Checkpointer(tmp_path / name), run.plan)
        found[name] = pretrain.build_evaluation(run)(state)
    for metric in ("knn/top1", "embedding/rankme"):
        assert found["embedding"][metric] != found["projection"][metric]


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


def test_a_run_whose_head_does_not_fit_is_refused(runs, tmp_path):
    projects = {"representation": "projection"}
    unlike = {"encoder.normalize_embedding": True}
    with pytest.raises(ValueError, match="encoder.normalize_embedding=False"):
        linear_eval.linear_eval(
            probe_config(runs / "pretrain", **projects, **unlike), tmp_path / "run"
        )
    config = json.loads((runs / "pretrain/config.json").read_text())
    config["loss"]["name"] = "cross_entropy"
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no projection head"):
        linear_eval.linear_eval(
            probe_config(tmp_path / "baseline", **projects), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()
