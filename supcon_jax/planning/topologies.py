"""Slices of accelerators: what one has, and its devices for the compiler, not present.

Figures are the makers', without sparsity. TPU: Google Cloud's pages "TPU v4", "TPU v5e",
"TPU v5p", "TPU v6e" and "TPU7x" (peak in bfloat16, bandwidth of HBM and, in one direction,
of the links between chips; chips and vCPUs of a host); memory is what the compiler lets a
program have. GPU: NVIDIA's data sheets of A100 80GB, H100 and H200 (SXM) and of the DGX machines
(200 or 400 Gb/s of network a GPU); vCPUs are those of Google Cloud's a2-ultragpu-8g,
a3-highgpu-8g and a3-ultragpu-8g.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from typing import Any

import numpy as np
from jax.sharding import Mesh

from supcon_jax.parallel import DATA_AXIS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX calls a device: a TPU chip, half of a TPU7x, a GPU.

    Attributes:
      title: as its maker calls it.
      flops: peak in bfloat16, operations a second.
      memory: bytes.
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second that it can send, over all its links to the other
        chips of the slice; for GPUs, its share of the network between hosts.
      host_chips, host_cores: chips and virtual CPUs of one host.
      per_chip: devices of a chip.
      megacore: whether its two cores, which share their memory, are one device.
      nvlink: bytes a second that a GPU can send to the others of its host; 0: a TPU.
    """

    title: str
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    host_chips: int
    host_cores: int
    per_chip: int = 1
    megacore: bool = False
    nvlink: float = 0


CHIPS = {
    "v4": Chip("TPU v4", 275e12, 30.75 * GIB, 1228e9, 300e9, 4, 240, megacore=True),
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, 200e9, 4, 112),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2765e9, 600e9, 4, 208, megacore=True),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1640e9, 400e9, 4, 180),
    "tpu7x": Chip("TPU7x", 1153e12, 94.75 * GIB, 3690e9, 300e9, 4, 224, per_chip=2),
    "a100": Chip("A100 80GB", 312e12, 80e9, 2039e9, 25e9, 8, 96, nvlink=300e9),
    "h100": Chip("H100 80GB", 989e12, 80e9, 3350e9, 50e9, 8, 208, nvlink=450e9),
    "h200": Chip("H200", 989e12, 141e9, 4800e9, 50e9, 8, 224, nvlink=450e9),
}
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    *("8x8x8", "8x8x16", "8x16x16"),
)
SHAPES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT, "tpu7x": _CUBES}
# Google Cloud counts two cores a chip in the names of these.
_COUNTED_IN_CORES = ("v4", "v5p")
_GPUS_OF_A_HOST = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its chip, the shape "4x4x4" (of GPUs: hosts x GPUs), and its chips."""

    kind: str
    shape: str

    @property
    def chip(self) -> Chip:
        """What it is made of."""
        return CHIPS[self.kind]

    @property
    def name(self) -> str:
        """As the compiler and `find_topology` take it."""
        return f"{self.kind}:{self.shape}"

    @property
    def num_chips(self) -> int:
        """In the whole slice."""
        return math.prod(map(int, self.shape.split("x")))

    @property
    def num_devices(self) -> int:
        """What JAX counts."""
        return self.num_chips * self.chip.per_chip

    @property
    def num_hosts(self) -> int:
        """Machines, each with a process."""
        return max(1, self.num_chips // self.chip.host_chips)


def find_topology(name: str) -> Topology:
    """The slice of a name: "v5e:16x16", "v5e-256", "v4-128" (cores), "h100:4x8".

    Raises:
      ValueError: no such slice, listing those that are known.
    """
    kind, mark, size = name.lower().replace("v5litepod", "v5e").partition(":")
    if not mark:
        kind, mark, size = kind.partition("-")
    hosts, _, gpus = size.partition("x")
    for topology in known_topologies(kind):
        cores = 2 if kind in _COUNTED_IN_CORES else 1
        if size in (topology.shape, str(topology.num_chips * cores)):
            return topology
    if kind in CHIPS and CHIPS[kind].nvlink:
        if hosts.isdigit() and gpus.isdigit() and int(gpus) in _GPUS_OF_A_HOST:
            if 0 < int(hosts) and (int(hosts) == 1 or int(gpus) == 8):
                return Topology(kind, f"{int(hosts)}x{int(gpus)}")
        if size.isdigit() and int(size) and int(size) % 8 == 0:
            return Topology(kind, f"{int(size) // 8}x8")
    known = "; ".join(
        f"{kind}:{' '.join(shapes)} (as in {kind}:{shapes[-1]})"
        for kind, shapes in SHAPES.items()
    )
    gpu_kinds = ", ".join(kind for kind, chip in CHIPS.items() if chip.nvlink)
    raise ValueError(
        f"no topology {name!r}; known: {known}; {gpu_kinds}:HOSTSx8, or 1x1, 1x2, 1x4; "
        "also by Google Cloud's names, v5e-256 or v4-128 (--topology)"
    )


def known_topologies(kind: str) -> list[Topology]:
    """The slices of a kind of TPU, small ones first."""
    return [Topology(kind, shape) for shape in SHAPES.get(kind, ())]


def create_abstract_mesh(topology: Topology) -> Mesh:
    """A mesh over the devices of a slice that is not here; they only compile.

    Raises:
      ValueError: what to install.
    """
    devices = (_gpus if topology.chip.nvlink else _tpus)(topology)
    assert len(devices) == topology.num_devices, topology
    return Mesh(np.array(devices), (DATA_AXIS,))


def _tpus(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "compiling for a TPU needs libtpu, its compiler, which runs without a TPU: "
            'pip install "jax[tpu]", at best into an environment of its own'
        )
    from jax.experimental import topologies

    # libtpu looks for chips and for the other hosts of a slice, and for itself in other
    # processes, unless it is told otherwise before it is loaded.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-256",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    options = {"chip_config_name": "megacore"} if topology.chip.megacore else {}
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=topology.name, **options
    )
    return list(described.devices)


def _gpus(topology: Topology) -> list[Any]:
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(importlib.util.find_spec(name) for name in plugins):
        raise ValueError(
            "compiling for a GPU needs CUDA's libraries, which work without a GPU: "
            'pip install "jax[cuda13]" (gigabytes), at best into an environment of its own'
        )
    from jax.experimental import topologies

    # Without a GPU there is no driver to compare versions with.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    _add_ptxas_to_path()
    hosts, gpus = topology.shape.split("x")
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=_describe_gpu(topology.kind),
        topology=f"1x{hosts}x{gpus}",
    )
    return list(described.devices)


def _add_ptxas_to_path() -> None:
    """CUDA's assembler, which comes with the wheels of CUDA's libraries."""
    package = importlib.util.find_spec("nvidia")
    for folder in (package and package.submodule_search_locations) or ():
        for part in ("cu13", "cuda_nvcc"):
            programs = os.path.join(folder, part, "bin")
            os.environ["PATH"] = os.pathsep.join([programs, os.environ["PATH"]])


# Multiprocessors, compute capability, L2 cache, shared memory of a multiprocessor and of a
# block, clock in GHz: NVIDIA's "Tuning Guide" of Ampere and Hopper and the data sheets.
_GPU_DETAILS = {
    "a100": (108, 8, 41_943_040, 167_936, 166_912, 1.41),
    "h100": (132, 9, 52_428_800, 233_472, 232_448, 1.98),
    "h200": (132, 9, 52_428_800, 233_472, 232_448, 1.98),
}


def _describe_gpu(kind: str) -> str:
    """What XLA asks a GPU's driver, as its text message `GpuTargetConfigProto`."""
    cores, capability, cache, shared, shared_of_block, clock = _GPU_DETAILS[kind]
    chip = CHIPS[kind]
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_block_optin": shared_of_block,
        "shared_memory_per_core": shared,
        "threads_per_core_limit": 2048,
        "core_count": cores,
        "fpus_per_core": 128 if capability == 9 else 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": int(chip.memory_bandwidth),
        "l2_cache_size": cache,
        "clock_rate_ghz": clock,
        "device_memory_size": int(chip.memory),
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    device = " ".join(f"{name}: {value}" for name, value in fields.items())
    return (
        f"gpu_device_info {{ {device} cuda_compute_capability {{ major: {capability} }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } '
        f'device_description_str: "{chip.title}"'
    )
