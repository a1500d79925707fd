"""SupCon against its baselines on the digits, over several seeds.

    python -m benchmarks.digits --seeds=5

Runs the README's commands as a user does, each in a process of its own: SupCon and its
linear evaluation, cross-entropy with the same encoder and the same images and views seen,
and a linear classifier on an untrained encoder. The first seed starts from an empty
compilation cache and gives the times. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def run(
    config: str, workdir: pathlib.Path, cache: str, *flags: str
) -> tuple[dict, float]:
    """The final metrics of one run, and its seconds from start to exit."""
    command = [sys.executable, "main.py", f"--config=configs/{config}"]
    start = time.monotonic()
    subprocess.run(
        [*command, f"--workdir={workdir}", *flags],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.monotonic() - start
    last = (workdir / "metrics.jsonl").read_text().splitlines()[-1]
    return json.loads(last), seconds


def main() -> None:
    """Runs all methods for all seeds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    methods = {
        "SupCon + linear": ("digits.py", "linear_digits.py"),
        "cross-entropy": ("cross_entropy_digits.py",),
        "random encoder + linear": ("linear_digits.py:random",),
    }
    top1 = {name: [] for name in methods}
    cold = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for name, configs in methods.items():
                seconds, previous = [], None
                for index, config in enumerate(configs):
                    workdir = pathlib.Path(folder) / f"{name}-{seed}-{index}"
                    flags = [f"--config.seed={seed}"]
                    if index:
                        flags.append(f"--config.pretrained={previous}")
                    # A cache for each method, empty at its first seed.
                    cache = f"{folder}/cache {name}"
                    final, elapsed = run(config, workdir, cache, *flags)
                    seconds.append(elapsed)
                    previous = workdir
                top1[name].append(100 * final["eval/top1"])
                cold.setdefault(name, " + ".join(f"{s:.0f}" for s in seconds))
                shown = " + ".join(f"{s:.0f} s" for s in seconds)
                print(
                    f"seed {seed}: {name} {top1[name][-1]:.1f} % ({shown})", flush=True
                )
    print("\n| method | test top-1 (%) | each seed | first run, cold cache (s) |")
    print("|---|---|---|---|")
    for name, values in top1.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = ", ".join(f"{value:.1f}" for value in values)
        mean = statistics.mean(values)
        print(f"| {name} | {mean:.2f} ± {spread:.2f} | {each} | {cold[name]} |")


if __name__ == "__main__":
    main()
