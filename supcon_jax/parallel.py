"""One mesh over all devices, and global batches.

Every array is global: the batch is split over the mesh axis "data", everything else
is replicated. `jax.jit` inserts the collectives, so the same step runs on one CPU and
on a pod.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"
GROUP_AXIS = "group"  # beside it, where neighbouring devices form groups

PyTree = Any


def create_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh over `devices` (all of the job's, by default).

    Raises:
      ValueError: JAX finds no device.
    """
    if devices is None:
        try:
            devices = jax.devices()
        except (RuntimeError, AssertionError) as error:  # by the kind of JAX_PLATFORMS
            asked = os.environ.get("JAX_PLATFORMS", "")
            reason = next(iter(str(error).strip().splitlines()), "none is there")
            raise ValueError(
                f"JAX finds no device with JAX_PLATFORMS={asked!r}: {reason}; unset it, or "
                "install JAX for that device (README, accelerators)"
            ) from None
    # Auto: the compiler places the collectives. jax.make_mesh would be Explicit.
    return jax.make_mesh(
        (len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )


def platform(mesh: Mesh) -> str:
    """What kind of device a mesh is made of: "cpu", "gpu" or "tpu"."""
    found = mesh.devices.flat[0].platform
    return "gpu" if found in ("cuda", "rocm") else found


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def microbatch_sizes(batch_size: int, mesh: Mesh) -> list[int]:
    """Sizes into which a batch can be cut so that the devices share each part evenly."""
    return [
        size
        for size in range(mesh.size, batch_size + 1, mesh.size)
        if batch_size % size == 0
    ]


def check_microbatch_size(microbatch_size: int, batch_size: int, mesh: Mesh) -> None:
    """Refuses microbatches (0: none) that batch or devices cannot be cut into evenly.

    Raises:
      ValueError: naming the nearest sizes that can be.
    """
    allowed = microbatch_sizes(batch_size, mesh)
    if microbatch_size and microbatch_size not in allowed:
        nearest = sorted(allowed, key=lambda size: abs(size - microbatch_size))[:2]
        raise ValueError(
            f"microbatch size {microbatch_size} does not divide the batch size "
            f"{batch_size} into parts that the {mesh.size} devices share evenly; set "
            f"--config.microbatch_size={' or '.join(map(str, sorted(nearest)))}, or 0"
        )


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


def grouped_mesh(mesh: Mesh, devices: int) -> tuple[Mesh, str | None]:
    """The same devices in groups of neighbours, and the axis along each group.

    Args:
      mesh: as `create_mesh` makes it.
      devices: how many form a group; 0: all of them.

    Returns:
      A mesh that `jax.shard_map` can split the same batch over, and the name of the
      axis within a group: "data", or None where each device is alone.

    Raises:
      ValueError: groups of this size do not share the devices evenly.
    """
    if devices in (0, mesh.size):
        return mesh, DATA_AXIS
    if mesh.size % devices:
        nearest = [n for n in range(1, mesh.size + 1) if mesh.size % n == 0]
        raise ValueError(
            f"groups of {devices} devices for BatchNorm do not divide the {mesh.size} "
            f"devices; allowed: 0 (all), {', '.join(map(str, nearest))} "
            "(--config.encoder.batch_norm_devices)"
        )
    if devices == 1:
        return mesh, None
    grid = mesh.devices.reshape(-1, devices)
    return Mesh(
        grid, (GROUP_AXIS, DATA_AXIS), axis_types=(AxisType.Auto,) * 2
    ), DATA_AXIS


def value_and_grad(
    function: Callable[..., tuple[jax.Array, PyTree]], mesh: Mesh, *, aux_specs: PyTree
) -> Callable[..., tuple[tuple[jax.Array, PyTree], PyTree]]:
    """The gradient of a loss over the global batch, each device with its own rows.

    `function(params, constants, rows) -> (loss, aux)` runs inside `jax.shard_map` and
    may use collectives; its loss is that of the whole batch, the same on every device.
    Gradients are summed over the devices in the type of the parameters, float32, also
    where the function casts these to bfloat16 (left to itself, the compiler would sum
    after the cast: the sum of 256 devices with 8 bits).

    Args:
      function: see above.
      mesh: the devices.
      aux_specs: a tree of `PartitionSpec` for what the function returns beside the loss.

    Returns:
      `(params, constants, batch) -> ((loss, aux), gradients)` of global arrays.
    """
    axes = mesh.axis_names

    def on_device(params: PyTree, constants: PyTree, rows: PyTree) -> PyTree:
        def of_own_copy(params: PyTree) -> tuple[jax.Array, PyTree]:
            # The transpose of this cast is the sum over devices: here, in float32.
            return function(varying(params, axes), constants, rows)

        return jax.value_and_grad(of_own_copy, has_aux=True)(params)

    replicated, split = PartitionSpec(), PartitionSpec(axes)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(replicated, replicated, split),
        out_specs=((replicated, aux_specs), replicated),
    )


def varying(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """Inside `jax.shard_map`: arrays that may come to differ along these axes."""
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree)


def mean_over(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """Inside `jax.shard_map`: the mean of float32 arrays over axes, in one collective."""
    if not axes or not jax.tree.leaves(tree):
        return tree
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(flat, axes))


def scan_microbatches(
    function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    batch: PyTree,
    count: int,
) -> tuple[PyTree, PyTree]:
    """`function(carry, rows) -> (carry, outputs)` over `count` parts of a batch in turn.

    Row r belongs to part r mod count, whatever the number of devices: each device has
    the same share of every part, and no row moves between devices.

    Args:
      function: maps `m = B / count` rows to m outputs.
      carry: what goes from one part to the next.
      batch: arrays `[B, ...]`.
      count: number of parts, dividing B; 1 calls the function on the batch as it is.

    Returns:
      The last carry, and outputs `[B, ...]` in the order of the batch.
    """
    if count == 1:
        return function(carry, batch)

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)

    def join(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

    carry, outputs = jax.lax.scan(function, carry, jax.tree.map(split, batch))
    return carry, jax.tree.map(join, outputs)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of this process's rows of a batch (starts the transfer)."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, rows)
        for key, rows in batch.items()
    }


def split_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array that every process has, split over the devices by its rows.

    Rows of zeros are added until the devices have equally many.
    """
    padding = [(0, -len(rows) % mesh.size), *[(0, 0)] * (rows.ndim - 1)]
    padded = np.pad(rows, padding)
    return jax.make_array_from_callback(
        padded.shape, batch_sharding(mesh), lambda index: padded[index]
    )


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
