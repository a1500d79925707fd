"""Kills, preemptions and damage on real runs, and tables of what they cost.

    python -m benchmarks.chaos --faults=kill --trials=100 --folder=build/chaos

A run is some tens of steps on the digits with a small encoder: pretraining or linear
evaluation by one process, pretraining by two or four. The faults (each with `--trials`):

- kill: SIGKILL of one process at a random moment (while it starts, compiles, trains, saves or
  evaluates, in turn), mostly once, sometimes up to three times; then the same command
  again until it ends. Every tenth time the last start finds an empty compilation cache.
- preempt: SIGTERM to one process at a random moment; then the same command again.
- rot: SIGKILL, a file of the newest step is damaged, then the same command again.
- damage: a file of the newest of three steps is damaged and all is restored in this
  process, by the run's code and by `restore_encoder`; each file of a step in turn, with a
  flipped bit, cut off, deleted, with zeros in it. In every tenth trial all steps are damaged.

An end is equal if the digests of every array of the final state (parameters, statistics,
optimizer) and all metrics of the last line but those of time are those of a run that
nothing happened to. What is finished stays in the folder: the same command goes on, and
only prints the tables in the end.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import pathlib
import re
import shutil
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.step_runs import describe_machine, table, tell
from configs import digits
from supcon_jax import hosts, parallel
from supcon_jax.checkpoint import Checkpointer, digest, restore_encoder, saved_steps
from supcon_jax.run.plan import create_plan
from supcon_jax.writers import read_metrics
from tests.damage import KINDS, damage, files_of
from tests.faults import commands
from tests.processes import Job

FAULTS = ("kill", "preempt", "rot", "damage")
STEPS, EVERY, EVAL = 48, 8, 16
RUNS = {"pretrain": 1, "linear_eval": 1, "pretrain x2": 2, "pretrain x4": 4}
# Of ten trials: mostly one process.
TURNS = ("pretrain", "linear_eval", "pretrain", "pretrain x2", "pretrain", "linear_eval",
         "pretrain", "pretrain x4", "pretrain", "pretrain")  # fmt: skip
MOMENTS = ("any moment", "compiling", "training", "saving", "evaluating")
CHANGES = {
    "batch_size": 16,
    "total_steps": STEPS,
    "log_every": 1,
    "eval_every": EVAL,
    "checkpoint_every": EVERY,
    "keep_checkpoints": 3,
    "encoder.width": 0.25,
    "knn.bank": 64,
    "writers": "()",
}


class Lab:
    """The runs of one version of the code in one folder, and what came of them."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self.folder, self.seed = folder, seed
        self.file = folder / "trials.jsonl"
        self.trials: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            self.trials = [json.loads(x) for x in self.file.read_text().splitlines()]
        self.whole_s: dict[str, float] = {}

    def arguments(self, run: str, workdir: pathlib.Path) -> list[str]:
        """The flags of a run."""
        linear = run == "linear_eval"
        config = "configs/linear_digits.py:sgd" if linear else "configs/digits.py"
        changes: dict[str, Any] = dict(CHANGES)
        if linear:
            changes["pretrained"] = self.folder / "whole_pretrain"
        return [
            *(f"--config={config}", f"--workdir={workdir}"),
            *(f"--config.{key}={value}" for key, value in changes.items()),
        ]

    def start(
        self,
        run: str,
        workdir: pathlib.Path,
        faults: dict[int, str] | None = None,
        *,
        cold: bool = False,
    ) -> Job:
        """The processes of a run; one of them with a fault."""
        size = RUNS[run]
        cache = self.folder / "cache"
        if cold:
            cache = self.folder / "empty_cache"
            shutil.rmtree(cache, ignore_errors=True)
        environs = [
            {"JAX_COMPILATION_CACHE_DIR": f"{cache}/{size}_{rank}"}
            for rank in range(size)
        ]
        arguments = self.arguments(run, workdir)
        return Job(commands(size, arguments, faults or {}), environs=environs)

    def whole(self, run: str) -> pathlib.Path:
        """The workdir of a run that nothing happened to, made once."""
        workdir = self.folder / f"whole_{run.replace(' ', '_')}"
        if run == "linear_eval":
            self.whole("pretrain")
        # The first one fills the cache; a second one is timed.
        for path in (workdir, workdir.with_name(f"{workdir.name}_again")):
            begun = time.monotonic()
            if final(path) is None:
                with self.start(run, path) as job:
                    codes = job.wait(600)
                    if set(codes.values()) != {0}:
                        raise RuntimeError(f"a run without faults failed: {job[0].err}")
                self.whole_s[run] = time.monotonic() - begun
        if final(workdir) != final(workdir.with_name(f"{workdir.name}_again")):
            raise RuntimeError(f"two runs of {run} without faults end differently")
        self.whole_s.setdefault(run, 12.0)
        return workdir

    def done(self, fault: str, number: int) -> bool:
        """Whether this trial was made already."""
        return any(t["fault"] == fault and t["number"] == number for t in self.trials)

    def keep(self, trial: dict[str, Any]) -> None:
        """Appends a trial's outcome."""
        self.trials.append(trial)
        with self.file.open("a") as file:
            file.write(json.dumps(trial) + "\n")
        tell(json.dumps(trial))


def final(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What a run came to: digests of its last state, metrics of its last line."""
    steps = saved_steps(workdir)
    record = workdir / "checkpoints" / str(STEPS) / "record" / "metadata"
    if STEPS not in steps or not record.exists():
        return None
    timed = ("wall_s", "train/images_per_sec", "goodput/")
    line = read_metrics(workdir)[-1]
    metrics = {k: v for k, v in line.items() if not k.startswith(timed)}
    return {"digests": json.loads(record.read_text())["digests"], "metrics": metrics}


def newest(workdir: pathlib.Path) -> int:
    """The newest saved step, or 0."""
    return max(saved_steps(workdir), default=0)


def draw_fault(action: str, moment: str, run: str, whole_s: float, rng: Any) -> str:
    """An action at a random moment of a kind, as `tests.faults` takes it."""
    places = {
        "any moment": ("", rng.uniform(0.3, whole_s)),
        "compiling": ("compiling", rng.uniform(0, 2.0)),
        "training": (f"^step {rng.integers(1, STEPS)}$", rng.uniform(0, 0.03)),
        "saving": (
            f"^saving step {EVERY * rng.integers(1, STEPS // EVERY + 1)}$",
            rng.uniform(0, 0.4),
        ),
        "evaluating": ("images", rng.uniform(0, 0.3)),
    }
    place, delay = places[moment]
    return f"{action}@{place}+{delay:.3f}"


def strike(lab: Lab, run: str, workdir: pathlib.Path, fault: str, victim: int) -> Any:
    """Starts a run with a fault until it has ended; None where the run was done before.

    Returns:
      Seconds from the fault to the end of all processes, exit codes by rank, steps lost.
    """
    with lab.start(run, workdir, {victim: fault}) as job:
        codes = job.wait(600)
        ended = time.time()
        told = re.search(r"^FAULT \w+ ([\d.]+) at (.*)", job[victim].err, re.M)
    if told is None:
        return None
    lost = max((r["step"] for r in read_metrics(workdir)), default=0) - newest(workdir)
    return {"at": told[2], "s": round(ended - float(told[1]), 2), "lost": max(lost, 0),
            "codes": [codes[rank] for rank in sorted(codes)]}  # fmt: skip


def finish(
    lab: Lab, run: str, workdir: pathlib.Path, *, cold: bool
) -> tuple[float | None, list[int], list[str]]:
    """The same command to its end: seconds to its first step, exit codes, what failed."""
    begun, first_s = time.monotonic(), None
    with lab.start(run, workdir, cold=cold) as job:
        while job[0].code is None:
            if first_s is None and re.search(r"^step +\d", job[0].out, re.M):
                first_s = round(time.monotonic() - begun, 2)
            time.sleep(0.02)
        codes = job.wait(600)
        told = [job[rank].err[-2000:] for rank in sorted(codes) if codes[rank]]
    return first_s, [codes[rank] for rank in sorted(codes)], told


def trial_of_a_run(lab: Lab, fault: str, number: int) -> dict[str, Any]:
    """A run that is struck, and then ends."""
    rng = np.random.default_rng([lab.seed, FAULTS.index(fault), number])
    run = TURNS[number % len(TURNS)]
    whole = lab.whole(run)
    workdir = lab.folder / "now"
    shutil.rmtree(workdir, ignore_errors=True)
    planned = 1
    if fault == "kill" and number % 5 == 4:
        planned = int(rng.integers(2, 4))
    action = "terminate" if fault == "preempt" else "kill"
    moments = ("saving", "training") if fault == "rot" else MOMENTS
    strikes = []
    for turn in range(planned):
        moment = moments[(number // 2 + turn) % len(moments)]
        drawn = draw_fault(action, moment, run, lab.whole_s[run], rng)
        if fault == "rot":
            # Late enough that two steps are there.
            drawn = f"kill@^step {rng.integers(3 * EVERY, STEPS)}$+0"
        victim = int(rng.integers(RUNS[run]))
        struck = strike(lab, run, workdir, drawn, victim)
        if not struck and not strikes:  # the run was faster than the moment
            shutil.rmtree(workdir, ignore_errors=True)
            moment = "training"
            drawn = draw_fault(action, moment, run, lab.whole_s[run], rng)
            struck = strike(lab, run, workdir, drawn, victim)
        if struck:
            strikes.append({"moment": moment, **struck})
    rotten = ""
    if fault == "rot":
        step = workdir / "checkpoints" / str(newest(workdir))
        file = pathlib.Path(rng.choice([str(p) for p in files_of(step)]))
        kind = str(rng.choice(KINDS))
        damage(file, kind, rng)
        rotten = f"{kind}: {file.relative_to(workdir)}"
    cold = number % 10 == 9
    resumed = newest(workdir)
    first_s, codes, told = finish(lab, run, workdir, cold=cold)
    return {
        "fault": fault, "number": number, "run": run, "strikes": strikes, "cold": cold,
        "rotten": rotten, "first_s": first_s if 0 < resumed < STEPS else None,
        "codes": codes, "told": told, "equal": set(codes) == {0} and final(workdir) == final(whole),
    }  # fmt: skip


class Shelf:
    """Three saved steps of a whole run, to be damaged and restored in this process."""

    def __init__(self, lab: Lab):
        self._whole = lab.whole("pretrain")
        self._workdir = lab.folder / "damaged"
        config = digits.get_config()
        changes = {k: () if k == "writers" else v for k, v in CHANGES.items()}
        config.update_from_flattened_dict(changes)
        mesh = parallel.create_mesh(jax.devices()[:1])
        plan = create_plan(config, mesh, num_classes=10, num_examples=1297)
        self._abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=parallel.replicated(mesh)
            ),
            plan.abstract_state(),
        )
        self.steps = saved_steps(self._whole)
        self._truth: dict[int, tuple[str, str]] = {}
        for step in self.steps:  # what each step holds, read where nothing is damaged
            self._renew()
            for later in (s for s in self.steps if s > step):
                shutil.rmtree(self._workdir / "checkpoints" / str(later))
            found = self._restore()
            assert found is not None and found[0] == step
            self._truth[step] = found[1], digest(restore_encoder(self._workdir))

    def _renew(self) -> None:
        shutil.rmtree(self._workdir, ignore_errors=True)
        shutil.copytree(
            self._whole / "checkpoints", self._workdir / "checkpoints", symlinks=True
        )

    def _restore(self) -> tuple[int, str]:
        checkpointer = Checkpointer(self._workdir, keep=3)
        try:
            found = checkpointer.restore_newest(self._abstract)
        finally:
            checkpointer.close()
        assert found is not None
        return int(found[0].step), digest(jax.device_get(found[0]))

    def trial(self, lab: Lab, number: int) -> dict[str, Any]:
        """Damages, restores, and compares with what was saved."""
        rng = np.random.default_rng([lab.seed, FAULTS.index("damage"), number])
        self._renew()
        everything = number % 10 == 9
        harmed = []
        for step in self.steps if everything else self.steps[-1:]:
            folder = self._workdir / "checkpoints" / str(step)
            files = files_of(folder)
            file = files[number // len(KINDS) % len(files)]
            kind = KINDS[number % len(KINDS)]
            if everything:
                arrays = [
                    p for p in files if p.parent.name == "d" and "encoder" in str(p)
                ]
                file, kind = max(arrays, key=lambda p: p.stat().st_size), "flipped bit"
            damage(file, kind, rng)
            harmed.append(f"{kind}: {file.relative_to(self._workdir)}")
        trial: dict[str, Any] = {"fault": "damage", "number": number, "harmed": harmed,
                                 "all": everything, "files": len(files)}  # fmt: skip
        for name, read in (
            ("encoder", self._read_encoder),
            ("state", self._read_state),
        ):
            try:
                step, right = read()
            except ValueError as error:
                trial[name] = {"refused": str(error)[:200]}
            else:
                trial[name] = {"step": step, "right": right}
        return trial

    def _read_state(self) -> tuple[int, bool]:
        step, found = self._restore()
        return step, found == self._truth[step][0]

    def _read_encoder(self) -> tuple[int | None, bool]:
        found = digest(restore_encoder(self._workdir))
        steps = [step for step, truth in self._truth.items() if truth[1] == found]
        return (steps[0], True) if steps else (None, False)


def report(lab: Lab) -> None:
    """Prints the tables of all that was made."""
    median = statistics.median
    rows = []
    for fault in FAULTS[:3]:
        for run in (*RUNS, "all"):
            chosen = [
                t for t in lab.trials
                if t["fault"] == fault and run in (t["run"], "all") and t["strikes"]
            ]  # fmt: skip
            if not chosen:
                continue
            strikes = [s for t in chosen for s in t["strikes"]]
            lost = [s["lost"] for s in strikes]
            rows.append([
                fault, run, str(len(chosen)), str(len(strikes)),
                str(sum(t["equal"] for t in chosen)),
                f"{statistics.mean(lost):.1f}", str(max(lost)),
                f"{median(s['s'] for s in strikes):.1f}",
                f"{max(s['s'] for s in strikes):.1f}",
            ])  # fmt: skip
    if rows:
        head = "fault|run|trials|faults|bitwise-equal ends|steps lost a fault|at most"
        print(table([*head.split("|"), "median s to the end", "at most"], rows) + "\n")
    for fault, word in (("kill", "kills"), ("preempt", "preemptions")):
        moments = collections.Counter(
            s["moment"] for t in lab.trials if t["fault"] == fault for s in t["strikes"]
        )
        if moments:
            told = ", ".join(f"{count} {moment}" for moment, count in moments.items())
            print(f"Moments of the {word}: {told}.\n")
    stopped = [t for t in lab.trials if t["fault"] == "preempt" and t["strikes"]]
    if stopped:
        well = sum(
            set(s["codes"]) == {0} and s["lost"] <= 1
            for t in stopped
            for s in t["strikes"]
        )
        print(f"Preemptions with exit code 0 and at most 1 step lost: {well} of "
              f"{len(stopped)}.\n")  # fmt: skip
    for cold, words in ((False, "with the cache"), (True, "with an empty cache")):
        seconds = [
            t["first_s"] for t in lab.trials
            if t.get("first_s") and t["cold"] == cold and RUNS[t["run"]] == 1
        ]  # fmt: skip
        if seconds:
            print(f"Seconds from a restart to its first step, one process, {words}: "
                  f"median {median(seconds):.1f}, at most {max(seconds):.1f} "
                  f"({len(seconds)} restarts).\n")  # fmt: skip
    damaged = [t for t in lab.trials if t["fault"] == "damage"]
    if damaged:
        rows = []
        for what in ("state", "encoder"):
            for everything in (False, True):
                outcomes = [t[what] for t in damaged if t["all"] == everything]
                steps = [o["step"] for o in outcomes if "step" in o]
                rows.append([
                    what, "every step" if everything else "newest step",
                    str(len(outcomes)),
                    str(sum(not o.get("right", True) for o in outcomes)),
                    str(steps.count(STEPS)), str(len(steps) - steps.count(STEPS)),
                    str(sum("refused" in o for o in outcomes)),
                ])  # fmt: skip
        head = (
            "restored|damaged|trials|silent wrong loads|harmless|a step before|refused"
        )
        files = {h for t in damaged for h in t["harmed"]}
        print(table(head.split("|"), rows))
        print(
            f"\n{len(files)} different damages; {damaged[0]['files']} files in a step."
        )


def main() -> None:
    """Runs the trials and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="of every fault")
    parser.add_argument("--faults", default=",".join(FAULTS), help="comma-separated")
    parser.add_argument("--folder", default="build/chaos", help="keeps what was done")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faults = options.faults.split(",")
    if unknown := [fault for fault in faults if fault not in FAULTS]:
        parser.error(f"unknown fault {unknown[0]!r}; available: {', '.join(FAULTS)}")
    version = hosts.code_version().split()[-1]
    lab = Lab(pathlib.Path(options.folder).absolute() / version, options.seed)
    shelf: Shelf | None = None
    logging.disable(logging.CRITICAL)  # what is damaged is in the table
    for fault in faults:
        for number in range(options.trials):
            if lab.done(fault, number):
                continue
            if fault == "damage":
                shelf = shelf or Shelf(lab)
                lab.keep(shelf.trial(lab, number))
            else:
                lab.keep(trial_of_a_run(lab, fault, number))
    print(f"{describe_machine()}; {STEPS} steps, a save every {EVERY}, an evaluation "
          f"every {EVAL}; source {version}.\n")  # fmt: skip
    report(lab)
    wrong = [t for t in lab.trials if not t.get("equal", True)]
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
