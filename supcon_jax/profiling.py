"""A trace of some steps of a run: where their time goes, on device and host."""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import jax

logger = logging.getLogger(__name__)
# With a count alone these are left out: the first ones are slow for reasons of their own.
SETTLING = 10


class Window(NamedTuple):
    """The steps that are traced, both included, counted from 1."""

    first: int
    last: int


def parse_window(text: str) -> Window | None:
    """The steps that `config.profile_steps` names; None for "".

    Raises:
      ValueError: it is neither FIRST:LAST nor a count.

    Example:
      >>> parse_window("10:15"), parse_window("5")
      (Window(first=10, last=15), Window(first=11, last=15))
    """
    if not text:
        return None
    first, colon, last = text.partition(":")
    if not all(part.isdecimal() for part in ((first, last) if colon else (first,))):
        raise ValueError(f"got {text!r}; allowed: FIRST:LAST, or a count of steps")
    window = Window(int(first), int(last)) if colon else Window(1, int(first))
    if not 1 <= window.first <= window.last:
        raise ValueError(f"got {text!r}; allowed: at least one step, counted from 1")
    return window if colon else Window(SETTLING + 1, SETTLING + window.last)


def traced(
    steps: Iterator[tuple[int, Any, Any]],
    window: Window,
    folder: pathlib.Path,
    *,
    start_step: int,
    shown: str = "",
) -> Generator[tuple[int, Any, Any]]:
    """The same steps; a trace of those in the window is written once, by process 0.

    Nothing that is computed changes: the device is waited for before the first of them is
    dispatched and after the last.

    Args:
      steps: number, state and metrics of each step, as `loop.run_steps` gives them.
      window: which to trace. Those that a run has behind it when it goes on are not.
      folder: of the traces; each window has a folder of its own in it.
      start_step: number of the step before the first.
      shown: what messages call the folder, where it is the local copy of one in a bucket.
    """
    place = folder / f"steps_{window.first}_to_{window.last}"
    if jax.process_index() or start_step >= window.first or place.exists():
        yield from steps
        return
    number, metrics = start_step, None
    with contextlib.ExitStack() as tracing:
        while True:
            if number + 1 == window.first:
                jax.block_until_ready(metrics)
                jax.profiler.start_trace(place)
                tracing.callback(_stop, f"{shown or folder}/{place.name}")
            with jax.profiler.StepTraceAnnotation("step", step_num=number + 1):
                step = next(steps, None)
            if step is None:
                return
            number, _, metrics = step
            if number == window.last:
                jax.block_until_ready(metrics)
                tracing.close()
            yield step


def _stop(place: str) -> None:
    jax.profiler.stop_trace()
    logger.info(
        "profile: %s; open its .trace.json.gz in a browser at ui.perfetto.dev, or "
        "`tensorboard --logdir=%s` with the profile plugin",
        place,
        place,
    )
