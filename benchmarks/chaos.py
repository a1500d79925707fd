"""Kills, signals and damage on real runs, and a table of what they cost.

    python -m benchmarks.chaos --trials=20             # a quarter of an hour on 2 cores
    python -m benchmarks.chaos --trials=100 --faults=kill

A trial starts the digits (a small encoder, a save every 20 of 200 steps) and kills the
process at a random moment, restarts it with the same command, and so on until a start runs
to its end. "kill": SIGKILL, 1 to 4 times. "preempt": SIGTERM once. "damage": SIGKILL, then a
random file of the newest checkpoint gets a bit flipped, cut off, zeroed or deleted. The end
is right where every array of the encoder equals that of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.step_runs import describe_machine, table, tell
from supcon_jax.checkpoint import restore_encoder, saved_steps
from supcon_jax.writers import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAULTS = ("kill", "preempt", "damage")
STEPS, EVERY = 200, 20


class Trial(NamedTuple):
    """What came of one trial.

    Attributes:
      faults: that happened before the end.
      equal: whether the final encoder is that of a whole run, bit for bit.
      lost: steps that were made again, of all faults together.
      resume_s: seconds from each restart to its first step.
      code: exit code of a stopped process; 0 for a preemption that saved.
    """

    faults: int
    equal: bool
    lost: int
    resume_s: list[float]
    code: int


def command(workdir: pathlib.Path) -> list[str]:
    """The run that every trial makes."""
    return [
        *(sys.executable, "-u", "main.py", "--config=configs/digits.py"),
        *(f"--workdir={workdir}", "--config.batch_size=16", "--config.log_every=5"),
        *(f"--config.total_steps={STEPS}", f"--config.checkpoint_every={EVERY}"),
        *("--config.encoder.width=0.25", "--config.knn.bank=200"),
    ]


def start(workdir: pathlib.Path) -> subprocess.Popen[str]:
    """A process of the run."""
    return subprocess.Popen(
        command(workdir),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def newest_line(workdir: pathlib.Path) -> int:
    """The last step that the run has told of."""
    return max((record["step"] for record in read_metrics(workdir)), default=0)


def trial(
    fault: str, workdir: pathlib.Path, whole_s: float, rng: np.random.Generator
) -> tuple[int, int, list[float], int]:
    """Faults, steps lost, seconds to the first step of each start, last exit code."""
    planned = int(rng.integers(1, 5)) if fault == "kill" else 1
    faults, lost, resume_s, code = 0, 0, [], 0
    while True:
        before = saved_steps(workdir)
        process, begun = start(workdir), time.monotonic()
        if faults < planned:
            time.sleep(float(rng.uniform(0.3, whole_s)))
            running = process.poll() is None
            process.send_signal(
                signal.SIGTERM if fault == "preempt" else signal.SIGKILL
            ) if running else None
            process.communicate()
            code = process.returncode if fault == "preempt" else 0
            faults += running
            if fault == "damage" and saved_steps(workdir):
                damage(workdir, rng)
            if running:
                saved = saved_steps(workdir)
                lost += max(newest_line(workdir) - (saved[-1] if saved else 0), 0)
                continue
            faults = planned  # it was done before the fault
            continue
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step") and before:
                resume_s.append(time.monotonic() - begun)
                before = []
        if process.wait() != 0:
            return faults, lost, resume_s, process.returncode
        return faults, lost, resume_s, code


def damage(workdir: pathlib.Path, rng: np.random.Generator) -> None:
    """One random file of the newest step."""
    newest = workdir / "checkpoints" / str(saved_steps(workdir)[-1])
    path = rng.choice(sorted(str(p) for p in newest.rglob("*") if p.is_file()))
    content = bytearray(pathlib.Path(path).read_bytes())
    kind = rng.integers(4)
    if kind == 0 or not content:
        pathlib.Path(path).unlink()
        return
    place = int(rng.integers(len(content)))
    if kind == 1:
        content[place] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        del content[place:]
    else:
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    pathlib.Path(path).write_bytes(content)


def equal(ours: pathlib.Path, theirs: pathlib.Path) -> bool:
    """Whether two runs ended with the same encoder, bit for bit."""
    first, second = (jax.tree.leaves(restore_encoder(path)) for path in (ours, theirs))
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def main() -> None:
    """Runs the trials and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="of every fault")
    parser.add_argument("--faults", default=",".join(FAULTS), help="comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faults = options.faults.split(",")
    if unknown := [fault for fault in faults if fault not in FAULTS]:
        parser.error(f"unknown fault {unknown[0]!r}; available: {', '.join(FAULTS)}")
    rng = np.random.default_rng(options.seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder)
        for name in ("first", "whole"):  # the first one compiles, the second is timed
            begun = time.monotonic()
            subprocess.run(
                command(base / name), cwd=ROOT, check=True, capture_output=True
            )
            whole_s = time.monotonic() - begun
        tell(f"a whole run takes {whole_s:.1f} s")
        for fault in faults:
            trials = []
            for number in range(options.trials):
                workdir = base / f"{fault}{number}"
                count, lost, resume_s, code = trial(fault, workdir, whole_s, rng)
                same = code == 0 and equal(workdir, base / "whole")
                trials.append(Trial(count, same, lost, resume_s, code))
                tell(f"{fault} {number + 1}/{options.trials}: {trials[-1]}")
            happened = sum(t.faults for t in trials)
            resumes = [s for t in trials for s in t.resume_s]
            rows.append(
                [
                    fault,
                    str(len(trials)),
                    str(happened),
                    str(sum(t.equal for t in trials)),
                    str(sum(t.code == 0 for t in trials)),
                    f"{sum(t.lost for t in trials) / max(happened, 1):.1f}",
                    f"{statistics.median(resumes):.1f}" if resumes else "-",
                ]
            )
    print(f"{describe_machine()}; {STEPS} steps, a save every {EVERY}.\n")
    header = "fault|trials|faults|equal ends|exit codes 0|steps lost a fault"
    print(table([*header.split("|"), "median s to the first step again"], rows))


if __name__ == "__main__":
    main()
