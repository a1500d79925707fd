"""Embeddings of every image in a folder, by the encoder of a finished run.

    python -m supcon_jax.tools.embed runs/linear_digits photos --out=features.npz
    python -m supcon_jax.tools.embed runs/supcon_folder photos --out=features.parquet

Folders in folders are searched too. What was done is kept beside the file, so the same
command goes on after a kill. Files that cannot be read are left out, listed at the end and in
`features.unreadable.csv`. docs/use.md says what the file holds.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from supcon_jax import storage
from supcon_jax.checkpoint import digest
from supcon_jax.cli import one_line_errors
from supcon_jax.data.folders import list_images
from supcon_jax.inference.model import Model, load_model
from supcon_jax.logs import progress, setup_logging
from supcon_jax.tools.arguments import check_out

# Images whose embeddings are kept in a file of their own until all are there.
PART = 1024
# Unreadable files that the terminal names; the file names all.
SHOWN = 20


class Part(NamedTuple):
    """Some images of the folder, in order.

    Attributes:
      names: of the files that could be read, relative to the folder.
      embeddings: `[n, D]` of them.
      failed: name -> why it cannot be read.
    """

    names: list[str]
    embeddings: np.ndarray
    failed: dict[str, str]


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, embeds what is not done yet and writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("workdir", help="of a finished run")
    parser.add_argument("folder", help="of images, with all folders in it")
    parser.add_argument(
        "--out", default="features.npz", help="the file to write: .npz or .parquet"
    )
    options = parser.parse_args(arguments)
    with one_line_errors():
        setup_logging()
        check_out(options.out)
        write = writer_of(options.out)
        files = list_images(options.folder)
        model = load_model(options.workdir)
        embed(model, options.folder, files, options.out, write)


def writer_of(out: str) -> Callable[..., None]:
    """What writes a file of this name.

    Raises:
      ValueError: nothing does, or pyarrow is not installed.
    """
    if storage.is_remote(out):
        raise ValueError(f"got --out={out}; allowed: a file on a local disk")
    suffix = pathlib.PurePath(out).suffix
    if suffix == ".npz":
        return write_npz
    if suffix != ".parquet":
        raise ValueError(
            f"got --out={out}; allowed: names that end in .npz or .parquet"
        )
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"got --out={out}, and pyarrow is not installed; pip install pyarrow, or "
            f"--out={out.removesuffix(suffix)}.npz"
        )
    return write_parquet


def embed(
    model: Model, folder: str, files: list[str], out: str, write: Callable[..., None]
) -> None:
    """Embeds files part by part, and writes all of them when the last is there."""
    facts = describe(model, folder, files)
    if storage.is_file(out):
        raise ValueError(
            f"{out} is there already; remove it, or give another name (--out)"
        )
    parts = pathlib.Path(f"{out}.parts")
    count = -(-len(files) // PART)
    done = _open_parts(parts, facts, count)
    begun = f"; {min(len(done) * PART, len(files)):,} are done" if done else ""
    print(f"{len(files):,} images in {folder}{begun}", flush=True)
    todo = [number for number in range(count) if number not in done]
    for number in progress(todo, total=len(todo), label="embedding"):
        some = files[number * PART : (number + 1) * PART]
        _write_part(parts / f"{number}.npz", embed_part(model, folder, some))
    _finish(out, write, [parts / f"{number}.npz" for number in range(count)], facts)
    shutil.rmtree(parts)


def embed_part(model: Model, folder: str, files: list[str]) -> Part:
    """The embeddings of some files; those that cannot be read are left out."""
    found: list[np.ndarray] = []
    failed: dict[str, str] = {}
    for pixels, some in model.prepare(files):
        failed |= some
        if len(pixels):
            found.append(model.encode(pixels))
    names = [_text(path, folder) for path in files if path not in failed]
    return Part(
        names=names,
        embeddings=np.concatenate(found) if found else np.zeros((0, 0), np.float32),
        failed={_text(path, folder): why for path, why in failed.items()},
    )


def _text(path: str, folder: str) -> str:
    """A file's name inside the folder as text: what is not UTF-8 in it is escaped."""
    return relative(path, folder).encode(errors="backslashreplace").decode()


def relative(path: str, folder: str) -> str:
    """A file's name inside the folder."""
    start = storage.absolute(folder).rstrip("/") + "/"
    return storage.absolute(path).removeprefix(start)


def describe(model: Model, folder: str, files: list[str]) -> dict[str, Any]:
    """What the embeddings depend on; a file says so, and parts of others are not taken."""
    data = model.config.data
    sha = hashlib.sha256()
    for path in files:
        size = 0 if storage.is_remote(path) else storage.size(path)
        sha.update(os.fsencode(f"{relative(path, folder)} {size}\n"))
    return {
        "workdir": storage.absolute(model.workdir),
        "step": model.trained.step,
        "encoder": digest(model.trained.variables["encoder"]),
        "image_size": data.image_size,
        "eval_resize": data.eval_resize,
        "mean": list(data.mean),
        "std": list(data.std),
        "files": sha.hexdigest(),
    }


def _open_parts(parts: pathlib.Path, facts: dict[str, Any], count: int) -> set[int]:
    """The numbers of the parts that are done; a folder of others begins anew."""
    described = parts / "facts.json"
    try:
        theirs = json.loads(described.read_text())
    except (OSError, ValueError):
        theirs = None
    if theirs != facts:
        if theirs is not None:
            print(f"{parts} is of other images or another run: begun anew")
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
        storage.write(described, json.dumps(facts).encode())
    return {n for n in range(count) if (parts / f"{n}.npz").is_file()}


def _write_part(path: pathlib.Path, part: Part) -> None:
    content = io.BytesIO()
    np.savez(
        content,
        names=json.dumps(part.names),
        embeddings=part.embeddings,
        failed=json.dumps(part.failed),
    )
    storage.write(path, content.getvalue())


def _read_part(path: pathlib.Path) -> Part:
    with np.load(path, allow_pickle=False) as file:
        return Part(
            json.loads(str(file["names"])),
            file["embeddings"],
            json.loads(str(file["failed"])),
        )


def _finish(
    out: str,
    write: Callable[..., None],
    paths: list[pathlib.Path],
    facts: dict[str, Any],
) -> None:
    """Joins the parts, and says which files are missing and why."""
    failed: dict[str, str] = {}
    count = 0
    for part in map(_read_part, paths):
        failed |= part.failed
        count += len(part.names)
    if not count:
        raise ValueError(
            f"none of the {len(failed):,} images can be read: {_reasons(failed)[0]}"
        )
    write(out, (part for part in map(_read_part, paths) if part.names), facts)
    print(f"wrote {storage.shown(out)}: {count:,} images")
    if failed:
        listed = f"{os.path.splitext(out)[0]}.unreadable.csv"
        table = io.StringIO()
        csv.writer(table).writerows([("file", "reason"), *failed.items()])
        storage.write(listed, table.getvalue().encode())
        print(f"left out, because they cannot be read: {len(failed):,} files")
        print(*(f"  {line}" for line in _reasons(failed)[:SHOWN]), sep="\n")
        print(f"all of them: {storage.shown(listed)}")


def _reasons(failed: dict[str, str]) -> list[str]:
    return [f"{name}: {why}" for name, why in failed.items()]


def write_npz(out: str, parts: Iterator[Part], facts: dict[str, Any]) -> None:
    """`names` `[n]`, `embeddings` `[n, D]` and `facts`, JSON."""
    all_parts = list(parts)
    content = io.BytesIO()
    np.savez(
        content,
        names=np.asarray([name for part in all_parts for name in part.names]),
        embeddings=np.concatenate([part.embeddings for part in all_parts]),
        facts=json.dumps(facts),
    )
    storage.write(out, content.getvalue())


def write_parquet(out: str, parts: Iterator[Part], facts: dict[str, Any]) -> None:
    """Columns `file` and `embedding` (a list of D float32); a row group a part."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary, writer = f"{out}.tmp", None
    for part in parts:
        width = part.embeddings.shape[1]
        schema = pa.schema(
            [("file", pa.string()), ("embedding", pa.list_(pa.float32(), width))],
            metadata={"supcon_jax": json.dumps(facts)},
        )
        flat = pa.array(part.embeddings.ravel(), pa.float32())
        columns = [
            pa.array(part.names, pa.string()),
            pa.FixedSizeListArray.from_arrays(flat, width),
        ]
        writer = writer or pq.ParquetWriter(temporary, schema)
        writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    assert writer is not None
    writer.close()
    os.replace(temporary, out)


if __name__ == "__main__":
    main()
