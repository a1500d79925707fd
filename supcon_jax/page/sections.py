"""The sections of the page that need no images: numbers, curves, calibration, config."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from html import escape
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from supcon_jax.config.check import flatten
from supcon_jax.config.keys import KEYS
from supcon_jax.evaluation.calibration import (
    log_probabilities,
    reliability,
    scale_by_halves,
)
from supcon_jax.evaluation.classification import class_accuracies, confusion_matrix
from supcon_jax.logs import format_duration
from supcon_jax.metrics import METRICS, is_result
from supcon_jax.page import charts
from supcon_jax.page.charts import Series
from supcon_jax.page.records import RunRecord
from supcon_jax.run.workdir import differing_keys

# Classes above which a confusion matrix is a table of its largest mistakes alone.
LARGEST_MATRIX = 200
# Classes up to which there is room beside it.
BESIDE_MATRIX = 12


class Section(NamedTuple):
    """A part of the page.

    Attributes:
      anchor: its name in links.
      title: its heading.
      content: HTML; empty where there is nothing to show.
    """

    anchor: str
    title: str
    content: str


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    marked: Collection[int] = (),
) -> str:
    """A table of text that scrolls in a box of its own; `marked` rows stand out."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = []
    for number, (first, *cells) in enumerate(rows):
        kind = ' class="marked"' if number in marked else ""
        rest = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body.append(f'<tr{kind}><th scope="row">{escape(first)}</th>{rest}</tr>')
    return (
        f'<div class="box" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def figure(caption: str, content: str) -> str:
    """A chart with its title; nothing where there is no chart."""
    if not content:
        return ""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>"


def summary(runs: list[RunRecord]) -> Section:
    """The main numbers of every run, and all of them in a table."""
    cards = []
    for number, run in enumerate(runs):
        newest = run.newest
        numbers = "".join(
            f"<li><b>{escape(_value(name, newest[name]))}</b> {escape(_label(name))}</li>"
            for name, metric in METRICS.items()
            if metric.on_end and name in newest
        )
        notes = "".join(f'<p class="note">⚠ {escape(note)}</p>' for note in run.notes)
        cards.append(
            f'<article class="card"><h3><i class="swatch c{number % charts.COLOURS}"></i>'
            f"{escape(run.name)}</h3><p>{escape(kind_of(run))}</p>{notes}"
            f"<ul>{numbers}</ul></article>"
        )
    facts = {
        "workdir": lambda run: run.workdir,
        "kind": kind_of,
        "data": lambda run: run.config.data.name,
        "encoder": lambda run: run.config.encoder.name,
        "model of": lambda run: (
            run.config.pretrained or run.config.encoder.init_from or "—"
        ),
        "step": _step,
        "time": lambda run: format_duration(run.newest.get("wall_s", 0.0)),
    }
    rows = [[name, *map(tell, runs)] for name, tell in facts.items()]
    known = {name for run in runs for name in run.newest if is_result(name)}
    for name in sorted(known, key=_order):
        rows.append(
            [name, *(_value(name, run.newest.get(name, math.nan)) for run in runs)]
        )
    shown = table(["", *(run.name for run in runs)], rows)
    return Section(
        "summary", "Results", f'<div class="cards">{"".join(cards)}</div>{shown}'
    )


def kind_of(run: RunRecord) -> str:
    """What a run did, in words."""
    config = run.config
    if config.mode == "pretrain":
        return f"pretraining, {config.loss.name}"
    return config.mode.replace("_", " ")


def curves(runs: list[RunRecord]) -> Section:
    """Every quantity over the epochs, all runs in one chart."""
    by_panel = {
        panel: [name for name, metric in METRICS.items() if metric.panel == panel]
        for panel in ("loss", "accuracy")
    }
    accuracies = by_panel["accuracy"]
    panels = (
        ("Loss and its collapse level", "loss", 1, by_panel["loss"]),
        (
            "Accuracy on evaluation images",
            "accuracy (%)",
            100,
            [name for name in accuracies if not name.startswith("train/")],
        ),
        (
            "Accuracy in training",
            "accuracy (%)",
            100,
            [name for name in accuracies if name.startswith("train/")],
        ),
        ("Learning rate", "learning rate", 1, ["optim/learning_rate"]),
        ("Throughput", "images/s", 1, ["train/images_per_sec"]),
        ("Goodput: time in steps", "share of time (%)", 100, ["goodput/share"]),
    )
    figures: list[str] = []
    drawn: dict[int, str] = {}
    for title, label, factor, names in panels:
        series: list[Series] = []
        dashes: list[str] = []
        for name in names:
            # A value that was measured once is a number of the table, no curve.
            curves = {
                number: [
                    (line["epoch"], factor * line[name])
                    for line in run.lines
                    if name in line
                ]
                for number, run in enumerate(runs)
            }
            curves = {n: points for n, points in curves.items() if len(points) > 1}
            for number, points in curves.items():
                x, y = zip(*points, strict=True)
                told = f"{runs[number].name} {_label(name)}"
                series.append(Series(told, x, y, number, len(dashes)))
                drawn[number] = runs[number].name
            dashes += [_label(name)] if curves else []
        chart = charts.line_chart(series, title=title, x_label="epoch", y_label=label)
        if len(dashes) > 1:
            chart += charts.legend({}, dashes=dashes)
        figures.append(figure(title, chart))
    if not drawn:
        return Section("curves", "Curves", "")
    legend = charts.legend(dict(sorted(drawn.items())))
    return Section(
        "curves", "Curves", f'{legend}<div class="grid">{"".join(figures)}</div>'
    )


def calibration(runs: list[RunRecord]) -> Section:
    """A reliability diagram of each run with predictions."""
    figures = []
    for number, run in enumerate(runs):
        if run.predictions is None:
            continue
        logits, labels, _ = run.predictions
        scaled, _ = scale_by_halves(logits, labels)
        diagrams = []
        for values in (logits, scaled):
            p = np.exp(log_probabilities(values))
            diagrams.append(reliability(p.max(axis=1), p.argmax(axis=1) == labels))
        before, after = (
            _value(name, run.newest.get(name, math.nan))
            for name in ("eval/ece", "eval/scaled_ece")
        )
        title = f"{run.name}: ECE {before}, with temperature scaling {after}"
        chart = charts.reliability_chart(*diagrams, title=title, colour=number)
        figures.append(figure(title, chart))
    if not figures:
        return Section("calibration", "Calibration", "")
    words = (
        '<p class="legend"><span class="key"><i class="swatch c0"></i>share of '
        "predictions that is right, by confidence (in the run's colour)</span>"
        '<span class="key"><i class="swatch count"></i>share of all predictions</span>'
        '<span class="key"><svg viewBox="0 0 32 8" class="dash scaled"><path '
        'd="M0 4H32"/></svg>with temperature scaling</span><span class="key"><svg '
        'viewBox="0 0 32 8" class="dash ideal"><path d="M0 4H32"/></svg>calibrated'
        "</span></p>"
    )
    content = f'{words}<div class="grid">{"".join(figures)}</div>'
    return Section("calibration", "Calibration", content)


def confusion(runs: list[RunRecord]) -> Section:
    """The confusion matrix of each run with predictions, and its largest mistakes."""
    parts = []
    for run in runs:
        if run.predictions is None:
            continue
        logits, labels, _ = run.predictions
        matrix = confusion_matrix(logits, labels)
        known = run.class_names
        title = f"{run.name}: images of a class (row) by what they were taken for"
        drawn = ""
        if len(matrix) <= LARGEST_MATRIX:
            drawn = figure(title, charts.heat_map(matrix, known, title=title))
        wrong = matrix - np.diag(np.diag(matrix))
        order = np.argsort(-wrong, axis=None, kind="stable")[:10]
        places = [np.unravel_index(place, wrong.shape) for place in order]
        sums = matrix.sum(axis=1)
        rows = [
            [known[i], known[j], str(wrong[i, j]), f"{wrong[i, j] / sums[i]:.1%}"]
            for i, j in places
            if wrong[i, j]
        ]
        header = ["class", "taken for", "images", "of the class"]
        accuracies = class_accuracies(matrix)
        least = np.argsort(np.nan_to_num(accuracies, nan=2.0), kind="stable")[:10]
        seen = [c for c in least if sums[c]]
        beside = len(matrix) <= BESIDE_MATRIX
        parts.append(
            ("" if beside else drawn)
            + f'<div class="grid">{drawn if beside else ""}'
            + figure(f"{run.name}: most frequent mistakes", table(header, rows))
            + figure(
                f"{run.name}: least recognised classes",
                table(
                    ["class", "images", "recognised"],
                    [[known[c], str(sums[c]), f"{accuracies[c]:.1%}"] for c in seen],
                ),
            )
            + "</div>"
        )
    return Section("confusion", "Confusion", "".join(parts))


def robustness(runs: list[RunRecord]) -> Section:
    """Accuracy under corruptions: a bar for each, the mean over its severities."""
    shown = [run for run in runs if run.robustness]
    if not shown:
        return Section("robustness", "Robustness", "")
    corruptions = list(dict.fromkeys(c for run in shown for c in run.robustness))
    bars, lines = [], []
    for number, run in enumerate(runs):
        if not run.robustness:
            continue
        of_severity: dict[float, list[float]] = {}
        for found in run.robustness.values():
            for severity, top1 in found.items():
                of_severity.setdefault(severity, []).append(100 * top1)
        places = [corruptions.index(corruption) for corruption in run.robustness]
        means = [100 * fmean(found.values()) for found in run.robustness.values()]
        bars.append(Series(run.name, places, means, number))
        severities = sorted(of_severity)
        curve = [fmean(of_severity[severity]) for severity in severities]
        lines.append(Series(run.name, severities, curve, number))
    title, by_severity = (
        "Top-1 under corruptions, mean over the severities",
        "Top-1 by severity, mean over the corruptions",
    )
    content = (
        charts.legend({n: run.name for n, run in enumerate(runs) if run.robustness})
        + figure(
            title,
            charts.bar_chart(
                corruptions, bars, title=title, y_label="top-1 (%)", most=100
            ),
        )
        + '<div class="grid">'
        + figure(
            by_severity,
            charts.line_chart(
                lines, title=by_severity, x_label="severity", y_label="top-1 (%)"
            ),
        )
        + "</div>"
    )
    return Section("robustness", "Robustness", content)


def geometry(runs: list[RunRecord]) -> Section:
    """How embeddings and projections lie: every number that was measured of them."""
    columns = [(run, of) for run in runs for of in run.embeddings]
    names = list(dict.fromkeys(n for run, of in columns for n in run.embeddings[of]))
    if not names:
        return Section("geometry", "Embeddings in numbers", "")
    rows = [
        [
            name,
            *(
                _value(name, run.embeddings[of].get(name, math.nan))
                for run, of in columns
            ),
        ]
        for name in names
    ]
    header = ["", *(f"{run.name}, {of}{measured_on(run)}" for run, of in columns)]
    return Section("geometry", "Embeddings in numbers", table(header, rows))


def measured_on(run: RunRecord) -> str:
    """Which step, images and changes the numbers of embeddings.json are of."""
    found = run.measured
    changes = found.get("changes") or []
    told = [
        text.format(found[key])
        for key, text in (
            ("step", "step {}"),
            ("data", "{}"),
            ("num_train", "{} references"),
            ("ood", "against {}"),
        )
        if found.get(key) not in (None, "")
    ]
    if isinstance(changes, list):
        told += map(str, changes)
    return f" ({', '.join(told)})" if told else ""


def config(runs: list[RunRecord]) -> Section:
    """What differs from the defaults and between the runs, and all keys."""
    flats = [{**flatten(run.config.to_dict()), **run.saved} for run in runs]
    keys = sorted({key for flat in flats for key in flat})

    def texts(key: str) -> list[str]:
        return [_config_value(flat.get(key)) for flat in flats]

    def default(key: str) -> str:
        return _config_value(KEYS[key].default) if key in KEYS else "—"

    changed = [key for key in keys if any(t != default(key) for t in texts(key))]
    apart = {key for key in keys if len({*texts(key)}) > 1}
    results = {key for flat in flats[1:] for key in differing_keys(flats[0], flat)}
    header = ["key", "default", *(run.name for run in runs)]
    rows = [[key, default(key), *texts(key)] for key in changed]
    marked = {n for n, key in enumerate(changed) if key in apart}
    words = "Keys that are not at their default (configs/common.py)."
    if len(runs) > 1:
        named = ", ".join(sorted(results)) or "none"
        words += (
            " Marked rows differ between the runs. Of these, what changes a result: "
            f"{named}."
        )
    every = table(header, [[key, default(key), *texts(key)] for key in keys])
    content = (
        f"<p>{escape(words)}</p>{table(header, rows, marked=marked)}"
        f"<details><summary>All {len(keys)} keys</summary>{every}</details>"
    )
    return Section("config", "Config", content)


def _config_value(value: Any) -> str:
    # config.json holds lists where a default is a tuple.
    return repr(tuple(value)) if isinstance(value, list | tuple) else repr(value)


def _step(run: RunRecord) -> str:
    step = run.newest.get("step")
    if step is None:
        return "—"
    total = run.total_steps
    return f"{step:,} of {total:,}" if total and not run.finished else f"{step:,}"


def _label(name: str) -> str:
    """A metric's name for people: its text without the value."""
    if name not in METRICS:
        return name
    text, _, rest = METRICS[name].text.partition("{")
    label = f"{text.strip()} {rest.partition('}')[2].strip()}".strip(" ()")
    return {"eval/num_examples": "images"}.get(name, label) or name


def _value(name: str, value: Any) -> str:
    """A metric's value as METRICS writes it, without its label."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "—" if value != value else str(value)
    if name not in METRICS:
        return _plain(value)
    _, _, rest = METRICS[name].text.partition("{")
    return ("{" + rest.partition("}")[0] + "}").format(value)


def _plain(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "—"


def _order(name: str) -> tuple[int, str]:
    """Evaluations first, then what training says of itself, as METRICS has them."""
    known = list(METRICS)
    place = known.index(name) if name in METRICS else len(known)
    return (place + 1000 * name.startswith("train/"), name)
