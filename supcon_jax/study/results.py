"""What came out of a study: statistics, results.csv, results.md and results.png.

A cell's number is the mean over its seeds, with the sample deviation. A difference to the
baseline is paired by seed, with the 95 % interval of Student's t: `d ± t(n - 1) s_d /
sqrt(n)`. It is called larger than chance where the interval leaves out 0.
"""

from __future__ import annotations

import csv
import io
import json
import math
import pathlib
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from scipy import stats

from supcon_jax import storage
from supcon_jax.metrics import is_share, label_and_value
from supcon_jax.study.grid import Cell, Study, cells, reference, slug
from supcon_jax.study.picture import Line, plot_study
from supcon_jax.writers import LINE_FIELDS

Result = dict[str, Any]


class Difference(NamedTuple):
    """A difference of two cells, paired by seed.

    Attributes:
      mean: of the differences.
      half: of the 95 % interval; infinite with one seed.
      seeds: that both have.
    """

    mean: float
    half: float
    seeds: int

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.mean) > self.half


def read(folder: pathlib.Path) -> Result | None:
    """The result of a job; None where it is not over."""
    try:
        return json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        return None


def numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, or of a tool's file, where they may nest."""
    flat: dict[str, float] = {}
    for name, value in found.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{n}": v for n, v in numbers(value).items()}
        elif isinstance(value, int | float) and name not in LINE_FIELDS:
            flat[name] = value
    return flat


def folder_of(
    cell: Cell, seed: int, out: pathlib.Path, *, trial: str = "", chosen: str = ""
) -> pathlib.Path:
    """Where a job of a cell runs.

    A tuned cell runs in a folder of what was chosen: should a trial that failed be tried
    again, and win, what ran with the former choice is not taken for it.
    """
    name = cell.folder
    if trial or chosen:
        name += f"-tune-{slug(trial)}" if trial else f"-chosen-{slug(chosen)}"
    return out / "runs" / name / f"seed{seed}"


def values_of(
    study: Study, cell: Cell, metric: str, out: pathlib.Path, *, trial: str = ""
) -> dict[int, float]:
    """seed -> value of a metric, of the seeds that are done and did not fail."""
    found = {}
    for seed in study.seed_list:
        best = "" if trial else chosen(study, cell, out, seed)
        result = read(folder_of(cell, seed, out, trial=trial, chosen=best))
        if result and not result.get("failed") and metric in result["metrics"]:
            found[seed] = float(result["metrics"][metric])
    return found


def chosen(study: Study, cell: Cell, out: pathlib.Path, seed: int) -> str:
    """The trial with the best mean of `tune_by` on held-out images; "" without one."""
    tried = {}
    for trial in cell.trials:
        found = values_of(study, cell, study.judge, out, trial=trial)
        mine = [found[s] for s in study.choosers(seed) if s in found]
        if mine:
            tried[trial] = statistics.fmean(mine)
    return max(tried, key=lambda trial: tried[trial], default="")


def _choices_text(study: Study, cell: Cell, out: pathlib.Path) -> str:
    """What was chosen, of how many, and by how many seeds where they differ."""
    best = [chosen(study, cell, out, seed) for seed in study.seed_list]
    counts = Counter(filter(None, best)).most_common()
    if not counts:
        return ""
    several = "; ".join(f"{label}: {count}" for label, count in counts)
    text = counts[0][0] if len(counts) == 1 else several
    return f"{text} (of {len(cell.trials)})"


def compare(
    study: Study, cell: Cell, metric: str, out: pathlib.Path
) -> Difference | None:
    """The difference of a cell to its baseline; None without one, or without values."""
    other = reference(study, cell)
    if other is None:
        return None
    ours = values_of(study, cell, metric, out)
    theirs = values_of(study, other, metric, out)
    return paired({s: ours[s] - theirs[s] for s in ours if s in theirs})


def paired(differences: Mapping[int, float]) -> Difference | None:
    """Mean and 95 % interval of differences, seed -> value."""
    values = list(differences.values())
    if not values:
        return None
    count = len(values)
    if count == 1:
        return Difference(values[0], math.inf, 1)
    half = stats.t.ppf(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Difference(statistics.fmean(values), float(half), count)


def failures(study: Study, out: pathlib.Path) -> list[str]:
    """A line for each job that failed."""
    found = []
    for cell in cells(study):
        for trial in ("", *cell.trials):
            for seed in study.seed_list:
                best = "" if trial else chosen(study, cell, out, seed)
                folder = folder_of(cell, seed, out, trial=trial, chosen=best)
                result = read(folder)
                if result and result.get("failed"):
                    tried = f" [{trial}]" if trial else ""
                    found.append(
                        f"{cell.label}{tried}, seed {seed}: {result['failed']}"
                    )
    return found


def shown(study: Study, cell: Cell, result: Result) -> str:
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


def write(study: Study, out: pathlib.Path) -> None:
    """Writes results.csv and results.md into the study's folder."""
    storage.write(out / "results.csv", as_csv(study, out).encode())
    storage.write(out / "results.md", as_markdown(study, out).encode())


def draw(study: Study, out: pathlib.Path) -> None:
    """Draws results.png, where there is something to draw."""
    if picture := plot_study(study.title, *_panels(study, out)):
        storage.write(out / "results.png", picture)


def as_csv(study: Study, out: pathlib.Path) -> str:
    """A row for each seed of each cell, with what it measured, or why it failed."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*study.axes, "seed", *study.metrics, "chosen", "seconds", "failed"])
    for cell in cells(study):
        for seed in study.seed_list:
            best = chosen(study, cell, out, seed)
            result = read(folder_of(cell, seed, out, chosen=best))
            if result is None:
                continue
            found = [result["metrics"].get(metric, "") for metric in study.metrics]
            seconds = round(sum(result["seconds"].values()), 1)
            ends = [result.get("chosen", ""), seconds, result.get("failed", "")]
            table.writerow([*cell.values, seed, *found, *ends])
    return text.getvalue()


def as_markdown(study: Study, out: pathlib.Path) -> str:
    """The table: mean ± deviation (n) of each metric, differences, the paper's values."""
    grid = cells(study)
    tuned = any(cell.trials for cell in grid)
    compared = bool(study.baseline)
    paper = study.paper.get("values", {})
    header = [*study.axes, *(_header(metric) for metric in study.metrics)]
    header += [f"against {_baseline_name(study)}"] if compared else []
    header += ["chosen" if study.tune_seeds else "chosen: seeds"] if tuned else []
    header += [f"paper: {study.paper.get('unit', 'top-1 (%)')}"] if paper else []
    lines = [_row(header), "|---" * len(header) + "|"]
    for cell in grid:
        row = [*cell.values]
        for metric in study.metrics:
            row.append(
                _mean_text(metric, [*values_of(study, cell, metric, out).values()])
            )
        if compared:
            row.append(_difference_text(study, cell, out))
        if tuned:
            row.append(_choices_text(study, cell, out))
        if paper:
            row.append(str(paper.get(cell.label, "")))
        lines.append(_row(row))
    text = f"# {study.title}\n\n" + "\n".join(lines) + "\n"
    seeds = len(study.seed_list)
    notes = [f"mean ± sample deviation over {seeds} seeds (n where fewer are done)"]
    if compared:
        notes.append(
            f"differences of {_header(study.metrics[0])} are paired by seed, with their "
            "95 % interval; bold where it leaves out 0"
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
    if study.spread:
        text += "\n" + _spread_table(study, out)
    if failed := failures(study, out):
        text += "\nFailed:\n\n" + "".join(f"- {line}\n" for line in failed)
    text += f"\n![{study.title}](results.png)\n"
    return text + (f"\n{study.reading.strip()}\n" if study.reading else "")


def _spread_table(study: Study, out: pathlib.Path) -> str:
    """Over all settings of each label of the axis: mean, deviation, least and most.

    Where the study has a baseline on that axis, the deviations are compared with its, each
    seed's with the same seed's.
    """
    metric, axis = study.metrics[0], list(study.grid).index(study.spread)
    by_label: dict[str, list[dict[int, float]]] = {}
    for cell in cells(study):
        values = values_of(study, cell, metric, out)
        by_label.setdefault(cell.values[axis], []).append(values)
    what = ["mean", "deviation over settings", "least", "most"]
    header = [study.axes[axis], "settings", *(f"{_header(metric)}: {w}" for w in what)]
    base = str(study.baseline.get(study.spread, ""))
    if base:
        header.append(f"deviation against {base}'s")
    deviations = {
        label: {
            seed: statistics.stdev(settings[seed] for settings in found)
            for seed in study.seed_list
            if len(found) > 1 and all(seed in settings for settings in found)
        }
        for label, found in by_label.items()
    }
    lines = [_row(header), "|---" * len(header) + "|"]
    for label, found in by_label.items():
        means = [statistics.fmean(settings.values()) for settings in found if settings]
        if not means:
            continue
        spread = statistics.stdev(means) if len(means) > 1 else 0.0
        four = (statistics.fmean(means), spread, min(means), max(means))
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


def _mean_text(metric: str, values: list[float]) -> str:
    """Mean and deviation as the metric is told everywhere; the header has the "%"."""
    if not values:
        return ""
    numbers_of = [statistics.fmean(values)]
    if len(values) > 1:
        numbers_of.append(statistics.stdev(values))
    return " ± ".join(
        _label_and_value(metric, number)[1].removesuffix("%") for number in numbers_of
    )


def _difference_text(study: Study, cell: Cell, out: pathlib.Path) -> str:
    metric = study.metrics[0]
    return _paired_text(metric, compare(study, cell, metric, out))


def _paired_text(metric: str, found: Difference | None) -> str:
    """A difference with its interval, bold where that leaves out 0."""
    if found is None:
        return ""
    factor, form = (100, "{:+.2f}") if is_share(_plain(metric)) else (1, "{:+.4f}")
    text = form.format(factor * found.mean)
    if math.isfinite(found.half):
        text += " ± " + form.format(factor * found.half).lstrip("+")
    return f"**{text}**" if found.is_real else text


def _panels(
    study: Study, out: pathlib.Path
) -> tuple[dict[str, list[Line]], dict[str, str]]:
    """The lines of each panel of the picture, and the labels of its axes.

    The first panel has ours, the next ones the differences to the baseline and the
    paper's. One axis of the grid runs along the panels, every combination of the others
    is a line.
    """
    metric = study.metrics[0]
    factor = 100 if is_share(_plain(metric)) else 1
    along = list(study.grid).index(study.along) if study.along else len(study.grid) - 1
    paper = study.paper.get("values", {})
    panels: dict[str, dict[str, Line]] = {"measured here": {}}
    units = {"measured here": _header(metric)}
    against = f"against {_baseline_name(study)}"
    if study.baseline:
        panels[against] = {}
        units[against] = "difference, 95 % interval"
    if paper:
        source = f"paper: {study.paper.get('source', '')}"
        panels[source] = {}
        units[source] = study.paper.get("unit", "top-1 (%)")

    def add(panel: str, cell: Cell, values: list[float], half: float = 0.0) -> None:
        others = (v for number, v in enumerate(cell.values) if number != along)
        name = ", ".join(others)
        halves: list[float] | None = [] if panel == against else None
        line = panels[panel].setdefault(name, Line(name, [], [], halves))
        line.places.append(cell.values[along])
        line.values.append(values)
        if line.halves is not None:
            line.halves.append(half)

    for cell in cells(study):
        found = [factor * v for v in values_of(study, cell, metric, out).values()]
        if found:
            add("measured here", cell, found)
        difference = compare(study, cell, metric, out)
        if difference and math.isfinite(difference.half):
            half = factor * difference.half
            add(against, cell, [factor * difference.mean], half)
        if cell.label in paper:
            add(source, cell, [float(paper[cell.label])])
    lines = {panel: list(found.values()) for panel, found in panels.items()}
    return lines, {"x": study.axes[along], **units}


def _baseline_name(study: Study) -> str:
    return ", ".join(str(label) for label in study.baseline.values())
