"""What comes out of a robustness evaluation: its metrics, its table, its words.

Results are what `supcon_jax.robustness` keeps of each split: `{"fog_3": {"top1": 0.41, "ece":
0.12, "num_examples": 10000, ...}, "clean": ...}`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from supcon_jax.data.corrupted import ALL_SPLITS, split_name
from supcon_jax.evaluation.corruption import (
    ALEXNET,
    CORRUPTIONS,
    PUBLISHED,
    SEVERITIES,
    Reference,
    corruption_errors,
    mean_corruption_error,
    relative_corruption_errors,
    relative_mean_corruption_error,
)

logger = logging.getLogger(__name__)
# Of the images without corruption, among the results.
CLEAN = "clean"
# Split -> its digest, "top1", "ece" and "num_examples".
Results = dict[str, dict[str, Any]]


def splits_of(corruption: str) -> list[str]:
    """A corruption at its five severities."""
    return [split_name(corruption, severity) for severity in SEVERITIES]


def errors_by_corruption(results: Results) -> dict[str, list[float]]:
    """Corruption -> error at each severity, of those that have all five."""
    return {
        corruption: [1 - results[name]["top1"] for name in splits_of(corruption)]
        for corruption in CORRUPTIONS
        if all(name in results for name in splits_of(corruption))
    }


def summarize(results: Results, reference: Reference | None) -> dict[str, float]:
    """The `robustness/*` metrics; means over what is not complete are left out."""
    clean = results[CLEAN]
    errors = errors_by_corruption(results)
    metrics = {
        "robustness/clean_top1": clean["top1"],
        "robustness/clean_ece": clean["ece"],
    }
    for corruption, values in errors.items():
        metrics[f"robustness/top1_{corruption}"] = 1 - float(np.mean(values))
    for severity in SEVERITIES:
        names = [split_name(corruption, severity) for corruption in CORRUPTIONS]
        if all(name in results for name in names):
            for key in ("top1", "ece"):
                mean = np.mean([results[name][key] for name in names])
                metrics[f"robustness/{key}_severity_{severity}"] = float(mean)
    if missing := [name for name in ALL_SPLITS if name not in results]:
        logger.warning(
            "warning: mCE and the means over all are not given, since %d of %d splits are "
            "missing: %s",
            len(missing),
            len(ALL_SPLITS),
            ", ".join(_shortened(missing)),
        )
        return metrics
    for key in ("top1", "ece"):
        mean = np.mean([results[name][key] for name in ALL_SPLITS])
        metrics[f"robustness/{key}"] = float(mean)
    metrics["robustness/mean_error"] = 1 - metrics["robustness/top1"]
    if reference is not None:
        summary = {
            "mce": mean_corruption_error(errors, reference),
            "relative_mce": relative_mean_corruption_error(
                errors, 1 - clean["top1"], reference
            ),
        }
        for key, value in summary.items():
            if np.isfinite(value):
                metrics[f"robustness/{key}"] = value
            else:
                logger.warning(
                    "warning: no %s: a corruption does %s no harm, so there is nothing to "
                    "divide by (--config.robustness.reference)",
                    key,
                    reference.name,
                )
    return metrics


def _shortened(splits: list[str]) -> list[str]:
    """`fog` for all its severities."""
    told: dict[str, None] = {}
    for name in splits:
        corruption = name.rpartition("_")[0]
        whole = all(split in splits for split in splits_of(corruption))
        told[corruption if whole else name] = None
    return list(told)


def table(results: Results, reference: Reference | None) -> list[list[str]]:
    """A row for each corruption and for the clean images, below a row of names.

    Columns: top-1 at each severity and their mean, ECE likewise, the reference's error, CE
    and relative CE; empty where something is missing.
    """
    severities = [str(severity) for severity in SEVERITIES]
    names = [f"{k}_{s}" for k in ("top1", "ece") for s in (*severities, "mean")]
    rows = [["corruption", *names, "reference_error", "ce", "relative_ce"]]
    clean, errors = results[CLEAN], errors_by_corruption(results)
    ce: dict[str, float] = {}
    relative: dict[str, float] = {}
    if reference is not None:
        ce = corruption_errors(errors, reference)
        relative = relative_corruption_errors(errors, 1 - clean["top1"], reference)
    for corruption in CORRUPTIONS:
        row = [corruption]
        for key in ("top1", "ece"):
            found = [results.get(name, {}).get(key) for name in splits_of(corruption)]
            whole = [value for value in found if value is not None]
            mean = float(np.mean(whole)) if corruption in errors else None
            row += [_cell(value) for value in (*found, mean)]
        base = reference.errors.get(corruption) if reference else None
        rows.append(
            [*row, *map(_cell, (base, ce.get(corruption), relative.get(corruption)))]
        )
    empty = [""] * len(SEVERITIES)
    base = reference.clean if reference else None
    both = [cell for key in ("top1", "ece") for cell in (*empty, _cell(clean[key]))]
    rows.append([CLEAN, *both, _cell(base), "", ""])
    return rows


def _cell(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.6f}"


def as_text(
    results: Results, reference: Reference | None, metrics: Mapping[str, float]
) -> list[str]:
    """The table for people, in percent, and what the paper printed beside it."""

    def line(name: str, cells: list[str]) -> str:
        return f"{name:<21}" + "".join(f"{cell:>8}" for cell in cells)

    def percent(cell: str) -> str:
        return f"{100 * float(cell):.2f}" if cell else "-"

    columns = ["1", "2", "3", "4", "5", "mean"] + (
        ["CE", "rel. CE"] if reference else []
    )
    lines = ["", line("top-1 (%), severity", columns)]
    for row in table(results, reference)[1:]:
        cells = row[1:7] + (row[14:16] if reference else [])
        lines.append(line(row[0], [percent(cell) for cell in cells]))
    for key, name in (("top1", "mean top-1 (%)"), ("ece", "mean ECE (%)")):
        found = [metrics.get(f"robustness/{key}_severity_{s}") for s in SEVERITIES]
        mean = metrics.get(f"robustness/{key}")
        lines.append(line(name, [percent(_cell(value)) for value in (*found, mean)]))
    if reference is not ALEXNET:
        return lines
    ours = {
        key: [metrics.get(f"robustness/clean_{key}")]
        + [metrics.get(f"robustness/{key}_severity_{s}") for s in SEVERITIES]
        for key in ("top1", "ece")
    }
    lines += [
        "",
        line("beside the paper (%)", ["this run", "SupCon", "CE", "SupCon", "CE"]),
    ]
    lines.append(line("", ["", "R50", "R50", "R200", "R200"]))
    for key in ("top1", "ece"):
        for place, value in enumerate(ours[key]):
            name = f"{key}, severity {place}" if place else f"{key}, clean"
            theirs = [getattr(found, key)[place] for found in PUBLISHED.values()]
            lines.append(line(name, [percent(_cell(v)) for v in (value, *theirs)]))
    for key in ("mce", "relative_mce"):
        theirs = [getattr(found, key) for found in PUBLISHED.values()]
        value = metrics.get(f"robustness/{key}")
        lines.append(line(key, [percent(_cell(v)) for v in (value, *theirs)]))
    return lines
