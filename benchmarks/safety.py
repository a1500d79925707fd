"""What keeping a run safe costs: the finite check in a step, the digests in a save.

    python -m benchmarks.safety                                  # minutes on a CPU
    python -m benchmarks.safety --devices=8 --rounds=3    # the save of a host of eight

Both are ratios within one run: steps of ResNet-8 with and without the check take turns, so
that a busy moment of the machine hits both; CPU time is the median over the rounds. A save
of ResNet-50 (with its momentum, 200 MB) is timed whole, and so are the digests in it, beside
one that hands the devices' arrays to Orbax.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from unittest import mock

import jax

from benchmarks.step_runs import Method, build_config, describe_machine, plan_of, table
from supcon_jax import parallel
from supcon_jax.checkpoint import manager
from supcon_jax.steps import contrastive
from supcon_jax.steps.state import TrainState

SIZES = {
    "batch": 128,
    "image_size": 32,
    "views": 2,
    "stem": "imagenet",
    "dtype": "float32",
    "microbatches": 1,
    "augment": False,
}


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--encoder", default="resnet50", help="of the save")
    parser.add_argument("--devices", type=int, default=1, help="virtual ones of a CPU")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    print(describe_machine(), "\n")
    print(step_table(options.rounds), "\n")
    print(save_table(options.encoder, rounds=max(1, options.rounds // 3)))


def step_table(rounds: int) -> str:
    """CPU time of a step with the finite check over one without it."""
    config = build_config(argparse.Namespace(**SIZES, encoder="resnet8"), "SupCon")
    checked = Method(config)
    with mock.patch.object(
        contrastive, "keep_finite", lambda before, after, metrics: (after, metrics)
    ):
        unchecked = Method(config)
    for number in range(rounds):
        for method in (checked, unchecked)[:: 1 if number % 2 else -1]:
            method.turn(3)
    ratios = [a / b for a, b in zip(checked.cpu, unchecked.cpu, strict=True)]
    row = [
        f"{1e3 * statistics.median(unchecked.cpu):.0f}",
        f"{1e3 * statistics.median(checked.cpu):.0f}",
        f"{100 * (statistics.median(ratios) - 1):+.2f} %",
    ]
    header = ["step, CPU-ms", "with the finite check", "difference, median of rounds"]
    return table(header, [row])


def save_table(encoder: str, *, rounds: int) -> str:
    """Seconds of a whole save, and of the digests in it, with both kinds of arrays."""
    config = build_config(argparse.Namespace(**SIZES, encoder=encoder), "SupCon")
    plan = plan_of(config)
    everywhere = parallel.replicated(plan.mesh)
    state = jax.block_until_ready(jax.jit(plan.init, out_shardings=everywhere)())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    header = [
        "arrays that Orbax gets",
        "MB",
        "the first save: the run waits, s",
        "others: whole, s",
        "of it the run waits, s",
        "digests, s",
        "digests / save",
    ]
    rows = [
        ["the host's, as a run does", f"{size / 1e6:.0f}", *times_of(state, rounds)]
    ]
    with mock.patch.object(manager, "on_host", lambda tree: tree):
        rows.append(["the devices'", f"{size / 1e6:.0f}", *times_of(state, rounds)])
    return table(header, rows)


def times_of(state: TrainState, rounds: int) -> list[str]:
    """What saves of a state take."""
    digests: list[float] = []
    blocked: list[float] = []
    whole: list[float] = []
    original = manager.digests

    def timed(trees):
        start = time.perf_counter()
        found = original(trees)
        digests.append(time.perf_counter() - start)
        return found

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(manager, "digests", timed),
    ):
        checkpointer = manager.Checkpointer(folder)
        for step in range(1, rounds + 2):
            start = time.perf_counter()
            checkpointer.save(state, step, {})
            blocked.append(time.perf_counter() - start)
            checkpointer.wait()
            whole.append(time.perf_counter() - start)
        checkpointer.close()
    # The first save makes folders and threads, and compiles what it needs.
    times = [statistics.median(values[1:]) for values in (whole, blocked, digests)]
    seconds = [f"{value:.2f}" for value in (blocked[0], *times)]
    return [*seconds, f"{100 * times[2] / times[0]:.0f} %"]


if __name__ == "__main__":
    main()
