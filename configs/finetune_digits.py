"""Fine-tuning of an encoder on ten labelled digits of each class.

    python main.py --config=configs/digits.py --config.data.labelled_per_class=10
        --workdir=runs/digits_10
    python main.py --config=configs/finetune_digits.py
    python main.py --config=configs/finetune_digits.py:scratch

The encoder has seen all images, and the labels of the same hundred. `:scratch` begins with
a random one. Hardware: 2 CPU cores. Time: seconds. Expected: docs/transfer.md.
"""

from configs import common, digits


def get_config(variant: str = ""):
    config = common.get_config()
    config.mode = "finetune"
    config.pretrained = common.choose(
        variant, {"": "runs/digits_10", "scratch": "random"}
    )
    config.batch_size = 50
    config.epochs = 100.0
    config.log_every = 50
    config.next_config = "configs/evaluate_digits.py"
    digits.set_digits(config)
    config.data.samples_per_class = 10
    config.data.views = 1
    config.loss.name = "cross_entropy"
    config.optimizer.name = "nesterov"
    config.optimizer.learning_rate = 0.1
    config.optimizer.learning_rate_batch = 50
    config.optimizer.warmup_epochs = 5.0
    config.knn.bank = 0
    return config
