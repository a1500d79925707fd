"""Everything a run writes for people: terminal, log.txt, metrics.jsonl, TensorBoard.

The only file that knows these formats. In a multi-host job only process 0 writes.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
from absl import logging as absl_logging

logger = logging.getLogger("supcon_jax")
T = TypeVar("T")

# What the terminal shows of a log line, in this order; the files hold everything.
_SHOWN = {
    "train/loss": "loss {:.4f}",
    "train/collapse_loss": "(collapse {:.4f})",
    "train/contrastive_top1": "contrastive top-1 {:.1%}",
    "train/top1": "top-1 {:.1%}",
    "optim/learning_rate": "lr {:.3g}",
    "train/images_per_sec": "{:,.1f} images/s",
}


def setup_logging() -> None:
    """Sends the program's log to the terminal (of process 0 only)."""
    logger.setLevel(logging.INFO)
    # Orbax and TFDS narrate every save through absl; their warnings stay.
    absl_logging.set_verbosity(absl_logging.WARNING)
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(lambda record: jax.process_index() == 0)
        logger.addHandler(handler)


def format_duration(seconds: float) -> str:
    """Seconds as 42s, 3m05s, 2h07m or 5d03h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86_400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86_400}d{seconds % 86_400 // 3600:02d}h"


def progress(
    items: Iterable[T], *, total: int, label: str, every_s: float = 10.0
) -> Iterator[T]:
    """Passes items on and logs share and ETA, where it takes longer than `every_s`."""
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last > every_s:
            last = now
            eta = format_duration((now - start) / done * (total - done))
            logger.info(
                "  %s %d/%d (%.0f%%)  ETA %s",
                label,
                done,
                total,
                100 * done / total,
                eta,
            )
        yield item


class MetricWriter:
    """Writes the metrics of one run; a resumed run takes up where it restored.

    Args:
      workdir: an existing folder.
      total_steps: length of the run, for share and ETA.
      steps_per_epoch: for the "epoch" field; may be fractional.
      start_step: step that was restored. Lines of later steps (written by a process
        that was killed before its next checkpoint) are dropped, as those steps run
        again.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        total_steps: int,
        steps_per_epoch: float,
        start_step: int = 0,
    ):
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._start_time = time.monotonic()
        self._active = jax.process_index() == 0
        self._wall_before = 0.0
        if not self._active:
            return
        self._path = workdir / "metrics.jsonl"
        earlier = [r for r in read_metrics(workdir) if r["step"] <= start_step]
        self._wall_before = max((r["wall_s"] for r in earlier), default=0.0)
        if earlier or self._path.exists():
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in earlier))
            os.replace(temporary, self._path)
        self._file = self._path.open("a")
        from tensorboardX import SummaryWriter

        self._tensorboard = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start_step + 1 if earlier else None
        )

    def write(self, step: int, metrics: dict[str, float], **flags: bool) -> None:
        """Appends one line to metrics.jsonl and the scalars to TensorBoard."""
        if not self._active:
            return
        record = {
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 4),
            "wall_s": round(self.wall_s(), 3),
            **metrics,
            **flags,
        }
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def log_progress(self, step: int, metrics: dict[str, float], eta_s: float) -> None:
        """One line of progress for the terminal and log.txt."""
        width = len(str(self._total_steps))
        shown = [
            text.format(metrics[name])
            for name, text in _SHOWN.items()
            if name in metrics
        ]
        logger.info(
            "step %*d/%d %4.0f%%  %s  ETA %s",
            width,
            step,
            self._total_steps,
            100 * step / self._total_steps,
            "  ".join(shown),
            format_duration(eta_s),
        )

    def wall_s(self) -> float:
        """Seconds that this run has taken, those before a resume included."""
        return self._wall_before + time.monotonic() - self._start_time

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._active:
            self._file.close()
            self._tensorboard.close()


def read_metrics(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a workdir's metrics.jsonl; a half-written last line is left out."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def add_log_file(workdir: pathlib.Path) -> logging.Handler:
    """Copies the log into `workdir/log.txt`, with the time in front."""
    first = jax.process_index() == 0
    handler = logging.FileHandler(workdir / "log.txt" if first else os.devnull)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    return handler


def plot_curves(workdir: pathlib.Path) -> pathlib.Path | None:
    """Draws loss and accuracies over the epochs into `workdir/figures/curves.png`.

    Returns:
      The picture's path; None where there is nothing to draw or no matplotlib.
    """
    records = read_metrics(workdir)
    if len(records) < 2:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss_axis, accuracy_axis = figure.subplots(1, 2)
    for name, style in (
        ("train/loss", "-"),
        ("train/collapse_loss", "--"),
        ("eval/loss", "o-"),
    ):
        points = [(r["epoch"], r[name]) for r in records if name in r]
        if points:
            loss_axis.plot(*zip(*points, strict=True), style, label=name, markersize=3)
    for name in ("knn/top1", "eval/top1", "train/contrastive_top1", "train/top1"):
        points = [(r["epoch"], 100 * r[name]) for r in records if name in r]
        if points:
            style = "-" if name.startswith("train") else "o-"
            accuracy_axis.plot(
                *zip(*points, strict=True), style, label=name, markersize=3
            )
    loss_axis.set(xlabel="epoch", ylabel="loss")
    accuracy_axis.set(xlabel="epoch", ylabel="accuracy (%)")
    for axis in (loss_axis, accuracy_axis):
        if axis.lines:
            axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    path = workdir / "figures" / "curves.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
