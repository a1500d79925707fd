"""Robustness of a classifier on CIFAR-10-C: 15 corruptions at five severities.

    python main.py --config=configs/robustness_cifar10.py --config.data.dir=DIR
    python main.py --config=configs/robustness_cifar10.py --config.data.dir=DIR
        --config.robustness.data=DIR/CIFAR-10-C             # the released .npy files

DIR has the clean images, and by default TFDS's cifar10_corrupted, which holds the released
ones. A variant takes the run of configs/linear_cifar10.py's variant of that name; another
run with the same encoder by --config.pretrained.
Hardware: whatever the encoder needs. Time: 76 times that of evaluate_cifar10.py.
Expected: docs/evaluation.md for the small encoder.
"""

from configs import common, linear_cifar10


def get_config(variant: str = ""):
    config = linear_cifar10.get_config(variant)
    common.set_robustness(config, "linear_cifar10", variant, data="cifar10_corrupted")
    return config
