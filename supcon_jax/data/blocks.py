"""Reading examples step by step: by themselves, or in blocks that are read ahead.

With lanes (lanes.py) a step's examples lie in few blocks, of which each serves many
steps. A block is read whole, some steps before its first example is due, and kept while
examples of it may be.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from supcon_jax.data.lanes import WINDOW, Lanes
from supcon_jax.data.sources import PADDING, READERS, Encoded, Source

# Steps whose blocks are asked for while an earlier one is made.
AHEAD = 2


class BlockCache:
    """The blocks of a split that are being read, are in use, or are kept.

    An example is given away once and then forgotten, unless its block is kept. So
    beside what is kept there are at most the blocks of a window of each lane.

    Args:
      source: the split.
      lanes: its blocks.
      batch_size: global batch size B.
      keep_bytes: of encoded images that are kept for later epochs. The blocks that are
        read first are kept, as long as they fit.
    """

    def __init__(
        self, source: Source, lanes: Lanes, *, batch_size: int, keep_bytes: int
    ):
        self._source = source
        self._lanes = lanes
        window = lanes.block * (WINDOW + 2)
        # Steps after which nothing of a block is due, once it has been asked for.
        self._lifetime = -(-window * lanes.count // batch_size) + AHEAD + 1
        self._room = keep_bytes
        self._step = 0
        self._blocks: dict[int, Future[dict[int, Encoded]]] = {}
        self._asked: collections.deque[tuple[int, int]] = collections.deque()
        self._kept: set[int] = set()
        self._lock = threading.Lock()

    def request(self, indices: np.ndarray, pool: ThreadPoolExecutor) -> None:
        """Begins to read what the next step needs, and forgets what no step will."""
        self._step += 1
        while self._asked and self._asked[0][0] + self._lifetime < self._step:
            _, block = self._asked.popleft()
            if block not in self._kept:
                del self._blocks[block]
        for block in np.unique(self._lanes.block_of(indices)).tolist():
            if block not in self._blocks:
                self._blocks[block] = pool.submit(self._read, block)
                self._asked.append((self._step, block))

    def take(self, index: int) -> Encoded | OSError:
        """An example; one that no block holds is read by itself."""
        block = int(self._lanes.block_of(np.asarray(index)))
        if block in self._blocks:
            examples = self._blocks[block].result()
            kept = block in self._kept
            example = examples.get(index) if kept else examples.pop(index, None)
            if example is not None:
                return example
        return self._source.read_many([index])[0]

    def _read(self, block: int) -> dict[int, Encoded]:
        """The examples of a block that can be read."""
        members = self._lanes.members(block).tolist()
        examples = {
            index: example
            for index, example in zip(
                members, self._source.read_many(members), strict=True
            )
            if isinstance(example, Encoded)
        }
        size = sum(len(example.image) for example in examples.values())
        with self._lock:
            if size <= self._room:
                self._room -= size
                self._kept.add(block)
        return examples


def read_examples(
    source: Source,
    steps: Iterable[tuple[np.ndarray, np.ndarray]],
    pool: ThreadPoolExecutor,
    cache: BlockCache | None,
) -> Iterator[tuple[np.ndarray, int, Encoded | OSError]]:
    """The examples of steps, in order, read ahead.

    Args:
      source: the split.
      steps: `[rows, 2]` identities and `[rows]` indices, `PADDING` where there is none.
      pool: threads that read.
      cache: the blocks of the split; None: examples are read by themselves.

    Yields:
      Identity, index and example of each row; the error, if it cannot be read.
    """
    steps, ahead = itertools.tee(steps)
    wanted = (index[index != PADDING] for _, index in ahead)
    examples = (
        _in_runs(source, wanted, pool)
        if cache is None
        else _in_blocks(cache, wanted, pool)
    )
    for ids, indices in steps:
        for identity, index in zip(ids, indices.tolist(), strict=True):
            nobody = index == PADDING
            yield identity, index, Encoded(b"", 0) if nobody else next(examples)


def _in_runs(
    source: Source, wanted: Iterable[np.ndarray], pool: ThreadPoolExecutor
) -> Iterator[Encoded | OSError]:
    """Examples that are read by themselves, or with the next ones if they lie together."""
    coming = (
        pool.submit(source.read_many, run.tolist())
        for indices in wanted
        for run in source.runs(indices)
    )
    ahead = collections.deque(itertools.islice(coming, 2 * READERS))
    while ahead:
        future = ahead.popleft()
        yield from future.result()
        ahead.extend(itertools.islice(coming, 1))


def _in_blocks(
    cache: BlockCache, wanted: Iterable[np.ndarray], pool: ThreadPoolExecutor
) -> Iterator[Encoded | OSError]:
    waiting: collections.deque[np.ndarray] = collections.deque()
    for indices in wanted:
        cache.request(indices, pool)
        waiting.append(indices)
        if len(waiting) > AHEAD:
            yield from map(cache.take, waiting.popleft().tolist())
    while waiting:
        yield from map(cache.take, waiting.popleft().tolist())
