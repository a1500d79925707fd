"""What stage 1 can be trained for, one line each.

A new loss is a function in `losses/`, a builder here and an entry in `OBJECTIVES`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import builders, parallel
from supcon_jax.losses import momentum_contrast_loss, supcon_loss
from supcon_jax.losses.cross_entropy import cross_entropy_of_views
from supcon_jax.losses.options import default_block_size
from supcon_jax.steps.contrastive import LossFunction


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss with the head that it needs.

    Attributes:
      build_head: `(config, num_classes, *, axis_name) -> module` on the embedding.
      build_loss: `(config, mesh) -> loss`, for use inside `jax.shard_map`.
      uses_labels: whether the loss looks at labels.
      contrastive: whether it compares views; its head is a projection then, and
        otherwise a classifier.
      takes_keys: whether the loss can compare queries with the keys of a momentum
        encoder, `(queries [b, D], groups [b], keys [K, D], key groups [K])`.
    """

    build_head: Callable[..., nn.Module]
    build_loss: Callable[[ConfigDict, Mesh], LossFunction]
    uses_labels: bool
    contrastive: bool
    takes_keys: bool = False


def build_cross_entropy(config: ConfigDict, mesh: Mesh) -> LossFunction:
    """Cross-entropy of the logits of every view."""
    return functools.partial(
        cross_entropy_of_views,
        label_smoothing=config.loss.label_smoothing,
        axis_name=mesh.axis_names,
    )


def build_contrastive(
    config: ConfigDict, mesh: Mesh, *, supervised: bool
) -> LossFunction:
    """The contrastive loss that `config.loss` describes.

    Each device compares its own anchors with the gathered batch; left to the compiler,
    a device might hold the whole matrix of similarities.
    """
    options, axes = config.loss, mesh.axis_names
    named_scale = options.scale in ("none", "temperature")
    shared: dict[str, Any] = {
        "temperature": options.temperature,
        "summation": options.summation,
        "denominator": options.denominator,
        "scale": options.scale if named_scale else float(options.scale),
        "block_size": default_block_size(parallel.platform(mesh)),
        "hard_negative_beta": options.hard_negative_beta,
        "with_diagnostics": True,
    }
    if config.momentum_encoder.decay:
        return cast(
            LossFunction,
            functools.partial(momentum_contrast_loss, axis_name=axes, **shared),
        )
    # On one device the matrix is symmetric: compute half of the tiles.
    single = mesh.size == 1
    loss: Any = functools.partial(
        supcon_loss,
        contrast_mode=options.contrast_mode,
        positives_cap=None if options.positives_cap < 0 else options.positives_cap,
        axis_name=None if single else axes,
        label_similarity=options.label_similarity,
        **shared,
    )

    def of_outputs(outputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        result = loss(outputs, labels if supervised else None)
        return jax.lax.pmean(result, axes) if single else result

    return of_outputs


OBJECTIVES: dict[str, Objective] = {
    "supcon": Objective(
        build_head=builders.build_projection,
        build_loss=functools.partial(build_contrastive, supervised=True),
        uses_labels=True,
        contrastive=True,
        takes_keys=True,
    ),
    "simclr": Objective(
        build_head=builders.build_projection,
        build_loss=functools.partial(build_contrastive, supervised=False),
        uses_labels=False,
        contrastive=True,
        takes_keys=True,
    ),
    "cross_entropy": Objective(
        build_head=builders.build_classifier,
        build_loss=build_cross_entropy,
        uses_labels=True,
        contrastive=False,
    ),
}


def has_projection(config: ConfigDict) -> bool:
    """Whether a pretraining run of this config has a projection head."""
    return OBJECTIVES[config.loss.name].contrastive and config.projection.output_dim > 0
