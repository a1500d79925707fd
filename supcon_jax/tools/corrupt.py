"""Makes corrupted versions of an evaluation split: 15 corruptions at five severities.

    python -m supcon_jax.tools.corrupt --config=configs/digits.py --out=runs/digits_c
    python -m supcon_jax.tools.corrupt --config=configs/supcon_r50.py \\
        --config.data.dir=DIR --out=FOLDER --corruptions=fog,snow

Images are cropped as the evaluation crops them, then corrupted. `mode="robustness"` reads
the folder (docs/evaluation.md). Small splits become `fog_3.npz` and so on, larger ones PNG
files, `fog/3/CLASS/NUMBER.png`. What is there already and whole is kept, so the same command
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np

from supcon_jax import storage
from supcon_jax.cli import one_line_errors
from supcon_jax.config.loading import load_config
from supcon_jax.data.corrupted import MANIFEST, check_corruptions, split_name
from supcon_jax.data.corruptions import SMALLEST, corrupt, corrupt_many
from supcon_jax.data.identity import identify
from supcon_jax.data.pipeline import Batch, eval_batches, num_eval_batches
from supcon_jax.data.sources import Source
from supcon_jax.evaluation.corruption import CORRUPTIONS, SEVERITIES
from supcon_jax.figures import draw_corruptions
from supcon_jax.logs import progress, setup_logging
from supcon_jax.run.splits import open_eval_source
from supcon_jax.tools.arguments import create_parser, parse

# A split of up to so many bytes is held in memory and becomes one file a severity.
ARRAYS_BYTES = 2**28
# One of up to so many is made before other processes would have started.
ALONE_BYTES = 2**22
# Images that one process corrupts at a time.
CHUNK = 64
# Of the corruptions; another one makes other images.
VERSION = 1
LAYOUTS = ("auto", "arrays", "folders")
# A source -> its batches; `map`, or that of a pool of processes.
Batches = Callable[[Source], Iterable[Batch]]
Map = Callable[..., Iterable[Any]]


class Job(NamedTuple):
    """What is to be made.

    Attributes:
      out: the folder.
      seed: of all random numbers.
      pairs: corruptions with their severities, in the order of the benchmark.
      folders: names of the classes' folders; () where each pair is one file.
    """

    out: str
    seed: int
    pairs: tuple[tuple[str, int], ...]
    folders: tuple[str, ...]


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and makes what is missing."""
    parser = create_parser(__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--severities", default="1,2,3,4,5", help="which, 1 to 5")
    parser.add_argument(
        "--corruptions", default=",".join(CORRUPTIONS), help="which; all 15"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="auto", help=".npz or PNG files; by size"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes; one a core for large splits"
    )
    parser.add_argument("--example", type=int, default=0, help="image of the picture")
    options, changes = parse(parser, arguments)
    setup_logging()
    with one_line_errors():
        make(load_config(options.config, changes), options)


def make(config: Any, options: argparse.Namespace) -> None:
    """Makes the folder and its picture; says what was kept.

    Raises:
      ValueError: options, data or a folder that cannot be used, in one line.
    """
    pairs = _pairs(options)
    size = config.data.image_size
    if size < SMALLEST:
        raise ValueError(
            f"got data.image_size={size}; allowed: at least {SMALLEST} "
            "(--config.data.image_size)"
        )
    source = open_eval_source(config)
    count = source.num_examples
    if not 0 <= options.example < count:
        raise ValueError(
            f"got example {options.example}; allowed: 0 to {count - 1} (--example)"
        )
    num_bytes = count * size * size * 3
    folders = options.layout == "folders" or (
        options.layout == "auto" and num_bytes > ARRAYS_BYTES
    )
    job = Job(
        storage.absolute(options.out),
        options.seed,
        pairs,
        _class_folders(source) if folders else (),
    )
    _check_folder(job, config, source)
    batches = functools.partial(
        eval_batches,
        batch_size=CHUNK,
        image_size=size,
        resize=config.data.eval_resize,
    )
    make_all = _make_folders if folders else _make_arrays
    cores = (os.cpu_count() or 1) if num_bytes > ALONE_BYTES else 1
    with _pool(options.workers or cores) as run:
        counts = list(make_all(job, source, batches, run))
    kept, made = map(sum, zip(*counts, strict=True))
    _draw(job, batches(source.take_rows(np.array([options.example]))), options.example)
    files = "images" if folders else "files"
    print(f"{job.out}: {made:,} {files} made, {kept:,} kept")
    for name in source.unreadable.reasons:
        print(f"left out, it cannot be decoded: {name}")


def _pairs(options: argparse.Namespace) -> tuple[tuple[str, int], ...]:
    corruptions = options.corruptions.split(",")
    try:
        check_corruptions(corruptions)
    except ValueError as error:
        raise ValueError(f"{error} (--corruptions)") from None
    severities = options.severities.split(",")
    for severity in severities:
        if severity not in map(str, SEVERITIES):
            raise ValueError(
                f"got severity {severity!r}; allowed: 1 to 5, with commas between "
                "(--severities)"
            )
    for key in ("seed", "workers"):
        if getattr(options, key) < 0:
            raise ValueError(
                f"got {key} {getattr(options, key)}; allowed: at least 0 (--{key})"
            )
    return tuple(
        (corruption, severity)
        for corruption in CORRUPTIONS
        for severity in SEVERITIES
        if corruption in corruptions and str(severity) in severities
    )


def _class_folders(source: Source) -> tuple[str, ...]:
    """A folder for each class: its name, or its number where a name is no folder's."""
    names = source.class_names
    plain = all(re.fullmatch(r"\w[\w.+ -]*", name) for name in names)
    if len(names) == source.num_classes and plain and len({*names}) == len(names):
        return tuple(names)
    return tuple(f"{number:05d}" for number in range(source.num_classes))


def _check_folder(job: Job, config: Any, source: Source) -> None:
    """Notes what the folder is made of, or refuses one that is of something else.

    Raises:
      ValueError: naming what differs.
    """
    ours = {
        "version": VERSION,
        "seed": job.seed,
        "data": identify(source),
        "image_size": config.data.image_size,
        "eval_resize": config.data.eval_resize,
        "layout": "folders" if job.folders else "arrays",
        "classes": list(job.folders),
    }
    path = storage.join(job.out, MANIFEST)
    if storage.is_file(path):
        theirs = json.loads(storage.read(path))
        for key, value in ours.items():
            if theirs.get(key) != value:
                raise ValueError(
                    f"{job.out} was made with {key} {theirs.get(key)}, now {value}; use "
                    "another --out"
                )
        return
    if storage.exists(job.out) and storage.names(job.out):
        raise ValueError(f"{job.out} holds other files; use another --out")
    try:
        if not storage.is_remote(job.out):
            os.makedirs(job.out, exist_ok=True)
        storage.write(path, (json.dumps(ours, indent=2) + "\n").encode())
    except OSError as error:
        raise ValueError(
            f"cannot write to {job.out}: {error.strerror} (--out)"
        ) from None


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[Map]:
    """`map` over processes; in this one where there is one worker."""
    if workers == 1:
        yield map
        return
    # Forked processes would share the threads of JAX, which does not bear it.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context)
    try:
        yield executor.map
    finally:
        executor.shutdown(cancel_futures=True)


def _make_arrays(
    job: Job, source: Source, batches: Batches, run: Map
) -> Iterator[tuple[int, int]]:
    """One .npz file a corruption and severity; yields how many were kept and made."""
    parts = []
    for number, batch in enumerate(batches(source)):
        rows = np.flatnonzero(batch["mask"])
        images, labels = batch["image"][rows, 0], batch["label"][rows]
        parts.append((images, labels, rows + number * CHUNK))
    images, labels, examples = (np.concatenate(p) for p in zip(*parts, strict=True))
    for corruption, severity in progress(
        job.pairs, total=len(job.pairs), label="corrupting"
    ):
        path = storage.join(job.out, f"{split_name(corruption, severity)}.npz")
        if _is_whole(path, _check_npz):
            yield 1, 0
            continue
        work = functools.partial(
            corrupt_many, corruption=corruption, severity=severity, seed=job.seed
        )
        starts = range(0, len(images), CHUNK)
        chunks = (
            [column[at : at + CHUNK] for at in starts] for column in (images, examples)
        )
        content = io.BytesIO()
        np.savez(
            content,
            images=np.concatenate(list(run(work, *chunks))),
            labels=labels,
            num_classes=source.num_classes,
            class_names=np.asarray(source.class_names, str),
        )
        storage.write(path, content.getvalue())
        yield 0, 1


def _make_folders(
    job: Job, source: Source, batches: Batches, run: Map
) -> Iterator[tuple[int, int]]:
    """One PNG file an image, corruption and severity; yields as `_make_arrays`."""
    work = functools.partial(_write_files, job=job)
    for number, batch in progress(
        enumerate(batches(source)),
        total=num_eval_batches(source, CHUNK),
        label="corrupting, batches",
    ):
        rows = np.flatnonzero((batch["mask"] > 0) & (batch["label"] >= 0))
        examples = (rows + number * CHUNK).tolist()
        yield from run(work, batch["image"][rows, 0], batch["label"][rows], examples)


def _write_files(
    image: np.ndarray, label: int, example: int, *, job: Job
) -> tuple[int, int]:
    """All corruptions of one image; how many files were kept and made."""
    from PIL import Image

    made = 0
    for corruption, severity in job.pairs:
        folder = storage.join(job.out, corruption, str(severity), job.folders[label])
        path = storage.join(folder, f"{example:08d}.png")
        if _is_whole(path, _check_png):
            continue
        changed = corrupt(image, corruption, severity, seed=job.seed, example=example)
        content = io.BytesIO()
        Image.fromarray(changed).save(content, "PNG")
        if not storage.is_remote(folder):
            os.makedirs(folder, exist_ok=True)
        storage.write(path, content.getvalue())
        made += 1
    return len(job.pairs) - made, made


def _is_whole(path: str, check: Callable[[Any], None]) -> bool:
    """Whether a file is there with all its bytes as they were written."""
    if not storage.is_file(path):
        return False
    try:
        with storage.open_file(path) as file:
            check(file)
    except (OSError, EOFError, SyntaxError, ValueError, BadZipFile, zlib.error):
        return False
    return True


def _check_npz(file: Any) -> None:
    with ZipFile(file) as archive:
        if archive.testzip() is not None:
            raise BadZipFile


def _check_png(file: Any) -> None:
    from PIL import Image

    with Image.open(file) as image:
        image.verify()  # of the checksum of every chunk


def _draw(job: Job, batches: Iterable[Batch], example: int) -> None:
    """The picture of one image under everything that was made."""
    image = next(iter(batches))["image"][0, 0]
    corrupted: dict[str, dict[int, np.ndarray]] = {}
    for corruption, severity in job.pairs:
        changed = corrupt(image, corruption, severity, seed=job.seed, example=example)
        corrupted.setdefault(corruption, {})[severity] = changed
    picture = draw_corruptions(image, corrupted)
    if picture is not None:
        path = storage.join(job.out, "corruptions.png")
        storage.write(path, picture)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
