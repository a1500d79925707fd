"""Stage 1: train an encoder with a contrastive loss, or the cross-entropy baseline."""

from __future__ import annotations

import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from supcon_jax import experiment, loop, parallel
from supcon_jax.config import check_config
from supcon_jax.data.augment import mix_examples
from supcon_jax.data.sources import take_subset
from supcon_jax.evaluation.knn import knn_accuracy
from supcon_jax.experiment import Run
from supcon_jax.loop import Evaluate, Step
from supcon_jax.losses import supcon_loss
from supcon_jax.losses.cross_entropy import cross_entropy_loss
from supcon_jax.models import ProjectionHead
from supcon_jax.train_state import TrainState

logger = logging.getLogger(__name__)
Batch = dict[str, jax.Array]
# (outputs [B, V, D], labels [B]) -> scalar loss and metrics
LossFunction = Callable[[jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

# (images [B, V, H, W, 3], labels [B], ids [B, 2]) -> images and targets [B, C]
Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

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
    config = run.config
    encoder = experiment.build_encoder(config)
    head = build_head(config, run.train_source.num_classes)
    optimizer, schedule = experiment.build_optimizer(
        config, run.total_steps, run.steps_per_epoch
    )
    init = functools.partial(
        init_state,
        encoder=encoder,
        head=head,
        optimizer=optimizer,
        image_size=config.data.image_size,
        seed=config.seed,
    )
    step = functools.partial(
        train_step,
        encoder=encoder,
        head=head,
        optimizer=optimizer,
        schedule=schedule,
        augment=experiment.build_augmentation(config, run.train_source),
        loss_function=build_loss(config, run.mesh),
        mix=build_mixing(config, run.train_source.num_classes),
    )
    return init, step, build_evaluation(run, encoder, head)


def build_head(config: ConfigDict, num_classes: int) -> nn.Module:
    """The projection head, or the classifier of the cross-entropy baseline."""
    if config.loss.name == "cross_entropy":
        return experiment.build_classifier(config, num_classes)
    return ProjectionHead(
        hidden_dims=tuple(config.projection.hidden_dims),
        output_dim=config.projection.output_dim,
        batch_norm=config.projection.batch_norm,
        normalize_embedding=config.encoder.normalize_embedding,
        bias=config.projection.bias,
    )


def build_loss(config: ConfigDict, mesh: Mesh) -> LossFunction:
    """The loss that `config.loss` describes, over the global batch of a mesh."""
    options = config.loss
    if options.name == "cross_entropy":
        return functools.partial(
            cross_entropy_of_views, label_smoothing=options.label_smoothing
        )
    named_scale = options.scale in ("none", "temperature")
    loss = functools.partial(
        supcon_loss,
        temperature=options.temperature,
        contrast_mode=options.contrast_mode,
        summation=options.summation,
        denominator=options.denominator,
        positives_cap=None if options.positives_cap < 0 else options.positives_cap,
        scale=options.scale if named_scale else float(options.scale),
        axis_name=parallel.DATA_AXIS,
        with_diagnostics=True,
    )
    split = PartitionSpec(parallel.DATA_AXIS)
    # Each device compares its own anchors with the gathered batch; the compiler alone
    # would not promise that nobody holds the whole matrix of similarities.
    if options.name == "simclr":
        sharded = jax.shard_map(
            loss, mesh=mesh, in_specs=split, out_specs=PartitionSpec()
        )
        return lambda projections, labels: sharded(projections)
    return jax.shard_map(
        loss, mesh=mesh, in_specs=(split, split), out_specs=PartitionSpec()
    )


def build_mixing(config: ConfigDict, num_classes: int) -> Mix | None:
    """Mixup and CutMix of the cross-entropy baseline; None where there is neither."""
    options = config.augment
    if not options.mixup_alpha and not options.cutmix_alpha:
        return None
    return functools.partial(
        mix_examples,
        seed=config.seed,
        num_classes=num_classes,
        mixup_alpha=options.mixup_alpha,
        cutmix_alpha=options.cutmix_alpha,
    )


def cross_entropy_of_views(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy over images and views, and top-1 accuracy.

    Args:
      logits: `[B, V, C]`.
      labels: `[B]` integers, or `[B, C]` shares of the classes in each image.
      label_smoothing: see `cross_entropy_loss`.
    """
    views = logits.shape[1]
    logits = logits.reshape(-1, logits.shape[-1])
    labels = jnp.repeat(labels, views, axis=0)
    losses = cross_entropy_loss(logits, labels, label_smoothing=label_smoothing)
    if labels.ndim == 2:
        labels = jnp.argmax(labels, axis=-1)  # of a mixture, the larger part
    top1 = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
    return jnp.mean(losses), {"top1": top1}


def init_state(
    *,
    encoder: nn.Module,
    head: nn.Module,
    optimizer: optax.GradientTransformation,
    image_size: int,
    seed: int,
) -> TrainState:
    """A new TrainState; a function of the seed and the modules alone."""
    encoder_key, head_key = jax.random.split(jax.random.key(seed))
    images = jnp.zeros((2, image_size, image_size, 3))
    embeddings, encoder_variables = encoder.init_with_output(
        encoder_key, images, train=True
    )
    head_variables = head.init(head_key, embeddings, train=True)
    variables = {"encoder": encoder_variables, "head": head_variables}
    params = {name: tree["params"] for name, tree in variables.items()}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={n: tree.get("batch_stats", {}) for n, tree in variables.items()},
        opt_state=optimizer.init(params),
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    encoder: nn.Module,
    head: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    loss_function: LossFunction,
    mix: Mix | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update on one global batch; a pure function of state and batch.

    All views go through the encoder together, so BatchNorm sees the statistics of the
    whole global batch.

    Args:
      state: see `TrainState`.
      batch: "image" uint8 `[B, 1 or V, H, W, 3]`, "label" `[B]`, "id" `[B, 2]`.
      encoder, head, optimizer, schedule: what `state` belongs to.
      augment: `(images, ids) -> [B, V, H, W, 3]`.
      loss_function: `(outputs [B, V, D], labels [B]) -> (loss, metrics)`.
      mix: makes mixtures of two images each, and targets `[B, C]` for the loss.

    Returns:
      The new state, and scalar metrics named as in metrics.jsonl.
    """
    images, labels = augment(batch["image"], batch["id"]), batch["label"]
    if mix is not None:
        images, labels = mix(images, labels, batch["id"])
    num_images, views = images.shape[:2]

    def compute_loss(params: Any) -> tuple[jax.Array, Any]:
        variables = {
            name: {"params": params[name], "batch_stats": state.batch_stats[name]}
            for name in params
        }
        embeddings, encoder_stats = encoder.apply(
            variables["encoder"],
            images.reshape(num_images * views, *images.shape[2:]),
            train=True,
            mutable=["batch_stats"],
        )
        outputs, head_stats = head.apply(
            variables["head"], embeddings, train=True, mutable=["batch_stats"]
        )
        loss, metrics = loss_function(outputs.reshape(num_images, views, -1), labels)
        stats = {
            "encoder": encoder_stats.get("batch_stats", {}),
            "head": head_stats.get("batch_stats", {}),
        }
        return loss, (metrics, stats)

    gradient = jax.value_and_grad(compute_loss, has_aux=True)
    (loss, (metrics, batch_stats)), gradients = gradient(state.params)
    metrics = {f"train/{name}": value for name, value in metrics.items()}
    metrics |= {"train/loss": loss, "optim/learning_rate": schedule(state.step)}
    state = state.apply_gradients(
        gradients, optimizer=optimizer, batch_stats=batch_stats
    )
    return state, metrics


def build_evaluation(run: Run, encoder: nn.Module, head: nn.Module) -> Evaluate:
    """Online evaluation: kNN on the embeddings, and the classifier where there is one.

    The bank is made of training images without augmentation; the queries are the whole
    evaluation split.
    """
    config = run.config
    predictor = experiment.build_predictor(run, encoder, head)
    bank = take_subset(run.train_source, config.knn.bank, seed=config.seed)

    def evaluate(state: TrainState) -> dict[str, float]:
        variables = {
            name: {"params": params, "batch_stats": state.batch_stats[name]}
            for name, params in state.params.items()
        }
        metrics = {}
        if config.loss.name == "cross_entropy":
            metrics = predictor.classify(variables, run.eval_source)
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
