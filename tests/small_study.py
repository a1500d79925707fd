"""A study that tests change: temperatures of the digits."""

from supcon_jax.study.definition import create_study

STAGES = {
    "pretrain": "configs/digits.py",
    "probe": "configs/linear_digits.py",
    "evaluate": "configs/evaluate_digits.py",
}
FIELDS = {
    "title": "Temperatures",
    "stages": STAGES,
    "metrics": ("evaluate:eval/top1", "evaluate:eval/ece"),
    "grid": {"loss.temperature": (0.1, 0.5)},
    "seeds": 3,
    "baseline": {"loss.temperature": 0.1},
}


def make(**changes):
    return create_study(FIELDS | changes)
