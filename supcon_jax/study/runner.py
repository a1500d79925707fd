"""Runs the cells of a study: each stage in a process of its own, any number of runners.

A job is a cell with a seed (or one of its trials, where it is tuned). Its folder holds the
workdirs of its stages, their output, and result.json when it is done. A runner takes the
next job whose folder nobody holds, so runners share a folder without knowing of each other;
one that was killed leaves no lock behind, and its job goes on from its last checkpoint.
A stage that several jobs have is run by the first of them, and the others wait for it.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from supcon_jax import storage
from supcon_jax.logs import format_duration
from supcon_jax.run.stop import Stopped, StopRequests, restart_command
from supcon_jax.run.workdir import finished_metrics
from supcon_jax.storage.lock import Lock
from supcon_jax.study import results
from supcon_jax.study.definition import describe
from supcon_jax.study.grid import (
    TOOL_RESULTS,
    Cell,
    Study,
    fill,
    flags,
    is_tool,
    stage_changes,
)
from supcon_jax.study.jobs import Job, SharedStages, count_jobs, jobs

logger = logging.getLogger(__name__)
WAIT_S = 5.0  # between two looks at jobs that other runners have
STOPPED_CODE = 85  # of a stage that was asked to stop, and can go on


def run_study(study: Study, out: pathlib.Path, *, places: Sequence[str] = ()) -> bool:
    """Runs what is not done yet, and writes table and CSV after every job, the picture at the end.

    Args:
      study: see `definition.Study`.
      out: its folder; other runners may work in it at the same time.
      places: `KEY=VALUE` changes for every config that change no result: where data are.

    Returns:
      Whether all jobs of the study are done, and none failed.

    Raises:
      ValueError: the folder holds results of another study; what differs is named.
      Stopped: a signal; what was begun goes on with the same command.
    """
    open_folder(study, out)
    began = time.time()
    with StopRequests() as stop:
        _prepare(study, out, places, stop)
        told = False
        while waiting := _waiting(every := jobs(study, out), out, began):
            free = SharedStages(study, every, out).free(waiting)
            if _run_first_free(free, study, out, places, stop, began):
                results.write(study, out)
                told = False
                continue
            if not told:
                told = True
                logger.info("%d jobs are with other runners; waiting", len(waiting))
            with stop.interruptible():
                time.sleep(WAIT_S)
    results.write(study, out)
    results.draw(study, out)
    return not results.failures(study, out)


def open_folder(study: Study, out: pathlib.Path) -> None:
    """Makes the study's folder, or checks that its results are of this study.

    Raises:
      ValueError: it holds results of another one; the first difference is named.
    """
    path = out / "study.json"
    ours = json.loads(json.dumps(describe(study)))
    theirs = json.loads(path.read_text()) if path.exists() else None
    if theirs is not None:
        if difference := _difference(theirs, ours):
            raise ValueError(
                f"{out} has results of another version of this study: {difference}; use "
                "another --out, or remove the folder"
            )
        # Cells that were added meanwhile join those that are there.
        ours["cells"] = theirs["cells"] | ours["cells"]
    out.mkdir(parents=True, exist_ok=True)
    storage.write(path, (json.dumps(ours, indent=2) + "\n").encode())


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What is not the same in two descriptions; cells may be added, and taken away."""
    for key, value in theirs.items():
        if key not in ("cells", "title") and ours.get(key) != value:
            return f"{key} was {value!r} and is {ours.get(key)!r}"
    for label, cell in theirs["cells"].items():
        now = ours["cells"].get(label, cell)
        for part in cell:
            for name in {**cell[part], **now[part]}:
                was, is_now = cell[part].get(name), now[part].get(name)
                if was != is_now:
                    return f"{part} of cell {label!r}, {name!r}, was {was!r} and is {is_now!r}"
    return ""


def _is_over(job: Job, out: pathlib.Path, *, since: float) -> bool:
    """Whether a job is done, or failed in this very call; older failures are tried again."""
    result = results.read(job.folder(out))
    if result is None:
        return False
    return not result.get("failed") or result["time"] >= since


def _waiting(every: Sequence[Job], out: pathlib.Path, began: float) -> list[Job]:
    return [job for job in every if not _is_over(job, out, since=began)]


def _run_first_free(
    free: Sequence[Job],
    study: Study,
    out: pathlib.Path,
    places: Sequence[str],
    stop: StopRequests,
    began: float,
) -> bool:
    """Runs the first job that no other runner has; False where there is none."""
    for job in free:
        folder = job.folder(out)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock(folder)
        except ValueError:  # another runner has it
            continue
        try:
            if not _is_over(job, out, since=began):
                run_job(job, study, out, places, stop, began=began)
        finally:
            lock.release()
        return True
    return False


def run_job(
    job: Job,
    study: Study,
    out: pathlib.Path,
    places: Sequence[str],
    stop: StopRequests,
    *,
    began: float,
) -> None:
    """Runs the stages of a job one after the other and writes its result."""
    folder = job.folder(out)
    result: dict[str, Any] = {"metrics": {}, "seconds": {}, "shared": {}, "time": 0.0}
    shared = SharedStages(study, jobs(study, out), out)
    workdirs: dict[str, pathlib.Path] = {}
    for stage in job.stages(study):
        start = time.monotonic()
        workdirs[stage] = shared.workdir(job, stage)
        failure = ""
        if workdirs[stage].parent == folder:
            command = stage_command(job, study, stage, workdirs, out, places)
            failure = _run(command, folder / f"{stage}.log", stop)
        else:
            result["shared"][stage] = str(workdirs[stage].relative_to(out))
        result["seconds"][stage] = round(time.monotonic() - start, 2)
        found = None if failure else _stage_metrics(job.cell, stage, workdirs)
        if failure or found is None:
            result["failed"] = f"{stage}: {failure or 'it wrote no final metrics'}"
            break
        result["metrics"] |= {f"{stage}:{name}": value for name, value in found.items()}
    result |= {"chosen": job.chosen, "time": time.time()}
    storage.write(folder / "result.json", (json.dumps(result) + "\n").encode())
    _report(job, study, out, result, began)


def stage_command(
    job: Job,
    study: Study,
    stage: str,
    workdirs: Mapping[str, pathlib.Path],
    out: pathlib.Path,
    places: Sequence[str],
) -> list[str]:
    """The command line of a stage.

    Args:
      job, study, stage: what.
      workdirs: of this stage and of those before.
      out: the study's folder.
      places: `KEY=VALUE` changes for every config.
    """
    what = job.cell.stages[stage]
    here = {name: str(workdir) for name, workdir in workdirs.items()} | {
        "out": str(out)
    }
    if is_tool(what):
        module, *arguments = (
            fill(word, here | {"seed": str(job.seed)}) for word in what
        )
        return [sys.executable, "-m", module, *arguments, *_as_flags(places)]
    changes = stage_changes(
        study,
        job.cell,
        stage,
        trial=job.trial,
        chosen=job.chosen,
        seed=job.seed,
        places=here,
    )
    command = [sys.executable, "-m", "supcon_jax", f"--config={what}"]
    command.append(f"--workdir={workdirs[stage]}")
    return [*command, *_as_flags(flags(changes)), *_as_flags(places)]


def _as_flags(changes: Sequence[str]) -> list[str]:
    return [f"--config.{change}" for change in changes]


def _run(command: Sequence[str], log: pathlib.Path, stop: StopRequests) -> str:
    """Runs a command; returns what it died of, in one line, or nothing.

    Raises:
      Stopped: we or it were asked to stop; it has saved what it had.
    """
    with log.open("ab") as output:
        environment = os.environ | {"SUPCON_STOPPED_CODE": str(STOPPED_CODE)}
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            with stop.interruptible():
                code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise _stopped() from None
    if code == STOPPED_CODE:
        raise _stopped()
    if code == 0:
        return ""
    text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()] or ["no output"]
    errors = [line for line in lines if line.startswith("error: ")]
    return f"exit code {code}: {(errors or lines)[-1].removeprefix('error: ')}"


def _stopped() -> Stopped:
    told = f"stopped; the same command goes on:\n{restart_command()}"
    logger.info("%s", told)
    return Stopped(told)


def _stage_metrics(
    cell: Cell, stage: str, workdirs: Mapping[str, pathlib.Path]
) -> dict[str, float] | None:
    """The final numbers of a stage."""
    what = cell.stages[stage]
    if not is_tool(what):
        found = finished_metrics(workdirs[stage])
        return found and results.numbers(found)
    here = {name: str(workdir) for name, workdir in workdirs.items()}
    path = pathlib.Path(fill(TOOL_RESULTS[what[0]], here))
    return results.numbers(json.loads(path.read_text())) if path.exists() else None


def _prepare(
    study: Study, out: pathlib.Path, places: Sequence[str], stop: StopRequests
) -> None:
    """Runs what cells share, once for all runners."""
    if not study.prepare:
        return
    folder = out / "prepared"
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            lock = Lock(folder)
            break
        except ValueError:
            logger.info("another runner prepares the study; waiting")
            with stop.interruptible():
                time.sleep(WAIT_S)
    try:
        for number, words in enumerate(study.prepare):
            done = folder / f"{number}.done"
            if done.exists():
                continue
            module, *arguments = (fill(word, {"out": str(out)}) for word in words)
            logger.info("preparing: %s", " ".join(words))
            command = [sys.executable, "-m", module, *arguments, *_as_flags(places)]
            if failure := _run(command, folder / f"{number}.log", stop):
                raise ValueError(f"the study cannot be prepared: {failure}")
            done.touch()
    finally:
        lock.release()


def _report(
    job: Job, study: Study, out: pathlib.Path, result: dict[str, Any], began: float
) -> None:
    """One line about a job that is over, with how long the rest will take."""
    known = [results.read(j.folder(out)) for j in jobs(study, out)]
    over = [found for found in known if found is not None]
    total = count_jobs(study)
    each = statistics.fmean(sum(found["seconds"].values()) for found in over)
    eta = format_duration((total - len(over)) * each / busy_runners(over, began))
    times = ", ".join(
        f"{stage} {'shared' if stage in result['shared'] else format_duration(seconds)}"
        for stage, seconds in result["seconds"].items()
    )
    if failure := result.get("failed"):
        what = f"FAILED, {failure}"
    else:
        what = f"{results.shown(study, job.cell, result)} ({times})"
    logger.info("[%d/%d] %s: %s  ETA %s", len(over), total, job.words, what, eta)


def busy_runners(over: Sequence[Mapping[str, Any]], began: float) -> float:
    """How many runners have worked in a folder, on average, by the jobs that are over.

    Args:
      over: results of jobs, of all runners.
      began: when to count from, in seconds of `time.time()`.

    Returns:
      1.0 at least: the runner that asks.
    """
    now = time.time()
    spent = 0.0
    for result in over:
        start = result["time"] - sum(result["seconds"].values())
        spent += max(min(result["time"], now) - max(start, began), 0.0)
    return max(spent / max(now - began, 1e-9), 1.0)
