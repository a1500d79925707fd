"""The curves of a run."""

import json
import struct
import sys

from supcon_jax.figures import plot_curves


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
