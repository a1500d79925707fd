"""A frozen model over a whole split: embeddings, or the classifier's accuracy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from supcon_jax import hosts, parallel
from supcon_jax.data.pipeline import eval_batches, num_eval_batches
from supcon_jax.data.sources import Source
from supcon_jax.evaluation.classification import classification_sums, summarize
from supcon_jax.logs import progress
from supcon_jax.run import stop

Batch = dict[str, jax.Array]
T = TypeVar("T")


class Predictor:
    """Runs a frozen encoder, and a classifier on it, over the examples of a source.

    Variables are `{"encoder": {"params": ..., "batch_stats": ...}, "head": ...}`;
    the head's are needed by `classify` and `predict`.

    Args:
      encoder: images `[N, S, S, 3]` to embeddings.
      head: embeddings to logits; None where only `embed` is used.
      normalize: images in [0, 1] to what the encoder expects.
      mesh: the devices.
      batch_size: global; the last batch is padded and masked.
      image_size: side S of the central crop.
      resize: short side before the crop.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module | None,
        *,
        normalize: Callable[[jax.Array], jax.Array],
        mesh: Mesh,
        batch_size: int,
        image_size: int,
        resize: int,
    ):
        self._mesh = mesh
        self._batch_size = batch_size
        self._eval_batches = functools.partial(
            eval_batches, batch_size=batch_size, image_size=image_size, resize=resize
        )
        jit = functools.partial(
            jax.jit,
            in_shardings=(parallel.replicated(mesh), parallel.batch_sharding(mesh)),
            out_shardings=parallel.replicated(mesh),
        )
        self._embed = jit(
            functools.partial(embed_step, encoder=encoder, normalize=normalize)
        )
        self._classify = self._logits = None
        if head is not None:
            self._logits = jit(
                functools.partial(
                    logits_step, encoder=encoder, head=head, normalize=normalize
                )
            )
            self._classify = jit(
                functools.partial(
                    classify_step, encoder=encoder, head=head, normalize=normalize
                )
            )

    def embed(
        self, variables: Any, source: Source, *, label: str = "embedding"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings `[n, D]` and labels `[n]` of all examples, in order.

        A label below 0 says that an example has none.
        """
        encoder = {"encoder": variables["encoder"]}
        outputs = (
            self._embed(encoder, batch) for batch in self._batches(source, label)
        )
        embeddings, labels, count = np.empty(0), np.empty(0), 0
        for part, part_labels, mask in _fetch(outputs):
            if not count:  # whole, once: the parts together are as large
                embeddings = np.empty((source.num_examples, part.shape[1]), part.dtype)
                labels = np.empty(source.num_examples, part_labels.dtype)
            rows = slice(count, count + int(np.sum(mask > 0)))
            embeddings[rows], labels[rows] = part[mask > 0], part_labels[mask > 0]
            count = rows.stop
        return embeddings[:count], labels[:count]

    def classify(
        self, variables: Any, source: Source, *, label: str = "evaluating"
    ) -> dict[str, float]:
        """`eval/...` top1, top5, loss, mean_class_accuracy and num_examples.

        Raises:
          ValueError: there is no head, or no example has a label.
        """
        step = self._classify
        if step is None:
            raise ValueError("this Predictor has no head; it can only embed")
        batches = self._batches(source, label)
        return summarize(_fetch(step(variables, batch) for batch in batches))

    def predict(
        self,
        variables: Any,
        source: Source,
        *,
        label: str = "evaluating",
        resize: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits `[n, C]`, labels `[n]` and places in the source `[n]`, in order.

        Args:
          variables, source: of the model, and what it sees.
          label: what lines of progress call it.
          resize: short side before the crop, where it is another for this source.

        Raises:
          ValueError: there is no head.
        """
        step = self._logits
        if step is None:
            raise ValueError("this Predictor has no head; it can only embed")
        batches = self._batches(source, label, resize=resize)
        parts = list(_fetch(step(variables, batch) for batch in batches))
        logits, labels, mask = (np.concatenate(p) for p in zip(*parts, strict=True))
        rows = np.flatnonzero(mask)  # batches hold the examples in order
        return logits[rows], labels[rows], rows

    def _batches(
        self, source: Source, label: str, *, resize: int | None = None
    ) -> Iterator[Batch]:
        change = {} if resize is None else {"resize": resize}
        batches = parallel.prefetch_to_devices(
            self._eval_batches(source, **change), self._mesh
        )
        total = num_eval_batches(source, self._batch_size)
        for batch in progress(batches, total=total, label=label):
            hosts.beat(label)
            stop.check()
            yield batch


def _fetch(outputs: Iterator[T]) -> Iterator[T]:
    """Outputs of steps as NumPy arrays, each fetched after the next was dispatched.

    So the device computes while the host takes care of what came before.
    """
    before: list[T] = []
    for output in outputs:
        yield from map(jax.device_get, before)
        before = [output]
    yield from map(jax.device_get, before)


def embed_step(
    variables: Any,
    batch: Batch,
    *,
    encoder: nn.Module,
    normalize: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeddings, labels and mask of one padded batch; BatchNorm in inference mode."""
    images = normalize(batch["image"][:, 0].astype(jnp.float32) / 255.0)
    embeddings: Any = encoder.apply(variables["encoder"], images, train=False)
    return embeddings, batch["label"], batch["mask"]


def logits_step(
    variables: Any,
    batch: Batch,
    *,
    encoder: nn.Module,
    head: nn.Module,
    normalize: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits, labels and mask of one padded batch."""
    embeddings, labels, mask = embed_step(
        variables, batch, encoder=encoder, normalize=normalize
    )
    logits: Any = head.apply(variables["head"], embeddings, train=False)
    return logits, labels, mask


def classify_step(
    variables: Any,
    batch: Batch,
    *,
    encoder: nn.Module,
    head: nn.Module,
    normalize: Callable[[jax.Array], jax.Array],
) -> dict[str, jax.Array]:
    """`classification_sums` of one padded batch."""
    return classification_sums(
        *logits_step(variables, batch, encoder=encoder, head=head, normalize=normalize)
    )
