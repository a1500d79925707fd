"""Files of arrays: safetensors, read and written, and what PyTorch saves, read.

A safetensors file is the length of a header (8 bytes, little-endian), the header (JSON:
name -> dtype, shape and place) and the arrays one after the other.

Source: github.com/huggingface/safetensors, README.md, "Format".
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from supcon_jax import storage
from supcon_jax.weights.pickled import read_pickled

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


class WeightsFile(NamedTuple):
    """What a file holds.

    Attributes:
      arrays: by their names in it.
      metadata: text by name; a PyTorch file has none.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_weights(path: str | pathlib.Path) -> WeightsFile:
    """Reads `.safetensors`, or `.pth`, `.pt` and the like without running what they hold.

    The kind of file is told by its content, not by its name.

    Raises:
      ValueError: in one line: there is no such file, it is of another kind or damaged, or
        its pickle asks for more than arrays.
    """
    try:
        content = storage.read(storage.absolute(path))
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"cannot read {path}: {reason}") from None
    try:
        if content[8:9] == b"{":
            return _read_safetensors(content)
        return WeightsFile(read_pickled(content), {})
    except ValueError as error:
        raise ValueError(f"cannot take weights from {path}: {error}") from None


def _read_safetensors(content: bytes) -> WeightsFile:
    start = 8 + int.from_bytes(content[:8], "little")
    if start > len(content):
        raise ValueError("its header is cut off")
    try:
        header = json.loads(content[8:start])
        metadata = header.pop("__metadata__", {})
        arrays = {}
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            if not start <= begin <= end <= len(content):
                raise ValueError(f"{name} lies outside of the file, which is cut off")
            values = np.frombuffer(content[begin:end], DTYPES[entry["dtype"]])
            arrays[name] = values.reshape(entry["shape"])
    except KeyError as error:
        raise ValueError(
            f"{error} is not known; allowed: {', '.join(DTYPES)}"
        ) from None
    except (AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"its header is damaged ({error})") from None
    return WeightsFile(arrays, metadata)


def write_safetensors(
    path: str | pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays; a reader maps each straight into memory.

    Args:
      path: of the file, whole or not there.
      arrays: by name.
      metadata: text by name. `{"format": "pt"}` tells other programs whose names they
        are, `{"convention": ...}` tells us what an encoder computes with them
        (`config.encoder.convention`).

    Raises:
      OSError: it cannot be written.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, offset = [], 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array)
        parts.append(data.tobytes())
        header[name] = {
            "dtype": names[data.dtype],
            "shape": list(np.shape(array)),
            "data_offsets": [offset, offset + data.nbytes],
        }
        offset += data.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that arrays are aligned
    content = b"".join([len(text).to_bytes(8, "little"), text, *parts])
    storage.write(storage.absolute(path), content)
