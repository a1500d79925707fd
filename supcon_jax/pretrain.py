"""Stage 1: train an encoder with a contrastive loss, or the cross-entropy baseline."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

from ml_collections import ConfigDict

from supcon_jax import loop
from supcon_jax.config import check_config
from supcon_jax.data.sources import take_subset
from supcon_jax.evaluation.knn import knn_accuracy
from supcon_jax.loop import Evaluate
from supcon_jax.objectives import OBJECTIVES
from supcon_jax.run import Run, build_predictor, open_run
from supcon_jax.steps.state import TrainState

logger = logging.getLogger(__name__)

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
    run = open_run(config, workdir)
    return loop.train(run, evaluate=build_evaluation(run), on_log=CollapseMonitor())


def build_evaluation(run: Run) -> Evaluate:
    """Online evaluation: kNN on the embeddings, and the classifier where there is one.

    The bank is made of training images without augmentation; the queries are the whole
    evaluation split.
    """
    config = run.config
    modules = run.plan.modules
    own = not OBJECTIVES[config.loss.name].contrastive  # its head is a classifier
    classifier = modules.head if own else modules.probe
    predictor = build_predictor(run, modules.encoder, classifier)
    bank = take_subset(run.train_source, config.knn.bank, seed=config.seed)

    def evaluate(state: TrainState) -> dict[str, float]:
        variables = {
            name: {"params": params, "batch_stats": state.batch_stats[name]}
            for name, params in state.params.items()
        }
        metrics = {}
        if classifier is not None:
            of_classifier = variables["head" if own else "probe"]
            metrics = predictor.classify(
                variables | {"head": of_classifier}, run.eval_source
            )
        if config.knn.bank:
            metrics["knn/top1"] = knn_accuracy(
                *predictor.embed(variables, bank, label="kNN: training images"),
                *predictor.embed(variables, run.eval_source, label="kNN: test images"),
                k=config.knn.k,
                temperature=config.knn.temperature,
                num_classes=bank.num_classes,
            )
        return metrics

    return evaluate


class CollapseMonitor:
    """Says once, in plain words, that the projections have collapsed.

    When all projections are equal, the contrastive loss is `scale * log(N - 1)`
    exactly. A loss that stays within 1 % of that level has learned nothing.
    """

    def __init__(self, patience: int = COLLAPSE_PATIENCE):
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
                "are all equal: the encoder has collapsed. Cures: a longer warm-up "
                "(--config.optimizer.warmup_epochs), a lower learning rate "
                "(--config.optimizer.learning_rate), milder augmentation "
                "(--config.augment.*), a larger batch",
                level,
            )
