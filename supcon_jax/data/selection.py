"""Which examples of a split are used, and with which labels: subsets, held-out, noise."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from supcon_jax.data.sources import (
    UNLABELLED,
    UNREAD,
    Source,
    read_labels,
)

logger = logging.getLogger(__name__)


def take_subset(source: Source, count: int, *, seed: int = 0) -> Source:
    """At most `count` examples, drawn at random, always the same ones for a seed."""
    if count >= source.num_examples:
        return source
    rows = np.random.default_rng(seed).permutation(source.num_examples)[:count]
    return source.take_rows(np.sort(rows))


def take_labelled(source: Source) -> Source:
    """The examples that have a label, and those of which that is not known yet."""
    rows = np.flatnonzero((source.labels >= 0) | (source.labels == UNREAD))
    return source if len(rows) == source.num_examples else source.take_rows(rows)


def take_classes(
    source: Source, classes: Sequence[int], *, others: bool = False
) -> Source:
    """The examples of some classes, numbered anew from 0 in the order given.

    A class keeps its name, or its old number as one; unlabelled examples are left out.

    Args:
      source: a split.
      classes: numbers of classes; empty: all.
      others: take all classes but these, in their order.

    Raises:
      ValueError: there is no such class, or all are named and none is left.
    """
    if not classes:
        return source
    for number in classes:
        if not 0 <= number < source.num_classes:
            raise ValueError(
                f"got data.classes={tuple(classes)}; allowed: 0 to "
                f"{source.num_classes - 1} (--config.data.classes)"
            )
    if others:
        classes = [c for c in range(source.num_classes) if c not in classes]
        if not classes:
            raise ValueError("data.classes names all classes (--config.data.classes)")
    source = read_labels(source)
    numbers = np.full(source.num_classes, UNLABELLED, np.int32)
    numbers[list(classes)] = np.arange(len(classes))
    labels = np.where(source.labels < 0, UNLABELLED, numbers[source.labels])
    rows = np.flatnonzero(labels >= 0)
    names = source.class_names or tuple(map(str, range(source.num_classes)))
    changes: dict[str, Any] = {
        "labels": labels[rows],
        "class_names": tuple(names[number] for number in classes),
    }
    if any(field.name == "num_classes" for field in dataclasses.fields(source)):
        changes["num_classes"] = len(classes)
    return dataclasses.replace(source.take_rows(rows), **changes)


def take_fraction(source: Source, fraction: float, *, seed: int) -> Source:
    """A share of a training split, at random: of every class where labels are known.

    Raises:
      ValueError: nothing would be left.
    """
    if fraction == 1.0:
        return source
    kept, _ = _split_rows(source, 1.0 - fraction, seed=seed)
    if not len(kept):
        raise ValueError(
            f"data.fraction={fraction} of {source.num_examples} examples leaves none "
            "(--config.data.fraction)"
        )
    return source.take_rows(kept)


def take_per_class(source: Source, count: int, *, seed: int) -> Source:
    """`count` examples of every class, at random; none that have no label.

    Raises:
      ValueError: a class has fewer.
    """
    source = read_labels(source)
    return source.take_rows(_draw_per_class(source, count, seed, "samples_per_class"))


def hide_labels(
    source: Source, *, fraction: float = 1.0, per_class: int = 0, seed: int
) -> Source:
    """The same examples, all but some of them without their label.

    Those that keep it are the ones that `take_fraction` or `take_per_class` would keep:
    the same share of every class, or so many of each. A share of labels that have not been
    read is drawn from all examples.

    Args:
      source: a training split.
      fraction: share of the examples whose labels are kept.
      per_class: labels of each class that are kept instead; 0: the fraction.
      seed: of the choice.

    Raises:
      ValueError: a class has fewer examples, or no label would be left.
    """
    if fraction == 1.0 and not per_class:
        return source
    if per_class:
        source = read_labels(source)
        kept = _draw_per_class(source, per_class, seed, "labelled_per_class")
    elif UNREAD in source.labels:
        # `_split_rows` would draw as the sampler does for its first epoch, which would
        # then begin with all the examples without a label.
        count = source.num_examples
        order = np.random.default_rng((seed, 0, 2)).permutation(count)
        kept = order[: round(fraction * count)]
    else:
        kept, _ = _split_rows(source, 1.0 - fraction, seed=seed)
    labels = np.full_like(source.labels, UNLABELLED)
    labels[kept] = source.labels[kept]
    if np.all(labels == UNLABELLED):
        raise ValueError(
            f"data.labelled_fraction={fraction} of {source.num_examples} examples leaves "
            "no label (--config.data.labelled_fraction)"
        )
    return dataclasses.replace(source, labels=labels)


def hold_out(source: Source, fraction: float, *, seed: int) -> tuple[Source, Source]:
    """A training split without a random share of it, and that share.

    Of every class the same share is taken where labels are known; a split whose labels
    are unread, and images of several classes each, are divided at random. A class that
    would have no training image left keeps one. Where others have a label, images that
    are known to have none all stay in training: evaluation could not use them.

    Args:
      source: a training split.
      fraction: share to hold out.
      seed: of the choice.

    Raises:
      ValueError: one of the two would be empty.
    """
    kept, held = _split_rows(source, fraction, seed=seed)
    labels = source.labels
    if np.any(labels != UNLABELLED):
        held = held[labels[held] != UNLABELLED]
        kept = np.setdiff1d(np.arange(len(labels)), held)
    left = np.setdiff1d(labels[held], labels[kept])
    if source.label_sets is not None:
        left = left[:0]  # many sets have one image
    back = [held[labels[held] == label][0] for label in left if label >= 0]
    if back:
        logger.info(
            "data.validation_fraction: %d of %d classes would have no training image "
            "left; each keeps one",
            len(back),
            source.num_classes,
        )
        kept, held = np.union1d(kept, back), np.setdiff1d(held, back)
    if not len(kept) or not len(held):
        why = "; a class keeps at least one training image" if back else ""
        raise ValueError(
            f"data.validation_fraction={fraction} of {source.num_examples} examples "
            f"leaves {len(kept)} to train on and {len(held)} to evaluate{why} "
            "(--config.data.validation_fraction)"
        )
    return source.take_rows(kept), source.take_rows(held)


def add_label_noise(source: Source, share: float, *, seed: int) -> Source:
    """Gives a share of the examples a class drawn at random from all of them.

    One in C of those draws is the right class again, as in the official code. An image
    without a label stays so.
    """
    if share == 0:
        return source
    rng = np.random.default_rng((seed, 1))
    chosen = rng.random(source.num_examples) < share
    drawn = rng.integers(0, source.num_classes, source.num_examples, dtype=np.int32)
    chosen &= (source.labels >= 0) | (source.labels == UNREAD)
    return dataclasses.replace(source, labels=np.where(chosen, drawn, source.labels))


def _draw_per_class(source: Source, count: int, seed: int, key: str) -> np.ndarray:
    """Rows of `count` examples of every class, in order; `data.<key>` asked for them."""
    rows = []
    for label, members in enumerate(_rows_by_class(source)):
        if len(members) < count:
            names = source.class_names
            name = f" ({names[label]})" if label < len(names) else ""
            raise ValueError(
                f"data.{key}={count} but class {label}{name} has {len(members)} examples "
                f"(--config.data.{key})"
            )
        rows.append(np.random.default_rng((seed, label)).permutation(members)[:count])
    return np.sort(np.concatenate(rows))


def _rows_by_class(source: Source) -> list[np.ndarray]:
    return [np.flatnonzero(source.labels == c) for c in range(source.num_classes)]


def _split_rows(
    source: Source, fraction: float, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to keep and rows to take out, both in order; `fraction` are taken out."""
    count = source.num_examples
    if UNREAD in source.labels or source.label_sets is not None:
        groups: Iterable[np.ndarray] = [np.arange(count)]
    else:
        groups = [*_rows_by_class(source), np.flatnonzero(source.labels < 0)]
    taken = np.zeros(count, bool)
    # How many examples are still to be taken. What rounding leaves of one class is carried
    # on to the next, so that classes with few examples count too.
    due = 0.0
    for number, members in enumerate(groups):
        due += fraction * len(members)
        take = min(round(due), len(members))
        due -= take
        order = np.random.default_rng((seed, number)).permutation(members)
        taken[order[:take]] = True
    return np.flatnonzero(~taken), np.flatnonzero(taken)
