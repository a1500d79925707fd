"""Linear evaluation of configs/digits.py (or, with `:random`, of an untrained encoder).

    python main.py --config=configs/linear_digits.py
    python main.py --config=configs/linear_digits.py:random

Hardware: 2 CPU cores. Time: about 15 seconds. Expected: see docs/results.md.
"""

from configs import common, digits


def get_config(variant: str = ""):
    config = common.get_config()
    config.mode = "linear_eval"
    config.pretrained = common.choose(variant, {"": "runs/digits", "random": "random"})
    config.batch_size = 256
    config.epochs = 20.0
    config.log_every = 25
    config.next_config = "configs/evaluate_digits.py"
    digits.set_digits(config)
    config.data.views = 1
    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 0.05
    config.optimizer.schedule = "staircase"
    config.optimizer.decay_epochs = 0.5
    config.optimizer.decay_rate = 0.9
    config.optimizer.warmup_epochs = 1
    config.optimizer.weight_decay = 1e-6
    return config
