"""Time, operations and memory of the real train step, as ratios to cross-entropy.

    python -m benchmarks.train_step                          # ResNet-8, 32 px, a minute
    python -m benchmarks.train_step --encoder resnet50 --image_size 64 --batch 16
    python -m benchmarks.train_step --encoder resnet50 --image_size 224 --batch 256 \\
        --dtype bfloat16                                     # a GPU or a TPU
    python -m benchmarks.train_step --loss_share     # the loss in the step, by operations
    python -m benchmarks.train_step --overlap        # the input hides behind the step
    python -m benchmarks.train_step --large          # 8192 x 2 views in bounded memory
    python -m benchmarks.train_step --collectives --encoder resnet50 --batch 16

Steps are those of `create_plan` on configs/supcon_r50.py with the differences that the
flags name: the same encoder, optimizer (LARS), images and views in every row. Images are
noise, in device memory before the clock starts; the step scales them and, with --augment,
jitters and blurs them. The methods take turns in rounds, each turn with one untimed step
first, so that nobody pays for the caches that another left behind. "wall" and "CPU" are
medians over the rounds of the ratio to cross-entropy at equal views.

"GFLOP" is what the step executes in matrix products and convolutions on all devices, read
from the traced program with every loop unrolled (supcon_jax/planning/flops.py); a microbatched or
rematerialised step computes (most of) the encoder's forward twice, 4/3 of the operations.
"TFLOP/s" and the share of the peak count what the step would need without that.

The share of the loss: with F operations of encoder and head for the forward pass of a
view, a step of N views needs 3 N F (forward, and a backward of twice that), and the loss
4 N^2 D on one device, 6 N^2 D on several (`flops.loss_flops`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.step_runs import (
    BASELINE,
    METHODS,
    Method,
    build_config,
    count_of,
    describe_machine,
    plan_of,
    table,
    tell,
)
from benchmarks.step_tasks import collectives, large, large_child, loss_share, overlap
from supcon_jax.models import ENCODERS

# Most operations a second in bfloat16, without sparsity, of what JAX calls the device.
# The makers' pages: NVIDIA's data sheets of H100, H200 (SXM) and A100; Google Cloud's
# "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e".
PEAK_TFLOPS = {
    "H100 80GB HBM3": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,  # v5p; after v5e, whose name begins alike
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
}


def peak_tflops(device_kind: str, dtype: str) -> float | None:
    """The device's peak in bfloat16; None where it is not known."""
    known = [peak for name, peak in PEAK_TFLOPS.items() if name in device_kind]
    return known[0] if known and dtype == "bfloat16" else None


def compare(options: argparse.Namespace) -> None:
    """The table of the methods."""
    names = list(dict.fromkeys((BASELINE, *options.methods)))
    methods: dict[str, Method] = {}
    useful = {}
    for name in names:
        config = build_config(options, name)
        try:
            methods[name] = Method(config)
        except jax.errors.JaxRuntimeError as error:
            if name == BASELINE or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            tell(f"{name}: left out, it does not fit into memory")
            continue
        tell(f"{name}: compiled in {methods[name].compile_s:.0f} s")
        # Without computing anything twice, all contrastive steps are the same.
        same = {"microbatched": "SupCon", "remat": "SupCon"}.get(name, name)
        if same not in useful:
            useful[same] = count_of(plan_of(build_config(options, same)))
        useful[name] = useful[same]
    for turn in range(options.rounds):
        tell(f"round {turn + 1} of {options.rounds}")
        for method in methods.values():
            method.turn(options.steps)
    kind, dtype = jax.devices()[0].device_kind, compute_dtype(options)
    peak = peak_tflops(kind, dtype)
    labels = {
        "microbatched": f"SupCon, {options.microbatches} microbatches",
        "remat": "SupCon, encoder.remat",
    }
    rows = [
        method_row(
            labels.get(name, name),
            method,
            methods[BASELINE],
            options.batch * options.views,
            useful[name],
            peak and peak * jax.device_count(),
        )
        for name, method in methods.items()
    ]
    print(f"{describe_machine()}.")
    print(
        f"{options.encoder}, {options.image_size} px, {options.stem} stem, {dtype}, "
        f"{options.batch} images x {options.views} views, {options.rounds} rounds of "
        f"{options.steps} steps"
        f"{', in-step augmentation' if options.augment else ''}.\n"
    )
    header = "step|views/s|ms|wall / CE|CPU / CE|GFLOP|TFLOP/s|of peak|memory MiB"
    print(table(header.split("|"), rows))
    analysis = methods[BASELINE].compiled.cost_analysis() or {}
    if "flops" in analysis:
        print(
            f"\nXLA's own count for the cross-entropy step on one device: "
            f"{analysis['flops'] / 1e9:,.4g} GFLOP, element-wise work included."
        )
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        peak_mib = stats["peak_bytes_in_use"] / 2**20
        print(f"\nPeak of the first device, all states loaded: {peak_mib:,.0f} MiB.")


def compute_dtype(options: argparse.Namespace) -> str:
    """The type of the convolutions, "auto" resolved."""
    return jnp.dtype(
        plan_of(build_config(options, "SupCon")).modules.encoder.dtype
    ).name


def method_row(
    name: str,
    method: Any,
    baseline: Any,
    views: int,
    useful_flops: int,
    peak: float | None,
) -> list[str]:
    """One row of `compare`, from seconds a step in each round."""
    seconds = statistics.median(method.wall)
    rate = useful_flops / seconds / 1e12
    needs = method.memory
    return [
        name,
        f"{views / seconds:,.0f}"
        if views / seconds >= 100
        else f"{views / seconds:.1f}",
        f"{1e3 * seconds:,.1f}",
        f"{ratio(method.wall, baseline.wall):.3f}",
        f"{ratio(method.cpu, baseline.cpu):.3f}",
        f"{method.flops / 1e9:,.4g}",
        f"{rate:,.3g}",
        "-" if peak is None else f"{rate / peak:.1%}",
        "-" if needs is None else f"{sum(needs) / 2**20:,.0f}",
    ]


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


TASKS = {
    task.__name__: task for task in (compare, loss_share, overlap, large, collectives)
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the defaults of the task that they name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="resnet8", choices=list(ENCODERS))
    parser.add_argument("--stem", default="imagenet", choices=("imagenet", "cifar"))
    parser.add_argument("--image_size", type=int, default=32, help="pixels")
    parser.add_argument("--batch", type=int, help="images; 256, with --large 8192")
    parser.add_argument("--views", type=int, default=2, help="of every image")
    parser.add_argument("--microbatches", type=int, help="4, with --large 16")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16")
    )
    parser.add_argument("--augment", action="store_true", help="jitter, gray, blur")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="timed ones in a turn")
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="comma-separated rows"
    )
    tasks = parser.add_mutually_exclusive_group()
    for name, task in TASKS.items():
        tasks.add_argument(
            f"--{name}",
            dest="task",
            action="store_const",
            const=name,
            help=task.__doc__.splitlines()[0],
        )
    options = parser.parse_args(arguments)
    options.task = options.task or "compare"
    is_large = options.task == "large"
    options.batch = options.batch or (8192 if is_large else 256)
    options.microbatches = options.microbatches or (16 if is_large else 4)
    options.steps = options.steps or {"large": 2, "overlap": 12}.get(options.task, 5)
    options.methods = options.methods.split(",")
    if unknown := [name for name in options.methods if name not in METHODS]:
        parser.error(f"unknown method {unknown[0]!r}; available: {', '.join(METHODS)}")
    if options.batch % options.microbatches:
        parser.error(f"--microbatches must divide the batch, {options.batch}")
    return options


def main() -> None:
    """Runs the task that the flags name."""
    if sys.argv[1:2] == ["--child"]:
        name, arguments = sys.argv[2:]
        print(
            json.dumps(large_child(argparse.Namespace(**json.loads(arguments)), name))
        )
        return
    options = parse()
    try:
        TASKS[options.task](options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    assert "tensorflow" not in sys.modules, "the step is timed without TensorFlow"


if __name__ == "__main__":
    main()
