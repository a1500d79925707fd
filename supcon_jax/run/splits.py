"""The splits that a config names, opened and checked against it."""

from __future__ import annotations

import logging

import numpy as np
from ml_collections import ConfigDict

from supcon_jax.config.keys import TRAINING_MODES
from supcon_jax.data import selection
from supcon_jax.data.datasets import open_source
from supcon_jax.data.pipeline import check_image_size, check_same_size, load_small
from supcon_jax.data.sources import (
    UNLABELLED,
    UNREAD,
    Source,
    has_labels,
    images_by_class,
    read_labels,
    read_labels_at_start,
)
from supcon_jax.objectives import OBJECTIVES

logger = logging.getLogger(__name__)


def open_sources(config: ConfigDict) -> tuple[Source, Source]:
    """The training and the evaluation split, checked against each other.

    Raises:
      ValueError: data or batch size cannot be used, in one line.
    """
    data = config.data

    def open_split(split: str) -> Source:
        # What is drawn below must not depend on whether the images, at the size of this
        # run, are kept in memory: a probe at another size would see other images.
        return read_labels_at_start(_open_split(config, split))

    if data.fake:
        train, evaluation = (open_source("synthetic", s) for s in ("train", "test"))
    elif data.validation_fraction:
        train, evaluation = selection.hold_out(
            open_split(data.train_split),
            data.validation_fraction,
            seed=data.split_seed,
        )
    else:
        train, evaluation = open_split(data.train_split), open_split(data.eval_split)
    train = selection.take_fraction(train, data.fraction, seed=data.split_seed)
    if data.samples_per_class and not train.synthetic:
        train = selection.take_per_class(
            train, data.samples_per_class, seed=data.split_seed
        )
    if not train.synthetic:
        train = selection.hide_labels(
            train,
            fraction=data.labelled_fraction,
            per_class=data.labelled_per_class,
            seed=data.split_seed,
        )
    train = selection.add_label_noise(train, data.label_noise, seed=data.split_seed)
    # A share of a split may be read in seconds where the whole is not.
    train, evaluation = (
        read_labels_at_start(load_small(source, data.image_size))
        for source in (train, evaluation)
    )
    train = leave_out_unlabelled(config, train)
    check_same_size(train, evaluation)
    for source in (train, evaluation):
        check_image_size(source, data.image_size)
    for split, source in ((data.train_split, train), (data.eval_split, evaluation)):
        if source.num_examples == 0:
            raise ValueError(
                f"split {split!r} of {data.name} is empty (--config.data.train_split, "
                "--config.data.eval_split)"
            )
    # Batches of a frozen model alone may be padded.
    steps = config.mode in TRAINING_MODES and config.probe.solver == "sgd"
    if steps and train.num_examples < config.batch_size:
        raise ValueError(
            f"batch size {config.batch_size} is larger than the {train.num_examples} "
            f"training images; set --config.batch_size={train.num_examples} or less"
        )
    check_labels(config, train, evaluation)
    return train, evaluation


def leave_out_unlabelled(config: ConfigDict, train: Source) -> Source:
    """The training images that a run can learn from: all, for a contrastive loss.

    A classifier learns nothing from an image without a label, so it need not be read,
    and epochs count the others. Where none has a label, `check_labels` says so.
    """
    if not _trains_classifier(config) or not has_labels(train):
        return train
    labelled = selection.take_labelled(train)
    if left := train.num_examples - labelled.num_examples:
        logger.info(
            "without a label, and left out: %s of %s training images",
            f"{left:,}",
            f"{train.num_examples:,}",
        )
    return labelled


def _trains_classifier(config: ConfigDict) -> bool:
    if config.mode == "pretrain":
        return not OBJECTIVES[config.loss.name].contrastive
    return config.mode in ("linear_eval", "finetune")


def count_training(
    config: ConfigDict, num_examples: int, num_classes: int
) -> tuple[int, int]:
    """How many images and classes a run trains on, of a split that is not opened.

    What `open_sources` would choose, where the classes are of equal size.
    """
    data = config.data
    classes = len(data.classes) or num_classes
    count = num_examples * classes / num_classes
    count *= (1 - data.validation_fraction) * data.fraction
    if data.samples_per_class:
        count = min(count, data.samples_per_class * classes)
    if _trains_classifier(config):
        if data.labelled_per_class:
            count = min(count, data.labelled_per_class * classes)
        count *= data.labelled_fraction
    return round(count), classes


def open_eval_source(config: ConfigDict) -> Source:
    """The evaluation split, all labels read, without opening the training split.

    With `data.validation_fraction` it is the share of train that is held out.

    Raises:
      ValueError: the data cannot be used, or no image has a label.
    """
    data = config.data
    if data.validation_fraction:
        _, source = open_sources(config)
    else:
        source = _open_split(config, data.eval_split)
        source = read_labels(load_small(source, data.image_size))
        check_image_size(source, data.image_size)
    if not has_labels(source):
        raise ValueError(
            f"no image of split {data.eval_split!r} of {data.name} has a label "
            "(--config.data.eval_split)"
        )
    return source


def _open_split(config: ConfigDict, split: str) -> Source:
    data = config.data
    source = open_source(
        data.name,
        split,
        dir=data.dir,
        root=data.root,
        image_key=data.image_key,
        label_key=data.label_key,
        skip_errors=data.skip_errors,
    )
    return selection.take_classes(source, data.classes)


def check_positives(config: ConfigDict, source: Source) -> None:
    """Refuses training in which no anchor can have a positive: it would learn nothing.

    With one view an image's only positives are other images of its class.

    Raises:
      ValueError: naming the keys to change.
    """
    objective = OBJECTIVES[config.loss.name]
    alone = config.data.views == 1 and not source.synthetic
    if config.mode != "pretrain" or not objective.contrastive or not alone:
        return
    counts = np.zeros(1, int)
    if objective.uses_labels:
        counts = images_by_class(source)
    known = not objective.uses_labels or UNREAD not in source.labels
    if known and counts.max() < 2:
        raise ValueError(
            f"no image has a positive: data.views=1, and {config.loss.name} finds no two "
            "images that belong together; set --config.data.views=2"
        )
    if objective.uses_labels and np.any(source.labels == UNLABELLED):
        logger.warning(
            "warning: %s images without a label have no positive with data.views=1 "
            "(--config.data.views=2)",
            f"{np.sum(source.labels == UNLABELLED):,}",
        )
    if np.any(counts == 1):
        logger.warning(
            "warning: %d classes have one image, which has no positive with "
            "data.views=1 (--config.data.views=2)",
            np.sum(counts == 1),
        )


def check_labels(config: ConfigDict, train: Source, evaluation: Source) -> None:
    """Refuses splits that lack the labels that a run cannot do without.

    Contrastive training takes images without labels (each is a class of its own), and
    there is no kNN then.

    Raises:
      ValueError: naming the split and what needs its labels.
    """
    data, objective = config.data, OBJECTIVES[config.loss.name]
    needs = {
        f"mode={config.mode}": config.mode in ("linear_eval", "finetune"),
        f"loss.name={config.loss.name}": not objective.contrastive,
        "probe.learning_rate": bool(config.probe.learning_rate),
        "loss.cross_entropy_weight": bool(config.loss.cross_entropy_weight),
    }
    for what in [what for what, needed in needs.items() if needed][:1]:
        for key, source in (("train_split", train), ("eval_split", evaluation)):
            if not has_labels(source):
                split = data.train_split if data.validation_fraction else data[key]
                raise ValueError(
                    f"no image of split {split!r} of {data.name} has a label, and "
                    f"{what} needs labels (--config.data.{key})"
                )
    classes = train.num_classes
    if UNREAD not in train.labels and np.all(train.labels >= 0):
        classes = len(np.unique(train.labels))
    if classes > 1 or train.num_unlabelled:
        return
    name = f", {train.class_names[0]!r}" if len(train.class_names) == 1 else ""
    one = f"split {data.train_split!r} of {data.name} has one class alone{name}"
    if objective.uses_labels or config.mode == "linear_eval":
        raise ValueError(
            f"{one}, which leaves nothing to tell apart; give data with several "
            "(--config.data.root), or train without labels: --config.loss.name=simclr"
        )
    logger.warning("warning: %s, so kNN says nothing (--config.data.root)", one)


def count_classes(config: ConfigDict, source: Source) -> np.ndarray | None:
    """Training images of each class `[C]`, where `classifier.logit_adjustment` asks."""
    if not config.classifier.logit_adjustment or source.synthetic:
        return None
    labels = read_labels(source).labels
    return np.bincount(labels[labels >= 0], minlength=source.num_classes)
