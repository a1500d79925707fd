"""The Supervised Contrastive loss: options, checks, reduction and diagnostics."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from supcon_jax.losses.rows import AnchorStatistics, Views, rowwise_losses

_CHOICES = {
    "contrast_mode": ("all", "one"),
    "summation": ("outside", "inside"),
    "denominator": ("all", "one_positive", "only_negatives"),
    "reduction": ("mean", "none"),
}


def supcon_loss(
    projections: jax.Array,
    labels: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 0.1,
    contrast_mode: str = "all",
    summation: str = "outside",
    denominator: str = "all",
    positives_cap: int | None = None,
    positives_key: jax.Array | None = None,
    scale: str | float = "none",
    normalize: bool = True,
    reduction: str = "mean",
    axis_name: str | tuple[str, ...] | None = None,
    block_size: int | None = None,
    with_diagnostics: bool = False,
) -> Any:
    """Supervised Contrastive loss."""
    options = {
        "contrast_mode": contrast_mode,
        "summation": summation,
        "denominator": denominator,
        "reduction": reduction,
    }
    _check_options(options, temperature, scale, block_size)
    projections, labels = _check_arrays(projections, labels)
    num_samples, num_views, _ = projections.shape
    _check_cap(positives_cap, positives_key, num_views)

    dtype = jnp.promote_types(projections.dtype, jnp.float32)
    z = projections.reshape(num_samples * num_views, -1).astype(dtype)
    if normalize:
        z = _unit(z)
    # With the temperature inside the vectors, u_i . u_j is the logit, and the gradient
    # of the temperature needs no code of its own.
    u = z * _inverse_sqrt(temperature, dtype)
    rows = _views(u, labels, num_samples, num_views, axis_name)
    columns = _gather(rows, axis_name)
    cap_order = None
    if positives_key is not None:
        cap_order = jax.random.permutation(positives_key, columns.group.size)
    losses, statistics = rowwise_losses(
        rows,
        columns,
        temperature=temperature,
        summation=summation,
        denominator=denominator,
        positives_cap=positives_cap,
        cap_order=cap_order,
        num_views=num_views,
        block_size=min(block_size or 256, rows.group.shape[0]),
    )
    if scale == "temperature":
        scale = temperature
    elif scale == "none":
        scale = 1.0
    num_anchor_views = num_views if contrast_mode == "all" else 1

    def anchors(x: jax.Array) -> jax.Array:
        return x.reshape(num_samples, num_views)[:, :num_anchor_views]

    losses = scale * anchors(losses)
    statistics = jax.tree.map(lambda x: lax.stop_gradient(anchors(x)), statistics)
    counted = statistics.num_positives > 0
    if denominator == "only_negatives":
        counted &= statistics.num_negatives > 0
    num_anchors = _total(counted.astype(dtype), axis_name)
    if reduction == "mean":
        loss = _total(losses, axis_name) / jnp.maximum(num_anchors, 1)
    else:
        loss = jnp.mean(losses, axis=1)
    if not with_diagnostics:
        return loss
    return loss, _diagnostics(
        statistics, counted, temperature, scale, denominator, axis_name
    )


def _check_options(options, temperature, scale, block_size) -> None:
    for name, value in options.items():
        if value not in _CHOICES[name]:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, _CHOICES[name]))}; "
                f"got {value!r}."
            )
    if jnp.ndim(temperature) != 0:
        raise ValueError(
            f"temperature must be a scalar; got shape {jnp.shape(temperature)}."
        )
    if not isinstance(temperature, jax.core.Tracer) and not (
        0 < float(temperature) < float("inf")
    ):
        raise ValueError(f"temperature must be positive; got {temperature}.")
    if isinstance(scale, str) and scale not in ("none", "temperature"):
        raise ValueError(
            f"scale must be 'none', 'temperature' or a number; got {scale!r}."
        )
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1; got {block_size}.")


def _check_arrays(projections, labels):
    projections = jnp.asarray(projections)
    if projections.ndim != 3 or 0 in projections.shape:
        raise ValueError(
            "projections must be [B, V, D] (images, views, dimension), none of them 0; "
            f"got shape {projections.shape}."
        )
    if not jnp.issubdtype(projections.dtype, jnp.floating):
        raise ValueError(
            f"projections must be floating point; got {projections.dtype}."
        )
    if labels is None:
        return projections, None
    labels = jnp.asarray(labels)
    if labels.shape != projections.shape[:1]:
        raise ValueError(
            f"labels must be [B] = {projections.shape[:1]} integers, one an image; "
            f"got shape {labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers; got {labels.dtype}.")
    return projections, labels


def _check_cap(positives_cap, positives_key, num_views) -> None:
    if positives_cap is None:
        if positives_key is not None:
            raise ValueError("positives_key needs positives_cap; got None.")
        return
    if (
        not isinstance(positives_cap, numbers.Integral)
        or positives_cap < 0
        or positives_cap % num_views
    ):
        raise ValueError(
            "positives_cap must be None or a multiple, at least 0, of the "
            f"{num_views} views; got {positives_cap!r}."
        )


def _unit(x: jax.Array) -> jax.Array:
    """Rows of unit length; a zero row stays zero, with a zero gradient."""
    # The length does not depend on this factor, so neither does the gradient; without
    # it, squares of small or large entries leave the range of float32.
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=1, keepdims=True))
    zero = largest == 0
    x = x / jnp.where(zero, 1, largest)
    length = jnp.sqrt(jnp.sum(jnp.where(zero, 1, x) ** 2, axis=1, keepdims=True))
    return jnp.where(zero, 0, x / length)


def _inverse_sqrt(temperature, dtype):
    return lax.rsqrt(jnp.asarray(temperature, dtype))


def _views(u, labels, num_samples, num_views, axis_name) -> Views:
    device = 0 if axis_name is None else lax.axis_index(axis_name)
    sample = device * num_samples + jnp.arange(num_samples, dtype=jnp.int32)
    own_group = -1 - sample
    if labels is None:
        group = own_group
    else:
        group = jnp.where(labels < 0, own_group, labels)
    index = device * num_samples * num_views + jnp.arange(
        num_samples * num_views, dtype=jnp.int32
    )
    return Views(u, jnp.repeat(group, num_views), jnp.repeat(sample, num_views), index)


def _gather(rows: Views, axis_name) -> Views:
    if axis_name is None:
        return rows
    return jax.tree.map(lambda x: lax.all_gather(x, axis_name, tiled=True), rows)


def _total(x: jax.Array, axis_name) -> jax.Array:
    total = jnp.sum(x)
    return total if axis_name is None else lax.psum(total, axis_name)


def _diagnostics(
    statistics: AnchorStatistics, counted, temperature, scale, denominator, axis_name
) -> dict[str, jax.Array]:
    def total(x):
        return _total(x.astype(jnp.float32), axis_name)

    def mean(x):
        return total(x) / total(jnp.ones_like(x))

    num_positives, num_negatives = statistics[:2]
    num_anchors = total(counted)
    size = {
        "all": num_positives + num_negatives,
        "one_positive": 1 + num_negatives,
        "only_negatives": num_negatives,
    }[denominator]
    log_size = jnp.log(jnp.where(counted, size, 1).astype(jnp.float32))
    num_pairs = jnp.maximum(total(num_positives), 1)
    positive_cosine = temperature * total(statistics.positive_sum) / num_pairs
    negative_cosine = (
        temperature
        * total(statistics.negative_sum)
        / jnp.maximum(total(num_negatives), 1)
    )
    top1 = counted & (statistics.hardest_positive > statistics.hardest_negative)
    gaussian = total(statistics.gaussian_sum) / jnp.maximum(
        total(num_positives + num_negatives), 1
    )
    diagnostics = {
        "collapse_loss": scale * total(log_size) / jnp.maximum(num_anchors, 1),
        "positive_cosine": positive_cosine,
        "negative_cosine": negative_cosine,
        "alignment": 2 - 2 * positive_cosine,
        "uniformity": jnp.log(gaussian),
        "contrastive_top1": total(top1) / jnp.maximum(num_anchors, 1),
        "no_positive_fraction": mean(num_positives == 0),
        "mean_positives": mean(num_positives),
        "num_anchors": num_anchors,
    }
    return jax.tree.map(lambda x: lax.stop_gradient(jnp.float32(x)), diagnostics)
