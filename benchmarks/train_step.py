"""Time, operations and memory of the real train step, as ratios to cross-entropy.

    python -m benchmarks.train_step                          # ResNet-8, 32 px, a minute
    python -m benchmarks.train_step --encoder resnet50 --image_size 64 --batch 16
    python -m benchmarks.train_step --encoder resnet50 --image_size 224 --batch 256 \\
        --dtype bfloat16                                     # a GPU or a TPU
    python -m benchmarks.train_step --loss_share     # the loss in the step, by operations
    python -m benchmarks.train_step --overlap        # the input hides behind the step
    python -m benchmarks.train_step --large          # 8192 x 2 views in bounded memory
    python -m benchmarks.train_step --collectives --encoder resnet50 --batch 16

Steps are those of `pretrain.build` on configs/supcon_r50.py with the differences that the
flags name: the same encoder, optimizer (LARS), images and views in every row. Images are
noise, in device memory before the clock starts; the step scales them and, with --augment,
jitters and blurs them. The methods take turns in rounds, each turn with one untimed step first, so that
nobody pays for the caches that another left behind. "wall" and "CPU" are medians over the rounds of the
ratio to cross-entropy at equal views.

"GFLOP" is what the step executes in matrix products and convolutions on all devices, read
from the traced program with every loop unrolled (benchmarks/flops.py); a microbatched or
rematerialised step computes (most of) the encoder's forward twice, 4/3 of the operations.
"TFLOP/s" and the share of the peak count what the step would need without that.

The share of the loss: with F operations of encoder and head for the forward pass of a
view, a step of N views needs 3 N F (forward, and a backward of twice that), and the loss
4 N^2 D on one device, 6 N^2 D on several (`flops.loss_flops`).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.flops import count_flops, loss_flops
from configs import common, supcon_r50
from supcon_jax import experiment, loop, parallel, pretrain
from supcon_jax.config import check_config
from supcon_jax.experiment import Run
from supcon_jax.memory import StepMemory, device_memory, step_memory
from supcon_jax.models import ENCODERS

Config = Any
BASELINE = "cross-entropy"
METHODS = (BASELINE, "SupCon", "SimCLR", "microbatched", "remat")
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


def build_config(options: argparse.Namespace, method: str) -> Config:
    """The recipe of a method at the size that the flags say."""
    config = supcon_r50.get_config()
    augmentation = "sim_augment" if options.augment else "identity"
    common.set_augmentation(config, augmentation)
    config.update_from_flattened_dict(
        {
            "batch_size": options.batch,
            "data.name": "synthetic",
            "data.fake": True,
            "data.image_size": options.image_size,
            "data.eval_resize": options.image_size,
            "data.views": options.views,
            "data.eval_split": "test",
            "encoder.name": options.encoder,
            "encoder.stem": options.stem,
            "encoder.dtype": options.dtype,
            "eval_every": 0,
            "checkpoint_every": 0,
            "knn.bank": 0,
        }
    )
    if method == BASELINE:
        config.loss.name = "cross_entropy"
    elif method == "SimCLR":
        config.loss.name = "simclr"
    elif method == "microbatched":
        config.microbatch_size = max(1, options.batch // options.microbatches)
    elif method == "remat":
        config.encoder.remat = True
    return config


@contextlib.contextmanager
def opened(config: Config) -> Iterator[Run]:
    """A run in a workdir that goes away."""
    check_config(config)
    with tempfile.TemporaryDirectory() as folder:
        yield experiment.open_run(config, folder)


def abstract(run: Run, init: Callable[[], Any]) -> tuple[Any, Any]:
    """Shapes of the state and of a global batch."""
    batch = next(batches_of(run))
    rows = run.config.batch_size
    shapes = {
        key: jax.ShapeDtypeStruct((rows, *value.shape[1:]), value.dtype)
        for key, value in batch.items()
    }
    return jax.eval_shape(init), shapes


def batches_of(run: Run) -> Iterator[dict[str, np.ndarray]]:
    """The host's batches."""
    return experiment.build_train_batches(run.config, run.train_source, run.sampler)


class Method:
    """A compiled step with a state of its own."""

    def __init__(self, config: Config):
        with opened(config) as run:
            init, step, _ = pretrain.build(run)
            shapes = abstract(run, init)
            everywhere = parallel.replicated(run.mesh)
            self.flops = count_flops(step, *shapes)
            self.state = jax.jit(init, out_shardings=everywhere)()
            self.batch = parallel.to_global(next(batches_of(run)), run.mesh)
            start = time.perf_counter()
            self.step = loop.compile_step(step, self.state, self.batch, run.mesh)
            self.compile_s = time.perf_counter() - start
        self.memory = step_memory(self.step)
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.run(1)

    def run(self, steps: int) -> None:
        """Steps one after the other, and the end of the last."""
        metrics = {}
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
        loss = float(jax.block_until_ready(metrics)["train/loss"])
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss}: what was timed is not a step"
            )

    def turn(self, steps: int) -> None:
        """One untimed step, and the timed ones."""
        self.run(1)
        cpu, wall = time.process_time(), time.perf_counter()
        self.run(steps)
        self.wall.append((time.perf_counter() - wall) / steps)
        self.cpu.append((time.process_time() - cpu) / steps)


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
            useful[same] = count_of(build_config(options, same))
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
    analysis = methods[BASELINE].step.cost_analysis() or {}
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
        experiment.build_encoder(build_config(options, "SupCon")).dtype
    ).name


def count_of(config: Config) -> int:
    """Operations of a method's step."""
    with opened(config) as run:
        init, step, _ = pretrain.build(run)
        return count_flops(step, *abstract(run, init))


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


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe_machine() -> str:
    """Device, cores, versions, date."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0))
    return (
        f"{jax.device_count()} x {device.device_kind} ({device.platform}), {cores} cores "
        f"({platform.machine()}), jax {jax.__version__}, {datetime.date.today()}"
    )


def tell(text: str) -> None:
    """Progress, away from the table."""
    print(f"  {text}", file=sys.stderr, flush=True)


# --- the share of the loss, by operations ---


def loss_share(options: argparse.Namespace) -> None:
    """The contrastive loss in the step; nothing is compiled or run."""
    rows, largest = [], 0.0
    devices = jax.device_count()
    for encoder, size, sizes in (
        ("resnet50", 224, (256, 1024, 8192)),
        ("resnet8", 32, (256, 1024, 8192)),
    ):
        changed = argparse.Namespace(**vars(options))
        changed.encoder, changed.image_size = encoder, size
        for batch in sizes:
            changed.batch = batch
            config = build_config(changed, "SupCon")
            views = batch * options.views
            model = 3 * views * forward_flops(config)
            loss = loss_flops(views, config.projection.output_dim, devices)
            traced = count_of(config)
            share = loss / (model + loss)
            if encoder == "resnet50":
                largest = max(largest, share)
            rows.append(
                [
                    f"{encoder}, {size} px",
                    f"{batch:,}",
                    f"{model / 1e12:,.4g}",
                    f"{loss / 1e12:,.4g}",
                    f"{share:.3%}",
                    f"{traced / 1e12:,.4g}",
                ]
            )
    header = ["encoder", "images", "encoder and head, TFLOP", "loss, TFLOP", "share"]
    print(f"{options.views} views, {devices} device(s).\n")
    print(table([*header, "traced step, TFLOP"], rows))
    verdict = "met" if largest < 0.01 else "MISSED"
    print(
        f"\nUnder 1 % of the ResNet-50 step: {verdict} (largest share {largest:.3%})."
    )
    if largest >= 0.01:
        sys.exit(1)


def forward_flops(config: Config) -> float:
    """Operations of encoder and head for one view, forward."""
    encoder = experiment.build_encoder(config)
    head = pretrain.build_head(config, 1000, axis_name=None)
    size = config.data.image_size
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)

    def forward(images: jax.Array) -> jax.Array:
        embeddings, _ = encoder.init_with_output(jax.random.key(0), images, train=True)
        return head.init_with_output(jax.random.key(1), embeddings, train=True)[0]

    return count_flops(forward, images) / len(images)


# --- the input behind the step ---


def overlap(options: argparse.Namespace) -> None:
    """The real loop with an input that takes a chosen share of the step's time.

    The input waits (as for a disk or for other threads) before it hands out a batch. One
    run goes through all shares in turn, round after round; a step's time is that between
    two batches that the loop asks for.
    """
    shares, settle, length = (0.5, 0.9, 1.5), 4, options.steps + 4
    phases = [0.0, *shares] * options.rounds
    results: dict[float, list[tuple[float, float, float]]] = {s: [] for s in shares}
    step_s = 0.0

    def slow(*arguments: Any, **keywords: Any) -> Iterator[dict[str, np.ndarray]]:
        nonlocal step_s
        batches = real(*arguments, **keywords)
        for _ in range(settle):
            yield next(batches)
        for share in phases:
            asked, spent = [], []
            for _ in range(length + 1):
                asked.append(time.perf_counter())
                batch = next(batches)
                time.sleep(share * step_s)
                spent.append(time.perf_counter() - asked[-1])
                yield batch
            between = statistics.median(np.diff(asked)[settle:])
            waited = statistics.median(spent[settle:])
            if share == 0:
                step_s = between
            else:
                results[share].append((step_s, waited, between))
        while True:
            yield next(batches)

    config = build_config(options, "SupCon")
    config.total_steps = settle + len(phases) * (length + 1)
    config.log_every = 10
    real = experiment.build_train_batches
    with opened(config) as run:
        init, step, _ = pretrain.build(run)
        with mock.patch.object(experiment, "build_train_batches", slow):
            loop.train(run, init=init, step=step, evaluate=lambda state: {})
    rows = []
    for share, found in results.items():
        alone, waited, measured = (
            statistics.median(x) for x in zip(*found, strict=True)
        )
        to_longer = statistics.median(m / max(s, w) for s, w, m in found)
        to_sum = statistics.median(m / (s + w) for s, w, m in found)
        times = (alone, waited, max(alone, waited), alone + waited, measured)
        rows.append(
            [f"{share:.0%}", *(f"{1e3 * x:.1f}" for x in times)]
            + [f"{to_longer:.2f}", f"{to_sum:.2f}"]
        )
    header = (
        "input / step|step alone, ms|input alone, ms|the longer|in sequence|measured"
    )
    header += "|measured / longer|measured / sequence"
    print(f"{describe_machine()}.")
    print(
        f"{options.encoder}, {options.image_size} px, {options.batch} images x "
        f"{options.views} views, {options.rounds} rounds of {options.steps} steps.\n"
    )
    print(table(header.split("|"), rows))


# --- a large batch in bounded memory ---


def large(options: argparse.Namespace) -> None:
    """Full batch and microbatches, each in a process of its own."""
    rows = []
    for name in ("SupCon", "microbatched"):
        command = [sys.executable, "-m", "benchmarks.train_step", "--child", name]
        arguments = json.dumps(vars(options))
        tell(f"{name}: compiling and running in a process of its own")
        done = subprocess.run(
            [*command, arguments], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            rows.append([name, f"ended with code {done.returncode}", *["-"] * 4])
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        label = f"{options.microbatches} microbatches"
        rows.append([label if name == "microbatched" else "whole batch", *found])
    print(f"{describe_machine()}.")
    print(
        f"{options.encoder}, {options.image_size} px, {options.stem} stem, "
        f"{options.batch} images x {options.views} views.\n"
    )
    header = (
        "step|state and batch, MiB|working memory, MiB|process before, MiB|peak, MiB"
    )
    print(table([*header.split("|"), "seconds a step"], rows))


def large_child(options: argparse.Namespace, name: str) -> list[str]:
    """Cells of a row of `large`: the step is run where half the free memory holds it."""
    config = build_config(options, name)
    with opened(config) as run:
        init, step, _ = pretrain.build(run)
        shapes = abstract(run, init)
        compiled = loop.compile_step(step, *shapes, run.mesh)
        needs = step_memory(compiled) or StepMemory(0, 0)
        cells = [f"{part / 2**20:,.0f}" for part in needs]
        cells.append(f"{resident_peak():,.0f}")
        if sum(needs) > free_memory() / 2:
            return [*cells, "not run", "-"]
        state = jax.jit(init, out_shardings=parallel.replicated(run.mesh))()
        batch = parallel.to_global(next(batches_of(run)), run.mesh)
        seconds = []
        for _ in range(options.steps):
            start = time.perf_counter()
            state, metrics = compiled(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
    return [*cells, f"{resident_peak():,.0f}", f"{min(seconds):.1f}"]


def resident_peak() -> float:
    """The most that this process has held, MiB; on an accelerator, its first device."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def free_memory() -> int:
    """Bytes that a step may take."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return device_memory(device) or 0


# --- what crosses devices ---

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute")


def count_collectives(program: str) -> dict[str, int]:
    """Collectives in the text of a compiled program; a loop's body counts once."""
    return {
        name: len(re.findall(rf" {name}(?:-start)?\(", program)) for name in COLLECTIVES
    }


def collectives(options: argparse.Namespace) -> None:
    """Collectives of the compiled SupCon step for each extent of BatchNorm."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    rows = []
    meaning = {0: "all devices", 2: "pairs", 1: "each device alone"}
    for devices, text in meaning.items():
        config = build_config(options, "SupCon")
        config.encoder.batch_norm_devices = devices
        with opened(config) as run:
            init, step, _ = pretrain.build(run)
            compiled = loop.compile_step(step, *abstract(run, init), run.mesh)
        counts = count_collectives(compiled.as_text())
        tell(f"batch_norm_devices={devices}: {counts}")
        rows.append([f"{devices} ({text})", *map(str, counts.values())])
    print(f"{describe_machine()}.")
    print(f"{options.encoder}, {options.batch} images x {options.views} views.\n")
    print(table(["encoder.batch_norm_devices", *COLLECTIVES], rows))


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
    for task in (loss_share, overlap, large, collectives):
        tasks.add_argument(
            f"--{task.__name__}",
            dest="task",
            action="store_const",
            const=task.__name__,
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
    globals_of_tasks = {f.__name__: f for f in (compare, loss_share, overlap, large)}
    globals_of_tasks["collectives"] = collectives
    try:
        globals_of_tasks[options.task](options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    assert "tensorflow" not in sys.modules, "the step is timed without TensorFlow"


if __name__ == "__main__":
    main()
