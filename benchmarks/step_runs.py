"""Runs of the train step for benchmarks: configs, batches and tables that they share."""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import platform
import sys
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import common, supcon_r50
from supcon_jax import parallel
from supcon_jax.planning.flops import count_flops
from supcon_jax.run.memory import step_memory
from supcon_jax.run.plan import Plan, create_plan

BASELINE = "cross-entropy"
METHODS = (BASELINE, "SupCon", "SimCLR", "microbatched", "remat")


def build_config(options: argparse.Namespace, method: str) -> ConfigDict:
    """The recipe of a method at the size that the flags say."""
    config = supcon_r50.get_config()
    augmentation = "sim_augment" if options.augment else "identity"
    common.set_augmentation(config, augmentation)
    config.update_from_flattened_dict(
        {
            "batch_size": options.batch,
            "data.image_size": options.image_size,
            "data.eval_resize": options.image_size,
            "data.views": options.views,
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


def plan_of(config: ConfigDict) -> Plan:
    """The plan of a config for ImageNet, on the devices that are here."""
    return create_plan(
        config,
        parallel.create_mesh(),
        num_classes=1000,
        num_examples=1_281_167,
        whole_images=False,  # files are cropped on the host
    )


def noise_batch(plan: Plan, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of noise images with labels, as a plan's step takes it."""
    random, shapes = np.random.default_rng(seed), plan.abstract_batch()
    most = {"image": 256, "label": plan.num_classes, "id": plan.num_examples}
    return {
        key: random.integers(0, most[key], shape.shape, dtype=shape.dtype)
        for key, shape in shapes.items()
    }


class Method:
    """A compiled step with a state of its own."""

    def __init__(self, config: ConfigDict):
        plan = plan_of(config)
        self.flops = count_of(plan)
        replicated = parallel.replicated(plan.mesh)
        self.state = jax.jit(plan.init, out_shardings=replicated)()
        self.batch = parallel.to_global(noise_batch(plan), plan.mesh)
        start = time.perf_counter()
        self.compiled = plan.lower().compile()
        self.compile_s = time.perf_counter() - start
        self.step = functools.partial(self.compiled, plan.seed_on_devices())
        self.memory = step_memory(self.compiled)
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


def count_of(plan: Plan) -> int:
    """Operations of a plan's step."""
    return count_flops(plan.step, plan.abstract_state(), plan.abstract_batch())
