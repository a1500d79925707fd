"""A run without its data and its folder: what is computed, and on what shapes.

A plan is made from a config, a mesh and two numbers. It can be lowered, compiled and
measured for hardware that is not here: nothing in it asks this process for its devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import builders, parallel
from supcon_jax.config.check import check_chosen, check_config
from supcon_jax.data.augment import mix_examples, view_keys
from supcon_jax.losses.cross_entropy import logit_adjustment
from supcon_jax.objectives import OBJECTIVES
from supcon_jax.steps import contrastive, linear
from supcon_jax.steps.contrastive import Modules, Prepare, StepSpec
from supcon_jax.steps.state import TrainState

PyTree = Any
Batch = dict[str, jax.Array]
Seed = int | jax.Array
# (state, batch, *frozen) -> (state, scalar metrics), or with a seed before them
Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run computes.

    Attributes:
      config: the checked config.
      mesh: the devices that the step is compiled for.
      num_classes, num_examples: of the training split.
      label_classes: C where labels are rows of weights `[B, C]`; 0 where each is a class.
      total_steps: updates to make.
      steps_per_epoch: examples / batch size, fractional.
      whole_images: whether a batch holds whole images, which the step crops, or views
        that the host has cropped.
      modules: the networks.
      optimizer, schedule: what updates them.
      init: makes the state of step 0; pure.
      seeded_step: `(seed, state, batch, *frozen) -> (state, metrics)`; pure. The seed is an
        argument of the compiled program, so that all seeds of a config share one.
    """

    config: ConfigDict
    mesh: Mesh
    num_classes: int
    num_examples: int
    label_classes: int
    total_steps: int
    steps_per_epoch: float
    whole_images: bool
    modules: Modules
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    init: Callable[[], TrainState]
    seeded_step: Step

    @property
    def step(self) -> Step:
        """The step of this run's seed, `(state, batch, *frozen) -> (state, metrics)`."""
        return functools.partial(self.seeded_step, self.config.seed)

    @property
    def platform(self) -> str:
        """The kind of device: "cpu", "gpu" or "tpu"."""
        return parallel.platform(self.mesh)

    def abstract_state(self) -> TrainState:
        """Shapes and types of the state."""
        return jax.eval_shape(self.init)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a global batch."""
        config = self.config
        size, side = config.batch_size, config.data.image_size
        views = 1 if self.whole_images else config.data.views
        shape = jax.ShapeDtypeStruct
        label = shape((size,), jnp.int32)
        if self.label_classes:
            label = shape((size, self.label_classes), jnp.float32)
        return {
            "image": shape((size, views, side, side, 3), jnp.uint8),
            "label": label,
            "id": shape((size, 2), jnp.int32),
        }

    def abstract_frozen(self) -> tuple[PyTree, ...]:
        """Shapes and types of what the step reads and does not train."""
        if self.config.mode != "linear_eval":
            return ()
        return (jax.eval_shape(functools.partial(init_encoder, self)),)

    def abstract_arguments(self) -> tuple[PyTree, ...]:
        """Shapes and types of what the compiled step takes: seed, state, batch, frozen."""
        seed = jax.ShapeDtypeStruct((), jnp.int32)
        state, batch = self.abstract_state(), self.abstract_batch()
        return seed, state, batch, *self.abstract_frozen()

    def seed_on_devices(self) -> jax.Array:
        """The run's seed, as the compiled step takes it."""
        seed = np.asarray(self.config.seed, np.int32)
        return jax.make_array_from_callback(
            (), parallel.replicated(self.mesh), lambda _: seed
        )

    def jit_step(self) -> Any:
        """`seeded_step` under `jax.jit`: state replicated and donated, batch split."""
        replicated = parallel.replicated(self.mesh)
        split = parallel.batch_sharding(self.mesh)
        frozen = (replicated,) * len(self.abstract_frozen())
        return jax.jit(
            self.seeded_step,
            in_shardings=(replicated, replicated, split, *frozen),
            out_shardings=replicated,
            donate_argnums=1,
        )

    def lower(self) -> jax.stages.Lowered:
        """The step, lowered from shapes alone for the devices of the mesh.

        Example:
          >>> from configs import digits
          >>> plan = create_plan(
          ...     digits.get_config(), parallel.create_mesh(jax.devices()[:1]),
          ...     num_classes=10, num_examples=1297)
          >>> "stablehlo.convolution" in plan.lower().as_text()
          True
        """
        return self.jit_step().lower(*self.abstract_arguments())


def init_encoder(plan: Plan) -> PyTree:
    """A random encoder, `{"params": ..., "batch_stats": ...}`; a function of the seed."""
    side = plan.config.data.image_size
    variables = plan.modules.encoder.init(
        jax.random.key(plan.config.seed), jnp.zeros((2, side, side, 3)), train=True
    )
    return {"batch_stats": {}, **variables}  # without BatchNorm there are none


def create_plan(
    config: ConfigDict,
    mesh: Mesh,
    *,
    num_classes: int,
    num_examples: int,
    whole_images: bool = True,
    label_classes: int = 0,
    class_counts: np.ndarray | None = None,
) -> Plan:
    """What a config computes on a mesh; opens no data and no folder.

    Args:
      config: see configs/common.py.
      mesh: one axis, "data", as `parallel.create_mesh` makes it; its devices need not
        be here.
      num_classes: C of the training split.
      num_examples: its images.
      whole_images: see `Plan`; so they are for arrays in memory.
      label_classes: see `Plan`.
      class_counts: `[C]`, images of each class, for `classifier.logit_adjustment`; None:
        of data that nothing is known of, and without it.

    Raises:
      ValueError: keys or values that are not allowed, or a batch that the devices
        cannot share.
    """
    check_config(config)
    check_chosen(config)
    parallel.check_batch_size(config.batch_size, mesh)
    parallel.check_microbatch_size(config.microbatch_size, config.batch_size, mesh)
    steps_per_epoch = num_examples / config.batch_size
    # Whole steps, as in the official code; the summand is for products such as 389.9...9.
    steps = int(config.epochs * steps_per_epoch + 1e-6)
    total_steps = config.total_steps or max(1, steps)
    if config.probe.solver == "lbfgs":
        total_steps, steps_per_epoch = 1, 1.0  # one step: from nothing to the solution
    optimizer, schedule = builders.build_optimizer(config, total_steps, steps_per_epoch)
    offset: jax.typing.ArrayLike = 0.0
    if class_counts is not None and config.classifier.logit_adjustment:
        offset = logit_adjustment(class_counts, config.classifier.logit_adjustment)
    build = _build_linear if config.mode == "linear_eval" else _build_pretrain
    modules, init, step = build(
        config,
        mesh,
        num_classes=label_classes or num_classes,
        whole_images=whole_images,
        logit_offset=offset,
        optimizer=optimizer,
        schedule=schedule,
    )
    return Plan(
        config=config,
        mesh=mesh,
        num_classes=num_classes,
        num_examples=num_examples,
        label_classes=label_classes,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        whole_images=whole_images,
        modules=modules,
        optimizer=optimizer,
        schedule=schedule,
        init=init,
        seeded_step=step,
    )


def _build_pretrain(
    config: ConfigDict,
    mesh: Mesh,
    *,
    num_classes: int,
    whole_images: bool,
    logit_offset: jax.typing.ArrayLike,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[Modules, Callable[[], TrainState], Step]:
    """Modules, `init` and `step` of stage 1 and of fine-tuning."""
    objective = OBJECTIVES[config.loss.name]
    mesh, norm_axis = parallel.grouped_mesh(mesh, config.encoder.batch_norm_devices)
    classifier = builders.build_classifier(config, num_classes)
    modules = Modules(
        builders.build_encoder(config, parallel.platform(mesh), axis_name=norm_axis),
        objective.build_head(config, num_classes, axis_name=norm_axis),
        classifier=classifier if config.loss.cross_entropy_weight else None,
        probe=classifier if config.probe.learning_rate else None,
    )
    init = functools.partial(
        contrastive.init_state,
        modules,
        optimizer=optimizer,
        image_size=config.data.image_size,
        seed=config.seed,
        momentum_decay=config.momentum_encoder.decay,
        queue_size=config.momentum_encoder.queue_size,
        average_decay=config.encoder_average.decay,
    )
    loss_function = objective.build_loss(config, mesh)
    if np.any(logit_offset) and not objective.contrastive:
        loss_function = functools.partial(loss_function, logit_offset=logit_offset)
    build_spec = functools.partial(
        StepSpec,
        modules,
        loss_function=loss_function,
        supervised=objective.uses_labels,
        num_microbatches=builders.num_microbatches(config),
        momentum_decay=config.momentum_encoder.decay,
        average_decay=config.encoder_average.decay,
        cross_entropy_weight=config.loss.cross_entropy_weight,
        logit_offset=logit_offset,
    )
    step = functools.partial(
        _contrastive_step,
        build_spec=build_spec,
        build_prepare=functools.partial(
            _build_preparation,
            config,
            mesh,
            num_classes=num_classes,
            whole_images=whole_images,
        ),
        build_noise=functools.partial(_build_noise, config),
        mesh=mesh,
        optimizer=optimizer,
        schedule=schedule,
    )
    return modules, init, step


def _build_linear(
    config: ConfigDict,
    mesh: Mesh,
    *,
    num_classes: int,
    whole_images: bool,
    logit_offset: jax.typing.ArrayLike,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[Modules, Callable[[], TrainState], Step]:
    """Modules, `init` and `step` of stage 2."""
    parallel.grouped_mesh(mesh, config.encoder.batch_norm_devices)  # its refusal
    modules = Modules(
        builders.build_representation(config, parallel.platform(mesh)),
        builders.build_classifier(config, num_classes),
    )
    init = functools.partial(
        linear.init_state,
        modules,
        optimizer=optimizer,
        image_size=config.data.image_size,
        seed=config.seed,
    )
    step = functools.partial(
        _linear_step,
        modules=modules,
        optimizer=optimizer,
        schedule=schedule,
        build_augment=functools.partial(
            builders.build_augmentation, config, mesh, whole_images=whole_images
        ),
        label_smoothing=config.loss.label_smoothing,
        logit_offset=logit_offset,
        num_microbatches=builders.num_microbatches(config),
    )
    return modules, init, step


def _contrastive_step(
    seed: Seed,
    state: TrainState,
    batch: Batch,
    *,
    build_spec: Callable[..., StepSpec],
    build_prepare: Callable[..., Prepare],
    build_noise: Callable[[Seed], Callable[[jax.Array], jax.Array] | None],
    **options: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`contrastive.train_step` with the views of a seed."""
    spec = build_spec(prepare=build_prepare(seed=seed), noise=build_noise(seed))
    return contrastive.train_step(state, batch, spec=spec, **options)


def _linear_step(
    seed: Seed,
    state: TrainState,
    batch: Batch,
    *frozen: PyTree,
    build_augment: Callable[..., Any],
    **options: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`linear.train_step` with the views of a seed."""
    augment = build_augment(seed=seed)
    return linear.train_step(state, batch, *frozen, augment=augment, **options)


def _build_noise(
    config: ConfigDict, seed: Seed
) -> Callable[[jax.Array], jax.Array] | None:
    """What gives the views of rows the keys of their encoder's random numbers, if any."""
    if not config.encoder.stochastic_depth:
        return None
    return functools.partial(view_keys, seed, views=config.data.views)


def _build_preparation(
    config: ConfigDict, mesh: Mesh, *, num_classes: int, whole_images: bool, seed: Seed
) -> Prepare:
    """Augmentation, Mixup and CutMix of the rows of a batch."""
    augment = builders.build_augmentation(
        config, mesh, whole_images=whole_images, seed=seed
    )
    options = config.augment
    mixes = options.mixup_alpha or options.cutmix_alpha
    mix = functools.partial(
        mix_examples,
        seed=seed,
        num_classes=num_classes,
        mixup_alpha=options.mixup_alpha,
        cutmix_alpha=options.cutmix_alpha,
    )

    def prepare(rows: Batch) -> tuple[jax.Array, jax.Array]:
        images = augment(rows["image"], rows["id"])
        return (
            mix(images, rows["label"], rows["id"]) if mixes else (images, rows["label"])
        )

    return prepare
