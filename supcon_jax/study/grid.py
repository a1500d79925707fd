"""The grid of a study: its cells, and the configs that their stages have."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from supcon_jax.config.check import flatten
from supcon_jax.config.keys import TRAINING_MODES
from supcon_jax.config.loading import load_config

# "[stage:]key" -> value; without a stage the first one is meant, and "all" means each that
# is a config. A stage's name alone gives it another config, or none: it is left out.
Changes = Mapping[str, Any]
# "FILE", "FILE:VARIANT", or the words after "python -m" of a tool.
Stage = str | tuple[str, ...]
# Where tools write, relative to the folder of a job; "{...}" as in their arguments.
TOOL_RESULTS = {"supcon_jax.tools.embeddings": "{pretrain}/embeddings.json"}


@dataclasses.dataclass(frozen=True)
class Study:
    """A study; the fields of a study file.

    Attributes:
      title: of the table and the picture.
      stages: name -> config or tool, in order. The first one is trained from nothing; the
        others get the workdir of an earlier one as `pretrained`.
      metrics: "stage:metric" each, as metrics.jsonl names it; the first is the one that is
        drawn, and compared with the paper's.
      grid: axis -> values. An axis that is a "[stage:]key" takes a sequence of its values;
        any other takes label -> changes. The cells are all combinations.
      seeds: how many (0, 1, ...), or which.
      shared: changes for all cells.
      baseline: axis -> label; each cell is compared with the one that has these.
      tune: axis -> values, as `grid`: for each cell the combination that does best on
        training images that were held out. A cell's changes may have a "tune" of their own.
      tune_by: "stage:metric" by which it does best; "": the first of `metrics`.
      tune_seeds: 0: each seed tries all combinations and takes its own best, so that intervals
        over the seeds include the choice; n: the first n try them for all seeds, by their mean.
      held_out: share of the training images that chooses.
      prepare: tools that run once before the cells, for what cells share.
      along: the axis that runs along the picture; "": the last one.
      spread: an axis; for each of its labels the spread over all other settings is told.
      paper: {"source": where, "values": label of a cell -> number, "unit": of them}.
      reading: what the small table says, in sentences for the documents.

    In values and tool arguments "{seed}" is the seed, "{out}" the study's folder, and
    "{pretrain}" the workdir of the stage of that name.
    """

    title: str
    stages: Mapping[str, Stage]
    metrics: Sequence[str]
    grid: Mapping[str, Any]
    seeds: int | Sequence[int] = 3
    shared: Changes = dataclasses.field(default_factory=dict)
    baseline: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tune: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tune_by: str = ""
    tune_seeds: int = 0
    held_out: float = 0.2
    prepare: Sequence[Sequence[str]] = ()
    along: str = ""
    spread: str = ""
    paper: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reading: str = ""

    @property
    def seed_list(self) -> list[int]:
        """The seeds of every cell."""
        return (
            list(range(self.seeds))
            if isinstance(self.seeds, int)
            else [int(seed) for seed in self.seeds]
        )

    def choosers(self, seed: int) -> list[int]:
        """The seeds that choose for a seed."""
        return self.seed_list[: self.tune_seeds] if self.tune_seeds else [seed]

    @property
    def trial_seeds(self) -> list[int]:
        """The seeds with which combinations are tried."""
        return self.seed_list[: self.tune_seeds or None]

    @property
    def judge(self) -> str:
        """The metric by which tuning chooses."""
        return self.tune_by or self.metrics[0]

    @property
    def axes(self) -> list[str]:
        """The names of the grid's axes, as a table shows them."""
        return [_shown(axis) for axis in self.grid]


class Cell(NamedTuple):
    """One combination of the grid.

    Attributes:
      values: label on each axis.
      stages: name -> config or tool, those that it has.
      changes: stage -> config key -> value.
      trials: label -> changes of stages, of which tuning chooses; empty: nothing to tune.
    """

    values: tuple[str, ...]
    stages: dict[str, Stage]
    changes: dict[str, dict[str, Any]]
    trials: dict[str, dict[str, dict[str, Any]]]

    @property
    def label(self) -> str:
        """The cell in words."""
        return ", ".join(self.values)

    @property
    def folder(self) -> str:
        """Its folder's name."""
        return slug(self.label)


@functools.lru_cache(maxsize=4096)
def _config(file: str, changes: tuple[str, ...]) -> ConfigDict:
    return load_config(file, list(changes))


def stage_config(
    study: Study,
    cell: Cell,
    stage: str,
    *,
    trial: str = "",
    chosen: str = "",
    seed: int = 0,
) -> ConfigDict:
    """The config of a stage of a cell; see `stage_changes`.

    Raises:
      ValueError: a change that its config does not take; the cell and stage are named.
    """
    found = stage_changes(study, cell, stage, trial=trial, chosen=chosen, seed=seed)
    try:
        return _config(str(cell.stages[stage]), tuple(flags(found)))
    except ValueError as error:
        where = f"cell {cell.label!r}" + (f", trial {trial!r}" if trial else "")
        raise ValueError(f"{where}, stage {stage!r}: {error}") from None


def stages_of(study: Study, cell: Cell, *, trial: str) -> list[str]:
    """The stages of a cell; those of a trial end with the one that is judged."""
    names = list(cell.stages)
    return names[: names.index(study.judge.partition(":")[0]) + 1] if trial else names


def stage_changes(
    study: Study,
    cell: Cell,
    stage: str,
    *,
    trial: str = "",
    chosen: str = "",
    seed: int = 0,
    places: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a stage's config is changed by: the cell's, the trial's, its seed and source.

    Args:
      study, cell, stage: what.
      trial: label of what is tried, on training images without the held-out ones.
      chosen: label of the trial that won, of a cell that was tuned.
      seed: of the stage.
      places: stage -> its workdir, and "out"; None: their names, to check or to compare.
    """
    changes = {"seed": seed, "writers": (), "next_config": ""}
    changes |= cell.changes[stage]
    if label := trial or chosen:
        changes |= cell.trials[label][stage]
    if trial:
        changes["data.validation_fraction"] = study.held_out
    places = {name: name for name in (*cell.stages, "out")} | dict(places or {})
    source = source_of(cell, stage)
    if source and "pretrained" not in changes:
        changes["pretrained"] = places[source]
    values = places | {"seed": seed}
    return {key: fill(value, values) for key, value in changes.items()}


def stage_key(
    study: Study,
    cell: Cell,
    stage: str,
    *,
    trial: str = "",
    chosen: str = "",
    seed: int,
) -> str | None:
    """What a stage's result depends on, where stages with equal keys have equal results.

    None in a cell that has a tool, which may read and write anything in the workdirs of its
    cell.
    """
    if any(is_tool(what) for what in cell.stages.values()):
        return None
    return chain(study, cell, stage, trial=trial, chosen=chosen, seed=seed)


def chain(
    study: Study,
    cell: Cell,
    stage: str,
    *,
    trial: str = "",
    chosen: str = "",
    seed: int,
) -> str:
    """A stage and all before it, with their changes."""
    names = list(cell.stages)
    found = [
        (
            name,
            cell.stages[name],
            {}
            if is_tool(cell.stages[name])
            else stage_changes(
                study, cell, name, trial=trial, chosen=chosen, seed=seed
            ),
        )
        for name in names[: names.index(stage) + 1]
    ]
    return json.dumps(found, sort_keys=True)


def fill(value: Any, places: Mapping[str, Any]) -> Any:
    """A value with its "{...}" filled in."""
    if not isinstance(value, str):
        return value
    if value == "{seed}":
        return places["seed"]
    return re.sub(
        r"\{(\w+)\}", lambda match: str(places.get(match[1], match[0])), value
    )


def flags(changes: Mapping[str, Any]) -> list[str]:
    """Changes as `KEY=VALUE`, the way command lines have them."""
    return [f"{key}={value}" for key, value in changes.items()]


@functools.lru_cache(maxsize=256)
def mode_of(config: str) -> str:
    """The mode of a stage's config."""
    return str(flatten(load_config(config, []).to_dict())["mode"])


def is_tool(stage: Stage) -> bool:
    """Whether a stage is a tool, and no config."""
    return not isinstance(stage, str)


def source_of(cell: Cell, stage: str) -> str | None:
    """The stage whose workdir is the `pretrained` of this one.

    A training stage starts from the nearest pretraining before it, what only measures takes
    the nearest training.
    """
    if is_tool(cell.stages[stage]):
        return None
    mode = mode_of(str(cell.stages[stage]))
    wanted = ("pretrain",) if mode in TRAINING_MODES else TRAINING_MODES
    names = list(cell.stages)
    for name in reversed(names[: names.index(stage)]):
        config = cell.stages[name]
        if not is_tool(config) and mode_of(str(config)) in wanted:
            return name
    return None


def cells(study: Study) -> list[Cell]:
    """The cells of the grid, in its order.

    Raises:
      ValueError: an axis without values, or a change of a stage that there is not.
    """
    found = []
    for combination in itertools.product(*(_points(study.grid))):
        labels = tuple(label for label, _ in combination)
        changes = dict(study.shared)
        tune = dict(study.tune)
        for _, change in combination:
            change = dict(change)
            if not isinstance(own := change.pop("tune", tune), Mapping):
                raise ValueError(f"got tune={own!r}; allowed: axis -> values")
            tune = dict(own)
            changes |= change
        stages = _stages(study, changes)
        first = next(iter(study.stages))
        changes = {
            key if ":" in key else f"{first}:{key}": value
            for key, value in changes.items()
            if key not in study.stages
        }
        for key in itertools.chain(changes, *(c for _, c in _all_points(tune))):
            _check_stage(study, key)
        trials: dict[str, dict[str, dict[str, Any]]] = {}
        for trial in itertools.product(*_points(tune)) if tune else ():
            of_trial = {
                key if ":" in key else f"{first}:{key}": value
                for _, change in trial
                for key, value in change.items()
            }
            label = ", ".join(label for label, _ in trial)
            if slug(label) in map(slug, trials):
                raise ValueError(
                    f"two settings of tune are called {label!r}, or have folders of one name"
                )
            trials[label] = _by_stage(of_trial, stages)
        found.append(Cell(labels, stages, _by_stage(changes, stages), trials))
    return found


def _all_points(axes: Mapping[str, Any]) -> list[tuple[str, Changes]]:
    return list(itertools.chain.from_iterable(_points(axes)))


def _check_stage(study: Study, key: str) -> None:
    stage, colon, _ = key.rpartition(":")
    if colon and stage != "all" and stage not in study.stages:
        raise ValueError(
            f"got the change {key!r}; allowed before the colon: all, "
            f"{', '.join(study.stages)}"
        )


def _points(axes: Mapping[str, Any]) -> Iterator[list[tuple[str, Changes]]]:
    """For each axis its labels with their changes."""
    for axis, values in axes.items():
        if isinstance(values, Mapping):
            found = [(text_of(label), changes) for label, changes in values.items()]
        elif isinstance(values, Sequence) and not isinstance(values, str):
            found = [(text_of(value), {axis: value}) for value in values]
        else:
            raise ValueError(
                f"axis {axis!r} is {values!r}; allowed: a sequence of the values of a "
                "config key, or label -> changes"
            )
        if not found:
            raise ValueError(f"axis {axis!r} of the grid is empty")
        for label, changes in found:
            if not isinstance(changes, Mapping):
                raise ValueError(
                    f"{label!r} of axis {axis!r} is {changes!r}; allowed: changes, "
                    '{"KEY": value}'
                )
        yield found


def text_of(value: Any) -> str:
    """A value as a label."""
    if isinstance(value, tuple | list):
        return "-".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def _stages(study: Study, changes: Changes) -> dict[str, Stage]:
    """The stages of a cell; those that its changes leave out are not among them."""
    found = dict(study.stages)
    for key, value in changes.items():
        if key in found:
            found[key] = value
    return {name: stage for name, stage in found.items() if stage is not None}


def _by_stage(
    changes: Changes, stages: Mapping[str, Stage]
) -> dict[str, dict[str, Any]]:
    """Changes of config keys, sorted by the stages that they are for."""
    names = list(stages)
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    # What is said for all comes first: a stage's own value wins.
    for key, value in sorted(
        changes.items(), key=lambda c: not c[0].startswith("all:")
    ):
        stage, _, name = key.rpartition(":")
        if stage == "all":
            for each in names:
                if not is_tool(stages[each]):
                    found[each][name] = value
        elif stage in names:
            found[stage][name] = value
    return found


def reference(study: Study, cell: Cell, grid: Sequence[Cell]) -> Cell | None:
    """Of a grid the cell that a cell is compared with; None where there is none, or it is it.

    Raises:
      ValueError: the baseline names no cell.
    """
    if not study.baseline:
        return None
    wanted = list(cell.values)
    axes = list(study.grid)
    for axis, label in study.baseline.items():
        wanted[axes.index(axis)] = text_of(label)
    if tuple(wanted) == cell.values:
        return None
    for other in grid:
        if other.values == tuple(wanted):
            return other
    raise ValueError(f"the baseline {dict(study.baseline)} is no cell of the grid")


def _shown(axis: str) -> str:
    """An axis in words: of a config key its last part."""
    return axis.rpartition(":")[2].rpartition(".")[2].replace("_", " ")


def slug(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^\w.+-]+", "_", label).strip("_") or "cell"
