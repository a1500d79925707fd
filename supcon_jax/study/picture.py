"""The picture of a study: what was measured beside what the paper has."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from supcon_jax.figures import new_figure


class Line(NamedTuple):
    """One line, or one set of points, of a study's picture.

    Attributes:
      name: in the legend; "" where there is one alone.
      places: along the axis, numbers or names as texts.
      values: at each place those of all seeds.
    """

    name: str
    places: list[str]
    values: list[list[float]]


def plot_study(
    title: str, panels: Mapping[str, Sequence[Line]], labels: Mapping[str, str]
) -> bytes | None:
    """A PNG of a study: means over the seeds with their deviation, and each seed.

    Args:
      title: of the whole.
      panels: title of a panel -> its lines. Places that are numbers lie where they belong,
        names below each other.
      labels: of the axis of all places under "x", of the values under a panel's title.
    """
    panels = {name: lines for name, lines in panels.items() if lines}
    places = list(
        dict.fromkeys(p for lines in panels.values() for x in lines for p in x.places)
    )
    if (
        not places
        or (figure := new_figure(5.2 * len(panels), max(3.6, 0.32 * len(places) + 1.6)))
        is None
    ):
        return None
    numeric = len(places) > 1 and all(_number(place) is not None for place in places)
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        for number, line in enumerate(lines):
            means = [statistics.fmean(v) for v in line.values]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in line.values]
            shift = 0.12 * (number - (len(lines) - 1) / 2)
            if numeric:
                where = [_number(place) for place in line.places]
                (drawn, *_) = axis.errorbar(
                    where,
                    means,
                    spread,
                    fmt="o-",
                    markersize=4,
                    capsize=2,
                    label=line.name,
                )
            else:
                where = [places.index(place) + shift for place in line.places]
                (drawn, *_) = axis.errorbar(
                    means,
                    where,
                    xerr=spread,
                    fmt="o",
                    markersize=5,
                    capsize=2,
                    label=line.name,
                )
            for place, values in zip(where, line.values, strict=True):
                points = ([place] * len(values), values)
                axis.plot(
                    *(points if numeric else points[::-1]),
                    ".",
                    markersize=5,
                    alpha=0.5,
                    color=drawn.get_color(),
                )
        if numeric:
            found = [x for x in map(_number, places) if x is not None]
            if min(found) > 0 and max(found) / min(found) >= 8:
                axis.set_xscale("log")
                axis.set_xticks(found, places)
                axis.minorticks_off()
            axis.set(xlabel=labels["x"], ylabel=labels[name])
        else:
            axis.set_yticks(range(len(places)), places)
            axis.set(ylim=(len(places) - 0.5, -0.5), xlabel=labels[name])
            if axis is axes[0]:
                axis.set_ylabel(labels["x"])
        axis.set_title(name, fontsize="medium")
        axis.grid(alpha=0.3)
        if any(line.name for line in lines):
            axis.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    return content.getvalue()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
