"""Pictures of a run. matplotlib is imported when one is drawn; without it there is none."""

from __future__ import annotations

import pathlib

from supcon_jax.metrics import METRICS
from supcon_jax.writers import read_metrics


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
    panels = {"loss": (1, "loss"), "accuracy": (100, "accuracy (%)")}
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, len(panels)), strict=True))
    for name, metric in METRICS.items():
        factor, _ = panels.get(metric.panel, (1, ""))
        points = [(r["epoch"], factor * r[name]) for r in records if name in r]
        if metric.panel and points:
            axes[metric.panel].plot(
                *zip(*points, strict=True), metric.style, label=name, markersize=3
            )
    for panel, axis in axes.items():
        axis.set(xlabel="epoch", ylabel=panels[panel][1])
        if axis.lines:
            axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    path = workdir / "figures" / "curves.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
