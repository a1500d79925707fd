"""What a run needs of a slice of accelerators: memory, time, links, input, a verdict.

The real train step is compiled ahead of time for devices that are not here, so all but the
roofline's times is the compiler's own account. `tools/plan.py` prints it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from supcon_jax import builders, parallel
from supcon_jax.config.keys import TRAINING_MODES
from supcon_jax.data.datasets import SOURCES
from supcon_jax.data.pipeline import on_host
from supcon_jax.data.sampler import shuffled
from supcon_jax.logs import format_duration
from supcon_jax.planning.flops import count_flops
from supcon_jax.planning.roofline import (
    Collective,
    by_kind,
    find_collectives,
    memory_traffic,
    step_time,
)
from supcon_jax.planning.topologies import (
    Topology,
    create_abstract_mesh,
    known_topologies,
)
from supcon_jax.run.batches import build_train_batches
from supcon_jax.run.memory import StepMemory, out_of_memory, step_memory
from supcon_jax.run.plan import Plan, create_plan
from supcon_jax.run.splits import count_training, open_sources

# Training images, classes, mean bytes of an encoded image and whether they are held in
# memory, where the data are not here.
KNOWN_DATA = {
    "imagenet2012": (1_281_167, 1000, 110_000, False),
    "cifar10": (50_000, 10, 2_600, True),
    "cifar100": (50_000, 100, 2_600, True),
}
# Seconds for which the input is measured.
MEASURE_S = 10.0


class Data(NamedTuple):
    """What a plan wants to know of the training split.

    Attributes:
      num_examples, num_classes: of the split.
      image_bytes: mean of an encoded image; None for arrays in memory.
      whole_images: see `Plan`.
      opened: whether they were looked at; else they are those of `KNOWN_DATA`.
      rate: images that this host makes in a second; None where that was not measured.
    """

    num_examples: int
    num_classes: int
    image_bytes: float | None
    whole_images: bool = True
    opened: bool = False
    rate: float | None = None


class Compiled(NamedTuple):
    """What the compiler says of a step on one device.

    Attributes:
      memory: bytes; None where the step was too large to compile.
      traffic: bytes to and from memory, loops counted once.
      collectives: of the program.
      seconds: that it took.
      refusal: the compiler's, where the step does not fit.
    """

    memory: StepMemory | None
    traffic: float
    collectives: list[Collective]
    seconds: float
    refusal: str = ""


def plan_run(
    config: ConfigDict,
    topology: Topology,
    *,
    host_rate: float | None = None,
    host_cores: int | None = None,
) -> dict[str, Any]:
    """Compiles the step of a config for a slice and says what the run needs.

    Args:
      config: see configs/common.py.
      topology: the slice.
      host_rate: images/s of a host; None: measured here, where the data are.
      host_cores: of that host; None: as many as a host of the slice has.

    Returns:
      See `describe`.

    Raises:
      ValueError: a compiler is missing, or the config cannot run on so many devices.
    """
    if config.mode not in TRAINING_MODES:
        raise ValueError(
            f"mode={config.mode} trains nothing, so there is no step to plan; allowed: a "
            f"config of {', '.join(TRAINING_MODES)} (--config)"
        )
    if config.probe.solver == "lbfgs":
        raise ValueError(
            "probe.solver=lbfgs takes no steps, so there is none to plan; allowed: 'sgd' "
            "(--config.probe.solver)"
        )
    if not topology.chip.nvlink:
        # The compiler needs no device; a CPU beside it is enough, and a TPU stays free.
        jax.config.update("jax_platforms", "cpu")
    mesh = create_abstract_mesh(topology)
    parallel.check_batch_size(config.batch_size, mesh)
    data = look_at_data(config, measure=host_rate is None)
    plan = create_plan(
        config,
        mesh,
        num_classes=data.num_classes,
        num_examples=data.num_examples,
        whole_images=data.whole_images,
    )
    compiled = compile_step(plan, topology)
    flops = count_flops(
        plan.step,
        plan.abstract_state(),
        plan.abstract_batch(),
        *plan.abstract_frozen(),
    )
    if host_rate is not None:
        data = data._replace(rate=host_rate)
        host_cores = host_cores or topology.chip.host_cores
    return describe(
        plan,
        topology,
        compiled,
        data,
        flops=flops / mesh.size,
        host_cores=host_cores or os.cpu_count() or 1,
    )


def look_at_data(config: ConfigDict, *, measure: bool) -> Data:
    """The training split: opened where it is at hand, else as it is known to be.

    Raises:
      ValueError: it is neither, or it cannot be opened.
    """
    name = config.data.name
    if config.data.dir or config.data.fake or name in SOURCES:
        train, _ = open_sources(config)
        rate = _measured_rate(config, train) if measure else None
        size = train.num_bytes / train.num_examples if train.num_bytes else None
        return Data(
            train.num_examples,
            train.num_classes,
            size,
            not on_host(train),
            opened=True,
            rate=rate,
        )
    if name not in KNOWN_DATA:
        raise ValueError(
            f"how large {name!r} is, is not known without opening it; set "
            "--config.data.dir"
        )
    known = Data(*KNOWN_DATA[name])
    examples, classes = count_training(config, known.num_examples, known.num_classes)
    return known._replace(num_examples=examples, num_classes=classes)


def _measured_rate(config: ConfigDict, train: Any) -> float:
    """Images/s of this host, over some seconds after the first batch."""
    small = ConfigDict(config)
    small.batch_size = min(config.batch_size, 64)
    sampler = shuffled(train.num_examples, small.batch_size, seed=config.seed)
    batches = build_train_batches(small, train, sampler)
    next(batches)
    start, count = time.monotonic(), 0
    while time.monotonic() - start < MEASURE_S:
        next(batches)
        count += small.batch_size
    return count / (time.monotonic() - start)


def compile_step(plan: Plan, topology: Topology) -> Compiled:
    """Lowers and compiles the step, with a word on the time it takes."""
    start = time.monotonic()
    # Tuning on a GPU would need one.
    options: dict[str, str | bool] | None = None
    if topology.chip.nvlink:
        options = {"xla_gpu_autotune_level": "0"}
    with _progress(f"compiling for {topology.name}"):
        lowered = plan.lower()
        try:
            program = lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            seconds = time.monotonic() - start
            needs = _needs_of(plan, str(error))
            return Compiled(needs, 0.0, [], seconds, refusal=_first_line(error))
    text = program.as_text() or ""
    if analysis := program.cost_analysis():
        # A loop's body is counted once; nearly all of a step in microbatches is in loops.
        loops = builders.num_microbatches(plan.config)
        traffic = analysis["bytes accessed"] * loops
    else:
        traffic = memory_traffic(text)
    return Compiled(
        _memory_of(program),
        traffic,
        find_collectives(text, plan.mesh.size),
        time.monotonic() - start,
    )


def _memory_of(program: jax.stages.Compiled) -> StepMemory | None:
    """What a step needs at its peak; the sum of its parts where the compiler has none."""
    needs, stats = step_memory(program), program.memory_analysis()
    peak = getattr(stats, "peak_memory_in_bytes", 0)
    return (
        StepMemory(needs.held, max(0, peak - needs.held)) if needs and peak else needs
    )


def _needs_of(plan: Plan, message: str) -> StepMemory | None:
    """The memory that a step would need, from the refusal of the compiler.

    "Used 22.28G of 15.75G hbm", or "total memory required ... (400.00G) exceeds".
    """
    found = re.search(r"Used ([\d.]+)([MG])|\(([\d.]+)([MG])\) exceeds", message)
    if not found:
        return None
    number, unit = [part for part in found.groups() if part]
    used = int(float(number) * {"M": 2**20, "G": 2**30}[unit])
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(_held(plan)))
    return StepMemory(state, max(1, used - state))


def _held(plan: Plan) -> Any:
    return plan.abstract_state(), plan.abstract_frozen()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


@contextlib.contextmanager
def _progress(label: str, every_s: float = 15.0) -> Iterator[None]:
    """Says on standard error how long something has been going on."""
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every_s):
            spent = format_duration(time.monotonic() - start)
            print(f"  {label}: {spent}", file=sys.stderr, flush=True)

    print(f"  {label}; a ResNet-50 takes minutes", file=sys.stderr, flush=True)
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def describe(
    plan: Plan,
    topology: Topology,
    compiled: Compiled,
    data: Data,
    *,
    flops: float,
    host_cores: int,
) -> dict[str, Any]:
    """The plan as plain numbers: bytes, seconds, images; of one device and one host.

    Args:
      plan: of the run.
      topology: the slice.
      compiled: what the compiler says of its step.
      data: the training split, with the measured rate of a host.
      flops: operations of a step on one device.
      host_cores: of the host on which that rate was measured.

    Returns:
      A tree for JSON; where the step was not compiled, numbers that need it are None.
    """
    config, chip = plan.config, topology.chip
    needs, complete = compiled.memory, not compiled.refusal
    fits = complete and (needs is None or sum(needs) <= chip.memory)
    times = step_time(
        topology,
        flops=flops,
        traffic=compiled.traffic,
        collectives=compiled.collectives,
    )
    seconds = times.total
    needed = config.batch_size / topology.num_hosts / seconds
    found: dict[str, Any] = {
        "topology": {
            "name": topology.name,
            "device": chip.title,
            "devices": topology.num_devices,
            "hosts": topology.num_hosts,
            "host_cores": chip.host_cores,
        },
        "batch_size": config.batch_size,
        "views": config.data.views,
        "microbatch_size": config.microbatch_size,
        "batch_norm_devices": config.encoder.batch_norm_devices,
        "compile_seconds": compiled.seconds,
        "memory": {
            "needed": needs and sum(needs),
            "state_and_batch": needs and needs.held,
            "working": needs and needs.working,
            "of_device": int(chip.memory),
        },
        "flops": flops,
        "traffic": compiled.traffic if complete else None,
        "collectives": [one._asdict() for one in by_kind(compiled.collectives)],
        "step": {
            "compute": times.compute,
            "memory": times.memory if complete else None,
            "collectives_blocking": times.blocking if complete else None,
            "collectives_overlapped": times.overlapped if complete else None,
            "seconds": seconds if complete else None,
            "bound": times.bound if complete else None,
            "images_per_s": config.batch_size / seconds if complete else None,
        },
        "run": {
            "steps": plan.total_steps,
            "epochs": plan.total_steps / plan.steps_per_epoch,
            "images": plan.total_steps * config.batch_size,
            "hours": plan.total_steps * seconds / 3600 if complete else None,
        },
        "input": {
            "data_opened": data.opened,
            "images_per_s": needed if complete else None,
            "host_makes_views": not plan.whole_images,
            "image_bytes": data.image_bytes,
            "bytes_per_s": needed * data.image_bytes
            if complete and data.image_bytes
            else None,
            "measured_images_per_s": data.rate,
            "measured_cores": host_cores if data.rate else None,
            "cores": needed / (data.rate / host_cores)
            if complete and data.rate
            else None,
        },
    }
    found["fits"] = fits
    found["verdict"] = list(_verdicts(plan, topology, compiled, found))
    found["notes"] = _notes(topology, data)
    return found


def _verdicts(
    plan: Plan, topology: Topology, compiled: Compiled, found: dict[str, Any]
) -> Iterator[str]:
    """What a person would conclude, a sentence each."""
    needs, chip = compiled.memory, topology.chip
    if found["fits"]:
        share = f", {sum(needs) / chip.memory:.0%} of the memory" if needs else ""
        yield f"fits{share}"
    else:
        limit = int(chip.memory)
        yield str(out_of_memory(plan, needs, limit, ValueError(compiled.refusal)))
        if needs and (larger := _large_enough(plan, topology, needs)):
            yield f"it fits on {larger.name}, {larger.num_chips} chips"
        return
    step, given = found["step"], found["input"]
    if step["bound"] == "collectives":
        yield (
            "collectives take longer than anything else: "
            "--config.encoder.batch_norm_devices=8 or 1, or fewer devices"
        )
    cores = given["cores"]
    if cores is None:
        return
    has = chip.host_cores
    if cores > has:
        rate = has * given["measured_images_per_s"] / given["measured_cores"]
        slower = given["images_per_s"] / rate
        yield (
            f"input-bound: the devices would wait; a host needs {cores:,.0f} cores and "
            f"has {has}, so a step takes {1e3 * step['seconds'] * slower:,.0f} ms and "
            f"the run {found['run']['hours'] * slower:,.1f} h"
        )
    else:
        yield (
            f"not input-bound: {cores:,.0f} of a host's {has} cores make the batches"
        )


def _large_enough(plan: Plan, topology: Topology, needs: StepMemory) -> Topology | None:
    """The smallest larger slice of this kind on which the batch fits as it is."""
    room = topology.chip.memory - needs.held
    for larger in known_topologies(topology.kind):
        share = topology.num_devices / larger.num_devices
        divides = plan.config.batch_size % larger.num_devices == 0
        if share < 1 and divides and needs.working * share <= room:
            return larger
    return None


def _notes(topology: Topology, data: Data) -> list[str]:
    notes = [
        "times are lower bounds: peaks of the maker, collectives at the links' full "
        "bandwidth and 20 us each, which is assumed"
    ]
    if not data.opened:
        notes.append(
            "the data were not opened: their size is the published one, and the host "
            "was not measured (--config.data.dir here, or --host_rate from the "
            "`input:` line of a run)"
        )
    if topology.chip.nvlink:
        notes.append(
            "compiled without a GPU, so nothing was tuned: the workspace of convolutions "
            "may be missing in the memory; traffic is what kernels read and write once"
        )
    return notes
