"""What a step needs in memory, and what to change where a device does not have it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

from supcon_jax import parallel
from supcon_jax.run.plan import Plan

logger = logging.getLogger(__name__)


class StepMemory(NamedTuple):
    """Bytes that the compiled step needs on one device.

    Attributes:
      held: arguments and results: the state and a batch.
      working: everything in between, mostly activations kept for the backward pass.
    """

    held: int
    working: int


def step_memory(compiled: jax.stages.Compiled) -> StepMemory | None:
    """The compiler's own account of a step; None where it keeps none."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    # The new state takes the place of the old one, which was given away.
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes
    return StepMemory(held - stats.alias_size_in_bytes, stats.temp_size_in_bytes)


def device_memory(device: jax.Device) -> int | None:
    """Bytes that a device has for this process; None where it does not say.

    CPUs share the machine's memory.
    """
    if device.platform == "cpu":
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return whole // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def check_memory(plan: Plan, compiled: jax.stages.Compiled) -> None:
    """Says what the step needs, and refuses it before it runs if it cannot fit.

    Raises:
      ValueError: see `out_of_memory`.
    """
    needs = step_memory(compiled)
    if needs is None:
        return
    limit = device_memory(plan.mesh.local_mesh.devices.flat[0])
    logger.info(
        "memory: a step needs %s on each device: %s for state and batch, and %s for each "
        "view in the encoder%s",
        _bytes(sum(needs)),
        _bytes(needs.held),
        _bytes(needs.working / _views_at_a_time(plan)),
        f"; there are {_bytes(limit)}" if limit else "",
    )
    if limit and sum(needs) > limit:
        raise out_of_memory(plan, needs, limit)


@contextlib.contextmanager
def explained(plan: Plan) -> Iterator[None]:
    """Turns the runtime's out-of-memory error into `out_of_memory`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise out_of_memory(plan, error=error) from None


def out_of_memory(
    plan: Plan,
    needs: StepMemory | None = None,
    limit: int | None = None,
    error: Exception | None = None,
) -> ValueError:
    """The refusal of a step that is too large, with what would make it smaller.

    The memory model is linear: what is held, and so much for each view that the encoder
    has in hand at a time.

    Args:
      plan: of the run.
      needs: of its step; None where it could not be compiled.
      limit: bytes of a device, where known.
      error: what the runtime said, for where `needs` is not known.
    """
    config, told = plan.config, ""
    at_a_time = config.microbatch_size or config.batch_size
    room = at_a_time - 1
    if needs is not None:
        told = f": it needs {_bytes(sum(needs))} on each device"
        if limit is not None:
            views = (limit - needs.held) / (needs.working / _views_at_a_time(plan))
            room = min(room, int(views * plan.mesh.size / config.data.views))
            told += f", which has {_bytes(limit)}"
    elif error is not None:
        # TPU: "Used 22.28G of 15.75G hbm. Exceeded hbm capacity by 6.53G."
        found = re.search(r"Used \S+ of \S+ hbm", str(error))
        found = found or re.search(r"[Oo]ut of memory[^.\n]*", str(error))
        told = f": {found.group()}" if found else ""
    flags = [
        f"--config.microbatch_size={size}"
        for size in parallel.microbatch_sizes(config.batch_size, plan.mesh)
        if size <= room
    ][-1:]
    if not config.encoder.remat:
        flags.append("--config.encoder.remat=True")
    if config.encoder.dtype == "float32" and plan.platform != "cpu":
        flags.append("--config.encoder.dtype=bfloat16")
    flags.append("a smaller --config.batch_size")
    return ValueError(
        f"the step of {config.batch_size} images x {config.data.views} views does not "
        f"fit into memory{told}; what lowers it: {', '.join(flags)}, more devices"
    )


def _views_at_a_time(plan: Plan) -> float:
    """Views that the encoder has in hand on one device."""
    config = plan.config
    images = config.microbatch_size or config.batch_size
    return images * config.data.views / plan.mesh.size


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
