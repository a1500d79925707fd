"""Robustness of a classifier on the digits: 15 corruptions at five severities.

    python -m supcon_jax.tools.corrupt --config=configs/digits.py --out=runs/digits_c
    python main.py --config=configs/robustness_digits.py

The first command makes the corrupted test images; another run by --config.pretrained.
Hardware: 2 CPU cores. Time: half a minute each. Expected: docs/evaluation.md.
"""

from configs import evaluate_digits


def get_config():
    config = evaluate_digits.get_config()
    config.mode = "robustness"
    config.robustness.data = "runs/digits_c"
    config.next_config = ""
    return config
