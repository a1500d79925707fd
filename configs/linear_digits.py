"""Linear evaluation of configs/digits.py (or, with `:random`, of an untrained encoder).

    python main.py --config=configs/linear_digits.py
    python main.py --config=configs/linear_digits.py:sgd
    python main.py --config=configs/linear_digits.py:random

Default, `:random`: the solution on features of plain images, nothing to tune.
`:sgd`: a classifier trained on augmented images.
Hardware: 2 CPU cores. Time: seconds. Expected: see docs/results.md.
"""

from configs import common, digits

# variant: pretraining run, solver
VARIANTS = {
    "": ("runs/digits", "lbfgs"),
    "sgd": ("runs/digits", "sgd"),
    "random": ("random", "lbfgs"),
}


def get_config(variant: str = ""):
    config = common.get_config()
    config.mode = "linear_eval"
    config.pretrained, config.probe.solver = common.choose(variant, VARIANTS)
    config.batch_size = 256
    config.next_config = "configs/evaluate_digits.py"
    digits.set_digits(config)
    config.data.views = 1
    if config.probe.solver == "sgd":
        sgd(config)
    return config


def sgd(config):
    config.epochs = 20.0
    config.log_every = 25
    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 0.05
    config.optimizer.schedule = "staircase"
    config.optimizer.decay_epochs = 0.5
    config.optimizer.decay_rate = 0.9
    config.optimizer.warmup_epochs = 1
    config.optimizer.weight_decay = 1e-6
