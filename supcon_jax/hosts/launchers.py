"""Which job this process is one of, as the environment of its launcher says."""

from __future__ import annotations

import pathlib
import re
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
THREE = f"{', '.join(VARIABLES[:2])} and {VARIABLES[2]}"


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
