"""Stage 2: a linear classifier on the frozen encoder of a pretraining run."""

from __future__ import annotations

import contextlib
import functools
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from supcon_jax import hosts, parallel, storage
from supcon_jax.checkpoint import Checkpointer
from supcon_jax.config.check import check_config
from supcon_jax.config.keys import NOT_READ_BY_LBFGS, RANDOM
from supcon_jax.data.sources import Source
from supcon_jax.evaluate import write_classes
from supcon_jax.evaluation.classification import (
    classification_sums,
    confusion_matrix,
    summarize,
)
from supcon_jax.evaluation.logistic import Solution, fit_classifier
from supcon_jax.evaluation.multilabel import multilabel_metrics
from supcon_jax.losses.cross_entropy import logit_adjustment
from supcon_jax.metrics import on_end
from supcon_jax.models.heads import l2_normalize
from supcon_jax.pretrained import features
from supcon_jax.pretrained.features import Features
from supcon_jax.pretrained.model import check_pretrained, load_encoder, take_projection
from supcon_jax.run import loop, report
from supcon_jax.run.defaults import resolve
from supcon_jax.run.loop import Evaluate, Metrics
from supcon_jax.run.opening import Run, build_predictor, open_run
from supcon_jax.run.splits import count_classes
from supcon_jax.run.stop import StopRequests
from supcon_jax.steps.state import TrainState
from supcon_jax.writers import MetricWriter

logger = logging.getLogger(__name__)
# Numbers in the features of a split from which on all devices share them: 128 MiB.
SPLIT_FROM = 2**25


def linear_eval(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Runs stage 2 and returns the final metrics.

    Args:
      config: see configs/common.py; `mode` is "linear_eval" and `pretrained` names the
        workdir of a pretraining run, or is "random" for an untrained encoder, or is empty
        and `encoder.init_from` names weights.
      workdir: folder of this run; the same call on the same folder resumes.

    Raises:
      ValueError: a config, data, workdir or pretraining run that cannot be used, in
        one line.
    """
    check_config(config)
    check_pretrained(config)
    config = take_projection(config)
    with StopRequests() as stop:
        with stop.interruptible():
            config = resolve(config, workdir)
            run = open_run(
                config, workdir, load_frozen=lambda plan: (load_encoder(plan),)
            )
        if config.probe.solver == "lbfgs":
            return loop.run_to_end(run, functools.partial(solve, run), stop=stop)
        return loop.train(run, evaluate=build_evaluation(run), stop=stop)


def build_evaluation(run: Run) -> Evaluate:
    """The classifier's accuracy on the evaluation split.

    Where images may show several classes: how well it finds those of each.
    """
    modules = run.plan.modules
    predictor = build_predictor(run, modules.encoder, modules.head)
    (encoder_variables,) = run.frozen

    def evaluate(state: TrainState) -> dict[str, float]:
        variables = {
            "encoder": encoder_variables,
            "head": {"params": state.params["head"]},
        }
        sets = run.eval_source.label_sets
        if sets is None:
            return predictor.classify(variables, run.eval_source)
        logits, labels, _ = predictor.predict(variables, run.eval_source)
        return multilabel_metrics(logits, sets.weights(labels))

    return evaluate


def solve(run: Run, checkpointer: Checkpointer, stop: StopRequests) -> Metrics:
    """Fits the classifier to features, saves it and evaluates it; see `loop.run_to_end`.

    There is one step, from nothing to the solution. A run that was stopped before it
    begins anew, with the features that were kept.
    """
    config, plan = run.config, run.plan
    report.log_data(run)
    logger.info(
        "probe.solver=lbfgs fits features of plain images: %s play no part",
        ", ".join(f"{key}*" if key.endswith(".") else key for key in NOT_READ_BY_LBFGS),
    )
    writer = MetricWriter(
        run.folder,
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        start_step=0,
        writers=config.writers,
        project=config.project,
        config=config.to_dict(),
    )
    with contextlib.closing(writer):
        state, metrics = _fit(run, stop)
        logger.info("%s", ", ".join(on_end(metrics)))
        if checkpointer.latest_step() is None:
            checkpointer.save(state, plan.total_steps, metrics)
        checkpointer.wait()
        writer.write(plan.total_steps, metrics, final=True)
    return metrics


def _fit(run: Run, stop: StopRequests) -> tuple[TrainState, Metrics]:
    """The classifier that fits the features of the training split, and what it reaches."""
    config = run.config
    with stop.interruptible():
        train = _features(run, run.train_source, "train").labelled()
        evaluation = _features(run, run.eval_source, "evaluation")
        solution = fit_classifier(
            _placed(train.values, run),
            train.labels,
            num_classes=run.plan.num_classes,
            label_smoothing=config.loss.label_smoothing,
            seed=config.seed,
            on_fit=lambda l2: hosts.beat(f"fitting with l2={l2:.1g}", patience=6),
        )
    counts = count_classes(config, run.train_source)
    if counts is not None:
        # The bias is free, so the least of the loss with an offset is that without it,
        # shifted back.
        offset = logit_adjustment(counts, config.classifier.logit_adjustment)
        solution = solution._replace(bias=solution.bias - offset)
    state = _state_of(run, solution)
    metrics = _measure(run, state, evaluation)
    of_train = _measure(run, state, train)
    _write_classes(run, state, evaluation)
    metrics |= {f"train/{name}": of_train[f"eval/{name}"] for name in ("loss", "top1")}
    metrics["probe/l2"] = solution.l2
    metrics["probe/iterations"] = solution.iterations
    if losses := solution.validation_loss:
        metrics["probe/validation_loss"] = losses[solution.l2]
    return state, metrics


def _features(run: Run, source: Source, name: str) -> Features:
    """Features of a split, kept beside the encoder's run, or here where that is not ours."""
    folders = [storage.join(run.workdir, "features")]
    encoder = run.config.pretrained or run.config.encoder.init_from
    if encoder != RANDOM and storage.is_dir(storage.absolute(encoder)):
        folders.insert(0, storage.join(encoder, "features"))
    (variables,) = run.frozen
    return features.extract(
        run.config,
        run.mesh,
        run.plan.modules.encoder,
        variables,
        source,
        name=name,
        folders=folders,
    )


def _placed(values: np.ndarray, run: Run) -> jax.Array:
    """Features of unit length, as the classifier's linear layer gets them, on devices."""
    # Devices that share few would wait for each other more than they compute.
    small = values.size < SPLIT_FROM
    placed = jnp.asarray(values) if small else parallel.split_rows(values, run.mesh)
    return jax.jit(l2_normalize)(placed)


def _state_of(run: Run, solution: Solution) -> TrainState:
    """The run's state with the solution in it, on every device."""
    replicated = parallel.replicated(run.mesh)
    state = jax.jit(run.plan.init, out_shardings=replicated)()
    layer = {"kernel": solution.kernel, "bias": solution.bias}
    params = jax.device_put({"head": {"dense_out": layer}}, replicated)
    step = jax.device_put(jnp.int32(run.plan.total_steps), replicated)
    return state.replace(step=step, params=params)


def _write_classes(run: Run, state: TrainState, evaluation: Features) -> None:
    """The tables and the picture of which class is taken for which."""
    found = evaluation.labelled()
    params = jax.device_get(state.params["head"])
    logits = run.plan.modules.head.apply({"params": params}, found.values, train=False)
    if jax.process_index() == 0:
        matrix = confusion_matrix(np.asarray(logits), found.labels)
        write_classes(run.folder, matrix, run.train_source.class_names)


def _measure(run: Run, state: TrainState, found: Features) -> Metrics:
    """Accuracy and loss of the classifier on features, as `eval/*`."""
    head = run.plan.modules.head

    @jax.jit
    def sums(params: Any, values: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        logits: Any = head.apply({"params": params}, values, train=False)
        return classification_sums(logits, labels, jnp.ones(len(labels)))

    chunk = 4096
    return summarize(
        sums(
            state.params["head"],
            found.values[start : start + chunk],
            found.labels[start : start + chunk],
        )
        for start in range(0, len(found.labels), chunk)
    )
