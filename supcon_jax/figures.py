"""Pictures of a run and of an evaluation. matplotlib is imported when one is drawn; without it there is none."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from supcon_jax import storage
from supcon_jax.evaluation.corruption import CORRUPTIONS, SEVERITIES, Published
from supcon_jax.evaluation.gradients import CosineBin
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
    if (figure := new_figure(9, 3.5)) is None:
        return None
    panels = {"loss": (1, "loss"), "accuracy": (100, "accuracy (%)")}
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
    return _save(figure, workdir, "curves")


def plot_reliability(
    workdir: pathlib.Path,
    before: tuple[np.ndarray, np.ndarray, np.ndarray],
    after: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> pathlib.Path | None:
    """Draws `figures/reliability.png`: how often predictions are right, by confidence.

    Args:
      workdir: a folder.
      before, after: `calibration.reliability` without and with temperature scaling.
    """
    if (figure := new_figure(8, 4)) is None:
        return None
    titles = ("as trained", "with temperature scaling")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, title, (counts, mean, share) in zip(
        panels, titles, (before, after), strict=True
    ):
        bins = len(counts)
        centres = (np.arange(bins) + 0.5) / bins
        full = counts > 0
        axis.plot([0, 1], [0, 1], "k--", linewidth=1, label="calibrated")
        axis.bar(
            centres[full], share[full], width=0.9 / bins, alpha=0.8, label="share right"
        )
        axis.plot(mean[full], share[full], "o", markersize=3, color="tab:red")
        axis.bar(
            centres,
            counts / max(counts.sum(), 1),
            width=0.9 / bins,
            color="0.6",
            alpha=0.5,
            label="share of predictions",
        )
        axis.set(title=title, xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("share")
    panels[0].legend(fontsize="small", loc="upper left")
    return _save(figure, workdir, "reliability")


def plot_confusion(
    workdir: pathlib.Path, matrix: np.ndarray, names: Sequence[str] = ()
) -> pathlib.Path | None:
    """Draws `figures/confusion.png`: classes by what they were taken for, in percent.

    Args:
      workdir: a folder.
      matrix: `[C, C]` counts, rows are the true classes.
      names: of the classes.
    """
    count = len(matrix)
    side = min(max(4.0, 0.45 * count + 1.5), 14.0)
    if (figure := new_figure(side + 1, side)) is None:
        return None
    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axis = figure.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axis, label="% of the class", shrink=0.8)
    axis.set(xlabel="predicted", ylabel="class")
    if count <= 30:
        labels = [plain(name[:16]) for name in names] or [str(c) for c in range(count)]
        axis.set_xticks(range(count), labels, rotation=90 if names else 0)
        axis.set_yticks(range(count), labels)
        for row, column in np.argwhere(matrix > 0):
            axis.text(
                column,
                row,
                f"{share[row, column]:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if share[row, column] > 50 else "black",
            )
    return _save(figure, workdir, "confusion")


def plot_gradients(
    out: str, panels: Mapping[str, Mapping[tuple[str, str], Sequence[CosineBin]]]
) -> bool:
    """Draws the lengths of pairs' parts of the gradient by their cosine.

    Args:
      out: the picture to write.
      panels: title of a column -> ("positive" or "negative", name of a loss) -> bins.

    Returns:
      Whether it was drawn: not without matplotlib.
    """
    kinds = ("positive", "negative")
    if (figure := new_figure(1 + 3.6 * len(panels), 5.6)) is None:
        return False
    axes = figure.subplots(
        len(kinds), len(panels), squeeze=False, sharex=True, sharey="row"
    )
    for column, (title, curves) in enumerate(panels.items()):
        for row, kind in enumerate(kinds):
            axis = axes[row, column]
            for (of, loss), bins in curves.items():
                if of != kind or not bins:
                    continue
                centres = [(one.low + one.high) / 2 for one in bins]
                # Two losses may have one curve, so the second one has gaps.
                style = "--s" if axis.lines else "-o"
                (line,) = axis.plot(
                    centres, [one.mean for one in bins], style, markersize=3, label=loss
                )
                axis.fill_between(
                    centres,
                    [one.least for one in bins],
                    [one.most for one in bins],
                    color=line.get_color(),
                    alpha=0.15,
                    linewidth=0,
                )
            axis.set(yscale="log", xlim=(-1, 1), xticks=np.linspace(-1, 1, 5))
            axis.grid(alpha=0.3)
            if row == 0:
                axis.set_title(plain(title), fontsize="medium")
                axis.legend(fontsize="small")
            else:
                axis.set_xlabel("cosine of anchor and other view")
            if column == 0:
                axis.set_ylabel(f"{kind}s: length of a pair's part")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format=pathlib.PurePath(out).suffix[1:] or "png")
    storage.write(out, picture.getvalue())
    return True


def plot_robustness(
    workdir: pathlib.Path,
    top1: Mapping[str, float],
    ece: Mapping[str, float],
    published: Mapping[str, Published],
) -> pathlib.Path | None:
    """Draws `figures/robustness.png`: accuracy and calibration under corruption.

    Args:
      workdir: a folder.
      top1, ece: of "clean" and of each "corruption_severity" that there is.
      published: what others have, for the lines by severity.
    """
    if (figure := new_figure(13, 7)) is None:
        return None
    panels = figure.subplot_mosaic(
        [["corruptions", "corruptions"], ["top1", "ece"]], height_ratios=(1.2, 1)
    )
    axis, colours = panels["corruptions"], _shades(len(SEVERITIES))
    for number, severity in enumerate(SEVERITIES):
        found = [100 * top1.get(f"{c}_{severity}", np.nan) for c in CORRUPTIONS]
        places = np.arange(len(CORRUPTIONS)) + 0.16 * (number - 2)
        axis.bar(places, found, 0.15, color=colours[number], label=f"{severity}")
    axis.axhline(100 * top1["clean"], color="black", linestyle="--", linewidth=1)
    axis.set(ylabel="top-1 (%)", ylim=(0, 100), title="by corruption (dashed: clean)")
    names = [corruption.replace("_", "\n") for corruption in CORRUPTIONS]
    axis.set_xticks(range(len(CORRUPTIONS)), names, fontsize="small")
    axis.set_xlim(-0.6, len(CORRUPTIONS) - 0.4)
    axis.legend(title="severity", loc="center left", bbox_to_anchor=(1, 0.5))
    for key, values, factor in (("top1", top1, 100), ("ece", ece, 1)):
        axis = panels[key]
        lines = {"this run": [values["clean"], *_by_severity(values)]}
        lines |= {
            name: list(getattr(theirs, key)) for name, theirs in published.items()
        }
        for name, line in lines.items():
            ours = name == "this run"
            axis.plot(
                range(len(line)),
                factor * np.asarray(line),
                "o-" if ours else "--",
                color="black" if ours else None,
                linewidth=2 if ours else 1,
                markersize=4,
                label=name,
            )
        if published:
            axis.legend(fontsize="small")
        unit = "top-1 (%)" if key == "top1" else "ECE"
        axis.set(xlabel="severity", ylabel=unit, title="mean over the corruptions")
        axis.set_xticks(range(6), ["clean", *map(str, SEVERITIES)])
        axis.set_ylim(0, 100 if key == "top1" else None)
    for axis in panels.values():
        axis.grid(alpha=0.3, axis="y")
    return _save(figure, workdir, "robustness")


def draw_corruptions(
    image: np.ndarray, corrupted: Mapping[str, Mapping[int, np.ndarray]]
) -> bytes | None:
    """A PNG of one image under corruptions: a column each, a row a severity.

    Args:
      image: `[S, S, 3]` uint8.
      corrupted: corruption -> severity -> `[S, S, 3]`.
    """
    severities = sorted(
        {severity for shown in corrupted.values() for severity in shown}
    )
    height = 1.1 * len(severities) + 0.5
    if (figure := new_figure(1.1 * len(corrupted) + 1.5, height)) is None:
        return None
    axes = figure.subplots(len(severities), 1 + len(corrupted), squeeze=False)
    columns = {"clean": {severities[0]: image}} | dict(corrupted)
    for column, (name, images) in enumerate(columns.items()):
        axes[0, column].set_title(name.replace("_", "\n"), fontsize=8)
        for row, severity in enumerate(severities):
            axis = axes[row, column]
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(severity in images)
            if severity in images:
                axis.imshow(images[severity], interpolation="nearest")
            if column == 1:
                axis.set_ylabel(f"severity {severity}", fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    return content.getvalue()


def _by_severity(values: Mapping[str, float]) -> list[float]:
    """Means over the corruptions; NaN at a severity that one of them lacks."""
    return [
        float(np.mean([values.get(f"{c}_{severity}", np.nan) for c in CORRUPTIONS]))
        for severity in SEVERITIES
    ]


def _shades(count: int) -> list[Any]:
    """Colours from light to dark."""
    from matplotlib import colormaps

    return [colormaps["viridis_r"](0.15 + 0.8 * n / count) for n in range(count)]


def plain(name: str) -> str:
    """A name that users gave, as matplotlib draws it: two dollars are no formula.

    Folders may have names that are not UTF-8, which a font cannot take.
    """
    return name.encode(errors="backslashreplace").decode().replace("$", r"\$")


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, workdir: pathlib.Path, name: str) -> pathlib.Path:
    path = workdir / "figures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
