"""Encoded examples to uint8 batches: the tf.data part of the pipeline.

One thread reads the bytes of a step's examples by index; tf.data decodes, crops and
augments them on all cores (host_views.py). TensorFlow is imported here at the top, so nothing imports
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
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from supcon_jax.data.blocks import BlockCache, read_examples
from supcon_jax.data.host_views import decode
from supcon_jax.data.sources import (
    PADDING,
    READERS,
    UNLABELLED,
    Encoded,
    Source,
    check_label,
)

logger = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]

# Encoded images that are handed on together, and the bytes after which fewer are.
CHUNK_ROWS, CHUNK_BYTES = 512, 64 * 2**20
# How often a step is read again whose examples can all be read, but were not.
READ_AGAIN = 2

# Streams that are being read. TensorFlow's threads run Python to read the bytes, and the
# process may hang for ever if they are still reading when the interpreter ends.
_OPEN: weakref.WeakSet[Generator[Batch]] = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    for stream in list(_OPEN):
        stream.close()


def batches(
    source: Source,
    identities: Callable[[int], np.ndarray],
    transform: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    *,
    shape: tuple[int, ...],
    start_step: int,
    stop_step: int | None,
    replace_unreadable: bool,
    cache: BlockCache | None = None,
) -> Iterator[Batch]:
    """The rows of this process, step by step.

    Args:
      source: what to read; not synthetic.
      identities: step -> `[rows, 2]` int32, (epoch, index), index `PADDING` for padding.
      transform: `(image uint8 [H, W, 3], identity int32 [2]) -> uint8 shape`, in
        TensorFlow.
      shape: what `transform` returns, `(V, S, S, 3)`.
      start_step, stop_step: the first step and the one after the last; None: endless.
      replace_unreadable: what takes the place of an example that cannot be decoded:
        the next one that can (training), or padding (evaluation).
      cache: the blocks in which examples are read, if they are (lanes.py).

    Yields:
      `{"image": uint8 [rows, *shape], "label": int32 [rows], "id": int32 [rows, 2],
      "mask": float32 [rows]}`; of padding, image and label are zero. The label of an
      image that has none is `UNLABELLED`.

    Raises:
      ValueError: an example cannot be decoded and the source does not skip such
        examples, one cannot be read again and again and by itself can, or a label is out
        of range.
    """
    unreadable: set[int] = set()
    failed_step, times = start_step, 0
    # A local name, because the module's names are gone when the interpreter exits.
    errors = (tf.errors.OpError, OSError)
    step = start_step
    while step != stop_step:
        rows = functools.partial(
            _readable, source, identities, unreadable, replace_unreadable
        )
        unread: dict[int, str] = {}
        try:
            stream = _dataset(
                source, cache, rows, transform, shape, step, stop_step, unread
            )
            _OPEN.add(stream)
            for batch in stream:
                _check_labels(source, batch)
                yield batch
                step += 1
        except errors as error:
            # An error that is kept until the end keeps its frames, and they would keep
            # the stream (see _OPEN).
            traceback.clear_frames(error.__traceback__)
            found = _diagnose(source, rows(step))
            if found:
                unreadable |= found.keys()
                source.unreadable.add({source.name(i): why for i, why in found.items()})
            else:  # a disk or a network may have failed for a moment
                times = times + 1 if step == failed_step else 1
                failed_step = step
                _read_again(source, rows(step)[1], unread, times, error)
        else:
            return


def _read_again(
    source: Source,
    indices: np.ndarray,
    unread: dict[int, str],
    times: int,
    error: Exception,
) -> None:
    """Says that a step is read again, or raises what it failed with too often.

    Args:
      source: what is read.
      indices: the examples of the step, all of which can be read now.
      unread: examples that could not be read, and why.
      times: how often the step has failed.
      error: TensorFlow's, which does not say where.
    """
    index = next((i for i in indices.tolist() if i in unread), None)
    what = f"a batch failed: {error}".splitlines()[0][:200]
    if index is not None:
        what = f"cannot read {source.name(index)}: {unread[index]}"
    if times <= READ_AGAIN:
        logger.warning("warning: %s; now it can be read: trying again", what)
        return
    if index is None:
        raise error
    raise ValueError(
        f"{what}; it failed {times} times and could be read after each: look to the disk "
        "or network of the data (--config.data.root, --config.data.dir)"
    ) from None


def _readable(
    source: Source,
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
            index[row] = PADDING
    return ids, index


def _dataset(
    source: Source,
    cache: BlockCache | None,
    rows: Callable[[int], tuple[np.ndarray, np.ndarray]],
    transform: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    shape: tuple[int, ...],
    start_step: int,
    stop_step: int | None,
    unread: dict[int, str],
) -> Generator[Batch]:
    steps = (
        itertools.count(start_step)
        if stop_step is None
        else range(start_step, stop_step)
    )

    def load(
        image: tf.Tensor,
        label: tf.Tensor,
        orientation: tf.Tensor,
        is_example: tf.Tensor,
        ids: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        def views() -> tf.Tensor:
            pixels = image if image.dtype == tf.uint8 else decode(image, orientation)
            return tf.ensure_shape(transform(pixels, ids), shape)

        return {
            "image": tf.cond(is_example, views, lambda: tf.zeros(shape, tf.uint8)),
            "label": tf.where(is_example, label, 0),
            "id": ids,
            "mask": tf.cast(is_example, tf.float32),
        }

    count = len(rows(start_step)[0])
    read: Callable[..., Iterator[tuple]]
    if source.images is None:
        read = functools.partial(
            _read_encoded, most=min(count, CHUNK_ROWS), unread=unread, cache=cache
        )
        image = tf.TensorSpec((None,), tf.string)
    else:
        read = _read_images
        image = tf.TensorSpec((None, *source.images.shape[1:]), tf.uint8)
    dataset = tf.data.Dataset.from_generator(
        functools.partial(read, source, rows, steps),
        output_signature=(
            image,
            tf.TensorSpec((None,), tf.int32),
            tf.TensorSpec((None,), tf.int32),
            tf.TensorSpec((None,), tf.bool),
            tf.TensorSpec((None, 2), tf.int32),
        ),
    )
    options = tf.data.Options()
    # Images are processed in parallel, so that splitting a single operation over threads
    # costs more than it gains.
    options.threading.max_intra_op_parallelism = 1
    # The buffers have a fixed size, since autotuning lets them grow until memory is full.
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


def _read_images(source: Source, rows, steps) -> Iterator[tuple]:
    images = source.images
    assert images is not None
    for step in steps:
        ids, index = rows(step)
        upright = np.ones(len(ids), np.int32)
        yield images[index], source.labels[index], upright, index != PADDING, ids


def _read_encoded(
    source: Source,
    rows,
    steps,
    *,
    most: int,
    unread: dict[int, str],
    cache: BlockCache | None = None,
) -> Iterator[tuple]:
    """Examples in order, at most `most` at a time; `unread` gets why some were not read.

    Not a step at a time: photos that are handed on as pixels would fill the memory.
    """
    with ThreadPoolExecutor(READERS) as pool:
        coming = read_examples(source, map(rows, steps), pool, cache)
        while True:
            chunk: list[tuple] = []
            size = 0
            while len(chunk) < most and size < CHUNK_BYTES:
                ids, index, example = next(coming, (None, PADDING, None))
                if example is None:
                    break
                if isinstance(example, OSError):
                    # It cannot be decoded, and _diagnose then says why it still is.
                    unread[index] = example.strerror or str(example)
                    example = Encoded(b"", 0)
                chunk.append((ids, index, *example))
                size += len(example.image)
            if not chunk:
                return
            all_ids, indices, images, labels, orientations = zip(*chunk, strict=True)
            yield (
                np.asarray(images, object),
                # A number that int32 cannot hold is refused below, as it was read.
                np.clip(labels, UNLABELLED, np.iinfo(np.int32).max).astype(np.int32),
                np.asarray(orientations, np.int32),
                np.asarray(indices) != PADDING,
                np.asarray(all_ids),
            )


def _check_labels(source: Source, batch: Batch) -> None:
    """Refuses labels that no class has, naming the first such example."""
    labels = batch["label"]
    for row in np.flatnonzero(labels >= source.num_classes)[:1]:
        index = int(batch["id"][row, 1])
        known = source.images is not None
        label = labels[row] if known else source.read(index).label
        check_label(source, index, int(label))


def _diagnose(source: Source, rows: tuple[np.ndarray, np.ndarray]) -> dict[int, str]:
    """Examples of a step that cannot be decoded, and why."""
    found: dict[int, str] = {}
    if source.images is not None:
        return found
    for index in sorted(set(rows[1].tolist()) - {PADDING}):
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
