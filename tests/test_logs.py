"""The log for people: durations, progress of long passes, log.txt."""

import logging
import time

import pytest

from supcon_jax import logs
from supcon_jax.logs import format_duration


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


def test_progress_of_long_passes(monkeypatch, messages):
    clock = iter([0.0, 0.0, 6.0, 12.0, 18.0, 24.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    out = list(logs.progress("abcde", total=5, label="embedding"))
    assert out == list("abcde")
    # After more than ten seconds each: items 2 and 4, at 12 s and 24 s.
    assert messages == [
        "  embedding 2/5 (40%)  ETA 18s",
        "  embedding 4/5 (80%)  ETA 6s",
    ]


def test_short_passes_say_nothing(messages):
    assert list(logs.progress(range(3), total=3, label="x")) == [0, 1, 2]
    assert messages == []


def test_log_file(tmp_path):
    level = logs.logger.level
    logs.logger.setLevel(logging.INFO)
    handler = logs.add_log_file(tmp_path)
    try:
        logs.logger.info("step %d", 7)
    finally:
        logs.logger.removeHandler(handler)
        logs.logger.setLevel(level)
        handler.close()
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.endswith(" step 7") and line[:2] == "20"  # the date in front
