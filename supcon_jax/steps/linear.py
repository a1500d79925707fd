"""The update of stage 2: a classifier on the frozen encoder.

Why it is not the step of stage 1: nothing is trained but one linear layer, and BatchNorm
is in inference mode, so no statistics, projections or large gradients cross devices. What
does is the gradient of that layer, which `jax.jit` sums where it is computed in float32
anyway; so the step is written for the global batch, without `jax.shard_map`. The encoder
is an argument and no part of the state, so checkpoints hold the classifier alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from supcon_jax import parallel
from supcon_jax.losses.cross_entropy import (
    binary_cross_entropy_of_views,
    cross_entropy_of_views,
)
from supcon_jax.steps.contrastive import Modules
from supcon_jax.steps.state import TrainState, keep_finite

PyTree = Any


def init_state(
    modules: Modules,
    *,
    optimizer: optax.GradientTransformation,
    image_size: int,
    seed: int,
) -> TrainState:
    """A new TrainState that holds the classifier alone."""
    images = jnp.zeros((2, image_size, image_size, 3))
    embed = functools.partial(modules.encoder.init_with_output, train=True)
    shape, _ = jax.eval_shape(embed, jax.random.key(seed), images)
    embeddings = jnp.zeros(shape.shape, shape.dtype)
    head_variables = modules.head.init(jax.random.key(seed), embeddings, train=True)
    params = {"head": head_variables["params"]}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={"head": {}},
        opt_state=optimizer.init(params),
    )


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    encoder_variables: PyTree,
    *,
    modules: Modules,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    label_smoothing: float,
    logit_offset: jax.typing.ArrayLike = 0.0,
    num_microbatches: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the classifier; the encoder is in inference mode and unchanged.

    Args:
      state: holds the classifier.
      batch: "image" uint8 `[B, 1 or V, H, W, 3]`, "label" `[B]` or,
        of several classes an image, `[B, C]`, "id" `[B, 2]`.
      encoder_variables: `{"params": ..., "batch_stats": ...}`.
      modules: the frozen encoder and the classifier.
      optimizer, schedule: what `state` belongs to.
      augment: `(images, ids) -> [B, V, H, W, 3]`.
      label_smoothing: see `cross_entropy_loss`.
      logit_offset: `[C]`, see `logit_adjustment`.
      num_microbatches: parts of the batch that the encoder takes one after the other.

    Returns:
      The new state, and scalar metrics named as in metrics.jsonl.
    """

    def embed(carry: None, rows: dict[str, jax.Array]) -> tuple[None, jax.Array]:
        images = augment(rows["image"], rows["id"])
        num_images, views = images.shape[:2]
        images = images.reshape(num_images * views, *images.shape[2:])
        embeddings: Any = modules.encoder.apply(encoder_variables, images, train=False)
        return carry, embeddings.reshape(num_images, views, -1)

    _, embeddings = parallel.scan_microbatches(embed, None, batch, num_microbatches)

    def compute_loss(params: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits: Any = modules.head.apply(
            {"params": params["head"]}, embeddings, train=True
        )
        if batch["label"].ndim == 2:
            return binary_cross_entropy_of_views(logits, batch["label"])
        return cross_entropy_of_views(
            logits,
            batch["label"],
            label_smoothing=label_smoothing,
            logit_offset=logit_offset,
        )

    gradient = jax.value_and_grad(compute_loss, has_aux=True)
    (loss, metrics), gradients = gradient(state.params)
    metrics = {f"train/{name}": value for name, value in metrics.items()}
    metrics |= {
        "train/loss": loss,
        "optim/learning_rate": schedule(state.step),
        "optim/gradient_norm": optax.global_norm(gradients),
    }
    after = state.apply_gradients(
        gradients, optimizer=optimizer, batch_stats=state.batch_stats
    )
    return keep_finite(state, after, metrics)
