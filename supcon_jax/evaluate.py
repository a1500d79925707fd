"""Evaluation of a finished classifier: accuracy, calibration, confusion, predictions."""

from __future__ import annotations

import csv
import functools
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import storage
from supcon_jax.checkpoint import digest
from supcon_jax.config.check import check_config
from supcon_jax.data.identity import identify
from supcon_jax.data.names import are_names
from supcon_jax.data.sources import Source
from supcon_jax.evaluation import calibration
from supcon_jax.evaluation.classification import (
    class_accuracies,
    classification_sums,
    confusion_matrix,
    summarize,
)
from supcon_jax.figures import plot_confusion, plot_reliability
from supcon_jax.logs import add_log_file
from supcon_jax.pretrained.model import TrainedModel, check_encoder_keys, load_model
from supcon_jax.run.batches import create_predictor
from supcon_jax.run.defaults import resolve
from supcon_jax.run.opening import prepare
from supcon_jax.run.report import report_result
from supcon_jax.run.splits import open_eval_source
from supcon_jax.run.stop import StopRequests
from supcon_jax.run.workdir import (
    finished_metrics,
    leave,
    local_folder,
    open_workdir,
    read_facts,
)
from supcon_jax.writers import MetricWriter

logger = logging.getLogger(__name__)
FIGURES = ("reliability", "confusion")
# Classes that a refusal names.
SHOWN = 5


def evaluate(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Evaluates the classifier of another run and returns the metrics.

    Writes `metrics.jsonl` (`eval/...`), `predictions.npz` (logits `[n, C]`, labels `[n]`
    and ids `[n]`, places in the split), `classes.csv`, `confusion.csv` and figures.

    Args:
      config: see configs/common.py; `mode` is "evaluate" and `pretrained` names the
        workdir of a linear evaluation, or of a run with a classifier of its own.
      workdir: folder of this evaluation; the same call prints what it holds.

    Raises:
      ValueError: a config, data, workdir or run that cannot be used, in one line.
    """
    check_config(config)
    with StopRequests() as stop, stop.interruptible():
        config = resolve(config, workdir)
        mesh = prepare(config, workdir)
        model, source = open_classifier(config, mesh)
        path = open_workdir(
            config,
            workdir,
            frozen=digest(model.variables),
            data={"evaluation": identify(source)},
        )
        try:
            logger.info("workdir %s", storage.shown(path))
            folder = local_folder(path)
            metrics = finished_metrics(path)
            if metrics is None:
                metrics = _evaluate(config, folder, model, source, mesh)
            else:
                logger.info("this evaluation is complete; another --workdir repeats it")
            if jax.process_index() == 0:
                pictures = [folder / "figures" / f"{name}.png" for name in FIGURES]
                report_result(
                    config,
                    path,
                    metrics,
                    skipped=source.unreadable.reasons,
                    pictures=[picture for picture in pictures if picture.exists()],
                )
        finally:
            leave(path)
    return metrics


def open_classifier(config: ConfigDict, mesh: Mesh) -> tuple[TrainedModel, Source]:
    """The model that `pretrained` names, and the evaluation split for it.

    Raises:
      ValueError: they cannot be used, or do not fit each other, in one line.
    """
    model = load_model(config.pretrained, mesh, average=config.encoder_average.use)
    check_encoder_keys(config, model.config.to_dict())
    source = open_eval_source(config)
    if source.num_classes != model.num_classes:
        raise ValueError(
            f"split {config.data.eval_split!r} of {config.data.name} has "
            f"{source.num_classes} classes, the classifier in {config.pretrained} "
            f"{model.num_classes} (--config.data.name, --config.pretrained)"
        )
    check_classes(config, model, source)
    check_size(config, model)
    return model, source


def check_size(config: ConfigDict, model: TrainedModel) -> None:
    """Refuses an image size at which the encoder has other arrays, such as positions.

    Raises:
      ValueError: naming both sizes.
    """
    size = config.data.image_size
    try:
        jax.eval_shape(
            functools.partial(model.encoder.apply, train=False),
            model.variables["encoder"],
            jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
        )
    except flax.errors.ScopeParamShapeError:
        there = model.config.data.image_size
        raise ValueError(
            f"the encoder of {config.pretrained} is for images of {there} pixels, got "
            f"data.image_size={size}; set --config.data.image_size={there}"
        ) from None


def check_classes(config: ConfigDict, model: TrainedModel, source: Source) -> None:
    """Refuses data with as many classes as the classifier has that are other ones.

    Names decide where both have some, else `data.classes`: of other data it says nothing
    where one of both takes all classes.

    Raises:
      ValueError: naming what differs.
    """
    theirs = tuple(read_facts(config.pretrained).get("class_names", ()))
    ours = source.class_names
    of = f"split {config.data.eval_split!r} of {config.data.name}"
    if are_names(ours) and are_names(theirs):
        if unknown := [name for name in ours if name not in theirs]:
            raise ValueError(
                f"{of} has classes that the classifier in {config.pretrained} does not "
                f"know: {_listed(unknown)}; it knows {_listed(theirs)} "
                "(--config.data.root, --config.data.classes, --config.pretrained)"
            )
        if ours != theirs:
            number = [a == b for a, b in zip(ours, theirs, strict=True)].index(False)
            raise ValueError(
                f"{of} has the classes of {config.pretrained} in another order: class "
                f"{number} is {ours[number]!r}, there {theirs[number]!r} "
                "(--config.data.classes, --config.data.root)"
            )
        return
    now, then = (tuple(c.data.classes) for c in (config, model.config))
    same_data = config.data.name == model.config.data.name
    if now != then and (same_data or (now and then)):
        raise ValueError(
            f"got data.classes={now}, the classifier in {config.pretrained} has "
            f"{then}; set --config.data.classes as there"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def _evaluate(
    config: ConfigDict,
    path: pathlib.Path,
    model: TrainedModel,
    source: Source,
    mesh: Mesh,
) -> dict[str, float]:
    """Runs the model over a source and writes what came out."""
    log_file = add_log_file(path)
    try:
        logger.info(
            "evaluating the classifier of step %d in %s on %s images of %s",
            model.step,
            config.pretrained,
            f"{source.num_examples:,}",
            config.data.name,
        )
        predictor = create_predictor(config, mesh, model.encoder, model.head)
        logits, labels, ids = predictor.predict(model.variables, source)
        known = labels >= 0
        if left := int(np.sum(~known)):
            logger.info("without a label, and left out: %s images", f"{left:,}")
        predictions = logits[known], labels[known], ids[known]
        if bad := int(np.sum(~np.isfinite(predictions[0]).all(axis=1))):
            logger.warning(
                "warning: %s images have logits that are not finite; calibration counts "
                "them as wrong (--config.pretrained)",
                f"{bad:,}",
            )
        scaled, temperature = calibration.scale_by_halves(*predictions[:2])
        metrics = classification_metrics(*predictions[:2], scaled)
        metrics["eval/temperature"] = temperature
        if jax.process_index() == 0:
            write_predictions(path, *predictions, scaled, source.class_names)
        # Last, because a final line says that the evaluation is complete.
        writer = MetricWriter(
            path,
            total_steps=max(model.step, 1),
            steps_per_epoch=max(model.step, 1),
            start_step=0,
            writers=config.writers,
            project=config.project,
            config=config.to_dict(),
        )
        writer.write(model.step, metrics, final=True)
        writer.close()
        return metrics
    finally:
        logging.getLogger("supcon_jax").removeHandler(log_file)
        log_file.close()


def classification_metrics(
    logits: np.ndarray, labels: np.ndarray, scaled: np.ndarray
) -> dict[str, float]:
    """Every `eval/*` number of logits `[n, C]` and labels `[n]`.

    Those named `scaled` are of `scaled`, the logits after temperature scaling.
    """
    arrays = map(jnp.asarray, (logits, labels, np.ones(len(labels), np.float32)))
    metrics = summarize([classification_sums(*arrays)])
    for prefix, values in (("", logits), ("scaled_", scaled)):
        functions = {
            "loss": calibration.negative_log_likelihood,
            "ece": calibration.expected_calibration_error,
            "ece_adaptive": calibration.adaptive_calibration_error,
            "ece_classwise": calibration.classwise_calibration_error,
            "brier": calibration.brier_score,
        }
        metrics |= {
            f"eval/{prefix}{name}": function(values, labels)
            for name, function in functions.items()
        }
    return metrics


def write_predictions(
    path: pathlib.Path,
    logits: np.ndarray,
    labels: np.ndarray,
    ids: np.ndarray,
    scaled: np.ndarray,
    names: tuple[str, ...],
) -> None:
    """Writes predictions, the two tables of classes and the figures of an evaluation."""
    temporary = path / "predictions.tmp.npz"
    np.savez_compressed(temporary, logits=logits, labels=labels, ids=ids)
    os.replace(temporary, path / "predictions.npz")
    diagrams = []
    for values in (logits, scaled):
        p = np.exp(calibration.log_probabilities(values))
        correct = p.argmax(axis=1) == labels
        diagrams.append(calibration.reliability(p.max(axis=1), correct))
    plot_reliability(path, *diagrams)
    write_classes(path, confusion_matrix(logits, labels), names)


def write_classes(
    path: pathlib.Path, matrix: np.ndarray, names: tuple[str, ...]
) -> None:
    """Writes `classes.csv`, `confusion.csv` and the picture of a confusion matrix.

    Args:
      path: the folder.
      matrix: `[C, C]`, counts of (class, predicted class).
      names: of the classes; () where they have none.
    """
    accuracies = class_accuracies(matrix)
    # Folders may have names that are not UTF-8.
    names = tuple(name.encode(errors="backslashreplace").decode() for name in names)
    known = names or tuple(str(number) for number in range(len(matrix)))
    with (path / "classes.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["class", "name", "examples", "accuracy"])
        for number, name in enumerate(known):
            accuracy = accuracies[number]
            shown = "" if np.isnan(accuracy) else f"{accuracy:.6f}"
            table.writerow([number, name, matrix[number].sum(), shown])
    with (path / "confusion.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["class", *known])
        table.writerows(
            [name, *row] for name, row in zip(known, matrix.tolist(), strict=True)
        )
    plot_confusion(path, matrix, names)
    worst = np.argsort(np.nan_to_num(accuracies, nan=2.0), kind="stable")[:5]
    logger.info(
        "least recognised: %s",
        ", ".join(f"{known[c]} {accuracies[c]:.1%}" for c in worst),
    )
