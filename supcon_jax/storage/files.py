"""Where bytes lie: local disks and buckets. The only file that knows which is which.

A path is a local one or a URL, `gs://bucket/path`, and every function takes both. Buckets
are read and written through tensorstore, which comes with Orbax and is imported when the
first URL is met. Whatever goes wrong is an OSError with a `strerror` for the user:
FileNotFoundError, PermissionError, or ConnectionError where a bucket did not answer for
`PATIENCE_S` seconds, in which every request is tried again, with a word about it.

A bucket has no folders: a folder is there while an object's name begins with it. It has no
append and no rename either: objects are written whole, and are there whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import pathlib
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")
Path = str | os.PathLike[str]
SCHEMES = ("gs://",)
# How long a bucket that does not answer is tried, and from when on a word is said.
PATIENCE_S, WORD_AFTER_S = 180.0, 5.0
# Ranges, or objects, that are asked for at the same time.
AT_ONCE = 64


def is_remote(path: Path) -> bool:
    """Whether a path is a URL of a bucket.

    Raises:
      ValueError: it looks like a URL, and is none that can be read.
    """
    text = os.fspath(path)
    match = re.match(r"([a-zA-Z][\w+.-]*):/", text)
    if not match:
        return False
    if text.startswith(SCHEMES):
        bucket = text.split("/")[2]
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
            raise ValueError(
                f"got {text!r}; {bucket!r} is no name of a bucket: expected "
                "gs://BUCKET/PATH, the bucket in small letters, digits, '-', '_' and '.'"
            )
        if "?" in text or "#" in text:
            raise ValueError(f"got {text!r}; a path in a bucket has no '?' and no '#'")
        return True
    if text.startswith(f"{match[1]}://") or match[1].lower() in ("gs", "gcs", "s3"):
        raise ValueError(
            f"got {text!r}; allowed: local paths and {', '.join(SCHEMES)}BUCKET/PATH"
        )
    return False


def absolute(path: Path) -> str:
    """The path in full: `~` and the current folder filled in, no slash at its end."""
    if is_remote(path):
        return re.sub(r"(?<!:)(?<!^)/+", "/", os.fspath(path)).rstrip("/")
    return os.path.abspath(os.path.expanduser(path))


def join(path: Path, *parts: str) -> str:
    """A path inside a folder."""
    if is_remote(path):
        return "/".join([absolute(path), *(part.strip("/") for part in parts)])
    return os.path.join(os.fspath(path), *parts)


def name(path: Path) -> str:
    """The last part of a path."""
    return os.fspath(path).rstrip("/").rpartition("/")[2]


def exists(path: Path) -> bool:
    """Whether there is a file or a folder."""
    if not is_remote(path):
        return os.path.exists(path)
    return is_file(path) or is_dir(path)


def is_file(path: Path) -> bool:
    """Whether there is a file."""
    if not is_remote(path):
        return os.path.isfile(path)
    store, key = _open(path)
    # No bytes of it are asked for, only whether it is there.
    return _ask(path, lambda: store.read(key, byte_range=slice(0, 0))).state == "value"


def is_dir(path: Path) -> bool:
    """Whether there is a folder."""
    return bool(_keys(path)) if is_remote(path) else os.path.isdir(path)


def names(path: Path) -> list[str]:
    """The names of the files and folders of a folder, sorted; empty without one.

    In a bucket everything below it is listed for that; `walk` gives it all at once.
    """
    if is_remote(path):
        return sorted({key.partition("/")[0] for key in _keys(path)})
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def walk(path: Path) -> list[str]:
    """The paths of all files below a folder, relative to it, sorted."""
    if is_remote(path):
        return sorted(_keys(path))
    return sorted(
        os.path.relpath(os.path.join(where, file), path)
        for where, _, files in os.walk(path)
        for file in files
    )


def size(path: Path) -> int:
    """Bytes of a file."""
    if not is_remote(path):
        return os.stat(path).st_size
    store, key = _open(path)
    if _ask(path, lambda: store.read(key, byte_range=slice(0, 0))).state != "value":
        raise _error(errno.ENOENT, "there is nothing of that name", path)
    # tensorstore tells no object's length. So it is searched for with reads of a byte, 64
    # at once: first its power of two, then ever finer.
    low, high, places = 0, 2**62, [2**power - 1 for power in range(62)]
    while low < high:
        there = _have(store, key, path, places)
        low = max([low, *(at + 1 for at in places[:there])])
        high = min([high, *places[there:]])
        step = max((high - low) // AT_ONCE, 1)
        places = list(range(low, high, step))
    return low


def read(path: Path) -> bytes:
    """A whole file."""
    if not is_remote(path):
        with open(path, "rb") as file:
            return file.read()
    store, key = _open(path)
    return _content(path, _ask(path, lambda: store.read(key)))


def open_file(path: Path) -> BinaryIO:
    """A file to read from; one in a bucket is read whole into memory."""
    return io.BytesIO(read(path)) if is_remote(path) else open(path, "rb")


def read_text(path: Path) -> str:
    """A whole file as text; what is no UTF-8 is replaced."""
    return read(path).decode(errors="replace")


def read_ranges(path: Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes `start ... stop - 1` of a file, for each `(start, stop)`; in parallel.

    Raises:
      OSError: the file ends before a range does.
    """
    if is_remote(path):
        store, key = _open(path)
        results = _ask_all(
            path,
            [
                functools.partial(store.read, key, byte_range=slice(start, stop))
                for start, stop in ranges
            ],
        )
        found = [_content(path, result) for result in results]
    else:
        with open(path, "rb", buffering=0) as file:
            found = [os.pread(file.fileno(), b - a, a) for a, b in ranges]
    for data, (start, stop) in zip(found, ranges, strict=True):
        if len(data) != stop - start:
            raise _error(errno.EIO, "ends before the bytes that were asked for", path)
    return found


def write(path: Path, data: bytes) -> None:
    """Writes a file whole: readers see the old content or the new one, never a part."""
    if is_remote(path):
        store, key = _open(path)
        _ask(path, lambda: store.write(key, data))
        return
    # Of this process alone: hosts that share a folder may write the same file at once.
    writer = f"{socket.gethostname()}.{os.getpid()}"
    temporary = pathlib.Path(f"{os.fspath(path)}.{writer}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_generation(path: Path) -> tuple[bytes | None, bytes]:
    """An object of a bucket, None where there is none, and which version of it that is."""
    store, key = _open(path)
    found = _ask(path, lambda: store.read(key))
    return (found.value if found.state == "value" else None), found.stamp.generation


def swap(path: Path, data: bytes | None, generation: bytes) -> bytes | None:
    """Writes an object, or removes it, where its version is still the one that was read.

    Returns:
      The version that was written; None where somebody else has written since.
    """
    store, key = _open(path)
    stamp = _ask(path, lambda: store.write(key, data, if_equal=generation))
    return stamp.generation or None


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it; nothing where there is none."""
    if is_remote(path):
        store, key = _open(path)
        below = [f"{key.rstrip('/')}/{found}" for found in _keys(path)]
        deletes = [
            functools.partial(store.write, found, None) for found in [key, *below]
        ]
        _ask_all(path, deletes)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def move(source: Path, target: Path) -> None:
    """Gives a file or a folder another name; in a bucket by copying it."""
    if not is_remote(source):
        os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        os.rename(source, target)
        return
    for found in walk(source):
        write(join(target, found), read(join(source, found)))
    remove(source)


def shown(path: Path) -> str:
    """The path as it is shown to people: relative where it is local."""
    return absolute(path) if is_remote(path) else os.path.relpath(path)


@functools.cache
def _store(bucket: str) -> Any:
    import tensorstore as ts

    # It would be silent for many minutes by itself: `_ask` tries again, and says so.
    context = ts.Context({"gcs_request_retries": {"max_retries": 2}})
    return ts.KvStore.open(f"{bucket}/", context=context).result()


def _open(path: Path) -> tuple[Any, str]:
    """The bucket of a URL, and the name in it."""
    scheme, _, rest = absolute(path).partition("://")
    bucket, _, key = rest.partition("/")
    return _store(f"{scheme}://{bucket}"), key


def _keys(path: Path) -> list[str]:
    """The names of all objects below a URL, relative to it."""
    import tensorstore as ts

    store, key = _open(path)
    folder = f"{key}/" if key else ""
    # "0" is the letter after "/".
    everything = ts.KvStore.KeyRange(folder, f"{key}0" if key else "")
    found = _ask(path, lambda: store.list(everything, strip_prefix_length=len(folder)))
    if not found:
        # Without permission tensorstore finds nothing, and says nothing; a read does.
        _ask(path, lambda: store.read(folder or "nothing"))
    return [name for name in (key.decode() for key in found) if name]


def _have(store: Any, key: str, path: Path, places: list[int]) -> int:
    """How many of some places, in order, lie inside an object."""

    def has(at: int) -> bool:
        try:
            request = functools.partial(store.read, key, byte_range=slice(at, at + 1))
            return _ask(path, request).state == "value"
        except OSError as error:
            if isinstance(error, ConnectionError | PermissionError):
                raise
            return False

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(has, places))


def _content(path: Path, result: Any) -> bytes:
    if result.state != "value":
        raise _error(errno.ENOENT, "there is nothing of that name", path)
    return result.value


def _ask(path: Path, request: Callable[[], Any]) -> Any:
    return _ask_all(path, [request])[0]


def _ask_all(path: Path, requests: Sequence[Callable[[], Any]]) -> list[Any]:
    """The answers to requests that run at once, each tried again for `PATIENCE_S`."""
    answers: list[Any] = []
    for some in _groups(requests, AT_ONCE):
        futures = [request() for request in some]
        answers += [
            _answer(path, future, request)
            for future, request in zip(futures, some, strict=True)
        ]
    return answers


def _answer(path: Path, future: Any, request: Callable[[], Any]) -> Any:
    start, told = time.monotonic(), False
    while True:
        try:
            answer = future.result()
        except ValueError as error:  # tensorstore has no other class
            reason = _why(path, error)
            waited = time.monotonic() - start
            if not isinstance(reason, ConnectionError) or waited > PATIENCE_S:
                raise reason from None
            if not told and waited > WORD_AFTER_S:
                told = True
                logger.warning(
                    "warning: %s: %s; trying again for %.0f s",
                    os.fspath(path),
                    reason.strerror,
                    PATIENCE_S,
                )
            time.sleep(0.5)
            future = request()
        else:
            if told:
                waited = time.monotonic() - start
                logger.info("%s answers again after %.0f s", os.fspath(path), waited)
            return answer


def _why(path: Path, error: ValueError) -> OSError:
    """What tensorstore says, as an error that the rest of the program knows."""
    text = str(error)
    kind, _, said = text.partition(": ")
    said = re.sub(r"\s*\[http_response.*|\s*\[curl_code.*", "", said, flags=re.DOTALL)
    if kind == "NOT_FOUND":
        bucket = "/".join(absolute(path).split("/")[:3])
        return _error(errno.ENOENT, f"there is no bucket {bucket}", path)
    if kind in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
        return _error(
            errno.EACCES,
            f"no permission ({said}); give this machine's service account access to the "
            "bucket, or run `gcloud auth application-default login`",
            path,
        )
    if kind in ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "UNKNOWN"):
        said = re.sub(r"All \d+ retry attempts failed: |CURL error ", "", said)
        return ConnectionError(
            errno.EHOSTUNREACH,
            f"the bucket does not answer ({said.rpartition(': ')[2]})",
            os.fspath(path),
        )
    if re.search("byte range|Range Not Satisfiable", text):
        said = "ends before the bytes that were asked for"
    return _error(errno.EIO, said or text, path)


def _error(number: int, message: str, path: Path) -> OSError:
    return OSError(number, message, os.fspath(path))


def _groups(items: Iterable[T], length: int) -> Iterator[list[T]]:
    rest = list(items)
    for start in range(0, len(rest), length):
        yield rest[start : start + length]
