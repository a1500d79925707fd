"""Folders of image files, one folder a class."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from supcon_jax import storage
from supcon_jax.data.names import TEST, TRAIN, VALIDATION, find_split, is_split
from supcon_jax.data.sources import UNLABELLED, FileSource

logger = logging.getLogger(__name__)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# What notebooks, file managers and network disks leave behind is no data.
HIDDEN_PREFIXES = (".", "@")
HIDDEN_NAMES = ("__MACOSX",)
# What says which classes each image shows, where that may be several (multilabel.py).
LABELS_CSV = "labels.csv"
# Beside the folder of the training images, others that have no label.
UNLABELLED_NAMES = ("unlabelled", "unlabeled")


def open_folder(split: str, dir: str, root: str) -> FileSource:
    """`root/<split>/<class>/...` or, for the split "train" alone, `root/<class>/...`.

    Splits go by any of their usual names (`names.find_split`), and both may lie one
    folder further down. Images anywhere in `root/unlabelled/` join the training images of
    `root/train/`, without a label. Links are followed, but not in circles.

    Raises:
      ValueError: one line that says what is missing there.
    """
    del dir
    path = _open_given(root)
    folders = folders_in(path)
    if not has_train(folders):
        if folders and all(is_split(n) or _is_unlabelled(n) for n in folders):
            raise ValueError(
                f"{path} has {', '.join(folders)} and no folder 'train' "
                "(--config.data.root)"
            )
        if splits := [name for name in folders if is_split(name)]:
            raise ValueError(
                f"{path} has {', '.join(map(repr, splits))} beside folders of classes "
                "and no folder 'train'; move the classes into 'train' "
                "(--config.data.root)"
            )
        if split.lower() not in TRAIN:
            parent = ""
            if is_split(path.name) and has_train(folders_in(path.parent)):
                parent = f", or give {path.parent} (--config.data.root)"
            raise ValueError(
                f"{path} has no folder 'train', so its folders are the classes and "
                f"there is no split {split!r}; hold a share out with "
                f"--config.data.validation_fraction=0.1{parent}"
            )
        return _image_folder(path, _class_names(path))
    root_path, train_name = path, find_split("train", folders)
    split_name = find_split(split, folders)
    train, path = root_path / train_name, root_path / split_name
    class_names = _class_names(train)
    foreign = sorted(set(_class_names(path)) - set(class_names))
    if foreign:
        raise ValueError(
            f"{path} has the class {foreign[0]!r}, which {train} "
            "lacks (--config.data.root)"
        )
    source = _image_folder(path, class_names)
    if split_name == train_name:
        for name in filter(_is_unlabelled, folders):
            source = _join_unlabelled(source, root_path / name)
    return source


def open_classes(root: str, names: Sequence[str] = ()) -> FileSource:
    """`root/<class>/...`, whatever the folders are called.

    Args:
      root: the folder.
      names: of the classes, of which some may have no folder; else those of the folders.

    Raises:
      ValueError: there is no such folder, or a class without images.
    """
    path = open_root(root)
    return _image_folder(path, list(names) or _class_names(path))


def find_eval_split(root: str) -> str | None:
    """The validation split of a folder, else its test split; None where it has neither.

    Raises:
      ValueError: there is no such folder.
    """
    folders = folders_in(_open_given(root))
    if not has_train(folders):
        return None  # they are the classes
    for names in (VALIDATION, TEST):
        for name in folders:
            if name.lower() in names:
                return name
    return None


def list_images(root: str) -> list[str]:
    """The images anywhere below a folder, in order, whatever its folders are called.

    Raises:
      ValueError: there is no such folder, or no image in it.
    """
    path = open_root(root)
    if not root or not path.is_dir():
        raise ValueError(f"no folder {root!r} of images")
    images, others = image_files(path)
    if not images:
        raise ValueError(
            f"{root} holds no images ({', '.join(IMAGE_SUFFIXES)})"
            f"{_listed('; it has ', others)}"
        )
    return images


@dataclasses.dataclass(frozen=True)
class _BucketFolder:
    """A folder or file of a bucket, all of which was listed once.

    It has what this file asks of a `pathlib.Path`.

    Attributes:
      url: where it is.
      tree: what a folder holds, by name; None for a file, {} for what is not there.
    """

    url: str
    tree: dict[str, Any] | None

    @classmethod
    def list(cls, url: str) -> _BucketFolder:
        """Lists everything below a URL."""
        tree: dict[str, Any] = {}
        for path in storage.walk(url):
            *folders, file = path.split("/")
            at = tree
            for folder in folders:
                at = at.setdefault(folder, {})
            if file:  # a name with a slash at its end stands for an empty folder
                at[file] = None
        return cls(url, tree)

    def __truediv__(self, name: str) -> _BucketFolder:
        return _BucketFolder(storage.join(self.url, name), (self.tree or {}).get(name))

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return storage.name(self.url)

    @property
    def parent(self) -> _BucketFolder:
        return _BucketFolder(self.url.rpartition("/")[0], {})  # it was not listed

    def is_dir(self) -> bool:
        return bool(self.tree)

    def iterdir(self) -> Iterator[_BucketFolder]:
        return (self / name for name in self.tree or {})

    def files(self) -> Iterator[str]:
        """The URLs of all files below it, without hidden folders."""
        for entry in self.iterdir():
            if not entry.is_dir():
                yield entry.url
            elif not _is_hidden(entry.name):
                yield from entry.files()


Folder = pathlib.Path | _BucketFolder


def _open_given(root: str) -> Folder:
    """Where the splits or classes of the folder are that `data.root` names."""
    path = open_root(root)
    if not root or not path.is_dir():
        raise ValueError(
            f"data.name='folder' needs a folder of images; got {root!r} "
            "(--config.data.root)"
        )
    return _find_root(path)


def open_root(root: str) -> Folder:
    """The folder or bucket that `data.root` names; all of a bucket is listed."""
    if storage.is_remote(root):
        return _BucketFolder.list(storage.absolute(root))
    return pathlib.Path(root).expanduser()


def _find_root(path: Folder) -> Folder:
    """Where the splits or classes are: there, or in the only folder that there is."""
    found, folders = path, folders_in(path)
    while len(folders) == 1 and not is_split(folders[0]) and not _images_in(found):
        inner = found / folders[0]
        below = folders_in(inner)
        if _images_in(inner) or not below:
            break  # a class
        found, folders = inner, below
    if found == path or (len(folders) == 1 and not has_train(folders)):
        return path
    logger.info("taking the images of %s, the only folder in %s", found, path)
    return found


def has_train(folders: list[str]) -> bool:
    """Whether one of some folders is that of the training split."""
    return any(name.lower() in TRAIN for name in folders)


def _is_unlabelled(name: str) -> bool:
    return name.lower() in UNLABELLED_NAMES


def _is_hidden(name: str) -> bool:
    return name.startswith(HIDDEN_PREFIXES) or name in HIDDEN_NAMES


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not _is_hidden(name)


def _entries(path: Folder) -> list[Any]:
    try:
        visible = (p for p in path.iterdir() if not _is_hidden(p.name))
        return sorted(visible, key=lambda p: p.name)
    except OSError as error:
        raise _unreadable(error) from None


def folders_in(path: Folder) -> list[str]:
    """Names of the folders directly in it, hidden ones left out.

    Raises:
      ValueError: it cannot be read.
    """
    return [entry.name for entry in _entries(path) if entry.is_dir()]


def _images_in(path: Folder) -> int:
    return sum(_is_image(p.name) and not p.is_dir() for p in _entries(path))


def _unreadable(error: OSError) -> ValueError:
    return ValueError(
        f"cannot read {error.filename}: {error.strerror} (--config.data.root)"
    )


def _class_names(path: Folder) -> list[str]:
    names = folders_in(path)
    if not names:
        count = _images_in(path)
        csv = any(entry.name == LABELS_CSV for entry in _entries(path))
        hint = f"; for its {LABELS_CSV}: --config.data.name=multilabel" if csv else ""
        raise ValueError(
            f"{path} holds no folders{f' but {count:,} images' if count else ''}; expected "
            f"one folder of images a class (--config.data.root){hint}"
        )
    return names


def _image_folder(path: Folder, class_names: list[str]) -> FileSource:
    paths, labels = [], []
    left_alone: collections.Counter[str] = collections.Counter()
    for label, name in enumerate(class_names):
        if not (path / name).is_dir():
            continue  # a class of train of which this split has no images
        files, others = image_files(path / name)
        if not files:
            raise ValueError(
                f"class folder {path / name} holds no images "
                f"({', '.join(IMAGE_SUFFIXES)}){_listed('; it has ', others)}; remove it "
                "or fill it (--config.data.root)"
            )
        left_alone += others
        paths += files
        labels += [label] * len(files)
    if beside := _images_in(path):
        left_alone["images beside the folders of the classes"] += beside
    notes: tuple[str, ...] = ()
    if left_alone:
        notes = (f"{path}{_listed(': left alone ', left_alone)}",)
    for name in filter(_is_unlabelled, class_names):
        notes += (
            f"{path / name} is taken for a class; images without a label lie beside a "
            "folder 'train'",
        )
    return FileSource(
        np.asarray(paths), np.asarray(labels, np.int32), tuple(class_names), notes=notes
    )


def _join_unlabelled(source: FileSource, folder: Folder) -> FileSource:
    """A training split with the images of a folder behind it, which have no label.

    Raises:
      ValueError: there are none in it.
    """
    files, others = image_files(folder)
    if not files:
        raise ValueError(
            f"{folder} holds no images{_listed('; it has ', others)}; remove it or fill "
            "it (--config.data.root)"
        )
    labels = np.full(len(files), UNLABELLED, np.int32)
    left_alone = (f"{folder}{_listed(': left alone ', others)}",) if others else ()
    return dataclasses.replace(
        source,
        paths=np.concatenate([source.paths, np.asarray(files)]),
        labels=np.concatenate([source.labels, labels]),
        notes=source.notes + left_alone,
    )


def _listed(words: str, counts: collections.Counter[str]) -> str:
    """`3 .heic, 1 .txt` after some words; nothing where there are none."""
    parts = [f"{count:,} {what}" for what, count in counts.most_common()]
    return words + ", ".join(parts) if parts else ""


def image_files(folder: Folder) -> tuple[list[str], collections.Counter[str]]:
    """The images below a folder, in order, and what else is there by its suffix."""
    images: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    for path in _walk(folder):
        name = os.path.basename(path)
        if _is_image(name):
            images.append(path)
        elif not _is_hidden(name):
            others[pathlib.PurePath(name).suffix.lower() or "without a suffix"] += 1
    return sorted(images), others


def _walk(folder: Folder) -> Iterator[str]:
    """All files below a folder, without hidden folders."""
    if isinstance(folder, _BucketFolder):
        yield from folder.files()
        return

    def identity(path: str | pathlib.Path) -> tuple[int, int]:
        found = os.stat(path)
        return found.st_dev, found.st_ino

    def refuse(error: OSError) -> None:
        raise _unreadable(error)

    # A link to a folder that is above or was seen would go in circles.
    seen = {identity(above) for above in (folder, *folder.absolute().parents)}
    for where, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        visible = sorted(name for name in folders if not _is_hidden(name))
        folders.clear()
        for name in visible:
            this = identity(os.path.join(where, name))
            if this not in seen:
                seen.add(this)
                folders.append(name)
        yield from (os.path.join(where, name) for name in files)
