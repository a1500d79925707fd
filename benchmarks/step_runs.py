"""Runs of the train step for benchmarks: configs, batches and tables that they share."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.flops import count_flops
from configs import common, supcon_r50
from supcon_jax import experiment, loop, parallel, pretrain
from supcon_jax.config import check_config
from supcon_jax.experiment import Run
from supcon_jax.memory import step_memory

Config = Any
BASELINE = "cross-entropy"
METHODS = (BASELINE, "SupCon", "SimCLR", "microbatched", "remat")


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


def count_of(config: Config) -> int:
    """Operations of a method's step."""
    with opened(config) as run:
        init, step, _ = pretrain.build(run)
        return count_flops(step, *abstract(run, init))
