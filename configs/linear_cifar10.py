"""Linear evaluation of configs/supcon_cifar10.py.

    python main.py --config=configs/linear_cifar10.py --config.data.dir=DIR
    python main.py --config=configs/linear_cifar10.py:pytorch --config.data.dir=DIR

Default: the small encoder, 10 epochs; 2 CPU cores, minutes, docs/results.md.
`:pytorch`: ResNet-50, 100 epochs, the settings of the authors' PyTorch code; an
accelerator. Expected: 96.0 % top-1 (Table 2), not measured here.
Source: github.com/HobbitLong/SupContrast, main_linear.py at 66a8fe5.
"""

from configs import common, supcon_cifar10


def get_config(variant: str = ""):
    config = common.get_config()
    full = common.choose(variant, {"": False, "pytorch": True})
    config.mode = "linear_eval"
    config.pretrained = "runs/supcon_cifar10" + ("_pytorch" if full else "")
    config.batch_size = 512
    config.epochs = 100.0 if full else 10.0
    config.log_every = 50
    config.eval_every = 980
    config.checkpoint_every = 980
    supcon_cifar10.set_cifar10(config)
    config.data.views = 1
    common.set_augmentation(config, "identity")
    supcon_cifar10.set_encoder(config, full)
    config.optimizer.name = "momentum"
    config.optimizer.learning_rate = 5.0
    config.optimizer.learning_rate_batch = 512
    config.optimizer.schedule = "piecewise"
    config.optimizer.boundaries_epochs = (60.0, 75.0, 90.0) if full else (6.0, 7.5, 9.0)
    config.optimizer.decay_rate = 0.2
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.weight_decay = 0.0
    return config
