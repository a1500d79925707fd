"""What a config may hold: every key with the values it may take, and the refusals."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from supcon_jax import optimizers
from supcon_jax.data.augment import TRANSFORMS
from supcon_jax.data.views import BLUR_BORDERS, JITTER_KINDS, POLICIES
from supcon_jax.models import CONVENTIONS, ENCODERS, STEMS
from supcon_jax.models.heads import CLASSIFIER_INITS
from supcon_jax.objectives import OBJECTIVES
from supcon_jax.writers import BACKENDS

# Keys on which a pretraining run and the use of its encoder must agree.
ENCODER_KEYS = (
    "encoder.name",
    "encoder.width",
    "encoder.stem",
    "encoder.convention",
    "encoder.class_token",
    "data.mean",
    "data.std",
)


# What `eval/...` the result of a classifier is told by first.
EVAL_METRICS = ("top1", "mean_class_accuracy")

# The others take a finished run.
TRAINING_MODES = ("pretrain", "linear_eval", "finetune")
# Of a layer. Beyond it arrays have more elements than any device, and JAX, can count.
WIDEST = 1_000_000


class Rule(NamedTuple):
    """The values that a key may take.

    Attributes:
      holds: whether a value is allowed; what it raises for a value of another type
        counts as no.
      words: the allowed values, or a function that names them: what can be registered
        (encoders, losses, writers) is looked up when a config is checked.
    """

    holds: Callable[[Any], bool]
    words: str | Callable[[], str]

    def allows(self, value: Any) -> bool:
        """Whether a key may have this value."""
        try:
            return self.holds(value)
        except (TypeError, ValueError):
            return False

    def allowed(self) -> str:
        """The allowed values in words."""
        return self.words if isinstance(self.words, str) else self.words()


class Key(NamedTuple):
    """What is known of a config key.

    Attributes:
      default: what a run that was made before the key existed had.
      rule: whether a value is allowed, and the allowed values in words.
      free: whether a run may go on with another value, because it does not change what
        the run computes: when it logs, evaluates and saves, where things lie.
    """

    default: Any
    rule: Rule
    free: bool = False

    def allows(self, value: Any) -> bool:
        """Whether the key may have this value, of the default's type and by its rule."""
        kind = type(self.default)
        if isinstance(value, bool) != (kind is bool):
            return False
        kinds = (int, float) if kind is float else kind
        return isinstance(value, kinds) and self.rule.allows(value)


def _one_of(names: Collection[str]) -> Rule:
    return Rule(lambda value: value in names, lambda: ", ".join(names))


def _some_of(names: Collection[str]) -> Rule:
    def holds(values: Any) -> bool:
        return len({*values}) == len(values) and all(value in names for value in values)

    return Rule(holds, lambda: f"a tuple of {', '.join(names)}, each at most once")


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Rule:
    def holds(x: Any) -> bool:
        return math.isfinite(x) and (x > low if above else x >= low) and x <= high

    least = f"{'above' if above else 'at least'} {low}"
    return Rule(holds, least if high == math.inf else f"{least} and at most {high}")


def _numbers(
    length: int | None,
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    whole: bool = False,
) -> Rule:
    single = _number(low, high, above=above)
    count = "any number of" if length is None else str(length)
    kinds = int if whole else (int, float)

    def holds(values: Any) -> bool:
        fits = length is None or len(values) == length
        return fits and all(isinstance(x, kinds) and single.holds(x) for x in values)

    numbers = "whole numbers" if whole else "numbers"
    return Rule(holds, f"{count} {numbers}, each {single.words}")


def _is_pattern(value: Any) -> bool:
    try:
        return bool(value) and re.compile(value) is not None
    except re.error:
        return False


def _is_scale(value: str) -> bool:
    try:
        return value in ("none", "temperature") or 0 < float(value) < math.inf
    except ValueError:
        return False


_TEXT = Rule(lambda value: True, "any text")
_NAME = Rule(lambda value: bool(value), "any name")
_FLAG = Rule(lambda value: isinstance(value, bool), "True, False")

# Every key with its default and the values it may take. Registries check names of their
# own again; tests hold the defaults to those of configs/common.py, where each key has its
# meaning beside it.
KEYS: dict[str, Key] = {
    "mode": Key(
        "pretrain",
        _one_of((*TRAINING_MODES, "evaluate", "robustness")),
    ),
    "seed": Key(0, _number(0, 2**31 - 1)),
    "batch_size": Key(256, _number(1)),
    "microbatch_size": Key(0, _number(0)),
    "epochs": Key(100.0, _number(0, above=True)),
    "total_steps": Key(0, _number(0)),
    "log_every": Key(100, _number(1), free=True),
    "eval_every": Key(0, _number(0), free=True),
    "checkpoint_every": Key(0, _number(0), free=True),
    "keep_checkpoints": Key(2, _number(1), free=True),
    "eval_metric": Key("top1", _one_of(EVAL_METRICS), free=True),
    "pretrained": Key("", _TEXT),
    "representation": Key("embedding", _one_of(("embedding", "projection"))),
    "next_config": Key("", _TEXT, free=True),
    "compilation_cache": Key(True, _FLAG, free=True),
    "writers": Key(("tensorboard",), _some_of(BACKENDS), free=True),
    "project": Key("supcon_jax", _TEXT, free=True),
    "hosts.watchdog_minutes": Key(10.0, _number(0), free=True),
    "data.name": Key("digits", _TEXT),
    "data.dir": Key("", _TEXT, free=True),
    "data.root": Key("", _TEXT, free=True),
    "data.image_key": Key("image", _NAME),
    "data.label_key": Key("label", _TEXT),
    "data.train_split": Key("train", _TEXT),
    "data.eval_split": Key("test", _TEXT),
    "data.classes": Key(
        (),
        Rule(
            lambda values: (
                all(isinstance(x, int) and x >= 0 for x in values)
                and len({*values}) == len(values)
                and len(values) != 1
            ),
            "numbers of at least two classes, each once, or none for all",
        ),
    ),
    "data.validation_fraction": Key(0.0, _number(0, 0.99)),
    "data.fraction": Key(1.0, _number(0, 1, above=True)),
    "data.samples_per_class": Key(0, _number(0)),
    "data.labelled_fraction": Key(1.0, _number(0, 1, above=True)),
    "data.labelled_per_class": Key(0, _number(0)),
    "data.label_noise": Key(0.0, _number(0, 1)),
    "data.split_seed": Key(0, _number(0, 2**31 - 1)),
    "data.classes_per_batch": Key(0, _number(0)),
    "data.lanes": Key(0, _number(0)),
    "data.keep_gib": Key(4.0, _number(0), free=True),
    "data.skip_errors": Key(False, _FLAG, free=True),
    "data.fake": Key(False, _FLAG),
    "data.image_size": Key(32, _number(1)),
    "data.eval_resize": Key(32, _number(1)),
    "data.views": Key(2, _number(1)),
    "data.mean": Key((0.5, 0.5, 0.5), _numbers(3, 0)),
    "data.std": Key((0.5, 0.5, 0.5), _numbers(3, 0, above=True)),
    "augment.crop_area": Key(
        (0.2, 1.0),
        Rule(
            lambda area: len(area) == 2 and 0 < area[0] <= area[1] <= 1,
            "(least, most) with 0 < least <= most <= 1",
        ),
    ),
    "augment.flip": Key(True, _FLAG),
    "augment.jitter_strength": Key(0.5, _number(0, 2.5)),
    "augment.jitter_probability": Key(0.8, _number(0, 1)),
    "augment.jitter_kind": Key("torchvision", _one_of(JITTER_KINDS)),
    "augment.policy": Key("none", _one_of(POLICIES)),
    "augment.rand_augment_layers": Key(2, _number(1)),
    "augment.rand_augment_magnitude": Key(10.0, _number(0, 10)),
    "augment.grayscale_probability": Key(0.2, _number(0, 1)),
    "augment.blur_probability": Key(0.0, _number(0, 1)),
    "augment.blur_border": Key("grey", _one_of(BLUR_BORDERS)),
    "augment.extra": Key((), _some_of(TRANSFORMS)),
    "augment.mixup_alpha": Key(0.0, _number(0)),
    "augment.cutmix_alpha": Key(0.0, _number(0)),
    "encoder.name": Key("resnet50", _one_of(ENCODERS)),
    "encoder.width": Key(1.0, _number(0, 100, above=True)),
    "encoder.stem": Key("imagenet", _one_of(STEMS)),
    "encoder.dtype": Key("float32", _one_of(("auto", "float32", "bfloat16"))),
    "encoder.normalize_embedding": Key(False, _FLAG),
    "encoder.batch_norm_devices": Key(0, _number(0)),
    "encoder.batch_norm_momentum": Key(0.9, _number(0, 0.9999)),
    "encoder.convention": Key("official", _one_of(CONVENTIONS)),
    "encoder.class_token": Key(True, _FLAG),
    "encoder.stochastic_depth": Key(0.0, _number(0, 0.9)),
    "encoder.init_from": Key("", _TEXT),
    "encoder.remat": Key(False, _FLAG, free=True),
    "projection.hidden_dims": Key((2048,), _numbers(None, 1, WIDEST, whole=True)),
    "projection.output_dim": Key(128, _number(0, WIDEST)),
    "projection.batch_norm": Key(False, _FLAG),
    "projection.bias": Key(False, _FLAG),
    "classifier.init": Key("glorot", _one_of(CLASSIFIER_INITS)),
    "finetune.stages": Key(0, _number(0)),
    "finetune.layer_decay": Key(1.0, _number(0, 1, above=True)),
    "probe.learning_rate": Key(0.0, _number(0)),
    "probe.solver": Key("sgd", _one_of(("sgd", "lbfgs"))),
    "momentum_encoder.decay": Key(0.0, _number(0, 0.999999)),
    "momentum_encoder.queue_size": Key(0, _number(0)),
    "encoder_average.decay": Key(0.0, _number(0, 0.999999)),
    "encoder_average.use": Key(False, _FLAG),
    "loss.name": Key("supcon", _one_of(OBJECTIVES)),
    "loss.temperature": Key(0.1, _number(0, above=True)),
    "loss.contrast_mode": Key("all", _one_of(("all", "one"))),
    "loss.summation": Key("outside", _one_of(("outside", "inside"))),
    "loss.denominator": Key("all", _one_of(("all", "one_positive", "only_negatives"))),
    "loss.positives_cap": Key(-1, _number(-1)),
    "loss.scale": Key(
        "none", Rule(_is_scale, "none, temperature, or a number above 0")
    ),
    "loss.label_smoothing": Key(0.0, _number(0, 0.999)),
    "loss.cross_entropy_weight": Key(0.0, _number(0)),
    "optimizer.name": Key("lars", _one_of(optimizers.OPTIMIZERS)),
    "optimizer.learning_rate": Key(0.3, _number(0, above=True)),
    "optimizer.learning_rate_batch": Key(256, _number(0)),
    "optimizer.schedule": Key("cosine", _one_of(optimizers.SCHEDULES)),
    "optimizer.warmup_epochs": Key(10.0, _number(0)),
    "optimizer.warmup_start": Key(0.0, _number(0, 1)),
    "optimizer.cosine_end": Key(0.0, _number(0, 1)),
    "optimizer.decay_rate": Key(0.97, _number(0, 1, above=True)),
    "optimizer.decay_epochs": Key(0.5, _number(0, above=True)),
    "optimizer.boundaries_epochs": Key((60.0, 75.0, 90.0), _numbers(None, 0)),
    "optimizer.weight_decay": Key(0.0001, _number(0)),
    "optimizer.momentum": Key(0.9, _number(0, 0.9999)),
    "optimizer.trust_coefficient": Key(0.001, _number(0, above=True)),
    "optimizer.rmsprop_decay": Key(0.9, _number(0, 0.9999)),
    "optimizer.rmsprop_epsilon": Key(0.001, _number(0, above=True)),
    "optimizer.adam_b1": Key(0.9, _number(0, 0.9999)),
    "optimizer.adam_b2": Key(0.999, _number(0, 0.999999)),
    "optimizer.adam_epsilon": Key(1e-8, _number(0, above=True)),
    "optimizer.exclude": Key(
        ("batch_norm",),
        Rule(
            lambda values: all(_is_pattern(value) for value in values),
            "regular expressions on parameter paths",
        ),
    ),
    "health.on_nonfinite": Key("stop", _one_of(("stop", "skip")), free=True),
    "health.max_skipped": Key(10, _number(0), free=True),
    "health.loss_rise": Key(3.0, _number(0), free=True),
    "health.norm_growth": Key(10.0, _number(0), free=True),
    "knn.bank": Key(50000, _number(0)),
    "knn.k": Key(20, _number(1)),
    "knn.temperature": Key(0.07, _number(0, above=True)),
    "robustness.data": Key("", _TEXT, free=True),
    "robustness.reference": Key("none", _NAME, free=True),
}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, path + ".") if isinstance(value, dict) else {path: value}
    return flat


def config_of(saved: dict[str, Any]) -> ConfigDict:
    """The config of a run from its config.json; what it lacks has its default."""
    flat = {key: known.default for key, known in KEYS.items()}
    flat |= {key: value for key, value in flatten(saved).items() if key in KEYS}
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        # JSON has no tuples.
        section[name] = tuple(value) if isinstance(value, list) else value
    return ConfigDict(nested)


def unknown_key(key: str) -> str:
    """One line about a key that there is not, with the nearest that there is."""
    # A key without its group: learning_rate for optimizer.learning_rate.
    nearest = [name for name in KEYS if name.endswith(f".{key}")]
    nearest = nearest or difflib.get_close_matches(key, KEYS, n=1, cutoff=0.4)
    named = " or ".join(f"--config.{name}" for name in nearest)
    hint = f"; did you mean {named}?" if named else ""
    return f"unknown config key {key!r}{hint} (see configs/common.py)"


def check_config(config: ConfigDict) -> None:
    """Refuses unknown and missing keys and values that are not allowed.

    Raises:
      ValueError: one line with what was got, what is allowed and the flag to change.
    """
    flat = flatten(config.to_dict())
    for key in flat:
        if key not in KEYS:
            raise ValueError(unknown_key(key))
    for key, known in KEYS.items():
        if key not in flat:
            raise ValueError(f"config key {key!r} is missing (see configs/common.py)")
        if not known.allows(flat[key]):
            raise ValueError(
                f"got {key}={flat[key]!r}; allowed: {known.rule.allowed()} "
                f"(--config.{key})"
            )
    if config.data.eval_resize < config.data.image_size:
        raise ValueError(
            f"got data.eval_resize={config.data.eval_resize}; allowed: at least "
            f"data.image_size, {config.data.image_size} (--config.data.eval_resize)"
        )
    _check_lanes(config)
    _check_hidden_labels(config)
    _check_momentum(config)
    _check_finetune(config)
    _check_solver(config)
    _check_projection(config)
    _check_representation(config)
    _check_start(config)
    pretraining = config.mode == "pretrain"
    contrastive = OBJECTIVES[config.loss.name].contrastive
    if config.probe.learning_rate and not (pretraining and contrastive):
        raise ValueError(
            f"got probe.learning_rate={config.probe.learning_rate} with "
            f"mode={config.mode} and loss.name={config.loss.name}; allowed: beside a "
            "contrastive loss (--config.probe.learning_rate=0)"
        )
    if config.loss.cross_entropy_weight and not (pretraining and contrastive):
        raise ValueError(
            f"got loss.cross_entropy_weight={config.loss.cross_entropy_weight} with "
            f"mode={config.mode} and loss.name={config.loss.name}; allowed: beside a "
            "contrastive loss (--config.loss.cross_entropy_weight=0)"
        )
    if config.loss.cross_entropy_weight and config.probe.learning_rate:
        raise ValueError(
            "got probe.learning_rate and loss.cross_entropy_weight; allowed: one of them, "
            "both are classifiers (--config.probe.learning_rate=0)"
        )
    trains_encoder = pretraining or config.mode == "finetune"
    modes = {"decay": trains_encoder, "use": not pretraining}
    for key, allowed in modes.items():
        if config.encoder_average[key] and not allowed:
            mode = "linear_eval" if pretraining else "pretrain"
            raise ValueError(
                f"got encoder_average.{key}={config.encoder_average[key]} with "
                f"mode={config.mode}; allowed: with mode={mode} "
                f"(--config.encoder_average.{key})"
            )
    for key in ("mixup_alpha", "cutmix_alpha"):
        # Mixtures of two images have no single label to contrast by.
        if config.augment[key] and (contrastive or not trains_encoder):
            raise ValueError(
                f"got augment.{key}={config.augment[key]} with mode={config.mode} and "
                f"loss.name={config.loss.name}; allowed: with the cross-entropy "
                f"baseline (--config.augment.{key}=0)"
            )


def _check_finetune(config: ConfigDict) -> None:
    """Refuses fine-tuning with another loss, and its keys in another mode."""
    if config.mode == "finetune" and config.loss.name != "cross_entropy":
        raise ValueError(
            f"got loss.name={config.loss.name} with mode=finetune; allowed: cross_entropy "
            "(--config.loss.name=cross_entropy)"
        )
    for key in ("stages", "layer_decay"):
        value, name = config.finetune[key], f"finetune.{key}"
        if config.mode != "finetune" and value != KEYS[name].default:
            raise ValueError(
                f"got {name}={value} with mode={config.mode}; allowed: with mode=finetune "
                f"(--config.{name}={KEYS[name].default})"
            )


def _check_lanes(config: ConfigDict) -> None:
    """Refuses lanes that do not fit the batch."""
    lanes = config.data.lanes
    if lanes and config.batch_size % lanes:
        raise ValueError(
            f"got data.lanes={lanes} with batch_size={config.batch_size}; allowed: a "
            "divisor of the batch size (--config.data.lanes, --config.batch_size)"
        )
    if lanes and config.data.classes_per_batch:
        raise ValueError(
            f"got data.lanes={lanes} and data.classes_per_batch="
            f"{config.data.classes_per_batch}; allowed: one of them, both say which "
            "images a step sees (--config.data.lanes=0)"
        )


def _check_hidden_labels(config: ConfigDict) -> None:
    """Refuses two ways to hide labels at once, and batches that have no place for it."""
    data = config.data
    hides = data.labelled_fraction < 1 or data.labelled_per_class
    if data.labelled_fraction < 1 and data.labelled_per_class:
        raise ValueError(
            f"got data.labelled_fraction={data.labelled_fraction} and "
            f"data.labelled_per_class={data.labelled_per_class}; allowed: one of them, "
            "both say which labels are kept (--config.data.labelled_fraction=1)"
        )
    contrastive = OBJECTIVES[config.loss.name].contrastive
    if hides and data.classes_per_batch and config.mode == "pretrain" and contrastive:
        raise ValueError(
            f"got data.classes_per_batch={data.classes_per_batch} with hidden labels; "
            "allowed: one of them, such batches hold no images without a label "
            "(--config.data.classes_per_batch=0, or --config.data.samples_per_class)"
        )


def _check_solver(config: ConfigDict) -> None:
    """Refuses what a solver that takes no steps cannot do."""
    if config.probe.solver != "lbfgs":
        return
    needed = {
        "mode": (config.mode, "linear_eval"),
        "total_steps": (config.total_steps, 0),
        "data.classes_per_batch": (config.data.classes_per_batch, 0),
        "data.fake": (config.data.fake, False),
    }
    for key, (value, allowed) in needed.items():
        if value != allowed:
            raise ValueError(
                f"got {key}={value!r} with probe.solver=lbfgs, which fits the features of "
                f"a split at once; allowed: {allowed!r} (--config.{key}, or "
                "--config.probe.solver=sgd)"
            )


def _check_projection(config: ConfigDict) -> None:
    """Refuses hidden layers of a projection head that there is not."""
    if not config.projection.output_dim and config.projection.hidden_dims:
        raise ValueError(
            f"got projection.output_dim=0 with projection.hidden_dims="
            f"{tuple(config.projection.hidden_dims)}; allowed: no hidden layers, as there "
            "is no head (--config.projection.hidden_dims='()')"
        )


def _check_representation(config: ConfigDict) -> None:
    """Refuses projections where there is no projection head, or none that fits."""
    if config.representation == "embedding":
        return
    why = ""
    if config.mode == "finetune":
        why = "mode=finetune, which trains the encoder"
    elif config.mode not in TRAINING_MODES:
        why = f"mode={config.mode}, where the classifier's run has chosen"
    elif not OBJECTIVES[config.loss.name].contrastive and config.mode == "pretrain":
        why = f"loss.name={config.loss.name}, which has no projection head"
    elif not config.projection.output_dim and config.mode == "pretrain":
        why = "projection.output_dim=0, which is no head"
    elif config.encoder_average.use or config.encoder_average.decay:
        why = "an average of the encoder, which the projection head has none of"
    if why:
        raise ValueError(
            f"got representation='projection' with {why}; allowed: 'embedding' "
            "(--config.representation)"
        )


def _check_start(config: ConfigDict) -> None:
    """Refuses two encoders at once, and weights where a run takes those of another."""
    source, pretrained = config.encoder.init_from, config.pretrained
    if not source:
        return
    if config.mode not in TRAINING_MODES:
        raise ValueError(
            f"got encoder.init_from={source!r} with mode={config.mode}, which takes the "
            f"model of a run; allowed: with mode={', '.join(TRAINING_MODES)} "
            "(--config.encoder.init_from='')"
        )
    if config.mode != "pretrain" and pretrained:
        raise ValueError(
            f"got encoder.init_from={source!r} and pretrained={pretrained!r}; allowed: one "
            "of them, both say which encoder it is (--config.pretrained='' or "
            "--config.encoder.init_from='')"
        )
    if config.representation == "projection":
        raise ValueError(
            f"got representation='projection' with encoder.init_from={source!r}, which is "
            "an encoder alone; allowed: 'embedding' (--config.representation)"
        )


def _check_momentum(config: ConfigDict) -> None:
    """Refuses what a momentum encoder cannot be used with, and a queue without one."""
    options, views = config.momentum_encoder, config.data.views
    if not options.decay:
        if options.queue_size:
            raise ValueError(
                f"got momentum_encoder.queue_size={options.queue_size} without a momentum "
                "encoder to make its keys; allowed: with one, "
                "--config.momentum_encoder.decay=0.999"
            )
        return
    needed = {
        "mode": (config.mode, ("pretrain",)),
        "loss.name": (
            config.loss.name,
            tuple(name for name, known in OBJECTIVES.items() if known.takes_keys),
        ),
        "loss.contrast_mode": (config.loss.contrast_mode, ("one",)),
        "loss.positives_cap": (config.loss.positives_cap, (-1,)),
    }
    for key, (value, allowed) in needed.items():
        if value not in allowed:
            raise ValueError(
                f"got {key}={value!r} with a momentum encoder; allowed: "
                f"{', '.join(map(repr, allowed))} (--config.{key}, or "
                "--config.momentum_encoder.decay=0)"
            )
    if views < 2:
        raise ValueError(
            f"got data.views={views} with a momentum encoder; allowed: at least 2, the "
            "first is the anchor and the others are keys (--config.data.views)"
        )
    keys = config.batch_size * (views - 1)
    if 0 < options.queue_size < keys:
        raise ValueError(
            f"got momentum_encoder.queue_size={options.queue_size}; allowed: 0, or at "
            f"least the {keys} keys of a step (--config.momentum_encoder.queue_size)"
        )
