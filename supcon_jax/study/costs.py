"""What a study costs: runs, steps, images and operations, before anything is run."""

from __future__ import annotations

import functools
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from supcon_jax import parallel
from supcon_jax.config.check import config_of
from supcon_jax.config.keys import KEYS, TRAINING_MODES
from supcon_jax.config.loading import apply_changes
from supcon_jax.logs import format_duration
from supcon_jax.planning.flops import count_flops
from supcon_jax.planning.forecast import Data, look_at_data
from supcon_jax.run.plan import create_plan
from supcon_jax.study.grid import (
    Cell,
    Study,
    cells,
    is_tool,
    stage_config,
    stage_key,
    stages_of,
)
from supcon_jax.study.jobs import count_jobs, jobs
from supcon_jax.study.results import Results

# Keys whose values change no operation of a step, only its numbers.
_SCALARS = (
    "seed",
    "epochs",
    "total_steps",
    "data.fraction",
    "data.label_noise",
    "data.labelled_fraction",
    "data.labelled_per_class",
    "data.samples_per_class",
    "data.split_seed",
    "data.validation_fraction",
    "augment.crop_area",
    "loss.temperature",
    "loss.label_smoothing",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.warmup_epochs",
)


class Cost(NamedTuple):
    """What all runs of one stage cost together.

    Attributes:
      runs: processes.
      steps: updates; 0 where none are taken.
      images: that are seen, each view counted.
      flops: operations of the training steps; None where they were not counted.
    """

    runs: int
    steps: int
    images: int
    flops: float | None


def estimate(
    study: Study, places: Sequence[str] = (), *, flops: bool = False
) -> dict[str, Cost]:
    """The costs of a study by stage, nothing of which is run.

    Args:
      study: see `definition.Study`.
      places: `KEY=VALUE` changes for every config: where data are.
      flops: whether operations are counted, which traces each step that differs.
    """
    costs: dict[str, Cost] = {}
    keys: set[str] = set()
    for cell in cells(study):
        for trial in ("", *cell.trials):
            seeds = study.trial_seeds if trial else study.seed_list
            for stage in stages_of(study, cell, trial=trial):
                times = _count_new(study, cell, stage, trial, seeds, keys)
                if not times:
                    continue
                one = Cost(1, 0, 0, 0.0 if flops else None)
                if not is_tool(cell.stages[stage]):
                    # Which trial wins is not known: a tuned cell costs the most that it may.
                    tuned = [] if trial else cell.trials
                    configs = [
                        stage_config(study, cell, stage, trial=trial, chosen=chosen)
                        for chosen in (tuned or [""])
                    ]
                    each = [_of_config(c, places, flops=flops) for c in configs]
                    one = max(each, key=lambda cost: (cost.flops or 0, cost.images))
                before = costs.get(stage, Cost(0, 0, 0, 0.0 if flops else None))
                costs[stage] = Cost(
                    before.runs + times,
                    before.steps + times * one.steps,
                    before.images + times * one.images,
                    None
                    if one.flops is None or before.flops is None
                    else before.flops + times * one.flops,
                )
    return costs


def _count_new(
    study: Study,
    cell: Cell,
    stage: str,
    trial: str,
    seeds: Sequence[int],
    keys: set[str],
) -> int:
    """Of how many seeds no job that was counted before has this stage; adds their keys."""
    if cell.trials and not trial:
        return len(seeds)  # which trial wins is not known
    found = [stage_key(study, cell, stage, trial=trial, seed=seed) for seed in seeds]
    new = [key for key in found if key is None or key not in keys]
    keys.update(key for key in new if key is not None)
    return len(new)


def _of_config(config: ConfigDict, places: Sequence[str], *, flops: bool) -> Cost:
    """One run of a config."""
    config = ConfigDict(config)
    apply_changes(config, [*places, "seed=0"])
    return _of_text(json.dumps(config.to_dict()), flops)


@functools.lru_cache(maxsize=1024)
def _of_text(config_text: str, flops: bool) -> Cost:
    config = config_of(json.loads(config_text))
    none = 0.0 if flops else None
    if config.mode not in TRAINING_MODES:
        return Cost(1, 0, 0, none)
    chosen_by = {"mode": config.mode, "loss": {"name": config.loss.name}}
    data = _look_at_data(json.dumps({**chosen_by, "data": config.data.to_dict()}))
    if config.probe.solver == "lbfgs":
        return Cost(1, 0, data.num_examples, none)
    plan = create_plan(
        config,
        parallel.create_mesh(jax.devices()[:1]),
        num_classes=data.num_classes,
        num_examples=data.num_examples,
    )
    images = plan.total_steps * config.batch_size * config.data.views
    if not flops:
        return Cost(1, plan.total_steps, images, None)
    # One trace for all configs whose steps have the same operations.
    config.update_from_flattened_dict({key: KEYS[key].default for key in _SCALARS})
    config.total_steps = 1
    each = _flops(json.dumps(config.to_dict()), data.num_classes, data.whole_images)
    return Cost(1, plan.total_steps, images, each * plan.total_steps)


@functools.lru_cache(maxsize=64)
def _look_at_data(config_text: str) -> Data:
    config = config_of(json.loads(config_text))
    config.batch_size = 1  # any data are enough to be looked at
    return look_at_data(config, measure=False)


@functools.lru_cache(maxsize=256)
def _flops(config_text: str, num_classes: int, whole_images: bool) -> float:
    """Operations of one step."""
    plan = create_plan(
        config_of(json.loads(config_text)),
        parallel.create_mesh(jax.devices()[:1]),
        num_classes=num_classes,
        num_examples=10**6,
        whole_images=whole_images,
    )
    state, batch = plan.abstract_state(), plan.abstract_batch()
    return float(count_flops(plan.step, state, batch, *plan.abstract_frozen()))


def as_text(study: Study, costs: dict[str, Cost], out: pathlib.Path) -> str:
    """The costs for people, with the time that is left where some jobs are done."""
    results = Results(study, out)
    every = [results.read(job.folder(out)) for job in jobs(results)]
    over, total = [r for r in every if r is not None], count_jobs(results)
    seeds = len(study.seed_list)
    lines = [
        f"{study.title}: {len(results.cells)} cells x {seeds} seeds, in {out}",
        "| stage | runs | steps | images, all views | operations |",
        "|---|---|---|---|---|",
    ]
    for stage, cost in costs.items():
        operations = "" if not cost.flops else f"{cost.flops / 1e12:,.3g} TFLOP"
        lines.append(
            f"| {stage} | {cost.runs} | {cost.steps:,} | {cost.images:,} | {operations} |"
        )
    told = f"{len(over)} of {total} jobs are done"
    if over:
        each = statistics.fmean(sum(r["seconds"].values()) for r in over)
        left = (total - len(over)) * each
        told += f", {format_duration(each)} each: about {format_duration(left)} for the rest with one runner"
    return "\n".join([*lines, told])
