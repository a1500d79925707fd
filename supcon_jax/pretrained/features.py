"""Features of a frozen encoder: extracted once, kept beside its run, never stale.

A file holds the embeddings of one split and says what made them: the digest of the
encoder's arrays, the images, and how they were prepared. What is not exactly that, or
cannot be read whole, is extracted anew. Which images could not be decoded stands there too,
so that a row can be told by the name of its image. Projections are computed from the embeddings.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import hosts, storage
from supcon_jax.checkpoint import digest
from supcon_jax.config.check import flatten
from supcon_jax.config.keys import ENCODER_KEYS
from supcon_jax.data.identity import identify
from supcon_jax.data.sources import Source
from supcon_jax.models import EncoderWithProjection
from supcon_jax.run.batches import create_predictor

logger = logging.getLogger(__name__)
PyTree = Any
# Another one where this program comes to make other features of the same encoder.
VERSION = 1
# What features depend on besides the encoder's arrays and the images: the network, the
# preparation of images, and which of a split are taken, with which labels.
KEYS = (
    *ENCODER_KEYS,
    "encoder_average.use",
    "data.image_size",
    "data.eval_resize",
    "data.validation_fraction",
    "data.fraction",
    "data.samples_per_class",
    "data.label_noise",
    "data.split_seed",
)


class Features(NamedTuple):
    """Features of the images of a split that can be decoded, in order.

    Attributes:
      values: `[n, D]` float32.
      labels: `[n]`; below 0 where an image has none.
    """

    values: np.ndarray
    labels: np.ndarray

    def labelled(self) -> Features:
        """Those of the images that have a label."""
        known = self.labels >= 0
        return self if known.all() else Features(self.values[known], self.labels[known])


def extract(
    config: ConfigDict,
    mesh: Mesh,
    module: nn.Module,
    variables: PyTree,
    source: Source,
    *,
    name: str,
    folders: Sequence[str],
) -> Features:
    """Features of a source: from a file where one fits, else from the encoder.

    Args:
      config: the preparation of the images, the choice of examples, and the batch size.
      mesh: the devices.
      module: an encoder, with or without the projection head on it.
      variables: `{"params": ..., "batch_stats": ...}` of the module.
      source: the images.
      name: of the split, for people and for the file.
      folders: where the file may lie; it is written to the first that takes it.
    """
    if isinstance(module, EncoderWithProjection):
        encoder, head = (
            {kind: tree.get(part, {}) for kind, tree in variables.items()}
            for part in ("encoder", "head")
        )
        embeddings = extract(
            config, mesh, module.encoder, encoder, source, name=name, folders=folders
        )
        return project(module.head, head, embeddings)
    facts = describe(config, module, variables, source)
    paths = [storage.join(folder, _file_name(name, facts)) for folder in folders]
    found = next(
        (f for path in paths if (f := _read(path, facts, source)) is not None), None
    )
    # All processes of a job run the encoder together, or none does.
    there = hosts.gather("features", "there" if found is not None else "")
    if found is not None and all(there):
        return found
    predictor = create_predictor(config, mesh, module, None)
    values, labels = predictor.embed(
        {"encoder": variables}, source, label=f"features of {name}"
    )
    found = Features(values.astype(np.float32), labels)
    if jax.process_index() == 0:
        _write(paths, found, facts, _unreadable(source))
    return found


def project(head: nn.Module, variables: PyTree, embeddings: Features) -> Features:
    """Projections of embeddings, as they are before the loss scales them."""
    apply = jax.jit(lambda x: head.apply(variables, x, train=False))
    chunk = 4096
    parts = [
        np.asarray(apply(embeddings.values[start : start + chunk]))
        for start in range(0, len(embeddings.values), chunk)
    ]
    return Features(np.concatenate(parts), embeddings.labels)


def describe(
    config: ConfigDict, module: nn.Module, variables: PyTree, source: Source
) -> dict[str, Any]:
    """All that the features of a source depend on."""
    flat = flatten(config.to_dict())
    facts = {
        "version": VERSION,
        "encoder": digest(variables),
        "type": np.dtype(getattr(module, "dtype", np.float32)).name,
        "data": identify(source),
        **{key: flat[key] for key in KEYS},
    }
    return json.loads(json.dumps(facts))  # as they are in a file


def _file_name(name: str, facts: dict[str, Any]) -> str:
    """The same for a later state of the encoder, whose file takes the place of this."""
    others = {key: value for key, value in facts.items() if key != "encoder"}
    text = json.dumps(others, sort_keys=True).encode()
    return f"{name}-{hashlib.sha256(text).hexdigest()[:12]}.npz"


def names(source: Source, count: int) -> list[str]:
    """The names of the images that features of a source are of, in order.

    Args:
      source: that was given to `extract`.
      count: rows of the features.
    """
    every = (source.name(index) for index in range(source.num_examples))
    found = [name for name in every if name not in source.unreadable.reasons]
    assert len(found) == count, (len(found), count)
    return found


def _unreadable(source: Source) -> dict[str, str]:
    """The images of a source that cannot be decoded; a record is shared by its subsets."""
    if not source.unreadable.reasons:
        return {}
    every = {source.name(index) for index in range(source.num_examples)}
    return {n: why for n, why in source.unreadable.reasons.items() if n in every}


def _read(path: str, facts: dict[str, Any], source: Source) -> Features | None:
    """The features in a file; None where there is none that fits."""
    reasons: dict[str, str] = {}
    try:
        with np.load(io.BytesIO(storage.read(path)), allow_pickle=False) as file:
            theirs = json.loads(str(file["facts"]))
            found = Features(file["values"], file["labels"])
            if "unreadable" in file:
                reasons = json.loads(str(file["unreadable"]))
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive makes NumPy raise all kinds
        told = getattr(error, "strerror", None) or str(error)
        why = f"cannot be read ({next(iter(told.splitlines()), type(error).__name__)})"
    else:
        keys = sorted(facts.keys() | theirs.keys())
        differing = [key for key in keys if facts.get(key) != theirs.get(key)]
        if len(found.labels) + len(reasons) != source.num_examples:
            differing.append("number of images")  # an older version told no names
        if not differing:
            source.unreadable.reasons |= reasons
            count = f"{len(found.labels):,}"
            logger.info("features of %s images: %s", count, storage.shown(path))
            return found
        why = f"have another {', '.join(differing)}"
        if differing == ["encoder"]:
            why = "are of another checkpoint"
    logger.warning(
        "warning: the features in %s %s; extracting them anew", storage.shown(path), why
    )
    return None


def _write(
    paths: Sequence[str],
    found: Features,
    facts: dict[str, Any],
    reasons: dict[str, str],
) -> None:
    """Keeps features for the next time, where they can be written."""
    content = io.BytesIO()
    np.savez(
        content,
        values=found.values,
        labels=found.labels,
        facts=json.dumps(facts),
        unreadable=json.dumps(reasons),
    )
    for path in paths:
        try:
            if not storage.is_remote(path):
                pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
            storage.write(path, content.getvalue())
        except OSError as error:
            reason = error.strerror or str(error)
            logger.info("features are not kept in %s: %s", storage.shown(path), reason)
        else:
            count = f"{len(found.labels):,}"
            logger.info("features of %s images: kept in %s", count, storage.shown(path))
            return
