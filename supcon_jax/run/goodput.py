"""Where a run's time goes: the share of useful steps, and what the rest was."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

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
