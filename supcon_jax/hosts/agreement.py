"""Everything that all processes of a job must have in common before they work."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Mapping

from supcon_jax.hosts import peers


def gather(name: str, value: str) -> list[str]:
    """The short texts of all processes, in their order, without any device."""
    return peers.job.gather(name, value) if peers.job else [value]


def from_first(name: str, value: str) -> str:
    """The text of process 0, without any device."""
    return peers.job.from_first(name, value) if peers.job else value


def agree(facts: Mapping[str, str], *, on: str) -> None:
    """Ends the job where its processes were not started with the same.

    Args:
      facts: a name and a value each; process 0 says what is right.
      on: what this is about, in a word.

    Raises:
      ValueError: in every process, the same line: which process, which name, both values.
    """
    if peers.job is None:
        return
    right = json.loads(from_first(on, json.dumps(dict(facts))))
    told = [
        f"{name}={_short(facts.get(name))} where process 0 has {_short(right.get(name))}"
        for name in sorted({*facts, *right})
        if facts.get(name) != right.get(name)
    ]
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    problem = f"{peers.job.named()} has {', '.join(told[:3])}{more}" if told else ""
    refuse_together(problem, on=on, cure=f"start every process with the same {on}")


def refuse_together(problem: str, *, on: str, cure: str) -> None:
    """Raises in every process what one of them found; "" where it found nothing.

    Raises:
      ValueError: the first problem, and how many there are.
    """
    problems = [told for told in gather(on, problem) if told]
    if problems:
        more = f" (and {len(problems) - 1} more processes)" if problems[1:] else ""
        raise ValueError(f"{problems[0]}{more}; {cure}")


def code_version() -> str:
    """What runs here: versions, and a digest of this package's source files."""
    folder = pathlib.Path(__file__).resolve().parent.parent  # the package
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        sha.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib")
    ]
    return f"{', '.join(versions)}, source {sha.hexdigest()[:12]}"


def _short(value: str | None) -> str:
    if value is None:
        return "not there"
    return value if len(value) <= 80 else f"{value[:77]}..."
