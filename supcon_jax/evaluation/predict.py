"""A frozen model over a whole split: embeddings, or the classifier's accuracy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from supcon_jax import hosts, parallel, stop
from supcon_jax.data.pipeline import eval_batches, num_eval_batches
from supcon_jax.data.sources import Source
from supcon_jax.evaluation.classification import classification_sums, summarize
from supcon_jax.logs import progress

Batch = dict[str, jax.Array]


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
        embeddings, labels = [], []
        for batch in self._batches(source, label):
            part, part_labels, mask = jax.device_get(
                self._embed({"encoder": variables["encoder"]}, batch)
            )
            embeddings.append(part[mask > 0])
            labels.append(part_labels[mask > 0])
        return np.concatenate(embeddings), np.concatenate(labels)

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
        return summarize(
            step(variables, batch) for batch in self._batches(source, label)
        )

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
        if self._logits is None:
            raise ValueError("this Predictor has no head; it can only embed")
        parts = [
            jax.device_get(self._logits(variables, batch))
            for batch in self._batches(source, label, resize=resize)
        ]
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
