"""Stage 2: a linear classifier on the frozen encoder of a pretraining run."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import experiment, loop, parallel
from supcon_jax.checkpoint import restore_encoder
from supcon_jax.config import ENCODER_KEYS, check_config, flatten
from supcon_jax.experiment import Run
from supcon_jax.loop import Evaluate, Step
from supcon_jax.losses.cross_entropy import cross_entropy_of_views
from supcon_jax.train_state import TrainState
from supcon_jax.workdir import read_config

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
    run = experiment.open_run(
        config, workdir, load_frozen=lambda mesh: (load_encoder(config, mesh),)
    )
    init, step, evaluate = build(run, *run.frozen)
    return loop.train(run, init=init, step=step, evaluate=evaluate)


def build(
    run: Run, encoder_variables: PyTree
) -> tuple[Callable[[], TrainState], Step, Evaluate]:
    """The three functions that make up stage 2, from an opened run.

    Returns:
      `init() -> state`, `step(state, batch, encoder_variables) -> (state, metrics)`,
      both pure, and `evaluate(state) -> metrics`.
    """
    config = run.config
    encoder = experiment.build_encoder(config)
    head = experiment.build_classifier(config, run.train_source.num_classes)
    optimizer, schedule = experiment.build_optimizer(
        config, run.total_steps, run.steps_per_epoch
    )
    init = functools.partial(
        init_state,
        encoder=encoder,
        encoder_variables=encoder_variables,
        head=head,
        optimizer=optimizer,
        image_size=config.data.image_size,
        seed=config.seed,
    )
    step = functools.partial(
        train_step,
        encoder=encoder,
        head=head,
        optimizer=optimizer,
        schedule=schedule,
        augment=experiment.build_augmentation(config, run.train_source),
        label_smoothing=config.loss.label_smoothing,
        num_microbatches=experiment.num_microbatches(config),
    )
    predictor = experiment.build_predictor(run, encoder, head)

    def evaluate(state: TrainState) -> dict[str, float]:
        variables = {
            "encoder": encoder_variables,
            "head": {"params": state.params["head"]},
        }
        return predictor.classify(variables, run.eval_source)

    return init, step, evaluate


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


def load_encoder(config: ConfigDict, mesh: Mesh) -> PyTree:
    """The frozen encoder's variables, on every device."""
    everywhere = parallel.replicated(mesh)
    if config.pretrained != RANDOM:
        return restore_encoder(config.pretrained, sharding=everywhere)
    images = jnp.zeros((2, config.data.image_size, config.data.image_size, 3))
    init = functools.partial(experiment.build_encoder(config).init, train=True)
    return jax.jit(init, out_shardings=everywhere)(jax.random.key(config.seed), images)


def init_state(
    *,
    encoder: nn.Module,
    encoder_variables: PyTree,
    head: nn.Module,
    optimizer: optax.GradientTransformation,
    image_size: int,
    seed: int,
) -> TrainState:
    """A new TrainState that holds the classifier alone."""
    images = jnp.zeros((2, image_size, image_size, 3))
    embed = functools.partial(encoder.apply, train=False)
    shape = jax.eval_shape(embed, encoder_variables, images)
    embeddings = jnp.zeros(shape.shape, shape.dtype)
    head_variables = head.init(jax.random.key(seed), embeddings, train=True)
    params = {"head": head_variables["params"]}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={"head": {}},
        opt_state=optimizer.init(params),
    )


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    encoder_variables: PyTree,
    *,
    encoder: nn.Module,
    head: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    label_smoothing: float,
    num_microbatches: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the classifier; the encoder is in inference mode and unchanged.

    Args:
      state: holds the classifier.
      batch: "image" uint8 `[B, 1 or V, H, W, 3]`, "label" `[B]`, "id" `[B, 2]`.
      encoder_variables: `{"params": ..., "batch_stats": ...}`.
      encoder, head, optimizer, schedule: what they belong to.
      augment: `(images, ids) -> [B, V, H, W, 3]`.
      label_smoothing: see `cross_entropy_loss`.
      num_microbatches: parts of the batch that the encoder takes one after the other.

    Returns:
      The new state, and scalar metrics named as in metrics.jsonl.
    """

    def embed(carry: None, rows: dict[str, jax.Array]) -> tuple[None, jax.Array]:
        images = augment(rows["image"], rows["id"])
        num_images, views = images.shape[:2]
        images = images.reshape(num_images * views, *images.shape[2:])
        embeddings = encoder.apply(encoder_variables, images, train=False)
        return carry, embeddings.reshape(num_images, views, -1)

    _, embeddings = parallel.scan_microbatches(embed, None, batch, num_microbatches)

    def compute_loss(params: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = head.apply({"params": params["head"]}, embeddings, train=True)
        return cross_entropy_of_views(
            logits, batch["label"], label_smoothing=label_smoothing
        )

    gradient = jax.value_and_grad(compute_loss, has_aux=True)
    (loss, metrics), gradients = gradient(state.params)
    metrics = {f"train/{name}": value for name, value in metrics.items()}
    metrics |= {"train/loss": loss, "optim/learning_rate": schedule(state.step)}
    state = state.apply_gradients(
        gradients, optimizer=optimizer, batch_stats=state.batch_stats
    )
    return state, metrics
