"""What the jobs of a study have measured: values by seed, choices, differences, failures.

A difference to the baseline is paired by seed, with the 95 % interval of Student's t:
`d ± t(n - 1) s_d / sqrt(n)`. It is called larger than chance where the interval leaves out 0.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from supcon_jax.study.grid import Cell, Study, cells, reference, slug
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


class Results:
    """The results of a study's jobs, as they are when they are first asked for."""

    def __init__(self, study: Study, out: pathlib.Path):
        """Reads nothing yet.

        Args:
          study: see `grid.Study`.
          out: its folder.
        """
        self.study, self.out = study, out
        self.cells = cells(study)
        self._known: dict[pathlib.Path, Result | None] = {}
        self._chosen: dict[tuple[str, tuple[int, ...]], str] = {}

    def read(self, folder: pathlib.Path) -> Result | None:
        """The result of the job of a folder; None where it is not over."""
        if folder not in self._known:
            self._known[folder] = read(folder)
        return self._known[folder]

    def of(self, cell: Cell, seed: int, *, trial: str = "") -> Result | None:
        """The result of a cell, run with what was chosen for the seed, or of its trial."""
        best = "" if trial else self.chosen(cell, seed)
        return self.read(folder_of(cell, seed, self.out, trial=trial, chosen=best))

    def values(self, cell: Cell, metric: str, *, trial: str = "") -> dict[int, float]:
        """seed -> value of a metric, of the seeds that are done and did not fail."""
        found = {}
        for seed in self.study.seed_list:
            result = self.of(cell, seed, trial=trial)
            if result and not result.get("failed") and metric in result["metrics"]:
                found[seed] = float(result["metrics"][metric])
        return found

    def chosen(self, cell: Cell, seed: int) -> str:
        """The trial with the best mean of the judge on held-out images; "" without one.

        Trials that failed for a seed that chooses are left out, unless all did: means over
        other seeds do not compare.
        """
        choosers = tuple(self.study.choosers(seed))
        if (key := (cell.folder, choosers)) not in self._chosen:
            tried: dict[str, list[float]] = {}
            for trial in cell.trials:
                found = self.values(cell, self.study.judge, trial=trial)
                mine = [
                    found[s] for s in choosers if math.isfinite(found.get(s, math.nan))
                ]
                if mine:
                    tried[trial] = mine
            most = max(map(len, tried.values()), default=0)
            means = {t: float(np.mean(v)) for t, v in tried.items() if len(v) == most}
            self._chosen[key] = max(means, key=lambda trial: means[trial], default="")
        return self._chosen[key]

    def is_tuned(self, cell: Cell, seed: int) -> bool:
        """Whether all trials that choose for a seed are over."""
        return all(
            self.of(cell, chooser, trial=trial) is not None
            for trial in cell.trials
            for chooser in self.study.choosers(seed)
        )

    def compare(self, cell: Cell, metric: str) -> Difference | None:
        """The difference of a cell to its baseline; None without one, or without values."""
        other = reference(self.study, cell, self.cells)
        if other is None:
            return None
        ours, theirs = self.values(cell, metric), self.values(other, metric)
        return paired({s: ours[s] - theirs[s] for s in ours if s in theirs})

    def is_complete(self) -> bool:
        """Whether every cell has a result for every seed."""
        seeds = self.study.seed_list
        return all(self.of(cell, seed) for cell in self.cells for seed in seeds)

    def failures(self) -> list[str]:
        """A line for each job that failed, and in the end for each metric that no job has."""
        found = []
        for cell in self.cells:
            for trial in (*cell.trials, ""):
                for seed in self.study.seed_list:
                    result = self.of(cell, seed, trial=trial)
                    if result and result.get("failed"):
                        tried = f" [{trial}]" if trial else ""
                        what = result["failed"]
                        found.append(f"{cell.label}{tried}, seed {seed}: {what}")
        if self.is_complete() and not found:
            found += [
                f"the metric {metric!r} was written by no run"
                for metric in self.study.metrics
                if not any(self.values(cell, metric) for cell in self.cells)
            ]
        return found


def read(folder: pathlib.Path) -> Result | None:
    """The result of the job of a folder, as it is now; None where it is not over."""
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


def paired(differences: Mapping[int, float]) -> Difference | None:
    """Mean and 95 % interval of differences, seed -> value; None where one is no number."""
    values = list(differences.values())
    if not values or not np.all(np.isfinite(values)):
        return None
    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Difference(mean, math.inf, 1)
    half = stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    return Difference(mean, float(half), count)
