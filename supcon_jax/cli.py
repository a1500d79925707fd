"""The edge of the program: whatever goes wrong comes out as one line and an exit code.

2: a mistake that the user can put right (all our refusals are ValueErrors). 1: something
failed: a disk, a device, a diverged run. 75: another process of the job is gone or stuck;
starting all of them again goes on. 130: interrupted. What is neither is a bug: its traceback
stays, with versions and the request to report it. What ends one process of a job ends all
of them, with the same code and a line that names it.
"""

from __future__ import annotations

import contextlib
import dis
import importlib.metadata
import os
import pathlib
import platform
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax

from supcon_jax import hosts
from supcon_jax.run.stop import (
    Stopped,
    Unwritable,
    leave,
    restart_command,
    stopped_code,
)

# Errors that are raised in these folders are ours, and worded for the user.
_OURS = pathlib.Path(__file__).resolve().parent
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tensorflow",
)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process as the module's docstring says, whatever happens inside."""
    try:
        yield
    except Stopped as stopped:
        # The loop has said it; where it has not begun yet there is nothing to save.
        if not str(stopped):
            print("stopped before anything was saved; the same command starts anew:")
            print(restart_command(), flush=True)
        leave(stopped_code())
    except KeyboardInterrupt as interrupt:
        _end(str(interrupt) or "interrupted", 130)
    except BrokenPipeError:
        # Whoever read the output has gone; there is nobody to tell.
        hosts.leave("nobody reads its output any more", 1)
        _silence_stdout()
        sys.exit(1)
    except Exception as error:
        told = describe(error)
        if told is None or isinstance(error, jax.errors.JaxRuntimeError):
            hosts.check_peers(error)
        if told is None:
            traceback.print_exc()
            hosts.leave(f"a bug: {type(error).__name__}: {error}; {bug_report()}", 1)
            print(f"\n{bug_report()}", file=sys.stderr, flush=True)
            sys.exit(1)
        _end(*told, at_once=isinstance(error, Unwritable))


def _end(message: str, code: int, *, at_once: bool = False) -> NoReturn:
    """Ends this process, and with it the others of its job."""
    hosts.leave(message, code)
    refuse(message, code=code, at_once=at_once)


def describe(error: Exception) -> tuple[str, int] | None:
    """An error's line and exit code; None where it is a bug."""
    if isinstance(error, FloatingPointError):
        return str(error), 1
    if isinstance(error, ValueError) and _raised_by_us(error):
        return str(error), 2
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name]
        return ": ".join([*names, error.strerror]), 1
    if isinstance(error, MemoryError):
        return "this machine's memory is used up (a smaller --config.batch_size)", 1
    if isinstance(error, jax.errors.JaxRuntimeError):
        return f"the device failed: {_first_line(str(error))}", 1
    return None


def refuse(message: object, *, code: int = 2, at_once: bool = False) -> NoReturn:
    """Prints an error in one line and ends the process."""
    line = " ".join(str(message).split())
    with contextlib.suppress(OSError):
        print(f"error: {line}", file=sys.stderr, flush=True)
    leave(code, at_once=at_once)


def bug_report() -> str:
    """What to do with a traceback: where it belongs, and what to send with it."""
    import supcon_jax

    versions = [
        f"supcon_jax {supcon_jax.__version__}",
        f"Python {sys.version.split()[0]}",
    ]
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return (
        "error: this is a bug in supcon_jax; please report it in the project's issue "
        "tracker with the command, the lines above and these versions: "
        f"{', '.join(versions)}, {platform.platform()}"
    )


def _raised_by_us(error: BaseException) -> bool:
    """Whether a `raise` in this package, in main.py or in a config made it.

    What Python raises by itself in our lines (a tuple of the wrong length, a number that
    cannot be read) has no words for the user: it is a bug.
    """
    place = error.__traceback__
    if place is None:
        return True
    while place.tb_next is not None:
        place = place.tb_next
    code = place.tb_frame.f_code
    if code.co_code[place.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return False
    path = pathlib.Path(code.co_filename).resolve()
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    ours = _OURS in path.parents or path.parent.name == "configs"
    return ours or (main is not None and path == pathlib.Path(main).resolve())


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "no reason given")


def _silence_stdout() -> None:
    """Nothing more can be written; the interpreter would complain at its end."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
