"""From a source to batches on the host.

Training is one endless stream: position p of the stream is example
`order(epoch)[p % n]` of epoch `p // n`, and step t takes positions `t B ... (t+1) B`.
Epochs follow each other without a gap, so each example comes exactly once an epoch
and nothing is dropped. Which examples a step sees is a function of (seed, step)
alone; each process makes only its rows of the global batch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from supcon_jax.data.sources import (
    ArraySource,
    Source,
    TfdsSource,
    import_tensorflow_datasets,
)

Batch = dict[str, np.ndarray]

# Encoded images that wait in the shuffle buffer: 16,384 of ImageNet's are 1.8 GB.
SHUFFLE_BUFFER = 16_384


def process_rows(batch_size: int) -> slice:
    """The rows of the global batch that this process makes."""
    rows = batch_size // jax.process_count()
    start = jax.process_index() * rows
    return slice(start, start + rows)


def train_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    views: int,
    crop_area: tuple[float, float],
    flip: bool,
    seed: int,
    start_step: int = 0,
) -> Iterator[Batch]:
    """The endless stream of training batches, from a given step on.

    Args:
      source: a training split.
      batch_size: global batch size B, in images.
      image_size: side of the square images.
      views: number of views V.
      crop_area: smallest and largest share of the area of a crop (TFDS only: arrays
        are cropped inside the step).
      flip: mirror views at random (TFDS only, likewise).
      seed: seed of order and crops.
      start_step: first step; what comes before is skipped undecoded.

    Yields:
      This process's rows of `{"image": uint8 [B, V, S, S, 3], "label": int32 [B],
      "id": int32 [B, 2]}`; arrays come whole, with one view. `id` is (epoch, index).
    """
    check_image_size(source, image_size)
    if isinstance(source, ArraySource):
        return _array_train_batches(source, batch_size, seed, start_step)
    return _tfds_train_batches(
        source, batch_size, image_size, views, crop_area, flip, seed, start_step
    )


def eval_batches(
    source: Source, *, batch_size: int, image_size: int, resize: int
) -> Iterator[Batch]:
    """One pass over a split in order, the last batch padded and masked.

    Args:
      source: an evaluation split.
      batch_size: global batch size B.
      image_size: side of the central crop.
      resize: length to which the short side is resized before the crop (TFDS only).

    Yields:
      This process's rows of `{"image": uint8 [B, 1, S, S, 3], "label": int32 [B],
      "mask": float32 [B]}`; the mask is 1 exactly once for every example.
    """
    check_image_size(source, image_size)
    if isinstance(source, ArraySource):
        examples = zip(source.images, source.labels, strict=True)
    else:
        examples = _tfds_eval_examples(source, image_size, resize)
    examples = itertools.islice(examples, source.num_examples)
    rows = process_rows(batch_size)
    for _ in range(num_eval_batches(source, batch_size)):
        image = np.zeros((batch_size, 1, image_size, image_size, 3), np.uint8)
        label = np.zeros(batch_size, np.int32)
        mask = np.zeros(batch_size, np.float32)
        for row in range(batch_size):
            example = next(examples, None)
            if example is None:
                break
            image[row, 0], label[row], mask[row] = *example, 1.0
        yield {"image": image[rows], "label": label[rows], "mask": mask[rows]}


def num_eval_batches(source: Source, batch_size: int) -> int:
    """Batches that `eval_batches` yields: `ceil(n / B)`."""
    return -(-source.num_examples // batch_size)


def check_image_size(source: Source, image_size: int) -> None:
    """Refuses an image size that a source held in memory does not have."""
    if isinstance(source, ArraySource):
        height, width = source.images.shape[1:3]
        if (height, width) != (image_size, image_size):
            raise ValueError(
                f"data.image_size is {image_size} but the images are {height}x{width}; "
                f"set --config.data.image_size={height}"
            )


def _array_train_batches(
    source: ArraySource, batch_size: int, seed: int, start_step: int
) -> Iterator[Batch]:
    @functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(source.num_examples)

    rows = process_rows(batch_size)
    step = start_step
    while True:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)[rows]
        epochs, offsets = np.divmod(positions, source.num_examples)
        index = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            index[epochs == epoch] = order(int(epoch))[offsets[epochs == epoch]]
        yield {
            "image": source.images[index][:, None],
            "label": source.labels[index],
            "id": np.stack([epochs, index], axis=1).astype(np.int32),
        }
        step += 1


def _encoded_examples(tf: Any, tfds: Any, source: TfdsSource) -> Any:
    """(index, encoded image, label) of a split in file order; nothing is decoded."""
    dataset = source.builder.as_dataset(
        split=source.split,
        shuffle_files=False,
        decoders={"image": tfds.decode.SkipDecoding()},
        # TFDS would keep a whole small split in memory, decoded, by default.
        read_config=tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1),
    )
    return (
        dataset.take(source.num_examples)  # fewer than the split in a subset
        .enumerate()
        .map(lambda index, example: (index, example["image"], example["label"]))
    )


def _tfds_train_batches(
    source: TfdsSource,
    batch_size: int,
    image_size: int,
    views: int,
    crop_area: tuple[float, float],
    flip: bool,
    seed: int,
    start_step: int,
) -> Iterator[Batch]:
    tf, tfds = import_tensorflow_datasets()
    first_epoch, offset = divmod(start_step * batch_size, source.num_examples)
    rows = process_rows(batch_size)

    @tf.autograph.experimental.do_not_convert
    def epoch_examples(epoch: Any) -> Any:
        order_seed = epoch + tf.constant(seed, tf.int64) * 1_000_003
        shuffled = _encoded_examples(tf, tfds, source).shuffle(
            min(SHUFFLE_BUFFER, source.num_examples), seed=order_seed
        )
        return shuffled.map(lambda *example: (epoch, *example))

    @tf.autograph.experimental.do_not_convert
    def make_views(epoch: Any, index: Any, encoded: Any, label: Any) -> dict[str, Any]:
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        fold_in = tf.random.fold_in
        key = tf.constant([seed, 0], tf.int64)
        key = fold_in(fold_in(key, epoch), index)
        crops = [
            _random_crop(tf, image, fold_in(key, view), image_size, crop_area, flip)
            for view in range(views)
        ]
        return {
            "image": tf.stack(crops),
            "label": tf.cast(label, tf.int32),
            "id": tf.cast(tf.stack([epoch, index]), tf.int32),
        }

    epochs = tf.data.Dataset.range(first_epoch, np.iinfo(np.int32).max)
    dataset = epochs.flat_map(epoch_examples).skip(offset)
    if jax.process_count() > 1:
        # Every host reads the encoded bytes and decodes only its own rows.
        dataset = dataset.batch(batch_size, drop_remainder=True)
        dataset = dataset.map(lambda *batch: tuple(part[rows] for part in batch))
        dataset = dataset.unbatch()
    dataset = dataset.map(make_views, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.batch(rows.stop - rows.start, drop_remainder=True)
    yield from dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def _random_crop(
    tf: Any,
    image: Any,
    key: Any,
    image_size: int,
    crop_area: tuple[float, float],
    flip: bool,
) -> Any:
    """Random resized crop (official parameters) and flip, on the host; uint8."""
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        tf.random.fold_in(key, 0),
        min_object_covered=0.1,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=crop_area,
        max_attempts=100,
    )
    view = tf.slice(image, begin, size)
    view = tf.image.resize(view, (image_size, image_size), method="bilinear")
    if flip:
        view = tf.image.stateless_random_flip_left_right(
            view, tf.random.fold_in(key, 1)
        )
    view = tf.cast(tf.clip_by_value(tf.round(view), 0.0, 255.0), tf.uint8)
    return tf.ensure_shape(view, (image_size, image_size, 3))


def _tfds_eval_examples(
    source: TfdsSource, image_size: int, resize: int
) -> Iterator[tuple[np.ndarray, int]]:
    tf, tfds = import_tensorflow_datasets()

    @tf.autograph.experimental.do_not_convert
    def central_crop(index: Any, encoded: Any, label: Any) -> tuple[Any, Any]:
        del index
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        shape = tf.cast(tf.shape(image)[:2], tf.float32)
        target = tf.cast(tf.round(shape * resize / tf.reduce_min(shape)), tf.int32)
        image = tf.image.resize(image, target, method="bilinear")
        top, left = tf.unstack((target - image_size) // 2)
        image = image[top : top + image_size, left : left + image_size]
        image = tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)
        return tf.ensure_shape(image, (image_size, image_size, 3)), label

    dataset = _encoded_examples(tf, tfds, source)
    dataset = dataset.map(central_crop, num_parallel_calls=tf.data.AUTOTUNE)
    yield from dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
