"""Lanes: an order that is shuffled and still reads megabytes at a time.

A full permutation asks for single records from anywhere, which a bucket answers a few
hundred times a second. Here the split is cut into L lanes of consecutive examples, each
batch takes B / L rows of every lane, and inside a lane whole blocks are shuffled and
their examples mixed within a window. A host owns whole lanes, so it reads its own share
of the files and no other, and every block once an epoch.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from supcon_jax.data.sampler import Sampler

# A block is about so many bytes, in a power of two of examples (32 of ImageNet's).
BLOCK_BYTES = 4 * 2**20
LARGEST_BLOCK = 128
# Examples of so many blocks are mixed.
WINDOW = 8


def block_size(mean_bytes: float) -> int:
    """Examples of a block, for encoded examples of so many bytes."""
    fitting = BLOCK_BYTES / max(mean_bytes, 1.0)
    return int(min(2 ** np.floor(np.log2(max(fitting, 1.0))), LARGEST_BLOCK))


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Which examples belong to which lane and block, and in which order they come.

    With m = floor(n / L), lane l owns the examples `l m ... (l + 1) m - 1`. The n - L m
    last examples, fewer than L, belong to none: in each epoch other lanes take one each.
    So every example comes exactly once an epoch and the lanes stay in step for ever.

    Blocks are numbered lane after lane; each of the last examples is one of its own.

    Attributes:
      num_examples: n.
      count: number of lanes L.
      block: examples of a block R; the last one of a lane may have fewer.

    Example:
      >>> sampler = Lanes(10, 2, block=2).sampler(4, seed=0)
      >>> first = np.concatenate([sampler(step) for step in range(3)])
      >>> sorted(int(i) for epoch, i in first if epoch == 0)
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    num_examples: int
    count: int
    block: int

    @property
    def share(self) -> int:
        """Examples that a lane owns, m."""
        return self.num_examples // self.count

    @property
    def _blocks_a_lane(self) -> int:
        return -(-self.share // self.block)

    def block_of(self, index: np.ndarray) -> np.ndarray:
        """The block of each example."""
        lane, place = np.divmod(index, self.share)
        rest = index - self.count * self.share
        numbers = lane * self._blocks_a_lane + place // self.block
        return np.where(rest < 0, numbers, self.count * self._blocks_a_lane + rest)

    def members(self, block: int) -> np.ndarray:
        """The examples of a block, in the order of the files."""
        lane, place = divmod(block, self._blocks_a_lane)
        if lane >= self.count:
            rest = block - self.count * self._blocks_a_lane
            return np.asarray([self.count * self.share + rest])
        first = place * self.block
        last = min(first + self.block, self.share)
        return np.arange(first, last) + lane * self.share

    def order(self, lane: int, epoch: int, *, seed: int) -> np.ndarray:
        """The examples that a lane shows in an epoch.

        Its blocks are permuted and laid end to end. The example at place i of that line
        then gets the key `i + u`, u uniform in [0, R W), and the keys are sorted: no
        example moves further than the window, and at any time the examples of about
        W + 1 blocks are due.

        Args:
          lane: 0 to L - 1.
          epoch: from 0.
          seed: seed of the order.
        """
        rng = np.random.default_rng((seed, epoch, lane))
        first = lane * self._blocks_a_lane
        blocks = [first + place for place in range(self._blocks_a_lane)]
        # Lane 0 is not always the first to take one of the examples that are left over:
        # the epoch begins with the lane at which the one before it ended.
        turn = (lane - epoch * self.num_examples) % self.count
        if turn < self.num_examples % self.count:
            blocks.append(self.count * self._blocks_a_lane + turn)
        line = np.concatenate(
            [self.members(blocks[i]) for i in rng.permutation(len(blocks))]
        )
        moved = rng.uniform(0, self.block * WINDOW, len(line))
        return line[np.argsort(np.arange(len(line)) + moved, kind="stable")]

    def sampler(self, batch_size: int, *, seed: int) -> Sampler:
        """The lanes side by side: rows `l B / L ... (l + 1) B / L - 1` are those of lane l.

        Place q of lane l is position `q L + l` of the stream, whose epoch is position
        divided by n, as in `sampler.shuffled`: epochs follow each other without a gap.

        Args:
          batch_size: global batch size B, a multiple of L.
          seed: seed of the orders.
        """
        rows = batch_size // self.count
        lanes = np.arange(self.count)

        # A batch may hold the end of one epoch and the beginning of the next.
        @functools.lru_cache(maxsize=2)
        def orders(epoch: int) -> list[np.ndarray]:
            return [self.order(lane, epoch, seed=seed) for lane in range(self.count)]

        def identities(step: int) -> np.ndarray:
            place = np.arange(step * rows, (step + 1) * rows)
            # [L, B / L]
            epochs = (place * self.count + lanes[:, None]) // self.num_examples
            index = np.empty_like(epochs)
            for epoch in np.unique(epochs).tolist():
                # The first place of each lane in this epoch.
                first = -((lanes - epoch * self.num_examples) // self.count)
                for lane, order in enumerate(orders(epoch)):
                    now = epochs[lane] == epoch
                    index[lane, now] = order[place[now] - first[lane]]
            return np.stack([epochs, index], axis=-1).reshape(-1, 2).astype(np.int32)

        return identities
