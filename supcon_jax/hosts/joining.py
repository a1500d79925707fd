"""Joining the processes of a job, with words while one waits and where it fails."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src import cloud_tpu_init, distributed

from supcon_jax.hosts import peers
from supcon_jax.hosts.launchers import THREE, Join, count_gpus, how_to_join
from supcon_jax.hosts.peers import (
    GO_ON,
    TRY_AGAIN,
    WAITING_EVERY_S,
    Job,
    hard_exit,
    index,
    say,
)

# The service's own, of which nothing is said but that somebody died. It counts a process
# for dead after half of this to all of it, and ours (SILENT_S) names it before that.
HEARTBEAT_S = 60
JOIN_TIMEOUT_S = 300.0


def initialize() -> None:
    """Joins the processes of a multi-host job; does nothing for a single process.

    See `how_to_join`. Must run before the first JAX computation. While it waits it says
    for whom, and it gives up with exit code 75 after `SUPCON_JOIN_TIMEOUT_S` seconds.

    Raises:
      ValueError: this is one of several processes, and they cannot find each other.
    """
    join = how_to_join(
        os.environ,
        on_tpu=_has_tpu_chips(),
        gpus=count_gpus(os.environ),
        kubernetes=importlib.util.find_spec("kubernetes") is not None,
    )
    if join is not None and not jax.distributed.is_initialized():
        _connect(join, timeout_s=_join_timeout_s())
    state = distributed.global_state
    if peers.job is None and state.client is not None and state.num_processes > 1:
        peers.job = Job(state.client, state.process_id, state.num_processes)
        atexit.register(peers.job.stopping)


def _has_tpu_chips() -> bool:
    """Whether JAX found TPU chips, and not libtpu alone, and may use them.

    On a Cloud TPU VM `import jax` sets the platforms to "tpu,cpu".
    """
    platforms = jax.config.jax_platforms or "tpu"  # type: ignore[attr-defined]
    found = getattr(cloud_tpu_init, "running_in_cloud_tpu_vm", False)
    return found and "tpu" in platforms.split(",")


def _join_timeout_s() -> float:
    given = os.environ.get("SUPCON_JOIN_TIMEOUT_S", str(JOIN_TIMEOUT_S))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(
            f"got the environment variable SUPCON_JOIN_TIMEOUT_S={given!r}; allowed: "
            "seconds, above 0"
        )
    return seconds


def _connect(join: Join, *, timeout_s: float) -> None:
    # Without an address JAX asks the environment; with one it must not: under Slurm it
    # would still take one GPU alone.
    known: dict[str, Any] = {}
    if join.coordinator is not None:
        known = {
            "coordinator_address": join.coordinator,
            "num_processes": join.num_processes,
            "process_id": join.process_id,
            "local_device_ids": join.local_device_ids,
            "cluster_detection_method": "deactivate",
            "coordinator_bind_address": bind_address(join.coordinator, os.environ),
        }
        if join.process_id == 0:
            _check_port(join)
    try:
        with _waiting(join, timeout_s), _endings_are_told():
            jax.distributed.initialize(
                **known,
                heartbeat_timeout_seconds=HEARTBEAT_S,
                # Ours gives up first, with a line instead of a native dump.
                initialization_timeout=int(timeout_s) + 60,
            )
    except Exception as error:
        if join.coordinator is None and "should be defined" in str(error):
            return  # a TPU of one host, which nothing calls a part of a job
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        where = f" at {join.coordinator}" if join.coordinator else ""
        cause = ""
        if "Failed to start RPC server" in reason:
            cause = " (another program has the port, or the host is not this one)"
        raise ValueError(
            f"cannot join the job{where}, as told by {join.launcher}: {reason}{cause}; "
            f"{THREE} say it otherwise"
        ) from None


def _check_port(join: Join) -> None:
    """Refuses a port on which process 0 cannot listen: jaxlib may crash on it.

    Raises:
      ValueError: naming address and reason.
    """
    assert join.coordinator is not None
    address = bind_address(join.coordinator, os.environ)
    host, _, port = (address or join.coordinator).rpartition(":")
    host = host.strip("[]") if address else "0.0.0.0"
    try:
        family, _, _, _, place = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family) as probe:
            # A port that was let go of a moment ago is free; one with a listener is not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise ValueError(
            f"cannot join the job at {join.coordinator}, as told by {join.launcher}: "
            f"process 0 cannot listen there: {error.strerror} (another program has the "
            f"port, or the host is not this one); {THREE} say it otherwise"
        ) from None


def bind_address(coordinator: str, environ: Mapping[str, str]) -> str | None:
    """Where process 0 listens: everywhere (None), but for a loopback address there alone.

    The coordination service asks nobody for a password. `JAX_COORDINATOR_BIND_ADDRESS`
    says another address.
    """
    if environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        return environ["JAX_COORDINATOR_BIND_ADDRESS"]
    host = coordinator.rpartition(":")[0].strip("[]")
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    return coordinator if loopback else None


@contextlib.contextmanager
def _waiting(join: Join, timeout_s: float) -> Iterator[None]:
    """Says for whom this process waits, and ends it where they do not come."""
    joined = threading.Event()

    def watch() -> None:
        start = time.monotonic()
        say(f"waiting for {_whom(join)}; gives up after {timeout_s:.0f} s")
        while not joined.wait(
            max(0.0, min(WAITING_EVERY_S, start + timeout_s - time.monotonic()))
        ):
            waited = time.monotonic() - start
            if waited >= timeout_s - 0.01:
                hard_exit(
                    f"gave up after {timeout_s:.0f} s: {_missing(join)}; start the same "
                    "command on every host (SUPCON_JOIN_TIMEOUT_S waits longer)",
                    TRY_AGAIN,
                )
            say(
                f"waiting for {_whom(join)} ({waited:.0f} s); gives up after "
                f"{timeout_s:.0f} s"
            )

    threading.Thread(target=watch, daemon=True, name="waiting").start()
    try:
        yield
    finally:
        joined.set()


def _whom(join: Join) -> str:
    if join.coordinator is None:
        return f"the other hosts, found by {join.launcher}"
    return (
        f"{join.num_processes} processes at {join.coordinator}, of which this is "
        f"{join.process_id}"
    )


def _missing(join: Join) -> str:
    """Who is not there, as far as one process can know."""
    if join.coordinator is None:
        return f"the other hosts, found by {join.launcher}, did not all join"
    others = f"of the {join.num_processes} processes not all joined"
    here = f"this is process {join.process_id} on {socket.gethostname()}"
    if join.process_id == 0:
        return f"{others} at {join.coordinator} ({here})"
    host, _, port = join.coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError as error:
        reason = error.strerror or str(error)
        return f"process 0 does not answer at {join.coordinator}: {reason} ({here})"
    return f"process 0 is there, but {others} ({here})"


# --- The service's own end ---

_on_terminate: Any = None  # keeps the handler alive


@contextlib.contextmanager
def _endings_are_told() -> Iterator[None]:
    """While JAX connects: what it would do when the service fails becomes one line.

    Left to itself it aborts the process with a native stack. It takes a callback, which
    jaxlib 0.10 cannot call (its argument has no Python type: C++'s terminate handler is
    run); so the same function is set as that handler too.
    """
    global _on_terminate
    with contextlib.suppress(OSError, AttributeError):  # another C++ library: macOS
        handler = ctypes.CFUNCTYPE(None)
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
        set_terminate.argtypes, set_terminate.restype = [handler], ctypes.c_void_p
        _on_terminate = handler(_service_failed)
        set_terminate(_on_terminate)
    module: Any = distributed._jax  # type: ignore[attr-defined]
    create = module.get_distributed_runtime_client
    module.get_distributed_runtime_client = functools.partial(
        create, missed_heartbeat_callback=_service_failed
    )
    try:
        yield
    finally:
        module.get_distributed_runtime_client = create


def _service_failed(*_: object) -> None:
    if index() == 0:
        line = "this process lost the job's other processes"
    else:
        where = distributed.global_state.coordinator_address
        line = f"process 0 ({where}), which holds the job together, has gone"
    hard_exit(f"{line}; {GO_ON}", TRY_AGAIN)
