"""From a config to the parts of a step: modules, augmentation, optimizer.

What depends on the kind of device is read from the mesh that the step is compiled for,
so that a step can be planned for hardware that is not here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import optimizers, parallel
from supcon_jax.data import augment
from supcon_jax.data.views import Augmentation
from supcon_jax.models import (
    Classifier,
    EncoderWithProjection,
    ProjectionHead,
    create_encoder,
    part_of,
)

# Keys of `config.encoder` that not every network has a use for, with their defaults:
# attributes of those that do.
OWN_OPTIONS = {
    "batch_norm_momentum": 0.9,
    "convention": "official",
    "class_token": True,
    "stochastic_depth": 0.0,
}


def num_microbatches(config: ConfigDict) -> int:
    """Parts of a batch that go through the encoder one after the other."""
    return config.batch_size // (config.microbatch_size or config.batch_size)


def build_encoder(
    config: ConfigDict, platform: str, *, axis_name: str | None = None
) -> nn.Module:
    """The encoder that `config.encoder` describes.

    Args:
      config: a checked config.
      platform: of the devices, as `parallel.platform` says.
      axis_name: the mesh axis over which BatchNorm takes its statistics in training.

    Raises:
      ValueError: a key is set that this encoder has no use for, as a BatchNorm's momentum
        where there is none, or it has no such stages.
    """
    dtype = config.encoder.dtype
    if dtype == "auto":
        # A CPU emulates bfloat16 several times slower than it runs float32.
        dtype = "float32" if platform == "cpu" else "bfloat16"
    encoder = create_encoder(
        config.encoder.name,
        image_size=config.data.image_size,
        width=config.encoder.width,
        stem=config.encoder.stem,
        dtype=jnp.dtype(dtype),
        axis_name=axis_name,
        remat=config.encoder.remat,
    )
    for name, default in OWN_OPTIONS.items():
        key, value = f"encoder.{name}", config.encoder[name]
        if hasattr(encoder, name):
            encoder = encoder.clone(**{name: value})
        elif value != default:
            raise ValueError(
                f"got {key}={value}; allowed: {default}, because {config.encoder.name} "
                f"has none to set (--config.{key}={default})"
            )
    if frozen := num_frozen_parts(config, encoder):
        encoder = encoder.clone(frozen_parts=frozen)
    return encoder


def num_frozen_parts(config: ConfigDict, encoder: nn.Module) -> int:
    """How many of an encoder's parts are not trained: 0, or its stem and first stages.

    Raises:
      ValueError: it has not so many stages that `finetune.stages` of them can be trained.
    """
    stages = config.finetune.stages
    if not stages and config.finetune.layer_decay == 1:
        return 0
    count = getattr(encoder, "num_stages", 0)
    if not count:
        raise ValueError(
            f"{config.encoder.name} has no stages; allowed: --config.finetune.stages=0 "
            "--config.finetune.layer_decay=1"
        )
    if stages > count:
        raise ValueError(
            f"got finetune.stages={stages}; allowed: 0 (all of the encoder) to {count}, "
            f"the stages of {config.encoder.name} (--config.finetune.stages)"
        )
    return count + 1 - stages if stages else 0


def build_classifier(
    config: ConfigDict, num_classes: int, *, axis_name: str | None = None
) -> Classifier:
    """The linear classifier that `config.classifier` describes."""
    del axis_name  # nothing in it looks at other images
    # With few images features of unit length are better, with many it makes no difference
    # (docs/evaluation.md), and a solver has nothing to tune.
    unit_length = config.probe.solver == "lbfgs"
    return Classifier(
        num_classes=num_classes,
        init_name=config.classifier.init,
        normalize_embedding=config.encoder.normalize_embedding or unit_length,
    )


def build_projection(
    config: ConfigDict, num_classes: int, *, axis_name: str | None = None
) -> ProjectionHead:
    """The projection head that `config.projection` describes."""
    del num_classes  # classifiers have as many outputs
    return ProjectionHead(
        hidden_dims=tuple(config.projection.hidden_dims),
        output_dim=config.projection.output_dim,
        batch_norm=config.projection.batch_norm,
        normalize_embedding=config.encoder.normalize_embedding,
        bias=config.projection.bias,
        axis_name=axis_name,
    )


def build_representation(config: ConfigDict, platform: str) -> nn.Module:
    """What maps images to the output that `config.representation` names."""
    encoder = build_encoder(config, platform)
    if config.representation == "embedding":
        return encoder
    return EncoderWithProjection(encoder, build_projection(config, 0))


def build_view_augmentation(config: ConfigDict) -> Augmentation:
    """What `config.augment` says of a view; host and step each take their part of it."""
    options = config.augment
    return Augmentation(
        crop_area=tuple(options.crop_area),
        flip=options.flip,
        jitter_strength=options.jitter_strength,
        jitter_probability=options.jitter_probability,
        jitter_kind=options.jitter_kind,
        policy=options.policy,
        layers=options.rand_augment_layers,
        magnitude=options.rand_augment_magnitude,
        grayscale_probability=options.grayscale_probability,
        blur_probability=options.blur_probability,
        blur_border=options.blur_border,
        extra=tuple(options.extra),
    )


def build_augmentation(
    config: ConfigDict,
    mesh: Mesh,
    *,
    whole_images: bool,
    seed: int | jax.Array | None = None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(images uint8, ids) -> [B, V, S, S, 3]` float32: in-step part and scaling.

    Args:
      config: a checked config.
      mesh: the devices.
      whole_images: whether the host sends whole images; if not, it has cropped and
        flipped them. What it has not done is done here, in the same order.
      seed: of the views; None: the config's.
    """
    augmentation = build_view_augmentation(config)
    in_step = functools.partial(
        augment.augment_batch,
        augmentation=augmentation.step_part(whole_images=whole_images),
        seed=config.seed if seed is None else seed,
        views=config.data.views,
        chunk_size=augmentation_chunk(mesh),
    )
    scale = build_normalization(config)
    return lambda images, ids: scale(in_step(images, ids))


def augmentation_chunk(mesh: Mesh) -> int | None:
    """Images that are augmented at a time in the step.

    A CPU's caches hold the intermediate values of few images. Over several devices a
    loop along the batch would gather it, and accelerators want all the work at once.
    """
    on_one_cpu = parallel.platform(mesh) == "cpu" and mesh.size == 1
    return 64 if on_one_cpu else None


def build_normalization(config: ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """`images in [0, 1] -> (images - mean) / std`."""
    return functools.partial(
        augment.normalize, mean=tuple(config.data.mean), std=tuple(config.data.std)
    )


def scaled_learning_rate(config: ConfigDict) -> float:
    """The peak learning rate for this batch size (linear scaling rule)."""
    options = config.optimizer
    if not options.learning_rate_batch:
        return options.learning_rate
    return options.learning_rate * config.batch_size / options.learning_rate_batch


def build_optimizer(
    config: ConfigDict, total_steps: int, steps_per_epoch: float
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer that `config.optimizer` describes, and its schedule."""
    if config.probe.solver == "lbfgs":
        return optax.identity(), optax.constant_schedule(0.0)  # it takes no steps
    options = config.optimizer
    schedule = optimizers.create_schedule(
        options.schedule,
        learning_rate=scaled_learning_rate(config),
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=options.warmup_epochs,
        warmup_start=options.warmup_start,
        cosine_end=options.cosine_end,
        decay_rate=options.decay_rate,
        decay_epochs=options.decay_epochs,
        boundaries_epochs=tuple(options.boundaries_epochs),
    )
    optimizer = optimizers.create_optimizer(
        options.name,
        schedule,
        exclude=tuple(options.exclude),
        **{name: options[name] for name in optimizers.OptimizerOptions._fields},
    )
    if config.finetune.stages or config.finetune.layer_decay < 1:
        rates, part_names = finetune_rates(config)
        # What is not trained does not decay either, and needs no momentum.
        optimizer = optax.partition(
            {
                name: optax.chain(optimizer, optax.scale(rate))
                if rate
                else optax.set_to_zero()
                for name, rate in rates.items()
            },
            part_names,
        )
    if config.probe.learning_rate:
        # The recipes' rates are for contrastive losses; a probe has one of its own.
        optimizer = optax.partition(
            {"model": optimizer, "probe": optax.adam(config.probe.learning_rate)},
            lambda params: {n: "probe" if n == "probe" else "model" for n in params},
        )
    return optimizer, schedule


def finetune_rates(
    config: ConfigDict,
) -> tuple[dict[str, float], Callable[[Any], Any]]:
    """The learning rate of each part of a model in fine-tuning, over the optimizer's.

    It is 1 for the classifier. Counted back from it, the k-th part of the encoder (the
    last stage is the first, the stem the last one) has `layer_decay ** k`, and a part
    that is not trained 0.

    Returns:
      Name of a part -> its rate, and `parameters -> a tree of the same structure with
      those names`.
    """
    encoder = build_encoder(config, "cpu")
    count, frozen = getattr(encoder, "num_stages", 0), num_frozen_parts(config, encoder)
    names = ["stem", *(f"stage{stage}" for stage in range(1, count + 1))]
    rates = {"classifier": 1.0} | {
        name: config.finetune.layer_decay ** (count + 1 - part) * (part >= frozen)
        for part, name in enumerate(names)
    }

    def name_of(path: tuple[Any, ...], _: Any) -> str:
        head, _, rest = jax.tree_util.keystr(
            path, simple=True, separator="/"
        ).partition("/")
        return names[part_of(rest, count)] if head == "encoder" else "classifier"

    return rates, functools.partial(jax.tree_util.tree_map_with_path, name_of)
