"""Runs the cells of a study: each stage in a process of its own, any number of runners.

A job is a cell with a seed (or one of its trials, where it is tuned). Its folder holds the
workdirs of its stages, their output, and result.json when it is done. A runner takes the
next job whose folder nobody holds, so runners share a folder without knowing of each other;
one that was killed leaves no lock behind, and its job goes on from its last checkpoint.
A stage that several jobs have is run by the first of them, and the others wait for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from supcon_jax import storage
from supcon_jax.config.check import flatten
from supcon_jax.config.keys import KEYS
from supcon_jax.logs import format_duration
from supcon_jax.run.stop import Stopped, StopRequests, restart_command
from supcon_jax.run.workdir import finished_metrics
from supcon_jax.storage.lock import Lock
from supcon_jax.study import tables
from supcon_jax.study.folder import WAIT_S, lock_when_free, open_folder
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
from supcon_jax.study.results import Result, Results, numbers, read

logger = logging.getLogger(__name__)
STOPPED_CODE = 85  # of a stage that was asked to stop, and can go on


class _Work(NamedTuple):
    """What every job of a call is run with."""

    study: Study
    out: pathlib.Path
    places: Sequence[str]
    stop: StopRequests
    began: float


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
    began = time.time()
    with StopRequests() as stop:
        work = _Work(study, out, places, stop, began)
        open_folder(study, out, stop)
        _prepare(work)
        told = False
        while waiting := _waiting(results := Results(study, out), began):
            if _run_first_free(waiting, results, work):
                told = False
                continue
            if not told:
                told = True
                logger.info("%d jobs are with other runners; waiting", len(waiting))
            with stop.interruptible():
                time.sleep(WAIT_S)
    tables.write(results)
    tables.draw(results)
    return not results.failures()


def _waiting(results: Results, began: float) -> list[Job]:
    return [
        job
        for job in jobs(results)
        if not _is_over(results.read(job.folder(results.out)), began)
    ]


def _is_over(result: Result | None, began: float) -> bool:
    """Whether a job is done, or failed in this very call; older failures are tried again."""
    if result is None:
        return False
    return not result.get("failed") or result["time"] >= began


def _run_first_free(waiting: Sequence[Job], results: Results, work: _Work) -> bool:
    """Runs the first job that no other runner has; False where there is none."""
    shared = SharedStages(work.study, jobs(results), work.out)
    for job in shared.free(waiting):
        folder = job.folder(work.out)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock(folder)
        except ValueError:  # another runner has it
            continue
        try:
            if not _is_over(read(folder), work.began):
                result = run_job(job, shared, work, lock)
                if other := _other_data(result, job, results):
                    result["failed"] = other
                storage.write(
                    folder / "result.json", f"{json.dumps(result)}\n".encode()
                )
                now = Results(work.study, work.out)
                _report(job, work, result, now)
                tables.write(now)
        finally:
            lock.release()
        return True
    return False


def run_job(job: Job, shared: SharedStages, work: _Work, lock: Lock) -> Result:
    """Runs the stages of a job one after the other; what came out of them."""
    study, folder = work.study, job.folder(work.out)
    result: Result = {"metrics": {}, "seconds": {}, "shared": {}, "data": {}}
    workdirs: dict[str, pathlib.Path] = {}
    for stage in job.stages(study):
        start = time.monotonic()
        workdir = workdirs[stage] = shared.workdir(job, stage)
        ours, failure = workdir.parent == folder, ""
        if ours:
            command = stage_command(job, study, stage, workdirs, work.out, work.places)
            failure = _run(command, folder / f"{stage}.log", work.stop, lock)
        else:
            result["shared"][stage] = str(workdir.relative_to(work.out))
        seconds = time.monotonic() - start
        found = None if failure else _stage_metrics(job.cell, stage, workdirs)
        if found is not None:
            # A run that was resumed knows how long it took before.
            seconds = max(seconds, found.get("wall_s", 0.0) if ours else 0.0)
            measured = numbers(found)
            result["metrics"] |= {f"{stage}:{n}": v for n, v in measured.items()}
            result["data"] |= _data_of(workdir)
            failure = _missing(job, study, stage, measured)
        elif not failure:
            failure = "it wrote no final metrics"
        result["seconds"][stage] = round(seconds, 2)
        if failure:
            result["failed"] = f"{stage}: {failure}"
            break
    return result | {"chosen": job.chosen, "time": time.time()}


def _missing(job: Job, study: Study, stage: str, found: dict[str, float]) -> str:
    """Why a stage does not say what it is there for, in one line, or nothing."""
    of, _, metric = (study.judge if job.trial else study.metrics[0]).partition(":")
    if stage != of:
        return ""
    if metric not in found:
        wrote = ", ".join(sorted(found)) or "nothing"
        return f"it wrote no {metric}, by which the study goes; it wrote {wrote}"
    if job.trial and not math.isfinite(found[metric]):
        return f"its {metric} is {found[metric]}, by which nothing can be chosen"
    return ""


def _data_of(workdir: pathlib.Path) -> dict[str, str]:
    """Digests of the images of a run, by what of its config chooses them."""
    try:
        config = json.loads((workdir / "config.json").read_text())
        digests = json.loads((workdir / "run.json").read_text())["data"]
    except (FileNotFoundError, KeyError):  # no run
        return {}
    flat = flatten(config)
    chooses = {
        key: value
        for key, value in flat.items()
        if key in ("mode", "loss.name", "probe.solver")
        or (key.startswith("data.") and key in KEYS and not KEYS[key].free)
    }
    key = hashlib.sha256(json.dumps(chooses, sort_keys=True).encode()).hexdigest()[:16]
    return {key: json.dumps(digests, sort_keys=True)}


def _other_data(result: Result, job: Job, results: Results) -> str:
    """Which job read other images for the same config, in one line, or nothing."""
    for other in jobs(results):
        theirs = results.read(other.folder(results.out))
        if other == job or not theirs or theirs.get("failed"):
            continue
        for key, digests in theirs.get("data", {}).items():
            if result["data"].get(key, digests) != digests:
                return (
                    f"its images are not those of {other.words!r}, which has the same "
                    "config; is --config.data.dir, or --config.data.root, that of the "
                    "other runners, and whole?"
                )
    return ""


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


def _run(
    command: Sequence[str], log: pathlib.Path, stop: StopRequests, lock: Lock
) -> str:
    """Runs a command; returns what it died of, in one line, or nothing.

    It holds the lock too: should this process be killed, the job stays with its stage until
    that has ended.

    Raises:
      Stopped: we or it were asked to stop; it has saved what it had.
    """
    with log.open("ab") as output:
        before = output.tell()
        environment = os.environ | {"SUPCON_STOPPED_CODE": str(STOPPED_CODE)}
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=lock.descriptors(),
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
    text = log.read_bytes()[before:].decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()] or ["no output"]
    errors = [line for line in lines if line.startswith("error: ")]
    died = (
        f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    )
    return f"{died}: {(errors or lines)[-1].removeprefix('error: ')}"


def _stopped() -> Stopped:
    told = f"stopped; the same command goes on:\n{restart_command()}"
    logger.info("%s", told)
    return Stopped(told)


def _stage_metrics(
    cell: Cell, stage: str, workdirs: Mapping[str, pathlib.Path]
) -> dict[str, Any] | None:
    """What a stage wrote in the end."""
    what = cell.stages[stage]
    if not is_tool(what):
        return finished_metrics(workdirs[stage])
    here = {name: str(workdir) for name, workdir in workdirs.items()}
    path = pathlib.Path(fill(TOOL_RESULTS[what[0]], here))
    return json.loads(path.read_text()) if path.exists() else None


def _prepare(work: _Work) -> None:
    """Runs what cells share, once for all runners."""
    if not work.study.prepare:
        return
    folder = work.out / "prepared"
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_when_free(folder, "prepares the study", work.stop)
    try:
        for number, words in enumerate(work.study.prepare):
            done = folder / f"{number}.done"
            if done.exists():
                continue
            module, *arguments = (fill(word, {"out": str(work.out)}) for word in words)
            logger.info("preparing: %s", " ".join(words))
            command = [sys.executable, "-m", module, *arguments]
            command += _as_flags(work.places)
            log = folder / f"{number}.log"
            if failure := _run(command, log, work.stop, lock):
                raise ValueError(f"the study cannot be prepared: {failure}")
            done.touch()
    finally:
        lock.release()


def _report(job: Job, work: _Work, result: Result, results: Results) -> None:
    """One line about a job that is over, with how long the rest will take."""
    known = [results.read(each.folder(work.out)) for each in jobs(results)]
    over, total = [found for found in known if found is not None], count_jobs(results)
    each = statistics.fmean(sum(found["seconds"].values()) for found in over)
    left = (total - len(over)) * each / busy_runners(over, work.began)
    times = ", ".join(
        f"{stage} {'shared' if stage in result['shared'] else format_duration(seconds)}"
        for stage, seconds in result["seconds"].items()
    )
    if failure := result.get("failed"):
        what = f"FAILED, {failure}"
    else:
        what = f"{tables.shown(work.study, result)} ({times})"
    logger.info(
        "[%d/%d] %s: %s  ETA %s",
        len(over),
        total,
        job.words,
        what,
        format_duration(left),
    )


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
