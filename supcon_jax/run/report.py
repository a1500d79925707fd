"""What a run says in words: what starts, what the input gives, what came out."""

from __future__ import annotations

import itertools
import logging
import os
import pathlib
import shlex
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from supcon_jax import optimizers, storage
from supcon_jax.builders import (
    finetune_rates,
    num_microbatches,
    scaled_learning_rate,
)
from supcon_jax.config.check import flatten, open_keys, trains_classifier
from supcon_jax.config.files import PROGRAM
from supcon_jax.config.keys import (
    ENCODER_KEYS,
    IMAGE_KEYS,
    RANDOM,
    SPLIT_KEYS,
    TRAINING_IMAGE_KEYS,
    TRAINING_MODES,
)
from supcon_jax.config.loading import load_config
from supcon_jax.data.pipeline import Batch
from supcon_jax.data.sources import UNLABELLED, UNREAD, Source
from supcon_jax.figures import plot_curves
from supcon_jax.metrics import on_end
from supcon_jax.objectives import OBJECTIVES
from supcon_jax.run.opening import Run
from supcon_jax.steps.state import TrainState

logger = logging.getLogger(__name__)
PyTree = Any
# How many times as many images the largest class has as the smallest, for it to be said.
UNEQUAL = 2


def log_start(run: Run, state: TrainState) -> None:
    """Says in a few lines what is about to run."""
    config = run.config
    log_data(run)
    params = _trained(config, state.params)
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for name, tree in params.items()
    }
    mask = jax.tree.leaves(
        optimizers.path_mask(params, tuple(config.optimizer.exclude))
    )
    parts = num_microbatches(config)
    logger.info(
        "%d x %s, global batch %d images x %d views%s, %d steps (%.4g epochs)",
        run.mesh.size,
        run.mesh.devices.flat[0].device_kind,
        config.batch_size,
        config.data.views,
        f", encoded {config.microbatch_size} at a time" if parts > 1 else "",
        run.plan.total_steps,
        run.plan.total_steps / run.plan.steps_per_epoch,
    )
    logger.info(
        "%s, trained parameters: %s; %s, peak learning rate %.4g, decay on %d of %d "
        "arrays",
        config.encoder.name,
        ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        config.optimizer.name,
        scaled_learning_rate(config),
        sum(mask) if config.optimizer.weight_decay else 0,
        len(mask),
    )
    decays = config.optimizer.exclude and config.optimizer.weight_decay
    # A classifier alone has nothing that a usual exclusion names.
    if config.mode != "linear_eval" and all(mask) and decays:
        logger.warning(
            "warning: optimizer.exclude=%s matches no parameter, so all of them decay "
            "(--config.optimizer.exclude)",
            tuple(config.optimizer.exclude),
        )
    warmup_steps = config.optimizer.warmup_epochs * run.plan.steps_per_epoch
    if warmup_steps >= run.plan.total_steps:
        logger.warning(
            "warning: the warm-up takes %.0f steps, so this run of %d ends within it "
            "(--config.optimizer.warmup_epochs)",
            warmup_steps,
            run.plan.total_steps,
        )


def log_data(run: Run) -> None:
    """Says what a run is trained on."""
    config, images = run.config, run.train_source.num_examples
    logger.info(
        "%s on %s: %s training images, %s%s",
        config.loss.name if config.mode == "pretrain" else config.mode,
        config.data.name,
        f"{images:,}",
        _classes(run.train_source),
        _without_labels(run),
    )
    if imbalance := _imbalance(run):
        logger.info("%s", imbalance)
    for note in dict.fromkeys([*run.train_source.notes, *run.eval_source.notes]):
        logger.info("%s", note)


def _classes(source: Source) -> str:
    """How many classes there are, and in how many sets they come."""
    sets = source.label_sets
    if sets is None:
        return f"{source.num_classes} classes"
    return f"{len(sets.class_names)} classes in {len(sets.members)} combinations"


def _imbalance(run: Run) -> str:
    """How unequal the classes are, and what helps; "" where they are about equal."""
    config, source = run.config, run.train_source
    if source.synthetic or source.label_sets or UNREAD in source.labels:
        return ""
    counts = np.bincount(source.labels[source.labels >= 0], minlength=1)
    present = np.flatnonzero(counts)
    if not len(present) or counts.max() < UNEQUAL * counts[present].min():
        return ""

    def shown(label: int) -> str:
        names = source.class_names
        return f"{counts[label]:,} ({names[label] if names else f'class {label}'})"

    smallest = int(present[np.argmin(counts[present])])
    largest = int(np.argmax(counts))
    flags = []
    if config.mode == "pretrain" and not config.data.classes_per_batch:
        if (
            OBJECTIVES[config.loss.name].contrastive
            and OBJECTIVES[config.loss.name].uses_labels
        ):
            most = min(len(present), config.batch_size // 2)
            flags.append(f"--config.data.classes_per_batch={most}")
    if trains_classifier(config) and not config.classifier.logit_adjustment:
        flags.append("--config.classifier.logit_adjustment=1")
    if trains_classifier(config) and config.eval_metric == "top1":
        flags.append("--config.eval_metric=mean_class_accuracy")
    return f"the classes have {shown(smallest)} to {shown(largest)} training images" + (
        f"; to treat them alike: {' '.join(flags)}" if flags else ""
    )


def _trained(config: ConfigDict, params: PyTree) -> PyTree:
    """The parameters that are updated; says which of an encoder are in fine-tuning."""
    if config.mode != "finetune":
        return params
    rates, names_of = finetune_rates(config)
    names = names_of(params)
    random = config.pretrained == RANDOM
    logger.info(
        "the encoder starts %s; %s",
        "random"
        if random
        else f"as that of {config.pretrained or config.encoder.init_from}",
        "all of it is trained, at one rate"
        if {*rates.values()} == {1.0}
        else "share of the learning rate: "
        + ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items()),
    )
    return jax.tree.map(lambda x, name: x if rates[name] else None, params, names)


def _without_labels(run: Run) -> str:
    """How many images of the two splits have no label, where some have none."""
    parts = []
    for name, source in (
        ("training images", run.train_source),
        ("evaluation images", run.eval_source),
    ):
        count = int(np.sum(source.labels == UNLABELLED))
        if count and not source.synthetic:
            least = "at least " if source.num_unlabelled is None else ""
            parts.append(f"{least}{count:,} of {source.num_examples:,} {name}")
    if not parts:
        return ""
    labelled = int(np.sum(run.train_source.labels >= 0))
    counted = f"; with one: {labelled:,} training images" if labelled else ""
    return f"; without a label: {', '.join(parts)}{counted}"


def measure_input(batches: Iterator[Batch], batch_size: int) -> Iterator[Batch]:
    """The same batches, with a line that says how fast this host makes them.

    The second batch is timed, since the first one includes what is set up once.
    """
    head = [next(batches)]
    start = time.monotonic()
    head.append(next(batches))
    seconds = max(time.monotonic() - start, 1e-6)
    images = head[0]["image"]
    rate = len(images) / seconds
    logger.info(
        "input: a step needs %s images (%s, %dx%d), %s from this host, whose %d cores "
        "make %s images/s: at least %.1f ms a step",
        f"{batch_size:,}",
        "whole" if images.shape[1] == 1 else f"{images.shape[1]} views",
        *images.shape[2:4],
        f"{len(images):,}" if len(images) < batch_size else "all",
        os.cpu_count(),
        f"{rate:,.0f}" if rate < 1e5 else "over 100,000",
        1e3 * seconds,
    )
    return itertools.chain(head, batches)


def report_end(run: Run, final: dict[str, Any]) -> dict[str, Any]:
    """Prints the result of a training run; returns it."""
    if jax.process_index() == 0:
        try:
            picture = plot_curves(run.folder)
        except OSError as error:
            logger.warning("warning: no curves are drawn: %s", error.strerror)
            picture = None
        confusion = run.folder / "figures" / "confusion.png"
        report_result(
            run.config,
            run.workdir,
            final,
            skipped=run.skipped,
            pictures=[picture, confusion if confusion.exists() else None],
            photo=run.eval_source.name(0)
            if run.config.data.name == "folder"
            else "photo.jpg",
        )
    return final


def report_result(
    config: ConfigDict,
    workdir: pathlib.Path,
    final: dict[str, Any],
    *,
    skipped: dict[str, str],
    pictures: Iterable[pathlib.Path | None],
    photo: str = "photo.jpg",
) -> None:
    """Prints what came out, where it lies and the next command.

    Args:
      config: of the run.
      workdir: where everything is, or will be when it has been uploaded.
      final: metrics.
      skipped: images that could not be decoded, and why.
      pictures: in `figures/`, of the workdir or of its local copy.
      photo: one that the next command may be tried on.
    """
    logger.info("")
    if skipped:
        logger.info("Skipped: %d images that cannot be decoded:", len(skipped))
        for name, reason in skipped.items():
            logger.info("         %s: %s", name, reason)
    result = on_end(final, config.eval_metric)
    logger.info("Result:  %s", ", ".join(result) or "trained, not evaluated")
    logger.info("Workdir: %s", storage.shown(workdir))
    for picture in pictures:
        if picture:
            label = "Curves" if picture.stem == "curves" else "Figure"
            where = storage.join(workdir, "figures", picture.name)
            logger.info("%s:  %s", label, storage.shown(where))
    # A classifier of several classes an image has no evaluation of its own.
    last = config.data.name == "multilabel" and config.mode == "linear_eval"
    if config.next_config and not last:
        logger.info("Next:    %s", next_command(config, workdir, photo))


def next_command(
    config: ConfigDict, workdir: pathlib.Path, photo: str = "photo.jpg"
) -> str:
    """The command line that goes on from a run: a config, or a tool that takes a photo."""
    if config.next_config.startswith("supcon_jax.tools."):
        tool = config.next_config
        return shlex.join(["python", "-m", tool, storage.shown(workdir), photo])
    command = [*PROGRAM, f"--config={config.next_config}"]
    following = load_config(config.next_config, [])
    if config.mode in TRAINING_MODES:  # what comes next takes the model of this run
        command.append(f"--config.pretrained={storage.shown(workdir)}")
    changes = _carried(config, following)
    several = config.data.name == "multilabel"
    if several and following.probe.solver != "sgd":
        changes["probe.solver"] = "sgd"
    for key in ("dir", "root"):
        if config.data[key]:
            changes[f"data.{key}"] = config.data[key]
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    return shlex.join(command)


def _carried(config: ConfigDict, following: ConfigDict) -> dict[str, Any]:
    """Where the config that comes next has another encoder, or would see other images."""
    if config.mode not in TRAINING_MODES:  # what comes next is another experiment
        return {}
    trains = following.mode in TRAINING_MODES
    keys = IMAGE_KEYS + (TRAINING_IMAGE_KEYS if trains else ()) + ENCODER_KEYS
    ours, theirs = (flatten(c.to_dict()) for c in (config, following))
    chosen = set(open_keys(following))  # by what the folder holds and this run had
    if "data.eval_split" in chosen:
        chosen.update(SPLIT_KEYS)
    return {
        key: ours[key] for key in keys if theirs[key] != ours[key] and key not in chosen
    }
