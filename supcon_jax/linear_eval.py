"""Stage 2: a linear classifier on the frozen encoder of a pretraining run."""

from __future__ import annotations

import pathlib
from typing import Any

from ml_collections import ConfigDict

from supcon_jax import loop
from supcon_jax.config import check_config
from supcon_jax.loop import Evaluate
from supcon_jax.pretrained import check_pretrained, load_encoder
from supcon_jax.run import Run, build_predictor, open_run
from supcon_jax.steps.state import TrainState
from supcon_jax.stop import StopRequests


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
