"""metrics.jsonl over crashes and resumes, TensorBoard, trackers."""

import contextlib
import importlib.machinery
import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import types

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from supcon_jax import writers
from supcon_jax.config.check import check_config
from supcon_jax.pretrain import pretrain
from supcon_jax.run.opening import open_run
from supcon_jax.writers import MetricWriter, read_metrics
from tests.runs import pretrain_config


def open_writer(workdir, start_step=0, **options):
    return MetricWriter(
        workdir, total_steps=100, steps_per_epoch=2.5, start_step=start_step, **options
    )


# --- metrics.jsonl ---


def test_lines_hold_step_epoch_wall_time_metrics_and_flags(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(1, {"train/loss": 2.5})
    # Flushed at once: a killed process loses nothing.
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    writer.write(4, {"train/loss": 1.5, "knn/top1": 0.75}, final=True)
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, last = map(json.loads, lines)
    assert 0 <= first.pop("wall_s") <= last.pop("wall_s") < 60
    assert first == {"step": 1, "epoch": 0.4, "train/loss": 2.5}
    assert last == {
        "step": 4,
        "epoch": 1.6,
        "train/loss": 1.5,
        "knn/top1": 0.75,
        "final": True,
    }


def test_a_resumed_run_drops_the_lines_that_it_will_write_again(tmp_path):
    writer = open_writer(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, {"train/loss": float(step)})
    writer.close()
    resumed = open_writer(tmp_path, start_step=20)
    steps = [record["step"] for record in read_metrics(tmp_path)]
    assert steps == [10, 20]  # at once, before anything is written
    resumed.write(30, {"train/loss": -1.0})
    resumed.close()
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [10, 20, 30]
    assert records[-1]["train/loss"] == -1.0
    assert not list(tmp_path.glob("*.tmp"))


def test_wall_time_goes_on_over_a_resume(tmp_path):
    lines = [
        {"step": 10, "epoch": 4.0, "wall_s": 500.0},
        {"step": 20, "epoch": 8.0, "wall_s": 900.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    writer = open_writer(tmp_path, start_step=10)
    assert 500 <= writer.wall_s() < 560  # from the restored step, not the lost one
    writer.write(11, {})
    writer.close()
    assert 500 <= read_metrics(tmp_path)[-1]["wall_s"] < 560


@pytest.mark.parametrize("half", ['{"step": 20, "epo', "{", "\x00\x00\x00"])
def test_a_half_written_last_line_is_dropped(tmp_path, half):
    writer = open_writer(tmp_path)
    writer.write(10, {"train/loss": 1.0})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(half)
    assert [record["step"] for record in read_metrics(tmp_path)] == [10]
    resumed = open_writer(tmp_path, start_step=15)
    resumed.write(20, {"train/loss": 0.5})
    resumed.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]


def test_a_run_from_the_start_forgets_what_was_there(tmp_path):
    """Killed before its first checkpoint: the same command begins at step 0."""
    writer = open_writer(tmp_path)
    writer.write(10, {})
    writer.close()
    open_writer(tmp_path, start_step=0).close()
    assert read_metrics(tmp_path) == []


def test_read_metrics_without_a_file(tmp_path):
    assert read_metrics(tmp_path) == []
    assert read_metrics(str(tmp_path / "nowhere")) == []


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = open_writer(tmp_path)
    writer.write(1, {"train/loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


# --- TensorBoard ---


def read_events(workdir):
    """The records of the event files in the order in which they were made."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, offset = path.read_bytes(), 0
        while offset < len(data):
            (length,) = struct.unpack_from("<Q", data, offset)
            start = offset + 12  # length and its checksum
            events.append(Event.FromString(data[start : start + length]))
            offset = start + length + 4
    return events


def test_tensorboard_holds_the_scalars(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(5, {"train/loss": 2.5, "knn/top1": 0.5})
    writer.write(10, {"train/loss": 1.25})
    writer.close()
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in read_events(tmp_path)
        for value in event.summary.value
    ]
    assert scalars == [
        (5, "train/loss", 2.5),
        (5, "knn/top1", 0.5),
        (10, "train/loss", 1.25),
    ]


def test_tensorboard_forgets_steps_that_run_again(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(10, {"train/loss": 1.0})
    writer.write(30, {"train/loss": 3.0})
    writer.close()
    open_writer(tmp_path, start_step=20).close()
    restarts = [
        event.step
        for event in read_events(tmp_path)
        if event.session_log.status == SessionLog.START
    ]
    assert restarts == [21]


# --- trackers ---


class FakeRun:
    """Keeps what a tracker is told."""

    def __init__(self, **options):
        self.options, self.lines, self.finished = options, [], False

    def define_metric(self, name, step_metric):
        self.steps_of = (name, step_metric)

    def log(self, metrics, step=None):
        self.lines.append((step, metrics))

    def finish(self):
        self.finished = True


@pytest.fixture
def fake_trackers(monkeypatch):
    """Modules in the place of wandb and trackio; the runs that were opened, by name."""
    opened = {"wandb": [], "trackio": []}
    for name, runs in opened.items():
        module = types.ModuleType(name)

        def init(runs=runs, **options):
            runs.append(FakeRun(**options))
            return runs[-1]

        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.init = init
        module.Settings = dict
        module.log = lambda metrics, step, runs=runs: runs[-1].log(metrics, step)
        module.finish = lambda runs=runs: runs[-1].finish()
        monkeypatch.setitem(sys.modules, name, module)
    return opened


def test_trackers_get_every_line(tmp_path, fake_trackers, messages):
    config = {"seed": 3, "loss": {"name": "supcon"}}
    writer = open_writer(
        tmp_path, writers=("wandb", "trackio"), project="mine", config=config
    )
    writer.write(5, {"train/loss": 2.5, "knn/top1": 0.5})
    writer.write(10, {"train/loss": 1.25}, final=True)
    writer.close()
    (of_wandb,), (of_trackio,) = fake_trackers.values()
    assert of_wandb.lines == [
        (None, {"step": 5, "train/loss": 2.5, "knn/top1": 0.5}),
        (None, {"step": 10, "train/loss": 1.25}),
    ]
    assert of_wandb.steps_of == ("*", "step")
    assert of_trackio.lines == [
        (5, {"train/loss": 2.5, "knn/top1": 0.5}),
        (10, {"train/loss": 1.25}),
    ]
    for run in (of_wandb, of_trackio):
        assert run.finished and run.options["resume"] == "allow"
        assert run.options["project"] == "mine" and run.options["config"] == config
    assert messages == []
    assert not (tmp_path / "tensorboard").exists()
    assert [record["step"] for record in read_metrics(tmp_path)] == [5, 10]


def test_a_resumed_run_is_the_same_for_a_tracker(tmp_path, fake_trackers):
    for start_step in (0, 10, 0):
        writer = open_writer(
            tmp_path, start_step=start_step, writers=("wandb", "trackio")
        )
        writer.write(start_step + 10, {"train/loss": 1.0})
        writer.close()
    for runs, key in (
        (fake_trackers["wandb"], "id"),
        (fake_trackers["trackio"], "name"),
    ):
        first, resumed, anew = (run.options[key] for run in runs)
        assert first == resumed != anew


def test_a_run_writes_where_its_config_says(tmp_path, fake_trackers):
    config = pretrain_config(writers=("trackio",), project="digits", total_steps=2)
    config.knn.bank = 0
    pretrain(config, tmp_path)
    (run,) = fake_trackers["trackio"]
    assert run.finished and run.options["project"] == "digits"
    assert run.options["config"]["loss"]["name"] == "supcon"
    assert [step for step, _ in run.lines] == [1, 2]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("when", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [ConnectionError("no route\nto it"), SystemExit(1)])
def test_a_tracker_that_fails_is_one_warning(
    when, error, tmp_path, fake_trackers, messages, monkeypatch
):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(sys.modules["trackio"], when, fail)
    writer = open_writer(tmp_path, writers=("trackio", "tensorboard"))
    for step in range(1, 6):
        writer.write(step, {"train/loss": 1.0})
    writer.close()
    (message,) = messages
    reason = "no route" if isinstance(error, ConnectionError) else "1"
    assert message.startswith(f"warning: trackio gets no metrics ({reason}); the run")
    assert len(read_metrics(tmp_path)) == 5
    assert len(read_events(tmp_path)) >= 5


def test_a_tracker_that_hangs_slows_nothing(
    tmp_path, fake_trackers, messages, monkeypatch
):
    released = threading.Event()
    monkeypatch.setattr(
        sys.modules["wandb"], "init", lambda **options: released.wait(60)
    )
    monkeypatch.setattr(writers, "PATIENCE_S", 0.2)
    monkeypatch.setattr(writers, "WAITING", 3)
    writer = open_writer(tmp_path, writers=("wandb",))
    start = time.monotonic()
    for step in range(1, 11):
        writer.write(step, {})
    writer.close()
    assert time.monotonic() - start < 30  # it would hang for 60 s
    released.set()
    (message,) = messages
    assert message.startswith("warning: wandb gets no metrics (it does not answer)")
    assert len(read_metrics(tmp_path)) == 10


def test_the_end_does_not_wait_for_ever(tmp_path, fake_trackers, messages, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(sys.modules["trackio"], "finish", lambda: released.wait(60))
    monkeypatch.setattr(writers, "PATIENCE_S", 0.2)
    writer = open_writer(tmp_path, writers=("trackio",))
    writer.write(1, {})
    writer.close()
    released.set()
    assert "it did not take the last lines within" in messages[0]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_missing_is_named(name, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == name else find(n)
    )
    config = pretrain_config(writers=(name,))
    with pytest.raises(ValueError, match=rf"pip install {name}.*\(--config.writers\)"):
        open_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [("mlflow",), ("wandb", "wandb"), (1,), ([],)])
def test_unknown_writers_are_refused(value):
    with pytest.raises(ValueError, match="allowed: a tuple of tensorboard, wandb, "):
        check_config(pretrain_config(writers=value))


def test_wandb_itself_offline(tmp_path, messages, monkeypatch):
    """The real package, writing to a folder; nothing is sent."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = open_writer(tmp_path, writers=("wandb",), config={"seed": 1})
    writer.write(5, {"train/loss": 2.5})
    monkeypatch.setattr(writers, "PATIENCE_S", 60.0)
    writer.close()
    assert messages == []
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    # Another process of wandb writes the file.
    until = time.monotonic() + 30
    while b"train/loss" not in record.read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    content = record.read_bytes()
    assert b"train/loss" in content and b"seed" in content


def test_trackio_itself(tmp_path, messages, monkeypatch):
    """The real package, in a folder of its own."""
    code = """
import pathlib, sys
from supcon_jax import writers
writers.PATIENCE_S = 60.0
writer = writers.MetricWriter(
    pathlib.Path(sys.argv[1]), total_steps=10, steps_per_epoch=1, writers=("trackio",)
)
writer.write(5, {"train/loss": 2.5})
writer.close()
"""
    pytest.importorskip("trackio")
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, check=True
    )
    (database,) = (tmp_path / "trackio").rglob("supcon_jax.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        ((step, metrics),) = connection.execute("select step, metrics from metrics")
    assert step == 5 and "train/loss" in str(metrics)


# --- terminal ---


def test_progress_line(tmp_path, messages):
    writer = open_writer(tmp_path)
    metrics = {
        "train/loss": 1.23456,
        "train/collapse_loss": 5.5,
        "train/images_per_sec": 12345.6,
        "optim/learning_rate": 0.05,
        "train/unknown": 1.0,
    }
    writer.log_progress(25, metrics, eta_s=185)
    writer.close()
    assert messages == [
        "step  25/100   25%  loss 1.2346  (collapse 5.5000)  lr 0.05  12,345.6 images/s"
        "  ETA 3m05s"
    ]
