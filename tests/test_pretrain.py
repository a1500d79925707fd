"""Stage 1 from the outside: files, metrics, resume, devices, refusals."""

import dataclasses
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from supcon_jax import pretrain
from supcon_jax.checkpoint import restore_encoder, saved_steps
from supcon_jax.data.sources import ArraySource
from supcon_jax.run import loop
from supcon_jax.run.goodput import Goodput
from supcon_jax.run.opening import open_run
from supcon_jax.run.splits import check_positives
from supcon_jax.run.stop import Stopped, StopRequests
from supcon_jax.steps import contrastive
from supcon_jax.writers import MetricWriter, read_metrics
from tests.runs import assert_trees_equal, pretrain_config, snapshot

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run: workdir, final metrics, and times train_step was traced."""
    workdir = tmp_path_factory.mktemp("finished")
    traces = []
    original = contrastive.train_step

    def counting(*args, **kwargs):
        traces.append(1)
        return original(*args, **kwargs)

    contrastive.train_step = counting
    try:
        final = pretrain.pretrain(
            pretrain_config(eval_every=5, checkpoint_every=5), workdir
        )
    finally:
        contrastive.train_step = original
    return workdir, final, len(traces)


def test_workdir_and_metrics(finished):
    workdir, final, _ = finished
    for name in ("config.json", "metrics.jsonl", "log.txt", "figures/curves.png"):
        assert (workdir / name).stat().st_size > 0, name
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 16
    records = read_metrics(workdir)
    assert all({"step", "epoch", "wall_s"} <= set(r) for r in records)
    assert [r.get("final", False) for r in records] == [False] * (len(records) - 1) + [
        True
    ]
    last = records[-1]
    assert last["step"] == 12
    assert last["epoch"] == pytest.approx(12 * 16 / 1297, abs=1e-4)
    for name in (
        "train/loss",
        "train/collapse_loss",
        "train/contrastive_top1",
        "train/images_per_sec",
        "optim/learning_rate",
        "knn/top1",
    ):
        assert last[name] == final[name], name
    assert last["train/collapse_loss"] == pytest.approx(np.log(2 * 16 - 1), rel=1e-6)
    assert last["knn/top1"] > 0.3


def test_compiled_once(finished):
    assert finished[2] == 1


def test_periods(finished):
    workdir, _, _ = finished
    records = read_metrics(workdir)
    assert [r["step"] for r in records if "train/loss" in r] == [1, 5, 10, 12]
    assert [r["step"] for r in records if "knn/top1" in r] == [5, 10, 12]
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    judged = [r for r in records if "knn/top1" in r]
    best = max(judged, key=lambda r: (r["knn/top1"], r["step"]))  # the later of two
    # The last two (keep_checkpoints) and the best by kNN.
    assert set(steps) == {10, 12, best["step"]}


def test_keep_checkpoints(tmp_path):
    config = pretrain_config(
        total_steps=4, checkpoint_every=1, keep_checkpoints=1, **{"knn.bank": 0}
    )
    pretrain.pretrain(config, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_same_command_again_changes_nothing(finished, caplog):
    workdir, final, _ = finished
    before = snapshot(workdir)
    config = pretrain_config(eval_every=5, checkpoint_every=5)
    again = pretrain.pretrain(config, workdir)
    assert {k: v for k, v in again.items() if "/" in k} == {
        k: v for k, v in final.items() if "/" in k
    }
    changed = [p.name for p, data in snapshot(workdir).items() if before.get(p) != data]
    assert set(changed) <= {"config.json", "curves.png"}


def interrupt_at_step_10(config, workdir, monkeypatch):
    """A run that its user stops at its progress line of step 10."""

    def stop(self, step, metrics):
        if step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.CollapseMonitor, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(config, workdir)


def test_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    """Stopped between two checkpoints, continued by the same call: same bits."""
    config = pretrain_config(eval_every=5, checkpoint_every=5)

    interrupt_at_step_10(config, tmp_path, monkeypatch)
    written = [r["step"] for r in read_metrics(tmp_path)]
    assert max(written) == 10
    saved = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert sorted(saved) == ["10", "5"]  # whole: an interrupt waits for the last save

    traces = []
    original = contrastive.train_step
    monkeypatch.setattr(
        contrastive,
        "train_step",
        lambda *a, **k: traces.append(1) or original(*a, **k),
    )
    final = pretrain.pretrain(config, tmp_path)
    assert len(traces) == 1
    assert_trees_equal(restore_encoder(tmp_path), restore_encoder(finished[0]))
    for name in ("train/loss", "knn/top1", "optim/learning_rate"):
        assert final[name] == finished[1][name], name
    steps = [r["step"] for r in read_metrics(tmp_path) if "train/loss" in r]
    assert steps == sorted(set(steps)) and steps[-1] == 12


def killed_before_the_final_line(patch):
    write = MetricWriter.write

    def die(self, step, metrics, **flags):
        if flags:
            raise KeyboardInterrupt
        write(self, step, metrics)

    patch.setattr(MetricWriter, "write", die)


def stopped_at_the_last_step(patch):
    questions = iter(range(1, 100))
    patch.setattr(StopRequests, "due", lambda self: next(questions) == 12)


@pytest.mark.parametrize(
    "end", [killed_before_the_final_line, stopped_at_the_last_step]
)
def test_a_run_that_ends_after_its_last_save_is_finished_by_the_same_call(
    end, finished, tmp_path
):
    """All steps are made and saved; only the evaluation and the final line are missing."""
    config = pretrain_config(eval_every=5, checkpoint_every=5)
    with pytest.MonkeyPatch.context() as patch:
        end(patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(config, tmp_path)
    assert saved_steps(tmp_path)[-1] == 12
    assert not read_metrics(tmp_path)[-1].get("final")
    pretrain.pretrain(config, tmp_path)
    assert_trees_equal(restore_encoder(tmp_path), restore_encoder(finished[0]))
    ours, theirs = (read_metrics(folder) for folder in (tmp_path, finished[0]))
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    timed = ("wall_s", "goodput/", "train/images_per_sec")
    for name in theirs[-1]:
        if not name.startswith(timed):
            assert ours[-1][name] == theirs[-1][name], name


def test_the_account_counts_every_process_that_was_killed():
    """Saved at step 100, killed at 400, at 300 and at 200: each began anew, and was lost."""

    def process(before, minutes, until):
        account = Goodput.continued(before, start_step=100)
        with account.spent("compile"):
            pass
        account._seconds["compile"] += minutes
        kept = [r for r in before if r["step"] <= 100]
        return [
            *kept,
            {"step": until, "wall_s": float(until), **account.metrics(float(until))},
        ]

    first = [{"step": 100, "wall_s": 100.0, **Goodput({}).metrics(100.0)}]
    records = process(first, 60.0, 400)
    records = process(records, 60.0, 300)
    records = process(records, 60.0, 200)
    found = Goodput.continued(records, start_step=100).metrics(100.0)
    assert found["goodput/lost_s"] == 300 + 200 + 100
    assert found["goodput/compile_s"] == pytest.approx(180, abs=0.1)
    assert found["goodput/share"] == pytest.approx(100 / (100 + 600 + 180), abs=1e-3)


def test_an_evaluation_that_a_signal_cut_off_is_made_when_the_run_goes_on(
    tmp_path, monkeypatch
):
    """All lines, and the best checkpoint, are those of a run that nothing cut off."""
    config = pretrain_config(eval_every=4, checkpoint_every=4, keep_checkpoints=1)
    whole = pretrain.pretrain(config, tmp_path / "whole")
    calls = []
    evaluate = loop._Training._evaluate

    def cut_off(self, state, step):
        calls.append(step)
        return ({}, True) if calls == [4, 8] else evaluate(self, state, step)

    monkeypatch.setattr(loop._Training, "_evaluate", cut_off)
    with pytest.raises(Stopped):
        pretrain.pretrain(config, tmp_path / "cut")
    again = pretrain.pretrain(config, tmp_path / "cut")
    assert calls == [4, 8, 8, 12]
    ours, theirs = (
        [
            (r["step"], r["knn/top1"])
            for r in read_metrics(tmp_path / n)
            if "knn/top1" in r
        ]
        for n in ("cut", "whole")
    )
    assert ours == theirs and [step for step, _ in ours] == [4, 8, 12]
    assert again["knn/top1"] == whole["knn/top1"]
    assert saved_steps(tmp_path / "cut") == saved_steps(tmp_path / "whole")


def test_interrupts_wait_for_the_end_of_a_step(tmp_path, monkeypatch):
    """The first signal lets the step at hand be saved; a second one does not wait."""
    handler = signal.getsignal(signal.SIGINT)
    finished = []

    def ctrl_c(times):
        def watch(self, step, metrics):
            if step == 5:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
                finished.append(times)

        return watch

    for times in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(pretrain.CollapseMonitor, "__call__", ctrl_c(times))
            with pytest.raises(KeyboardInterrupt):
                pretrain.pretrain(
                    pretrain_config(checkpoint_every=5), tmp_path / str(times)
                )
        assert signal.getsignal(signal.SIGINT) is handler
    assert finished == [1]
    # The progress line of step 5 is written while step 6 runs.
    saved = {
        n: sorted(p.name for p in tmp_path.glob(f"{n}/checkpoints/*")) for n in (1, 2)
    }
    assert saved == {1: ["5", "6"], 2: ["5"]}


def test_another_config_is_refused_and_nothing_is_harmed(finished):
    workdir, _, _ = finished
    before = snapshot(workdir)
    config = pretrain_config(eval_every=5, checkpoint_every=5)
    config.loss.temperature = 0.5
    config.seed = 3
    with pytest.raises(ValueError) as refusal:
        pretrain.pretrain(config, workdir)
    message = str(refusal.value)
    assert "loss.temperature (there 0.1, now 0.5)" in message
    assert "seed (there 0, now 3)" in message and "--workdir" in message
    assert "\n" not in message
    assert snapshot(workdir) == before


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot.*--workdir|is it a workdir"):
        pretrain.pretrain(pretrain_config(), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == ""
    with pytest.raises(ValueError, match="allowed: local paths and gs://BUCKET/PATH"):
        pretrain.pretrain(pretrain_config(), "s3://bucket/run")


def test_batch_that_the_devices_cannot_share(tmp_path):
    with pytest.raises(ValueError, match="set --config.batch_size=8 or 16"):
        pretrain.pretrain(pretrain_config(batch_size=12), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_diverged_loss_stops_before_it_is_saved(tmp_path):
    config = pretrain_config(checkpoint_every=2)
    config.optimizer.learning_rate = 1e30
    config.loss.scale = "1e30"
    with pytest.raises(FloatingPointError, match="(at|after) step .*learning_rate"):
        pretrain.pretrain(config, tmp_path)
    for step in [p.name for p in (tmp_path / "checkpoints").iterdir()]:
        for leaf in jax.tree.leaves(restore_encoder(tmp_path, step=int(step))):
            assert np.isfinite(np.asarray(leaf)).all()


@pytest.mark.slow
@pytest.mark.slow
def test_momentum_queue_and_probe_survive_an_interrupt(tmp_path, monkeypatch):
    """Queue, average and probe lie in the checkpoint: the same bits as without a stop."""
    config = pretrain_config(
        checkpoint_every=5,
        **{
            "loss.contrast_mode": "one",
            "momentum_encoder.decay": 0.9,
            "momentum_encoder.queue_size": 64,
            "probe.learning_rate": 0.05,
        },
    )
    whole = pretrain.pretrain(config, tmp_path / "whole")
    assert whole["eval/num_examples"] == 500 and 0 < whole["eval/top1"] <= 1
    assert whole["train/probe_loss"] > 0
    assert whole["train/collapse_loss"] == pytest.approx(np.log(64), rel=1e-6)

    interrupt_at_step_10(config, tmp_path / "stopped", monkeypatch)
    final = pretrain.pretrain(config, tmp_path / "stopped")
    for name in (
        "train/loss",
        "train/probe_loss",
        "eval/top1",
        "eval/loss",
        "knn/top1",
    ):
        assert final[name] == whole[name], name
    assert_trees_equal(
        restore_encoder(tmp_path / "stopped"), restore_encoder(tmp_path / "whole")
    )


def test_cross_entropy_baseline(tmp_path):
    config = pretrain_config(**{"loss.name": "cross_entropy"})
    final = pretrain.pretrain(config, tmp_path)
    assert final["eval/num_examples"] == 500
    assert 0 < final["eval/top1"] <= final["eval/top5"] <= 1
    assert final["eval/loss"] > 0 and "train/top1" in final
    assert final["knn/top1"] > 0.3


def test_collapse_is_said_once_in_plain_words(tmp_path, caplog):
    run = open_run(pretrain_config(), tmp_path)
    monitor = pretrain.CollapseMonitor(run, patience=3)
    plateau = {"train/loss": 3.43, "train/collapse_loss": 3.434}
    with caplog.at_level(logging.WARNING, logger="supcon_jax"):
        for step in range(2):
            monitor(step, plateau)
        monitor(2, plateau | {"train/loss": 3.2})
        for step in range(3, 9):
            monitor(step, plateau)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "collapsed" in caplog.text and "warmup_epochs" in caplog.text
    monitor(9, {"train/loss": 1.0})  # cross-entropy has no such level


@pytest.mark.parametrize(
    ("constant", "metrics", "cause"),
    [
        (True, {}, "all images are equal"),
        (False, {"train/mean_positives": 31.0}, "all images have one class"),
        (False, {"train/no_positive_fraction": 1.0}, "no image has a positive"),
    ],
    ids=["constant", "one class", "no positives"],
)
def test_collapse_names_the_cause_that_it_can_see(
    constant, metrics, cause, tmp_path, caplog
):
    run = open_run(pretrain_config(), tmp_path)
    if constant:
        source = dataclasses.replace(
            run.train_source, images=np.zeros_like(run.train_source.images)
        )
        run = dataclasses.replace(run, train_source=source)
    monitor = pretrain.CollapseMonitor(run, patience=1)
    with caplog.at_level(logging.WARNING, logger="supcon_jax"):
        monitor(1, {"train/loss": 3.43, "train/collapse_loss": 3.434} | metrics)
    assert cause in caplog.text and "warmup_epochs" not in caplog.text


@pytest.mark.parametrize(
    ("labels", "name", "refused"),
    [
        (np.arange(20), "supcon", True),
        (np.arange(20) // 2, "supcon", False),
        (np.zeros(20, int), "simclr", True),
        (np.arange(20) // 10, "cross_entropy", False),
    ],
)
def test_training_without_positives_is_refused(labels, name, refused, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    np.savez(
        tmp_path / "data.npz",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
    )
    config = pretrain_config(
        **{
            "data.name": "arrays",
            "data.root": str(tmp_path / "data.npz"),
            "data.views": 1,
            "loss.name": name,
        }
    )
    if refused:
        with pytest.raises(ValueError, match="no image has a positive.*data.views=2"):
            open_run(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    else:
        open_run(config, tmp_path / "run")


def test_classes_of_one_image_are_told(tmp_path, caplog):
    labels = np.array([0, 0, *range(1, 19)])
    source = ArraySource(np.zeros((20, 8, 8, 3), np.uint8), labels, num_classes=19)
    with caplog.at_level(logging.WARNING, logger="supcon_jax"):
        check_positives(pretrain_config(**{"data.views": 1}), source)
    assert "18 classes have one image" in caplog.text


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_bits(tmp_path):
    """SIGKILL at any moment, then the same command, until it is done."""

    def command(workdir):
        return [
            sys.executable,
            "main.py",
            "--config=configs/digits.py",
            f"--workdir={workdir}",
            "--config.batch_size=16",
            "--config.total_steps=200",
            "--config.checkpoint_every=20",
            "--config.encoder.width=0.25",
            "--config.log_every=10",
            "--config.knn.bank=200",
        ]

    for name in ("first", "whole"):  # the first one compiles, the second is timed
        start = time.monotonic()
        subprocess.run(
            command(tmp_path / name), cwd=REPOSITORY, check=True, capture_output=True
        )
        seconds = time.monotonic() - start
    rng = np.random.default_rng(0)
    kills = 0
    while True:
        process = subprocess.Popen(
            command(tmp_path / "killed"),
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        share = rng.uniform(0.3, 0.9)
        deadline = time.monotonic() + (share * seconds if kills < 6 else 600)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0 and kills > 0
    assert_trees_equal(
        restore_encoder(tmp_path / "killed"), restore_encoder(tmp_path / "whole")
    )
