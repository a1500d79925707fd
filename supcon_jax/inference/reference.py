"""What the predictions of a finished run are held against, all of it from its own data.

The embeddings of its training images (which of them are nearest, and how far the nearest
usually is), and the temperature that makes its probabilities mean what they say. Made once,
kept in the run's folder as `reference.npz`, and made anew for another encoder or classifier.
"""

from __future__ import annotations

import functools
import io
import json
import logging
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import parallel, storage
from supcon_jax.checkpoint import digest
from supcon_jax.config.keys import RANDOM
from supcon_jax.data.identity import identify
from supcon_jax.data.selection import take_subset
from supcon_jax.data.sources import Source, read_labels
from supcon_jax.evaluation import calibration
from supcon_jax.evaluation.ood import default_neighbour, knn_scores
from supcon_jax.pretrained import features
from supcon_jax.pretrained.features import Features
from supcon_jax.pretrained.model import TrainedModel
from supcon_jax.run.splits import open_sources
from supcon_jax.run.workdir import read_facts, refuse_other_data

logger = logging.getLogger(__name__)
FILE, VERSION = "reference.npz", 1
# Training images that are kept, drawn at random where there are more.
MOST = 100_000
# Share of the images that training has not seen which are as near as the threshold.
QUANTILE = 0.99


class Reference(NamedTuple):
    """What a run's predictions are held against.

    Attributes:
      embeddings: `[n, D]` float32 of training images.
      labels: `[n]`; below 0 where an image has none.
      names: `[n]`, of their files, or "image 12" of data in memory.
      class_names: `[C]`.
      facts: numbers and what they were measured on, see `measure`.
    """

    embeddings: np.ndarray
    labels: np.ndarray
    names: np.ndarray
    class_names: tuple[str, ...]
    facts: dict[str, Any]


def open_reference(
    workdir: str, config: ConfigDict, model: TrainedModel, mesh: Mesh
) -> Reference:
    """The reference of a run: from its folder where it fits, else from its data.

    Args:
      workdir: of the run.
      config: of the run, with changes of where its data are; `data.eval_split` may be
        changed too, and is what probabilities are calibrated on.
      model: that was trained, with a classifier.
      mesh: the devices.

    Raises:
      ValueError: it has to be made, and the data are not there, or are others.
    """
    facts = {
        "version": VERSION,
        "model": digest(model.variables),
        "split": split_name(config),
    }
    path = storage.join(workdir, FILE)
    found = _read(path, facts)
    if found is None:
        logger.info("predictions: what they are held against is made, once")
        found = measure(workdir, config, model, mesh, facts)
        _write(path, found)
    return found


def split_name(config: ConfigDict) -> str:
    """What people call the images that evaluate a run."""
    data = config.data
    if data.validation_fraction:
        return f"{data.validation_fraction:.0%} of {data.train_split}, held out"
    return data.eval_split


def measure(
    workdir: str,
    config: ConfigDict,
    model: TrainedModel,
    mesh: Mesh,
    facts: dict[str, Any],
) -> Reference:
    """Opens a run's data and measures what `Reference.facts` says.

    `neighbour` is k of the distance to the k-th nearest training image (`ood.knn_scores`),
    `threshold` the `QUANTILE` of that distance among the evaluation images, which training
    has not seen, and `training_quantile` the same of the training images, each without
    itself. `temperature` minimises the negative log-likelihood of the evaluation images
    that have a label, with smoothed targets (`calibration.fit_temperature`); `ece` is their calibration error without it and `scaled_ece` with
    the temperature of the other half of them (`calibration.scale_by_halves`).
    """
    train, evaluation = open_sources(config)
    if train.synthetic:
        raise ValueError(
            f"the run in {workdir} was trained on noise, which nothing can be held against"
        )
    there = read_facts(workdir).get("data", {})
    ours = {"train": identify(train)}
    if config.data.eval_split == model.config.data.eval_split:
        ours["evaluation"] = identify(evaluation)
    refuse_other_data(workdir, ours, there)
    train = take_subset(train, MOST)
    extract = functools.partial(_extract, workdir, config, model, mesh)
    of_train = extract(train, "train")
    of_evaluation = extract(read_labels(evaluation), "evaluation")
    place = functools.partial(parallel.split_rows, mesh=mesh)
    k = default_neighbour(of_train.labels)
    bank = of_train.values
    rows = np.arange(len(bank))
    own = -knn_scores(bank, bank, k=k, exclude=rows, place=place)
    unseen = -knn_scores(bank, of_evaluation.values, k=k, place=place)
    facts = facts | {
        "neighbour": k,
        "threshold": float(np.quantile(unseen, QUANTILE)),
        "training_quantile": float(np.quantile(own, QUANTILE)),
    }
    facts |= calibrate(logits_of(model, of_evaluation.values), of_evaluation.labels)
    names = train.class_names or tuple(map(str, range(model.num_classes)))
    return Reference(
        embeddings=bank,
        labels=of_train.labels,
        names=np.asarray(features.names(train, len(bank))),
        class_names=tuple(names),
        facts=facts,
    )


def calibrate(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The temperature of a classifier, and its calibration error without and with it.

    Args:
      logits: `[n, C]` of images that training has not seen.
      labels: `[n]`; those below 0 are left out.
    """
    known = labels >= 0
    logits, labels = logits[known], labels[known]
    if len(labels) < 2:
        return {"temperature": 1.0, "images": 0}
    # Where few images are all recognised, nothing else keeps probabilities below 1.
    scaled, _ = calibration.scale_by_halves(logits, labels, smooth=True)
    return {
        "temperature": calibration.fit_temperature(logits, labels, smooth=True),
        "images": len(labels),
        "ece": calibration.expected_calibration_error(logits, labels),
        "scaled_ece": calibration.expected_calibration_error(scaled, labels),
    }


def logits_of(model: TrainedModel, embeddings: np.ndarray) -> np.ndarray:
    """Logits `[n, C]` of embeddings `[n, D]`."""
    head, chunk = model.head, 4096
    assert head is not None
    apply = jax.jit(lambda variables, x: head.apply(variables, x, train=False))
    parts = [
        np.asarray(apply(model.variables["head"], embeddings[start : start + chunk]))
        for start in range(0, len(embeddings), chunk)
    ]
    return np.concatenate(parts)


def _extract(
    workdir: str,
    config: ConfigDict,
    model: TrainedModel,
    mesh: Mesh,
    source: Source,
    name: str,
) -> Features:
    """Features of a split, where a probe of the same encoder has kept them, or kept here."""
    folders = [storage.join(workdir, "features")]
    encoder = model.config.pretrained or model.config.encoder.init_from
    probes = config.mode == "linear_eval" and encoder != RANDOM
    if probes and storage.is_dir(storage.absolute(encoder)):
        folders.insert(0, storage.join(encoder, "features"))
    return features.extract(
        config,
        mesh,
        model.encoder,
        model.variables["encoder"],
        source,
        name=name,
        folders=folders,
    )


def _read(path: str, facts: dict[str, Any]) -> Reference | None:
    """The reference in a file; None where there is none that fits."""
    try:
        with np.load(io.BytesIO(storage.read(path)), allow_pickle=False) as file:
            theirs = json.loads(str(file["facts"]))
            class_names = tuple(json.loads(str(file["class_names"])))
            arrays = (file["embeddings"], file["labels"], file["names"])
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive makes NumPy raise all kinds
        why = next(iter(str(error).splitlines()), type(error).__name__)
        logger.warning("warning: %s cannot be read (%s)", storage.shown(path), why)
        return None
    if any(theirs.get(key) != value for key, value in facts.items()):
        return None
    return Reference(*arrays, class_names, theirs)


def _write(path: str, reference: Reference) -> None:
    """Keeps a reference for the next time, where it can be written."""
    content = io.BytesIO()
    np.savez(
        content,
        embeddings=reference.embeddings,
        labels=reference.labels,
        names=reference.names,
        class_names=json.dumps(reference.class_names),
        facts=json.dumps(reference.facts),
    )
    try:
        storage.write(path, content.getvalue())
    except OSError as error:
        logger.info("%s is not kept: %s", storage.shown(path), error.strerror)
    else:
        logger.info("kept in %s", storage.shown(path))
