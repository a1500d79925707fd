"""Who may write to a folder: one process at a time.

On a disk the operating system holds the lock, so a crash leaves none behind. Network file
systems pass it on to other machines where they support flock (NFS 4, Lustre with -o flock);
where they do not, two machines are not kept apart.

In a bucket the lock is an object with the holder's host and process, which the holder
writes anew every `RENEW_S` seconds. Buckets write on a condition ("if nobody has written
since"), so of two that want it one gets it. Who died without a word is told from who is
alive by waiting until `LEASE_S` seconds have passed without a write, which needs no two
clocks that agree; a process that is known to have died on this machine is not waited for.
A process that was stopped for longer than that, and lost its lock, learns it from `held`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time
from typing import Any, TextIO

from supcon_jax.storage import files

logger = logging.getLogger(__name__)
LEASE_S, RENEW_S = 60.0, 15.0


class Lock:
    """Keeps other processes out of a folder until it is released, or this one ends.

    Args:
      folder: an existing one; the lock is the file `lock` in it.

    Raises:
      ValueError: another process is in it.
      OSError: the lock cannot be written.
    """

    def __init__(self, folder: files.Path):
        self._folder = files.absolute(folder)
        self._path = files.join(self._folder, "lock")
        self._file: TextIO | None = None
        self._me = {
            "who": f"process {os.getpid()} on {socket.gethostname()}",
            "id": os.urandom(8).hex(),
            "machine": _machine(),
            "pid": os.getpid(),
        }
        self._lost = ""
        self._generation: bytes | None = None
        self._ended = threading.Event()
        self._one_at_a_time = threading.Lock()
        if not files.is_remote(self._folder):
            self._lock_file()
            return
        self._take_lease()
        self._renewed = time.monotonic()
        threading.Thread(target=self._keep, name="lock", daemon=True).start()

    def held(self) -> None:
        """Returns where the folder is still ours.

        Raises:
          ValueError: another process has taken it, since this one was away for long.
        """
        if self._generation and time.monotonic() - self._renewed > LEASE_S / 2:
            with contextlib.suppress(OSError):
                self._renew()
        if self._lost:
            raise ValueError(
                f"{self._folder} was taken over by another run ({self._lost}) while this "
                f"one did not answer for over {LEASE_S:.0f} s; it goes on there"
            )

    def is_lost(self) -> bool:
        """Whether another process is known to have taken the folder."""
        return bool(self._lost)

    def descriptors(self) -> tuple[int, ...]:
        """What a child inherits (`subprocess.Popen`, pass_fds) to hold the lock as well.

        It is free when all of them have ended, whichever is killed first. On a disk only.
        """
        return (self._file.fileno(),) if self._file else ()

    def release(self) -> None:
        """Lets the next process in."""
        self._ended.set()
        if self._file:
            self._file.close()
        with self._one_at_a_time, contextlib.suppress(OSError):
            if self._generation and not self._lost:
                files.swap(self._path, None, self._generation)

    def _lock_file(self) -> None:
        file = pathlib.Path(self._path).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip()
            file.close()
            raise self._in_use(who) from None
        except OSError:  # a file system without locks
            file.close()
            return
        file.truncate(0)
        file.write(str(self._me["who"]))
        file.flush()
        self._file = file

    def _take_lease(self) -> None:
        told, since, seen = False, time.monotonic(), b""
        while True:
            content, generation = files.read_generation(self._path)
            holder = _parse(content)
            if seen and generation != seen and content is not None:
                raise self._in_use(holder["who"])
            free = content is None or self._is_dead(holder)
            if free or time.monotonic() - since > LEASE_S:
                break
            if not told:
                told = True
                logger.info(
                    "%s was in use by %s; waiting up to %.0f s to see whether it still is",
                    self._folder,
                    holder["who"],
                    LEASE_S,
                )
            seen = generation
            time.sleep(min(2.0, LEASE_S / 10))
        self._generation = files.swap(self._path, self._lease(), generation)
        if self._generation is None:
            raise self._in_use(_parse(files.read_generation(self._path)[0])["who"])

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_S) and not self._lost:
            try:
                self._renew()
            except OSError as error:
                logger.warning("warning: cannot renew the lock: %s", error.strerror)

    def _renew(self) -> None:
        with self._one_at_a_time:
            if self._ended.is_set() or self._lost:
                return
            assert self._generation is not None
            swapped = files.swap(self._path, self._lease(), self._generation)
            if swapped is None:
                content, generation = files.read_generation(self._path)
                holder = _parse(content)
                # A write whose answer was lost on its way is tried again, and was ours.
                if holder["id"] != self._me["id"]:
                    self._lost = holder["who"]
                    return
                swapped = generation
            self._generation, self._renewed = swapped, time.monotonic()

    def _lease(self) -> bytes:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return json.dumps(self._me | {"time": now}).encode()

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """Whether the holder was a process of this machine, and has ended."""
        if not holder["machine"] or holder["machine"] != self._me["machine"]:
            return False
        try:
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError, TypeError, OverflowError):
            pass
        return False

    def _in_use(self, who: str) -> ValueError:
        return ValueError(
            f"workdir {self._folder} is in use by another run ({who}); wait for it, or "
            "use another --workdir"
        )


def _machine() -> str:
    """Where a process number means the same: the boot and the namespace of processes."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _parse(content: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(content or b"")
    except ValueError:
        found = None
    known = found if isinstance(found, dict) else {}
    return {"who": "an unknown process", "id": "", "machine": "", "pid": 0} | known
