"""Images and labels in one .npz file."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from zipfile import BadZipFile

import numpy as np

from supcon_jax import storage
from supcon_jax.data.images import LFS_POINTER
from supcon_jax.data.names import find_split, number_labels, numbering
from supcon_jax.data.sources import ArraySource

# What an array of images or of labels is called, beside the name of its split:
# train_images, x_train, X_train, ...
IMAGE_WORDS = ("images", "image", "x", "data")
LABEL_WORDS = ("labels", "label", "y", "targets")
WHOLE = "train"  # the split that an array without one in its name belongs to


def open_arrays(split: str, dir: str, root: str) -> ArraySource:
    """`<split>_images` `[n, H, W, 3]` and `<split>_labels` `[n]` of an .npz file.

    Other usual names (`x_train`, `y_train`), grey images and all labels that
    `number_labels` takes are understood too.

    Raises:
      ValueError: one line that says what the file holds and what is wanted.
    """
    del dir
    path = storage.absolute(root) if root else ""
    if not root or not storage.is_file(path):
        raise ValueError(
            f"data.name='arrays' needs an .npz file with train_images, train_labels, "
            f"...; got {root!r} (--config.data.root)"
        )
    try:
        content = storage.open_file(path)
        if content.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError("it is a pointer of git-lfs; run `git lfs pull`")
        content.seek(0)
        # Loading a pickled object may run code, and arrays of numbers need no pickling.
        with content, np.load(content, allow_pickle=False) as file:
            names = _splits(list(file))
            split = _pick(split, names, list(file))
            images = file[names[split][0]]
            # Of all splits, so that train and test agree on the classes.
            parts = {labels: file[labels] for _, labels in names.values()}
    except _Contents as error:
        raise ValueError(f"{path}: {error}") from None
    except (ValueError, TypeError, OSError, EOFError, BadZipFile, zlib.error) as error:
        hint = ""
        if "Object arrays" in str(error):
            hint = "; save words as np.asarray(words, dtype=str)"
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot read {path} as .npz: {reason}{hint} (--config.data.root)"
        ) from None
    image_key, label_key = names[split]
    try:
        images = to_rgb(image_key, images)
        if parts[label_key].shape[:1] != images.shape[:1]:
            raise ValueError(
                f"{label_key} is {parts[label_key].dtype} "
                f"{list(parts[label_key].shape)}; expected integers [{len(images)}], one "
                f"for each of {image_key}"
            )
        labels, num_classes, class_names = number_labels(parts)
    except ValueError as error:
        raise ValueError(f"{path}: {error} (--config.data.root)") from None
    return ArraySource(
        images,
        labels[label_key],
        num_classes,
        class_names,
        notes=numbering(class_names),
    )


class _Contents(Exception):
    """The file can be read and lacks what is wanted."""


def _splits(keys: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Name of a split -> names of its arrays of images and of labels."""

    def arrays(words: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for word in words:  # the first words win
            for key in keys:
                before, _, last = key.rpartition("_")
                first, _, after = key.partition("_")
                if key.lower() == word:
                    found.setdefault(WHOLE, key)
                elif before and last.lower() == word:
                    found.setdefault(before, key)
                elif after and first.lower() == word:
                    found.setdefault(after, key)
        return found

    images, labels = arrays(IMAGE_WORDS), arrays(LABEL_WORDS)
    return {
        split: (images[split], labels[split]) for split in images if split in labels
    }


def _pick(split: str, names: dict[str, tuple[str, str]], keys: Sequence[str]) -> str:
    """The split that is meant; else says which arrays there are and which are wanted."""
    try:
        return find_split(split, sorted(names))
    except ValueError:
        hint = ""
        if list(names) == [WHOLE]:
            hint = "; hold a share of it out with --config.data.validation_fraction=0.1"
        raise _Contents(
            f"unknown split {split!r}; available: {', '.join(sorted(names)) or 'none'}; "
            f"the arrays are {', '.join(keys) or 'none'}; wanted: {split}_images and "
            f"{split}_labels, or x_{split} and y_{split}{hint} "
            "(--config.data.root, --config.data.train_split, --config.data.eval_split)"
        ) from None


def to_rgb(name: str, images: np.ndarray) -> np.ndarray:
    """Images as uint8 `[n, H, W, 3]`: grey ones repeated, an alpha channel dropped.

    Raises:
      ValueError: they are something else; says how to make them so.
    """
    wrong = (
        f"{name} is {images.dtype} {list(images.shape)}; expected uint8 [n, H, W, 3]"
    )
    shape = images.shape
    if images.ndim == 4 and shape[-1] not in (1, 3, 4) and shape[1] in (1, 3, 4):
        raise ValueError(f"{wrong}, the channels last: np.moveaxis(images, 1, -1)")
    if images.ndim not in (3, 4) or (images.ndim == 4 and shape[-1] not in (1, 3, 4)):
        raise ValueError(f"{wrong}, or [n, H, W] for grey images")
    if images.dtype == bool:
        images = images.astype(np.uint8) * np.uint8(255)
    if images.dtype != np.uint8 and images.size:
        for number, image in enumerate(images):
            if not np.all(np.isfinite(image)):
                raise ValueError(
                    f"{wrong}; image {number} has values that are no number"
                )
        low, high = images.min(), images.max()
        if images.dtype.kind not in "iu" or low < 0 or high > 255:
            raise ValueError(
                f"{wrong}; its values are {low:.6g} to {high:.6g}: scale them, "
                f"np.round({_scaling(low, high)}).astype(np.uint8)"
            )
    images = images.astype(np.uint8, copy=False)
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[-1] == 1:
        return np.broadcast_to(images, (*images.shape[:3], 3))  # needs no memory
    return images[..., :3]


def _scaling(low: float, high: float) -> str:
    """How values become 0 to 255."""
    if low < 0:
        return "(x - x.min()) / (x.max() - x.min()) * 255"
    if high <= 1:
        return "x * 255"
    return "x" if high <= 255 else "x / x.max() * 255"
