"""The mesh and global arrays."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from supcon_jax import parallel


def test_mesh_is_one_axis_over_all_devices():
    mesh = parallel.create_mesh()
    assert mesh.axis_names == ("data",)
    assert list(mesh.devices.flat) == jax.devices() and mesh.size == 8
    few = parallel.create_mesh(jax.devices()[2:5])
    assert list(few.devices.flat) == jax.devices()[2:5]


def test_shardings():
    mesh = parallel.create_mesh()
    assert parallel.batch_sharding(mesh).spec == PartitionSpec("data")
    assert parallel.replicated(mesh).is_fully_replicated


@pytest.mark.parametrize("size", [8, 64])
def test_accepts_batch_sizes_that_divide(size):
    parallel.check_batch_size(size, parallel.create_mesh())


@pytest.mark.parametrize(
    ("size", "nearest"),
    [(100, "96 or 104"), (9, "8 or 16"), (7, "8"), (0, "8"), (-3, "8")],
)
def test_refuses_other_batch_sizes_with_the_nearest(size, nearest):
    with pytest.raises(ValueError) as error:
        parallel.check_batch_size(size, parallel.create_mesh())
    message = str(error.value)
    assert f"batch size {size} " in message and "8 devices" in message
    assert message.endswith(f"--config.batch_size={nearest}") and "\n" not in message


def test_to_global_splits_rows_in_order():
    mesh = parallel.create_mesh()
    image = np.arange(16 * 3).reshape(16, 3)
    label = np.arange(16, dtype=np.int32)
    batch = parallel.to_global({"image": image, "label": label}, mesh)
    np.testing.assert_array_equal(batch["image"], image)
    assert batch["label"].dtype == np.int32
    for shard, device in zip(
        batch["image"].addressable_shards, jax.devices(), strict=True
    ):
        row = 2 * jax.devices().index(shard.device)
        assert shard.device == device
        np.testing.assert_array_equal(shard.data, image[row : row + 2])


@pytest.mark.parametrize(("count", "size"), [(0, 2), (1, 2), (5, 2), (5, 1), (2, 4)])
def test_prefetch_keeps_order_and_drops_nothing(count, size):
    batches = ({"label": np.full(8, i)} for i in range(count))
    out = parallel.prefetch_to_devices(batches, parallel.create_mesh(), size=size)
    assert [int(batch["label"][0]) for batch in out] == list(range(count))


def test_prefetch_reads_ahead_by_its_size():
    taken = []

    def batches():
        for i in range(10):
            taken.append(i)
            yield {"label": np.full(8, i)}

    out = parallel.prefetch_to_devices(batches(), parallel.create_mesh(), size=3)
    assert taken == []  # nothing before the first request
    next(out)
    assert taken == [0, 1, 2]
    next(out)
    assert taken == [0, 1, 2, 3]
