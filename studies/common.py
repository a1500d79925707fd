"""What studies share: the stages at each scale, and how a baseline is made of them.

"small" is what two CPU cores bear: digits of scikit-learn, twenty training images a class,
other ones for each seed, 300 steps. With all 1,297 every method is near 99 % and nothing
can be told apart. "full" is the paper's encoder, length and batch on ImageNet.
"""

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
    """For each cell the better of two learning rates; the paper's own at full scale.

    studies/wins.py shows that the best ones of both methods lie in this range.
    """
    return {"optimizer.learning_rate": (0.3, 1.0)} if scale == "small" else {}


def seeds(scale):
    """Five where a run takes seconds, three where it takes days."""
    return 5 if scale == "small" else 3
