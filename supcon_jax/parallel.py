"""One mesh over all devices, global batches, and what processes need.

Every array is global: the batch is split over the mesh axis "data", everything else
is replicated. `jax.jit` inserts the collectives, so the same step runs on one CPU and
on a pod.
"""

from __future__ import annotations

import collections
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def initialize() -> None:
    """Joins the processes of a multi-host job; does nothing on a single machine.

    On Cloud TPU (libtpu is installed) JAX finds the other hosts by itself. Elsewhere a
    job is multi-host when `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` are set. Must run before the first JAX computation.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if name in os.environ]
    if len(given) == len(names):
        address, num_processes, process_id = (os.environ[name] for name in names)
        jax.distributed.initialize(
            address, num_processes=int(num_processes), process_id=int(process_id)
        )
    elif given:
        missing = [name for name in names if name not in given]
        raise ValueError(
            f"got the environment variable {given[0]} without {', '.join(missing)}; "
            "a multi-host job needs all three, a single host none"
        )
    elif importlib.util.find_spec("libtpu") and "cpu" not in (
        jax.config.jax_platforms or ""
    ):
        jax.distributed.initialize()


def create_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh over `devices` (all of the job's, by default)."""
    devices = jax.devices() if devices is None else devices
    # Auto: the compiler places the collectives. jax.make_mesh would be Explicit.
    return jax.make_mesh(
        (len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Refuses a global batch that the devices cannot share evenly.

    Raises:
      ValueError: naming the nearest batch sizes that they can.
    """
    below = max(batch_size, 0) // mesh.size * mesh.size
    if batch_size < 1 or below != batch_size:
        nearest = [str(size) for size in (below, below + mesh.size) if size > 0]
        raise ValueError(
            f"batch size {batch_size} is not divisible by the {mesh.size} devices; "
            f"set --config.batch_size={' or '.join(nearest)}"
        )


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of this process's rows of a batch (starts the transfer)."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, rows)
        for key, rows in batch.items()
    }


def prefetch_to_devices(
    batches: Iterable[dict[str, np.ndarray]], mesh: Mesh, *, size: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Keeps `size` batches on their way to the devices ahead of the one in use."""
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()
    for batch in batches:
        queue.append(to_global(batch, mesh))
        if len(queue) >= size:
            yield queue.popleft()
    yield from queue
