"""Lanes: an order that is a function of seed, epoch and place, and blocks of it read once."""

import collections
import dataclasses
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from supcon_jax import storage
from supcon_jax.config.check import check_config
from supcon_jax.data.blocks import BlockCache, read_examples
from supcon_jax.data.lanes import WINDOW, Lanes, block_size
from supcon_jax.data.pipeline import process_rows
from supcon_jax.data.sources import PADDING, Encoded
from supcon_jax.run import batches
from supcon_jax.run.batches import build_sampler, check_hosts
from tests.runs import pretrain_config
from tests.test_sources import arrays, files, noise, records

# Examples, lanes, batch, block: what is left over, what is not, lanes of one block.
SHAPES = [
    (103, 4, 8, 4),
    (1003, 8, 64, 16),
    (96, 8, 16, 4),
    (7, 7, 14, 3),
    (10, 1, 3, 4),
]


def stream(sampler, steps, start=0):
    return np.concatenate([sampler(step) for step in range(start, start + steps)])


# --- the order ---


@pytest.mark.parametrize(("count", "lanes", "batch", "block"), SHAPES)
def test_each_example_comes_once_an_epoch(count, lanes, batch, block):
    epochs = 5
    ids = stream(
        Lanes(count, lanes, block).sampler(batch, seed=3), epochs * count // batch
    )
    assert ids.dtype == np.int32 and len(ids) == epochs * count // batch * batch
    for epoch in range(epochs - 1):
        assert sorted(ids[ids[:, 0] == epoch, 1]) == list(range(count))
    # The lanes are never more than an example apart, so an epoch ends as in `shuffled`.
    ends = np.flatnonzero(np.diff(ids[:, 0] == 0) != 0)
    assert abs(np.sum(ids[: count // batch * batch, 0] == 0) - count) <= batch + lanes
    assert len(ends)


@pytest.mark.parametrize(("count", "lanes", "batch", "block"), SHAPES)
def test_blocks_divide_the_split(count, lanes, batch, block):
    shape = Lanes(count, lanes, block)
    numbers = shape.block_of(np.arange(count))
    members = [shape.members(number) for number in range(numbers.max() + 1)]
    np.testing.assert_array_equal(np.concatenate(members), np.arange(count))
    for number, own in enumerate(members):
        assert set(numbers[own]) == {number} and 0 < len(own) <= block


@pytest.mark.parametrize("start", [0, 1, 17, 1000])
def test_any_step_can_be_the_first(start):
    """Also when steps were asked for in another order: there is no state."""
    shape = Lanes(1003, 8, 16)
    whole = stream(shape.sampler(64, seed=1), start + 3)[64 * start :]
    resumed = shape.sampler(64, seed=1)
    np.testing.assert_array_equal(stream(resumed, 3, start), whole)
    np.testing.assert_array_equal(resumed(start), whole[:64])
    assert not np.array_equal(shape.sampler(64, seed=2)(start), whole[:64])


def test_epochs_have_orders_of_their_own():
    shape = Lanes(1024, 8, 16)
    ids = stream(shape.sampler(64, seed=0), 32)
    assert not np.array_equal(ids[:1024, 1], ids[1024:, 1])


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_own_lanes_and_make_one_order(hosts, monkeypatch):
    """The rows of all hosts are the batch, and no host ever needs another's examples."""
    shape, steps = Lanes(1003, 8, 16), 40
    sampler = shape.sampler(64, seed=0)
    expected = stream(sampler, steps)
    monkeypatch.setattr("jax.process_count", lambda: hosts)
    parts, seen = [], []
    for host in range(hosts):
        monkeypatch.setattr("jax.process_index", lambda host=host: host)
        rows = process_rows(64)
        parts.append([sampler(step)[rows] for step in range(steps)])
        seen.append(set(np.concatenate(parts[-1])[:, 1]) - set(range(1000, 1003)))
    together = np.concatenate(
        [np.concatenate(part) for part in zip(*parts, strict=True)]
    )
    np.testing.assert_array_equal(together, expected)
    assert [len(own) for own in seen] == [1000 // hosts] * hosts
    assert len(set.union(*seen)) == 1000


def test_examples_move_no_further_than_the_window():
    """So a host that holds the blocks of a window has whatever is due."""
    shape = Lanes(4096, 1, 16)
    order = shape.order(0, 0, seed=0)
    first = {}
    for place, block in enumerate(shape.block_of(order).tolist()):
        assert place - first.setdefault(block, place) <= shape.block * (WINDOW + 2)
    # And they do move: a batch holds many blocks, in no order of the files.
    assert len(set(shape.block_of(order[:64]))) > 4
    assert abs(np.corrcoef(order, np.arange(4096))[0, 1]) < 0.2


def test_blocks_are_megabytes_whatever_an_image_takes():
    assert block_size(110_000) == 32
    assert block_size(3_000) == 128 and block_size(0) == 128
    assert block_size(2_000_000) == 2 and block_size(50_000_000) == 1


# --- reading blocks ---


class Counted:
    """Examples that hold their index; says which were asked for together."""

    def __init__(self, broken=()):
        self.asked, self.broken = [], set(broken)

    def read_many(self, indices, map=map):
        self.asked.append(list(indices))
        return [
            OSError("broken")
            if index in self.broken
            else Encoded(bytes(100) + str(index).encode(), index)
            for index in indices
        ]

    def runs(self, indices):
        return indices[:, None]


def read(source, cache, sampler, rows, steps):
    """What a host reads, as (index, example)."""
    batches = ((sampler(t)[rows], sampler(t)[rows][:, 1]) for t in steps)
    with ThreadPoolExecutor(4) as pool:
        for identity, index, example in read_examples(source, batches, pool, cache):
            assert identity[1] == index
            yield index, example


def cached(source, shape, keep_bytes=0):
    return BlockCache(source, shape, batch_size=64, keep_bytes=keep_bytes)


@pytest.mark.parametrize("rows", [slice(0, 64), slice(16, 24)])
def test_a_host_reads_each_block_once_an_epoch(rows):
    shape, source = Lanes(2048, 8, 16), Counted()
    sampler = shape.sampler(64, seed=0)
    found = list(read(source, cached(source, shape), sampler, rows, range(32)))
    assert all(example.label == index for index, example in found)
    expected = np.concatenate([sampler(t)[rows, 1] for t in range(32)])
    assert [index for index, _ in found] == expected.tolist()
    asked = sorted(map(tuple, source.asked))
    lanes = (rows.stop - rows.start) // 8
    first = 256 * (rows.start // 8)
    blocks = [tuple(range(i, i + 16)) for i in range(first, first + 256 * lanes, 16)]
    assert asked == blocks


def test_what_is_read_does_not_depend_on_the_first_step():
    shape = Lanes(1003, 8, 16)
    sampler = shape.sampler(64, seed=0)
    take = functools.partial(read, sampler=sampler, rows=slice(0, 64))
    whole = list(take(Counted(), cached(Counted(), shape), steps=range(30)))
    source = Counted()
    resumed = list(take(source, cached(source, shape), steps=range(20, 30)))
    assert resumed == whole[20 * 64 :]


def test_a_share_that_fits_is_read_once():
    shape, source = Lanes(1024, 8, 16), Counted()
    sampler, rows = shape.sampler(64, seed=0), slice(0, 16)
    cache = cached(source, shape, keep_bytes=10**6)
    found = list(read(source, cache, sampler, rows, range(5 * 16)))
    assert len(found) == 5 * 256 and all(e.label == i for i, e in found)
    assert sorted(itertools.chain(*source.asked)) == list(range(256))


def test_of_a_share_that_does_not_fit_some_is_kept():
    shape, source = Lanes(1024, 8, 16), Counted()
    sampler, rows = shape.sampler(64, seed=0), slice(0, 16)
    bytes_of = {i: len(Counted().read_many([i])[0].image) for i in range(256)}
    cache = cached(source, shape, keep_bytes=sum(bytes_of.values()) // 2)
    list(read(source, cache, sampler, rows, range(4 * 16)))
    times = collections.Counter(itertools.chain(*source.asked))
    kept = [index for index, count in times.items() if count == 1]
    assert sum(bytes_of[index] for index in kept) <= sum(bytes_of.values()) // 2
    assert 96 <= len(kept) <= 128 and set(times.values()) <= {1, 3, 4, 5}


def test_memory_is_that_of_the_windows():
    """At no time are there more examples than a window of each lane and what is ahead."""
    shape, source = Lanes(8192, 8, 16), Counted()
    cache = cached(source, shape)
    sampler = shape.sampler(64, seed=0)
    most = 0
    for number, _ in enumerate(read(source, cache, sampler, slice(0, 64), range(128))):
        if number % 64 == 0:
            held = [f.result() for f in list(cache._blocks.values()) if f.done()]
            most = max(most, sum(map(len, held)))
    assert 0 < most <= 8 * (16 * (WINDOW + 2) + 8 * 3)


def test_a_broken_example_costs_no_other_of_its_block():
    shape, source = Lanes(256, 8, 16), Counted(broken=[5])
    sampler = shape.sampler(64, seed=0)
    for index, example in read(
        source, cached(source, shape), sampler, slice(0, 64), range(8)
    ):
        assert isinstance(example, OSError) if index == 5 else example.label == index


def test_rows_without_an_example_are_nobody():
    indices = np.asarray([3, PADDING, 4, PADDING])
    ids = np.stack([np.zeros_like(indices), indices], axis=1)
    source = Counted()
    with ThreadPoolExecutor(2) as pool:
        found = list(read_examples(source, [(ids, indices)], pool, None))
    assert [example.label for _, _, example in found] == [3, 0, 4, 0]
    assert sorted(source.asked) == [[3], [4]]


# --- refusals ---


def refusal(function, *arguments):
    with pytest.raises(ValueError) as error:
        function(*arguments)
    assert "\n" not in str(error.value) and "--config.data.lanes" in str(error.value)
    return str(error.value)


def test_lanes_that_do_not_fit_are_refused(monkeypatch):
    config = pretrain_config(**{"data.lanes": 5})
    assert "data.lanes=5 with batch_size=16" in refusal(check_config, config)
    both = pretrain_config(**{"data.lanes": 4, "data.classes_per_batch": 4})
    assert "classes_per_batch=4" in refusal(check_config, both)
    monkeypatch.setattr("jax.process_count", lambda: 3)
    four = pretrain_config(**{"data.lanes": 4})
    assert "data.lanes=4 on 3 hosts" in refusal(check_hosts, four)
    check_hosts(pretrain_config(**{"data.lanes": 6}))
    check_hosts(pretrain_config())


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (arrays(), "is held in memory"),
        (files(), "has no records"),
        (dataclasses.replace(records(), shuffled=False), "without being shuffled"),
    ],
)
def test_lanes_need_shuffled_records(source, says):
    config = pretrain_config(**{"data.lanes": 4})
    assert says in refusal(build_sampler, config, source)
    assert build_sampler(pretrain_config(), source)(0).shape == (16, 2)


def test_noise_needs_no_lanes():
    config = pretrain_config(**{"data.lanes": 4})
    assert len(build_sampler(config, noise())(0)) == 16
    assert batches.build_lanes(config, records()) == Lanes(30, 4, 128)


# --- records in files ---


def test_one_request_for_records_that_lie_together(monkeypatch, tmp_path):
    """And exactly the records, in the order asked for."""
    rng = np.random.default_rng(0)
    data = [rng.bytes(int(n)) for n in rng.integers(1, 400, 60)]
    framed = [len(d).to_bytes(8, "little") + b"cccc" + d + b"cccc" for d in data]
    for number in range(2):
        path = tmp_path / f"f{number}"
        path.write_bytes(b"".join(framed[30 * number : 30 * number + 30]))
    length = np.asarray([len(d) for d in data])
    ends = np.concatenate(
        [np.cumsum(length[s] + 16) for s in (slice(30), slice(30, 60))]
    )
    source = dataclasses.replace(
        records(60),
        files=(str(tmp_path / "f0"), str(tmp_path / "f1")),
        file=np.repeat([0, 1], 30),
        offset=ends - 4 - length,
        length=length,
    )
    monkeypatch.setattr("supcon_jax.data.records._parse", lambda record: record)
    asked = []

    def counted(path, ranges, plain=storage.read_ranges):
        asked.append(ranges)
        return plain(path, ranges)

    monkeypatch.setattr(storage, "read_ranges", counted)
    for indices in (
        np.arange(28, 33),
        rng.permutation(60),
        np.asarray([59, 0, 0]),
        np.arange(0),
    ):
        found = source.visit(indices, lambda index, record: (index, record))
        assert found == [(int(i), data[i]) for i in indices]
    assert [len(asked), len(asked[0])] == [2 + 2 + 3, 1]
    parts = source.runs(np.asarray([0, 1, 2, 40, 41, 7, 6]))
    assert [part.tolist() for part in parts] == [[0, 1, 2], [40, 41], [7], [6]]


def test_a_file_that_has_changed_is_never_read_as_the_old_one(tmp_path):
    path = tmp_path / "f"
    path.write_bytes((90).to_bytes(8, "little") + bytes(98))
    source = dataclasses.replace(
        records(1), files=(str(path),), offset=np.asarray([12]), length=np.asarray([89])
    )
    with pytest.raises(OSError, match="tools.index --rebuild"):
        source.read(0)
    short = dataclasses.replace(source, length=np.asarray([900]))
    with pytest.raises(OSError, match="ends before"):
        short.read(0)
