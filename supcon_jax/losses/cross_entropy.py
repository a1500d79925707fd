"""Cross-entropy: the paper's baseline and the losses of linear evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from supcon_jax.losses.diagnostics import psum


def cross_entropy_loss(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Cross-entropy of each example, with optional label smoothing.

    `L_i = -sum_c q_ic log softmax(logits_i)_c`, where `q_i` is the target (one-hot for
    an integer label) mixed with the uniform distribution, `q = (1 - s) target + s / C`.

    Args:
      logits: `[N, C]`, any float type; computed in float32.
      labels: `[N]` integers in `[0, C)`, or `[N, C]` shares of the classes that sum to
        1 (Mixup, CutMix).
      label_smoothing: `s` in `[0, 1)`.

    Returns:
      `[N]` float32, one loss an example; take the mean outside.

    Raises:
      ValueError: shapes that do not fit, or `s` outside `[0, 1)`.

    Example:
      >>> import jax.numpy as jnp
      >>> cross_entropy_loss(jnp.zeros((1, 10)), jnp.zeros((1,), jnp.int32)).round(4)
      Array([2.3026], dtype=float32)

    Source: Szegedy et al., arXiv 1512.00567, section 7 (label smoothing).
    """
    if logits.ndim != 2 or labels.shape not in (logits.shape[:1], logits.shape):
        raise ValueError(
            f"got logits {logits.shape} and labels {labels.shape}; "
            "expected [N, C] and [N] or [N, C]"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"got label_smoothing={label_smoothing}; allowed: 0 <= s < 1")
    num_classes = logits.shape[-1]
    if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, num_classes)
    targets = (1.0 - label_smoothing) * labels + label_smoothing / num_classes
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def logit_adjustment(counts: np.ndarray, tau: float) -> np.ndarray:
    """What a loss adds to the logits of classes of unequal size.

    `L = -log softmax(f(x) + tau log pi)_y`, where `pi_c = n_c / n`: a classifier trained
    so need not prefer large classes, and at tau = 1 the largest of its logits `f(x)` has
    the least mean error of the classes, however many images each has.

    Args:
      counts: `[C]` training images of each class; none counts as one.
      tau: at least 0; 0: nothing is added.

    Returns:
      `[C]` float32, `tau log pi`.

    Example:
      >>> [f"{x:.3f}" for x in logit_adjustment(np.array([90, 10]), 1.0)]
      ['-0.105', '-2.303']

    Source: Menon et al., arXiv 2007.07314, Eq. 10.
    """
    counts = np.maximum(counts, 1)
    return (tau * np.log(counts / np.sum(counts))).astype(np.float32)


def cross_entropy_of_views(
    logits: jax.Array,
    labels: jax.Array,
    *,
    label_smoothing: float = 0.0,
    logit_offset: jax.typing.ArrayLike = 0.0,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy over labelled images and their views, and top-1 accuracy.

    Args:
      logits: `[B, V, C]`.
      labels: `[B]` integers, or `[B, C]` shares of the classes in each image. Images
        with a label below 0, or whose shares do not sum to 1 (mixed with one), have no
        label and do not count.
      label_smoothing: see `cross_entropy_loss`.
      logit_offset: `[C]`, added to the logits for the loss, not for the accuracy: see
        `logit_adjustment`.
      axis_name: inside `jax.shard_map`, the mesh axis over which the batch is split.

    Returns:
      A scalar and `{"top1": scalar}`, over the whole batch, the same on every device; 0
      where no image has a label.
    """
    views = logits.shape[1]
    logits = logits.reshape(-1, logits.shape[-1])
    labels = jnp.repeat(labels, views, axis=0)
    losses = cross_entropy_loss(
        logits + logit_offset, labels, label_smoothing=label_smoothing
    )
    if labels.ndim == 2:
        labelled = jnp.sum(labels, axis=-1) > 1 - 1e-4
        labels = jnp.argmax(labels, axis=-1)  # of a mixture, the larger part
    else:
        labelled = labels >= 0
    hits = labelled & (jnp.argmax(logits, axis=-1) == labels)
    losses = jnp.where(labelled, losses, 0.0)
    count = psum(jnp.sum(labelled.astype(jnp.float32)), axis_name)
    loss, top1 = (
        psum(jnp.sum(x), axis_name) / jnp.maximum(count, 1) for x in (losses, hits)
    )
    return loss, {"top1": top1}


def binary_cross_entropy_of_views(
    logits: jax.Array, weights: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of yes or no for each class, where images may show several.

    `-q log sigmoid(logit) - (1 - q) log(1 - sigmoid(logit))`, meaned over labelled images,
    their views and the classes.

    Args:
      logits: `[B, V, C]`.
      weights: `[B, C]` of the classes in each image, q = min(weight, 1). Images without
        any above 0 have no label and do not count.

    Returns:
      A scalar, 0 where no image has a label; and no metrics beside it.
    """
    targets = jnp.clip(weights, 0, 1)[:, None]
    losses = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets)
    labelled = jnp.any(weights > 0, axis=1)
    losses = jnp.where(labelled, jnp.mean(losses, axis=(1, 2)), 0.0)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(labelled), 1), {}
