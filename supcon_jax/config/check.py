"""Reading and checking a config: unknown keys, values, and what does not go together."""

from __future__ import annotations

import difflib
from typing import Any

from ml_collections import ConfigDict

from supcon_jax.config.keys import IMAGE_FOLDERS, KEYS, OPEN, TRAINING_MODES
from supcon_jax.objectives import OBJECTIVES


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
    _check_open(config)
    if 0 < config.data.eval_resize < config.data.image_size:
        raise ValueError(
            f"got data.eval_resize={config.data.eval_resize}; allowed: at least "
            f"data.image_size, {config.data.image_size} (--config.data.eval_resize)"
        )
    _check_jitter(config)
    _check_lanes(config)
    _check_hidden_labels(config)
    _check_momentum(config)
    _check_multilabel(config)
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
    _check_logit_adjustment(config)
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


def open_keys(config: ConfigDict) -> list[str]:
    """The keys that a config leaves to what a folder holds."""
    flat = flatten(config.to_dict())
    return [key for key, value in OPEN.items() if flat[key] == value]


def trains_classifier(config: ConfigDict) -> bool:
    """Whether a run trains a classifier, alone or beside a contrastive loss."""
    if config.mode != "pretrain":
        return config.mode in TRAINING_MODES
    baseline = not OBJECTIVES[config.loss.name].contrastive
    beside = config.loss.cross_entropy_weight or config.probe.learning_rate
    return baseline or bool(beside)


def check_chosen(config: ConfigDict) -> None:
    """Refuses a config that leaves keys to a folder where none is looked at.

    Raises:
      ValueError: naming the first such key.
    """
    for key in open_keys(config):
        raise ValueError(
            f"got {key}={OPEN[key]!r}, which a run chooses by what its folder holds; give "
            f"a value here (--config.{key})"
        )


def _check_open(config: ConfigDict) -> None:
    """Refuses keys that are left to a folder where the data are none."""
    if config.data.name in IMAGE_FOLDERS:
        return
    for key in open_keys(config):
        raise ValueError(
            f"got {key}={OPEN[key]!r} with data.name={config.data.name!r}; allowed: with "
            f"{' and '.join(map(repr, IMAGE_FOLDERS))}, whose images then decide; else "
            f"give a value (--config.{key})"
        )


def _check_logit_adjustment(config: ConfigDict) -> None:
    """Refuses the adjustment of a classifier where none is trained."""
    if config.classifier.logit_adjustment and not trains_classifier(config):
        raise ValueError(
            f"got classifier.logit_adjustment={config.classifier.logit_adjustment} with "
            f"mode={config.mode} and loss.name={config.loss.name}; allowed: where a "
            "classifier is trained (--config.classifier.logit_adjustment=0)"
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


def _check_jitter(config: ConfigDict) -> None:
    keys = ("jitter_strength", "jitter_probability")
    for key, other in (keys, keys[::-1]):
        if config.augment[key] and not config.augment[other]:
            raise ValueError(
                f"got augment.{key}={config.augment[key]} with augment.{other}=0, which "
                f"jitters nothing; allowed: both above 0, or both 0 "
                f"(--config.augment.{other})"
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
        "profile_steps": (config.profile_steps, ""),
    }
    for key, (value, allowed) in needed.items():
        if value != allowed:
            raise ValueError(
                f"got {key}={value!r} with probe.solver=lbfgs, which fits the features of "
                f"a split at once; allowed: {allowed!r} (--config.{key}, or "
                "--config.probe.solver=sgd)"
            )


def _check_multilabel(config: ConfigDict) -> None:
    """Refuses what needs one class an image where the data have several."""
    if config.data.name != "multilabel":
        return
    contrastive = tuple(n for n, known in OBJECTIVES.items() if known.contrastive)
    needed: dict[str, tuple[Any, ...]] = {
        "mode": ("pretrain", "linear_eval"),
        "loss.name": contrastive,
        "probe.solver": ("sgd",),
        "loss.positives_cap": (-1,),
        "loss.cross_entropy_weight": (0.0,),
        "probe.learning_rate": (0.0,),
        "momentum_encoder.decay": (0.0,),
        "data.classes": ((),),
        "data.samples_per_class": (0,),
        "data.labelled_per_class": (0,),
        "classifier.logit_adjustment": (0.0,),
        "data.label_noise": (0.0,),
        "data.classes_per_batch": (0,),
    }
    if config.mode == "linear_eval":
        needed["loss.label_smoothing"] = (0.0,)
    flat = flatten(config.to_dict())
    for key, allowed in needed.items():
        if flat[key] not in allowed:
            raise ValueError(
                f"got {key}={flat[key]!r} with data.name=multilabel, whose images have "
                f"several classes; allowed: {', '.join(map(repr, allowed))} "
                f"(--config.{key})"
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
