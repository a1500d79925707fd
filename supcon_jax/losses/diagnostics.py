"""What a training loop wants to know about the loss besides its value."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from supcon_jax.losses.options import AxisName, LossOptions, Temperature


class AnchorStatistics(NamedTuple):
    """Measurements of each anchor against all other views; every field has one shape.

    Attributes:
      num_positives: how many other views are its positives.
      num_negatives: how many are its negatives.
      positive_sum: sum of its logits (z_i . z_j / temperature) with its positives.
      negative_sum: the same with its negatives.
      nearest_is_positive: whether a positive has a larger logit than every negative.
      gaussian_sum: summed over the anchors, the sum of exp(-2 |z_i - z_j|^2) over all
        pairs; a single entry may hold a pair for both of its views.
    """

    num_positives: jax.Array
    num_negatives: jax.Array
    positive_sum: jax.Array
    negative_sum: jax.Array
    nearest_is_positive: jax.Array
    gaussian_sum: jax.Array


def summarize(
    statistics: AnchorStatistics,
    counted: jax.Array,
    *,
    temperature: Temperature,
    options: LossOptions,
) -> dict[str, jax.Array]:
    """Batch-wide scalars, float32 and without gradient, the same on every device.

    Args:
      statistics: of this device's anchors.
      counted: boolean, of the same shape: the anchors that enter the mean loss.
      temperature: turns logits back into cosines.
      options: of the loss.

    Returns:
      The dictionary that `supcon_loss` documents.
    """
    temperature = jnp.asarray(temperature, jnp.float32)
    num_positives, num_negatives = statistics.num_positives, statistics.num_negatives
    # Equal logits cancel in the loss; what is left is the size of the denominator.
    num_terms = {
        "all": num_positives + num_negatives,
        "one_positive": 1 + num_negatives,
        "only_negatives": num_negatives,
    }[options.denominator]
    per_anchor = {
        **statistics._asdict(),
        "anchors": jnp.ones_like(num_positives),
        "counted": counted,
        "correct": counted & statistics.nearest_is_positive,
        "without_positive": num_positives == 0,
        "log_terms": jnp.log(jnp.where(counted, num_terms, 1).astype(jnp.float32)),
    }
    # One sum over one array: on small batches a sum for each costs more than the tiles.
    stacked = jnp.stack([x.astype(jnp.float32) for x in per_anchor.values()])
    sums = psum(
        jnp.sum(stacked.reshape(len(per_anchor), -1), axis=1), options.axis_name
    )
    total = dict(zip(per_anchor, sums, strict=True))

    def ratio(numerator: str, denominator: jax.Array) -> jax.Array:
        return total[numerator] / jnp.maximum(denominator, 1)

    num_pairs = total["num_positives"] + total["num_negatives"]
    positive_cosine = temperature * ratio("positive_sum", total["num_positives"])
    gaussian = ratio("gaussian_sum", num_pairs)
    summary = {
        "collapse_loss": options.factor(temperature)
        * ratio("log_terms", total["counted"]),
        "positive_cosine": positive_cosine,
        "negative_cosine": temperature * ratio("negative_sum", total["num_negatives"]),
        "alignment": 2 - 2 * positive_cosine,
        "uniformity": jnp.log(jnp.maximum(gaussian, jnp.finfo(jnp.float32).tiny)),
        "contrastive_top1": ratio("correct", total["counted"]),
        "no_positive_fraction": ratio("without_positive", total["anchors"]),
        "mean_positives": ratio("num_positives", total["anchors"]),
        "num_anchors": total["counted"],
    }
    return {k: lax.stop_gradient(jnp.float32(x)) for k, x in summary.items()}


def psum(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The sum over the devices of a mesh axis; x itself without one."""
    return x if axis_name is None else lax.psum(x, axis_name)
