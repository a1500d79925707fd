"""Where a run's metrics go: metrics.jsonl always, and the backends of config.writers.

In a multi-host job only process 0 writes. A backend is a class with `write` and `close`
and an entry in `BACKENDS`; one that talks to another machine runs in the background, so
that it can neither stop nor slow the run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import math
import os
import pathlib
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import jax

from supcon_jax import storage
from supcon_jax.logs import format_duration
from supcon_jax.metrics import LINE_FIELDS, on_progress

logger = logging.getLogger(__name__)
Record = dict[str, Any]  # a line of metrics.jsonl
# Lines that wait for a tracker, and seconds that the end of a run waits for it.
WAITING, PATIENCE_S = 10_000, 15.0


class RunInfo(NamedTuple):
    """What a backend is told of a run.

    Attributes:
      workdir: an existing folder.
      start_step: step that was restored; lines of later steps are written again.
      resumed: whether lines of an earlier process stay.
      config: of the run, as a dictionary.
      project: under which a tracker files it.
    """

    workdir: pathlib.Path
    start_step: int = 0
    resumed: bool = False
    config: dict[str, Any] = {}
    project: str = "supcon_jax"


class Backend(Protocol):
    """A place that metrics are written to."""

    def write(self, record: Record) -> None:
        """Takes one line: step, epoch, seconds and metrics."""

    def close(self) -> None:
        """Takes no more lines; what was written is safe."""


class Jsonl:
    """metrics.jsonl: one JSON object a line, on disk at once."""

    def __init__(self, run: RunInfo):
        path = run.workdir / "metrics.jsonl"
        earlier = [r for r in read_metrics(run.workdir) if r["step"] <= run.start_step]
        if earlier or path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in earlier))
            os.replace(temporary, path)
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        """Appends a line; what is no number is left out, since JSON has no word for it."""
        kept = {
            name: value
            for name, value in record.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        with _named(self._file.name):
            self._file.write(json.dumps(kept) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file; a line that found no room is tried once more here."""
        with _named(self._file.name):
            self._file.close()


class TensorBoard:
    """Event files in `tensorboard/`, which `tensorboard --logdir` shows."""

    def __init__(self, run: RunInfo):
        from tensorboardX import SummaryWriter

        self._folder = str(run.workdir / "tensorboard")
        self._writer = SummaryWriter(
            self._folder,
            purge_step=run.start_step + 1 if run.resumed else None,
        )

    def write(self, record: Record) -> None:
        """Adds the scalars of a line."""
        for name, value in _metrics(record).items():
            self._writer.add_scalar(name, value, record["step"])
        with _named(self._folder):
            self._writer.flush()

    def close(self) -> None:
        """Closes the files; every line was flushed, so a full disk has been told."""
        with contextlib.suppress(OSError):
            self._writer.close()


class WandB:
    """Weights & Biases. A resumed run goes on in the same one; `WANDB_MODE=offline`."""

    def __init__(self, run: RunInfo):
        import wandb

        self._run = wandb.init(
            project=run.project,
            name=run.workdir.name,
            id=_run_id(run, "wandb"),
            resume="allow",
            dir=run.workdir,
            config=run.config,
            # By default it tries for 90 s, and the process cannot end meanwhile.
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=PATIENCE_S
            ),
        )
        # Steps that run again after a resume are smaller than those that W&B has seen.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Logs a line."""
        self._run.log({"step": record["step"], **_metrics(record)})

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()


class Trackio:
    """Trackio, which keeps runs on this machine: `trackio show`."""

    def __init__(self, run: RunInfo):
        import trackio

        self._trackio = trackio
        # Trackio knows a run by its name; two workdirs may be called the same.
        trackio.init(
            project=run.project,
            name=f"{run.workdir.name}-{_run_id(run, 'trackio')}",
            resume="allow",
            config=run.config,
            embed=False,
        )

    def write(self, record: Record) -> None:
        """Logs a line."""
        self._trackio.log(_metrics(record), step=record["step"])

    def close(self) -> None:
        """Sends what is left."""
        self._trackio.finish()


class InBackground:
    """A backend in a thread of its own, which opens it, writes and closes it.

    Whatever goes wrong there is told in one warning, and nothing is sent any more.
    """

    def __init__(self, name: str, open_backend: Callable[[], Backend]):
        self._name = name
        self._failed = threading.Event()
        self._records: queue.Queue[Record | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(
            target=self._run, args=(open_backend,), name=name, daemon=True
        )
        self._thread.start()

    def write(self, record: Record) -> None:
        """Leaves a line to the thread; never waits."""
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._fail("it does not answer")

    def close(self) -> None:
        """Waits for the thread, but not for long."""
        if self._failed.is_set():
            return
        try:
            self._records.put(None, timeout=PATIENCE_S)
        except queue.Full:
            pass
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self._fail(f"it did not take the last lines within {PATIENCE_S:.0f} s")

    def _run(self, open_backend: Callable[[], Backend]) -> None:
        try:
            backend = open_backend()
            while (record := self._records.get()) is not None:
                if self._failed.is_set():
                    return
                backend.write(record)
            backend.close()
        except (Exception, SystemExit) as error:  # whatever a tracker may raise
            lines = str(error).strip().splitlines()
            self._fail(lines[0] if lines else type(error).__name__)

    def _fail(self, reason: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            logger.warning(
                "warning: %s gets no metrics (%s); the run goes on, metrics.jsonl has "
                "them all",
                self._name,
                reason,
            )


class BackendEntry(NamedTuple):
    """How a backend is opened.

    Attributes:
      open: makes it for a run.
      package: that it imports.
      remote: whether it may have to wait for another machine.
      extra: of this package that installs it.
    """

    open: Callable[[RunInfo], Backend]
    package: str
    remote: bool = False
    extra: str = "train"


BACKENDS: dict[str, BackendEntry] = {
    "tensorboard": BackendEntry(TensorBoard, "tensorboardX"),
    "wandb": BackendEntry(WandB, "wandb", remote=True, extra="wandb"),
    "trackio": BackendEntry(Trackio, "trackio", remote=True, extra="trackio"),
}


def check_installed(names: Iterable[str]) -> None:
    """Refuses backends whose package is not there.

    Raises:
      ValueError: naming the command that installs it.
    """
    for name in names:
        backend = BACKENDS[name]
        if importlib.util.find_spec(backend.package) is None:
            raise ValueError(
                f"{name} needs the package {backend.package}: pip install "
                f"{backend.package}, or 'supcon_jax[{backend.extra}]' (--config.writers)"
            )


class MetricWriter:
    """Writes the metrics of one run; a resumed run takes up where it restored.

    Args:
      workdir: an existing folder.
      total_steps: length of the run, for share and ETA.
      steps_per_epoch: for the "epoch" field; may be fractional.
      start_step: step that was restored. Lines of later steps (written by a process
        that was killed before its next checkpoint) are dropped, as those steps run
        again.
      writers: names in `BACKENDS`, beside metrics.jsonl.
      project, config: what a tracker is told of the run.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        total_steps: int,
        steps_per_epoch: float,
        start_step: int = 0,
        writers: Iterable[str] = ("tensorboard",),
        project: str = "supcon_jax",
        config: dict[str, Any] | None = None,
    ):
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._start_time = time.monotonic()
        self._wall_before = 0.0
        self._backends: list[Backend] = []
        if jax.process_index() != 0:
            return
        earlier = [r for r in read_metrics(workdir) if r["step"] <= start_step]
        self._wall_before = max((r["wall_s"] for r in earlier), default=0.0)
        run = RunInfo(workdir, start_step, bool(earlier), config or {}, project)
        self._backends.append(Jsonl(run))
        for name in writers:
            backend = BACKENDS[name]
            open_backend = functools.partial(backend.open, run)
            self._backends.append(
                InBackground(name, open_backend) if backend.remote else open_backend()
            )

    def write(self, step: int, metrics: dict[str, float], **flags: bool) -> None:
        """Writes one line to every backend."""
        record = {
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 4),
            "wall_s": round(self.wall_s(), 3),
            **metrics,
            **flags,
        }
        for backend in self._backends:
            backend.write(record)

    def log_progress(self, step: int, metrics: dict[str, float], eta_s: float) -> None:
        """One line of progress for the terminal and log.txt."""
        logger.info(
            "step %*d/%d %4.0f%%  %s  ETA %s",
            len(str(self._total_steps)),
            step,
            self._total_steps,
            100 * step / self._total_steps,
            "  ".join(on_progress(metrics)),
            format_duration(eta_s),
        )

    def wall_s(self) -> float:
        """Seconds that this run has taken, those before a resume included."""
        return self._wall_before + time.monotonic() - self._start_time

    def close(self) -> None:
        """Flushes and closes all backends, also where one of them fails."""
        with contextlib.ExitStack() as stack:
            for backend in self._backends:
                stack.callback(backend.close)


def read_metrics(workdir: str | pathlib.Path) -> list[Record]:
    """The lines of a workdir's metrics.jsonl; damaged ones are passed over.

    A process that was killed leaves half a line, a disk error may leave anything.
    """
    records = []
    try:
        text = storage.read_text(storage.join(workdir, "metrics.jsonl"))
    except FileNotFoundError:
        text = ""
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append({"epoch": 0.0, "wall_s": 0.0} | record)
    return records


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """A full disk is told with the file that did not find room there.

    Raises:
      OSError: with the path.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def _metrics(record: Record) -> dict[str, float]:
    return {key: value for key, value in record.items() if key not in LINE_FIELDS}


def _run_id(run: RunInfo, tracker: str) -> str:
    """Under which a tracker knows the run; a new one where no line of it stays."""
    path = run.workdir / f"{tracker}_id.txt"
    if not (run.resumed and path.exists()):
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text().strip()
