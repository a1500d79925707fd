"""What `torch.save` wrote, without PyTorch and without running what a pickle asks for.

A pickle is a program: it names functions of any module, and loading it calls them. The
reader here knows the few that describe tensors and has inert ones in their place; any
other name ends it before anything is called.

Since PyTorch 1.6 such a file is a ZIP with the pickle in `*/data.pkl` and each storage,
little-endian, in `*/data/<key>`. Before, it was five parts in a row: three pickles (a magic
number, a version, facts of the machine), the pickle, one with the keys of the storages, and
then each storage after its number of elements.

Source: github.com/pytorch/pytorch, torch/serialization.py, torch/_utils.py.
"""

from __future__ import annotations

import collections
import functools
import io
import operator
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# Where training programs put the state dict among other things, the first one found.
NESTED = ("state_dict", "model", "model_state_dict", "net", "network", "encoder")


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Stands for what is no tensor, as a run's options; remembers nothing of it."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _first(value: Any, *_: Any) -> Any:
    return value


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch", "Size"): tuple,
    # Names: a pickle can change what objects it gets.
    **{("torch", name): name for name in _STORAGES},
    # Options of a run and scores, which checkpoints hold beside the weights.
    ("argparse", "Namespace"): _Inert,
    ("numpy", "dtype"): _Inert,
    ("numpy.core.multiarray", "scalar"): _Inert,
    ("numpy._core.multiarray", "scalar"): _Inert,
    ("_codecs", "encode"): _Inert,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise ValueError(
                f"its pickle would use {module}.{name}, and may run code with it; nothing "
                "was run; allowed: tensors alone, as torch.save(model.state_dict(), ...) "
                "or a .safetensors file has them"
            )
        return _KNOWN[module, name]

    def persistent_load(self, place: Any) -> _Storage:
        kind, dtype, key, _, count, *view = place
        if kind != "storage" or dtype not in _STORAGES or any(view):
            raise ValueError(f"its pickle refers to {place!r}, which is no storage")
        return _Storage(str(key), _STORAGES[dtype], int(count))


def read_pickled(content: bytes) -> dict[str, np.ndarray]:
    """The state dict in a file of PyTorch's, at the top or under one of `NESTED`.

    Args:
      content: of the file.

    Raises:
      ValueError: in one line: the pickle asks for more than tensors, the file is damaged,
        or there is no state dict in it.
    """
    if content[:2] not in (b"PK", b"\x80\x02"):
        raise ValueError(
            "it is neither a safetensors file nor one that PyTorch saved, or is cut off"
        )
    try:
        read = _read_zip if content[:2] == b"PK" else _read_in_a_row
        tree, storages = read(content)
        tensors = {
            str(name): value
            for name, value in _state_dict(tree).items()
            if isinstance(value, _Tensor)
        }
        return {name: _array(value, storages) for name, value in tensors.items()}
    except ValueError:
        raise
    # What a damaged pickle raises is not bounded by a list.
    except Exception as error:
        raise ValueError(
            f"it is damaged, or no file of PyTorch's ({type(error).__name__}: {error})"
        ) from None


def _read_zip(content: bytes) -> tuple[Any, dict[str, memoryview]]:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        names = file.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it is a ZIP file without the data.pkl of torch.save")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and file.read(f"{root}byteorder") != b"little":
            raise ValueError("it was saved on a big-endian machine")
        tree = _Reader(io.BytesIO(file.read(pickles[0]))).load()
        folder = f"{root}data/"
        storages = {
            name.removeprefix(folder): memoryview(file.read(name))
            for name in names
            if name.startswith(folder)
        }
    return tree, storages


def _read_in_a_row(content: bytes) -> tuple[Any, dict[str, memoryview]]:
    stream, found = io.BytesIO(content), {}

    class _Noting(_Reader):
        def persistent_load(self, place: Any) -> _Storage:
            storage = super().persistent_load(place)
            found[storage.key] = storage
            return storage

    if _Reader(stream).load() != _MAGIC:
        raise ValueError("it is a pickle, but not one of torch.save")
    _Reader(stream).load(), _Reader(stream).load()  # version, machine
    tree = _Noting(stream).load()
    keys = _Reader(stream).load()
    storages, at = {}, stream.tell()
    for key in map(str, keys):
        size = found[key].length * found[key].dtype.itemsize
        storages[key] = memoryview(content)[at + 8 : at + 8 + size]
        at += 8 + size
    return tree, storages


def _state_dict(tree: Any) -> Mapping[Any, Any]:
    """The first dictionary of tensors on the way down."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"it holds a {type(tree).__name__}, no dictionary of tensors")
    for key in NESTED:
        if isinstance(tree.get(key), Mapping):
            return _state_dict(tree[key])
    if not any(isinstance(value, _Tensor) for value in tree.values()):
        raise ValueError(
            f"it holds no tensors, but {', '.join(map(repr, list(tree)[:5]))}; allowed: "
            f"a state dict, or one under {', '.join(map(repr, NESTED))}"
        )
    return tree


def _array(tensor: _Tensor, storages: dict[str, memoryview]) -> np.ndarray:
    """The values of a tensor, copied out of its storage."""
    (key, dtype, length), offset, shape, strides = tensor
    size = functools.reduce(operator.mul, shape, 1)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    within = all(n >= 0 for n in shape) and all(s >= 0 for s in strides)
    # More elements than are stored would let a small file fill the memory.
    if offset < 0 or not within or size > length:
        raise ValueError(f"it is damaged: a tensor {shape} of {length} elements")
    if len(storages[key]) < length * dtype.itemsize or (size and last >= length):
        raise ValueError(f"it is damaged: a tensor {shape} lies outside of its storage")
    values = np.frombuffer(storages[key], dtype, length)[offset:]
    steps = tuple(step * dtype.itemsize for step in strides)
    return np.lib.stride_tricks.as_strided(values, shape, steps).copy()
