"""What a rerun may change in a workdir, and what it may not."""

import ast
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from supcon_jax import pretrain
from supcon_jax.checkpoint import digest, restore_encoder
from supcon_jax.config.keys import KEYS
from supcon_jax.data.datasets import open_source
from supcon_jax.data.identity import identify
from supcon_jax.linear_eval import linear_eval
from supcon_jax.run import memory
from supcon_jax.run.opening import open_run
from supcon_jax.run.workdir import differing_keys, open_workdir, read_config
from supcon_jax.writers import read_metrics
from tests.runs import assert_trees_equal, linear_config, pretrain_config, snapshot

SHORT = {"total_steps": 4, "knn.bank": 0}
# Another value for every key that a rerun may change.
FREE = {
    "log_every": 2,
    "eval_every": 3,
    "checkpoint_every": 2,
    "keep_checkpoints": 5,
    "encoder.remat": True,
    "data.dir": "elsewhere",
    "data.root": "elsewhere",
    "data.skip_errors": True,
    "data.keep_gib": 1.0,
    "compilation_cache": False,
    "next_config": "",
    "profile_steps": "2:3",
    "writers": ["trackio"],
    "project": "another",
    "health.on_nonfinite": "skip",
    "health.max_skipped": 3,
    "health.loss_rise": 2.0,
    "health.norm_growth": 5.0,
    "hosts.watchdog_minutes": 0.0,
    "eval_metric": "mean_class_accuracy",
    "robustness.data": "elsewhere",
    "robustness.reference": "runs/another",
}


def with_a_checkpoint(workdir, **arguments):
    """A workdir of the tiny run that has saved a step."""
    open_workdir(pretrain_config(), workdir, **arguments)
    (workdir / "checkpoints" / "2").mkdir(parents=True)
    return workdir


def test_every_free_key_is_tried():
    assert {key for key, known in KEYS.items() if known.free} == set(FREE)


@pytest.mark.parametrize("key", FREE)
def test_what_changes_no_result_may_change(tmp_path, key):
    with_a_checkpoint(tmp_path)
    value = tuple(FREE[key]) if isinstance(FREE[key], list) else FREE[key]
    open_workdir(pretrain_config(**{key: value}), tmp_path)
    now = read_config(tmp_path)
    for part in key.split("."):
        now = now[part]
    assert now == FREE[key]


@pytest.mark.parametrize(
    ("key", "value"),
    [("loss.temperature", 0.5), ("batch_size", 32), ("microbatch_size", 8)],
)
def test_what_changes_the_result_is_refused_once_there_is_a_checkpoint(
    tmp_path, key, value
):
    open_workdir(pretrain_config(**{key: value}), tmp_path)  # binds nothing yet
    before = snapshot(with_a_checkpoint(tmp_path))
    with pytest.raises(ValueError, match=f"differing: {key} .*use another --workdir"):
        open_workdir(pretrain_config(**{key: value}), tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("key", ["epochs", "total_steps"])
def test_a_longer_run_is_told_why_it_cannot_go_on(tmp_path, key):
    with_a_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="learning rate depends on the length"):
        open_workdir(pretrain_config(**{key: 77}), tmp_path)


def test_a_key_of_a_later_version_has_its_default_in_an_older_run(tmp_path):
    with_a_checkpoint(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["momentum_encoder"], written["augment"]["cutmix_alpha"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="differing: augment.cutmix_alpha"):
        open_workdir(pretrain_config(**{"augment.cutmix_alpha": 0.5}), tmp_path)
    assert snapshot(tmp_path) == before
    open_workdir(pretrain_config(), tmp_path)


def test_tuples_and_lists_are_the_same_value():
    assert differing_keys({"data.mean": (0.5,) * 3}, {"data.mean": [0.5] * 3}) == []
    assert differing_keys({"data.mean": (0.5,) * 3}, {"data.mean": [0.4] * 3})


@pytest.mark.slow
def test_the_cure_that_the_program_advises_works_in_the_same_folder(
    tmp_path, monkeypatch
):
    """A step refused for memory, then the same command with the flag that it named."""
    with monkeypatch.context() as patch:
        patch.setattr(memory, "device_memory", lambda device: 125_000)
        with pytest.raises(ValueError, match="does not fit into memory") as refusal:
            pretrain.pretrain(pretrain_config(**SHORT), tmp_path)
    advised = re.findall(r"--config\.([\w.]+)=(\w+)", str(refusal.value))
    cure = {key: ast.literal_eval(value) for key, value in advised}
    assert cure == {"encoder.remat": True, "microbatch_size": 8}
    assert (tmp_path / "config.json").is_file()
    final = pretrain.pretrain(pretrain_config(**SHORT, **cure), tmp_path)
    assert final["train/loss"] > 0 and read_metrics(tmp_path)[-1]["step"] == 4
    assert read_config(tmp_path)["microbatch_size"] == 8


def test_a_finished_run_stays_bound_when_its_checkpoints_are_gone(tmp_path):
    pretrain.pretrain(pretrain_config(**SHORT), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="made by another config"):
        pretrain.pretrain(pretrain_config(**SHORT, seed=5), tmp_path)


def test_moved_runs_resume_and_another_encoder_is_refused(tmp_path):
    """Linear evaluation knows its encoder by what it is, not by its path."""
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain.pretrain(pretrain_config(**SHORT), first)
    pretrain.pretrain(pretrain_config(**SHORT, seed=1), second)
    linear = tmp_path / "linear"
    final = linear_eval(linear_config(first, total_steps=4), linear)
    moved, copied = tmp_path / "moved", tmp_path / "copied"
    first.rename(moved)
    shutil.copytree(linear, copied)
    again = linear_eval(linear_config(moved, total_steps=4), copied)
    assert again["eval/top1"] == final["eval/top1"]
    assert read_metrics(copied)[-1]["final"]
    with pytest.raises(ValueError, match="made by another config|another encoder"):
        linear_eval(linear_config(second, total_steps=4), copied)


def test_an_encoder_that_was_trained_on_is_another_one(tmp_path):
    with_a_checkpoint(tmp_path, frozen="sha256:a")
    with pytest.raises(ValueError, match="another encoder .*a later step"):
        open_workdir(pretrain_config(), tmp_path, frozen="sha256:b")


def test_the_digest_sees_every_bit_name_and_type(tmp_path):
    pretrain.pretrain(pretrain_config(**SHORT), tmp_path / "run")
    tree = restore_encoder(tmp_path / "run")
    assert digest(tree) == digest(restore_encoder(tmp_path / "run"))
    kernel = tree["params"]["Dense_0"]["kernel"]
    tree["params"]["Dense_0"]["kernel"] = kernel.at[0, 0].add(1e-7)
    assert digest(tree) != digest(restore_encoder(tmp_path / "run"))
    assert digest({"a": kernel}) != digest({"b": kernel})


def test_a_copied_run_goes_on_to_the_same_bits(tmp_path):
    config = dict(SHORT, total_steps=6, checkpoint_every=3)
    pretrain.pretrain(pretrain_config(**config), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "6")
    lines = (tmp_path / "copy" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "copy" / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    pretrain.pretrain(pretrain_config(**config), tmp_path / "copy")
    assert_trees_equal(
        restore_encoder(tmp_path / "copy"), restore_encoder(tmp_path / "whole")
    )


def test_open_run_leaves_nothing_behind_where_it_refuses(tmp_path):
    with pytest.raises(ValueError):
        open_run(pretrain_config(batch_size=12), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- the data of a run ---


def arrays(path, seed=0, classes=3, labels=None):
    """An .npz file of noise images."""
    rng = np.random.default_rng(seed)
    content = {}
    for split, count in (("train", 40), ("test", 20)):
        content[f"{split}_images"] = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
        content[f"{split}_labels"] = np.arange(count) % classes
    if labels is not None:
        content["train_labels"] = labels
    np.savez(path, **content)
    return str(path)


def arrays_config(root):
    return pretrain_config(**{"data.name": "arrays", "data.root": root, "knn.bank": 20})


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"seed": 1}, "digest"),
        ({"classes": 4}, "20 examples of 4 classes"),
        ({"labels": np.arange(40) // 14}, "digest"),
    ],
    ids=str,
)
def test_other_data_are_refused(tmp_path, finished, other, says):
    """Whether the run is finished or not; nothing is written."""
    config = arrays_config(arrays(tmp_path / "a.npz"))
    workdir = tmp_path / "run"
    open_run(config, workdir)
    if finished:
        (workdir / "metrics.jsonl").write_text('{"step": 12, "final": true}\n')
    else:
        (workdir / "checkpoints" / "2").mkdir(parents=True)
    before = snapshot(workdir)
    changed = arrays_config(arrays(tmp_path / "b.npz", **other))
    with pytest.raises(ValueError, match=f"made with other data; .*{says}.*data.root"):
        open_run(changed, workdir)
    assert snapshot(workdir) == before
    # The same content in another place is the same data.
    (tmp_path / "elsewhere").mkdir()
    moved = arrays_config(arrays(tmp_path / "elsewhere" / "c.npz"))
    assert (open_run(moved, workdir).finished is not None) == finished


def test_a_run_of_an_older_version_takes_any_data(tmp_path):
    config = arrays_config(arrays(tmp_path / "a.npz"))
    open_run(config, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "run" / "run.json").unlink()
    run = open_run(arrays_config(arrays(tmp_path / "b.npz", seed=1)), tmp_path / "run")
    # From now on these are its data.
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["data"]["train"] == identify(run.train_source)


def test_identity_looks_at_content_and_not_at_places(tmp_path):
    """Image files: the same bytes in another folder; one changed; one more."""

    def folder(name, changed=None, more=0):
        for label in ("cat", "dog"):
            path = tmp_path / name / "train" / label
            path.mkdir(parents=True)
            for number in range(3 + more):
                color = (10 * number, 200 if (label, number) == changed else 20, 30)
                Image.new("RGB", (9, 8), color).save(path / f"{number}.png")
        return identify(open_source("folder", "train", root=str(tmp_path / name)))

    first = folder("a")
    assert first == folder("b")
    assert first["examples"] == 6 and first["classes"] == 2
    assert folder("c", changed=("dog", 1))["digest"] != first["digest"]
    assert folder("d", more=1)["examples"] == 8
