"""What data a run was made with: enough to notice that they are others."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from supcon_jax.data.sources import Source

# Examples that are looked at, evenly spread; reading all would take hours on ImageNet.
SAMPLED = 64


def identify(source: Source) -> dict[str, Any]:
    """Number of examples and classes, and a digest of names, labels and some images.

    It depends on the content alone: the data may lie elsewhere the next time.

    Returns:
      `{"examples": n, "classes": C, "digest": "0123456789abcdef"}`.
    """
    sha = hashlib.sha256(repr(source.class_names).encode())
    if not source.synthetic:
        sha.update(np.ascontiguousarray(source.labels, np.int64).data)
        count = min(SAMPLED, source.num_examples)
        for index in np.linspace(0, source.num_examples - 1, count).astype(int):
            sha.update(_content(source, int(index)))
    return {
        "examples": source.num_examples,
        "classes": source.num_classes,
        "digest": sha.hexdigest()[:16],
    }


def _content(source: Source, index: int) -> bytes:
    if source.images is not None:
        return np.ascontiguousarray(source.images[index]).tobytes()
    try:
        return source.read(index).image
    except OSError as error:
        return f"unreadable: {error.strerror}".encode()
