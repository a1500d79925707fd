"""Evaluation of a classifier on ImageNet: accuracy, calibration, confusion.

    python main.py --config=configs/evaluate_r50.py --config.data.dir=DIR

A variant evaluates the run of configs/linear_r50.py's variant of that name; another
run with the same encoder by --config.pretrained. Only the evaluation split is read.
Hardware: whatever the encoder needs. Time: minutes. Expected: the linear config's.
"""

from configs import common, linear_r50


def get_config(variant: str = ""):
    config = linear_r50.get_config(variant)
    common.set_evaluate(config, "linear_r50", variant)
    return config
