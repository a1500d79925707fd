"""Stage 1: train an encoder with a contrastive loss, or the cross-entropy baseline."""

from __future__ import annotations

import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import experiment, loop, parallel
from supcon_jax.config import check_config
from supcon_jax.data.augment import mix_examples
from supcon_jax.data.sources import Source, take_subset
from supcon_jax.evaluation.knn import knn_accuracy
from supcon_jax.experiment import Run
from supcon_jax.loop import Evaluate, Step
from supcon_jax.losses import momentum_contrast_loss, supcon_loss
from supcon_jax.losses.cross_entropy import cross_entropy_of_views
from supcon_jax.models import ProjectionHead
from supcon_jax.train_state import TrainState
from supcon_jax.train_step import Batch, LossFunction, Prepare, init_state, train_step

logger = logging.getLogger(__name__)

# Progress lines in a row at the collapse level before the run says so.
COLLAPSE_PATIENCE = 5


def pretrain(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Runs stage 1 and returns the final metrics.

    Args:
      config: see configs/common.py; `mode` is "pretrain".
      workdir: folder of the run; the same call on the same folder resumes.

    Raises:
      ValueError: a config, data or workdir that cannot be used, in one line.
    """
    check_config(config)
    run = experiment.open_run(config, workdir)
    init, step, evaluate = build(run)
    return loop.train(
        run, init=init, step=step, evaluate=evaluate, watch=CollapseMonitor()
    )


def build(run: Run) -> tuple[Callable[[], TrainState], Step, Evaluate]:
    """The three functions that make up stage 1, from an opened run.

    Returns:
      `init() -> state`, `step(state, batch) -> (state, metrics)`, both pure, and
      `evaluate(state) -> metrics`.
    """
    config, num_classes = run.config, run.train_source.num_classes
    mesh, norm_axis = parallel.grouped_mesh(run.mesh, config.encoder.batch_norm_devices)
    modules = {
        "encoder": experiment.build_encoder(config, axis_name=norm_axis),
        "head": build_head(config, num_classes, axis_name=norm_axis),
        "probe": build_probe(config, num_classes),
    }
    optimizer, schedule = experiment.build_optimizer(
        config, run.total_steps, run.steps_per_epoch
    )
    momentum_decay = config.momentum_encoder.decay
    init = functools.partial(
        init_state,
        **modules,
        optimizer=optimizer,
        image_size=config.data.image_size,
        seed=config.seed,
        momentum_decay=momentum_decay,
        queue_size=config.momentum_encoder.queue_size,
    )
    step = functools.partial(
        train_step,
        **modules,
        mesh=mesh,
        optimizer=optimizer,
        schedule=schedule,
        prepare=build_preparation(config, run.train_source),
        loss_function=build_loss(config, mesh),
        supervised=config.loss.name == "supcon",
        num_microbatches=experiment.num_microbatches(config),
        momentum_decay=momentum_decay,
    )
    return init, step, build_evaluation(run, **modules)


def build_head(
    config: ConfigDict, num_classes: int, *, axis_name: str | None
) -> nn.Module:
    """The projection head, or the classifier of the cross-entropy baseline."""
    if config.loss.name == "cross_entropy":
        return experiment.build_classifier(config, num_classes)
    return ProjectionHead(
        hidden_dims=tuple(config.projection.hidden_dims),
        output_dim=config.projection.output_dim,
        batch_norm=config.projection.batch_norm,
        normalize_embedding=config.encoder.normalize_embedding,
        bias=config.projection.bias,
        axis_name=axis_name,
    )


def build_probe(config: ConfigDict, num_classes: int) -> nn.Module | None:
    """The classifier that is trained beside a contrastive loss, where one is."""
    if not config.probe.learning_rate:
        return None
    return experiment.build_classifier(config, num_classes)


def build_loss(config: ConfigDict, mesh: Mesh) -> LossFunction:
    """The loss that `config.loss` describes, for use inside `jax.shard_map`.

    Each device compares its own anchors with the gathered batch; the compiler alone
    would not promise that nobody holds the whole matrix of similarities.
    """
    options, axes = config.loss, mesh.axis_names
    if options.name == "cross_entropy":
        return functools.partial(
            cross_entropy_of_views,
            label_smoothing=options.label_smoothing,
            axis_name=axes,
        )
    named_scale = options.scale in ("none", "temperature")
    shared = {
        "temperature": options.temperature,
        "summation": options.summation,
        "denominator": options.denominator,
        "scale": options.scale if named_scale else float(options.scale),
        "with_diagnostics": True,
    }
    if config.momentum_encoder.decay:
        return functools.partial(momentum_contrast_loss, axis_name=axes, **shared)
    # Alone, a device does half the work: a tile of the matrix stands for its mirror image.
    alone = mesh.size == 1
    loss = functools.partial(
        supcon_loss,
        contrast_mode=options.contrast_mode,
        positives_cap=None if options.positives_cap < 0 else options.positives_cap,
        axis_name=None if alone else axes,
        **shared,
    )

    def of_outputs(outputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        result = loss(outputs, labels if options.name == "supcon" else None)
        return jax.lax.pmean(result, axes) if alone else result

    return of_outputs


def build_preparation(config: ConfigDict, source: Source) -> Prepare:
    """Augmentation, Mixup and CutMix of the rows of a batch."""
    augment = experiment.build_augmentation(config, source)
    options = config.augment
    mixes = options.mixup_alpha or options.cutmix_alpha
    mix = functools.partial(
        mix_examples,
        seed=config.seed,
        num_classes=source.num_classes,
        mixup_alpha=options.mixup_alpha,
        cutmix_alpha=options.cutmix_alpha,
    )

    def prepare(rows: Batch) -> tuple[jax.Array, jax.Array]:
        images = augment(rows["image"], rows["id"])
        return (
            mix(images, rows["label"], rows["id"]) if mixes else (images, rows["label"])
        )

    return prepare


def build_evaluation(
    run: Run, encoder: nn.Module, head: nn.Module, probe: nn.Module | None
) -> Evaluate:
    """Online evaluation: kNN on the embeddings, and the classifier where there is one.

    The bank is made of training images without augmentation; the queries are the whole
    evaluation split.
    """
    config = run.config
    own = config.loss.name == "cross_entropy"  # its head is a classifier
    classifier = head if own else probe
    predictor = experiment.build_predictor(run, encoder, classifier)
    bank = take_subset(run.train_source, config.knn.bank, seed=config.seed)

    def evaluate(state: TrainState) -> dict[str, float]:
        variables = {
            name: {"params": params, "batch_stats": state.batch_stats[name]}
            for name, params in state.params.items()
        }
        metrics = {}
        if classifier is not None:
            of_classifier = variables["head" if own else "probe"]
            metrics = predictor.classify(
                variables | {"head": of_classifier}, run.eval_source
            )
        if config.knn.bank:
            metrics["knn/top1"] = knn_accuracy(
                *predictor.embed(variables, bank, label="kNN: training images"),
                *predictor.embed(variables, run.eval_source, label="kNN: test images"),
                k=config.knn.k,
                temperature=config.knn.temperature,
                num_classes=bank.num_classes,
            )
        return metrics

    return evaluate


class CollapseMonitor:
    """Says once, in plain words, that the projections have collapsed.

    When all projections are equal, the contrastive loss is `scale * log(N - 1)`
    exactly. A loss that stays within 1 % of that level has learned nothing.
    """

    def __init__(self, patience: int = COLLAPSE_PATIENCE):
        self._patience = patience
        self._count = 0

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Looks at the metrics of a progress line."""
        level = metrics.get("train/collapse_loss")
        if level is None:
            return
        near = abs(metrics["train/loss"] - level) <= 0.01 * abs(level)
        self._count = self._count + 1 if near else 0
        if self._count == self._patience:
            logger.warning(
                "warning: the loss has stayed at %.4f, the value of projections that "
                "are all equal: the encoder has collapsed. Cures: a longer warm-up "
                "(--config.optimizer.warmup_epochs), a lower learning rate "
                "(--config.optimizer.learning_rate), milder augmentation "
                "(--config.augment.*), a larger batch",
                level,
            )
