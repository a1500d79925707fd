"""From a config to the pieces of a run, for pretrain.py and linear_eval.py.

This and the two loops are the only places that read `config.*`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import optimizers, parallel
from supcon_jax.checkpoint import digest
from supcon_jax.data import augment
from supcon_jax.data import sources as sources_of
from supcon_jax.data.datasets import open_source
from supcon_jax.data.pipeline import (
    Batch,
    HostAugmentation,
    check_image_size,
    load_small,
    on_host,
    train_batches,
)
from supcon_jax.data.sampler import Sampler, class_balanced, shuffled
from supcon_jax.data.sources import Source, SyntheticSource
from supcon_jax.evaluation.predict import Predictor
from supcon_jax.models import Classifier, ResNet, create_encoder
from supcon_jax.workdir import finished_metrics, open_workdir

logger = logging.getLogger(__name__)
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose config, data and workdir have been checked and opened.

    Attributes:
      config: the checked config.
      workdir: absolute path; holds config.json.
      mesh: all devices.
      train_source, eval_source: the two splits.
      sampler: which training images a step sees.
      skipped: images that could not be decoded, and why; None: the first is an error.
      total_steps: updates to make.
      steps_per_epoch: images / batch size, fractional.
      finished: the final metrics, where the run is complete already.
      frozen: arrays that every step reads and none changes, on every device.
    """

    config: ConfigDict
    workdir: pathlib.Path
    mesh: Mesh
    train_source: Source
    eval_source: Source
    sampler: Sampler
    skipped: dict[str, str] | None
    total_steps: int
    steps_per_epoch: float
    finished: dict[str, Any] | None
    frozen: tuple[PyTree, ...] = ()


def open_run(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    load_frozen: Callable[[Mesh], tuple[PyTree, ...]] = lambda mesh: (),
) -> Run:
    """Opens data and workdir of a checked config; refuses before it writes anything.

    Args:
      config: a checked config.
      workdir: folder of the run.
      load_frozen: what the step reads and does not train, on every device of a mesh.

    Raises:
      ValueError: data, batch size or workdir cannot be used, in one line.
    """
    setup_compilation_cache(enabled=config.compilation_cache)
    mesh = parallel.create_mesh()
    parallel.check_batch_size(config.batch_size, mesh)
    parallel.check_microbatch_size(config.microbatch_size, config.batch_size, mesh)
    parallel.grouped_mesh(mesh, config.encoder.batch_norm_devices)
    skipped = {} if config.data.skip_errors else None
    train_source, eval_source = open_sources(config, skipped)
    sampler = build_sampler(config, train_source)
    steps_per_epoch = train_source.num_examples / config.batch_size
    # Whole steps, as in the official code; the summand is for products such as 389.9...9.
    steps = int(config.epochs * steps_per_epoch + 1e-6)
    total_steps = config.total_steps or max(1, steps)
    # Built once here for its checks alone, before the workdir is made.
    build_optimizer(config, total_steps, steps_per_epoch)
    build_encoder(config)
    frozen = load_frozen(mesh)
    path = open_workdir(config, workdir, frozen=digest(frozen) if frozen else "")
    logger.info("workdir %s", os.path.relpath(path))
    return Run(
        config=config,
        workdir=path,
        mesh=mesh,
        train_source=train_source,
        eval_source=eval_source,
        sampler=sampler,
        skipped=skipped,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        finished=finished_metrics(path),
        frozen=frozen,
    )


def setup_compilation_cache(*, enabled: bool) -> None:
    """Keeps compiled programs in the user's cache folder, so that a rerun starts fast.

    `JAX_COMPILATION_CACHE_DIR` chooses another folder.
    """
    jax.config.update("jax_enable_compilation_cache", enabled)
    if not enabled:
        return
    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser()
        jax.config.update(
            "jax_compilation_cache_dir", str(pathlib.Path(home) / "supcon_jax" / "jax")
        )
    # By default JAX keeps only what took over a second to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def open_sources(
    config: ConfigDict, skipped: dict[str, str] | None = None
) -> tuple[Source, Source]:
    """The training and the evaluation split, checked against each other.

    Args:
      config: a checked config.
      skipped: see `Run`.
    """
    data = config.data

    def open_split(split: str) -> Source:
        source = open_source(data.name, split, dir=data.dir, root=data.root)
        return load_small(source, data.image_size, skipped=skipped)

    if data.fake:
        train, evaluation = (open_source("synthetic", s) for s in ("train", "test"))
    elif data.validation_fraction:
        train, evaluation = sources_of.hold_out(
            open_split(data.train_split),
            data.validation_fraction,
            seed=data.split_seed,
        )
    else:
        train, evaluation = open_split(data.train_split), open_split(data.eval_split)
    train = sources_of.take_fraction(train, data.fraction, seed=data.split_seed)
    if data.samples_per_class and not isinstance(train, SyntheticSource):
        train = sources_of.take_per_class(
            train, data.samples_per_class, seed=data.split_seed
        )
    train = sources_of.add_label_noise(train, data.label_noise, seed=data.split_seed)
    for source in (train, evaluation):
        check_image_size(source, data.image_size)
    for split, source in ((data.train_split, train), (data.eval_split, evaluation)):
        if source.num_examples == 0:
            raise ValueError(
                f"split {split!r} of {data.name} is empty (--config.data.train_split, "
                "--config.data.eval_split)"
            )
    if train.num_examples < config.batch_size:
        raise ValueError(
            f"batch size {config.batch_size} is larger than the {train.num_examples} "
            f"training images; set --config.batch_size={train.num_examples} or less"
        )
    return train, evaluation


def build_sampler(config: ConfigDict, source: Source) -> Sampler:
    """Which training images a step sees: shuffled, or balanced over the classes."""
    classes = config.data.classes_per_batch
    if not classes or isinstance(source, SyntheticSource):
        return shuffled(source.num_examples, config.batch_size, seed=config.seed)
    return class_balanced(
        sources_of.read_labels(source).labels,
        source.num_classes,
        config.batch_size,
        classes=classes,
        seed=config.seed,
    )


def num_microbatches(config: ConfigDict) -> int:
    """Parts of a batch that go through the encoder one after the other."""
    return config.batch_size // (config.microbatch_size or config.batch_size)


def build_encoder(config: ConfigDict, *, axis_name: str | None = None) -> ResNet:
    """The encoder that `config.encoder` describes.

    Args:
      config: a checked config.
      axis_name: the mesh axis over which BatchNorm takes its statistics in training.
    """
    dtype = config.encoder.dtype
    if dtype == "auto":
        # Processors emulate bfloat16 several times slower than they run float32.
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return create_encoder(
        config.encoder.name,
        width=config.encoder.width,
        stem=config.encoder.stem,
        dtype=jnp.dtype(dtype),
        axis_name=axis_name,
        remat=config.encoder.remat,
    )


def build_classifier(config: ConfigDict, num_classes: int) -> Classifier:
    """The linear classifier that `config.classifier` describes."""
    return Classifier(
        num_classes=num_classes,
        init_name=config.classifier.init,
        normalize_embedding=config.encoder.normalize_embedding,
    )


def build_train_batches(
    config: ConfigDict,
    source: Source,
    sampler: Sampler,
    *,
    start_step: int = 0,
    skipped: dict[str, str] | None = None,
) -> Iterator[Batch]:
    """The host's stream of training batches, from a step on."""
    return train_batches(
        source,
        sampler,
        batch_size=config.batch_size,
        image_size=config.data.image_size,
        views=config.data.views,
        augmentation=HostAugmentation(
            crop_area=tuple(config.augment.crop_area),
            flip=config.augment.flip,
            policy=config.augment.policy,
            layers=config.augment.rand_augment_layers,
            magnitude=config.augment.rand_augment_magnitude,
            jitter_strength=config.augment.jitter_strength,
            jitter_probability=config.augment.jitter_probability,
        ),
        seed=config.seed,
        start_step=start_step,
        skipped=skipped,
    )


def build_predictor(run: Run, encoder: nn.Module, head: nn.Module | None) -> Predictor:
    """A frozen model's way over the splits of a run."""
    return Predictor(
        encoder,
        head,
        normalize=build_normalization(run.config),
        mesh=run.mesh,
        batch_size=run.config.batch_size,
        image_size=run.config.data.image_size,
        resize=run.config.data.eval_resize,
        skipped=run.skipped,
    )


def build_augmentation(
    config: ConfigDict, source: Source
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(images uint8, ids) -> [B, V, S, S, 3]` float32: in-step part and scaling.

    What the host does not do is done here, in the same order.
    """
    options = config.augment
    host = on_host(source, options.policy)
    jitter_here = options.policy == "none"  # a policy comes after the jitter
    in_step = functools.partial(
        augment.augment_batch,
        seed=config.seed,
        views=config.data.views,
        crop_area=None if host else tuple(options.crop_area),
        flip=options.flip and not host,
        jitter_strength=options.jitter_strength if jitter_here else 0.0,
        jitter_probability=options.jitter_probability,
        grayscale_probability=options.grayscale_probability,
        blur_probability=options.blur_probability,
        chunk_size=augmentation_chunk(),
    )
    scale = build_normalization(config)
    return lambda images, ids: scale(in_step(images, ids))


def augmentation_chunk() -> int | None:
    """Images that are augmented at a time in the step.

    A processor's caches hold the intermediate values of few images. Over several devices
    a loop along the batch would gather it, and accelerators want all the work at once.
    """
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    return 64 if alone else None


def build_normalization(config: ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """`images in [0, 1] -> (images - mean) / std`."""
    return functools.partial(
        augment.normalize, mean=tuple(config.data.mean), std=tuple(config.data.std)
    )


def scaled_learning_rate(config: ConfigDict) -> float:
    """The peak learning rate for this batch size (linear scaling rule)."""
    options = config.optimizer
    if not options.learning_rate_batch:
        return options.learning_rate
    return options.learning_rate * config.batch_size / options.learning_rate_batch


def build_optimizer(
    config: ConfigDict, total_steps: int, steps_per_epoch: float
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer that `config.optimizer` describes, and its schedule."""
    options = config.optimizer
    schedule = optimizers.create_schedule(
        options.schedule,
        learning_rate=scaled_learning_rate(config),
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=options.warmup_epochs,
        warmup_start=options.warmup_start,
        cosine_end=options.cosine_end,
        decay_rate=options.decay_rate,
        decay_epochs=options.decay_epochs,
        boundaries_epochs=tuple(options.boundaries_epochs),
    )
    optimizer = optimizers.create_optimizer(
        options.name,
        schedule,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        trust_coefficient=options.trust_coefficient,
        rmsprop_decay=options.rmsprop_decay,
        rmsprop_epsilon=options.rmsprop_epsilon,
        exclude=tuple(options.exclude),
    )
    if config.probe.learning_rate:
        # The recipes' rates are for contrastive losses; a probe has one of its own.
        optimizer = optax.partition(
            {"model": optimizer, "probe": optax.adam(config.probe.learning_rate)},
            lambda params: {n: "probe" if n == "probe" else "model" for n in params},
        )
    return optimizer, schedule
