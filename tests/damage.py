"""What can happen to the files of a checkpoint, for tests and benchmarks.chaos."""

import pathlib

import numpy as np

KINDS = ("flipped bit", "cut off", "deleted", "zeroed")


def files_of(step: pathlib.Path) -> list[pathlib.Path]:
    """Every file of a step, in a fixed order."""
    return sorted(path for path in step.rglob("*") if path.is_file())


def damage(path: pathlib.Path, kind: str, rng: np.random.Generator) -> None:
    """Damages one file as its kind says; an empty file is filled or deleted."""
    content = bytearray(path.read_bytes())
    if kind == "deleted":
        path.unlink()
    elif not content:
        path.write_bytes(b"\xff")
    elif kind == "flipped bit":
        position = int(rng.integers(len(content)))
        content[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
    elif kind == "cut off":
        path.write_bytes(content[: int(rng.integers(len(content)))])
    else:
        start = int(rng.integers(len(content)))
        content[start : start + 64] = bytes(len(content[start : start + 64]))
        path.write_bytes(content)
