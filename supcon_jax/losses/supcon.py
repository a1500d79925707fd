"""The Supervised Contrastive loss: its options, checks and reduction."""

import functools
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from supcon_jax.losses.diagnostics import psum, summarize
from supcon_jax.losses.labels import check_labels, fit_factor, prepare_weights
from supcon_jax.losses.options import (
    AxisName,
    LossOptions,
    Temperature,
    check_choices,
    check_numbers,
    default_block_size,
    is_integer,
)
from supcon_jax.losses.rows import Columns, rowwise_losses
from supcon_jax.losses.streaming import streaming_losses
from supcon_jax.losses.tiles import Plan, Views, gather

# Below it exp(-2 / temperature), the smallest term of a sum shifted by the largest
# possible logit, leaves the range of float32.
_LOWEST_BOUNDED_TEMPERATURE = 0.025

Diagnostics = dict[str, jax.Array]


@overload
def supcon_loss(
    projections: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    temperature: Temperature = 0.1,
    contrast_mode: str = "all",
    summation: str = "outside",
    denominator: str = "all",
    positives_cap: int | None = None,
    positives_key: jax.Array | None = None,
    scale: str | float = "none",
    normalize: bool = True,
    reduction: str = "mean",
    axis_name: AxisName = None,
    block_size: int | None = None,
    label_similarity: str = "jaccard",
    hard_negative_beta: float = 0.0,
    with_diagnostics: Literal[False] = False,
) -> jax.Array: ...


@overload
def supcon_loss(
    projections: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    temperature: Temperature = 0.1,
    contrast_mode: str = "all",
    summation: str = "outside",
    denominator: str = "all",
    positives_cap: int | None = None,
    positives_key: jax.Array | None = None,
    scale: str | float = "none",
    normalize: bool = True,
    reduction: str = "mean",
    axis_name: AxisName = None,
    block_size: int | None = None,
    label_similarity: str = "jaccard",
    hard_negative_beta: float = 0.0,
    with_diagnostics: Literal[True],
) -> tuple[jax.Array, Diagnostics]: ...


@overload
def supcon_loss(
    projections: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    temperature: Temperature = 0.1,
    contrast_mode: str = "all",
    summation: str = "outside",
    denominator: str = "all",
    positives_cap: int | None = None,
    positives_key: jax.Array | None = None,
    scale: str | float = "none",
    normalize: bool = True,
    reduction: str = "mean",
    axis_name: AxisName = None,
    block_size: int | None = None,
    label_similarity: str = "jaccard",
    hard_negative_beta: float = 0.0,
    with_diagnostics: bool,
) -> jax.Array | tuple[jax.Array, Diagnostics]: ...


def supcon_loss(
    projections: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    temperature: Temperature = 0.1,
    contrast_mode: str = "all",
    summation: str = "outside",
    denominator: str = "all",
    positives_cap: int | None = None,
    positives_key: jax.Array | None = None,
    scale: str | float = "none",
    normalize: bool = True,
    reduction: str = "mean",
    axis_name: AxisName = None,
    block_size: int | None = None,
    label_similarity: str = "jaccard",
    hard_negative_beta: float = 0.0,
    with_diagnostics: bool = False,
) -> jax.Array | tuple[jax.Array, Diagnostics]:
    r"""Supervised Contrastive loss: pulls views of one class together.

    For an anchor i with positives P(i) (views of the same class) among all other views
    A(i), and logits s_ij = z_i . z_j / temperature,

    .. math::
      L_i^{out} = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
        \log \frac{\exp(s_{ip})}{\sum_{a \in A(i)} \exp(s_{ia})}

    and with ``summation="inside"`` the logarithm of the mean instead of the mean of the
    logarithms. The loss is the mean over the anchors that have a positive. Value and
    gradient are exact and need memory linear in the number of views N = B * V.

    With rows of class weights y_i as labels, a positive has a weight and

    .. math::
      L_i^{out} = -\frac{1}{\sum_p w_{ip}} \sum_p w_{ip}
        \log \frac{\exp(s_{ip})}{\sum_{a \in A(i)} \exp(s_{ia})}

    and inside, the logarithm of the weighted mean. One-hot rows give the loss of the
    integers to the last digit.

    Args:
      projections: `[B, V, D]`, V views of each of B images, any floating type; computed
        in float32 (float64 for float64 input).
      labels: `[B]` integers of any type. An image with a negative label is unlabelled:
        its only positives are its own other views. None makes every image so (SimCLR).
        Or `[B, C]` weights of at least 0 of the classes in each image, not all of them 0
        (a row of zeros is refused, or unlabelled under `jit`, where nobody can look).
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
      block_size: largest side of the tiles that are held at a time; None chooses.
      label_similarity: the weight w_ij of two images by their rows of `[B, C]`: "any", 1
        if they share a class, else 0; "jaccard", sum_c min(y_ic, y_jc) over
        sum_c max(y_ic, y_jc); "inner", the cosine of y_i and y_j. Pairs of weight 0 are
        negatives; views of one image have the weight 1. All are one for labels `[B]`.
      hard_negative_beta: weighs each negative n in the denominator by exp(beta s_in)
        over the mean of that over the anchor's negatives (Robinson et al., 2020), and
        differentiates through the weights. 0 weighs all alike.
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
    (https://arxiv.org/abs/2004.11362); hard negatives: Robinson et al., 2020
    (https://arxiv.org/abs/2010.04592). The gradient is derived in docs/losses.md.
    """
    check_choices(
        contrast_mode=contrast_mode,
        summation=summation,
        denominator=denominator,
        reduction=reduction,
        label_similarity=label_similarity,
    )
    check_numbers(temperature, scale, block_size, hard_negative_beta)
    checked_projections, checked_labels, labelled = _check_arrays(projections, labels)
    num_views = checked_projections.shape[1]
    _check_cap(positives_cap, positives_key, num_views, checked_labels)
    inputs = _Inputs(
        checked_projections, checked_labels, labelled, temperature, positives_key
    )
    options = LossOptions(
        summation=summation,
        denominator=denominator,
        scale=scale if isinstance(scale, str) else float(scale),
        axis_name=axis_name,
        block_size=block_size or default_block_size(),
        with_diagnostics=with_diagnostics,
        contrast_mode=contrast_mode,
        positives_cap=positives_cap,
        normalize=normalize,
        reduction=reduction,
        num_views=num_views,
        label_similarity=label_similarity,
        hard_negative_beta=float(hard_negative_beta),
    )
    mesh = jax.typeof(checked_projections).sharding.mesh
    if not mesh.explicit_axes:
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(inputs))
        if traced or axis_name is not None:
            return _compute(options, inputs)
        # Outside of any transformation a loop over tiles would be compiled at each call.
        number = float(inputs.temperature)
        return _compiled(options, inputs.all_labelled, number, inputs)

    # On a mesh with explicit axes too, the compiler places the collectives. A number
    # stays a number: what is known of it chooses the path.
    arrays = {k: v for k, v in inputs._asdict().items() if isinstance(v, jax.Array)}

    def compute(
        arrays: dict[str, jax.Array],
    ) -> jax.Array | tuple[jax.Array, Diagnostics]:
        replaced = inputs._replace(**arrays)  # type: ignore[arg-type]
        return _compute(options, replaced)

    return jax.sharding.auto_axes(
        compute, axes=mesh.explicit_axes, out_sharding=NamedSharding(mesh, P())
    )(arrays)


class _Inputs(NamedTuple):
    """The arrays of `supcon_loss`, checked."""

    projections: jax.Array
    labels: jax.Array | None
    all_labelled: bool
    temperature: Temperature
    positives_key: jax.Array | None


def _compute(
    options: LossOptions, inputs: _Inputs
) -> jax.Array | tuple[jax.Array, Diagnostics]:
    num_images, num_views, _ = inputs.projections.shape
    # Of the type that is computed in, here once. What is known stays a number, which
    # chooses the path and has no type of its own.
    dtype = _computed_in(inputs.projections)
    temperature = inputs.temperature
    if isinstance(temperature, jax.core.Tracer):
        temperature = temperature.astype(dtype)
    else:
        temperature = float(temperature)
    inputs = inputs._replace(temperature=temperature)
    views = _label_views(options, inputs)
    symmetric = options.denominator == "all" and not options.hard_negative_beta
    if symmetric and options.positives_cap is None:
        bound = _logit_bound(temperature) if options.normalize else None
        losses, counted, statistics = streaming_losses(
            Plan(options, bound), views, temperature
        )
    else:
        columns = Columns(gather(views, options.axis_name), temperature)
        if inputs.positives_key is not None:
            num_all_images = columns.views.position.shape[0] // num_views
            order = jax.random.permutation(inputs.positives_key, num_all_images)
            columns = columns._replace(cap_order=order)
        losses, counted, statistics = rowwise_losses(options, views, columns)

    num_anchor_views = num_views if options.contrast_mode == "all" else 1

    def anchors(x: jax.Array) -> jax.Array:
        return x.reshape(num_images, num_views)[:, :num_anchor_views]

    losses, counted = options.factor(temperature) * anchors(losses), anchors(counted)
    if options.reduction == "mean":
        loss = mean_over_anchors(losses, counted, options.axis_name)
    else:
        loss = jnp.mean(losses, axis=1)
    if statistics is None:
        return loss
    statistics = jax.tree.map(anchors, statistics)
    return loss, summarize(
        statistics, counted, temperature=temperature, options=options
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compiled(
    options: LossOptions, all_labelled: bool, temperature: float, inputs: _Inputs
) -> jax.Array | tuple[jax.Array, Diagnostics]:
    """`_compute`, with what chooses its path as constants."""
    static = inputs._replace(all_labelled=all_labelled, temperature=temperature)
    return _compute(options, static)


def mean_over_anchors(
    losses: jax.Array, counted: jax.Array, axis_name: AxisName
) -> jax.Array:
    """The sum of all losses over the number of anchors that count, on all devices."""
    num_anchors = psum(jnp.sum(counted.astype(losses.dtype)), axis_name)
    return psum(jnp.sum(losses), axis_name) / jnp.maximum(num_anchors, 1)


def l2_normalize(x: jax.Array) -> jax.Array:
    """Rows of unit length; a zero row stays zero, with a zero gradient."""
    # The result does not depend on this factor, so neither does the gradient; without
    # it the squares of small or large entries leave the range of float32.
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=1, keepdims=True))
    fits = fit_factor(largest)
    x, largest = x * fits, largest * fits
    zero = largest == 0
    x = jnp.where(zero, 1, x / jnp.where(zero, 1, largest))
    return jnp.where(zero, 0, x / jnp.sqrt(jnp.sum(x**2, axis=1, keepdims=True)))


def _computed_in(projections: jax.Array) -> Any:
    """The floating type of everything that follows."""
    return jnp.float64 if projections.dtype == jnp.float64 else jnp.float32


def _label_views(options: LossOptions, inputs: _Inputs) -> Views:
    """This device's views, with what `Views` says of them."""
    num_images, num_views, _ = inputs.projections.shape
    num_rows = num_images * num_views
    dtype = _computed_in(inputs.projections)
    embeddings = inputs.projections.reshape(num_rows, -1).astype(dtype)
    if options.normalize:
        embeddings = l2_normalize(embeddings)
    # With the temperature inside the vectors, their products are the logits, and its
    # gradient needs no formula of its own.
    embeddings *= lax.rsqrt(jnp.asarray(inputs.temperature, dtype))
    device = 0 if options.axis_name is None else lax.axis_index(options.axis_name)
    image = device * num_images + jnp.arange(num_images, dtype=jnp.int32)
    # An unlabelled image is a group of its own, named by a number that no label has.
    group, weights = -1 - image, None
    if inputs.labels is not None and inputs.labels.ndim == 2:
        # Two images are positives by their rows, the views of one in any case.
        weights = prepare_weights(options.label_similarity, inputs.labels, dtype)
        weights = jnp.repeat(weights, num_views, axis=0)
        group = image
    elif inputs.labels is not None and inputs.all_labelled:
        group = inputs.labels
    elif inputs.labels is not None:
        own = group.astype(inputs.labels.dtype)
        group = jnp.where(inputs.labels < 0, own, inputs.labels)
    return Views(
        embedding=embeddings,
        group=jnp.repeat(group, num_views),
        position=device * num_rows + jnp.arange(num_rows, dtype=jnp.int32),
        labels=weights,
    )


def _logit_bound(temperature: Temperature) -> float | None:
    """1 / temperature, which bounds the logits of unit vectors, if that is of use."""
    if isinstance(temperature, jax.core.Tracer):
        return None
    # The comparison of an array is traced inside jit, even where its value is known.
    number = float(temperature)
    return None if number < _LOWEST_BOUNDED_TEMPERATURE else 1 / number


def _check_arrays(
    projections: ArrayLike, labels: ArrayLike | None
) -> tuple[jax.Array, jax.Array | None, bool]:
    """Both arrays, and whether every image has a label whatever the number's sign."""
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
        return projections, None, False
    return projections, *check_labels(labels, projections.shape[0])


def _check_cap(
    positives_cap: int | None,
    positives_key: jax.Array | None,
    num_views: int,
    labels: jax.Array | None,
) -> None:
    if positives_cap is None:
        if positives_key is not None:
            raise ValueError(
                "positives_key chooses under a positives_cap; got positives_cap=None."
            )
    elif not is_integer(positives_cap, at_least=0) or positives_cap % num_views:
        raise ValueError(
            f"positives_cap must be None or a multiple of the {num_views} views, 0 "
            f"included; got {positives_cap!r}."
        )
    elif labels is not None and labels.ndim == 2:
        raise ValueError(
            "positives_cap chooses among positives that weigh the same; with labels "
            f"[B, C] it must be None; got {positives_cap!r}."
        )
