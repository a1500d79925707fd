"""What studies share: the stages at each scale, and how a baseline is made of them.

"small" is what two CPU cores bear: digits of scikit-learn, twenty training images a class,
other ones for each seed, 300 steps. With all 1,297 every method is near 99 % and nothing
can be told apart. "full" is the paper's encoder, length and batch on ImageNet.
"""

# Of a classifier that is compared with another. One temperature takes out what label
# smoothing makes unsure.
METRICS = (
    "evaluate:eval/top1",
    "evaluate:eval/ece",
    "evaluate:eval/scaled_ece",
    "evaluate:eval/loss",
)
_STAGES = {
    "small": {
        "pretrain": "configs/digits.py",
        "probe": "configs/linear_digits.py",
        "evaluate": "configs/evaluate_digits.py",
    },
    "full": {
        "pretrain": "configs/supcon_r50.py",
        "probe": "configs/linear_r50.py",
        "evaluate": "configs/evaluate_r50.py",
    },
}
# It trains its classifier on the way.
_CROSS_ENTROPY = {
    "small": {"pretrain": "configs/cross_entropy_digits.py", "probe": None},
    "full": {"pretrain": "configs/cross_entropy_r50.py", "probe": None},
}
# Peak learning rates at 256 images, ours; studies/wins.py shows that the best of all methods
# are among them.
_RATES = {"small": (0.3, 1.0), "full": (0.2, 0.4)}
_BASELINE_RATES = {"small": (0.3, 1.0), "full": (0.05, 0.1)}
_FEW_DIGITS = {
    "batch_size": 64,
    "total_steps": 300,
    "eval_every": 0,
    "checkpoint_every": 0,
    "probe:batch_size": 50,
    "all:data.samples_per_class": 20,
    "evaluate:data.samples_per_class": 0,
    "all:data.split_seed": "{seed}",
}


def stages(scale, *, evaluate=True):
    """Pretraining, probe and, where cross-entropy or calibration is compared, evaluation."""
    found = dict(_STAGES[scale])
    if not evaluate:
        del found["evaluate"]
    return found


def cross_entropy(scale, **changes):
    """The changes that make the cross-entropy baseline of a cell."""
    return _CROSS_ENTROPY[scale] | changes


def shared(scale, *, evaluate=True, **others):
    """The changes of all cells at a scale."""
    found = dict(_FEW_DIGITS if scale == "small" else {})
    if not evaluate:
        found.pop("evaluate:data.samples_per_class", None)
    return found | others


def tune_rate(scale):
    """For each cell the better of two learning rates; the paper's own at full scale."""
    return {"optimizer.learning_rate": _RATES["small"]} if scale == "small" else {}


def tuned_methods(scale):
    """Methods with six settings each: two learning rates, three values of what is their own.

    Both are the losses beside each other, whose classifier is trained on the way.
    """

    def tune(key, *values, rates=_RATES[scale]):
        return {"tune": {"optimizer.learning_rate": rates, key: values}}

    smoothing = tune(
        "loss.label_smoothing", 0.0, 0.1, 0.2, rates=_BASELINE_RATES[scale]
    )
    unit_length = {"all:encoder.normalize_embedding": True}
    return {
        "cross-entropy": cross_entropy(scale, **smoothing),
        "cross-entropy, unit length": cross_entropy(scale, **smoothing, **unit_length),
        "SupCon": tune("loss.temperature", 0.05, 0.1, 0.3),
        "SupCon and cross-entropy": {
            "probe": None,
            **tune("loss.cross_entropy_weight", 0.1, 0.3, 1.0),
        },
    }


def seeds(scale):
    """Five where a run takes seconds, three where it takes days."""
    return 5 if scale == "small" else 3
