"""From a split to batches: which examples a step sees, and what runs a frozen model."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import builders
from supcon_jax.data.lanes import Lanes, block_size
from supcon_jax.data.pipeline import Batch, train_batches
from supcon_jax.data.records import RecordSource
from supcon_jax.data.sampler import Sampler, class_balanced, shuffled
from supcon_jax.data.sources import Source, read_labels
from supcon_jax.evaluation.predict import Predictor

logger = logging.getLogger(__name__)


def check_hosts(config: ConfigDict) -> None:
    """Refuses a number of processes that cannot share the lanes.

    Raises:
      ValueError: naming the key to change.
    """
    lanes, hosts = config.data.lanes, jax.process_count()
    if lanes % hosts:
        raise ValueError(
            f"got data.lanes={lanes} on {hosts} hosts; allowed: a multiple of the hosts, "
            f"so that each has lanes of its own (--config.data.lanes={hosts})"
        )


def build_lanes(config: ConfigDict, source: Source) -> Lanes | None:
    """The lanes in which a split is read; None where it is shuffled as a whole.

    Raises:
      ValueError: it is no split of shuffled records in files.
    """
    count = config.data.lanes
    if not count or source.synthetic:
        return None
    why = ""
    if source.images is not None:
        why = "is held in memory"
    elif not isinstance(source, RecordSource):
        why = "has no records"
    elif not source.shuffled:
        why = "was prepared without being shuffled, so neighbours may be of one class"
    if why:
        raise ValueError(
            f"got data.lanes={count}, but {config.data.name} {why}; allowed: TFDS "
            "records read from their files (--config.data.lanes=0)"
        )
    mean_bytes = (source.num_bytes or 0) / source.num_examples
    return Lanes(source.num_examples, count, block_size(mean_bytes))


def build_sampler(config: ConfigDict, source: Source) -> Sampler:
    """Which training images a step sees: shuffled, in lanes or balanced over the classes.

    Raises:
      ValueError: the source cannot be read in lanes.
    """
    lanes = build_lanes(config, source)
    if lanes is not None:
        return lanes.sampler(config.batch_size, seed=config.seed)
    classes = config.data.classes_per_batch
    if not classes or source.synthetic:
        return shuffled(source.num_examples, config.batch_size, seed=config.seed)
    source = read_labels(source)
    if source.num_unlabelled:
        logger.warning(
            "warning: %s training images without a label are in no batch of "
            "data.classes_per_batch=%d classes (--config.data.classes_per_batch=0)",
            f"{source.num_unlabelled:,}",
            classes,
        )
    return class_balanced(
        source.labels,
        source.num_classes,
        config.batch_size,
        classes=classes,
        seed=config.seed,
    )


def build_train_batches(
    config: ConfigDict, source: Source, sampler: Sampler, *, start_step: int = 0
) -> Iterator[Batch]:
    """The host's stream of training batches, from a step on."""
    return train_batches(
        source,
        sampler,
        batch_size=config.batch_size,
        image_size=config.data.image_size,
        views=config.data.views,
        augmentation=builders.build_view_augmentation(config),
        seed=config.seed,
        start_step=start_step,
        lanes=build_lanes(config, source),
        keep_bytes=int(config.data.keep_gib * 2**30),
    )


def create_predictor(
    config: ConfigDict, mesh: Mesh, encoder: nn.Module, head: nn.Module | None
) -> Predictor:
    """What runs a frozen model over splits, with the batches and images of a config."""
    return Predictor(
        encoder,
        head,
        normalize=builders.build_normalization(config),
        mesh=mesh,
        batch_size=config.batch_size,
        image_size=config.data.image_size,
        resize=config.data.eval_resize,
    )
