"""Folders of image files that show several classes each, told by a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from supcon_jax import storage
from supcon_jax.data.folders import (
    LABELS_CSV,
    Folder,
    folders_in,
    has_train,
    image_files,
    open_root,
)
from supcon_jax.data.names import TRAIN, find_split
from supcon_jax.data.sources import FileSource, LabelSets

COLUMNS = ("file", "labels")
# Between the labels of an image, and between a label and its weight.
SEPARATOR, WEIGHT = ";", "="
# name of a class -> weight
Labels = dict[str, float]


class _Table(NamedTuple):
    """A CSV file as it was read.

    Attributes:
      folder: where it lies.
      files: paths of its images, in order.
      rows: labels of each.
    """

    folder: Folder
    files: list[str]
    rows: list[Labels]


def open_multilabel(split: str, dir: str, root: str) -> FileSource:
    """`root/<split>/labels.csv` or, for the split "train" alone, `root/labels.csv`.

    The file has a header `file,labels` and a line for each image of its folder: the path
    from there, and the classes with ";" between them (`a.jpg,cat;dog`), with weights
    where they differ (`b.jpg,cat=0.7;dog=0.3`). Splits go by any of their usual names.

    Returns:
      A source whose labels number the sets of classes: those of the training split
      first, in the order of their classes, then those that another split has besides.

    Raises:
      ValueError: one line that says what is missing there, or which line is wrong.
    """
    del dir
    path = open_root(root)
    if not root or not path.is_dir():
        raise ValueError(
            f"data.name='multilabel' needs a folder with a {LABELS_CSV}; got {root!r} "
            "(--config.data.root)"
        )
    folders = folders_in(path)
    if not has_train(folders):
        if split.lower() not in TRAIN:
            raise ValueError(
                f"{path} has no folder 'train', so all of its {LABELS_CSV} is that split "
                f"and there is no split {split!r}; hold a share out with "
                "--config.data.validation_fraction=0.1"
            )
        table = train = _read(path)
    else:
        train_name, name = (find_split(part, folders) for part in ("train", split))
        train = _read(path / train_name)
        table = train if name == train_name else _read(path / name)
    return _number(table, train)


def _number(table: _Table, train: _Table) -> FileSource:
    """A split with numbers for the classes of the training split and for its sets.

    Raises:
      ValueError: it has a class that the training split lacks, or there is one alone.
    """
    names = sorted({name for labels in train.rows for name in labels})
    if len(names) < 2:
        raise ValueError(
            f"{train.folder / LABELS_CSV} names one class alone, {names[0]!r}, which "
            "leaves nothing to tell apart (--config.data.root)"
        )
    number = {name: position for position, name in enumerate(names)}
    foreign = sorted({name for labels in table.rows for name in labels} - {*names})
    if foreign:
        raise ValueError(
            f"{table.folder / LABELS_CSV} has the class {foreign[0]!r}, which "
            f"{train.folder / LABELS_CSV} lacks (--config.data.root)"
        )

    def sets(rows: list[Labels]) -> list[tuple[tuple[int, float], ...]]:
        return [tuple(sorted((number[n], w) for n, w in row.items())) for row in rows]

    own, known = sets(table.rows), sorted({*sets(train.rows)})
    known += sorted({*own} - {*known})
    place = {members: position for position, members in enumerate(known)}
    return FileSource(
        np.asarray(table.files),
        np.asarray([place[members] for members in own], np.int32),
        tuple(_set_name(members, names) for members in known),
        label_sets=LabelSets(tuple(names), tuple(known)),
    )


def _set_name(members: Sequence[tuple[int, float]], names: Sequence[str]) -> str:
    """As in the file: `cat;dog`, `cat=0.7;dog=0.3`."""
    return SEPARATOR.join(
        names[number] if weight == 1 else f"{names[number]}{WEIGHT}{weight:g}"
        for number, weight in members
    )


def _read(folder: Folder) -> _Table:
    """The CSV file of a folder, compared with the images that are there.

    Raises:
      ValueError: what is wrong with it, in one line.
    """
    where = folder / LABELS_CSV
    images, _ = image_files(folder)
    # Paths as the file has them, from its own folder on.
    known = {path[len(str(folder)) + 1 :]: path for path in images}
    table, seen = _Table(folder, [], []), dict[str, int]()
    for line, name, labels in _lines(_read_text(where), str(where)):
        problem = ""
        if name in seen:
            problem = f"{name!r} is there twice, first on line {seen[name]}"
        elif name not in known:
            problem = f"there is no image {name!r} in {folder}"
        if problem:
            raise _wrong(where, line, problem)
        seen[name] = line
        table.files.append(known[name])
        table.rows.append(labels)
    if missing := sorted(known.keys() - seen.keys()):
        more = f" and {len(missing) - 1:,} others" if len(missing) > 1 else ""
        raise ValueError(
            f"{where} has no line for {missing[0]!r}{more}; add one, or move the image "
            "out of the folder (--config.data.root)"
        )
    if not table.files:
        raise ValueError(f"{where} lists no images (--config.data.root)")
    return table


def _read_text(where: Folder) -> str:
    try:
        with storage.open_file(str(where)) as file:
            return file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(
            f"there is no {where}; it has the line '{','.join(COLUMNS)}' and then one for "
            "each image, 'a.jpg,cat;dog' (--config.data.root)"
        ) from None
    except OSError as error:
        raise ValueError(
            f"cannot read {where}: {error.strerror} (--config.data.root)"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is no UTF-8 text: {error.reason} at byte {error.start} "
            "(--config.data.root)"
        ) from None


def _lines(text: str, where: str) -> Iterator[tuple[int, str, Labels]]:
    """Number of a line, file and labels, for each image.

    Raises:
      ValueError: what is wrong with the header or a line.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = reader.fieldnames or ()
        for name in [n for n in columns if n not in COLUMNS][:1]:
            raise _wrong(
                where, 1, f"unknown column {name!r}; allowed: {', '.join(COLUMNS)}"
            )
        for name in [n for n in COLUMNS if columns.count(n) != 1][:1]:
            raise _wrong(where, 1, f"the header needs one column {name!r}")
        for row in reader:
            if None in row or None in row.values():
                problem = (
                    f"expected {len(COLUMNS)} fields; labels are separated by "
                    f"{SEPARATOR!r}, and a name with a comma stands in quotes"
                )
                raise _wrong(where, reader.line_num, problem)
            try:
                labels = _parse(row["labels"])
            except ValueError as error:
                name = row["file"]
                raise _wrong(where, reader.line_num, f"{name!r} {error}") from None
            yield reader.line_num, row["file"].strip().removeprefix("./"), labels
    except csv.Error as error:
        raise _wrong(where, reader.line_num, str(error)) from None


def _parse(text: str) -> Labels:
    """The labels of an image, `cat;dog` or `cat=0.7;dog=0.3`.

    Raises:
      ValueError: the end of a sentence that begins with the image's name.
    """
    labels: Labels = {}
    for part in filter(None, map(str.strip, text.split(SEPARATOR))):
        name, given, number = (x.strip() for x in part.partition(WEIGHT))
        try:
            weight = float(number) if given else 1.0
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < math.inf:
            raise ValueError(
                f"has the label {part!r}; allowed: a name, or name{WEIGHT}weight with a "
                "weight above 0"
            )
        if name in labels:
            raise ValueError(f"has the label {name!r} twice")
        labels[name] = weight
    if not labels:
        raise ValueError(
            "has no labels; name some, or leave out the line and move the image away"
        )
    return labels


def _wrong(where: object, line: int, problem: str) -> ValueError:
    return ValueError(f"{where} line {line}: {problem} (--config.data.root)")
