"""Stage 2: a linear classifier on the frozen encoder of a pretraining run."""

from __future__ import annotations

import functools
import logging
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from supcon_jax import loop, parallel
from supcon_jax.checkpoint import restore_encoder, saved_steps
from supcon_jax.config import ENCODER_KEYS, check_config, flatten
from supcon_jax.loop import Evaluate
from supcon_jax.plan import Plan, init_encoder
from supcon_jax.run import Run, build_predictor, open_run
from supcon_jax.steps.state import TrainState
from supcon_jax.stop import StopRequests
from supcon_jax.workdir import finished_metrics, read_config

logger = logging.getLogger(__name__)
PyTree = Any
RANDOM = "random"


def linear_eval(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Runs stage 2 and returns the final metrics.

    Args:
      config: see configs/common.py; `mode` is "linear_eval" and `pretrained` names the
        workdir of a pretraining run, or is "random" for an untrained encoder.
      workdir: folder of this run; the same call on the same folder resumes.

    Raises:
      ValueError: a config, data, workdir or pretraining run that cannot be used, in
        one line.
    """
    check_config(config)
    check_pretrained(config)
    with StopRequests() as stop:
        with stop.interruptible():
            run = open_run(
                config, workdir, load_frozen=lambda plan: (load_encoder(plan),)
            )
        return loop.train(run, evaluate=build_evaluation(run), stop=stop)


def build_evaluation(run: Run) -> Evaluate:
    """The classifier's accuracy on the evaluation split."""
    modules = run.plan.modules
    predictor = build_predictor(run, modules.encoder, modules.head)
    (encoder_variables,) = run.frozen

    def evaluate(state: TrainState) -> dict[str, float]:
        variables = {
            "encoder": encoder_variables,
            "head": {"params": state.params["head"]},
        }
        return predictor.classify(variables, run.eval_source)

    return evaluate


def check_pretrained(config: ConfigDict) -> None:
    """Refuses a pretraining run that is missing or has another encoder.

    Raises:
      ValueError: naming both encoders, or the command that makes the run.
    """
    workdir = config.pretrained
    if workdir == RANDOM:
        return
    theirs = read_config(workdir) if workdir else None
    if theirs is None or theirs.get("mode") != "pretrain":
        raise ValueError(
            f"no pretraining run in {workdir!r}; run the pretraining config first, or "
            "name its workdir (--config.pretrained; 'random' is an untrained encoder)"
        )
    if finished_metrics(workdir) is None:
        steps = saved_steps(workdir)
        reached = (
            f"its newest save is of step {steps[-1]}" if steps else "it saved nothing"
        )
        logger.warning(
            "warning: the pretraining run %s is not finished; %s", workdir, reached
        )
    ours, theirs = flatten(config.to_dict()), flatten(theirs)
    for key in ENCODER_KEYS:
        ours_value, theirs_value = ours[key], theirs.get(key)
        # config.json holds lists where a ConfigDict holds tuples.
        if isinstance(ours_value, tuple):
            ours_value = list(ours_value)
        if ours_value != theirs_value:
            raise ValueError(
                f"the pretraining run {workdir} has {key}={theirs_value!r}, this config "
                f"has {ours_value!r}; set --config.{key} or another --config.pretrained"
            )


def load_encoder(plan: Plan) -> PyTree:
    """The frozen encoder's variables, on every device."""
    config, replicated = plan.config, parallel.replicated(plan.mesh)
    if config.pretrained == RANDOM:
        init = functools.partial(init_encoder, plan)
        return jax.jit(init, out_shardings=replicated)()
    variables = restore_encoder(
        config.pretrained, average=config.encoder_average.use, sharding=replicated
    )
    (expected,) = plan.abstract_frozen()
    shapes = [
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (variables, expected)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        theirs, ours = (known.get(name) for known in shapes)
        if theirs != ours:
            raise ValueError(
                f"the encoder of {config.pretrained} has {name} {theirs}, this config's "
                f"{ours}; set --config.data.image_size or --config.encoder.* as there"
            )
    return variables
