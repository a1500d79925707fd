"""From a source to batches on the host.

A batch holds this process's rows of the global batch. Which examples a step sees is
arithmetic (sampler.py); how they are read depends on the source: arrays are indexed
here, encoded files go through tf.data (host.py), and only then TensorFlow is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import numpy as np

from supcon_jax.data.sampler import Sampler, in_order
from supcon_jax.data.sources import (
    NOBODY,
    ArraySource,
    RecordSource,
    Source,
    SyntheticSource,
)

Batch = dict[str, np.ndarray]
# A split of small images of one size is decoded once and kept, up to this many bytes.
IN_MEMORY_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class HostAugmentation:
    """What the host does to an image before it reaches the device.

    Attributes:
      crop_area: least and largest share of the area of a random crop.
      flip: mirror at random.
      policy: "none", "auto_augment" or "rand_augment".
      layers, magnitude: of RandAugment.
      jitter_strength, jitter_probability: colour jitter before the policy.
    """

    crop_area: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    policy: str = "none"
    layers: int = 2
    magnitude: float = 10.0
    jitter_strength: float = 0.0
    jitter_probability: float = 0.0


def on_host(source: Source, policy: str) -> bool:
    """Whether the host crops and flips; otherwise whole images go into the step.

    Policies run on the host (docs/data.md has the measurement), and they come after
    the crop. Noise is made in the shape that a host would make.
    """
    return policy != "none" or not isinstance(source, ArraySource)


def process_rows(batch_size: int) -> slice:
    """The rows of the global batch that this process makes."""
    rows = batch_size // jax.process_count()
    start = jax.process_index() * rows
    return slice(start, start + rows)


def train_batches(
    source: Source,
    sampler: Sampler,
    *,
    batch_size: int,
    image_size: int,
    views: int,
    augmentation: HostAugmentation,
    seed: int,
    start_step: int = 0,
    skipped: dict[str, str] | None = None,
) -> Iterator[Batch]:
    """The endless stream of training batches, from a given step on.

    Args:
      source: a training split.
      sampler: which examples a step sees.
      batch_size: global batch size B, in images.
      image_size: side S of the square images.
      views: number of views V.
      augmentation: what the host does; arrays without a policy go into the step whole.
      seed: seed of the augmentation.
      start_step: first step; nothing before it is read.
      skipped: collects images that cannot be decoded; None: the first is an error.

    Yields:
      This process's rows of `{"image": uint8 [B, V, S, S, 3], "label": int32 [B],
      "id": int32 [B, 2]}`; whole images come with one view. `id` is (epoch, index).
    """
    check_image_size(source, image_size)
    rows = process_rows(batch_size)
    if isinstance(source, SyntheticSource):
        yield from _synthetic_batches(
            source, sampler, rows, (views, image_size), start_step
        )
        return
    if not on_host(source, augmentation.policy):
        step = start_step
        while True:
            ids = sampler(step)[rows]
            index = ids[:, 1]
            yield {
                "image": source.images[index][:, None],
                "label": source.labels[index],
                "id": ids,
            }
            step += 1
    host = _import_host()
    transform = functools.partial(
        host.crop_and_augment,
        image_size=image_size,
        views=views,
        seed=seed,
        crop_area=augmentation.crop_area,
        flip=augmentation.flip,
        augment=host.policy(
            augmentation.policy,
            layers=augmentation.layers,
            magnitude=augmentation.magnitude,
            jitter_strength=augmentation.jitter_strength,
            jitter_probability=augmentation.jitter_probability,
        ),
    )
    for batch in host.batches(
        source,
        lambda step: sampler(step)[rows],
        transform,
        shape=(views, image_size, image_size, 3),
        start_step=start_step,
        stop_step=None,
        replace_unreadable=True,
        skipped=skipped,
    ):
        yield {key: batch[key] for key in ("image", "label", "id")}


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    resize: int,
    skipped: dict[str, str] | None = None,
) -> Iterator[Batch]:
    """One pass over a split in order, the last batch padded and masked.

    Args:
      source: an evaluation split.
      batch_size: global batch size B.
      image_size: side S of the central crop.
      resize: length to which the short side is resized before the crop (not arrays).
      skipped: collects images that cannot be decoded; None: the first is an error.

    Yields:
      This process's rows of `{"image": uint8 [B, 1, S, S, 3], "label": int32 [B],
      "mask": float32 [B]}`; the mask is 1 exactly once for every example that can be
      decoded.
    """
    check_image_size(source, image_size)
    rows = process_rows(batch_size)
    steps = num_eval_batches(source, batch_size)
    sampler = in_order(source.num_examples, batch_size)
    if isinstance(source, SyntheticSource):
        batches = _synthetic_batches(source, sampler, rows, (1, image_size), 0)
        for batch in itertools.islice(batches, steps):
            mask = batch["id"][:, 1] != NOBODY
            yield {
                "image": batch["image"],
                "label": batch["label"],
                "mask": mask.astype(np.float32),
            }
        return
    if isinstance(source, ArraySource):
        for step in range(steps):
            index = sampler(step)[rows, 1]
            present = index[index != NOBODY]
            image = np.zeros((len(index), 1, image_size, image_size, 3), np.uint8)
            label, mask = np.zeros(len(index), np.int32), np.zeros(len(index))
            image[: len(present), 0] = source.images[present]
            label[: len(present)] = source.labels[present]
            mask[: len(present)] = 1
            yield {"image": image, "label": label, "mask": mask.astype(np.float32)}
        return
    host = _import_host()
    for batch in host.batches(
        source,
        lambda step: sampler(step)[rows],
        functools.partial(host.central_crop, image_size=image_size, resize=resize),
        shape=(1, image_size, image_size, 3),
        start_step=0,
        stop_step=steps,
        replace_unreadable=False,
        skipped=skipped,
    ):
        yield {key: batch[key] for key in ("image", "label", "mask")}


def num_eval_batches(source: Source, batch_size: int) -> int:
    """Batches that `eval_batches` yields: `ceil(n / B)`."""
    return -(-source.num_examples // batch_size)


def load_small(
    source: Source, image_size: int, *, skipped: dict[str, str] | None = None
) -> Source:
    """Decodes a split of small images once, where they all have the size wanted.

    CIFAR's 50,000 images are 150 MB; indexing them is a thousand times cheaper than
    decoding them again in every epoch.
    """
    shape = (image_size, image_size, 3)
    if (
        not isinstance(source, RecordSource)
        or tuple(source.image_shape) != shape
        or source.num_examples * np.prod(shape) > IN_MEMORY_BYTES
    ):
        return source
    host = _import_host()
    size = min(1000, source.num_examples)
    images, labels = [], []
    for batch in host.batches(
        source,
        in_order(source.num_examples, size),
        lambda image, identity: image[None],
        shape=(1, *shape),
        start_step=0,
        stop_step=num_eval_batches(source, size),
        replace_unreadable=False,
        skipped=skipped,
    ):
        images.append(batch["image"][batch["mask"] > 0, 0])
        labels.append(batch["label"][batch["mask"] > 0])
    return ArraySource(
        np.concatenate(images),
        np.concatenate(labels),
        source.num_classes,
        source.class_names,
    )


def check_image_size(source: Source, image_size: int) -> None:
    """Refuses an image size that a source held in memory does not have."""
    if isinstance(source, ArraySource):
        height, width = source.images.shape[1:3]
        if (height, width) != (image_size, image_size):
            raise ValueError(
                f"data.image_size is {image_size} but the images are {height}x{width}; "
                f"set --config.data.image_size={height}"
            )


def _synthetic_batches(
    source: SyntheticSource,
    sampler: Sampler,
    rows: slice,
    shape: tuple[int, int],
    start_step: int,
) -> Iterator[Batch]:
    """The same noise in every step, with the identities that it would have."""
    (views, side), step = shape, start_step
    ids = sampler(step)[rows]
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (len(ids), views, side, side, 3), np.uint8)
    label = rng.integers(0, source.num_classes, len(ids), np.int32)
    while True:
        yield {"image": image, "label": label, "id": sampler(step)[rows]}
        step += 1


def _import_host():
    """The tf.data part; TensorFlow is made quiet and kept off the accelerators."""
    from supcon_jax.data.tfds import import_tensorflow

    import_tensorflow()
    from supcon_jax.data import host

    return host
