"""Encoded examples to uint8 batches: the tf.data part of the pipeline.

One thread reads the bytes of a step's examples by index; tf.data decodes, crops and
augments them on all cores. TensorFlow is imported here at the top, so nothing imports
this module before a batch is asked for.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import os
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from supcon_jax.data import autoaugment
from supcon_jax.data.sources import (
    NOBODY,
    READERS,
    ArraySource,
    Encoded,
    EncodedSource,
    check_labels,
)

logger = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]
Skipped = dict[str, str]  # name of an example -> why it could not be decoded
# Attempts of the official code to find a crop that fits, and what it must cover.
CROP_ATTEMPTS, CROP_COVERED = 100, 0.1
ASPECT_RATIOS = (3 / 4, 4 / 3)

# Streams that are being read. TensorFlow's threads run Python (the reading of bytes):
# where they are still at it when the interpreter ends, the process may hang for ever.
_OPEN: weakref.WeakSet[Iterator[Batch]] = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    for stream in list(_OPEN):
        stream.close()


def batches(
    source: EncodedSource | ArraySource,
    identities: Callable[[int], np.ndarray],
    transform: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    *,
    shape: tuple[int, ...],
    start_step: int,
    stop_step: int | None,
    replace_unreadable: bool,
    skipped: Skipped | None,
) -> Iterator[Batch]:
    """The rows of this process, step by step.

    Args:
      source: what to read.
      identities: step -> `[rows, 2]` int32, (epoch, index), index `NOBODY` for padding.
      transform: `(image uint8 [H, W, 3], identity int32 [2]) -> uint8 shape`, in
        TensorFlow.
      shape: what `transform` returns, `(V, S, S, 3)`.
      start_step, stop_step: the first step and the one after the last; None: endless.
      replace_unreadable: what takes the place of an example that cannot be decoded:
        the next one that can (training), or nobody, masked (evaluation).
      skipped: collects such examples; None: the first one is an error.

    Yields:
      `{"image": uint8 [rows, *shape], "label": int32 [rows], "id": int32 [rows, 2],
      "mask": float32 [rows]}`.

    Raises:
      ValueError: an example cannot be decoded, or its label is out of range.
    """
    unreadable: set[int] = set()
    # A local name: at the interpreter's exit the module's are gone.
    errors = (tf.errors.OpError, OSError)
    step = start_step
    while step != stop_step:
        rows = functools.partial(
            _readable, source, identities, unreadable, replace_unreadable
        )
        try:
            stream = _dataset(source, rows, transform, shape, step, stop_step)
            _OPEN.add(stream)
            for batch in stream:
                yield _checked(source, batch)
                step += 1
        except errors as error:
            # Whoever keeps the error until the end keeps its frames, and with them the
            # stream (see _OPEN).
            traceback.clear_frames(error.__traceback__)
            found = _diagnose(source, rows(step))
            if not found:
                raise
            unreadable |= found.keys()
            names = {source.name(index): reason for index, reason in found.items()}
            if skipped is None:
                name, reason = next(iter(names.items()))
                raise ValueError(
                    f"cannot decode {name}: {reason}; repair or remove it, or go on "
                    "without such images: --config.data.skip_errors=True"
                ) from error
            skipped |= names
            for name, reason in names.items():
                logger.warning("warning: skipping %s: %s", name, reason)
        else:
            return


def _readable(
    source: EncodedSource | ArraySource,
    identities: Callable[[int], np.ndarray],
    unreadable: set[int],
    replace: bool,
    step: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Identities of a step, and which examples are read for them."""
    ids = identities(step)
    index = ids[:, 1].astype(np.int64)
    if len(unreadable) == source.num_examples:
        raise ValueError("none of the images can be decoded (--config.data.name)")
    for row in np.flatnonzero(np.isin(index, list(unreadable))):
        while replace and index[row] in unreadable:
            index[row] = (index[row] + 1) % source.num_examples
        if not replace:
            index[row] = NOBODY
    return ids, index


def _dataset(
    source: EncodedSource | ArraySource,
    rows: Callable[[int], tuple[np.ndarray, np.ndarray]],
    transform: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    shape: tuple[int, ...],
    start_step: int,
    stop_step: int | None,
) -> Iterator[Batch]:
    steps = (
        itertools.count(start_step)
        if stop_step is None
        else range(start_step, stop_step)
    )
    read = _read_images if isinstance(source, ArraySource) else _read_files

    def load(image: tf.Tensor, label: tf.Tensor, turn: tf.Tensor, ids: tf.Tensor):
        def example() -> tf.Tensor:
            pixels = image if image.dtype == tf.uint8 else decode(image, turn)
            return tf.ensure_shape(transform(pixels, ids), shape)

        somebody = label != NOBODY
        picture = tf.cond(somebody, example, lambda: tf.zeros(shape, tf.uint8))
        return {
            "image": picture,
            "label": tf.maximum(label, 0),
            "id": ids,
            "mask": tf.cast(somebody, tf.float32),
        }

    count = len(rows(start_step)[0])
    pixels = (
        tf.TensorSpec((count, *source.images.shape[1:]), tf.uint8)
        if isinstance(source, ArraySource)
        else tf.TensorSpec((count,), tf.string)
    )
    dataset = tf.data.Dataset.from_generator(
        functools.partial(read, source, rows, steps),
        output_signature=(
            pixels,
            tf.TensorSpec((count,), tf.int32),
            tf.TensorSpec((count,), tf.int32),
            tf.TensorSpec((count, 2), tf.int32),
        ),
    )
    options = tf.data.Options()
    # Images are what runs in parallel; splitting one operation costs more than it gives.
    options.threading.max_intra_op_parallelism = 1
    # Fixed buffers: autotuning would let them grow into all the memory there is.
    dataset = (
        dataset.prefetch(1)
        .unbatch()
        .map(
            tf.autograph.experimental.do_not_convert(load),
            num_parallel_calls=os.cpu_count(),
        )
        .batch(count, drop_remainder=True)
        .prefetch(2)
        .with_options(options)
    )
    yield from dataset.as_numpy_iterator()


def _read_images(source: ArraySource, rows, steps) -> Iterator[tuple]:
    for step in steps:
        ids, index = rows(step)
        labels = np.where(index == NOBODY, NOBODY, source.labels[index])
        yield source.images[index], labels, np.ones(len(ids), np.int32), ids


def _read_files(source: EncodedSource, rows, steps) -> Iterator[tuple]:
    def read(index: int) -> Encoded:
        if index == NOBODY:
            return Encoded(b"", NOBODY)
        try:
            return source.read(index)
        except OSError:
            return Encoded(b"", 0)  # fails to decode, and is looked into then

    with ThreadPoolExecutor(READERS) as pool:
        for step in steps:
            ids, index = rows(step)
            images, labels, turns = zip(*pool.map(read, index.tolist()), strict=True)
            yield (
                np.asarray(images, object),
                np.asarray(labels, np.int32),
                np.asarray(turns, np.int32),
                ids,
            )


def _checked(source: EncodedSource | ArraySource, batch: Batch) -> Batch:
    somebody = batch["mask"] > 0
    if np.any((batch["label"] >= source.num_classes) & somebody):
        names = [
            "" if isinstance(source, ArraySource) else source.name(index)
            for index in batch["id"][:, 1]
        ]
        check_labels(batch["label"], source.num_classes, names)
    return batch


def _diagnose(
    source: EncodedSource | ArraySource, rows: tuple[np.ndarray, np.ndarray]
) -> dict[int, str]:
    """Examples of a step that cannot be decoded, and why."""
    found = {}
    if isinstance(source, ArraySource):
        return found
    for index in sorted(set(rows[1].tolist()) - {NOBODY}):
        try:
            example = source.read(index)
            decode(tf.constant(example.image), tf.constant(example.orientation))
        except OSError as error:
            found[index] = error.strerror or str(error)
        except tf.errors.OpError as error:
            found[index] = _reason(example.image, error)
    return found


def _reason(image: bytes, error: tf.errors.OpError) -> str:
    if not image:
        return "the file is empty"
    # TensorFlow's message begins with names of its own functions.
    return " ".join(error.message.split()).split("}} ")[-1].split(" [Op:")[0][:200]


def decode(encoded: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """RGB `[H, W, 3]` uint8 of a JPEG, PNG, WebP, BMP or GIF (its first frame).

    Grey, palette and CMYK images become RGB, an alpha channel is dropped.

    Args:
      encoded: the bytes.
      orientation: EXIF code 1..8; the image is turned upright.
    """
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    # An animated format may come with its frames in front all the same (WebP does).
    image = tf.cond(tf.rank(image) == 4, lambda: image[0], lambda: image)
    image = tf.ensure_shape(image, (None, None, 3))
    upright = {
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: tf.transpose(x, (1, 0, 2)),
        6: lambda x: tf.transpose(x, (1, 0, 2))[:, ::-1],
        7: lambda x: tf.transpose(x, (1, 0, 2))[::-1, ::-1],
        8: lambda x: tf.transpose(x, (1, 0, 2))[::-1],
    }
    branches = [
        functools.partial(upright.get(code, lambda x: x), image) for code in range(9)
    ]
    return tf.cond(
        orientation == 1,
        lambda: image,
        lambda: tf.switch_case(orientation, branches),
    )


def crop_and_augment(
    image: tf.Tensor,
    identity: tf.Tensor,
    *,
    image_size: int,
    views: int,
    seed: int,
    crop_area: tuple[float, float],
    flip: bool,
    augment: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None,
) -> tf.Tensor:
    """V random views `[V, S, S, 3]` of one decoded image `[H, W, 3]`, all uint8.

    Every choice is a function of (seed, epoch, index, view). A crop covers a share of
    the area in `crop_area` at an aspect ratio in [3/4, 4/3]; 100 attempts are made to
    find one that fits, and the whole image is taken where none does. It is resized
    bilinearly, without antialiasing, as in the official code.

    Args:
      image: `[H, W, 3]`.
      identity: `[2]` int32, (epoch, index).
      image_size: side S.
      views: V.
      seed: the run's seed.
      crop_area: least and largest share of the area.
      flip: mirror with probability 1/2.
      augment: `(view, seed [2]) -> view`, after crop and flip.
    """
    fold_in = tf.random.fold_in
    key = fold_in(tf.constant([seed, 0], tf.int32), identity[0])
    key = fold_in(key, identity[1])
    stack = []
    for number in range(views):
        view_key = fold_in(key, number)
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.shape(image),
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            fold_in(view_key, 0),
            min_object_covered=CROP_COVERED,
            aspect_ratio_range=ASPECT_RATIOS,
            area_range=crop_area,
            max_attempts=CROP_ATTEMPTS,
        )
        view = _resize(tf.slice(image, begin, size), (image_size, image_size))
        view = _to_uint8(view)
        if flip:
            mirror = tf.random.stateless_uniform([], fold_in(view_key, 1)) < 0.5
            view = _flip_if(mirror, view)
        if augment is not None:
            view = augment(view, fold_in(view_key, 2))
        stack.append(view)
    return tf.stack(stack)


def policy(
    name: str,
    *,
    layers: int,
    magnitude: float,
    jitter_strength: float,
    jitter_probability: float,
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None:
    """What the host does to a view after crop and flip, `(view, seed) -> view`.

    Args:
      name: "none", "auto_augment" or "rand_augment".
      layers, magnitude: of RandAugment.
      jitter_strength, jitter_probability: colour jitter that comes before the policy;
        without a policy it is left to the device.
    """
    if name == "none":
        return None

    def augment(view: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        fold_in = tf.random.fold_in
        if jitter_strength > 0 and jitter_probability > 0:
            view = autoaugment.color_jitter(
                view,
                fold_in(seed, 0),
                strength=jitter_strength,
                probability=jitter_probability,
            )
        if name == "auto_augment":
            return autoaugment.auto_augment(view, fold_in(seed, 1))
        return autoaugment.rand_augment(
            view, fold_in(seed, 1), layers=layers, magnitude=magnitude
        )

    return augment


def central_crop(
    image: tf.Tensor, identity: tf.Tensor, *, image_size: int, resize: int
) -> tf.Tensor:
    """The evaluation crop `[1, S, S, 3]`: short side to `resize`, then the centre."""
    del identity
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    target = tf.cast(tf.round(shape * resize / tf.reduce_min(shape)), tf.int32)
    image = _resize(image, target)
    top, left = tf.unstack((target - image_size) // 2)
    image = image[top : top + image_size, left : left + image_size]
    return _to_uint8(image)[None]


def _resize(image: tf.Tensor, size) -> tf.Tensor:
    return tf.image.resize(image, size, method="bilinear")


def _to_uint8(image: tf.Tensor) -> tf.Tensor:
    # Bilinear values lie between the pixels': rounding cannot leave 0..255.
    return tf.cast(image + 0.5, tf.uint8)


def _flip_if(mirror: tf.Tensor, view: tf.Tensor) -> tf.Tensor:
    return tf.cond(mirror, lambda: tf.reverse(view, [1]), lambda: view)
