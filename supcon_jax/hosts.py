"""The processes of a job: joining them, agreeing, noticing those that are gone or stuck.

A job has one process a host (or several), all of which run the same command. What JAX
keeps to itself of its distributed service is touched here and nowhere else.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import re
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import cloud_tpu_init, distributed

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
THREE = f"{', '.join(VARIABLES[:2])} and {VARIABLES[2]}"
# Try again: a process that ends because of another one, or of the network, says so.
TRY_AGAIN = 75
# The service's own, of which nothing is said but that somebody died. It counts a process
# for dead after half of this to all of it, and ours (SILENT_S) names it before that.
HEARTBEAT_S = 60
JOIN_TIMEOUT_S = 300.0
WAITING_EVERY_S = 15.0


class Join(NamedTuple):
    """How a process joins its job.

    Attributes:
      launcher: what started it, in words.
      coordinator: "HOST:PORT", where process 0 listens; None: JAX finds all by itself.
      num_processes, process_id: of the job; None where JAX finds them.
      local_device_ids: the GPUs of this process, where several on a host see the same;
        None: all that it sees.
    """

    launcher: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None


class _Started(NamedTuple):
    """What a launcher's variables say of a process that is one of several."""

    launcher: str
    size: int
    rank: int
    address: str | None  # None: it does not say where process 0 is
    local_size: int = 1
    local_rank: int = 0
    own_gpus: bool = False  # it gave each process GPUs of its own


def how_to_join(
    environ: Mapping[str, str],
    *,
    on_tpu: bool = False,
    gpus: int = 0,
    kubernetes: bool = False,
) -> Join | None:
    """How this process joins its job, by its environment alone; None: it is a single one.

    The three `JAX_*` variables come first. Then what Open MPI, MPICH, Slurm, torchrun or
    SkyPilot say to the processes that they start; `JAX_COORDINATOR_ADDRESS` alone says
    where process 0 is, where they do not. Then a Cloud TPU, whose hosts JAX finds. A job
    that was started as several processes never runs as several single ones.

    Args:
      environ: the environment's variables.
      on_tpu: whether this host has TPU chips and may use them.
      gpus: how many GPUs this process sees.
      kubernetes: whether JAX can ask Kubernetes (its Python package is installed).

    Raises:
      ValueError: one of several processes, of which is not known how they find each
        other; one line with the variables to set.
    """
    given = {name: environ[name] for name in VARIABLES if environ.get(name)}
    if len(given) == len(VARIABLES):
        return _by_variables(given)
    started = next(filter(None, (find(environ) for find in _LAUNCHERS)), None)
    if started is not None:
        return _by_launcher(started, given, gpus)
    if on_tpu:
        return Join("Cloud TPU")
    if given:
        missing = [name for name in VARIABLES if name not in given]
        raise ValueError(
            f"got the environment variable {next(iter(given))} without "
            f"{', '.join(missing)}; a multi-host job needs all three, a single host none"
        )
    if "JOB_COMPLETION_INDEX" in environ:
        if kubernetes and "KUBERNETES_SERVICE_HOST" in environ:
            return Join("Kubernetes")
        raise ValueError(
            "this is pod JOB_COMPLETION_INDEX="
            f"{environ['JOB_COMPLETION_INDEX']} of an indexed Kubernetes job, and its "
            f"other pods are not known: set {THREE} (the index) in the pod's "
            "specification, or pip install kubernetes; a single pod sets "
            "JAX_NUM_PROCESSES=1"
        )
    return None


def _by_variables(given: Mapping[str, str]) -> Join:
    address, size, rank = (given[name] for name in VARIABLES)
    _check_address(address)
    for name, value, low in ((VARIABLES[1], size, 1), (VARIABLES[2], rank, 0)):
        if not value.isdigit() or int(value) < low:
            raise ValueError(
                f"got the environment variable {name}={value!r}; allowed: a whole number "
                f"of at least {low}"
            )
    if int(rank) >= int(size):
        raise ValueError(
            f"got JAX_PROCESS_ID={rank} with JAX_NUM_PROCESSES={size}; allowed: 0 to "
            f"{int(size) - 1}"
        )
    return Join("the JAX_* variables", address, int(size), int(rank))


def _by_launcher(started: _Started, given: Mapping[str, str], gpus: int) -> Join:
    address = given.get("JAX_COORDINATOR_ADDRESS", started.address)
    if address is None:
        raise ValueError(
            f"{started.launcher} started this as process {started.rank} of "
            f"{started.size}, without saying where process 0 is: set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, HOST that of process 0, for all of them"
        )
    _check_address(address)
    return Join(
        started.launcher,
        address,
        started.size,
        started.rank,
        _share_of_gpus(started, gpus),
    )


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"got the environment variable JAX_COORDINATOR_ADDRESS={address!r}; allowed: "
            "HOST:PORT of process 0"
        )


def _share_of_gpus(started: _Started, gpus: int) -> tuple[int, ...] | None:
    """The GPUs of a process, where several processes of a host see the same ones.

    JAX itself would take one GPU for each process of Slurm or Open MPI, whatever it sees.
    """
    processes = started.local_size
    if started.own_gpus or processes == 1 or gpus < 2:
        return None
    if gpus % processes:
        raise ValueError(
            f"{processes} processes of {started.launcher} on this host see {gpus} GPUs, "
            "which they cannot share evenly; start one process a host, or one a GPU"
        )
    share = gpus // processes
    first = started.local_rank * share
    return tuple(range(first, first + share))


# --- Launchers ---


def _open_mpi(environ: Mapping[str, str]) -> _Started | None:
    # Before Slurm: under mpirun, Slurm's variables are those of mpirun's own daemons.
    size, rank = _size_and_rank(environ, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    if size < 2:
        return None
    local_size = int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")  # up to version 4
    host = re.search(r"tcp://([^,:]+)|tcp6://(\[[^,\]]+)", uri)
    if local_size == size:
        address = "127.0.0.1"
    elif host is not None:
        address = host[1] or f"{host[2]}]"
    else:
        address = None
    job = environ.get("PMIX_NAMESPACE") or uri.partition(";")[0]
    return _Started(
        "Open MPI",
        size,
        rank,
        _with_port(environ, address, zlib.crc32(job.encode())),
        local_size,
        int(environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)),
    )


def _slurm(environ: Mapping[str, str]) -> _Started | None:
    # Without a step (in the batch script itself) there is one process, whatever SLURM_NTASKS.
    if "SLURM_STEP_NODELIST" not in environ:
        return None
    # An interactive step is one task of an allocation for several.
    of_step = "SLURM_STEP_NUM_TASKS" in environ
    size, rank = _size_and_rank(
        environ, "SLURM_STEP_NUM_TASKS" if of_step else "SLURM_NTASKS", "SLURM_PROCID"
    )
    if size < 2:
        return None
    # "node[001-003,7]-a,login": the first is node001-a.
    first = re.match(
        r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", environ["SLURM_STEP_NODELIST"]
    )
    host = "".join(part or "" for part in first.groups()) if first else None
    job = int(environ.get("SLURM_JOB_ID", 0)) + int(environ.get("SLURM_STEP_ID", 0))
    node = int(environ.get("SLURM_NODEID", 0))
    counts: list[int] = []
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # "2(x3),1": 2, 2, 2, 1
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(times or 1)
    local_size = counts[node] if node < len(counts) else 1
    gpus_on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    bound = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_NTASKS_PER_GPU")
    own = any(environ.get(name) for name in bound)
    if gpus_on_node.isdigit() and "CUDA_VISIBLE_DEVICES" in environ:
        # Each sees a part of the node's: --gpu-bind.
        own = own or local_size * count_gpus(environ) <= int(gpus_on_node)
    return _Started(
        "Slurm",
        size,
        rank,
        _with_port(environ, host, job),
        local_size,
        int(environ.get("SLURM_LOCALID", 0)),
        own,
    )


def _mpich(environ: Mapping[str, str]) -> _Started | None:
    """MPICH and Intel MPI, which do not say where process 0 is."""
    size, rank = _size_and_rank(environ, "PMI_SIZE", "PMI_RANK")
    if size < 2:
        return None
    local_size = int(environ.get("MPI_LOCALNRANKS", 1))
    host = "127.0.0.1" if local_size == size else None
    job = zlib.crc32(environ.get("HYDI_CONTROL_FD", "").encode())
    local_rank = int(environ.get("MPI_LOCALRANKID", 0))
    address = _with_port(environ, host, job)
    return _Started("MPICH", size, rank, address, local_size, local_rank)


def _torchrun(environ: Mapping[str, str]) -> _Started | None:
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    size, rank = _size_and_rank(environ, "WORLD_SIZE", "RANK")
    if size < 2:
        return None
    address = None
    port = environ.get("MASTER_PORT", "")
    if environ.get("MASTER_ADDR") and port.isdigit():
        # torchrun itself listens at MASTER_PORT.
        beside = int(port) + 1 if int(port) < 65_535 else int(port) - 1
        port = environ.get("JAX_COORDINATOR_PORT") or str(beside)
        address = f"{environ['MASTER_ADDR']}:{port}"
    return _Started(
        "torchrun",
        size,
        rank,
        address,
        int(environ.get("LOCAL_WORLD_SIZE", 1)),
        int(environ.get("LOCAL_RANK", 0)),
    )


def _skypilot(environ: Mapping[str, str]) -> _Started | None:
    size, rank = _size_and_rank(environ, "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK")
    if size < 2:
        return None
    host = next(iter(environ.get("SKYPILOT_NODE_IPS", "").split()), None)
    job = zlib.crc32(environ.get("SKYPILOT_TASK_ID", "").encode())
    return _Started("SkyPilot", size, rank, _with_port(environ, host, job))


_LAUNCHERS: tuple[Callable[[Mapping[str, str]], _Started | None], ...] = (
    _open_mpi,
    _slurm,
    _mpich,
    _torchrun,
    _skypilot,
)


def _size_and_rank(environ: Mapping[str, str], size: str, rank: str) -> tuple[int, int]:
    """Two numbers of a launcher; (1, 0) where it started nothing."""
    if size not in environ:
        return 1, 0
    if not environ[size].isdigit() or not environ.get(rank, "").isdigit():
        raise ValueError(
            f"got the environment variables {size}={environ[size]!r} and "
            f"{rank}={environ.get(rank)!r}; allowed: the number of processes and this "
            f"one's, or neither; or set {THREE}"
        )
    return int(environ[size]), int(environ[rank])


def _with_port(environ: Mapping[str, str], host: str | None, job: int) -> str | None:
    """HOST:PORT; jobs on one host take different ports, all above 61,439."""
    if host is None:
        return None
    port = environ.get("JAX_COORDINATOR_PORT") or str(61_440 + job % 4_096)
    return f"{host}:{port}"


def count_gpus(environ: Mapping[str, str]) -> int:
    """How many GPUs a process sees: those named to it, or those of the host."""
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if name in environ:
            return len([part for part in environ[name].split(",") if part.strip()])
    return len(
        [p for p in pathlib.Path("/dev").glob("nvidia*") if p.name[6:].isdigit()]
    )


# --- Joining ---


def initialize() -> None:
    """Joins the processes of a multi-host job; does nothing for a single process.

    See `how_to_join`. Must run before the first JAX computation. While it waits it says
    for whom, and it gives up with exit code 75 after `SUPCON_JOIN_TIMEOUT_S` seconds.

    Raises:
      ValueError: this is one of several processes, and they cannot find each other.
    """
    global _job
    join = how_to_join(
        os.environ,
        on_tpu=_has_tpu_chips(),
        gpus=count_gpus(os.environ),
        kubernetes=importlib.util.find_spec("kubernetes") is not None,
    )
    if join is not None and not jax.distributed.is_initialized():
        _connect(join, timeout_s=_join_timeout_s())
    state = distributed.global_state
    if _job is None and state.client is not None and state.num_processes > 1:
        _job = _Job(state.client, state.process_id, state.num_processes)
        atexit.register(_job.stopping)


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
        _say(f"waiting for {_whom(join)}; gives up after {timeout_s:.0f} s")
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
            _say(
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


# --- Among the others ---

# A process tells process 0 every BEAT_S that it is alive.
BEAT_S = 1.0
SILENT_S = 20.0
# Where a collective has failed already, this is silence enough.
SUSPECT_S = 4.0
# A process that hears of another's end first ends in its own way, if it is about to.
GRACE_S = 2.0
INTERRUPT_GRACE_S = 30.0
DAY_MS = 24 * 3600 * 1000


class _Progress(NamedTuple):
    at: float  # of time.monotonic
    doing: str
    patience: float


_progress = _Progress(time.monotonic(), "starting", 1.0)
_job: _Job | None = None


class _Job:
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
        for target in (self._exchange, self._judge):
            threading.Thread(target=target, daemon=True, name="hosts").start()

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

    def named(self, index: int | None = None, host: str | None = None) -> str:
        """A process in words."""
        if index is None:
            index, host = self.index, self._host
        return f"process {index} ({host or 'host unknown'})"

    # Threads.

    def _exchange(self) -> None:
        while True:
            time.sleep(BEAT_S)
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
        while not self._leaving.is_set():
            time.sleep(BEAT_S)
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
        now, progress = time.monotonic(), _progress
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
                _say(f"waiting for {named}{more} to get ready")


GO_ON = "the same command goes on from the last save"
STUCK = "stuck"


def index() -> int:
    """This process's number in its job; asks no device, unlike `jax.process_index`."""
    return _job.index if _job else 0


def count() -> int:
    """How many processes the job has."""
    return _job.size if _job else 1


def gather(name: str, value: str) -> list[str]:
    """The short texts of all processes, in their order, without any device."""
    return _job.gather(name, value) if _job else [value]


def from_first(name: str, value: str) -> str:
    """The text of process 0, without any device."""
    return _job.from_first(name, value) if _job else value


def agree(facts: Mapping[str, str], *, on: str) -> None:
    """Ends the job where its processes were not started with the same.

    Args:
      facts: a name and a value each; process 0 says what is right.
      on: what this is about, in a word.

    Raises:
      ValueError: in every process, the same line: which process, which name, both values.
    """
    if _job is None:
        return
    right = json.loads(from_first(on, json.dumps(dict(facts))))
    told = [
        f"{name}={_short(facts.get(name))} where process 0 has {_short(right.get(name))}"
        for name in sorted({*facts, *right})
        if facts.get(name) != right.get(name)
    ]
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    problem = f"{_job.named()} has {', '.join(told[:3])}{more}" if told else ""
    refuse_together(problem, on=on, cure=f"start every process with the same {on}")


def refuse_together(problem: str, *, on: str, cure: str) -> None:
    """Raises in every process what one of them found; "" where it found nothing.

    Raises:
      ValueError: the first problem, and how many there are.
    """
    problems = [told for told in gather(on, problem) if told]
    if problems:
        more = f" (and {len(problems) - 1} more processes)" if problems[1:] else ""
        raise ValueError(f"{problems[0]}{more}; {cure}")


def code_version() -> str:
    """What runs here: versions, and a digest of this package's source files."""
    folder = pathlib.Path(__file__).resolve().parent
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        sha.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib")
    ]
    return f"{', '.join(versions)}, source {sha.hexdigest()[:12]}"


def leave(message: str, code: int) -> None:
    """Ends this process and the whole job with one line; returns where there is no job."""
    if _job is not None:
        _job.leave(message, code)


def check_peers(error: Exception) -> None:
    """Where a failure of the devices may be another process's death, ends with its name.

    Returns where it cannot be, or is not.
    """
    if _job is None:
        return
    # Whoever has gone is named by process 0, and a thread ends this process then.
    _job.suspect(SUSPECT_S + 6 * BEAT_S)
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


def _short(value: str | None) -> str:
    if value is None:
        return "not there"
    return value if len(value) <= 80 else f"{value[:77]}..."


# --- Stuck processes ---


def beat(doing: str, patience: float = 1.0) -> None:
    """Says that this process gets on; called at every step, batch and save.

    Args:
      doing: what begins now, in a word or two.
      patience: how many times as long as a step this may take.
    """
    global _progress
    _progress = _Progress(time.monotonic(), doing, patience)


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
            now, progress = time.monotonic(), _progress
            if now - last > 3 * every_s + 1:  # this whole process was stopped: Ctrl-Z
                beat(progress.doing, progress.patience)
            last = now
            limit_s = self._limit_s * progress.patience
            if progress is _progress and now - progress.at > limit_s:
                dump_stacks()
                at = f"at: {progress.doing}"
                if _job is not None:
                    at = _job.positions() or at
                line = (
                    f"{STUCK}: no step or batch for {now - progress.at:.0f} s "
                    f"(--config.hosts.watchdog_minutes); {at}; the stacks of all threads "
                    f"are above; {GO_ON}"
                )
                leave(line, TRY_AGAIN)
                hard_exit(line, TRY_AGAIN)


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


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def hard_exit(message: str, code: int) -> NoReturn:
    """Ends the process at once with one line, whatever its other threads wait for."""
    _say(f"error: {' '.join(message.split())}")
    for handler in logging.getLogger("supcon_jax").handlers:
        with contextlib.suppress(Exception):
            handler.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)
