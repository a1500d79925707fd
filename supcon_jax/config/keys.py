"""Every key of a config: its default, the values it may take, whether it may change."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from supcon_jax import optimizers
from supcon_jax.data.augment import TRANSFORMS
from supcon_jax.data.views import BLUR_BORDERS, JITTER_KINDS, POLICIES
from supcon_jax.models import CONVENTIONS, ENCODERS, STEMS
from supcon_jax.models.heads import CLASSIFIER_INITS
from supcon_jax.objectives import OBJECTIVES
from supcon_jax.profiling import parse_window
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
# How images are held out of training, where a folder has no split to evaluate on.
SPLIT_KEYS = ("data.validation_fraction", "data.split_seed")
# Which images a run sees, and how large; then, which of the training images.
IMAGE_KEYS = (
    "data.name",
    "data.image_key",
    "data.label_key",
    "data.eval_split",
    "data.validation_fraction",
    "data.split_seed",
    "data.classes",
    "data.image_size",
    "data.eval_resize",
)
TRAINING_IMAGE_KEYS = (
    "data.train_split",
    "data.fraction",
    "data.samples_per_class",
    "data.labelled_fraction",
    "data.labelled_per_class",
    "data.label_noise",
)

# What `pretrained` is for a new encoder, in place of a run's.
RANDOM = "random"
# What `eval/...` the result of a classifier is told by first.
EVAL_METRICS = ("top1", "mean_class_accuracy")

# What `data.name` says of photos in files: one class each by their folder, or several.
IMAGE_FOLDERS = ("folder", "multilabel")
# Values that leave a key to what a folder holds; `defaults.resolve` chooses (docs/your_own_data.md).
OPEN: dict[str, Any] = {
    "batch_size": 0,
    "epochs": 0.0,
    "data.image_size": 0,
    "data.eval_resize": 0,
    "data.eval_split": "auto",
}

# The others take a finished run.
TRAINING_MODES = ("pretrain", "linear_eval", "finetune")
# What begins so plays no part where the solution is fitted, probe.solver=lbfgs.
NOT_READ_BY_LBFGS = ("augment.", "optimizer.", "epochs", "data.views")
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


def _size_or_open() -> Rule:
    """A count, or what leaves it to a folder (`OPEN`)."""
    return Rule(
        lambda x: math.isfinite(x) and x >= 0, "at least 1, or 0 with data.name=folder"
    )


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
    "batch_size": Key(256, _size_or_open()),
    "microbatch_size": Key(0, _number(0)),
    "epochs": Key(
        100.0,
        Rule(
            lambda x: math.isfinite(x) and x >= 0,
            "above 0, or 0 with data.name=folder",
        ),
    ),
    "total_steps": Key(0, _number(0)),
    "log_every": Key(100, _number(1), free=True),
    "eval_every": Key(0, _number(0), free=True),
    "checkpoint_every": Key(0, _number(0), free=True),
    "profile_steps": Key(
        "",
        Rule(
            lambda value: parse_window(value) is None or bool(value),
            "FIRST:LAST such as 10:15, a count of steps such as 5, or none",
        ),
        free=True,
    ),
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
    "data.image_size": Key(32, _size_or_open()),
    "data.eval_resize": Key(32, _size_or_open()),
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
    "classifier.logit_adjustment": Key(0.0, _number(0)),
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
    "loss.label_similarity": Key("jaccard", _one_of(("any", "jaccard", "inner"))),
    "loss.hard_negative_beta": Key(0.0, _number(0, 1000)),
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
