"""Robustness of a finished classifier: every corruption and severity of a -C dataset."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import hosts, storage
from supcon_jax.checkpoint import digest
from supcon_jax.config.check import check_config
from supcon_jax.data.corrupted import (
    check_whole,
    class_numbers,
    find_splits,
    is_released,
)
from supcon_jax.data.datasets import open_source
from supcon_jax.data.identity import identify
from supcon_jax.data.pipeline import check_image_size
from supcon_jax.data.sources import Source
from supcon_jax.evaluate import open_classifier
from supcon_jax.evaluation import classification
from supcon_jax.evaluation.calibration import expected_calibration_error
from supcon_jax.evaluation.corruption import ALEXNET, PUBLISHED, Reference
from supcon_jax.evaluation.robustness_table import (
    CLEAN,
    Results,
    as_text,
    errors_by_corruption,
    summarize,
    table,
)
from supcon_jax.figures import plot_robustness
from supcon_jax.logs import add_log_file, format_duration, progress
from supcon_jax.pretrained.model import TrainedModel
from supcon_jax.run.batches import create_predictor
from supcon_jax.run.defaults import resolve
from supcon_jax.run.opening import prepare
from supcon_jax.run.report import report_result
from supcon_jax.run.stop import Stopped, StopRequests, restart_command
from supcon_jax.run.workdir import finished_metrics, leave, local_folder, open_workdir
from supcon_jax.writers import MetricWriter

logger = logging.getLogger(__name__)
RESULTS = "robustness.json"


def robustness(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Evaluates the classifier of another run on corrupted images; returns the metrics.

    Writes `robustness.json` (the results of each split, as soon as they are known: the same
    command goes on with those that are missing), `metrics.jsonl` (`robustness/...`),
    `robustness.csv` and `figures/robustness.png`.

    Args:
      config: see configs/common.py; `mode` is "robustness", `pretrained` names the workdir
        of a run with a classifier, `data` are the clean images and `robustness.data` the
        corrupted ones.
      workdir: folder of this evaluation.

    Raises:
      ValueError: a config, data, workdir or run that cannot be used, in one line.
    """
    check_config(config)
    with StopRequests() as stop, stop.interruptible():
        config = resolve(config, workdir)
        mesh = prepare(config, workdir)
        places = _find(config)
        model, clean = open_classifier(config, mesh)
        known = _read_results(workdir)
        digests = _check_splits(config, places, clean, known)
        reference = _find_reference(config, digests, model.num_classes)
        path = open_workdir(
            config,
            workdir,
            frozen=digest(model.variables),
            data={"evaluation": identify(clean)},
            begun=bool(known),
        )
        try:
            logger.info("workdir %s", storage.shown(path))
            evaluation = _Evaluation(config, path, model, clean, mesh, digests, known)
            results = evaluation.run(places, stop)
            metrics = summarize(results, reference)
            _write(config, path, model.step, results, reference, metrics)
            if jax.process_index() == 0:
                picture = local_folder(path) / "figures" / "robustness.png"
                report_result(
                    config,
                    path,
                    metrics,
                    skipped=evaluation.skipped,
                    pictures=[picture] if picture.exists() else [],
                )
        finally:
            leave(path)
    return metrics


def _find(config: ConfigDict) -> dict[str, dict[str, str]]:
    """How each split of the corrupted data is opened; says what is missing.

    Raises:
      ValueError: there are none, or a corruption lacks severities that others have.
    """
    place = config.robustness.data
    if not place:
        raise ValueError(
            "mode=robustness needs corrupted images: a folder (ImageNet-C, CIFAR-10-C, or "
            "what `python -m supcon_jax.tools.corrupt` makes) or a TFDS name "
            "(--config.robustness.data)"
        )
    with _naming_the_flag():
        places, others = find_splits(
            place, dir=config.data.dir, split=config.data.eval_split
        )
    if others:
        logger.info("left alone, none of the 15: %s", ", ".join(sorted({*others})))
    with _naming_the_flag():
        check_whole(places, place)
    return places


@contextlib.contextmanager
def _naming_the_flag() -> Iterator[None]:
    """What the data layer refuses is the fault of the key that named the data here."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for key in ("data.root", "data.name"):
            message = message.replace(f"--config.{key}", "--config.robustness.data")
        raise ValueError(message) from None


def _open(config: ConfigDict, name: str, place: dict[str, str]) -> Source:
    """One split of the corrupted data.

    Raises:
      ValueError: it cannot be used.
    """
    data = config.data
    with _naming_the_flag():
        source = open_source(
            **place,
            image_key=data.image_key,
            label_key=data.label_key,
            skip_errors=data.skip_errors,
        )
    try:
        check_image_size(source, data.image_size)
    except ValueError as error:
        raise ValueError(
            f"{name} of {config.robustness.data}: {error} (--config.robustness.data)"
        ) from None
    return source


def _check_splits(
    config: ConfigDict,
    places: dict[str, dict[str, str]],
    clean: Source,
    known: Results,
) -> dict[str, str]:
    """The digest of every split; refuses what would be found wrong after hours.

    Raises:
      ValueError: a split cannot be used, or the workdir has results of another one.
    """
    digests, other_sizes = {}, 0
    for name, place in progress(places.items(), total=len(places), label="opening"):
        source = _open(config, name, place)
        with _naming_the_flag():
            class_numbers(source, clean, name=f"{name} of {config.robustness.data}")
        digests[name] = identify(source)["digest"]
        other_sizes += source.num_examples != clean.num_examples
        if known.get(name, {}).get("digest", digests[name]) != digests[name]:
            raise ValueError(
                f"the workdir has results of another {name} than the one now in "
                f"{config.robustness.data}; use another --workdir, or the data of that "
                "run (--config.robustness.data)"
            )
    if other_sizes:
        logger.warning(
            "warning: %d corrupted splits have another number of images than the clean "
            "one, %s (--config.data.eval_split)",
            other_sizes,
            f"{clean.num_examples:,}",
        )
    return digests


def _find_reference(
    config: ConfigDict, digests: Mapping[str, str], num_classes: int
) -> Reference | None:
    """Whose errors mCE divides by; None where it is not to be given.

    Raises:
      ValueError: it has no errors on these images.
    """
    name = config.robustness.reference
    if name == "none":
        return None
    if name == "alexnet":
        if (num_classes, config.data.image_size) != (1000, 224):
            raise ValueError(
                "robustness.reference='alexnet' has the errors of ImageNet-C at 224 "
                f"pixels; these data have {num_classes} classes and "
                f"{config.data.image_size} pixels; allowed: 'none', or the workdir of "
                "another robustness run (--config.robustness.reference)"
            )
        if not is_released(config.robustness.data):
            logger.warning(
                "warning: AlexNet's errors are those on the released ImageNet-C, and %s "
                "was made anew: its mCE is comparable with the paper's roughly "
                "(--config.robustness.data)",
                config.robustness.data,
            )
        return ALEXNET
    results = _read_results(name)
    lacking = [split for split in digests if split not in results]
    if CLEAN not in results or lacking:
        what = f" of {lacking[0]}" if results and lacking else ""
        raise ValueError(
            f"robustness.reference={name!r} is no finished robustness run: it has no "
            f"results{what}; allowed: 'none', 'alexnet', or the workdir of one "
            "(--config.robustness.reference)"
        )
    for split, found in digests.items():
        if results[split]["digest"] != found:
            raise ValueError(
                f"robustness.reference={name!r} was made with other images of {split} "
                "(--config.robustness.reference, --config.robustness.data)"
            )
    errors = {c: float(np.mean(e)) for c, e in errors_by_corruption(results).items()}
    return Reference(name, errors, 1 - results[CLEAN]["top1"])


def _read_results(workdir: str | pathlib.Path) -> Results:
    path = storage.join(storage.absolute(workdir), RESULTS)
    try:
        return json.loads(storage.read(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {path}: {reason}; is it a workdir?") from None


class _Evaluation:
    """The classifier over the clean split and all corrupted ones."""

    def __init__(
        self,
        config: ConfigDict,
        path: pathlib.Path,
        model: TrainedModel,
        clean: Source,
        mesh: Mesh,
        digests: Mapping[str, str],
        known: Results,
    ):
        self._config, self._path, self._model = config, path, model
        self._clean, self._digests = clean, digests
        self._results = {n: known[n] for n in (CLEAN, *digests) if n in known}
        # One compiled program for all splits.
        self._predictor = create_predictor(config, mesh, model.encoder, model.head)
        self.skipped: dict[str, str] = {}

    def run(self, places: dict[str, dict[str, str]], stop: StopRequests) -> Results:
        """What is missing is evaluated, in order, and kept as soon as it is known.

        Raises:
          Stopped: it was asked to stop; what was evaluated stays.
        """
        todo = [name for name in (CLEAN, *places) if name not in self._results]
        hosts.agree({"splits to evaluate": json.dumps(todo)}, on="results so far")
        log_file = add_log_file(local_folder(self._path))
        try:
            with hosts.Watchdog(self._config.hosts.watchdog_minutes):
                self._evaluate(todo, places, stop)
        except Stopped:
            message = (
                f"stopped; {len(self._results)} of {1 + len(places)} splits are evaluated; "
                f"the same command goes on: {restart_command()}"
            )
            logger.info("%s", message)
            raise Stopped(message) from None
        finally:
            logging.getLogger("supcon_jax").removeHandler(log_file)
            log_file.close()
        return self._results

    def _evaluate(
        self, todo: list[str], places: dict[str, dict[str, str]], stop: StopRequests
    ) -> None:
        config, total = self._config, 1 + len(places)
        if not todo:
            logger.info("all %d splits are evaluated already", total)
            return
        logger.info(
            "evaluating the classifier of step %d in %s on %d splits of %s images%s",
            self._model.step,
            config.pretrained,
            len(todo),
            f"{self._clean.num_examples:,}",
            f"; {total - len(todo)} are done" if len(todo) < total else "",
        )
        start = time.monotonic()
        for done, name in enumerate(todo, start=1):
            if name == CLEAN:
                found = self._evaluate_split(name, self._clean, config.data.eval_resize)
            else:
                source = _open(config, name, places[name])
                # Corrupted images are crops already, as the release has them.
                found = self._evaluate_split(name, source, config.data.image_size)
            self._results[name] = found
            if jax.process_index() == 0:
                content = json.dumps(self._results, indent=1).encode()
                storage.write(storage.join(self._path, RESULTS), content)
            left = (time.monotonic() - start) / done * (len(todo) - done)
            logger.info(
                "%*d/%d  %-19s top-1 %6.2f%%  ECE %.4f  ETA %s",
                len(str(total)),
                total - len(todo) + done,
                total,
                name,
                100 * found["top1"],
                found["ece"],
                format_duration(left),
            )
            if done < len(todo) and stop.due():
                raise Stopped

    def _evaluate_split(self, name: str, source: Source, resize: int) -> dict[str, Any]:
        """Top-1 and ECE, as `evaluate` has them.

        Raises:
          ValueError: no image has a label, or one cannot be decoded.
        """
        logits, labels, _ = self._predictor.predict(
            self._model.variables, source, label=name, resize=resize
        )
        self.skipped |= source.unreadable.reasons
        known = labels >= 0
        if not np.any(known):
            raise ValueError(
                f"no image of {name} has a label (--config.robustness.data)"
            )
        numbers = class_numbers(source, self._clean, name=name)
        logits, labels = logits[known], numbers[labels[known]]
        arrays = map(jnp.asarray, (logits, labels, np.ones(len(labels), np.float32)))
        sums = classification.summarize([classification.classification_sums(*arrays)])
        return {
            "top1": sums["eval/top1"],
            "ece": expected_calibration_error(logits, labels),
            "num_examples": sums["eval/num_examples"],
        } | ({} if name == CLEAN else {"digest": self._digests[name]})


def _write(
    config: ConfigDict,
    path: pathlib.Path,
    step: int,
    results: Results,
    reference: Reference | None,
    metrics: dict[str, float],
) -> None:
    """Table, figure and metrics; the last line of the latter says that all is complete."""
    if jax.process_index() != 0:
        return
    folder = local_folder(path)
    log_file = add_log_file(folder)
    try:
        rows = table(results, reference)
        content = io.StringIO()
        csv.writer(content, lineterminator="\n").writerows(rows)
        temporary = folder / "robustness.tmp"
        temporary.write_text(content.getvalue())
        os.replace(temporary, folder / "robustness.csv")
        top1, ece = (
            {name: found[key] for name, found in results.items()}
            for key in ("top1", "ece")
        )
        published = PUBLISHED if reference is ALEXNET else {}
        plot_robustness(folder, top1, ece, published)
        for line in as_text(results, reference, metrics):
            logger.info("%s", line)
    finally:
        logging.getLogger("supcon_jax").removeHandler(log_file)
        log_file.close()
    before = finished_metrics(path) or {}
    ours = {name: value for name, value in before.items() if "/" in name}
    if ours == metrics:
        return
    writer = MetricWriter(
        folder,
        total_steps=max(step, 1),
        steps_per_epoch=max(step, 1),
        start_step=-1,  # a line of fewer splits, or of another reference, is replaced
        writers=config.writers,
        project=config.project,
        config=config.to_dict(),
    )
    writer.write(step, metrics, final=True)
    writer.close()
