"""Charts as SVG text: lines, bars, points, a reliability diagram and a matrix.

Colours are those of `style.css` (`c0` to `c7`), so that a chart is right in light and dark.
What moves under the pointer is `script.js`, which reads what is drawn here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

COLOURS = 8
# Of a chart, in units that a page shows as about a pixel each.
WIDTH, HEIGHT = 420, 260
# Points of a curve that are drawn; more cannot be told apart.
MOST_POINTS = 400
DASHES = ("", "6 4", "2 3", "9 3 2 3")
SHAPES = 2  # of points in a map, see `scatter`


class Series(NamedTuple):
    """A curve.

    Attributes:
      name: what it is called under the pointer.
      x, y: its points; those that are not finite are left out.
      colour: number of its colour.
      dash: number of its dashes; 0 is a plain line.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dash: int = 0


class Frame:
    """The box of a chart: where values lie in it, and its axes.

    Args:
      x, y: (least, most) value of each axis.
      left, bottom: room for the labels.
      width, height: of the whole chart.
    """

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        left: int = 56,
        bottom: int = 40,
        width: int = WIDTH,
        height: int = HEIGHT,
    ):
        self.left, self.top = left, 10
        self.right, self.bottom = width - 12, height - bottom
        self.width, self.height = width, height
        self._x, self._y = x, y

    def x(self, value: float) -> float:
        """The place of a value of the horizontal axis."""
        low, high = self._x
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        """The place of a value of the vertical axis."""
        low, high = self._y
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def axes(
        self, x_label: str, y_label: str, *, x_ticks: bool = True, y_ticks: bool = True
    ) -> str:
        """Grid, numbers and the labels of both axes."""
        parts = []
        for value in ticks(*self._y) if y_ticks else ():
            at = self.y(value)
            parts.append(
                f'<path class="rule" d="M{self.left} {at:.1f}H{self.right}"/>'
                f'<text x="{self.left - 6}" y="{at + 4:.1f}" class="end">'
                f"{short(value)}</text>"
            )
        for value in ticks(*self._x) if x_ticks else ():
            parts.append(
                f'<text x="{self.x(value):.1f}" y="{self.bottom + 16}" class="mid">'
                f"{short(value)}</text>"
            )
        middle = (self.top + self.bottom) / 2
        parts.append(
            f'<path class="axis" d="M{self.left} {self.top}V{self.bottom}'
            f'H{self.right}"/>'
            f'<text x="{(self.left + self.right) / 2:.0f}" y="{self.height - 6}" '
            f'class="mid">{escape(x_label)}</text>'
            f'<text transform="translate(12 {middle:.0f}) rotate(-90)" class="mid">'
            f"{escape(y_label)}</text>"
        )
        return "".join(parts)

    def svg(self, content: str, *, label: str, kind: str = "") -> str:
        """The chart with its content; script.js reads the frame from its attributes."""
        frame = (*self._x, *self._y, self.left, self.right, self.bottom, self.top)
        numbers = " ".join(f"{value:.6g}" for value in frame)
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'class="{kind}" aria-label="{escape(label)}" data-frame="{numbers}">'
            f"{content}</svg>"
        )


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str
) -> str:
    """Curves over one horizontal axis; nothing where no curve has a point."""
    drawn = [(one, _points(one)) for one in series]
    drawn = [(one, points) for one, points in drawn if len(points)]
    if not drawn:
        return ""
    everything = np.concatenate([points for _, points in drawn])
    low, high = everything.min(axis=0), everything.max(axis=0)
    frame = Frame(rounded(low[0], high[0]), rounded(low[1], high[1]))
    parts, told = [frame.axes(x_label, y_label)], []
    for one, points in drawn:
        places = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        parts.append(
            f'<polyline class="line c{one.colour % COLOURS}" points="{places}" '
            f'stroke-dasharray="{DASHES[one.dash % len(DASHES)]}" '
            f'data-name="{escape(one.name)}"/>'
        )
        if len(points) <= 12:
            parts += [
                f'<circle class="dot c{one.colour % COLOURS}" r="3" '
                f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}"/>'
                for x, y in points
            ]
        told.append(f"{one.name} from {points[0][1]:.4g} to {points[-1][1]:.4g}")
    return frame.svg("".join(parts), label=f"{title}: {'; '.join(told)}", kind="lines")


def bar_chart(
    groups: Sequence[str],
    series: Sequence[Series],
    *,
    title: str,
    y_label: str,
    most: float,
) -> str:
    """Bars in groups, one of each series.

    Args:
      groups: names of the groups.
      series: `x` says to which group a value belongs; a group may lack one.
      title: what it shows.
      y_label: name and unit of the values.
      most: end of the vertical axis, which begins at 0.
    """
    slot = max(28, 10 * len(series) + 8)
    width = max(WIDTH, 70 + slot * len(groups))
    frame = Frame((0, len(groups)), (0, most), bottom=110, width=width, height=320)
    parts = [frame.axes("", y_label, x_ticks=False)]
    room = frame.x(1) - frame.x(0)
    thickness = 0.8 * room / len(series)
    for number, one in enumerate(series):
        for place, value in zip(one.x, one.y, strict=True):
            left = frame.x(place) + 0.1 * room + number * thickness
            top = frame.y(min(value, most))
            told = f"{one.name}, {groups[int(place)]}: {value:.4g}"
            parts.append(
                f'<rect class="bar c{one.colour % COLOURS}" x="{left:.1f}" '
                f'y="{top:.1f}" width="{thickness - 1:.1f}" '
                f'height="{frame.bottom - top:.1f}">'
                f"<title>{escape(told)}</title></rect>"
            )
    for place, group in enumerate(groups):
        at = frame.x(place + 0.5) + 4
        parts.append(
            f'<text class="end" transform="translate({at:.1f} {frame.bottom + 10}) '
            f'rotate(-50)">{escape(_cut(group, 20))}</text>'
        )
    svg = frame.svg("".join(parts), label=title, kind="bars")
    return f'<div class="wide" style="--natural:{width}px">{svg}</div>'


def scatter(points: np.ndarray, labels: np.ndarray, *, title: str) -> str:
    """Points in two dimensions, coloured by class.

    Colours repeat after 8 classes, with another shape, and all again after 16; who points
    at one is told its class.

    Args:
      points: `[n, 2]`.
      labels: `[n]` classes.
      title: what it shows.
    """
    side = WIDTH
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (side - 20) / np.maximum(high - low, 1e-12)
    places = 10 + (points - low) * scale
    marks = "".join(
        f'<use href="#m{label // COLOURS % SHAPES}" x="{x:.1f}" y="{side - y:.1f}" '
        f'class="c{label % COLOURS}"/>'
        for (x, y), label in zip(places, labels.tolist(), strict=True)
    )
    return (
        f'<svg viewBox="0 0 {side} {side}" role="img" class="map" '
        f'aria-label="{escape(title)}"><path class="axis" d="M1 1H{side - 1}'
        f'V{side - 1}H1Z"/>{marks}</svg>'
    )


def reliability_chart(
    trained: tuple[np.ndarray, np.ndarray, np.ndarray],
    scaled: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    title: str,
    colour: int = 0,
) -> str:
    """How often predictions are right, by confidence.

    Args:
      trained, scaled: `calibration.reliability` without and with temperature scaling.
      title: what it shows.
      colour: number of the run's colour.
    """
    frame = Frame((0, 1), (0, 1), height=WIDTH - 60)
    parts = [frame.axes("confidence", "share that is right")]
    counts, mean, share = trained
    bins = len(counts)
    for place in np.flatnonzero(counts):
        left, right = frame.x(place / bins) + 1, frame.x((place + 1) / bins) - 1
        for kind, value in (
            (f"bar c{colour % COLOURS}", share[place]),
            ("count", counts[place] / counts.sum()),
        ):
            parts.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{frame.y(value):.1f}" '
                f'width="{right - left:.1f}" '
                f'height="{frame.bottom - frame.y(value):.1f}">'
                f"<title>{counts[place]} predictions of confidence {mean[place]:.1%}: "
                f"{share[place]:.1%} right</title></rect>"
            )
    parts.append(
        f'<path class="ideal" d="M{frame.x(0)} {frame.y(0)}L{frame.x(1)} {frame.y(1)}"/>'
    )
    counts, mean, share = scaled
    full = np.flatnonzero(counts)
    places = [(frame.x(mean[b]), frame.y(share[b])) for b in full]
    parts.append(
        '<polyline class="scaled" points="'
        + " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        + '"/>'
    )
    parts += [
        f'<circle class="scaled" r="3" cx="{x:.1f}" cy="{y:.1f}"/>' for x, y in places
    ]
    return frame.svg("".join(parts), label=title, kind="reliability")


def heat_map(matrix: np.ndarray, names: Sequence[str], *, title: str) -> str:
    """A confusion matrix: rows are classes, columns what they were taken for.

    Args:
      matrix: `[C, C]` counts.
      names: of the classes.
      title: what it shows.
    """
    count = len(matrix)
    named = count <= 40
    margin = 14 + 7 * max(min(len(name), 14) for name in names) if named else 14
    cell = 26 if named else max(2, 600 // count)
    side = margin + cell * count
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    parts = []
    for row, column in np.argwhere(matrix > 0):
        x, y = margin + cell * column, margin + cell * row
        value, number = share[row, column], matrix[row, column]
        told = f"{names[row]}, taken for {names[column]}: {number} ({value:.1%})"
        kind = "right" if row == column else "wrong"
        parts.append(
            f'<rect class="{kind}" x="{x}" y="{y}" width="{cell - 1}" '
            f'height="{cell - 1}" fill-opacity="{0.12 + 0.88 * value:.2f}">'
            f"<title>{escape(told)}</title></rect>"
        )
        if named:
            tone = " strong" if value > 0.5 else ""
            parts.append(
                f'<text class="mid cell{tone}" x="{x + cell / 2:.0f}" '
                f'y="{y + cell / 2 + 4:.0f}">{number}</text>'
            )
    for place, name in enumerate(names if named else ()):
        at = margin + cell * (place + 0.5)
        shown = escape(_cut(name, 14))
        parts.append(
            f'<text class="end" x="{margin - 5}" y="{at + 4:.0f}">{shown}</text>'
            f'<text transform="translate({at + 4:.0f} {margin - 5}) rotate(-90)">'
            f"{shown}</text>"
        )
    return (
        f'<div class="wide" style="--natural:{side}px"><svg viewBox="0 0 {side} {side}" '
        f'role="img" class="matrix" aria-label="{escape(title)}">'
        f'<path class="axis" d="M{margin - 1} {side}V{margin - 1}H{side}"/>'
        f"{''.join(parts)}</svg></div>"
    )


def legend(names: Mapping[int, str], *, dashes: Sequence[str] = ()) -> str:
    """Names beside their colours, by the number of the colour, and what dashes say."""
    keys = [
        f'<span class="key"><i class="swatch c{number % COLOURS}"></i>'
        f"{escape(name)}</span>"
        for number, name in names.items()
    ]
    keys += [
        f'<span class="key"><svg viewBox="0 0 32 8" class="dash"><path d="M0 4H32" '
        f'stroke-dasharray="{DASHES[number % len(DASHES)]}"/></svg>{escape(name)}</span>'
        for number, name in enumerate(dashes)
    ]
    return f'<p class="legend">{"".join(keys)}</p>'


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from one value to another, about five."""
    step = _step(low, high)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def rounded(low: float, high: float) -> tuple[float, float]:
    """The smallest range between round numbers that holds two values."""
    if low == high:
        room = 0.5 * abs(low) or 0.5
        low, high = low - room, high + room
    while True:
        step = _step(low, high)
        low = math.floor(low / step + 1e-9) * step
        high = math.ceil(high / step - 1e-9) * step
        if _step(low, high) == step:  # a wider range may have larger steps
            return low, high


def _step(low: float, high: float) -> float:
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)


def short(value: float) -> str:
    """A number in few letters: 12k, 0.25, 1e-05."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{letter}"
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"


def _points(series: Series) -> np.ndarray:
    """The points of a series `[n, 2]`, finite and not more than can be seen."""
    points = np.column_stack([series.x, series.y]).astype(np.float64)
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) > MOST_POINTS:
        points = points[np.linspace(0, len(points) - 1, MOST_POINTS).astype(int)]
    return points


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
