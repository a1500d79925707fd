"""Fine-tuning of the small CIFAR-10 encoder on a hundred labelled images of each class.

    python main.py --config=configs/supcon_cifar10.py --config.data.labelled_per_class=100
        --workdir=runs/supcon_cifar10_100 --config.data.dir=DIR
    python main.py --config=configs/finetune_cifar10.py --config.data.dir=DIR
    python main.py --config=configs/finetune_cifar10.py:scratch --config.data.dir=DIR

The encoder has seen all images, and the labels of the same thousand. `:scratch` begins with
a random one. Hardware: 2 CPU cores. Time: a minute. Expected: docs/transfer.md.
"""

from configs import common


def get_config(variant: str = ""):
    config = common.get_config()
    config.mode = "finetune"
    config.pretrained = common.choose(
        variant, {"": "runs/supcon_cifar10_100", "scratch": "random"}
    )
    common.set_cifar(config, classes=10)
    common.set_small_cifar(config)
    config.batch_size = 100
    config.epochs = 60.0
    config.eval_every = config.checkpoint_every = 0
    config.next_config = "configs/evaluate_cifar10.py"
    config.data.samples_per_class = 100
    config.data.views = 1
    config.loss.name = "cross_entropy"
    config.optimizer.name = "nesterov"
    config.optimizer.learning_rate = 0.1
    config.optimizer.learning_rate_batch = 100
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.weight_decay = 5e-4
    config.knn.bank = 0
    return config
