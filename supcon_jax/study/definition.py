"""What a study is: the stages of a run, a grid of changes, seeds, and what is reported.

A study file has `get_study(scale)`, which returns a dictionary with the fields of `Study`.
Everything in it is checked before anything runs: every change of every cell is applied to
the config of its stage.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import runpy
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from supcon_jax.config.check import flatten
from supcon_jax.config.files import find_file, make_importable
from supcon_jax.config.keys import NOT_READ_BY_LBFGS, SPLIT_KEYS
from supcon_jax.config.loading import load_config
from supcon_jax.metrics import is_accuracy
from supcon_jax.study.grid import (
    TOOL_RESULTS,
    Cell,
    Stage,
    Study,
    cells,
    chain,
    flags,
    is_tool,
    mode_of,
    reference,
    stage_config,
    stages_of,
)

SCALES = ("small", "full")
# Which training images are held out.
_HELD_OUT_KEYS = (*SPLIT_KEYS, "data.train_split", "data.classes")


def _is_texts(value: Any) -> bool:
    return _is_listed(value) and all(isinstance(each, str) for each in value)


def _is_listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_TEXT = (lambda value: isinstance(value, str), "a text")
_MAPPING = (lambda value: isinstance(value, Mapping), "a dictionary")
_TEXTS = (_is_texts, "a list of texts")
# What each field of a study may be; what its values mean is checked after that.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{name: _TEXT for name in ("title", "tune_by", "along", "spread", "reading")},
    **{name: _MAPPING for name in ("grid", "shared", "baseline", "tune")},
    "stages": (
        lambda value: (
            isinstance(value, Mapping)
            and all(isinstance(v, str) or _is_texts(v) for v in value.values())
        ),
        'stage -> "configs/FILE.py", or the words after "python -m" of a tool',
    ),
    "metrics": _TEXTS,
    "seeds": (
        lambda value: (
            _is_count(value) or (_is_listed(value) and all(map(_is_count, value)))
        ),
        "how many, or a list of numbers from 0 on",
    ),
    "tune_seeds": (_is_count, "a number of seeds"),
    "held_out": (lambda value: isinstance(value, int | float), "a number"),
    "prepare": (
        lambda value: _is_listed(value) and all(map(_is_texts, value)),
        "a list of commands, each a list of texts",
    ),
    "paper": (
        lambda value: (
            isinstance(value, Mapping)
            and isinstance(values := value.get("values", {}), Mapping)
            and all(isinstance(number, int | float) for number in values.values())
        ),
        '{"source": text, "values": {label of a cell: number}, "unit": text}',
    ),
}


def load_study(path: str, scale: str = "small") -> Study:
    """A study file, checked.

    Args:
      path: of the file.
      scale: "small", what two CPU cores bear, or "full", the paper's.

    Raises:
      ValueError: what is wrong with it, in one line.
    """
    file = find_file(path)
    if file is None:
        raise ValueError(f"no study file {path!r}; those here are in studies/")
    if scale not in SCALES:
        raise ValueError(f"got --scale={scale}; allowed: {', '.join(SCALES)}")
    make_importable()
    try:
        get_study = runpy.run_path(str(file)).get("get_study")
        fields = None if get_study is None else get_study(scale)
    except Exception as error:  # of the file itself
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == str(file)] or [None]
        line = getattr(error, "lineno", lines[-1])  # of a syntax error
        told = next(iter(str(error).splitlines()), "")
        where = f"{path}, line {line}" if line else path
        raise ValueError(f"{where}: {type(error).__name__}: {told}") from error
    if get_study is None:
        raise ValueError(f"{path} has no get_study(scale)")
    if not isinstance(fields, Mapping):
        raise ValueError(
            f"{path}: get_study({scale!r}) returned {fields!r}, no dictionary"
        )
    fields = dict(fields)
    if scale != "small":  # it reads the table of the small one
        fields.pop("reading", None)
    try:
        return create_study(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def create_study(fields: Mapping[str, Any]) -> Study:
    """A study from its fields, checked with every change of every cell.

    Raises:
      ValueError: what is wrong with it, in one line.
    """
    known = [field.name for field in dataclasses.fields(Study)]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"unknown study key {name!r}{hint} allowed: {', '.join(known)}"
            )
    for name in ("title", "stages", "metrics", "grid"):
        if not fields.get(name):
            what = "an empty" if name in fields else "no"
            raise ValueError(f"the study has {what} {name!r}")
    for name, value in fields.items():
        holds, allowed = _FIELDS[name]
        if not holds(value):
            raise ValueError(f"got {name}={value!r}; allowed: {allowed}")
    study = Study(**fields)
    _check_fields(study)
    labels: set[str] = set()
    for cell in cells(study):
        if cell.folder in labels:
            raise ValueError(f"two cells of the grid are called {cell.label!r}")
        labels.add(cell.folder)
        _check_cell(study, cell)
    for cell in cells(study):
        reference(study, cell, cells(study))
    return study


def _check_fields(study: Study) -> None:
    if not study.seed_list or len({*study.seed_list}) < len(study.seed_list):
        raise ValueError(f"got seeds={study.seeds!r}; allowed: 1 or more, each once")
    if not 0 < study.held_out < 1:
        raise ValueError(f"got held_out={study.held_out}; allowed: between 0 and 1")
    if not 0 <= study.tune_seeds <= len(study.seed_list):
        raise ValueError(
            f"got tune_seeds={study.tune_seeds}; allowed: 0 (each seed chooses for itself) "
            f"to {len(study.seed_list)}, the seeds"
        )
    for metric in (*study.metrics, study.judge):
        if metric.partition(":")[0] not in study.stages:
            raise ValueError(
                f"got the metric {metric!r}; allowed: STAGE:METRIC with a stage of "
                f"{', '.join(study.stages)}"
            )
    for axis, label in study.baseline.items():
        if axis not in study.grid:
            raise ValueError(
                f"got baseline={{{axis!r}: {label!r}}}; allowed: axes of the grid, "
                f"{', '.join(study.grid)}"
            )
    for name in ("along", "spread"):
        axis = getattr(study, name)
        if axis and axis not in study.grid:
            raise ValueError(
                f"got {name}={axis!r}; allowed: an axis of the grid, "
                f"{', '.join(study.grid)}"
            )
    for name in study.paper:
        if name not in ("source", "values", "unit"):
            raise ValueError(
                f"unknown key {name!r} of paper; allowed: source, values, unit"
            )
    known = {cell.label for cell in cells(study)}
    unknown = [label for label in study.paper.get("values", {}) if label not in known]
    if unknown:
        raise ValueError(
            f"the paper's values name {unknown[0]!r}, which is no cell; cells: "
            f"{'; '.join(sorted(known))}"
        )


def _check_cell(study: Study, cell: Cell) -> None:
    """Applies all changes of a cell to its configs."""
    drawn = study.metrics[0].partition(":")[0]
    if drawn not in cell.stages:
        raise ValueError(
            f"cell {cell.label!r} has no stage {drawn!r}, of which the first metric is"
        )
    if cell.trials:
        _check_judge(study, cell)
    for what in filter(is_tool, cell.stages.values()):
        _check_tool(cell, what)
    for trial in ("", *cell.trials):
        for name in cell.stages:
            if not is_tool(cell.stages[name]):
                config = stage_config(study, cell, name, trial=trial)
                changed = cell.changes[name] | cell.trials.get(trial, {}).get(name, {})
                _check_solved(cell, name, config, changed)
    if cell.trials:
        _check_trials(study, cell)


def _check_tool(cell: Cell, words: Stage) -> None:
    if words[0] not in TOOL_RESULTS:
        raise ValueError(
            f"cell {cell.label!r} has the tool {words[0]!r}; allowed: "
            f"{', '.join(TOOL_RESULTS)}, whose results are known"
        )
    places = {*cell.stages, "out", "seed"}
    for name in re.findall(r"\{(\w+)\}", " ".join(words)):
        if name not in places:
            raise ValueError(
                f"cell {cell.label!r} gives {{{name}}} to {words[0]}; allowed: "
                f"{', '.join(sorted(places))}"
            )


def _check_trials(study: Study, cell: Cell) -> None:
    """Refuses trials that are the same, and those that would have seen what judges them."""
    seed, judge = study.seed_list[-1], study.judge.partition(":")[0]
    same: dict[str, str] = {}
    for trial in cell.trials:
        key = chain(study, cell, judge, trial=trial, seed=seed)
        if key in same:
            raise ValueError(
                f"cell {cell.label!r}: what is tuned, {same[key]!r} or {trial!r}, changes "
                f"no stage up to {judge!r}, which judges it (tune_by)"
            )
        same[key] = trial
        splits: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}
        for stage in stages_of(study, cell, trial=trial):
            config = stage_config(study, cell, stage, trial=trial, seed=seed)
            flat = flatten(config.to_dict())
            chosen = {key: flat[key] for key in _HELD_OUT_KEYS}
            where = (flat["data.name"], flat["data.root"])
            other, theirs = splits.setdefault(where, (stage, chosen))
            for key, value in chosen.items():
                if value != theirs[key]:
                    raise ValueError(
                        f"cell {cell.label!r} is tuned, and its stages {other!r} and "
                        f"{stage!r} have {key}={theirs[key]!r} and {value!r}, so one trains "
                        f"on images that the other holds out; allowed: one for all "
                        f"(all:{key})"
                    )


def _check_judge(study: Study, cell: Cell) -> None:
    """Refuses to choose by other images than held-out training images, or by no accuracy."""
    stage, _, metric = study.judge.partition(":")
    what = cell.stages.get(stage)
    if (
        what is None
        or is_tool(what)
        or mode_of(str(what)) == "robustness"
        or not is_accuracy(metric)
    ):
        raise ValueError(
            f"cell {cell.label!r} is tuned by {study.judge!r}; allowed for tune_by: an "
            "accuracy on the held-out training images, as evaluate:eval/top1 or "
            "pretrain:knn/top1, of a config of the cell that is not robustness"
        )


def _check_solved(
    cell: Cell, stage: str, config: ConfigDict, changes: Mapping[str, Any]
) -> None:
    """Refuses changes that a probe's solution does not depend on."""
    if config.probe.solver != "lbfgs":
        return
    for key, value in changes.items():
        if key.startswith(NOT_READ_BY_LBFGS):
            raise ValueError(
                f"cell {cell.label!r}, stage {stage!r}: got {key}={value!r} with "
                "probe.solver=lbfgs, which fits features of plain images and does not read "
                "it; allowed: with probe.solver=sgd, as in configs/linear_digits.py:sgd"
            )


def describe(study: Study) -> dict[str, Any]:
    """What results depend on, for study.json: a change of it is another study."""
    described = {}
    for cell in cells(study):
        described[cell.label] = {
            "stages": {name: _words(stage) for name, stage in cell.stages.items()},
            "changes": {name: flags(found) for name, found in cell.changes.items()},
            "trials": {
                trial: {name: flags(found) for name, found in by_stage.items() if found}
                for trial, by_stage in cell.trials.items()
            },
        }
    files = sorted(
        {
            what
            for cell in cells(study)
            for what in cell.stages.values()
            if isinstance(what, str)
        }
    )
    return {
        "title": study.title,
        # As they are without the changes of cells, so that an edited file is noticed.
        "configs": {file: flatten(load_config(file, []).to_dict()) for file in files},
        "prepare": [" ".join(command) for command in study.prepare],
        "held_out": study.held_out,
        "tune_seeds": study.tune_seeds,
        "tuned_by": study.judge,
        "cells": described,
    }


def _words(stage: Stage) -> str:
    return stage if isinstance(stage, str) else " ".join(stage)
