"""Fine-tuning: where it starts, what it leaves alone, and what it refuses."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import balanced_accuracy_score

from configs import evaluate_digits, finetune_digits, transfer
from supcon_jax import evaluate, finetune, linear_eval, parallel, pretrain
from supcon_jax.builders import build_optimizer, finetune_rates
from supcon_jax.checkpoint import Checkpointer, restore_encoder
from supcon_jax.config.check import check_config
from supcon_jax.evaluation.classification import classification_sums, summarize
from supcon_jax.models import ResNet, WideResNet
from supcon_jax.models.resnet import BasicBlock
from supcon_jax.run import loop
from supcon_jax.run.opening import open_run
from supcon_jax.run.plan import create_plan
from supcon_jax.steps.state import TrainState
from tests.config_files import load
from tests.runs import (
    RESNET,
    assert_trees_equal,
    first_batches,
    linear_config,
    pretrain_config,
    shrink,
)

SPREAD = {"data.mean": (0.4, 0.5, 0.6), "data.std": (0.2, 0.3, 0.2)}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pretrained")
    pretrain.pretrain(pretrain_config(**RESNET, **{"knn.bank": 0}), workdir)
    return workdir


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """Three classes of 12x12 images, one of them rare in the test split."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, counts in {"train": (20, 20, 20), "test": (14, 10, 3)}.items():
        labels = np.repeat(np.arange(3), counts)
        images = rng.integers(0, 150, (len(labels), 12, 12, 3), np.uint8)
        images[np.arange(len(labels)), :, :, labels] += 60
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    path = tmp_path_factory.mktemp("data") / "other.npz"
    np.savez(path, **arrays)
    sizes = {"data.image_size": 12, "data.eval_resize": 12}
    return {"data.name": "arrays", "data.root": str(path)} | sizes


def finetune_config(pretrained, **overrides):
    """A tiny run on the digits, or on what the overrides say."""
    config = shrink(finetune_digits.get_config())
    config.pretrained = str(pretrained)
    config.knn.bank = 0
    config.data.samples_per_class = 0
    config.update_from_flattened_dict(RESNET | overrides)
    return config


@pytest.fixture(scope="module")
def tuned(pretrained, other_data, tmp_path_factory):
    """The digits' encoder on other classes, another size and another scaling."""
    workdir = tmp_path_factory.mktemp("tuned")
    headline = {"eval_metric": "mean_class_accuracy"}
    config = finetune_config(pretrained, **other_data, **SPREAD, **headline)
    return config, workdir, finetune.finetune(config, workdir)


# --- where it starts ---


def test_it_starts_from_the_encoder_and_a_new_classifier(
    pretrained, other_data, tmp_path
):
    config = finetune_config(pretrained, **other_data, **{"encoder_average.decay": 0.9})
    run = open_run(config, tmp_path, load_initial=finetune.load_initial_encoder)
    expected = restore_encoder(pretrained)
    checkpointer = Checkpointer(tmp_path)
    state, _ = loop.restore_or_init(checkpointer, run.plan, run.initial_encoder)
    checkpointer.close()
    assert_trees_equal(state.encoder_variables(), expected)
    assert_trees_equal(state.encoder_average, expected)
    # A step gives the memory of its state away: no array is in it twice.
    places = [leaf.unsafe_buffer_pointer() for leaf in _local(state)]
    assert len({*places}) == len(places)
    assert state.params["head"]["dense_out"]["kernel"].shape == (16, 3)
    assert int(state.step) == 0


def _local(state):
    encoders = state.params["encoder"], state.batch_stats, state.encoder_average
    return [leaf.addressable_data(0) for leaf in jax.tree.leaves(encoders)]


def test_from_a_random_encoder_it_is_the_cross_entropy_baseline(tmp_path):
    mesh = parallel.create_mesh()
    config = finetune_config("random")
    baseline = finetune_config("", mode="pretrain")
    plans = [
        create_plan(c, mesh, num_classes=10, num_examples=1297)
        for c in (config, baseline)
    ]
    programs = [str(jax.make_jaxpr(plan.init)()) for plan in plans]
    assert programs[0] == programs[1]
    assert finetune.load_initial_encoder(plans[0]) is None


def test_the_run_on_other_data_and_its_evaluation(tuned, tmp_path):
    config, workdir, final = tuned
    assert final["eval/num_examples"] == 27
    found = evaluate.evaluate(evaluation_config(config, workdir), tmp_path)
    for name in ("eval/top1", "eval/mean_class_accuracy", "eval/loss"):
        np.testing.assert_allclose(found[name], final[name], rtol=1e-5)
    with np.load(tmp_path / "predictions.npz") as file:
        predicted = file["logits"].argmax(axis=1)
        expected = balanced_accuracy_score(file["labels"], predicted)
    np.testing.assert_allclose(found["eval/mean_class_accuracy"], expected, atol=1e-6)


def evaluation_config(config, workdir):
    """Of a run of fine-tuning, on its own data."""
    ours = shrink(evaluate_digits.get_config())
    ours.update_from_flattened_dict(RESNET)
    ours.pretrained = str(workdir)
    ours.data = config.data
    return ours


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(
    tuned, pretrained, other_data, tmp_path, monkeypatch
):
    whole, _, final = tuned
    config = finetune_config(
        pretrained, **other_data, **SPREAD, checkpoint_every=4, eval_metric="top1"
    )
    save = Checkpointer.save

    def save_and_stop(self, state, step, metrics, **options):
        save(self, state, step, metrics, **options)
        if step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpointer, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            finetune.finetune(config, tmp_path / "stopped")
    resumed = finetune.finetune(config, tmp_path / "stopped")
    for name in ("train/loss", "eval/loss", "eval/mean_class_accuracy"):
        assert resumed[name] == final[name], name
    assert_trees_equal(restore_encoder(tmp_path / "stopped"), restore_encoder(tuned[1]))
    with pytest.raises(ValueError, match=r"differing: finetune\.stages"):
        config.finetune.stages = 1
        finetune.finetune(config, tmp_path / "stopped")


def test_the_headline_is_the_metric_asked_for(tuned, messages):
    config, workdir, final = tuned
    finetune.finetune(config, workdir)  # complete: it tells its result again
    (result,) = (m for m in messages if m.startswith("Result:"))
    assert result.startswith("Result:  mean per class ") and "top-1" in result
    top1 = finetune_config("x", eval_metric="top1")
    config = config.copy_and_resolve_references()
    config.eval_metric = top1.eval_metric
    finetune.finetune(config, workdir)
    assert [m for m in messages if m.startswith("Result:")][1].startswith(
        "Result:  top-1 "
    )


def test_a_frozen_probe_on_other_data(pretrained, other_data, tmp_path):
    """Another number of classes and another size; the scaling stays the encoder's."""
    config = linear_config(pretrained, **RESNET, **other_data, total_steps=4)
    final = linear_eval.linear_eval(config, tmp_path)
    assert final["eval/num_examples"] == 27
    assert 0 < final["eval/mean_class_accuracy"] <= 1


def test_what_it_trained_is_an_encoder_again(tuned, tmp_path):
    config, workdir, _ = tuned
    finetune.check_pretrained(finetune_config(workdir))
    again = finetune_config(workdir, **{"data.image_size": 8})
    plan = create_plan(again, parallel.create_mesh(), num_classes=10, num_examples=1297)
    assert_trees_equal(finetune.load_initial_encoder(plan), restore_encoder(workdir))


# --- what is trained, and how fast ---


def one_step(pretrained, **overrides):
    """A state of step 3 of SGD without momentum or decay, before and after a step."""
    config = finetune_config(
        pretrained,
        **{
            "optimizer.momentum": 0.0,
            "optimizer.warmup_epochs": 0.0,
            "optimizer.name": "momentum",
            "optimizer.weight_decay": 0.1,
            "optimizer.exclude": (),
        },
        **overrides,
    )
    mesh = parallel.create_mesh(jax.devices()[:1])
    plan = create_plan(config, mesh, num_classes=10, num_examples=1297)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 1, 8, 8, 3), np.uint8),
        "label": np.arange(16, dtype=np.int32) % 10,
        "id": np.stack([np.zeros(16), np.arange(16)], 1).astype(np.int32),
    }
    before = jax.jit(plan.init)().with_encoder(restore_encoder(pretrained))
    after, _ = jax.jit(plan.step)(before, batch)
    return before, after


def changes(before, after):
    """Part -> the largest change of its parameters and of its statistics."""
    found = {}
    for name, part in {
        "stem": "_stem",
        **{f"stage{s}": f"stage{s}_" for s in (1, 2, 3)},
    }.items():
        found[name] = tuple(
            max(
                float(np.abs(a - b).max())
                for key in getattr(before, collection)["encoder"]
                if part in key
                for a, b in zip(
                    *(
                        jax.tree.leaves(getattr(s, collection)["encoder"][key])
                        for s in (before, after)
                    ),
                    strict=True,
                )
            )
            for collection in ("params", "batch_stats")
        )
    return found


def test_frozen_stages_keep_parameters_and_statistics(pretrained):
    before, after = one_step(pretrained, **{"finetune.stages": 1})
    found = changes(before, after)
    assert found["stem"] == found["stage1"] == found["stage2"] == (0.0, 0.0)
    assert min(found["stage3"]) > 0
    kernels = [s.params["head"]["dense_out"]["kernel"] for s in (before, after)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0
    # Nor has the optimizer a velocity of what it does not move.
    trained = [
        leaf.size
        for tree in (after.params["encoder"]["stage3_block1"], after.params["head"])
        for leaf in jax.tree.leaves(tree)
    ]
    state = sum(leaf.size for leaf in jax.tree.leaves(after.opt_state))
    assert sum(trained) <= state < sum(trained) + 20  # and counts of steps


def test_rates_fall_towards_the_stem():
    """The update of SGD is the gradient times the rate: 0.5 to the power of the place."""
    params = {
        "encoder": {
            "conv_stem": {"kernel": jnp.ones(2)},
            "stage1_block1": {"conv1": jnp.ones(2)},
            "stage3_block1": {"conv1": jnp.ones(2)},
        },
        "head": {"dense_out": {"bias": jnp.ones(2)}},
    }
    updates = []
    for changes in ({}, {"layer_decay": 0.5}, {"stages": 1}):
        config = finetune_config("random")
        config.finetune.update(changes)
        optimizer, _ = build_optimizer(config, total_steps=9, steps_per_epoch=9.0)
        state = optimizer.init(params)
        for _ in range(3):  # with momentum, decay and a warm-up
            found, state = optimizer.update(params, state, params)
        updates.append([float(leaf[0]) for leaf in jax.tree.leaves(found)])
    plain, decayed, last = np.asarray(updates)
    assert np.all(plain < 0)
    np.testing.assert_allclose(decayed / plain, [1 / 16, 1 / 8, 1 / 2, 1], rtol=1e-6)
    np.testing.assert_allclose(last, plain * [0, 0, 1, 1], rtol=1e-6)


TINY = {
    "resnet": ResNet((1, 1), BasicBlock, base_width=4, stem="cifar"),
    "wide": WideResNet(10, (4, 8), 4),
}


@pytest.mark.parametrize("name", TINY)
def test_a_frozen_part_of_an_encoder_is_in_inference_mode(name):
    """Its statistics stay; where all is frozen, training gives what inference gives."""
    encoder = TINY[name]
    images = np.random.default_rng(0).normal(size=(4, 4, 4, 3)).astype(np.float32)
    init = jax.jit(lambda x: encoder.init(jax.random.key(0), x, train=True))
    variables = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), init(images))

    def outputs_of(module):
        apply = functools.partial(module.apply, train=True, mutable=["batch_stats"])
        return jax.jit(apply)(variables, images)

    stats = outputs_of(encoder.clone(frozen_parts=2))[1]["batch_stats"]
    for key, tree in stats.items():
        pairs = zip(
            *map(jax.tree.leaves, (tree, variables["batch_stats"][key])), strict=True
        )
        moved = any(not np.array_equal(a, b) for a, b in pairs)
        assert moved == (key.startswith("stage2_") or key == "batch_norm_out"), key
    inference = jax.jit(functools.partial(encoder.apply, train=False))
    np.testing.assert_allclose(
        outputs_of(encoder.clone(frozen_parts=3))[0],
        inference(variables, images),
        rtol=1e-5,
    )


def test_rates_of_the_parts():
    config = load("transfer")
    config.finetune.layer_decay, config.finetune.stages = 0.7, 2
    rates, names_of = finetune_rates(config)
    assert rates == pytest.approx(
        {"classifier": 1, "stem": 0, "stage1": 0, "stage2": 0, "stage3": 0.49}
        | {"stage4": 0.7}
    )
    params = {
        "encoder": {"conv_stem": {"kernel": 0}, "stage3_block2": {"conv1": 0}},
        "head": {"dense_out": {"bias": 0}},
    }
    assert jax.tree.leaves(names_of(params)) == ["stem", "stage3", "classifier"]


def test_an_average_starts_where_the_encoder_does():
    optimizer = optax.sgd(0.1)
    params = {"encoder": {"w": jnp.zeros(3)}, "head": {"w": jnp.ones(2)}}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={"encoder": {}, "head": {}},
        opt_state=optimizer.init(params),
    )
    variables = {"params": {"w": jnp.full(3, 7.0)}, "batch_stats": {}}
    moved = state.with_encoder(variables)
    assert moved.params["encoder"] is variables["params"] and not moved.encoder_average
    assert moved.params["head"] is params["head"]
    averaged = dataclasses.replace(state, encoder_average=variables)
    moved = averaged.with_encoder(variables)
    assert_trees_equal(moved.encoder_average, variables)


# --- refusals ---


@pytest.mark.parametrize(
    "overrides, says",
    [
        (
            {"encoder.width": 0.5},
            r"has batch_stats/batch_norm_stem/mean \(4,\), this config's \(8,\); .*and "
            r"\d+ more; set .*--config\.encoder",
        ),
        (
            {"encoder.stem": "imagenet"},
            r"has params/conv_stem/kernel \(3, 3, 3, 4\), this config's \(7, 7, 3, 4\); "
            r"set",
        ),
        ({"encoder.name": "wrn16_4"}, r"this config's none"),
        (
            {"finetune.stages": 4},
            "allowed: 0 .all of the encoder. to 3, the stages of resnet8",
        ),
    ],
    ids=str,
)
def test_an_encoder_that_does_not_fit_is_refused(pretrained, overrides, says, tmp_path):
    config = finetune_config(pretrained, **overrides)
    with pytest.raises(ValueError, match=says) as refusal:
        finetune.finetune(config, tmp_path / "run")
    assert "\n" not in str(refusal.value) and "--config." in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_an_encoder_without_stages(monkeypatch, tmp_path):
    """One that a user has registered, with none of the fields that ResNets have."""
    import flax.linen as nn

    from supcon_jax.models import ENCODERS

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            return nn.Dense(4)(images.reshape(len(images), -1))

    monkeypatch.setitem(ENCODERS, "linear", lambda **_: Linear())
    for key, value in {
        "finetune.stages": 1,
        "finetune.layer_decay": 0.5,
        "encoder.batch_norm_momentum": 0.95,
    }.items():
        config = finetune_config("random", **{"encoder.name": "linear", key: value})
        with pytest.raises(ValueError, match=rf"linear .*--config\.{key}"):
            finetune.finetune(config, tmp_path / "run")
    config = finetune_config("random", **{"encoder.name": "linear"})
    run = open_run(config, tmp_path / "run")
    assert next(first_batches(run))["image"].shape[0] == 16


@pytest.mark.parametrize("missing", ["", "nowhere"])
def test_a_missing_run_is_refused(missing, tmp_path):
    with pytest.raises(ValueError, match=r"no pretraining run.*--config\.pretrained"):
        finetune.finetune(finetune_config(missing), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- the metric ---


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_mean_class_accuracy_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.integers(0, 6, 90), np.full(9, 2), np.full(5, -1)])
    logits = rng.normal(size=(104, 8)).astype(np.float32)
    known = labels >= 0
    mask = np.ones(104, np.float32)
    mask[:3] = 0
    batches = [
        classification_sums(logits[rows], labels[rows], mask[rows])
        for rows in np.array_split(np.arange(104), 4)
    ]
    known &= mask > 0
    expected = balanced_accuracy_score(labels[known], logits[known].argmax(axis=1))
    found = summarize(batches)["eval/mean_class_accuracy"]
    np.testing.assert_allclose(found, expected, atol=1e-6)


# --- the protocol ---

ROOT = pathlib.Path(__file__).resolve().parents[1]


def table(heading):
    """The rows of the first table below a heading of docs/transfer.md."""
    text = (ROOT / "docs" / "transfer.md").read_text().partition(f"## {heading}\n")[2]
    first = re.search(r"(?:^\|.*\|\n)+", text, re.M).group()
    lines = re.findall(r"^\|(.*)\|$", first, re.M)
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in rows[1:] if set("".join(row)) - set("-: ")]


def test_the_documents_say_what_the_configs_are():
    rows = {row[0].strip("`:"): row for row in table("The paper's protocol")}
    assert set(rows) == {*transfer.DATASETS, "voc2007"}
    for name, (data, train, images, evaluation, metric) in transfer.DATASETS.items():
        said = rows[name]
        assert said[1] == f"`{data}`"
        assert said[2] == f"{train}, {images:,}" and said[3] == evaluation
        words = {"top1": "top-1", "mean_class_accuracy": "mean per class"}
        assert said[4] == words[metric]


def test_the_figures_beside_are_the_papers(shared_dir):
    """Table 4 of the collected facts, in its order."""
    text = (shared_dir / "spec" / "paper_and_recipes.md").read_text()
    order = ["food101", "cifar10", "cifar100", "birdsnap", "sun397", "cars196"]
    order += ["aircraft", "voc2007", "dtd", "oxford_iiit_pet", "caltech101"]
    order += ["oxford_flowers102"]
    rows = {row[0].strip("`:"): row for row in table("The paper's protocol")}
    for column, network in ((5, "SupCon-50"), (6, "Xent-50"), (7, "SimCLR-50")):
        line = next(x for x in text.splitlines() if x.startswith(f"| {network} |"))
        figures = [float(cell) for cell in line.split("|")[2:14]]
        found = [float(rows[name][column]) for name in order]
        assert found == figures, network


@pytest.mark.parametrize("variant", ["", *transfer.DATASETS])
def test_the_protocol(variant):
    """Appendix B.8 of SimCLR, which the paper follows."""
    config = load("transfer", variant)
    check_config(config)
    assert (config.mode, config.total_steps, config.batch_size) == (
        *("finetune", 20_000, 256),
    )
    assert config.optimizer.name == "nesterov" and config.optimizer.momentum == 0.9
    assert config.finetune.stages == 0 and config.finetune.layer_decay == 1
    assert (config.data.image_size, config.data.eval_resize) == (224, 256)
    assert config.augment.flip and config.augment.jitter_strength == 0
    images = transfer.DATASETS[variant or "cifar10"][2]
    momentum = max(1 - 10 / (images / 256), 0.9)
    assert config.encoder.batch_norm_momentum == pytest.approx(momentum)
    # A frozen probe, and the evaluation of either, are the same config in another mode.
    for mode in ("linear_eval", "evaluate"):
        config.mode = mode
        check_config(config)


def test_a_frozen_configs_json_has_what_it_was_trained_with(tuned):
    config, workdir, _ = tuned
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["mode"] == "finetune"
    facts = json.loads((workdir / "run.json").read_text())
    assert facts["frozen"].startswith("sha256:")
    assert facts["data"]["train"]["classes"] == 3
