"""What lanes cost in randomness, and what they gain where a request takes long.

    python -m benchmarks.reading                    # the orders of ImageNet, simulated
    python -m benchmarks.reading --data_dir=DIR     # and opening, and reading JPEGs

The first table simulates two epochs of each order at ImageNet's size: 1,281,167 examples
of 1,000 classes of 732 to 1,300. Chi-square is that of a batch's class counts against
those of the split (999 degrees of freedom, the mean over the batches), "meet again" the
share of the pairs of a batch that are in one batch in the next epoch too. Requests and
bytes are those of one host, as its cache asks for them.

Opening is measured on as many records in as many files as ImageNet has, which hold zeros.

The second table reads records from files on this disk, every request delayed by
`--latency_ms` and, where it says so, by its bytes at `--stream_mb_s`, 16 at a time. The
files hold copies of the JPEGs in DIR. Nothing is decoded, since the cores of this machine
would be the limit. The third table decodes: CPU time of the whole input pipeline without
delays.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.input import augmentation, consume, measured
from supcon_jax import storage
from supcon_jax.data.blocks import BlockCache, read_examples
from supcon_jax.data.datasets import open_source
from supcon_jax.data.index import find_records
from supcon_jax.data.lanes import WINDOW, Lanes
from supcon_jax.data.pipeline import train_batches
from supcon_jax.data.records import RecordSource
from supcon_jax.data.sampler import Sampler, shuffled
from supcon_jax.data.sources import READERS, Encoded

EXAMPLES, CLASSES, SHARDS, RECORD_BYTES = 1_281_167, 1000, 1024, 109_000


# --- the orders, simulated ---


def class_sizes() -> np.ndarray:
    """Images of each class, 732 to 1,300: 895 classes have 1,300."""
    low, high, few = 732, 1299, 105
    rest = EXAMPLES - 895 * 1300
    # The sizes of the other classes follow a power that gives their sum.
    power = (high - low) / (rest / few - low) - 1
    sizes = np.round(low + (high - low) * np.linspace(0, 1, few) ** power).astype(int)
    sizes[few // 2] += rest - sizes.sum()
    return np.concatenate([sizes, np.full(895, 1300)])


def quality(sampler: Sampler, labels: np.ndarray, batch: int) -> tuple[float, ...]:
    """Chi-square, distinct classes and pairs that meet again, over the first epoch."""
    expected = np.bincount(labels) * batch / len(labels)
    steps = len(labels) // batch
    chi, distinct = [], []
    home = np.full((2, len(labels)), -1)
    for step in range(2 * steps + 2):
        ids = sampler(step)
        for epoch in (0, 1):
            home[epoch, ids[ids[:, 0] == epoch, 1]] = step
        if step < steps:
            counts = np.bincount(labels[ids[:, 1]], minlength=CLASSES)
            chi.append(((counts - expected) ** 2 / expected).sum())
            distinct.append(np.count_nonzero(counts))
    known = np.all(home >= 0, axis=0)
    first, second = home[:, known]
    sizes = np.bincount(first)
    together = np.unique(first * (2 * steps + 2) + second, return_counts=True)[1]
    again = (together * (together - 1)).sum() / (sizes * (sizes - 1)).sum()
    return float(np.mean(chi)), float(np.mean(distinct)), float(again)


class Counting:
    """Stands for a source: says how often and how much is asked of it."""

    def __init__(self):
        self.requests = self.examples = 0

    def read_many(self, indices, map=map):
        """Examples of one byte."""
        self.requests += 1
        self.examples += len(indices)
        return [Encoded(b"0", 0) for _ in indices]


def requests_of_a_host(
    lanes: Lanes, sampler: Sampler, batch: int, hosts: int
) -> tuple[float, float]:
    """Requests and megabytes a step of the first host, over the first epoch."""
    source, steps, rows = Counting(), lanes.num_examples // batch, batch // hosts
    cache = BlockCache(source, lanes, batch_size=batch, keep_bytes=0)
    batches = (
        (ids, ids[:, 1]) for ids in (sampler(step)[:rows] for step in range(steps))
    )
    with ThreadPoolExecutor(READERS) as pool:
        for _ in read_examples(source, batches, pool, cache):
            pass
    return source.requests / steps, source.examples / steps * RECORD_BYTES / 1e6


def orders(batch: int, hosts: int) -> None:
    """The table of the orders."""
    rng = np.random.default_rng(0)
    by_class = np.repeat(np.arange(CLASSES), class_sizes())
    # TFDS shuffles the examples before it writes them.
    mixed = rng.permutation(by_class)
    print(f"\nBatch {batch}, {hosts} hosts\n")
    print(
        "| order | chi-square | distinct classes | meet again | requests a step and "
        "host | MB a request | MB a step and host | MiB of a host's window |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows = batch // hosts

    def line(name: str, sampler: Sampler, labels: np.ndarray, *costs: float) -> None:
        chi, distinct, again = quality(sampler, labels, batch)
        requests, megabytes, window = costs
        print(
            f"| {name} | {chi:.0f} | {distinct:.1f} | {again:.4f} | {requests:.1f} "
            f"| {megabytes / requests:.2f} | {megabytes:.1f} | {window:.0f} |",
            flush=True,
        )

    whole = shuffled(EXAMPLES, batch, seed=0)
    line("full permutation", whole, mixed, rows, rows * RECORD_BYTES / 1e6, 0)
    for count in (8, 64, 256):
        for block in (16, 32, 128):
            if count % hosts and count < hosts:
                continue
            lanes = Lanes(EXAMPLES, count, block)
            sampler = lanes.sampler(batch, seed=0)
            window = (WINDOW + 1) * block * (count / hosts) * RECORD_BYTES / 2**20
            costs = (*requests_of_a_host(lanes, sampler, batch, hosts), window)
            line(f"{count} lanes, blocks of {block}", sampler, mixed, *costs)
            if (count, block) == (64, 32):
                line("the same, files sorted by class", sampler, by_class, *costs)


# --- opening ---


def write_shards(original: pathlib.Path, folder: pathlib.Path) -> None:
    """A dataset with as many records in as many files as ImageNet has, each of zeros."""
    rng = np.random.default_rng(0)
    counts = np.full(SHARDS, EXAMPLES // SHARDS)
    counts[: EXAMPLES % SHARDS] += 1
    for number, count in enumerate(counts.tolist()):
        path = folder / f"imagenet2012-train.tfrecord-{number:05d}-of-{SHARDS:05d}"
        sizes = rng.integers(100, 500, count).tolist()
        framed = [size.to_bytes(8, "little") + bytes(size + 8) for size in sizes]
        path.write_bytes(b"".join(framed))
    for name in ("features.json", "label.labels.txt"):
        shutil.copyfile(original / name, folder / name)
    info = json.loads((original / "dataset_info.json").read_text())
    (split,) = (split for split in info["splits"] if split["name"] == "train")
    split["shardLengths"] = [str(count) for count in counts]
    info["splits"] = [split]
    (folder / "dataset_info.json").write_text(json.dumps(info))


def opening(data_dir: str) -> None:
    """Opens as many records in as many files as ImageNet has, without and with an index."""
    original = next(pathlib.Path(data_dir).glob("imagenet2012/*/dataset_info.json"))
    open_source("imagenet2012", "train", dir=data_dir)  # imports TensorFlow
    with tempfile.TemporaryDirectory() as root:
        folder = pathlib.Path(root, "imagenet2012", original.parent.name)
        folder.mkdir(parents=True)
        write_shards(original.parent, folder)
        print(f"\n{EXAMPLES:,} records in {SHARDS:,} files on this disk\n")
        for what in ("makes the index", "with it", "with it", "with it"):
            start, cpu = time.perf_counter(), time.process_time()
            source = open_source("imagenet2012", "train", dir=root)
            assert source.num_examples == EXAMPLES
            took, cpu = time.perf_counter() - start, time.process_time() - cpu
            print(f"- {what}: {took:.2f} s, of the CPU {cpu:.2f} s", flush=True)


# --- reading, with an artificial latency ---


def write_copies(
    source: RecordSource, folder: pathlib.Path, count: int
) -> RecordSource:
    """A split of so many records in files of 512: copies of those of a source."""
    records = []
    for index in range(source.num_examples):
        path = source.files[source.file[index]]
        begin = int(source.offset[index]) - 12
        end = int(source.offset[index] + source.length[index]) + 4
        records += storage.read_ranges(path, [(begin, end)])
    rng, files, lengths = np.random.default_rng(0), [], []
    for number in range(-(-count // 512)):
        path = folder / f"copies-{number:05d}"
        size = min(512, count - 512 * number)
        chosen = rng.integers(0, len(records), size)
        path.write_bytes(b"".join(records[i] for i in chosen))
        files.append(str(path))
        lengths.append(find_records(str(path), size))
    offset = [np.cumsum(12 + length + 4) - 4 - length for length in lengths]
    return RecordSource(
        files=tuple(files),
        file=np.repeat(np.arange(len(files)), [len(length) for length in lengths]),
        offset=np.concatenate(offset),
        length=np.concatenate(lengths),
        labels=np.full(count, source.labels[0], np.int32),
        num_classes=source.num_classes,
    )


def delayed(read: Callable, latency_s: float, stream_bytes_s: float) -> Callable:
    """`storage.read_ranges` of a distant bucket."""

    def read_ranges(path, ranges):
        size = sum(stop - start for start, stop in ranges)
        time.sleep(latency_s + (size / stream_bytes_s if stream_bytes_s else 0.0))
        return read(path, ranges)

    return read_ranges


def read_steps(
    source: RecordSource, sampler: Sampler, lanes: Lanes | None, batch: int, steps: int
) -> Callable[[], int]:
    """Reads so many steps more with every call; returns the images."""
    pool = ThreadPoolExecutor(READERS)
    cache = None
    if lanes is not None:
        cache = BlockCache(source, lanes, batch_size=batch, keep_bytes=0)
    batches = ((ids, ids[:, 1]) for ids in map(sampler, itertools.count()))
    examples = read_examples(source, batches, pool, cache)

    def read() -> int:
        for _, index, example in itertools.islice(examples, steps * batch):
            if isinstance(example, OSError):
                raise OSError(f"{source.name(index)}: {example}")
        return steps * batch

    return read


def reading(source: RecordSource, options: argparse.Namespace) -> None:
    """The tables of reading and of the whole pipeline."""
    size, batch = source.num_examples, options.read_batch
    lanes = Lanes(size, options.lanes, 32)
    sides = {
        "full permutation": (shuffled(size, batch, seed=0), None),
        f"{options.lanes} lanes": (lanes.sampler(batch, seed=0), lanes),
    }
    mean = source.num_bytes / size / 1000
    print(f"\n{size} records, mean {mean:.0f} kB, batch {batch}, one host\n")
    print("| latency | a stream | order | images/s read | CPU-ms / image | ratio |")
    print("|---|---|---|---|---|---|")
    plain = storage.read_ranges
    delays = [
        (0, 0),
        (options.latency_ms, 0),
        (options.latency_ms, options.stream_mb_s),
    ]
    for latency, rate in delays:
        storage.read_ranges = delayed(plain, latency / 1e3, rate * 1e6)
        base = 0.0
        for name, (sampler, own) in sides.items():
            read = read_steps(source, sampler, own, batch, steps=4)
            read()  # the first window
            times = [measured(read) for _ in range(options.rounds)]
            cpu, wall = np.median(times, axis=0)
            base = base or 1e3 / wall
            print(
                f"| {latency} ms | {f'{rate} MB/s' if rate else '-'} | {name} "
                f"| {1e3 / wall:,.0f} | {cpu:.2f} | {1e3 / wall / base:.1f} |",
                flush=True,
            )
    storage.read_ranges = plain
    print("\nThe whole pipeline, two views at 224 px, batch 64, no delay\n")
    print("| order | CPU-ms / image | images/s |")
    print("|---|---|---|")
    streams = {}
    for name, own in (("full permutation", None), ("lanes", Lanes(size, 64, 32))):
        sampler = own.sampler(64, seed=0) if own else shuffled(size, 64, seed=0)
        streams[name] = train_batches(
            source,
            sampler,
            batch_size=64,
            image_size=224,
            views=2,
            augmentation=augmentation("identity"),
            seed=0,
            lanes=own,
        )
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in streams}
    for stream in streams.values():
        consume(stream, 4)
    for _ in range(options.rounds):
        for name, stream in streams.items():
            found[name].append(measured(functools.partial(consume, stream, 12)))
    for name, times in found.items():
        cpu, wall = np.median(times, axis=0)
        print(f"| {name} | {cpu:.2f} | {1e3 / wall:,.0f} |", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8192, help="of the orders")
    parser.add_argument(
        "--hosts", type=int, default=64, help="that share it; 0: no orders"
    )
    parser.add_argument("--data_dir", help="TFDS data directory with imagenet2012")
    parser.add_argument("--records", type=int, default=8192, help="copies to read")
    parser.add_argument("--read_batch", type=int, default=512, help="while reading")
    parser.add_argument("--lanes", type=int, default=8, help="of the host that reads")
    parser.add_argument("--latency_ms", type=float, default=30.0, help="of a request")
    parser.add_argument("--stream_mb_s", type=float, default=100.0, help="of a request")
    parser.add_argument(
        "--rounds", type=int, default=5, help="of each measurement; medians are shown"
    )
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {READERS} requests at a time")
    if options.hosts:
        orders(options.batch, options.hosts)
    if options.data_dir:
        opening(options.data_dir)
        source = open_source("imagenet2012", "train", dir=options.data_dir)
        assert isinstance(source, RecordSource)
        with tempfile.TemporaryDirectory() as folder:
            copies = write_copies(source, pathlib.Path(folder), options.records)
            reading(copies, options)


if __name__ == "__main__":
    main()
