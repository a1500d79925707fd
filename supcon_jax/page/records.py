"""What a run left in its workdir: read as far as it is there, whatever made it."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict

from supcon_jax import storage
from supcon_jax.config.check import config_of, flatten
from supcon_jax.config.keys import TRAINING_MODES
from supcon_jax.run.workdir import read_config
from supcon_jax.writers import Record, read_metrics

T = TypeVar("T")


class Predictions(NamedTuple):
    """Of a classifier on its evaluation split.

    Attributes:
      logits: `[n, C]`.
      labels: `[n]`.
      ids: `[n]`, places in the split.
    """

    logits: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


@dataclasses.dataclass
class RunRecord:
    """A run as its workdir tells it.

    Attributes:
      name: what the page calls it.
      workdir: a path.
      config: of the run; keys that it lacks have their defaults.
      saved: its config.json, flat.
      lines: of metrics.jsonl.
      finished: whether the last line says that the run is complete.
      notes: what a reader must know of it: unfinished, files that cannot be read.
      predictions: of predictions.npz.
      classes: their names, of classes.csv; () where it is not there.
      robustness: corruption -> severity -> top-1, of robustness.csv.
      embeddings: "embedding" or "projection" -> metric -> value, of embeddings.json.
      measured: what these were measured on: the other entries of that file.
    """

    name: str
    workdir: str
    config: ConfigDict
    saved: dict[str, Any]
    lines: list[Record]
    finished: bool
    notes: list[str]
    predictions: Predictions | None = None
    classes: tuple[str, ...] = ()
    robustness: dict[str, dict[float, float]] = dataclasses.field(default_factory=dict)
    embeddings: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def newest(self) -> Record:
        """The newest value of every metric; of a finished run those of its final line."""
        if self.finished:
            return self.lines[-1]
        return {name: value for line in self.lines for name, value in line.items()}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of the predictions, or their numbers."""
        count = 0 if self.predictions is None else self.predictions.logits.shape[1]
        known = len(self.classes) == count
        return self.classes if known else tuple(map(str, range(count)))

    @property
    def total_steps(self) -> int | None:
        """Steps that a training run makes; None where that is not known."""
        if self.config.mode not in TRAINING_MODES:
            return None
        if self.config.total_steps:
            return self.config.total_steps
        steps, epochs = self.newest.get("step", 0), self.newest.get("epoch", 0)
        return round(self.config.epochs * steps / epochs) if epochs else None


def read_records(workdirs: list[str]) -> list[RunRecord]:
    """What every workdir holds.

    Raises:
      ValueError: one holds no run, or is named twice.
    """
    places = [str(storage.absolute(workdir)) for workdir in workdirs]
    for place, workdir in zip(places, workdirs, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{workdir} is given twice; name each workdir once")
    names = _short_names(places)
    return [
        read_record(workdir, name)
        for workdir, name in zip(workdirs, names, strict=True)
    ]


def read_record(workdir: str | pathlib.Path, name: str) -> RunRecord:
    """What a workdir holds; what in it cannot be read is a note.

    Raises:
      ValueError: it holds no run.
    """
    saved = read_config(workdir)
    if saved is None:
        raise ValueError(
            f"no run in {workdir}: it has no config.json; name the workdir of a run"
        )
    lines = read_metrics(workdir)
    run = RunRecord(
        name=name,
        workdir=str(workdir),
        config=config_of(saved),
        saved=flatten(saved),
        lines=lines,
        finished=bool(lines and lines[-1].get("final")),
        notes=[],
    )
    if not run.finished:
        run.notes.append(_how_far(run))

    def read(file: str, parse: Callable[[bytes], T], otherwise: T) -> T:
        try:
            return parse(storage.read(storage.join(workdir, file)))
        except FileNotFoundError:
            return otherwise
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            run.notes.append(f"{file} cannot be read, and is left out: {error}")
            return otherwise

    run.predictions = read("predictions.npz", _parse_predictions, None)
    run.classes = read("classes.csv", _parse_classes, ())
    run.robustness = read("robustness.csv", _parse_robustness, {})
    nothing = (run.embeddings, run.measured)
    run.embeddings, run.measured = read("embeddings.json", _parse_embeddings, nothing)
    step, newest = run.measured.get("step"), run.newest.get("step")
    if step is not None and newest is not None and step != newest:
        run.notes.append(
            f"embeddings.json measured step {step}, and the newest is {newest}; python -m "
            f"supcon_jax.tools.embeddings {workdir} measures that"
        )
    return run


def _how_far(run: RunRecord) -> str:
    if not run.lines:
        return "not finished: it has written no metrics yet"
    total = f" of {run.total_steps:,}" if run.total_steps else ""
    return (
        f"not finished: it reached step {run.lines[-1]['step']:,}{total}; the command "
        "that started it goes on with it"
    )


def _parse_predictions(content: bytes) -> Predictions:
    with np.load(io.BytesIO(content)) as file:
        found = Predictions(*(file[key] for key in Predictions._fields))
    shapes = found.logits.shape[:1], found.labels.shape, found.ids.shape
    if found.logits.ndim != 2 or len({*shapes}) != 1 or not len(found.labels):
        raise ValueError(f"its arrays have the shapes {shapes}")
    labels = found.labels
    if labels.min() < 0 or labels.max() >= found.logits.shape[1]:
        raise ValueError(f"its labels are not those of {found.logits.shape[1]} classes")
    return found


def _parse_classes(content: bytes) -> tuple[str, ...]:
    table = csv.DictReader(io.StringIO(content.decode(errors="replace")))
    return tuple(row["name"] for row in table)


def _parse_robustness(content: bytes) -> dict[str, dict[float, float]]:
    """A row for each corruption with a column for each severity, or a row for each."""
    table = csv.DictReader(io.StringIO(content.decode(errors="replace")))
    found: dict[str, dict[float, float]] = {}
    for row in table:
        cells = {k: v for k, v in row.items() if k and isinstance(v, str)}
        values = {
            name.removeprefix("top1_"): value
            for name, value in cells.items()
            if name.startswith("top1_")
        } or {cells.get("severity", ""): cells.get("top1", "")}
        for severity, top1 in values.items():
            # Means and empty cells are no numbers.
            with contextlib.suppress(ValueError):
                of = found.setdefault(cells.get("corruption", ""), {})
                of[float(severity)] = float(top1)
    found = {corruption: of for corruption, of in found.items() if of}
    if not found:
        raise ValueError("it has no top-1 of a corruption and severity")
    return found


def _parse_embeddings(
    content: bytes,
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """The numbers of each representation, and what they were measured on."""
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    rest = {name: x for name, x in found.items() if not isinstance(x, dict)}
    numbers = {
        name: {
            metric: float(value)
            for metric, value in flatten(metrics).items()
            if isinstance(value, int | float)
        }
        for name, metrics in found.items()
        if isinstance(metrics, dict)
    }
    return numbers, rest


def _short_names(places: list[str]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    parts = [place.rstrip("/").split("/") for place in places]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len({*names}) == len(names):
            return names
    return places
