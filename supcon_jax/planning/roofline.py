"""What a compiled step moves between devices, and the least time that it can take."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from supcon_jax.planning.topologies import Chip, Topology

# A collective of a few bytes waits for all chips of the slice. Nobody publishes how long;
# assumed here, of the size that users of pods report.
LATENCY_S = 20e-6
KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter"),
    *("collective-permute", "all-to-all", "collective-broadcast"),
)
_BITS = re.compile(r"\d+")
# Name of a computation at its beginning; `%fused (p: f32[]) -> f32[] {`.
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_OPERATION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:,|$)"
)
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = ("while", "call", "conditional")
_MOVES_NOTHING = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")
    + ("async-start", "copy-start", "slice-start", *_CALLS)
)
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      dtypes: of its arrays, "f32" or "f32+s32".
      bytes: of the whole result on one device (of a reduce-scatter, of its operand).
      devices: that take part together.
      times: how often a step runs it; more than once in a loop.
      asynchronous: whether the program goes on while it is under way.
    """

    kind: str
    dtypes: str
    bytes: int
    devices: int
    times: int = 1
    asynchronous: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, by the best algorithm on a ring."""
        share = (self.devices - 1) / self.devices
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        return (2 if self.kind == "all-reduce" else 1) * share * self.bytes


def find_collectives(program: str, num_devices: int) -> list[Collective]:
    """The collectives of a compiled program, from its text (`Compiled.as_text()`).

    Args:
      program: HLO, as XLA prints it. Loops count as often as they run, where the
        compiler has found out how often that is; else once.
      num_devices: those of the program, for collectives over all of them.
    """
    found = []
    for line, times, aside in _executed(program):
        if match := _COLLECTIVE.search(line):
            one = _collective(line, match, num_devices)
            found.append(one._replace(times=times, asynchronous=aside))
    return found


def memory_traffic(program: str) -> int:
    """Bytes that the operations of a compiled program read and write, from its text.

    What a fusion reads and writes counts once, what it holds in between does not. For
    compilers that keep no such account (CUDA's).
    """
    sizes: dict[str, int] = {}
    total = 0
    for line, times, _ in _executed(program, fusions=False):
        if not (match := _OPERATION.match(line)):
            continue
        name, result, operation, operands = match.groups()
        sizes[name] = sum(_size(*array) for array in _ARRAY.findall(result))
        if operation in _MOVES_NOTHING or operation.endswith("-done"):
            continue
        read = sum(sizes.get(name, 0) for name in _NAME.findall(operands))
        total += times * (sizes[name] + read)
    return total


def _executed(program: str, *, fusions: bool = True) -> Iterator[tuple[str, int, bool]]:
    """Lines of a program that run: how often, and whether others run meanwhile.

    Args:
      program: HLO.
      fusions: whether to enter those, too.
    """
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in program.splitlines():
        if head := _HEAD.match(line):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    overlapped = _overlapped(program)
    waiting = [(entry, 1, False)]
    while waiting:
        name, times, aside = waiting.pop()
        for line in bodies.get(name, ()):
            named = _OPERATION.match(line)
            meanwhile = aside or (named is not None and named[1] in overlapped)
            yield line, times, meanwhile
            if _COLLECTIVE.search(line) or (not fusions and " fusion(" in line):
                continue
            trips = _TRIPS.search(line) if " while(" in line else None
            often = times * (int(trips[1]) if trips else 1)
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(r"[\w.\-]+", branches)
            waiting += [(c, often, meanwhile) for c in called]


def _overlapped(program: str) -> set[str]:
    """Names of what is started, and waited for only after something else has run."""
    under_way: set[str] = set()
    found: set[str] = set()
    for line in program.splitlines():
        if not (match := _OPERATION.match(line)):
            continue
        name, _, operation, operands = match.groups()
        if operation.endswith("-start"):
            under_way.add(name)
        elif operation.endswith("-done"):
            under_way -= set(_NAME.findall(operands))
        elif operation in _CALLS or operation not in _MOVES_NOTHING:
            found |= under_way
    return found


def _collective(line: str, match: re.Match[str], num_devices: int) -> Collective:
    kind, start = match[2], bool(match[3])
    devices = num_devices
    if groups := _GROUPS.search(line):
        listed, size = groups[1], groups[2]
        devices = int(size) if size else len(listed.split(",")) if listed else devices
    arrays = [(dtype, _size(dtype, shape)) for dtype, shape in _ARRAY.findall(match[1])]
    total: float = sum(size for _, size in arrays)
    if start and kind == "all-gather":  # the operands are part of its result
        total *= devices / (devices + 1)
    if start and kind == "collective-permute":
        total, arrays = arrays[0][1], arrays[:1]
    if kind == "reduce-scatter":
        total *= 1 if start else devices
    dtypes = "+".join(sorted({dtype for dtype, _ in arrays}))
    return Collective(kind, dtypes, round(total), devices)


def _size(dtype: str, shape: str) -> int:
    """Bytes of an array, such as ("bf16", "8,128")."""
    bits = _BITS.search(dtype)
    count = math.prod(int(side) for side in shape.split(",") if side)
    return count * max(1, int(bits[0]) // 8) if bits else count


def by_kind(collectives: Iterable[Collective]) -> list[Collective]:
    """Those of one kind, type and extent as one, with the sums of times and bytes."""
    sums: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0])
    for one in collectives:
        key = (one.kind, one.dtypes, one.devices, one.asynchronous)
        sums[key][0] += one.times
        sums[key][1] += one.times * one.bytes
    return [
        Collective(kind, dtypes, total, devices, count, aside)
        for (kind, dtypes, devices, aside), (count, total) in sums.items()
    ]


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The least seconds of a step: no real one is faster.

    Attributes:
      compute: operations / peak.
      memory: bytes moved to and from memory / its bandwidth.
      blocking: collectives during which nothing else runs: bytes / the bandwidth of the
        links (of GPUs over several hosts, of the slower of links and network), and
        `LATENCY_S` each.
      overlapped: the asynchronous ones, likewise.
    """

    compute: float
    memory: float
    blocking: float
    overlapped: float

    @property
    def total(self) -> float:
        """What runs at the same time counts once, the longest of it."""
        return max(self.compute, self.memory, self.overlapped) + self.blocking

    @property
    def bound(self) -> str:
        """What most of the time goes to: "compute", "memory" or "collectives"."""
        links = self.blocking + self.overlapped
        parts = {
            "compute": self.compute,
            "memory": self.memory,
            "collectives": links,
        }
        return max(parts, key=lambda name: parts[name])


def _wire_time(chip: Chip, one: Collective) -> float:
    """The least seconds that a collective's bytes are under way."""
    if not chip.nvlink:
        return one.sent / chip.link_bandwidth
    # GPUs of a host share its result over their own links, and each carries its part of it
    # over its own share of the network; both may go on at once.
    gpus = min(one.devices, chip.host_chips)
    inside = one._replace(devices=gpus).sent / chip.nvlink
    hosts = math.ceil(one.devices / gpus)
    if hosts == 1:
        return inside
    across = one._replace(devices=hosts).sent / gpus / chip.link_bandwidth
    return max(inside, across)


def step_time(
    topology: Topology,
    *,
    flops: float,
    traffic: float,
    collectives: Iterable[Collective],
) -> StepTime:
    """The roofline of a step on a slice (Williams et al., 2009), and its collectives.

    Args:
      topology: the slice.
      flops: operations of one device.
      traffic: bytes between one device and its memory.
      collectives: of the compiled step.
    """
    seconds = {True: 0.0, False: 0.0}
    for one in collectives:
        each = _wire_time(topology.chip, one) + LATENCY_S
        seconds[one.asynchronous] += one.times * each
    chip = topology.chip
    return StepTime(
        compute=flops / chip.flops,
        memory=traffic / chip.memory_bandwidth,
        blocking=seconds[False],
        overlapped=seconds[True],
    )
