"""The watchdog: ends a process that is alive and does not get on."""

from __future__ import annotations

import threading
import time

from supcon_jax.hosts import peers
from supcon_jax.hosts.peers import GO_ON, STUCK, TRY_AGAIN, beat, dump_stacks


class Watchdog:
    """Ends a process that does not get on, with the stacks of its threads and code 75.

    A peer that is alive but stuck keeps all others waiting in a collective for ever. So
    does a file system that does not answer, also for a single process.

    Args:
      minutes: without a `beat`; 0: never.
    """

    def __init__(self, minutes: float):
        self._limit_s = 60 * minutes
        self._stop = threading.Event()

    def __enter__(self) -> Watchdog:
        beat("starting", patience=6)
        if self._limit_s:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _watch(self) -> None:
        every_s = min(self._limit_s / 10, 5.0)
        last = time.monotonic()
        while not self._stop.wait(every_s):
            now, progress = time.monotonic(), peers.progress_now
            if now - last > 3 * every_s + 1:  # this whole process was stopped: Ctrl-Z
                beat(progress.doing, progress.patience)
            last = now
            limit_s = self._limit_s * progress.patience
            if progress is peers.progress_now and now - progress.at > limit_s:
                dump_stacks()
                at = f"at: {progress.doing}"
                if peers.job is not None:
                    at = peers.job.positions() or at
                line = (
                    f"{STUCK}: no step or batch for {now - progress.at:.0f} s "
                    f"(--config.hosts.watchdog_minutes); {at}; the stacks of all threads "
                    f"are above; {GO_ON}"
                )
                peers.leave(line, TRY_AGAIN)
                peers.hard_exit(line, TRY_AGAIN)
