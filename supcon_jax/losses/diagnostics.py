"""What a training loop wants to know about the loss besides its value."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class AnchorStatistics(NamedTuple):
    """Measurements of each anchor against all other views; every field has one shape.

    Similarities are logits, z_i . z_j / temperature. `hardest_*` is the largest of its
    kind, -inf if there is none; `gaussian_sum` the sum of exp(-2 |z_i - z_j|^2).
    """

    num_positives: jax.Array
    num_negatives: jax.Array
    positive_sum: jax.Array
    negative_sum: jax.Array
    hardest_positive: jax.Array
    hardest_negative: jax.Array
    gaussian_sum: jax.Array


def summarize(
    statistics: AnchorStatistics,
    counted: jax.Array,
    *,
    temperature: float | jax.Array,
    scale: float | jax.Array,
    denominator: str,
    axis_name: str | tuple[str, ...] | None,
) -> dict[str, jax.Array]:
    """Batch-wide scalars, float32 and without gradient, the same on every device.

    Args:
      statistics: of this device's anchors.
      counted: boolean, of the same shape: the anchors that enter the mean loss.
      temperature: turns logits back into cosines.
      scale: the factor on the loss, for `collapse_loss`.
      denominator: which terms the collapsed loss counts.
      axis_name: the mesh axis to sum over, None on one device.

    Returns:
      The dictionary that `supcon_loss` documents.
    """

    def total(x: jax.Array) -> jax.Array:
        return psum(jnp.sum(x.astype(jnp.float32)), axis_name)

    def ratio(x: jax.Array, y: jax.Array) -> jax.Array:
        return total(x) / jnp.maximum(total(y), 1)

    num_positives, num_negatives = statistics.num_positives, statistics.num_negatives
    everyone = jnp.ones_like(num_positives)
    # Equal logits cancel in the loss; what is left is the size of the denominator.
    num_terms = {
        "all": num_positives + num_negatives,
        "one_positive": 1 + num_negatives,
        "only_negatives": num_negatives,
    }[denominator]
    log_terms = jnp.log(jnp.where(counted, num_terms, 1).astype(jnp.float32))
    positive_cosine = temperature * ratio(statistics.positive_sum, num_positives)
    negative_cosine = temperature * ratio(statistics.negative_sum, num_negatives)
    # Strictly harder, so that collapsed embeddings (all equal) count as wrong.
    correct = counted & (statistics.hardest_positive > statistics.hardest_negative)
    gaussian = ratio(statistics.gaussian_sum, num_positives + num_negatives)
    summary = {
        "collapse_loss": scale * ratio(log_terms, counted),
        "positive_cosine": positive_cosine,
        "negative_cosine": negative_cosine,
        "alignment": 2 - 2 * positive_cosine,
        "uniformity": jnp.log(jnp.maximum(gaussian, jnp.finfo(jnp.float32).tiny)),
        "contrastive_top1": ratio(correct, counted),
        "no_positive_fraction": ratio(num_positives == 0, everyone),
        "mean_positives": ratio(num_positives, everyone),
        "num_anchors": total(counted),
    }
    return {k: lax.stop_gradient(jnp.float32(x)) for k, x in summary.items()}


def psum(x: jax.Array, axis_name: str | tuple[str, ...] | None) -> jax.Array:
    """The sum over the devices of a mesh axis; x itself without one."""
    return x if axis_name is None else lax.psum(x, axis_name)
