"""Where bytes lie: local disks and buckets, `gs://bucket/path`, in the same words.

Every function takes both kinds of path. Beside it: `epaths` for the libraries that go to
buckets themselves, `lock` (who may write to a workdir) and `mirror` (a run's small files,
written locally and uploaded whole).
"""

from supcon_jax.storage.files import (
    PATIENCE_S,
    Path,
    absolute,
    exists,
    is_dir,
    is_file,
    is_remote,
    join,
    move,
    name,
    names,
    open_file,
    read,
    read_generation,
    read_ranges,
    read_text,
    remove,
    shown,
    size,
    swap,
    walk,
    write,
)

__all__ = [
    "PATIENCE_S",
    "Path",
    "absolute",
    "exists",
    "is_dir",
    "is_file",
    "is_remote",
    "join",
    "move",
    "name",
    "names",
    "open_file",
    "read",
    "read_generation",
    "read_ranges",
    "read_text",
    "remove",
    "shown",
    "size",
    "swap",
    "walk",
    "write",
]
