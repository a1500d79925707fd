"""Robustness of a classifier on ImageNet-C: mCE, relative mCE and ECE by severity.

    python main.py --config=configs/robustness_r50.py --config.data.dir=DIR
        --config.robustness.data=DIR/imagenet-c

The four archives (noise, blur, weather, digital) of zenodo.org/record/2235448, unpacked.
A variant takes the run of configs/linear_r50.py's variant of that name; another run with
the same encoder by --config.pretrained.
Hardware: whatever the encoder needs. Time: 76 times that of evaluate_r50.py.
Expected: mCE 67.2 %, relative mCE 94.6 % (Figure 3), not measured here.
"""

from configs import common, linear_r50


def get_config(variant: str = ""):
    config = linear_r50.get_config(variant)
    common.set_robustness(config, "linear_r50", variant, data="")
    config.robustness.reference = "alexnet"
    return config
