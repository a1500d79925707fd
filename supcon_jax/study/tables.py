"""A study in words and pictures: results.csv, results.md and results.png.

A cell's number is the mean over its seeds, with the sample deviation.
"""

from __future__ import annotations

import csv
import functools
import io
import math
from collections import Counter

import numpy as np

from supcon_jax import storage
from supcon_jax.metrics import is_share, label_and_value
from supcon_jax.study.grid import Cell, Study, text_of
from supcon_jax.study.picture import Line, plot_study
from supcon_jax.study.results import Difference, Result, Results, paired


def shown(study: Study, result: Result) -> str:
    """The study's metrics of one job, for a line of the log; of a trial what it is judged by."""
    texts = []
    for metric in dict.fromkeys((study.judge, *study.metrics)):
        if metric in result["metrics"]:
            label, value = _label_and_value(metric, result["metrics"][metric])
            texts.append(f"{label} {value}")
    return ", ".join(texts)


def _label_and_value(metric: str, value: float) -> tuple[str, str]:
    name = _plain(metric)
    try:
        return label_and_value(name, value)
    except KeyError:
        return name, f"{value:.4g}"


def _plain(metric: str) -> str:
    """A metric's own name: without its stage, and a tool's representation."""
    return metric.partition(":")[2].rpartition(".")[2]


def write(results: Results) -> None:
    """Writes results.csv and results.md into the study's folder."""
    storage.write(results.out / "results.csv", as_csv(results).encode())
    storage.write(results.out / "results.md", as_markdown(results).encode())


def draw(results: Results) -> None:
    """Draws results.png, where there is something to draw."""
    if picture := plot_study(results.study.title, *panels(results)):
        storage.write(results.out / "results.png", picture)


def as_csv(results: Results) -> str:
    """A row for each seed of each cell, with what it measured, or why it failed."""
    study, text = results.study, io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*study.axes, "seed", *study.metrics, "chosen", "seconds", "failed"])
    for cell in results.cells:
        for seed in study.seed_list:
            result = results.of(cell, seed)
            if result is None:
                continue
            found = [result["metrics"].get(metric, "") for metric in study.metrics]
            seconds = round(sum(result["seconds"].values()), 1)
            ends = [result.get("chosen", ""), seconds, result.get("failed", "")]
            table.writerow([*cell.values, seed, *found, *ends])
    return text.getvalue()


def as_markdown(results: Results) -> str:
    """The table: mean ± deviation (n) of each metric, differences, the paper's values."""
    study = results.study
    tuned = any(cell.trials for cell in results.cells)
    compared = bool(study.baseline)
    paper = study.paper.get("values", {})
    header = [*study.axes, *(_header(metric) for metric in study.metrics)]
    header += [f"against {_baseline_name(study)}"] if compared else []
    header += ["chosen" if study.tune_seeds else "chosen: seeds"] if tuned else []
    header += [f"paper: {study.paper.get('unit', 'top-1 (%)')}"] if paper else []
    lines = [_row(header), "|---" * len(header) + "|"]
    for cell in results.cells:
        row = [*cell.values]
        for metric in study.metrics:
            values = [*results.values(cell, metric).values()]
            row.append(_mean_text(metric, values, seeds=len(study.seed_list)))
        if compared:
            metric = study.metrics[0]
            found = results.compare(cell, metric)
            row.append(_paired_text(metric, found, seeds=len(study.seed_list)))
        if tuned:
            row.append(_choices_text(results, cell))
        if paper:
            row.append(str(paper.get(cell.label, "")))
        lines.append(_row(row))
    text = f"# {study.title}\n\n" + "\n".join(lines) + "\n"
    seeds = len(study.seed_list)
    notes = [f"mean ± sample deviation over {seeds} seeds (n where fewer are done)"]
    if compared:
        notes.append(
            "differences are paired by seed, with their 95 % interval; bold where it leaves "
            "out 0"
        )
    if tuned:
        notes.append(
            f"chosen by {_label_and_value(study.judge, 0.0)[0]} on "
            f"{100 * study.held_out:.0f} % of the training images, held out, "
            + (
                f"with {study.tune_seeds} seed(s) for all"
                if study.tune_seeds
                else "by each seed for itself, so that intervals include the choice"
            )
        )
    if source := study.paper.get("source"):
        notes.append(f"paper: {source}")
    text += "\n" + "; ".join(notes) + ".\n"
    if compared and len(study.metrics) > 1:
        text += "\n" + _differences_table(results)
    if study.spread:
        text += "\n" + _spread_table(results)
    if failed := results.failures():
        text += "\nFailed:\n\n" + "".join(f"- {line}\n" for line in failed)
    text += f"\n![{study.title}](results.png)\n"
    if study.reading and results.is_complete():
        text += f"\n{study.reading.strip()}\n"
    return text


def _differences_table(results: Results) -> str:
    """The differences to the baseline in the metrics after the first."""
    study, seeds = results.study, len(results.study.seed_list)
    against = f"against {_baseline_name(study)}"
    others = study.metrics[1:]
    header = [*study.axes, *(f"{_header(metric)}, {against}" for metric in others)]
    lines = [_row(header), "|---" * len(header) + "|"]
    for cell in results.cells:
        found = [results.compare(cell, metric) for metric in others]
        if any(found):
            texts = map(functools.partial(_paired_text, seeds=seeds), others, found)
            lines.append(_row([*cell.values, *texts]))
    return "\n".join(lines) + "\n"


def _spread_table(results: Results) -> str:
    """Over all settings of each label of the axis: mean, deviation, least and most.

    Where the study has a baseline on that axis, the deviations are compared with its, each
    seed's with the same seed's.
    """
    study = results.study
    metric, axis = study.metrics[0], list(study.grid).index(study.spread)
    by_label: dict[str, list[dict[int, float]]] = {}
    for cell in results.cells:
        values = results.values(cell, metric)
        by_label.setdefault(cell.values[axis], []).append(values)
    what = ["mean", "deviation over settings", "least", "most"]
    header = [study.axes[axis], "settings", *(f"{_header(metric)}: {w}" for w in what)]
    compared = study.spread in study.baseline
    base = text_of(study.baseline[study.spread]) if compared else ""
    if base:
        header.append(f"deviation against {base}'s")
    deviations = {
        label: {
            seed: float(np.std([settings[seed] for settings in found], ddof=1))
            for seed in study.seed_list
            if len(found) > 1 and all(seed in settings for settings in found)
        }
        for label, found in by_label.items()
    }
    lines = [_row(header), "|---" * len(header) + "|"]
    for label, found in by_label.items():
        means = [np.mean([*settings.values()]) for settings in found if settings]
        if not means:
            continue
        spread = np.std(means, ddof=1) if len(means) > 1 else 0.0
        four = map(float, (np.mean(means), spread, np.min(means), np.max(means)))
        row = [label, str(len(means)), *(_mean_text(metric, [each]) for each in four)]
        if base:
            ours, theirs = deviations[label], deviations.get(base, {})
            both = {s: ours[s] - theirs[s] for s in ours if s in theirs}
            row.append("" if label == base else _paired_text(metric, paired(both)))
        lines.append(_row(row))
    return "\n".join(lines) + "\n"


def _row(cells_of_row: list[str]) -> str:
    return "| " + " | ".join(cells_of_row) + " |"


def _header(metric: str) -> str:
    label = _label_and_value(metric, 0.0)[0]
    return f"{label} (%)" if is_share(_plain(metric)) else label


def _mean_text(metric: str, values: list[float], *, seeds: int = 0) -> str:
    """Mean and deviation as the metric is told everywhere; the header has the "%".

    Args:
      metric: which.
      values: of those seeds that have it.
      seeds: how many there are to be; "(n=...)" is added where it is more.
    """
    if not values:
        return ""
    found = [float(np.mean(values))]
    if len(values) > 1 and math.isfinite(found[0]):
        found.append(float(np.std(values, ddof=1)))
    told = [_label_and_value(metric, number)[1].removesuffix("%") for number in found]
    return " ± ".join(told) + _fewer(len(values), seeds)


def _fewer(count: int, seeds: int) -> str:
    return f" (n={count})" if count < seeds else ""


def _paired_text(metric: str, found: Difference | None, *, seeds: int = 0) -> str:
    """A difference with its interval, bold where that leaves out 0; see `_mean_text`."""
    if found is None:
        return ""
    factor, form = (100, "{:+.2f}") if is_share(_plain(metric)) else (1, "{:+.4f}")
    text = form.format(factor * found.mean)
    if math.isfinite(found.half):
        text += " ± " + form.format(factor * found.half).lstrip("+")
    text = f"**{text}**" if found.is_real else text
    return text + _fewer(found.seeds, seeds)


def panels(results: Results) -> tuple[dict[str, list[Line]], dict[str, str]]:
    """The lines of each panel of the picture, and the labels of its axes.

    The first panel has ours, the next ones the differences to the baseline and the
    paper's. One axis of the grid runs along the panels, every combination of the others
    is a line.
    """
    study = results.study
    metric = study.metrics[0]
    factor = 100 if is_share(_plain(metric)) else 1
    along = list(study.grid).index(study.along) if study.along else len(study.grid) - 1
    paper = study.paper.get("values", {})
    found: dict[str, dict[str, Line]] = {"measured here": {}}
    units = {"measured here": _header(metric)}
    against = f"against {_baseline_name(study)}"
    if study.baseline:
        found[against] = {}
        units[against] = "difference, 95 % interval"
    if paper:
        source = f"paper: {study.paper.get('source', '')}"
        found[source] = {}
        units[source] = study.paper.get("unit", "top-1 (%)")

    def add(panel: str, cell: Cell, values: list[float], half: float = 0.0) -> None:
        others = (v for number, v in enumerate(cell.values) if number != along)
        name = ", ".join(others)
        halves: list[float] | None = [] if panel == against else None
        line = found[panel].setdefault(name, Line(name, [], [], halves))
        line.places.append(cell.values[along])
        line.values.append(values)
        if line.halves is not None:
            line.halves.append(half)

    for cell in results.cells:
        values = [factor * v for v in results.values(cell, metric).values()]
        if values := [value for value in values if math.isfinite(value)]:
            add("measured here", cell, values)
        difference = results.compare(cell, metric)
        if difference and math.isfinite(difference.half):
            half = factor * difference.half
            add(against, cell, [factor * difference.mean], half)
        if cell.label in paper:
            add(source, cell, [float(paper[cell.label])])
    lines = {panel: list(by_name.values()) for panel, by_name in found.items()}
    return lines, {"x": study.axes[along], **units}


def _baseline_name(study: Study) -> str:
    return ", ".join(text_of(label) for label in study.baseline.values())


def _choices_text(results: Results, cell: Cell) -> str:
    """What was chosen, of how many, and by how many seeds where they differ."""
    best = [results.chosen(cell, seed) for seed in results.study.seed_list]
    counts = Counter(filter(None, best)).most_common()
    if not counts:
        return ""
    several = "; ".join(f"{label}: {count}" for label, count in counts)
    text = counts[0][0] if len(counts) == 1 else several
    return f"{text} (of {len(cell.trials)})"
