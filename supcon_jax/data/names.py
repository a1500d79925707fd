"""What datasets call their splits and their classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from supcon_jax.data.sources import UNLABELLED

logger = logging.getLogger(__name__)
# The usual names of each split, in lower case.
TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "dev")
TEST = ("test", "testing")


def pick_split(split: str, available: Sequence[str]) -> str:
    """Refuses a split that a dataset does not have."""
    if split not in available:
        raise ValueError(
            f"unknown split {split!r}; available: {', '.join(available)} "
            "(--config.data.train_split, --config.data.eval_split)"
        )
    return split


def is_split(name: str) -> bool:
    """Whether a name is one that splits usually have."""
    return name.lower() in TRAIN + VALIDATION + TEST


def find_split(split: str, available: Sequence[str]) -> str:
    """The split that is meant: of that name, of another usual one, or the next best.

    "train" is "Train" or "training" too. Where there is no test split its place is taken
    by the validation split, and the other way round; a line of the log says so.

    Raises:
      ValueError: there is none; the message names those that there are.
    """
    if split in available:
        return split
    wanted = split.lower()
    same = next((g for g in (TRAIN, VALIDATION, TEST) if wanted in g), (wanted,))
    other = {VALIDATION: TEST, TEST: VALIDATION}.get(same, ())
    for name in (wanted, *same, *other):
        for candidate in available:
            if candidate.lower() == name:
                if candidate.lower() != wanted:
                    logger.info("there is no split %r: taking %r", split, candidate)
                return candidate
    return pick_split(split, available)


def number_labels(
    parts: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], int, tuple[str, ...]]:
    """Numbers 0 to C - 1 for class ids of any size, or words; the same in all parts.

    Args:
      parts: name of a split -> `[n]` or `[n, 1]` integers, whole numbers of a floating
        type, or strings. Numbers below 0 and empty strings stand for no label.

    Returns:
      The labels `[n]` int32 of each part, `UNLABELLED` where there is none; the number of
      classes (at least 1); and the ids of the classes in the order of their numbers, ()
      where they are 0 to C - 1 already.

    Raises:
      ValueError: naming the part and what is wrong with it.
    """
    # Python's numbers, since NumPy has no type for both int64 and uint64.
    unique = {name: _unique(name, labels) for name, labels in parts.items()}
    kinds = {isinstance(id, str) for ids, _ in unique.values() for id in ids}
    if len(kinds) > 1:
        raise ValueError(
            f"the labels are numbers and words (of {', '.join(parts)}); give one kind"
        )
    known = sorted({id for ids, _ in unique.values() for id in ids if _is_label(id)})
    number = {id: position for position, id in enumerate(known)}
    labels = {}
    for name, (ids, inverse) in unique.items():
        table = np.asarray([number.get(id, UNLABELLED) for id in ids], np.int32)
        labels[name] = table[inverse]
    plain = known == list(range(len(known)))
    names = () if plain else tuple(map(str, known))
    return labels, max(len(known), 1), names


def numbering(class_names: Sequence[str]) -> tuple[str, ...]:
    """A note that says which ids `number_labels` has numbered; none without any."""
    if not class_names:
        return ()
    shown = ", ".join(class_names[:10])
    more = ", ..." if len(class_names) > 10 else ""
    return (f"classes 0 to {len(class_names) - 1} are the ids {shown}{more}",)


def _is_label(id: int | str) -> bool:
    return id != "" if isinstance(id, str) else id >= 0


def _unique(name: str, labels: np.ndarray) -> tuple[list, np.ndarray]:
    """The different ids of a part, and which of them each example has."""
    expected = f"expected integers [{len(labels) if labels.ndim else 'n'}]"
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    problem = ""
    if labels.ndim != 1:
        problem = "one label an image; for one-hot rows give labels.argmax(axis=1)"
    elif labels.dtype.kind == "f":
        if not np.all(np.isfinite(labels)):
            problem = f"number {np.flatnonzero(~np.isfinite(labels))[0]} is not finite; -1 says that there is no label"
        elif not np.all((labels == np.round(labels)) & (np.abs(labels) < 2**53)):
            problem = "they are not whole numbers"
        else:
            labels = labels.astype(np.int64)
    elif labels.dtype.kind not in "biuUS":
        problem = "or words"
    if problem:
        raise ValueError(
            f"{name} is {labels.dtype} {list(labels.shape)}; {expected}: {problem}"
        )
    if labels.dtype.kind == "b":
        labels = labels.astype(np.int64)
    ids, inverse = np.unique(labels, return_inverse=True)
    if labels.dtype.kind == "S":
        return [id.decode(errors="replace") for id in ids.tolist()], inverse
    return ids.tolist(), inverse


def are_names(names: Sequence[str]) -> bool:
    """Whether names of classes say more than their numbers, which may begin with zeros."""
    try:
        return [int(name) for name in names] != [*range(len(names))]
    except ValueError:
        return True
