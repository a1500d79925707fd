"""Stopping a run: SIGTERM (a preemption) and Ctrl-C let it save and end.

The first signal asks; the loop answers between two steps, or where it waits anyway
(opening data, compiling, evaluating). In the middle of a save, whose threads share the
interpreter, nothing is cut off. A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax

from supcon_jax.config.files import PROGRAM

T = TypeVar("T")
# Threads whose work nobody waits for any more. The interpreter cannot end beside them.
_left_behind: list[threading.Thread] = []
# The one that is entered.
_listening: StopRequests | None = None
# How often this process has asked whether to stop; all of a job ask equally often.
_questions = itertools.count(1)


class Stopped(KeyboardInterrupt):
    """The run ended early because it was asked to; its text says how to go on."""


class Unwritable(OSError):
    """A disk failed under a run; threads that write to it would fail once more each."""


class StopRequests(contextlib.AbstractContextManager):
    """Hears signals while it is entered, in the main thread alone."""

    def __init__(self) -> None:
        self._asked = False
        self._interruptible = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        """Takes the signals over."""
        global _listening
        _listening = self
        if threading.current_thread() is threading.main_thread():
            # In a job of several processes JAX listens for SIGTERM, and tells the others.
            joined = jax.distributed.is_initialized()
            signals = [signal.SIGINT] if joined else [signal.SIGINT, signal.SIGTERM]
            for number in signals:
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives them back."""
        global _listening
        _listening = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt("interrupted twice: nothing more was saved")
        self._asked = True
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)  # as if this process was preempted
        elif self._interruptible:
            self._interruptible = False
            raise Stopped

    def due(self) -> bool:
        """Whether the run should stop now, asked after every step; all processes hear the
        same.
        """
        if not jax.distributed.is_initialized():
            return self._asked
        from jax.experimental import multihost_utils

        # JAX plans the stop at the largest number that any process has asked with, plus
        # one. A resumed run whose first number is its step would pass that by, where the
        # signal came before it: counted from 1, its first question is answered.
        return multihost_utils.reached_preemption_sync_point(next(_questions))

    @property
    def asks_between_batches(self) -> bool:
        """Whether no signal can cut off what goes on, but all processes together may."""
        return self._interruptible and jax.distributed.is_initialized()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal raises `Stopped`: at once, or in `check` of a job of several."""
        if self._asked and not jax.distributed.is_initialized():
            raise Stopped
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def wait_for(self, work: Callable[[], T]) -> T:
        """Runs what cannot be cut off (a compilation) in a thread, and listens meanwhile."""
        done: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                done.append(work())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            with self.interruptible():
                while thread.is_alive():
                    thread.join(0.2)
        except KeyboardInterrupt:
            _left_behind.append(thread)
            raise
        if failed:
            raise failed[0]
        return done[0]


def check() -> None:
    """Asked between two batches of an evaluation, which all processes have equally many of.

    Raises:
      Stopped: a process of this job was asked to stop; all of them hear it here.
    """
    if _listening and _listening.asks_between_batches and _listening.due():
        raise Stopped


def stopped_code() -> int:
    """What the process exits with after it was asked to stop: 0, or SUPCON_STOPPED_CODE.

    Launchers that take 0 for a finished run need another one to start it again.
    """
    code = os.environ.get("SUPCON_STOPPED_CODE", "0")
    return int(code) if code.isdigit() and int(code) < 256 else 0


def leave(code: int, *, at_once: bool = False) -> NoReturn:
    """Ends the process; at once, where a compilation goes on that cannot be cut off."""
    if at_once or any(thread.is_alive() for thread in _left_behind):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def restart_command() -> str:
    """The command that started this process."""
    started, *arguments = sys.argv
    if pathlib.Path(started).name in ("supcon-jax", "__main__.py"):
        return shlex.join([*PROGRAM, *arguments])
    return shlex.join(["python", started, *arguments])
