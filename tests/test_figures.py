"""The curves of a run."""

import json
import struct
import sys

import numpy as np

from supcon_jax.evaluate import write_classes
from supcon_jax.evaluation.gradients import CosineBin
from supcon_jax.figures import plot_curves, plot_gradients


def write_curve(workdir, steps):
    lines = [
        {"step": n, "epoch": n / 2, "train/loss": 1 / n, "knn/top1": 1 - 1 / n}
        for n in range(1, steps + 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text)


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


def test_names_with_dollars_and_of_other_encodings_are_drawn_and_written(tmp_path):
    """Between two dollars matplotlib reads a formula, and refuses one that is none."""
    names = ("$5_$ notes", "a$b", "caf\udce9", "plain")
    write_classes(tmp_path, np.eye(4, dtype=int), names)
    assert (tmp_path / "figures/confusion.png").read_bytes().startswith(b"\x89PNG")
    for file in ("classes.csv", "confusion.csv"):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert "$5_$ notes" in text and "a$b" in text and r"caf\udce9" in text
    panel = {("positive", "L_out"): [CosineBin(-1, 1, 2, 1.0, 0.5, 2.0)]}
    plot_gradients(str(tmp_path / "a.png"), {"$x_$": panel})
    assert (tmp_path / "a.png").exists()
