"""How a process joins its job: every launcher's environment, and real joins."""

import os
import socket
import subprocess
import sys

import jax
import pytest

from supcon_jax import hosts
from supcon_jax.hosts import Join, how_to_join, joining

THREE = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "2",
}
SLURM = {
    "SLURM_JOB_ID": "4096003",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "node[001-004,9],login",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
}
# Two tasks on each of two nodes.
SLURM_SHARED = SLURM | {
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
OPEN_MPI_4 = OPEN_MPI | {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
}
OPEN_MPI_5 = OPEN_MPI | {"PMIX_NAMESPACE": "prterun-head-4242@1"}
TORCHRUN = {
    "WORLD_SIZE": "8",
    "RANK": "5",
    "LOCAL_WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environ", "here", "address", "size", "rank", "gpus"),
    [
        (THREE, {}, "host:1234", 4, 2, None),
        # They win over any launcher, and then no GPU is taken away.
        (SLURM_SHARED | THREE, {"gpus": 8}, "host:1234", 4, 2, None),
        (THREE, {"on_tpu": True}, "host:1234", 4, 2, None),
        (SLURM, {"gpus": 8}, "node001:61444", 4, 3, None),
        (SLURM | {"SLURM_STEP_NODELIST": "a-1,b"}, {}, "a-1:61444", 4, 3, None),
        (SLURM | {"SLURM_STEP_NODELIST": "n[7,9]-x"}, {}, "n7-x:61444", 4, 3, None),
        (SLURM | {"JAX_COORDINATOR_PORT": "99"}, {}, "node001:99", 4, 3, None),
        (SLURM_SHARED, {"gpus": 8}, "node001:61444", 4, 3, (4, 5, 6, 7)),
        (SLURM_SHARED, {"gpus": 1}, "node001:61444", 4, 3, None),
        (
            SLURM_SHARED | {"SLURM_GPUS_PER_TASK": "4"},
            {"gpus": 4},
            "node001:61444",
            4,
            3,
            None,
        ),
        (
            SLURM_SHARED
            | {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "4,5,6,7"},
            {"gpus": 4},
            "node001:61444",
            4,
            3,
            None,
        ),
        (OPEN_MPI_4, {"gpus": 2}, "10.96.0.1:62838", 4, 1, (1,)),
        (SLURM | OPEN_MPI_4, {}, "10.96.0.1:62838", 4, 1, None),
        (
            OPEN_MPI_5 | {"JAX_COORDINATOR_ADDRESS": "head:5"},
            {},
            "head:5",
            4,
            1,
            None,
        ),
        (TORCHRUN, {"gpus": 8}, "head:29501", 8, 5, (2, 3)),
        (SKYPILOT, {"gpus": 8}, "10.0.0.1:61440", 2, 1, None),
        (MPICH | {"JAX_COORDINATOR_ADDRESS": "a:1"}, {}, "a:1", 2, 1, None),
    ],
)
def test_a_process_of_several_joins(environ, here, address, size, rank, gpus):
    found = how_to_join(environ, **here)
    if "orte" in str(environ):  # the port is a hash of the job's name
        assert found.coordinator.startswith("10.96.0.1:")
        address = found.coordinator
    assert found[1:] == (address, size, rank, gpus)


def test_processes_of_one_host_meet_on_loopback():
    """Open MPI 5 says no address, and where all are on one host it needs none."""
    local = OPEN_MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    addresses = {
        how_to_join(local | {"OMPI_COMM_WORLD_RANK": str(rank)}).coordinator
        for rank in range(4)
    }
    (address,) = addresses
    assert address.startswith("127.0.0.1:")
    another = local | {"PMIX_NAMESPACE": "prterun-head-4243@1"}
    assert how_to_join(another).coordinator != address


@pytest.mark.parametrize(
    ("environ", "here"),
    [
        ({}, {}),
        # libtpu alone: a laptop with jax[tpu].
        ({"TPU_SKIP_MDS_QUERY": "1"}, {"on_tpu": False}),
        # The batch script itself, and an interactive step of one task.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, {"gpus": 8}),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {"gpus": 8}),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, {}),
        ({"WORLD_SIZE": "8"}, {}),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {"kubernetes": True}),
    ],
)
def test_a_single_process_joins_nothing(environ, here):
    assert how_to_join(environ, **here) is None


@pytest.mark.parametrize(
    ("environ", "here", "launcher"),
    [
        ({}, {"on_tpu": True}, "Cloud TPU"),
        # GKE numbers the pods of a TPU job too.
        (KUBERNETES, {"on_tpu": True}, "Cloud TPU"),
        (KUBERNETES, {"kubernetes": True}, "Kubernetes"),
    ],
)
def test_jax_finds_the_others(environ, here, launcher):
    assert how_to_join(environ, **here) == Join(launcher)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "without JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "without JAX_NUM_PROCESSES"),
        (THREE | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two'"),
        (THREE | {"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES='0'"),
        (THREE | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 .* 0 to 3"),
        (THREE | {"JAX_COORDINATOR_ADDRESS": "host"}, "'host'; allowed: HOST:PORT"),
        (OPEN_MPI_5, "process 1 of 4.*JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        (MPICH, "MPICH started this as process 1 of 2"),
        (SKYPILOT | {"SKYPILOT_NODE_IPS": ""}, "SkyPilot .*JAX_COORDINATOR_ADDRESS"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "torchrun .*JAX_COORDINATOR_ADDRESS"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE='2' and PMI_RANK=None"),
        (KUBERNETES, "JOB_COMPLETION_INDEX=1 .*JAX_PROCESS_ID .*kubernetes"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, "3 processes .* see 8 GPUs"),
    ],
)
def test_several_that_cannot_find_each_other_are_refused(environ, says):
    with pytest.raises(ValueError, match=says) as refusal:
        how_to_join(environ, gpus=8)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("coordinator", "environ", "binds"),
    [
        ("127.0.0.1:5", {}, "127.0.0.1:5"),
        ("localhost:5", {}, "localhost:5"),
        ("[::1]:5", {}, "[::1]:5"),
        ("10.0.0.1:5", {}, None),
        ("127.0.0.1:5", {"JAX_COORDINATOR_BIND_ADDRESS": "0.0.0.0:5"}, "0.0.0.0:5"),
        ("10.0.0.1:5", {"JAX_COORDINATOR_BIND_ADDRESS": "10.0.0.1:5"}, "10.0.0.1:5"),
    ],
)
def test_loopback_is_listened_to_on_loopback_alone(coordinator, environ, binds):
    assert hosts.bind_address(coordinator, environ) == binds


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,5"}, 3),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"ROCR_VISIBLE_DEVICES": "3"}, 1),
    ],
)
def test_gpus_are_counted_as_they_are_seen(environ, gpus):
    assert hosts.count_gpus(environ) == gpus


# --- The call ---


@pytest.fixture
def calls(monkeypatch):
    """Calls of jax.distributed.initialize, which does nothing here; no launcher."""
    found = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **k: found.append(k))
    for name in (*THREE, *SLURM, *OPEN_MPI_4, *TORCHRUN, *SKYPILOT, *KUBERNETES):
        monkeypatch.delenv(name, raising=False)
    return found


def test_three_variables_are_passed_on_without_detection(calls, monkeypatch):
    for name, value in (SLURM | THREE).items():
        monkeypatch.setenv(name, value)
    hosts.initialize()
    (call,) = calls
    assert call == {
        "coordinator_address": "host:1234",
        "num_processes": 4,
        "process_id": 2,
        "local_device_ids": None,
        "cluster_detection_method": "deactivate",
        "coordinator_bind_address": None,
        "heartbeat_timeout_seconds": 60,
        "initialization_timeout": 360,
    }


@pytest.mark.parametrize(
    ("chips", "platforms", "joins"),
    [
        # `import jax` sets these platforms on a Cloud TPU VM.
        (True, "tpu,cpu", True),
        (True, None, True),
        (True, "cpu", False),
        (False, None, False),
    ],
)
def test_tpu_chips_join_the_other_hosts(calls, monkeypatch, chips, platforms, joins):
    monkeypatch.setattr(joining.cloud_tpu_init, "running_in_cloud_tpu_vm", chips)

    class Config:
        jax_platforms = platforms

    monkeypatch.setattr(jax, "config", Config())
    hosts.initialize()
    timeouts = {"heartbeat_timeout_seconds": 60, "initialization_timeout": 360}
    assert calls == ([timeouts] if joins else [])


def test_a_tpu_that_is_part_of_nothing_is_a_single_host(calls, monkeypatch):
    def initialize(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(joining.cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(joining, "_has_tpu_chips", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    hosts.initialize()
    assert (hosts.index(), hosts.count()) == (0, 1)


@pytest.mark.parametrize("seconds", ["soon", "0", "-1", "nan"])
def test_a_timeout_is_seconds(calls, monkeypatch, seconds):
    for name, value in {**THREE, "SUPCON_JOIN_TIMEOUT_S": seconds}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="SUPCON_JOIN_TIMEOUT_S"):
        hosts.initialize()
    assert calls == []


# --- Real processes ---

JOIN = """
import sys
from supcon_jax import hosts
from supcon_jax.cli import one_line_errors
with one_line_errors():
    hosts.initialize()
from jax._src import distributed
state = distributed.global_state
print(state.process_id, state.num_processes, state.coordinator_address)
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(environ):
    base = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_"))}
    return subprocess.Popen(
        [sys.executable, "-c", JOIN],
        env=base | {"TF_CPP_MIN_LOG_LEVEL": "3"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(*environs):
    """Exit code, output and errors of processes that start together."""
    processes = [start(environ) for environ in environs]
    try:
        return [(*p.communicate(timeout=120), p.returncode) for p in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    "launcher",
    ["variables", "slurm", "open_mpi_5", "torchrun", "tpu"],
)
def test_two_processes_join(launcher):
    port = str(free_port())

    def environ(rank):
        cpu = {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": port}
        if launcher == "variables":
            values = ("2", str(rank), f"127.0.0.1:{port}")
            names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")
            return {"JAX_PLATFORMS": "cpu"} | dict(zip(names, values, strict=True))
        if launcher == "slurm":
            of_two = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank)}
            return SLURM | cpu | of_two | {"SLURM_STEP_NODELIST": "localhost"}
        if launcher == "open_mpi_5":
            of_two = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(rank)}
            return OPEN_MPI_5 | cpu | of_two
        if launcher == "torchrun":
            of_two = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "localhost"}
            return TORCHRUN | cpu | of_two
        # What a Cloud TPU VM of GKE looks like to JAX, which then says "tpu,cpu".
        return {
            "JAX_FORCE_TPU_INIT": "1",
            "TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.2",
            "TPU_WORKER_ID": str(rank),
            "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1",
            "MEGASCALE_NUM_SLICES": "1",
            "MEGASCALE_SLICE_ID": "0",
            "JAX_COORDINATOR_PORT": port,
        }

    results = launch(environ(0), environ(1))
    for rank, (out, err, code) in enumerate(results):
        assert code == 0, err
        assert out.split()[:2] == [str(rank), "2"]
        assert out.split()[2].endswith(f":{port}")


def test_a_missing_process_is_waited_for_in_words(monkeypatch):
    """Nobody waits in silence: for whom, and for how long; then one line and code 75."""
    here = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_PROCESSES": "2",
        "SUPCON_JOIN_TIMEOUT_S": "3",
    }
    first = f"127.0.0.1:{free_port()}"
    second = f"127.0.0.1:{free_port()}"
    results = launch(
        here | {"JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": first},
        here | {"JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": second},
    )
    for (_, err, code), address in zip(results, (first, second), strict=True):
        assert code == 75
        assert f"waiting for 2 processes at {address}" in err
        assert len([x for x in err.splitlines() if x.startswith("error: ")]) == 1
        assert "gave up after 3 s" in err.splitlines()[-1]
    assert "not all joined" in results[0][1]
    assert "process 0 does not answer" in results[1][1]


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        values = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
        ((_, err, code),) = launch(
            values | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PLATFORMS": "cpu"}
        )
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: cannot join the job at {address}")
    assert "another program has the port" in err
