"""metrics.jsonl over crashes and resumes, durations, TensorBoard, pictures."""

import json
import logging
import struct
import sys
import time

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from supcon_jax import writers
from supcon_jax.writers import MetricWriter, format_duration, plot_curves, read_metrics


def open_writer(workdir, start_step=0):
    return MetricWriter(
        workdir, total_steps=100, steps_per_epoch=2.5, start_step=start_step
    )


@pytest.fixture
def messages():
    """What the program's logger says."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    level = writers.logger.level
    writers.logger.addHandler(handler)
    writers.logger.setLevel(logging.INFO)
    yield records
    writers.logger.removeHandler(handler)
    writers.logger.setLevel(level)


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


# --- terminal and log.txt ---


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (42.4, "42s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.7, "1h00m"),
        (7620, "2h07m"),
        (86_399, "23h59m"),
        (86_400, "1d00h"),
        (5 * 86_400 + 3 * 3600 + 59, "5d03h"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


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


def test_progress_of_long_passes(monkeypatch, messages):
    clock = iter([0.0, 0.0, 6.0, 12.0, 18.0, 24.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    out = list(writers.progress("abcde", total=5, label="embedding"))
    assert out == list("abcde")
    # After more than ten seconds each: items 2 and 4, at 12 s and 24 s.
    assert messages == [
        "  embedding 2/5 (40%)  ETA 18s",
        "  embedding 4/5 (80%)  ETA 6s",
    ]


def test_short_passes_say_nothing(messages):
    assert list(writers.progress(range(3), total=3, label="x")) == [0, 1, 2]
    assert messages == []


def test_log_file(tmp_path):
    level = writers.logger.level
    writers.logger.setLevel(logging.INFO)
    handler = writers.add_log_file(tmp_path)
    try:
        writers.logger.info("step %d", 7)
    finally:
        writers.logger.removeHandler(handler)
        writers.logger.setLevel(level)
        handler.close()
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.endswith(" step 7") and line[:2] == "20"  # the date in front


# --- pictures ---


def write_curve(workdir, steps):
    writer = open_writer(workdir)
    for step in range(1, steps + 1):
        writer.write(step, {"train/loss": 1 / step, "knn/top1": 1 - 1 / step})
    writer.close()


def test_plot_is_a_picture(tmp_path):
    write_curve(tmp_path, 3)
    path = plot_curves(tmp_path)
    assert path == tmp_path / "figures" / "curves.png"
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1080, 420)


def test_nothing_is_drawn_of_one_point_or_without_matplotlib(tmp_path, monkeypatch):
    write_curve(tmp_path, 1)
    assert plot_curves(tmp_path) is None
    (tmp_path / "metrics.jsonl").unlink()
    write_curve(tmp_path, 2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_curves(tmp_path) is None
    assert not (tmp_path / "figures").exists()
