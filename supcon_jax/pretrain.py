"""Stage 1: train an encoder with a contrastive loss, or the cross-entropy baseline."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from supcon_jax.config.check import check_config
from supcon_jax.data.selection import take_labelled, take_subset
from supcon_jax.data.sources import has_labels
from supcon_jax.evaluation.knn import knn_accuracy
from supcon_jax.evaluation.multilabel import knn_mean_average_precision
from supcon_jax.evaluation.rankme import rankme
from supcon_jax.models import EncoderWithProjection
from supcon_jax.objectives import OBJECTIVES
from supcon_jax.pretrained.initial import load_weights
from supcon_jax.pretrained.model import check_pretrained
from supcon_jax.run import loop
from supcon_jax.run.batches import build_train_batches
from supcon_jax.run.defaults import resolve
from supcon_jax.run.loop import Evaluate
from supcon_jax.run.opening import Run, build_predictor, open_run
from supcon_jax.run.stop import StopRequests
from supcon_jax.steps.state import TrainState

logger = logging.getLogger(__name__)
PyTree = Any

# Progress lines in a row at the collapse level before the run says so.
COLLAPSE_PATIENCE = 5


def pretrain(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Runs stage 1 and returns the final metrics.

    Args:
      config: see configs/common.py; `mode` is "pretrain".
      workdir: folder of the run; the same call on the same folder resumes.

    Raises:
      ValueError: a config, data or workdir that cannot be used, in one line.
    """
    check_config(config)
    check_pretrained(config)
    with StopRequests() as stop:
        with stop.interruptible():
            config = resolve(config, workdir)
            run = open_run(config, workdir, load_initial=load_weights)
        return loop.train(
            run,
            evaluate=build_evaluation(run),
            on_log=CollapseMonitor(run),
            stop=stop,
        )


def build_evaluation(run: Run) -> Evaluate:
    """Online evaluation: kNN and RankMe of the embeddings, and the classifier if any.

    The bank is made of labelled training images without augmentation; the queries are
    the labelled images of the whole evaluation split. Where either has none there is no
    kNN. Where an image may show several classes, the neighbours score each of them, and
    the metric is the mean average precision.
    """
    config, modules = run.config, run.plan.modules
    # Which head gives classes, and under which name its parameters are.
    classifiers = {"classifier": modules.classifier, "probe": modules.probe}
    if not OBJECTIVES[config.loss.name].contrastive:
        classifiers = {"head": modules.head}
    name, classifier = next(
        ((n, module) for n, module in classifiers.items() if module is not None),
        ("", None),
    )
    predictor = build_predictor(run, modules.encoder, classifier)
    projects = config.representation == "projection"
    embedder = predictor
    if projects:
        encoder = EncoderWithProjection(modules.encoder, modules.head)
        embedder = build_predictor(run, encoder, None)
    bank = take_subset(
        take_labelled(run.train_source), config.knn.bank, seed=config.seed
    )
    with_knn = (
        bool(config.knn.bank) and has_labels(bank) and has_labels(run.eval_source)
    )
    if config.knn.bank and not with_knn:
        logger.info("no kNN: it needs labels in both splits")

    def embedding_metrics(encoder: PyTree, prefix: str = "") -> dict[str, float]:
        variables, metrics = {"encoder": encoder}, {}
        if with_knn:
            train = embedder.embed(variables, bank, label="kNN: training images")
        test = embedder.embed(variables, run.eval_source, label="kNN: test images")
        options = {"k": config.knn.k, "temperature": config.knn.temperature}
        if with_knn and bank.label_sets and run.eval_source.label_sets:
            metrics[f"knn/{prefix}map"] = knn_mean_average_precision(
                train[0],
                bank.label_sets.weights(train[1]),
                test[0],
                run.eval_source.label_sets.weights(test[1]),
                **options,
            )
        elif with_knn:
            metrics[f"knn/{prefix}top1"] = knn_accuracy(
                *train, *test, num_classes=bank.num_classes, **options
            )
        return metrics | {f"embedding/{prefix}rankme": rankme(test[0])}

    def evaluate(state: TrainState) -> dict[str, float]:
        encoder, metrics = state.encoder_variables(), {}
        if classifier is not None:
            head = {"params": state.params[name]}
            metrics = predictor.classify(
                {"encoder": encoder, "head": head}, run.eval_source
            )
        if config.knn.bank:
            embedder_variables = state.projection_variables() if projects else encoder
            metrics |= embedding_metrics(embedder_variables)
        if config.knn.bank and state.encoder_average:
            metrics |= embedding_metrics(state.encoder_average, "average_")
        return metrics

    return evaluate


class CollapseMonitor:
    """Says once, in plain words, that the projections have collapsed, and why.

    When all projections are equal, the contrastive loss is `scale * log(N - 1)`
    exactly. A loss that stays within 1 % of that level has learned nothing.
    """

    def __init__(self, run: Run, patience: int = COLLAPSE_PATIENCE):
        self._run = run
        self._patience = patience
        self._count = 0

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Looks at the metrics of a progress line."""
        level = metrics.get("train/collapse_loss")
        if level is None:
            return
        near = abs(metrics["train/loss"] - level) <= 0.01 * abs(level)
        self._count = self._count + 1 if near else 0
        if self._count == self._patience:
            logger.warning(
                "warning: the loss has stayed at %.4f, the value of projections that "
                "are all equal: the encoder has collapsed. %s",
                level,
                self._likely_cause(metrics),
            )

    def _likely_cause(self, metrics: dict[str, float]) -> str:
        """What can be seen of the data, before the settings are blamed."""
        if metrics.get("train/no_positive_fraction", 0.0) == 1.0:
            return "Cause: no image has a positive (--config.data.views=2)"
        views = self._run.config.batch_size * self._run.config.data.views
        if metrics.get("train/mean_positives", 0.0) >= views - 1:
            return "Cause: all images have one class (--config.data.name, data.root)"
        images = next(
            build_train_batches(
                self._run.config, self._run.train_source, self._run.sampler
            )
        )["image"]
        if not np.any(np.ptp(images, axis=0)):
            return "Cause: all images are equal (python -m supcon_jax.tools.show_batch)"
        return (
            "Cures: a longer warm-up (--config.optimizer.warmup_epochs), a lower "
            "learning rate (--config.optimizer.learning_rate), milder augmentation "
            "(--config.augment.*), a larger batch"
        )
