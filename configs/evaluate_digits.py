"""Evaluation of a classifier on the digits: accuracy, calibration, confusion.

    python main.py --config=configs/evaluate_digits.py
    python main.py --config=configs/evaluate_digits.py --workdir=runs/evaluate_baseline
        --config.pretrained=runs/cross_entropy_digits

Hardware: 2 CPU cores. Time: seconds. Expected: see docs/results.md.
"""

from configs import common, digits


def get_config():
    config = common.get_config()
    config.mode = "evaluate"
    config.pretrained = "runs/linear_digits"
    config.batch_size = 256
    config.next_config = "configs/cross_entropy_digits.py"
    digits.set_digits(config)
    return config
