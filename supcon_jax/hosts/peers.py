"""The processes of a job among each other: who is alive, what ended one, who ends too.

Also of a single process: what it is doing (`beat`), and its end in one line.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import distributed

# Try again: a process that ends because of another one, or of the network, says so.
TRY_AGAIN = 75
GO_ON = "the same command goes on from the last save"
STUCK = "stuck"
WAITING_EVERY_S = 15.0
# A process tells process 0 every BEAT_S that it is alive.
BEAT_S = 1.0
SILENT_S = 20.0
# Where a collective has failed already, this is silence enough.
SUSPECT_S = 4.0
# A process that hears of another's end first ends in its own way, if it is about to.
GRACE_S = 2.0
INTERRUPT_GRACE_S = 30.0
DAY_MS = 24 * 3600 * 1000


class Progress(NamedTuple):
    """What this process began to do last."""

    at: float  # of time.monotonic
    doing: str
    patience: float


progress_now = Progress(time.monotonic(), "starting", 1.0)
job: Job | None = None  # that this process has joined


class Job:
    """This process among those of its job: what it tells them and what it hears.

    All goes through the key-value store of JAX's service, which process 0 holds. The
    others read little of it, so that its work grows with their number only.
    """

    def __init__(self, client: Any, index: int, size: int):
        self._client, self.index, self.size = client, index, size
        self._host = socket.gethostname()
        self._heard = time.monotonic()  # last answer of the service
        self._beats: dict[int, tuple[str, float]] = {}  # value, and since when
        self._leaving = threading.Event()
        self._ending = threading.Event()
        self._speaking = threading.Lock()
        self._count, self._number = 0, 0
        self._state = "running"
        self._tell()
        self._threads = [
            threading.Thread(target=target, daemon=True, name="hosts")
            for target in (self._exchange, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    # What the main thread calls.

    def gather(self, name: str, value: str) -> list[str]:
        """The values of all processes, in their order; waits for them."""
        self._count += 1
        key = f"supcon/gather/{self._count}/{name}/"
        self._client.key_value_set(f"{key}{self.index}", value)
        arrived = threading.Event()
        if self.index == 0:
            waits = threading.Thread(
                target=self._tell_who_is_waited_for, args=(key, arrived), daemon=True
            )
            waits.start()
        try:
            self._client.wait_at_barrier(key, DAY_MS)
        finally:
            arrived.set()
        found = {
            k.rpartition("/")[2]: v for k, v in self._client.key_value_dir_get(key)
        }
        return [found[str(index)] for index in range(self.size)]

    def from_first(self, name: str, value: str) -> str:
        """The value of process 0."""
        key = f"supcon/first/{self._count}/{name}"
        if self.index == 0:
            self._client.key_value_set(key, value)
            return value
        return self._client.blocking_key_value_get(key, DAY_MS)

    def leave(self, message: str, code: int) -> NoReturn:
        """Ends this process, and tells the others why."""
        self._ending.set()
        with self._speaking:
            about_one = message.startswith("process ")
            line = message if about_one else f"{self.named()}: {message}"
            self._end(line, code, told=True)

    def suspect(self, seconds: float) -> None:
        """Something failed here that a dead peer explains: gives that time to show."""
        if self._state == "running":
            self._state = "suspicious"  # process 0 hears of it with the next beat
            time.sleep(seconds)

    def positions(self) -> str:
        """Where the processes are that have not got on for longest."""
        with contextlib.suppress(Exception):
            beats = [
                (json.loads(value), int(_last(key)))
                for key, value in self._client.key_value_dir_get("supcon/beat/")
            ]
            beats.sort(key=lambda item: (-item[0]["for_s"], item[1]))
            return "; ".join(
                f"{self.named(index, told['host'])} for {told['for_s']} s at: "
                f"{told['doing']}"
                for told, index in beats[:3]
            )
        return ""

    def stopping(self) -> None:
        """The process ends as it should; what the service says from now on is no news."""
        with contextlib.suppress(Exception):
            self._state = "left"
            self._tell()
        self._leaving.set()
        # The interpreter ends with a crash where a thread is in the service's client.
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(5 * BEAT_S)

    def named(self, index: int | None = None, host: str | None = None) -> str:
        """A process in words."""
        if index is None:
            index, host = self.index, self._host
        return f"process {index} ({host or 'host unknown'})"

    # Threads.

    def _exchange(self) -> None:
        while not self._leaving.wait(BEAT_S):
            try:
                self._tell()
                endings = self._client.key_value_dir_get("supcon/ended/")
                if self.index == 0:
                    self._look_for_the_dead({int(_last(k)) for k, _ in endings})
            except Exception:
                # The service is gone, or JAX has left it at the end: `_judge` says.
                continue
            self._heard = time.monotonic()
            causes = [e for e in map(_ending, endings) if e["cause"]]
            if causes and not self._ending.is_set():
                self._follow(min(causes, key=lambda e: e["index"]))

    def _judge(self) -> None:
        """Process 0 may be stopped, and then no call returns."""
        while not self._leaving.wait(BEAT_S):
            silent = time.monotonic() - self._heard
            if self.index and silent > SILENT_S and not self._leaving.is_set():
                # Telling the others would wait for the same service.
                hard_exit(
                    f"process 0 ({distributed.global_state.coordinator_address}), which "
                    "holds the job together, gives no sign of life for "
                    f"{silent:.0f} s; {GO_ON}",
                    TRY_AGAIN,
                )

    def _tell(self) -> None:
        now, progress = time.monotonic(), progress_now
        self._number += 1
        beat_now = {
            "beat": self._number,
            "host": self._host,
            "state": self._state,
            "doing": progress.doing,
            "for_s": round(now - progress.at),
        }
        self._client.key_value_set(
            f"supcon/beat/{self.index}", json.dumps(beat_now), allow_overwrite=True
        )

    def _look_for_the_dead(self, ended: set[int]) -> None:
        now = time.monotonic()
        for key, value in self._client.key_value_dir_get("supcon/beat/"):
            index = int(_last(key))
            if self._beats.get(index, ("", 0.0))[0] != value:
                self._beats[index] = value, now
        suspicious = any('"suspicious"' in value for value, _ in self._beats.values())
        allowed = SUSPECT_S if suspicious else SILENT_S
        for index, (value, since) in self._beats.items():
            known = json.loads(value)
            if now - since > allowed and index not in ended and index != self.index:
                if known["state"] == "left":
                    continue
                self._publish(
                    index,
                    f"{self.named(index, known['host'])} has gone: no sign of life for "
                    f"{now - since:.0f} s (its own output may say why); {GO_ON}",
                    TRY_AGAIN,
                )
                return  # the next round finds it among the endings

    def _publish(self, index: int, line: str, code: int, *, cause: bool = True) -> None:
        ending = {"index": index, "line": line, "code": code, "cause": cause}
        with contextlib.suppress(Exception):  # somebody was faster, or nobody is there
            self._client.key_value_set(f"supcon/ended/{index}", json.dumps(ending))

    def _follow(self, ending: dict[str, Any]) -> None:
        """Another process has ended: so does this one, with its line and code."""
        code = ending["code"]
        grace = INTERRUPT_GRACE_S if code == 130 else GRACE_S
        if ending["index"] == self.index or self._ending.wait(grace):
            return  # the main thread is on its way out, with its own words
        if STUCK in ending["line"]:
            dump_stacks()
        with self._speaking:
            self._end(ending["line"], code)

    def _end(self, line: str, code: int, *, told: bool = False) -> NoReturn:
        self._publish(self.index, line, code, cause=told)
        if self.index == 0:
            # With this process the service goes: first everybody else has heard.
            until = time.monotonic() + GRACE_S + 8
            with contextlib.suppress(Exception):
                while time.monotonic() < until:
                    ended = self._client.key_value_dir_get("supcon/ended/")
                    left = [v for v, _ in self._beats.values() if '"left"' in v]
                    if len(ended) + len(left) >= self.size:
                        break
                    time.sleep(0.1)
        hard_exit(line, code)

    def _tell_who_is_waited_for(self, key: str, arrived: threading.Event) -> None:
        while not arrived.wait(WAITING_EVERY_S):
            with contextlib.suppress(Exception):
                there = {int(_last(k)) for k, _ in self._client.key_value_dir_get(key)}
                missing = [index for index in range(self.size) if index not in there]
                named = ", ".join(
                    self.named(index, json.loads(self._beats[index][0])["host"])
                    for index in missing[:3]
                    if index in self._beats
                )
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                say(f"waiting for {named}{more} to get ready")


def index() -> int:
    """This process's number in its job; asks no device, unlike `jax.process_index`."""
    return job.index if job else 0


def count() -> int:
    """How many processes the job has."""
    return job.size if job else 1


def leave(message: str, code: int) -> None:
    """Ends this process and the whole job with one line; returns where there is no job."""
    if job is not None:
        job.leave(message, code)


def check_peers(error: Exception) -> None:
    """Where a failure of the devices may be another process's death, ends with its name.

    Returns where it cannot be, or is not.
    """
    if job is None:
        return
    # Whoever has gone is named by process 0, and a thread ends this process then.
    job.suspect(SUSPECT_S + 6 * BEAT_S)
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return
    text = str(error)
    signs = ("Gloo", "onnection", "UNAVAILABLE", "DEADLINE", "barrier", "coordination")
    if any(sign in text for sign in signs):
        reason = next(iter(text.strip().splitlines()), "no reason given")
        leave(f"the network between the processes failed: {reason}; {GO_ON}", TRY_AGAIN)


def _last(key: str) -> str:
    return key.rpartition("/")[2]


def _ending(item: tuple[str, str]) -> dict[str, Any]:
    return json.loads(item[1])


def beat(doing: str, patience: float = 1.0) -> None:
    """Says that this process gets on; called at every step, batch and save.

    Args:
      doing: what begins now, in a word or two.
      patience: how many times as long as a step this may take.
    """
    global progress_now
    progress_now = Progress(time.monotonic(), doing, patience)


def dump_stacks() -> None:
    """Writes the stack of every thread to standard error and to the log files."""
    streams: list[Any] = [sys.stderr]
    for handler in logging.getLogger("supcon_jax").handlers:
        if isinstance(handler, logging.FileHandler):
            streams.append(handler.stream)
    for stream in streams:
        with contextlib.suppress(Exception):
            stream.flush()
            faulthandler.dump_traceback(file=stream, all_threads=True)


def say(line: str) -> None:
    """Prints a line to standard error, where that is still there."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def hard_exit(message: str, code: int) -> NoReturn:
    """Ends the process at once with one line, whatever its other threads wait for."""
    say(f"error: {' '.join(message.split())}")
    for handler in logging.getLogger("supcon_jax").handlers:
        with contextlib.suppress(Exception):
            handler.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)
