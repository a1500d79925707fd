"""From a source to batches on the host.

A batch holds this process's rows of the global batch. Which examples a step sees is
arithmetic (sampler.py). Images in memory are indexed here; encoded images go through
tf.data (host.py), and only then TensorFlow is loaded.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from supcon_jax.data.blocks import BlockCache
from supcon_jax.data.lanes import Lanes
from supcon_jax.data.sampler import Sampler, in_order
from supcon_jax.data.sources import PADDING, ArraySource, Source
from supcon_jax.data.views import Augmentation

Batch = dict[str, np.ndarray]
# A split of small images of one size is decoded once and kept, up to this many bytes.
IN_MEMORY_BYTES = 2**30


def on_host(source: Source) -> bool:
    """Whether the host crops and flips; otherwise whole images go into the step.

    Noise is made in the shape that a host would make.
    """
    return source.images is None


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
    augmentation: Augmentation,
    seed: int,
    start_step: int = 0,
    lanes: Lanes | None = None,
    keep_bytes: int = 0,
) -> Iterator[Batch]:
    """The endless stream of training batches, from a given step on.

    Args:
      source: a training split.
      sampler: which examples a step sees.
      batch_size: global batch size B, in images.
      image_size: side S of the square images.
      views: number of views V.
      augmentation: of the views; the host does its part (`Augmentation.host_part`).
      seed: seed of the augmentation.
      start_step: first step; nothing before it is read.
      lanes: those whose order the sampler has, of a source of encoded images; they are
        then read in blocks.
      keep_bytes: of encoded images that are kept in memory for later epochs, with lanes.

    Yields:
      This process's rows of `{"image": uint8 [B, V, S, S, 3], "label": int32 [B],
      "id": int32 [B, 2]}`; whole images come with one view. `id` is (epoch, index). Where
      a source has `label_sets`, "label" is float32 `[B, C]`, the weights of the classes.

    Raises:
      ValueError: the image size is another one than that of the images in memory, or an
        image cannot be decoded and the source does not skip such images.
    """
    check_image_size(source, image_size)
    rows = process_rows(batch_size)
    if source.synthetic or not on_host(source):
        fetch = _without_decoding(source, rows, views, image_size)
        for step in itertools.count(start_step):
            ids = sampler(step)[rows]
            image, label = fetch(ids[:, 1])
            yield {"image": image, "label": _targets(source, label), "id": ids}
    cache = None
    if lanes is not None:
        cache = BlockCache(source, lanes, batch_size=batch_size, keep_bytes=keep_bytes)
    host, host_views = _import_host()
    transform = functools.partial(
        host_views.crop_and_augment,
        augmentation=augmentation.host_part(),
        image_size=image_size,
        views=views,
        seed=seed,
    )
    for batch in host.batches(
        source,
        lambda step: sampler(step)[rows],
        transform,
        shape=(views, image_size, image_size, 3),
        start_step=start_step,
        stop_step=None,
        replace_unreadable=True,
        cache=cache,
    ):
        batch["label"] = _targets(source, batch["label"])
        yield {key: batch[key] for key in ("image", "label", "id")}


def eval_batches(
    source: Source, *, batch_size: int, image_size: int, resize: int
) -> Iterator[Batch]:
    """One pass over a split in order, the last batch padded and masked.

    Args:
      source: an evaluation split.
      batch_size: global batch size B.
      image_size: side S of the central crop.
      resize: length to which the short side of an encoded image is resized before the
        crop; images in memory are taken whole.

    Yields:
      This process's rows of `{"image": uint8 [B, 1, S, S, 3], "label": int32 [B],
      "mask": float32 [B]}`; the label is below 0 where there is none, the mask is 1 exactly once for every example that can be
      decoded.

    Raises:
      ValueError: as for `train_batches`.
    """
    check_image_size(source, image_size)
    rows = process_rows(batch_size)
    steps = num_eval_batches(source, batch_size)
    sampler = in_order(source.num_examples, batch_size)
    if source.synthetic or source.images is not None:
        fetch = _without_decoding(source, rows, 1, image_size)
        for step in range(steps):
            index = sampler(step)[rows, 1]
            mask = index != PADDING
            image, label = fetch(index)
            if not mask.all():  # the last batch; the others need no copy
                image = np.where(mask[:, None, None, None, None], image, np.uint8(0))
            yield {
                "image": image,
                "label": np.where(mask, label, 0).astype(np.int32),
                "mask": mask.astype(np.float32),
            }
        return
    host, host_views = _import_host()
    for batch in host.batches(
        source,
        lambda step: sampler(step)[rows],
        functools.partial(
            host_views.central_crop, image_size=image_size, resize=resize
        ),
        shape=(1, image_size, image_size, 3),
        start_step=0,
        stop_step=steps,
        replace_unreadable=False,
    ):
        yield {key: batch[key] for key in ("image", "label", "mask")}


def _targets(source: Source, labels: np.ndarray) -> np.ndarray:
    """What a training step gets as labels."""
    return labels if source.label_sets is None else source.label_sets.weights(labels)


def _without_decoding(
    source: Source, rows: slice, views: int, image_size: int
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """`index [rows] -> images, labels` of a source with images in memory, or of noise.

    Images in memory come whole, with one view. The noise has `views` views and is the
    same in every step.
    """
    images, labels = source.images, source.labels
    if images is not None:
        return lambda index: (images[index][:, None], labels[index])
    count = rows.stop - rows.start
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (count, views, image_size, image_size, 3), np.uint8)
    label = rng.integers(0, source.num_classes, count, np.int32)
    return lambda index: (noise, label)


def num_eval_batches(source: Source, batch_size: int) -> int:
    """Batches that `eval_batches` yields: `ceil(n / B)`."""
    return -(-source.num_examples // batch_size)


def load_small(source: Source, image_size: int) -> Source:
    """Decodes a split of small images once, where they all have the size wanted.

    CIFAR's 50,000 images are 150 MB; indexing them is a thousand times cheaper than
    decoding them again in every epoch.
    """
    shape = (image_size, image_size, 3)
    if (
        source.images is not None
        or not source.num_examples
        or tuple(source.image_shape[:2]) != shape[:2]  # grey ones become RGB
        or source.num_examples * np.prod(shape) > IN_MEMORY_BYTES
    ):
        return source
    host, host_views = _import_host()
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
    ):
        images.append(batch["image"][batch["mask"] > 0, 0])
        labels.append(batch["label"][batch["mask"] > 0])
    return ArraySource(
        np.concatenate(images),
        np.concatenate(labels),
        source.num_classes,
        source.class_names,
        source.unreadable,
        source.notes,
    )


def check_same_size(train: Source, evaluation: Source) -> None:
    """Refuses two splits in memory whose images have different sizes."""
    if train.images is not None and evaluation.images is not None:
        one, other = (
            "x".join(map(str, source.images.shape[1:3]))
            for source in (train, evaluation)
            if source.images is not None
        )
        if one != other:
            raise ValueError(
                f"the training images are {one} and those of evaluation {other}; bring "
                "them to one size (--config.data.root, --config.data.eval_split)"
            )


def check_image_size(source: Source, image_size: int) -> None:
    """Refuses an image size that a source held in memory does not have."""
    if source.images is not None:
        height, width = source.images.shape[1:3]
        if (height, width) != (image_size, image_size):
            fix = f"set --config.data.image_size={height}"
            if height != width:
                fix = "images in memory must be square: crop or pad them first"
            raise ValueError(
                f"data.image_size is {image_size} but the images are {height}x{width}; "
                f"{fix}"
            )


def _import_host():
    """host.py and host_views.py, with TensorFlow quiet and kept off the accelerators."""
    from supcon_jax.data.tensorflow_imports import import_tensorflow

    import_tensorflow()
    from supcon_jax.data import host, host_views

    return host, host_views
