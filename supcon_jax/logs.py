"""The program's log for people: terminal, log.txt, durations, progress with ETA.

In a multi-host job only process 0 speaks.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from absl import logging as absl_logging

from supcon_jax import hosts

logger = logging.getLogger("supcon_jax")
T = TypeVar("T")


def setup_logging() -> None:
    """Sends the program's log to the terminal (of process 0 only)."""
    logger.setLevel(logging.INFO)
    # Orbax and TFDS narrate every save through absl; their warnings stay.
    absl_logging.set_verbosity(absl_logging.WARNING)
    _silence_failed_writes()
    logger.propagate = False
    if not logger.handlers:
        handler = _Terminal(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        # Not jax.process_index: it would wait for the devices of all processes.
        handler.addFilter(lambda record: hosts.index() == 0)
        logger.addHandler(handler)


def _silence_failed_writes() -> None:
    """Each of Orbax's threads tells of a write that failed; the checkpointer raises it."""
    absl_logging.get_absl_handler().addFilter(
        lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
    )
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    tell = sys.unraisablehook

    def tell_others(unraisable: Any) -> None:
        # TensorStore answers those that do not wait any more.
        if str(unraisable.exc_value) != "Event loop is closed":
            tell(unraisable)

    sys.unraisablehook = tell_others


class _Terminal(logging.StreamHandler):
    """Standard output; where it is closed or cannot show a letter, the run goes on."""

    def __init__(self, stream: TextIO):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        super().__init__(stream)

    def handleError(self, record: logging.LogRecord) -> None:
        """A closed pipe (`| head`): log.txt goes on."""
        if isinstance(sys.exc_info()[1], OSError | ValueError):
            self.setStream(open(os.devnull, "w"))
            with contextlib.suppress(OSError, ValueError):
                os.dup2(self.stream.fileno(), sys.stdout.fileno())
        else:
            super().handleError(record)


class _LogFile(logging.FileHandler):
    """log.txt; where its disk is full, the line of metrics.jsonl that fails too says so."""

    def handleError(self, record: logging.LogRecord) -> None:
        """The terminal has the line."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """What could not be written is left."""
        with contextlib.suppress(OSError):
            super().close()


def format_duration(seconds: float) -> str:
    """Seconds as 42s, 3m05s, 2h07m or 5d03h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86_400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86_400}d{seconds % 86_400 // 3600:02d}h"


def progress(
    items: Iterable[T], *, total: int, label: str, every_s: float = 10.0
) -> Iterator[T]:
    """Passes items on and logs share and ETA, where it takes longer than `every_s`."""
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last > every_s:
            last = now
            eta = format_duration((now - start) / done * (total - done))
            logger.info(
                "  %s %d/%d (%.0f%%)  ETA %s",
                label,
                done,
                total,
                100 * done / total,
                eta,
            )
        yield item


def add_log_file(workdir: pathlib.Path) -> logging.Handler:
    """Copies the log into `workdir/log.txt`, with the time in front."""
    first = hosts.index() == 0
    path = workdir / "log.txt" if first else os.devnull
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    return handler
