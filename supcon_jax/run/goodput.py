"""Where a run's time goes: the share of useful steps, what the rest was, and what is left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

_IMPORTED = time.monotonic()
PARTS = ("start", "compile", "input", "eval", "save", "lost")


class Goodput:
    """Seconds by part, over all processes that a run took.

    Args:
      earlier: the last line of metrics.jsonl before this process, or none.
      lost_s: seconds of steps that were made after the restored one, and run again.
    """

    def __init__(self, earlier: dict[str, float], *, lost_s: float = 0.0):
        self._seconds = {p: earlier.get(f"goodput/{p}_s", 0.0) for p in PARTS}
        self._seconds["lost"] += lost_s
        self._compiled_before = self._seconds["compile"]

    @classmethod
    def continued(
        cls, records: Sequence[dict[str, Any]], *, start_step: int
    ) -> Goodput:
        """The account of a run that goes on, from what its earlier processes wrote.

        Args:
          records: the lines of metrics.jsonl.
          start_step: of the restored state; what was done after it is lost.
        """
        told = [r for r in records if "goodput/share" in r]
        kept = [r for r in told if r["step"] <= start_step]
        found = {f"goodput/{p}_s": 0.0 for p in PARTS} | (kept[-1] if kept else {})
        # What a process spent before its first save is in lines after the restored step.
        for part in ("start", "compile", "lost") if told else ():
            found[f"goodput/{part}_s"] = told[-1].get(f"goodput/{part}_s", 0.0)
        before = [r["wall_s"] for r in records if r["step"] <= start_step]
        reached = max((r["wall_s"] for r in records), default=0.0)
        return cls(found, lost_s=max(reached - max(before, default=0.0), 0.0))

    @contextlib.contextmanager
    def spent(self, part: str) -> Iterator[None]:
        """What happens inside counts as this part."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[part] += time.monotonic() - start

    def training_starts(self) -> None:
        """What this process did until now, less what it has counted, was starting."""
        compiling = self._seconds["compile"] - self._compiled_before
        self._seconds["start"] += max(time.monotonic() - _IMPORTED - compiling, 0.0)

    def metrics(self, wall_s: float) -> dict[str, float]:
        """`goodput/*`; `wall_s` are the seconds of training, with evaluation and saves."""
        during = sum(self._seconds[part] for part in ("input", "eval", "save"))
        around = sum(self._seconds[part] for part in ("start", "compile", "lost"))
        share = max(wall_s - during, 0.0) / max(wall_s + around, 1e-9)
        parts = {f"goodput/{p}_s": round(s, 3) for p, s in self._seconds.items()}
        return {"goodput/share": round(share, 4)} | parts


class Meter:
    """Seconds a step takes, evaluations and checkpoints not counted."""

    def __init__(self, step: int):
        self._step, self._since, self._paused = step, time.monotonic(), 0.0
        self._pause_start = 0.0
        self._step_s = 0.0
        self.eval_s = 0.0  # seconds of the last evaluation

    def read(self, step: int) -> float:
        """Steps a second since the last reading."""
        elapsed = time.monotonic() - self._since - self._paused
        self._step_s = elapsed / (step - self._step)
        self._step, self._since, self._paused = step, time.monotonic(), 0.0
        return 1 / self._step_s

    def eta_s(self, steps: int, eval_every: int) -> float:
        """Seconds that so many steps and their evaluations will take."""
        evals = steps // eval_every if eval_every else 1
        return steps * self._step_s + evals * self.eval_s

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside does not count."""
        self._pause_start = time.monotonic()
        yield
        self._paused += self.paused_now()

    def paused_now(self) -> float:
        """Seconds since the pause began."""
        return time.monotonic() - self._pause_start
