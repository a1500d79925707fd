"""A run: its plan, its data and its folder, opened and checked."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import builders, hosts, parallel, storage
from supcon_jax.checkpoint import digest, saved_steps
from supcon_jax.config import flatten
from supcon_jax.data import selection
from supcon_jax.data.datasets import open_source
from supcon_jax.data.identity import identify
from supcon_jax.data.lanes import Lanes, block_size
from supcon_jax.data.pipeline import (
    Batch,
    check_image_size,
    check_same_size,
    load_small,
    on_host,
    train_batches,
)
from supcon_jax.data.records import RecordSource
from supcon_jax.data.sampler import Sampler, class_balanced, shuffled
from supcon_jax.data.sources import (
    UNLABELLED,
    UNREAD,
    Source,
    has_labels,
    images_by_class,
    read_labels,
    read_labels_at_start,
)
from supcon_jax.evaluation.predict import Predictor
from supcon_jax.keys import TRAINING_MODES
from supcon_jax.objectives import OBJECTIVES
from supcon_jax.plan import Plan, create_plan
from supcon_jax.storage import epaths
from supcon_jax.workdir import (
    check_shared,
    finished_metrics,
    local_folder,
    open_workdir,
)
from supcon_jax.writers import check_installed

logger = logging.getLogger(__name__)
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Run:
    """A plan with its data and its folder, both checked and opened.

    Attributes:
      plan: what is computed.
      workdir: absolute path, or URL of a bucket; holds config.json.
      train_source, eval_source: the two splits.
      sampler: which training images a step sees.
      finished: the final metrics, where the run is complete already.
      frozen: arrays that every step reads and none changes, on every device.
      initial_encoder: variables of another run that training starts from, on every
        device; None: from the seed. Given away with the state of step 0.
    """

    plan: Plan
    workdir: pathlib.Path
    train_source: Source
    eval_source: Source
    sampler: Sampler
    finished: dict[str, Any] | None
    frozen: tuple[PyTree, ...] = ()
    initial_encoder: PyTree = None

    @property
    def config(self) -> ConfigDict:
        """The plan's."""
        return self.plan.config

    @property
    def mesh(self) -> Mesh:
        """The plan's."""
        return self.plan.mesh

    @property
    def folder(self) -> pathlib.Path:
        """Where its small files are written: the workdir, or the local copy of it."""
        return local_folder(self.workdir)

    @property
    def skipped(self) -> dict[str, str]:
        """Images of both splits that could not be decoded so far, and why."""
        return {
            **self.train_source.unreadable.reasons,
            **self.eval_source.unreadable.reasons,
        }


def plan_for(config: ConfigDict, mesh: Mesh, train: Source) -> Plan:
    """What a config computes on a training split."""
    return create_plan(
        config,
        mesh,
        num_classes=train.num_classes,
        num_examples=train.num_examples,
        whole_images=not on_host(train),
        label_classes=len(sets.class_names) if (sets := train.label_sets) else 0,
        class_counts=count_classes(config, train),
    )


def open_run(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    load_frozen: Callable[[Plan], tuple[PyTree, ...]] = lambda plan: (),
    load_initial: Callable[[Plan], PyTree] = lambda plan: None,
) -> Run:
    """Opens data and workdir of a checked config; refuses before it writes anything.

    Args:
      config: a checked config.
      workdir: folder of the run.
      load_frozen: what the step reads and does not train, on every device of a plan.
      load_initial: the encoder that training starts from, on every device; None: a new one.

    Raises:
      ValueError: data, batch size or workdir cannot be used, in one line.
    """
    mesh = prepare(config, workdir)
    check_hosts(config)
    train_source, eval_source = open_sources(config)
    check_positives(config, train_source)
    sampler = build_sampler(config, train_source)
    plan = plan_for(config, mesh, train_source)
    data = {"train": identify(train_source), "evaluation": identify(eval_source)}
    # What one process alone cannot use ends all of them here, before they compute together.
    hosts.agree(
        {split: json.dumps(facts) for split, facts in data.items()}
        | {"number of devices": str(jax.local_device_count())},
        on="data and devices",
    )
    frozen, initial_encoder = load_frozen(plan), None
    # A run that goes on has its encoder, whatever has become of these weights since.
    if not (config.encoder.init_from and saved_steps(workdir)):
        initial_encoder = load_initial(plan)
    given = frozen if initial_encoder is None else (initial_encoder,)
    path = open_workdir(
        config,
        workdir,
        frozen=digest(given) if given else "",
        data=data,
    )
    logger.info("workdir %s", storage.shown(path))
    return Run(
        plan=plan,
        workdir=path,
        train_source=train_source,
        eval_source=eval_source,
        sampler=sampler,
        finished=finished_metrics(path),
        frozen=frozen,
        initial_encoder=initial_encoder,
    )


def prepare(config: ConfigDict, workdir: str | pathlib.Path) -> Mesh:
    """What can be checked before data are opened, which may take minutes; the devices.

    Raises:
      ValueError: processes that differ, or a workdir, tracker or batch size that cannot be
        used.
    """
    agree_on_config(config)
    check_shared(workdir)
    check_installed(config.writers)
    setup_compilation_cache(enabled=config.compilation_cache)
    mesh = parallel.create_mesh()
    parallel.check_batch_size(config.batch_size, mesh)
    return mesh


def agree_on_config(config: ConfigDict) -> None:
    """Refuses processes of one job that run another config or another code.

    Where the data lie may differ from host to host; what is in them is compared later.

    Raises:
      ValueError: naming the process, the key and both values.
    """
    elsewhere = ("data.dir", "data.root")
    flat = flatten(config.to_dict())
    facts = {key: repr(flat[key]) for key in flat if key not in elsewhere}
    code = {"the code": hosts.code_version()} if hosts.count() > 1 else {}
    hosts.agree(facts | code, on="config and code")


def setup_compilation_cache(*, enabled: bool) -> None:
    """Keeps compiled programs in the user's cache folder, so that a rerun starts fast.

    `JAX_COMPILATION_CACHE_DIR` chooses another folder, which may be in a bucket.

    Raises:
      ValueError: what a bucket needs is not installed.
    """
    jax.config.update("jax_enable_compilation_cache", enabled)
    if not enabled:
        return
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        try:
            home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
            folder = home.expanduser() / "supcon_jax" / "jax"
        except RuntimeError:  # nobody's home is known: compile every time
            jax.config.update("jax_enable_compilation_cache", False)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    epaths.as_path(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
    # By default JAX keeps only what took over a second to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def open_sources(config: ConfigDict) -> tuple[Source, Source]:
    """The training and the evaluation split, checked against each other.

    Raises:
      ValueError: data or batch size cannot be used, in one line.
    """
    data = config.data
    open_split = functools.partial(_open_split, config)
    if data.fake:
        train, evaluation = (open_source("synthetic", s) for s in ("train", "test"))
    elif data.validation_fraction:
        whole = open_split(data.train_split)
        train, evaluation = selection.hold_out(
            whole,
            data.validation_fraction,
            seed=data.split_seed,
            labels=read_labels_at_start(whole).labels,
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
    train, evaluation = map(read_labels_at_start, (train, evaluation))
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
    baseline = (
        config.mode == "pretrain" and not OBJECTIVES[config.loss.name].contrastive
    )
    of_classifier = baseline or config.mode in ("linear_eval", "finetune")
    if not of_classifier or not has_labels(train):
        return train
    labelled = selection.take_labelled(train)
    if left := train.num_examples - labelled.num_examples:
        logger.info(
            "without a label, and left out: %s of %s training images",
            f"{left:,}",
            f"{train.num_examples:,}",
        )
    return labelled


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
        source = read_labels(_open_split(config, data.eval_split))
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
    source = selection.take_classes(source, data.classes)
    return load_small(source, data.image_size)


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


def check_hosts(config: ConfigDict) -> None:
    """Refuses a number of processes that cannot share the lanes.

    Raises:
      ValueError: naming the key to change.
    """
    lanes, hosts = config.data.lanes, jax.process_count()
    if lanes % hosts:
        raise ValueError(
            f"got data.lanes={lanes} on {hosts} hosts; allowed: a multiple of the hosts, "
            f"so that each has lanes of its own (--config.data.lanes={hosts})"
        )


def build_lanes(config: ConfigDict, source: Source) -> Lanes | None:
    """The lanes in which a split is read; None where it is shuffled as a whole.

    Raises:
      ValueError: it is no split of shuffled records in files.
    """
    count = config.data.lanes
    if not count or source.synthetic:
        return None
    why = ""
    if source.images is not None:
        why = "is held in memory"
    elif not isinstance(source, RecordSource):
        why = "has no records"
    elif not source.shuffled:
        why = "was prepared without being shuffled, so neighbours may be of one class"
    if why:
        raise ValueError(
            f"got data.lanes={count}, but {config.data.name} {why}; allowed: TFDS "
            "records read from their files (--config.data.lanes=0)"
        )
    mean_bytes = (source.num_bytes or 0) / source.num_examples
    return Lanes(source.num_examples, count, block_size(mean_bytes))


def build_sampler(config: ConfigDict, source: Source) -> Sampler:
    """Which training images a step sees: shuffled, in lanes or balanced over the classes.

    Raises:
      ValueError: the source cannot be read in lanes.
    """
    lanes = build_lanes(config, source)
    if lanes is not None:
        return lanes.sampler(config.batch_size, seed=config.seed)
    classes = config.data.classes_per_batch
    if not classes or source.synthetic:
        return shuffled(source.num_examples, config.batch_size, seed=config.seed)
    source = read_labels(source)
    if source.num_unlabelled:
        logger.warning(
            "warning: %s training images without a label are in no batch of "
            "data.classes_per_batch=%d classes (--config.data.classes_per_batch=0)",
            f"{source.num_unlabelled:,}",
            classes,
        )
    return class_balanced(
        source.labels,
        source.num_classes,
        config.batch_size,
        classes=classes,
        seed=config.seed,
    )


def build_train_batches(
    config: ConfigDict, source: Source, sampler: Sampler, *, start_step: int = 0
) -> Iterator[Batch]:
    """The host's stream of training batches, from a step on."""
    return train_batches(
        source,
        sampler,
        batch_size=config.batch_size,
        image_size=config.data.image_size,
        views=config.data.views,
        augmentation=builders.build_view_augmentation(config),
        seed=config.seed,
        start_step=start_step,
        lanes=build_lanes(config, source),
        keep_bytes=int(config.data.keep_gib * 2**30),
    )


def build_predictor(run: Run, encoder: nn.Module, head: nn.Module | None) -> Predictor:
    """What runs a frozen model over the splits of a run."""
    return create_predictor(run.config, run.mesh, encoder, head)


def create_predictor(
    config: ConfigDict, mesh: Mesh, encoder: nn.Module, head: nn.Module | None
) -> Predictor:
    """What runs a frozen model over splits, with the batches and images of a config."""
    return Predictor(
        encoder,
        head,
        normalize=builders.build_normalization(config),
        mesh=mesh,
        batch_size=config.batch_size,
        image_size=config.data.image_size,
        resize=config.data.eval_resize,
    )
