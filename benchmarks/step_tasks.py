"""What benchmarks.train_step shows beside times: shares, overlap, memory, collectives."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.step_runs import (
    build_config,
    count_of,
    describe_machine,
    noise_batch,
    plan_of,
    table,
    tell,
)
from supcon_jax import builders, parallel
from supcon_jax.planning.flops import count_flops, loss_flops
from supcon_jax.run import loop
from supcon_jax.run.memory import StepMemory, device_memory, step_memory

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute")


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
            traced = count_of(plan_of(config))
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


def forward_flops(config: ConfigDict) -> float:
    """Operations of encoder and head for one view, forward."""
    encoder = builders.build_encoder(config, jax.default_backend())
    head = builders.build_projection(config, 1000)
    size = config.data.image_size
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)

    def forward(images: jax.Array) -> jax.Array:
        embeddings, _ = encoder.init_with_output(jax.random.key(0), images, train=True)
        return head.init_with_output(jax.random.key(1), embeddings, train=True)[0]

    return count_flops(forward, images) / len(images)


def overlap(options: argparse.Namespace) -> None:
    """The loop's steps with an input that takes a chosen share of their time.

    The input waits (as for a disk or for other threads) before it hands out a batch. One
    run goes through all shares in turn, round after round; a step's time is that between
    two batches that the loop asks for.
    """
    shares, settle, length = (0.5, 0.9, 1.5), 4, options.steps + 4
    phases = [0.0, *shares] * options.rounds
    results: dict[float, list[tuple[float, float, float]]] = {s: [] for s in shares}
    step_s = 0.0

    def slow(batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        nonlocal step_s
        yield from [batch] * settle
        for share in phases:
            asked, spent = [], []
            for _ in range(length + 1):
                asked.append(time.perf_counter())
                time.sleep(share * step_s)
                spent.append(time.perf_counter() - asked[-1])
                yield batch
            between = statistics.median(np.diff(asked)[settle:])
            waited = statistics.median(spent[settle:])
            if share == 0:
                step_s = between
            else:
                results[share].append((step_s, waited, between))
        yield from itertools.repeat(batch)

    plan = plan_of(build_config(options, "SupCon"))
    step = functools.partial(plan.lower().compile(), plan.seed_on_devices())
    state = jax.jit(plan.init, out_shardings=parallel.replicated(plan.mesh))()
    batches = parallel.prefetch_to_devices(slow(noise_batch(plan)), plan.mesh)
    last = settle + len(phases) * (length + 1)
    for number, _, metrics in loop.run_steps(step, state, batches, last=last):
        if number % (length + 1) == 0:
            tell(f"step {number} of {last}, loss {float(metrics['train/loss']):.3f}")
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
    plan = plan_of(build_config(options, name))
    compiled = plan.lower().compile()
    needs = step_memory(compiled) or StepMemory(0, 0)
    cells = [f"{part / 2**20:,.0f}" for part in needs]
    cells.append(f"{resident_peak():,.0f}")
    if sum(needs) > free_memory() / 2:
        return [*cells, "not run", "-"]
    state = jax.jit(plan.init, out_shardings=parallel.replicated(plan.mesh))()
    batch = parallel.to_global(noise_batch(plan), plan.mesh)
    seconds = []
    for _ in range(options.steps):
        start = time.perf_counter()
        state, metrics = compiled(plan.seed_on_devices(), state, batch)
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
        counts = count_collectives(plan_of(config).lower().compile().as_text())
        tell(f"batch_norm_devices={devices}: {counts}")
        rows.append([f"{devices} ({text})", *map(str, counts.values())])
    print(f"{describe_machine()}.")
    print(f"{options.encoder}, {options.batch} images x {options.views} views.\n")
    print(table(["encoder.batch_norm_devices", *COLLECTIVES], rows))
