"""The jobs of a study, and the stages that several of them have in common."""

from __future__ import annotations

import pathlib
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from supcon_jax.run.workdir import finished_metrics
from supcon_jax.study.grid import Cell, Study, stage_key, stages_of
from supcon_jax.study.results import Results, folder_of


class Job(NamedTuple):
    """A cell with a seed, or one of its trials with one.

    Attributes:
      cell: of the grid.
      trial: label of what is tried; "": the cell itself.
      seed: of every stage.
      chosen: label of the trial that won, of a tuned cell.
    """

    cell: Cell
    trial: str
    seed: int
    chosen: str = ""

    def folder(self, out: pathlib.Path) -> pathlib.Path:
        """Where it runs."""
        return folder_of(
            self.cell, self.seed, out, trial=self.trial, chosen=self.chosen
        )

    def stages(self, study: Study) -> list[str]:
        """The names of its stages."""
        return stages_of(study, self.cell, trial=self.trial)

    @property
    def words(self) -> str:
        """The job in words."""
        tried = f" [{self.trial}]" if self.trial else ""
        return f"{self.cell.label}{tried}, seed {self.seed}"


def jobs(results: Results) -> list[Job]:
    """What there is to run: trials first, then the cells whose trials are over."""
    study, found = results.study, []
    for cell in results.cells:
        found += [
            Job(cell, trial, seed)
            for seed in study.trial_seeds
            for trial in cell.trials
        ]
        for seed in study.seed_list:
            if results.is_tuned(cell, seed):
                best = results.chosen(cell, seed)
                # Without one all trials failed, which are told of as they are.
                if best or not cell.trials:
                    found.append(Job(cell, "", seed, best))
    return found


def count_jobs(results: Results) -> int:
    """How many jobs a study has: trials too, and cells whose trials are not over."""
    study = results.study
    return len(jobs(results)) + sum(
        not results.is_tuned(cell, seed)
        for cell in results.cells
        for seed in study.seed_list
    )


class SharedStages:
    """Stages that several jobs have, all before them too: one job runs them for all.

    An axis of the probe, for example, needs one pretraining for all of its labels.
    """

    def __init__(self, study: Study, every: Sequence[Job], out: pathlib.Path):
        """Finds them.

        Args:
          study: see `grid.Study`.
          every: its jobs.
          out: its folder.
        """
        self._study, self._out = study, out
        workdirs = defaultdict(list)
        for job in every:
            for stage in job.stages(study):
                key = stage_key(
                    study,
                    job.cell,
                    stage,
                    trial=job.trial,
                    chosen=job.chosen,
                    seed=job.seed,
                )
                if key is not None:
                    workdirs[key].append(job.folder(out) / stage)
        self._same = {
            workdir: same
            for same in workdirs.values()
            if len(same) > 1
            for workdir in same
        }

    def workdir(self, job: Job, stage: str) -> pathlib.Path:
        """Where a job finds a stage: with another job that has finished it, or with itself.

        What the job has begun itself it ends itself.
        """
        here = job.folder(self._out) / stage
        if here.exists():
            return here
        return next(filter(_is_finished, self._same.get(here, ())), here)

    def free(self, waiting: Sequence[Job]) -> list[Job]:
        """The jobs that need no stage which an earlier one of them is about to run."""
        found: list[Job] = []
        awaited: set[pathlib.Path] = set()
        for job in waiting:
            needed = {
                self._same[here][0]
                for stage in job.stages(self._study)
                if (here := job.folder(self._out) / stage) in self._same
                and not _is_finished(self.workdir(job, stage))
            }
            if not needed & awaited:
                found.append(job)
            awaited |= needed
        return found


def _is_finished(workdir: pathlib.Path) -> bool:
    return finished_metrics(workdir) is not None
