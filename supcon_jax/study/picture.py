"""The picture of a study: what was measured beside what the paper has."""

from __future__ import annotations

import io
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from supcon_jax.figures import new_figure

# See `_leave_outliers_out`.
FAR = 3.0


class Line(NamedTuple):
    """One line, or one set of points, of a study's picture.

    Attributes:
      name: in the legend; "" where there is one alone.
      places: along the axis, numbers or names as texts.
      values: at each place those of all seeds.
      halves: at each place half of an interval, to be drawn in the place of the deviation.
    """

    name: str
    places: list[str]
    values: list[list[float]]
    halves: list[float] | None = None


def plot_study(
    title: str, panels: Mapping[str, Sequence[Line]], labels: Mapping[str, str]
) -> bytes | None:
    """A PNG of a study: means over the seeds with their deviation, and each seed.

    Args:
      title: of the whole.
      panels: title of a panel -> its lines. Places that are numbers lie where they belong,
        names below each other. A line of a name has the same colour in all panels.
      labels: of the axis of all places under "x", of the values under a panel's title.
    """
    panels = {name: lines for name, lines in panels.items() if lines}
    lines = [line for lines in panels.values() for line in lines]
    places = list(dict.fromkeys(place for line in lines for place in line.places))
    names = list(dict.fromkeys(line.name for line in lines))
    height = max(3.6, 0.3 * len(places) * max(1, len(names) / 2) + 1.6)
    if not places or (figure := new_figure(4.8 * len(panels), height)) is None:
        return None
    numeric = len(places) > 1 and all(_number(place) is not None for place in places)
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    drawn = {}
    for axis, (panel, panel_lines) in zip(axes, panels.items(), strict=True):
        for line in panel_lines:
            number = names.index(line.name)
            where = (
                [_number(place) for place in line.places]
                if numeric
                else _rows(line, places, names)
            )
            drawn[line.name] = _plot_line(axis, line, where, f"C{number}", numeric)
        if any(line.halves for line in panel_lines):
            (axis.axhline if numeric else axis.axvline)(0, color="black", linewidth=0.8)
        if not numeric:
            _leave_outliers_out(axis, panel_lines, places, names)
        _name_axes(axis, places, labels["x"], labels[panel], numeric, axis is axes[0])
        axis.set_title(textwrap.fill(panel, 44), fontsize="medium")
        axis.grid(alpha=0.3)
    if any(names):
        figure.legend(
            drawn.values(),
            drawn.keys(),
            loc="outside lower center",
            ncols=min(len(names), 4),
            fontsize="small",
        )
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    return content.getvalue()


def _rows(line: Line, places: list[str], names: list[str]) -> list[float]:
    """Where a line lies at each of its places: those of all names side by side."""
    shift = 0.8 / len(names) * (names.index(line.name) - (len(names) - 1) / 2)
    return [places.index(place) + shift for place in line.places]


def _leave_outliers_out(
    axis: Any, lines: Sequence[Line], places: list[str], names: list[str]
) -> None:
    """Values far from all others are written at the border, so that the others can be told apart.

    Far is what is farther from the middle half than `FAR` times its width, where without it
    the axis would be `FAR` times as long.
    """
    means = [statistics.fmean(values) for line in lines for values in line.values]
    if len(means) < 4:
        return
    low, _, high = statistics.quantiles(means, n=4, method="inclusive")
    least, most = low - FAR * (high - low), high + FAR * (high - low)
    near = [mean for mean in means if least <= mean <= most]
    if max(means) - min(means) <= FAR * (max(near) - min(near)):
        return
    shown = []
    for line in lines:
        halves = line.halves or [0.0] * len(line.values)
        for row, values, half in zip(
            _rows(line, places, names), line.values, halves, strict=True
        ):
            mean = statistics.fmean(values)
            if least <= mean <= most:
                shown += [*values, mean - half, mean + half]
                continue
            left = mean < least
            axis.text(
                0.01 if left else 0.99,
                row,
                f"\N{LEFTWARDS ARROW} {mean:.1f}"
                if left
                else f"{mean:.1f} \N{RIGHTWARDS ARROW}",
                color=f"C{names.index(line.name)}",
                ha="left" if left else "right",
                va="center",
                fontsize="small",
                transform=axis.get_yaxis_transform(),
            )
    margin = 0.05 * (max(shown) - min(shown))
    axis.set_xlim(min(shown) - margin, max(shown) + margin)


def _plot_line(
    axis: Any, line: Line, where: list[Any], color: str, numeric: bool
) -> Any:
    """Means with their deviation or interval, and where there are several, each seed."""
    means = [statistics.fmean(values) for values in line.values]
    spread = line.halves or [
        statistics.stdev(values) if len(values) > 1 else 0.0 for values in line.values
    ]
    style = {"markersize": 4, "capsize": 2, "color": color}
    if numeric:
        drawn = axis.errorbar(where, means, yerr=spread, fmt="o-", **style)
    else:
        drawn = axis.errorbar(means, where, xerr=spread, fmt="o", **style)
    for place, values in zip(where, line.values, strict=True):
        if len(values) > 1:
            points = ([place] * len(values), values)
            points = points if numeric else points[::-1]
            axis.plot(*points, ".", markersize=5, alpha=0.4, color=color)
    return drawn


def _name_axes(
    axis: Any, places: list[str], along: str, label: str, numeric: bool, first: bool
) -> None:
    if not numeric:
        axis.set_yticks(range(len(places)), places if first else [])
        axis.set(ylim=(len(places) - 0.5, -0.5), xlabel=label)
        if first:
            axis.set_ylabel(along)
        return
    found = [x for x in map(_number, places) if x is not None]
    if min(found) > 0 and max(found) / min(found) >= 8:
        axis.set_xscale("log")
        axis.set_xticks(found, places)
        axis.minorticks_off()
    axis.set(xlabel=along, ylabel=label)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
