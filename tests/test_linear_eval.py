"""Stage 2: the encoder is restored, stays frozen, and the split is counted whole."""

import logging
import shutil

import jax
import numpy as np
import pytest

from supcon_jax import linear_eval, parallel, pretrain
from supcon_jax.checkpoint import Checkpointer, restore_encoder
from supcon_jax.pretrained import model as pretrained_model
from supcon_jax.run.opening import open_run
from supcon_jax.run.plan import create_plan
from supcon_jax.writers import read_metrics
from tests.runs import (
    assert_trees_equal,
    first_batches,
    linear_config,
    pretrain_config,
    snapshot,
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pretrained")
    pretrain.pretrain(pretrain_config(**{"knn.bank": 0}), workdir)
    return workdir


def test_linear_evaluation(pretrained, tmp_path):
    before = snapshot(pretrained)
    final = linear_eval.linear_eval(linear_config(pretrained), tmp_path)
    assert snapshot(pretrained) == before
    assert final["eval/num_examples"] == 500  # 500 is no multiple of 16
    assert 0 < final["eval/top1"] <= final["eval/top5"] <= 1
    assert read_metrics(tmp_path)[-1]["final"] is True
    # The head is saved, and the encoder is not saved twice.
    step = tmp_path / "checkpoints" / "12"
    assert (step / "training").is_dir() and not (step / "encoder").exists()
    with pytest.raises(ValueError, match="saved no encoder"):
        restore_encoder(tmp_path)


def test_accuracy_is_that_of_the_restored_encoder_in_inference_mode(
    pretrained, tmp_path
):
    """Head and encoder from disk, applied by hand to the whole test split."""
    config = linear_config(pretrained)
    final = linear_eval.linear_eval(config, tmp_path)
    run = open_run(config, tmp_path)
    variables = restore_encoder(pretrained)
    checkpointer = Checkpointer(tmp_path)
    state, _ = checkpointer.restore_newest(
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape,
                x.dtype,
                sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
            ),
            run.plan.abstract_state(),
        )
    )
    checkpointer.close()
    source = run.eval_source
    images = (source.images / 255.0 - 0.5) / 0.5
    encoder = run.plan.modules.encoder
    embeddings = encoder.apply(variables, images.astype(np.float32), train=False)
    dense = state.params["head"]["dense_out"]
    logits = np.asarray(embeddings) @ np.asarray(dense["kernel"]) + np.asarray(
        dense["bias"]
    )
    top1 = np.mean(np.argmax(logits, axis=1) == source.labels)
    assert final["eval/top1"] == pytest.approx(top1, abs=0.0021)


def test_step_changes_the_head_and_nothing_else(pretrained, tmp_path):
    run = open_run(linear_config(pretrained), tmp_path)
    variables = restore_encoder(pretrained)
    init, step = run.plan.init, run.plan.step
    state = jax.jit(init)()
    assert set(state.params) == {"head"}
    batch = next(first_batches(run))
    # Step 0 of the warm-up has learning rate 0.
    after, _ = jax.jit(step)(state.replace(step=state.step + 5), batch, variables)
    after, _ = jax.jit(step)(after, batch, variables)
    kernel = state.params["head"]["dense_out"]["kernel"]
    assert np.abs(after.params["head"]["dense_out"]["kernel"] - kernel).max() > 0
    assert_trees_equal(variables, restore_encoder(pretrained))


def test_microbatches_change_nothing(pretrained, tmp_path):
    """BatchNorm is in inference mode, so the encoder may take any part of a batch."""
    results = []
    for size in (0, 8):
        config = linear_config(pretrained, microbatch_size=size)
        run = open_run(config, tmp_path / str(size))
        variables = pretrained_model.load_encoder(run.plan)
        state = jax.jit(run.plan.init, out_shardings=parallel.replicated(run.mesh))()
        batch = parallel.to_global(next(first_batches(run)), run.mesh)
        compiled = run.plan.lower().compile()
        # Step 0 of the warm-up has learning rate 0.
        state = state.replace(step=state.step + 5)
        seed = run.plan.seed_on_devices()
        state, metrics = compiled(seed, state, batch, variables)
        results.append(jax.device_get((state.params, metrics)))
        if size:  # and no images move between devices for it
            assert "all-to-all" not in compiled.as_text()
            assert "collective-permute" not in compiled.as_text()
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6, rtol=1e-5)


def test_random_encoder_differs(pretrained, tmp_path):
    mesh = parallel.create_mesh()
    trained, random = (
        pretrained_model.load_encoder(
            create_plan(linear_config(name), mesh, num_classes=10, num_examples=1297)
        )
        for name in (pretrained, "random")
    )
    assert jax.tree.structure(trained) == jax.tree.structure(random)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(random), strict=True)
    )
    final = linear_eval.linear_eval(linear_config("random"), tmp_path)
    assert final["eval/num_examples"] == 500


def test_resumes(pretrained, tmp_path, monkeypatch):
    from supcon_jax.run import loop

    whole = linear_eval.linear_eval(linear_config(pretrained), tmp_path / "whole")
    config = linear_config(pretrained, checkpoint_every=4)
    save = Checkpointer.save

    def save_and_stop(self, state, step, metrics, **options):
        save(self, state, step, metrics, **options)
        if step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpointer, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            linear_eval.linear_eval(config, tmp_path / "stopped")
    resumed = linear_eval.linear_eval(config, tmp_path / "stopped")
    for name in ("train/loss", "eval/top1", "eval/loss"):
        assert resumed[name] == whole[name], name


@pytest.mark.parametrize("missing", ["", "nowhere"])
def test_missing_pretraining_run_is_refused(missing, tmp_path):
    with pytest.raises(ValueError, match=r"no pretraining run.*--config\.pretrained"):
        linear_eval.linear_eval(linear_config(missing), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_architecture_is_refused_with_both_named(pretrained, tmp_path):
    config = linear_config(pretrained, **{"encoder.name": "resnet18"})
    with pytest.raises(ValueError) as refusal:
        linear_eval.linear_eval(config, tmp_path / "run")
    assert "'one_layer'" in str(refusal.value) and "'resnet18'" in str(refusal.value)
    assert "--config.encoder.name" in str(refusal.value)
    assert not (tmp_path / "run").exists()
    config = linear_config(pretrained, **{"data.mean": (0.1, 0.5, 0.5)})
    with pytest.raises(ValueError, match=r"data\.mean"):
        linear_eval.linear_eval(config, tmp_path / "run")


def test_linear_run_is_not_a_pretraining_run(pretrained, tmp_path):
    linear_eval.linear_eval(linear_config(pretrained, total_steps=1), tmp_path / "a")
    with pytest.raises(ValueError, match="no pretraining run"):
        linear_eval.linear_eval(linear_config(tmp_path / "a"), tmp_path / "b")


def test_pretraining_run_without_a_checkpoint(pretrained, tmp_path):
    (tmp_path / "config.json").write_bytes((pretrained / "config.json").read_bytes())
    with pytest.raises(ValueError, match="no checkpoints in"):
        linear_eval.linear_eval(linear_config(tmp_path), tmp_path / "run")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        linear_eval.linear_eval(linear_config(tmp_path), tmp_path / "run")


@pytest.mark.slow
def test_the_average_is_used_when_asked(tmp_path):
    """It is saved beside the encoder, evaluated beside it, and read by stage 2."""
    config = pretrain_config(**{"encoder_average.decay": 0.9})
    final = pretrain.pretrain(config, tmp_path / "pretrain")
    assert final["knn/average_top1"] > 0.2
    assert final["knn/average_top1"] != final["knn/top1"]
    assert final["embedding/average_rankme"] != final["embedding/rankme"]
    raw = restore_encoder(tmp_path / "pretrain")
    average = restore_encoder(tmp_path / "pretrain", average=True)
    assert jax.tree.map(np.shape, raw) == jax.tree.map(np.shape, average)
    assert not np.array_equal(*(jax.tree.leaves(tree)[0] for tree in (raw, average)))
    results = {}
    for use in (False, True):
        config = linear_config(tmp_path / "pretrain", **{"encoder_average.use": use})
        run = open_run(
            config,
            tmp_path / f"open_{use}",
            load_frozen=lambda plan: (pretrained_model.load_encoder(plan),),
        )
        assert_trees_equal(run.frozen[0], average if use else raw)
        results[use] = linear_eval.linear_eval(config, tmp_path / f"linear_{use}")
    assert results[False]["train/loss"] != results[True]["train/loss"]


def test_an_average_that_was_not_kept_is_refused(pretrained, tmp_path):
    config = linear_config(pretrained, **{"encoder_average.use": True})
    with pytest.raises(ValueError, match="kept no average.*--config.encoder_average"):
        linear_eval.linear_eval(config, tmp_path / "linear")
    assert not (tmp_path / "linear").exists()


def test_an_unfinished_pretraining_run_is_told(pretrained, tmp_path, caplog):
    copy = tmp_path / "unfinished"
    shutil.copytree(pretrained, copy)
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with caplog.at_level(logging.WARNING, logger="supcon_jax"):
        pretrained_model.check_pretrained(linear_config(pretrained))
        assert not caplog.records
        pretrained_model.check_pretrained(linear_config(copy))
    assert "is not finished; its newest save is of step 12" in caplog.text


def test_checkpoints_that_are_gone_are_told(pretrained, tmp_path, caplog):
    """The run is complete, but nothing can be done with it."""
    copy = tmp_path / "copy"
    shutil.copytree(pretrained, copy)
    shutil.rmtree(copy / "checkpoints")
    with caplog.at_level(logging.WARNING, logger="supcon_jax"):
        pretrain.pretrain(pretrain_config(**{"knn.bank": 0}), copy)
    assert "its checkpoints are gone" in caplog.text
    with pytest.raises(ValueError, match="no checkpoints in"):
        linear_eval.linear_eval(linear_config(copy), tmp_path / "linear")
