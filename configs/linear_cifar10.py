"""Linear evaluation of configs/supcon_cifar10.py and configs/simclr_cifar10.py.

    python main.py --config=configs/linear_cifar10.py --config.data.dir=DIR
    python main.py --config=configs/linear_cifar10.py:sgd --config.data.dir=DIR
    python main.py --config=configs/linear_cifar10.py:pytorch --config.data.dir=DIR
    python main.py --config=configs/linear_cifar10.py:simclr --config.data.dir=DIR

A variant takes the encoder of the pretraining config's variant of that name.
Default, `:simclr`: the solution on features of plain images of the small encoder, nothing to
tune; `:sgd`, `:simclr_sgd`: ten epochs of SGD; 2 CPU cores, minutes, docs/results.md.
`:gpu`: the average of supcon_cifar10.py:gpu's encoder; the solution on features of plain
images, half a minute on a GPU with starting and compiling.
`:pytorch`, `:simclr_pytorch`: ResNet-50, 100 epochs, the settings of the authors' PyTorch
code; an accelerator. Expected: 96.0 %, SimCLR 93.6 % top-1 (Table 2), not measured here.
The official ones: ResNet-50, the paper's TensorFlow code, 2022 and 2020 alike.
Source: github.com/HobbitLong/SupContrast, README and main_linear.py at 66a8fe5;
google-research/supcon, scripts/supcon_cifar10_resnet50.sh, simclr_cifar10_resnet50.sh.
Known differences: docs/recipes.md.
"""

from configs import common


def pytorch(config):
    common.set_augmentation(config, "identity")
    config.batch_size = 512
    config.epochs = 100.0
    config.log_every = 50
    config.eval_every = config.checkpoint_every = 980
    config.encoder.name = "resnet50"
    config.encoder.stem = "cifar"
    config.optimizer.name = "momentum"
    config.optimizer.learning_rate = 5.0
    config.optimizer.learning_rate_batch = 512
    config.optimizer.schedule = "piecewise"
    config.optimizer.boundaries_epochs = (60.0, 75.0, 90.0)
    config.optimizer.decay_rate = 0.2
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.weight_decay = 0.0


def simclr_pytorch(config):
    pytorch(config)
    config.optimizer.learning_rate = 1.0


def small(config):
    pytorch(config)
    config.epochs = 10.0
    config.encoder.name = "resnet8"
    config.encoder.stem = "imagenet"
    config.optimizer.boundaries_epochs = (6.0, 7.5, 9.0)


def simclr_small(config):
    small(config)
    config.optimizer.learning_rate = 1.0


def solved(config):
    """Better than ten epochs of SGD (docs/evaluation.md), with nothing to choose."""
    small(config)
    config.probe.solver = "lbfgs"


def gpu(config):
    common.set_augmentation(config, "identity")
    config.batch_size = 1024
    config.encoder.name = "resnet18"
    config.encoder.stem = "cifar"
    config.encoder.dtype = "auto"
    config.encoder_average.use = True
    config.probe.solver = "lbfgs"


def official(config):
    common.set_official_cifar(config, batch_size=4096)
    config.epochs = 100.0
    config.optimizer.learning_rate = 2.5
    config.optimizer.schedule = "piecewise"
    config.optimizer.boundaries_epochs = (60.0, 75.0, 90.0)
    config.optimizer.decay_rate = 0.2
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.weight_decay = 0.0


def simclr_official(config):
    common.set_official_cifar(config, batch_size=1024)
    config.epochs = 90.0
    config.classifier.init = "zeros"
    config.optimizer.learning_rate = 0.25
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.weight_decay = 0.0


# variant: pretraining run, recipe
VARIANTS = {
    "": ("supcon_cifar10", solved),
    "sgd": ("supcon_cifar10", small),
    "gpu": ("supcon_cifar10_gpu", gpu),
    "pytorch": ("supcon_cifar10_pytorch", pytorch),
    "official_2022": ("supcon_cifar10_official_2022", official),
    "official_2020": ("supcon_cifar10_official_2020", official),
    "simclr": ("simclr_cifar10", solved),
    "simclr_sgd": ("simclr_cifar10", simclr_small),
    "simclr_pytorch": ("simclr_cifar10_pytorch", simclr_pytorch),
    "simclr_official_2022": ("simclr_cifar10_official_2022", simclr_official),
    "simclr_official_2020": ("simclr_cifar10_official_2020", simclr_official),
}


def get_config(variant: str = ""):
    config = common.get_config()
    pretrained, recipe = common.choose(variant, VARIANTS)
    common.set_linear(config, pretrained)
    common.set_cifar(config, classes=10)
    recipe(config)
    config.next_config = common.with_variant("configs/evaluate_cifar10.py", variant)
    return config
