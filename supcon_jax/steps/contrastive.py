"""The update of stage 1: encoder and head, contrastive or cross-entropy.

Each device augments, embeds and contrasts its own rows of the batch inside
`jax.shard_map`; what crosses devices is named there: BatchNorm's statistics, the
projections that the loss gathers, and the sum of the gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from supcon_jax import parallel
from supcon_jax.losses.cross_entropy import cross_entropy_of_views
from supcon_jax.losses.supcon import l2_normalize
from supcon_jax.losses.tiles import gather
from supcon_jax.steps.momentum import (
    enqueue,
    init_momentum,
    remember,
    update_average,
    update_encoder_average,
)
from supcon_jax.steps.state import TrainState, keep_finite

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# rows of a batch -> images [b, V, S, S, 3] and targets: labels [b] or shares [b, C]
Prepare = Callable[[Batch], tuple[jax.Array, jax.Array]]
# (outputs [b, V, D], targets) -> loss and metrics of the whole batch; with a momentum
# encoder (queries [b, D], groups [b], keys [K, D], key groups [K])
LossFunction = Callable[..., tuple[jax.Array, Metrics]]


class Modules(NamedTuple):
    """The networks of a run.

    Attributes:
      encoder: images to embeddings.
      head: embeddings to what the loss compares: a projection or a classifier.
      classifier: beside a contrastive head, trained through the encoder.
      probe: a classifier that learns from the embedding without a gradient into it.
    """

    encoder: nn.Module
    head: nn.Module
    classifier: nn.Module | None = None
    probe: nn.Module | None = None


class StepSpec(NamedTuple):
    """What a step of stage 1 computes.

    Attributes:
      modules: the networks.
      prepare: augments, mixes and scales rows of the batch.
      loss_function: see `LossFunction`; runs inside `jax.shard_map`.
      supervised: whether keys of a momentum encoder belong together by label; else each
        image's own alone.
      num_microbatches: parts of the batch that the encoder takes one after the other;
        the backward pass computes each again (gradient caching), so memory holds one.
      momentum_decay: of the encoder that makes the keys, where the state has one.
      average_decay: of the encoder's average for use, where the state has one.
      cross_entropy_weight: of the classifier's cross-entropy in the trained loss.
      logit_offset: `[C]`, for that of classifier and probe; see `logit_adjustment`.
      noise: from "id" `[b, 2]` of rows the encoder's random keys `[b, V]`, one a view, the
        same on any number of devices; None: it draws no random numbers.
    """

    modules: Modules
    prepare: Prepare
    loss_function: LossFunction
    supervised: bool = True
    num_microbatches: int = 1
    momentum_decay: float = 0.0
    average_decay: float = 0.0
    cross_entropy_weight: float = 0.0
    logit_offset: jax.typing.ArrayLike = 0.0
    noise: Callable[[jax.Array], jax.Array] | None = None


def init_state(
    modules: Modules,
    *,
    optimizer: optax.GradientTransformation,
    image_size: int,
    seed: int,
    momentum_decay: float = 0.0,
    queue_size: int = 0,
    average_decay: float = 0.0,
) -> TrainState:
    """A new TrainState; a function of the seed and the modules alone.

    With a `momentum_decay` it holds a momentum encoder and a queue of that size, with an
    `average_decay` an average of the encoder.
    """
    encoder, head, classifier, probe = modules
    encoder_key, head_key = jax.random.split(jax.random.key(seed))
    images = jnp.zeros((2, image_size, image_size, 3))
    embeddings, encoder_variables = encoder.init_with_output(
        encoder_key, images, train=True
    )
    outputs, head_variables = head.init_with_output(head_key, embeddings, train=True)
    variables = {"encoder": encoder_variables, "head": head_variables}
    momentum = {}
    if momentum_decay:
        momentum = init_momentum(
            {name: tree.get("params", {}) for name, tree in variables.items()},
            queue_size=queue_size,
            output_dim=outputs.shape[-1],
        )
    for number, name in ((1, "probe"), (2, "classifier")):
        module = getattr(modules, name)
        if module is not None:
            key = jax.random.fold_in(head_key, number)
            variables[name] = module.init(key, embeddings, train=True)
    # Where there is no projection head it has none.
    params = {name: tree.get("params", {}) for name, tree in variables.items()}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={n: tree.get("batch_stats", {}) for n, tree in variables.items()},
        opt_state=optimizer.init(params),
        momentum=momentum,
    )
    if average_decay:
        # Copied: a step gives its state's memory away, each array once.
        average = jax.tree.map(jnp.copy, state.encoder_variables())
        state = state.replace(encoder_average=average)
    return state


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    spec: StepSpec,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[TrainState, Metrics]:
    """One update on one global batch; a pure function of state and batch.

    All views of a microbatch go through the encoder together, so BatchNorm sees them all
    (those on the devices of its group). The head and the loss see the whole batch.

    Args:
      state: see `TrainState`.
      batch: "image" uint8 `[B, 1 or V, H, W, 3]`, "label" `[B]`, "id" `[B, 2]`.
      spec: what the step computes.
      mesh: the devices, see `parallel.grouped_mesh`.
      optimizer, schedule: what `state` belongs to.

    Returns:
      The new state, and scalar metrics named as in metrics.jsonl.
    """
    momentum = state.momentum
    average = momentum.get("average")
    if average is not None:
        trained = {name: state.params[name] for name in average}
        average = update_average(average, trained, spec.momentum_decay)
    constants = {
        "batch_stats": state.batch_stats,
        "average": average,
        "queue": momentum.get("queue"),
    }
    replicated, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    gradient = parallel.value_and_grad(
        functools.partial(loss_of_rows, spec=spec, axes=mesh.axis_names),
        mesh,
        aux_specs=(replicated, replicated, split),
    )
    (_, (metrics, batch_stats, keys)), gradients = gradient(
        state.params, constants, batch
    )
    if average is not None:
        momentum = {"average": average, "queue": remember(momentum["queue"], **keys)}
    metrics = {f"train/{name}": value for name, value in metrics.items()}
    metrics["optim/learning_rate"] = schedule(state.step)
    metrics["optim/gradient_norm"] = optax.global_norm(gradients)
    after = state.apply_gradients(
        gradients, optimizer=optimizer, batch_stats=batch_stats
    ).replace(momentum=momentum)
    if spec.average_decay:
        average = update_encoder_average(
            state.encoder_average,
            after.encoder_variables(),
            spec.average_decay,
            state.step,
        )
        after = after.replace(encoder_average=average)
    return keep_finite(state, after, metrics)


def loss_of_rows(
    params: PyTree,
    constants: PyTree,
    rows: Batch,
    *,
    spec: StepSpec,
    axes: tuple[str, ...],
) -> tuple[jax.Array, tuple[Metrics, PyTree, Batch]]:
    """The loss of the whole batch, from this device's rows (inside `jax.shard_map`).

    Args:
      params: of encoder, head, classifier and probe.
      constants: batch statistics, the momentum encoder's parameters and the queue.
      rows: this device's part of the batch.
      spec: what the step computes.
      axes: of the mesh.

    Returns:
      The loss, and metrics, new batch statistics, and the keys of this device.
    """
    encoder, head, classifier, probe = spec.modules
    average, stats = constants["average"], constants["batch_stats"]
    # Devices along these axes have statistics of their own.
    apart = tuple(axis for axis in axes if axis != getattr(encoder, "axis_name", None))
    stats = parallel.varying(stats, apart)

    def embed(stats: PyTree, rows: Batch) -> tuple[PyTree, PyTree]:
        images, targets = spec.prepare(rows)
        views = images, spec.noise(rows["id"]) if spec.noise else None
        anchors = views if average is None else jax.tree.map(lambda x: x[:, :1], views)
        embeddings, new_stats = _apply(encoder, params["encoder"], stats, *anchors)
        embedded = {"embeddings": embeddings, "targets": targets}
        if average is not None:
            embedded["keys"], _ = _apply(
                encoder,
                average["encoder"],
                stats,
                *jax.tree.map(lambda x: x[:, 1:], views),
            )
        return new_stats, embedded

    if spec.num_microbatches > 1:
        embed = jax.checkpoint(embed)
    encoder_stats, embedded = parallel.scan_microbatches(
        embed, stats["encoder"], rows, spec.num_microbatches
    )
    embeddings, targets = embedded["embeddings"], embedded["targets"]
    outputs, head_stats = _apply(head, params["head"], stats["head"], embeddings)
    keys = {}
    if average is None:
        loss, metrics = spec.loss_function(outputs, targets)
    else:
        projected, _ = _apply(head, average["head"], stats["head"], embedded["keys"])
        groups = _groups(
            targets if spec.supervised else jnp.full_like(targets, -1), axes
        )
        keys = {
            "keys": l2_normalize(projected.reshape(-1, projected.shape[-1])),
            "groups": jnp.repeat(groups, projected.shape[1]),
        }
        queue = enqueue(constants["queue"], **gather(keys, axes))
        loss, metrics = spec.loss_function(
            outputs[:, 0], groups, queue["keys"], queue["groups"]
        )
    metrics, total = metrics | {"loss": loss}, loss
    new_stats = {"encoder": encoder_stats, "head": head_stats}
    if classifier is not None:
        logits, new_stats["classifier"] = _apply(
            classifier, params["classifier"], {}, embeddings
        )
        cross_entropy, found = cross_entropy_of_views(
            logits, targets, logit_offset=spec.logit_offset, axis_name=axes
        )
        metrics |= {"cross_entropy_loss": cross_entropy, "top1": found["top1"]}
        total += spec.cross_entropy_weight * cross_entropy
    if probe is not None:
        logits, new_stats["probe"] = _apply(
            probe, params["probe"], {}, jax.lax.stop_gradient(embeddings)
        )
        probe_loss, found = cross_entropy_of_views(
            logits, targets, logit_offset=spec.logit_offset, axis_name=axes
        )
        metrics |= {"probe_loss": probe_loss, "probe_top1": found["top1"]}
        total += probe_loss
    return total, (metrics, parallel.mean_over(new_stats, apart), keys)


def _apply(
    module: nn.Module,
    params: PyTree,
    batch_stats: PyTree,
    x: jax.Array,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, PyTree]:
    """A module in training mode on `[b, V, ...]`: `[b, V, D]` and new statistics.

    One that draws random numbers in training takes `noise`, keys `[b, V]`.
    """
    random: dict[str, Any] = {} if noise is None else {"keys": noise.reshape(-1)}
    outputs, updated = module.apply(
        {"params": params, "batch_stats": batch_stats},
        x.reshape(-1, *x.shape[2:]),
        train=True,
        mutable=["batch_stats"],
        **random,
    )
    stats = jax.lax.stop_gradient(updated.get("batch_stats", {}))
    return outputs.reshape(*x.shape[:2], -1), stats


def _groups(labels: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Labels, and for unlabelled images (below 0) a number of their own below 0."""
    first = jax.lax.axis_index(axes) * len(labels)
    own = -1 - first - jnp.arange(len(labels), dtype=jnp.int32)
    return jnp.where(labels < 0, own, labels)
