"""The model of another run: its encoder for stage 2, with its classifier for evaluation."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import parallel, storage
from supcon_jax.checkpoint import (
    checkpoint_dir,
    digest,
    restore_encoder,
    restore_state,
    saved_steps,
)
from supcon_jax.config.check import config_of, flatten
from supcon_jax.config.files import PROGRAM
from supcon_jax.config.keys import ENCODER_KEYS, RANDOM
from supcon_jax.objectives import OBJECTIVES, has_projection
from supcon_jax.pretrained.initial import encoder_shapes, fitted, load_weights
from supcon_jax.run.plan import Plan, create_plan, init_encoder
from supcon_jax.run.workdir import finished_metrics, read_config, read_facts
from supcon_jax.steps.state import TrainState

logger = logging.getLogger(__name__)
PyTree = Any


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """An encoder and the classifier that was trained on it.

    Attributes:
      config: of the run that trained the classifier.
      step: of its checkpoint.
      num_classes: C.
      encoder: images to embeddings.
      head: embeddings to logits; None of a run without a classifier.
      variables: `{"encoder": ..., "head": ...}` of both, on every device.
    """

    config: ConfigDict
    step: int
    num_classes: int
    encoder: nn.Module
    head: nn.Module | None
    variables: dict[str, PyTree]


def check_pretrained(config: ConfigDict) -> None:
    """Refuses a pretraining run that is missing or has another encoder.

    The run is that of `pretrained`, or that of `encoder.init_from` where this names one.

    Raises:
      ValueError: naming both encoders, or the command that makes the run.
    """
    workdir = config.pretrained
    if source := config.encoder.init_from:
        if not storage.is_dir(storage.absolute(source)):
            _check_file(config)
            return
        workdir = source
    elif config.mode == "pretrain" or workdir == RANDOM:
        return
    theirs = read_config(workdir) if workdir else None
    if theirs is None or theirs.get("mode") not in ("pretrain", "finetune"):
        raise ValueError(
            f"no pretraining run in {workdir!r}; run the pretraining config first, or "
            "name its workdir (--config.pretrained; 'random' is an untrained encoder; "
            "--config.encoder.init_from takes weights of other programs)"
        )
    warn_if_unfinished(workdir)
    if config.mode != "linear_eval":
        # Adapts to another scaling, and arrays are compared, but they do not show this.
        check_keys(config, theirs, ["encoder.convention"])
        return
    check_encoder_keys(config, theirs)
    if config.representation == "projection":
        check_projection(workdir, config_of(theirs))
        check_keys(config, theirs, ["encoder.normalize_embedding"])  # before the head


def _check_file(config: ConfigDict) -> None:
    """Refuses what weights in a file have none of."""
    if config.encoder_average.use:
        raise ValueError(
            f"got encoder_average.use=True with encoder.init_from="
            f"{config.encoder.init_from!r}, which holds one encoder; allowed: False "
            "(--config.encoder_average.use=False)"
        )


def check_projection(workdir: str, theirs: ConfigDict) -> None:
    """Refuses a pretraining run that has no projection head.

    Raises:
      ValueError: naming the loss that it was trained with.
    """
    if not has_projection(theirs):
        raise ValueError(
            f"the run in {workdir} was trained with loss.name={theirs.loss.name} and "
            f"projection.output_dim={theirs.projection.output_dim} and has no projection "
            "head; allowed: representation='embedding' (--config.representation, "
            "--representation)"
        )


def take_projection(config: ConfigDict) -> ConfigDict:
    """The config with the projection head that its pretraining run has."""
    config = ConfigDict(config)
    if config.representation != "projection" or config.pretrained == RANDOM:
        return config
    if theirs := read_config(config.pretrained):
        config.projection = config_of(theirs).projection
    return config


def check_encoder_keys(config: ConfigDict, theirs: dict[str, Any]) -> None:
    """Refuses a config whose encoder or scaling of images is not that of another run.

    Raises:
      ValueError: naming the key and both values.
    """
    check_keys(config, theirs, ENCODER_KEYS)


def check_keys(config: ConfigDict, theirs: dict[str, Any], keys: Iterable[str]) -> None:
    """Refuses a config that differs from that of the run it starts from in these keys.

    Raises:
      ValueError: naming the key and both values.
    """
    workdir = config.pretrained or config.encoder.init_from
    flag = f"--config.{'pretrained' if config.pretrained else 'encoder.init_from'}"
    # What an older run lacks has its default.
    ours = flatten(config.to_dict())
    theirs = flatten(config_of(theirs).to_dict())
    for key in keys:
        # config.json holds lists where a ConfigDict holds tuples.
        ours_value, theirs_value = (
            list(value) if isinstance(value, tuple) else value
            for value in (ours[key], theirs[key])
        )
        if ours_value != theirs_value:
            raise ValueError(
                f"the run {workdir} has {key}={theirs_value!r}, this config "
                f"has {ours_value!r}; set --config.{key} or another {flag}"
            )


def load_encoder(plan: Plan) -> PyTree:
    """The encoder that `pretrained` or `encoder.init_from` names, on every device.

    Raises:
      ValueError: its arrays are not those of this config's encoder; naming them.
    """
    config, replicated = plan.config, parallel.replicated(plan.mesh)
    if config.encoder.init_from:
        return load_weights(plan)
    if config.pretrained == RANDOM:
        init = functools.partial(init_encoder, plan)
        return jax.jit(init, out_shardings=replicated)()
    if config.representation == "projection":
        state = restore_state(config.pretrained, sharding=replicated)
        variables = state.projection_variables()
    else:
        variables = restore_encoder(
            config.pretrained, average=config.encoder_average.use, sharding=replicated
        )
    return fitted(variables, encoder_shapes(plan), source=config.pretrained)


class SavedEncoder(NamedTuple):
    """Where the encoder of a run is saved.

    Attributes:
      workdir: of the run that trained it, in full.
      step: of its newest checkpoint.
      average: whether the average of its steps is meant.
    """

    workdir: str
    step: int
    average: bool


def find_encoder(workdir: str) -> tuple[SavedEncoder, str]:
    """The encoder that a run of any mode trained, or that it was given.

    Returns:
      Where it is, and the digest that it must have; "" where the run has not noted one.

    Raises:
      ValueError: there is no run, it has saved nothing, the run of its encoder is gone, or
        its encoder is untrained.
    """
    average, noted, seen = False, "", set()
    while True:
        seen.add(storage.absolute(workdir))
        config = read_config(workdir)
        if config is None:
            raise ValueError(f"no run in {workdir!r}")
        steps = saved_steps(workdir)
        newest = checkpoint_dir(workdir) / str(steps[-1]) if steps else None
        if newest is not None and storage.is_dir(newest / "encoder"):
            return SavedEncoder(storage.absolute(workdir), steps[-1], average), noted
        weights = config.get("encoder", {}).get("init_from", "")
        if weights and not storage.is_dir(storage.absolute(weights)):
            raise ValueError(f"the run in {workdir} has its encoder from {weights}")
        pretrained = config.get("pretrained", "") or weights
        if not pretrained:
            raise ValueError(f"the run in {workdir} has saved no encoder yet")
        if pretrained == RANDOM:
            raise ValueError(f"the run in {workdir} has an untrained encoder")
        # The user next to it decides: a linear evaluation has chosen before its evaluation.
        average = config.get("encoder_average", {}).get("use", False)
        # A classifier of projections was given the head too.
        of_encoder = config.get("representation", "embedding") == "embedding"
        if config["mode"] == "linear_eval" and of_encoder:
            noted = read_facts(workdir).get("frozen", "")
        user, workdir = workdir, find_used_run(pretrained, workdir)
        if storage.absolute(workdir) in seen:  # one of that name is beside itself
            raise ValueError(f"the run {pretrained} that {user} uses is gone")


def load_model(
    workdir: str, mesh: Mesh, *, average: bool = False, classifier: bool = True
) -> TrainedModel:
    """Encoder and classifier of a run: linear evaluation, cross-entropy, or a probe.

    Args:
      workdir: of the run; where it is a linear evaluation, the run of its encoder must be
        there too: where it was, or beside this one.
      mesh: the devices.
      average: the average of the encoder, where the run kept one; a linear evaluation has
        chosen already.
      classifier: whether a run without one is refused.

    Raises:
      ValueError: there is no such run, it has no classifier, or the encoder that its
        classifier was trained on is gone.
    """
    theirs = read_config(workdir) if workdir else None
    if theirs is None:
        raise ValueError(
            f"no run in {workdir!r}; name the workdir of one that has a classifier "
            "(--config.pretrained)"
        )
    warn_if_unfinished(workdir)
    config = config_of(theirs)
    facts = read_facts(workdir)
    if "train" not in facts.get("data", {}):
        raise ValueError(
            f"the run in {workdir} does not say how many classes it has (an older "
            "version made it); the same command on it goes on and says so"
        )
    if "label_classes" in facts["data"]["train"]:
        raise ValueError(
            f"the classifier in {workdir} finds several classes an image; what it reached "
            "is in its metrics.jsonl, and nothing else can be done with it here yet "
            "(--config.pretrained)"
        )
    # Batches of these devices; what is restored does not depend on it.
    config.batch_size, config.microbatch_size = mesh.size, 0
    data = facts["data"]["train"]
    plan = create_plan(
        config, mesh, num_classes=data["classes"], num_examples=data["examples"]
    )
    name, head = _classifier(plan)
    if head is None and classifier:
        raise ValueError(no_classifier(config, workdir))
    state = load_state(workdir, plan)
    if config.mode == "linear_eval":
        if not config.encoder.init_from:
            config.pretrained = find_used_run(config.pretrained, workdir)
        encoder = load_encoder(plan)
        if facts.get("frozen") not in ("", None, digest((encoder,))):
            source = config.pretrained or config.encoder.init_from
            raise ValueError(
                f"the encoder in {source} is not the one that the classifier "
                f"in {workdir} was trained on (another run, or a later step of it)"
            )
    elif average and not state.encoder_average:
        raise ValueError(
            f"the run in {workdir} kept no average of its encoder "
            "(--config.encoder_average.use=False)"
        )
    else:
        encoder = state.encoder_average if average else state.encoder_variables()
    variables = {"encoder": encoder}
    if head is not None:
        variables["head"] = {"params": state.params[name]}
    return TrainedModel(
        config=config,
        step=int(state.step),
        num_classes=plan.num_classes,
        encoder=plan.modules.encoder,
        head=head,
        variables=variables,
    )


def load_state(workdir: str, plan: Plan, *, step: int | None = None) -> TrainState:
    """A saved state of a run on every device, the newest by default.

    Args:
      workdir: of the run.
      plan: of the run, for the devices that are here.
      step: a saved step.

    Raises:
      ValueError: there is no such checkpoint, or none that is whole.
    """
    replicated = parallel.replicated(plan.mesh)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        plan.abstract_state(),
    )
    return restore_state(workdir, abstract, step=step)


def _classifier(plan: Plan) -> tuple[str, nn.Module | None]:
    """Which head of a run gives classes, and under which name its parameters are."""
    modules = plan.modules
    contrastive = OBJECTIVES[plan.config.loss.name].contrastive
    if plan.config.mode == "linear_eval" or not contrastive:
        return "head", modules.head
    for name in ("classifier", "probe"):
        if module := getattr(modules, name):
            return name, module
    return "", None


def no_classifier(config: ConfigDict, workdir: str) -> str:
    """That a run has no classifier, and the command that makes one."""
    following = config.next_config or "configs/linear_*.py"
    return (
        f"the run in {workdir} has no classifier; train one: {' '.join(PROGRAM)} "
        f"--config={following} --config.pretrained={workdir}"
    )


def find_used_run(pretrained: str, workdir: str) -> str:
    """Where the run that another one uses is: where it was, or beside it."""
    if pretrained == RANDOM:
        return pretrained
    beside = storage.absolute(workdir).rpartition("/")[0]
    places = [pretrained, storage.join(beside, storage.name(pretrained))]
    for place in places:
        if saved_steps(place):
            return place
    raise ValueError(
        f"the run in {workdir} uses one that is neither in {places[0]} nor in "
        f"{places[1]}; move that run there"
    )


def warn_if_unfinished(workdir: str) -> None:
    """Says how far a run that is not complete has come."""
    if finished_metrics(workdir) is None:
        steps = saved_steps(workdir)
        reached = (
            f"its newest save is of step {steps[-1]}" if steps else "it saved nothing"
        )
        logger.warning("warning: the run %s is not finished; %s", workdir, reached)
