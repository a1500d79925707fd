"""What data a run was made with: enough to notice that they are others."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from supcon_jax.data.sources import READERS, Source

# Examples that are looked at, evenly spread; reading all would take hours on ImageNet.
SAMPLED = 64


def identify(source: Source) -> dict[str, Any]:
    """Number of examples and classes, and a digest of names, labels and some images.

    It depends on the content alone: the data may lie elsewhere the next time.

    Returns:
      `{"examples": n, "classes": C, "digest": "0123456789abcdef"}`, and "label_classes"
      where a label stands for several of so many classes.
    """
    sha = hashlib.sha256(repr(source.class_names).encode())
    if not source.synthetic:
        sha.update(np.ascontiguousarray(source.labels, np.int64).data)
        count = min(SAMPLED, source.num_examples)
        rows = np.linspace(0, source.num_examples - 1, count).astype(int)
        for content in _contents(source, rows):
            sha.update(content)
    facts: dict[str, Any] = {
        "examples": source.num_examples,
        "classes": source.num_classes,
        "digest": sha.hexdigest()[:16],
    }
    if source.label_sets is not None:
        facts["label_classes"] = len(source.label_sets.class_names)
    return facts


def _contents(source: Source, rows: np.ndarray) -> list[bytes]:
    if source.images is not None:
        return [np.ascontiguousarray(image).tobytes() for image in source.images[rows]]
    with ThreadPoolExecutor(READERS) as pool:
        examples = source.read_many(rows, pool.map)
    return [
        f"unreadable: {example.strerror}".encode()
        if isinstance(example, OSError)
        else example.image
        for example in examples
    ]
