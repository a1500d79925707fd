"""The Supervised Contrastive loss: its options, checks and reduction."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from supcon_jax.losses.diagnostics import psum, summarize
from supcon_jax.losses.rows import rowwise_losses
from supcon_jax.losses.streaming import Plan, Views, gather, streaming_losses

_CHOICES = {
    "contrast_mode": ("all", "one"),
    "summation": ("outside", "inside"),
    "denominator": ("all", "one_positive", "only_negatives"),
    "reduction": ("mean", "none"),
}

# Below it exp(-2 / temperature), the smallest term of a sum shifted by the largest
# possible logit, leaves the range of float32.
_LOWEST_BOUNDED_TEMPERATURE = 0.025


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
    r"""Supervised Contrastive loss: pulls views of one class together.

    For an anchor i with positives P(i) (views of the same class) among all other views
    A(i), and logits s_ij = z_i . z_j / temperature,

    .. math::
      L_i^{out} = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
        \log \frac{\exp(s_{ip})}{\sum_{a \in A(i)} \exp(s_{ia})}

    and with ``summation="inside"`` the logarithm of the mean instead of the mean of the
    logarithms. The loss is the mean over the anchors that have a positive. Value and
    gradient are exact and need memory linear in the number of views N = B * V.

    Args:
      projections: `[B, V, D]`, V views of each of B images, any floating type; computed
        in float32 (float64 for float64 input).
      labels: `[B]` integers. An image with a negative label is unlabelled: its only
        positives are its own other views. None makes every image so (SimCLR).
      temperature: positive scalar. It may be a traced array, with its right gradient.
      contrast_mode: "all", every view is an anchor, or "one", only each first view.
      summation: "outside" the logarithm (Eq. 2) or "inside" (Eq. 3).
      denominator: "all" other views; "one_positive", the positive at hand and the
        negatives; or "only_negatives".
      positives_cap: how many positives besides the anchor's own views are kept, a
        multiple of V; the others leave the denominator too. None keeps all.
      positives_key: a JAX random key: the cap keeps a random choice of images instead
        of those with the lowest index in the batch.
      scale: factor on the loss: "none", "temperature" (as the official code) or a
        positive number (temperature / 0.07 in the PyTorch code of the authors).
      normalize: whether to scale projections to unit length first. Without it the
        logits are plain inner products, and so are the "cosines" of the diagnostics.
      reduction: "mean", or "none" for `[B]`, the mean over each image's anchors.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the batch is
        split; every device contrasts its images with the whole batch. The mean is over
        the whole batch too, the same on every device.
      block_size: side of the tiles that are held at a time; None chooses.
      with_diagnostics: whether to return the diagnostics too.

    Returns:
      The loss, a scalar or `[B]`. With `with_diagnostics`, a pair of it and a
      dictionary of float32 scalars over the whole batch, without gradient:
      `collapse_loss`, the value at which all embeddings are equal (a loss that sits
      there has collapsed); `positive_cosine` and `negative_cosine`, means over pairs;
      `alignment`, the mean squared distance of positives, and `uniformity`, the log of
      the mean of exp(-2 squared distance) over all pairs (Wang and Isola, 2020);
      `contrastive_top1`, the share of anchors that have a positive nearer than every
      negative; `no_positive_fraction`; `mean_positives`; and `num_anchors`, how many
      anchors entered the mean.

    Raises:
      ValueError: for a wrong shape, type or option; it says what was got and allowed.

    Example:
      >>> import jax
      >>> from supcon_jax import supcon_loss
      >>> projections = jax.random.normal(jax.random.key(0), (4, 2, 16))
      >>> labels = jax.numpy.array([0, 0, 1, -1])
      >>> loss = supcon_loss(projections, labels, temperature=0.1)
      >>> gradient = jax.grad(supcon_loss)(projections, labels)
      >>> loss.shape, gradient.shape
      ((), (4, 2, 16))

      On the devices of a mesh, with the batch split along its axis "data"::

        loss_fn = jax.shard_map(
            functools.partial(supcon_loss, axis_name="data"),
            mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P())

    Source: Khosla et al., Supervised Contrastive Learning, 2020, Eq. 2 and 3
    (https://arxiv.org/abs/2004.11362). The gradient is derived in docs/losses.md.
    """
    _check_choices(
        contrast_mode=contrast_mode,
        summation=summation,
        denominator=denominator,
        reduction=reduction,
    )
    _check_numbers(temperature, scale, block_size)
    projections, labels = _check_arrays(projections, labels)
    _check_cap(positives_cap, positives_key, projections.shape[1])

    inputs = {"projections": projections, "labels": labels}
    options = {
        "contrast_mode": contrast_mode,
        "summation": summation,
        "denominator": denominator,
        "positives_cap": positives_cap,
        "scale": scale,
        "normalize": normalize,
        "reduction": reduction,
        "axis_name": axis_name,
        "block_size": block_size or default_block_size(),
        "with_diagnostics": with_diagnostics,
    }
    for name, value in (("temperature", temperature), ("positives_key", positives_key)):
        (inputs if isinstance(value, jax.Array) else options)[name] = value

    def compute(inputs: dict[str, Any]) -> Any:
        return _compute(**inputs, **options)

    mesh = jax.typeof(projections).sharding.mesh
    if mesh.explicit_axes:
        # On a mesh with explicit axes too, the compiler places the collectives.
        compute = jax.sharding.auto_axes(
            compute, axes=mesh.explicit_axes, out_sharding=NamedSharding(mesh, P())
        )
    return compute(inputs)


def _compute(
    projections: jax.Array,
    labels: jax.Array | None,
    temperature: float | jax.Array,
    positives_key: jax.Array | None,
    *,
    contrast_mode: str,
    summation: str,
    denominator: str,
    positives_cap: int | None,
    scale: str | float,
    normalize: bool,
    reduction: str,
    axis_name: str | tuple[str, ...] | None,
    block_size: int,
    with_diagnostics: bool,
) -> Any:
    """`supcon_loss` of checked arguments."""
    num_images, num_views, _ = projections.shape
    dtype = jnp.promote_types(projections.dtype, jnp.float32)
    embeddings = projections.reshape(num_images * num_views, -1).astype(dtype)
    if normalize:
        embeddings = unit(embeddings)
    # With the temperature inside the vectors, their products are the logits, and its
    # gradient needs no formula of its own.
    embeddings *= lax.rsqrt(jnp.asarray(temperature, dtype))
    views = _label_views(embeddings, labels, num_images, num_views, axis_name)
    if denominator == "all" and positives_cap is None:
        plan = Plan(
            summation=summation,
            bound=_logit_bound(temperature) if normalize else None,
            block_size=block_size,
            axis_name=axis_name,
            with_statistics=with_diagnostics,
        )
        losses, counted, statistics = streaming_losses(plan, views, temperature)
    else:
        columns = gather(views, axis_name)
        order = None
        if positives_key is not None:
            num_all_images = columns.index.shape[0] // num_views
            order = jax.random.permutation(positives_key, num_all_images)
        losses, counted, statistics = rowwise_losses(
            views,
            columns,
            temperature=temperature,
            summation=summation,
            denominator=denominator,
            positives_cap=positives_cap,
            cap_order=order,
            num_views=num_views,
            block_size=block_size,
            with_statistics=with_diagnostics,
        )

    num_anchor_views = num_views if contrast_mode == "all" else 1

    def anchors(x: jax.Array) -> jax.Array:
        return x.reshape(num_images, num_views)[:, :num_anchor_views]

    scale = {"none": 1.0, "temperature": temperature}.get(scale, scale)
    losses, counted = scale * anchors(losses), anchors(counted)
    if reduction == "mean":
        loss = mean_over_anchors(losses, counted, axis_name)
    else:
        loss = jnp.mean(losses, axis=1)
    if not with_diagnostics:
        return loss
    return loss, summarize(
        jax.tree.map(anchors, statistics),
        counted,
        temperature=temperature,
        scale=scale,
        denominator=denominator,
        axis_name=axis_name,
    )


def mean_over_anchors(
    losses: jax.Array, counted: jax.Array, axis_name: str | tuple[str, ...] | None
) -> jax.Array:
    """The sum of all losses over the number of anchors that count, on all devices."""
    num_anchors = psum(jnp.sum(counted.astype(losses.dtype)), axis_name)
    return psum(jnp.sum(losses), axis_name) / jnp.maximum(num_anchors, 1)


def unit(x: jax.Array) -> jax.Array:
    """Rows of unit length; a zero row stays zero, with a zero gradient."""
    # The result does not depend on this factor, so neither does the gradient; without
    # it the squares of small or large entries leave the range of float32.
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=1, keepdims=True))
    zero = largest == 0
    x = jnp.where(zero, 1, x / jnp.where(zero, 1, largest))
    return jnp.where(zero, 0, x / jnp.sqrt(jnp.sum(x**2, axis=1, keepdims=True)))


def _label_views(
    embeddings: jax.Array,
    labels: jax.Array | None,
    num_images: int,
    num_views: int,
    axis_name: str | tuple[str, ...] | None,
) -> Views:
    device = 0 if axis_name is None else lax.axis_index(axis_name)
    num_rows = num_images * num_views
    image = device * num_images + jnp.arange(num_images, dtype=jnp.int32)
    # An unlabelled image is a group of its own, named by a number that no label has.
    group = -1 - image
    if labels is not None:
        group = jnp.where(labels < 0, group, labels)
    return Views(
        embedding=embeddings,
        group=jnp.repeat(group, num_views),
        index=device * num_rows + jnp.arange(num_rows, dtype=jnp.int32),
    )


def _logit_bound(temperature: float | jax.Array) -> float | None:
    """1 / temperature, which bounds the logits of unit vectors, if that is of use."""
    if isinstance(temperature, jax.core.Tracer):
        return None
    if temperature < _LOWEST_BOUNDED_TEMPERATURE:
        return None
    return 1 / float(temperature)


def default_block_size(platform: str | None = None) -> int:
    """Side of the tiles of logits that are held at a time.

    Args:
      platform: of the devices that will run it; None: JAX's default.
    """
    # Measured on CPU cores, where a tile should stay in the cache; an accelerator wants
    # fewer and larger tiles.
    return 1024 if (platform or jax.default_backend()) == "cpu" else 2048


def _check_choices(**options: str) -> None:
    for name, value in options.items():
        if value not in _CHOICES[name]:
            allowed = " or ".join(map(repr, _CHOICES[name]))
            raise ValueError(f"{name} must be {allowed}; got {value!r}.")


def _check_numbers(temperature: Any, scale: Any, block_size: Any) -> None:
    if isinstance(temperature, str) or jnp.ndim(temperature) != 0:
        raise ValueError(f"temperature must be a scalar; got {temperature!r}.")
    traced = isinstance(temperature, jax.core.Tracer)
    if not traced and not 0 < float(temperature) < math.inf:
        raise ValueError(f"temperature must be positive; got {temperature}.")
    named = scale in ("none", "temperature") if isinstance(scale, str) else False
    number = isinstance(scale, numbers.Real) and 0 < scale < math.inf
    if not named and not number:
        raise ValueError(
            f"scale must be 'none', 'temperature' or a positive number; got {scale!r}."
        )
    if block_size is not None and not _is_integer(block_size, at_least=1):
        raise ValueError(
            f"block_size must be None or a positive integer; got {block_size!r}."
        )


def _check_arrays(projections: Any, labels: Any) -> tuple[jax.Array, jax.Array | None]:
    projections = jnp.asarray(projections)
    if projections.ndim != 3 or 0 in projections.shape:
        raise ValueError(
            "projections must be [B, V, D], images by views by dimension, none of them "
            f"0; got shape {projections.shape}."
        )
    if not jnp.issubdtype(projections.dtype, jnp.floating):
        raise ValueError(
            f"projections must be of a floating type; got {projections.dtype}."
        )
    if labels is None:
        return projections, None
    labels = jnp.asarray(labels)
    if labels.shape != projections.shape[:1]:
        raise ValueError(
            f"labels must be [B] = {projections.shape[:1]}, one an image; got shape "
            f"{labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers; got {labels.dtype}.")
    # Negative numbers name the unlabelled images: wide enough for them, and signed.
    return projections, labels.astype(jnp.promote_types(labels.dtype, jnp.int32))


def _check_cap(positives_cap: Any, positives_key: Any, num_views: int) -> None:
    if positives_cap is None:
        if positives_key is not None:
            raise ValueError(
                "positives_key chooses under a positives_cap; got positives_cap=None."
            )
    elif not _is_integer(positives_cap, at_least=0) or positives_cap % num_views:
        raise ValueError(
            f"positives_cap must be None or a multiple of the {num_views} views, 0 "
            f"included; got {positives_cap!r}."
        )


def _is_integer(x: Any, *, at_least: int) -> bool:
    return isinstance(x, numbers.Integral) and x >= at_least
