"""Transfer: the encoder of another run trained further, with a new classifier."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

from ml_collections import ConfigDict

from supcon_jax.config.check import check_config
from supcon_jax.config.keys import RANDOM
from supcon_jax.pretrain import build_evaluation
from supcon_jax.pretrained.model import check_pretrained, load_encoder
from supcon_jax.run import loop
from supcon_jax.run.defaults import resolve
from supcon_jax.run.opening import open_run
from supcon_jax.run.plan import Plan
from supcon_jax.run.stop import StopRequests

logger = logging.getLogger(__name__)
PyTree = Any


def finetune(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Trains encoder and classifier with cross-entropy; returns the final metrics.

    All is as in the cross-entropy baseline but the start: the encoder, its BatchNorm
    statistics too, is that of `pretrained`. Data, number of classes, image size and
    scaling may be others than there.

    Args:
      config: see configs/common.py; `mode` is "finetune" and `pretrained` names the
        workdir of a pretraining or another fine-tuning run, or is "random", which is the
        baseline itself, or is empty and `encoder.init_from` names weights.
      workdir: folder of this run; the same call on the same folder resumes.

    Raises:
      ValueError: a config, data, workdir or pretraining run that cannot be used, in one
        line.
    """
    check_config(config)
    check_pretrained(config)
    with StopRequests() as stop:
        with stop.interruptible():
            config = resolve(config, workdir)
            run = open_run(config, workdir, load_initial=load_initial_encoder)
        return loop.train(run, evaluate=build_evaluation(run), stop=stop)


def load_initial_encoder(plan: Plan) -> PyTree:
    """The encoder that training starts from; None for one from the seed."""
    return None if plan.config.pretrained == RANDOM else load_encoder(plan)
