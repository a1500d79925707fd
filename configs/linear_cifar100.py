"""Linear evaluation of configs/supcon_cifar100.py and configs/simclr_cifar100.py.

    python main.py --config=configs/linear_cifar100.py --config.data.dir=DIR
    python main.py --config=configs/linear_cifar100.py:pytorch --config.data.dir=DIR
    python main.py --config=configs/linear_cifar100.py:simclr --config.data.dir=DIR

A variant takes the encoder of the pretraining config's variant of that name.
Default, `:simclr`: the small encoder, solved; `:sgd`, `:simclr_sgd`: ten epochs of SGD; 2 CPU
cores, minutes, not measured yet.
`:pytorch`, `:simclr_pytorch`: ResNet-50, 100 epochs, the settings of the authors' PyTorch
code; an accelerator. Expected: 76.5 %, SimCLR 70.7 % top-1 (Table 2), not measured here.
Source: github.com/HobbitLong/SupContrast, README and main_linear.py at 66a8fe5.
Known differences: docs/recipes.md.
"""

from configs import common, linear_cifar10

# variant: pretraining run, recipe
VARIANTS = {
    "": ("supcon_cifar100", linear_cifar10.solved),
    "sgd": ("supcon_cifar100", linear_cifar10.small),
    "pytorch": ("supcon_cifar100_pytorch", linear_cifar10.pytorch),
    "simclr": ("simclr_cifar100", linear_cifar10.solved),
    "simclr_sgd": ("simclr_cifar100", linear_cifar10.simclr_small),
    "simclr_pytorch": ("simclr_cifar100_pytorch", linear_cifar10.simclr_pytorch),
}


def get_config(variant: str = ""):
    config = common.get_config()
    pretrained, recipe = common.choose(variant, VARIANTS)
    common.set_linear(config, pretrained)
    common.set_cifar(config, classes=100)
    recipe(config)
    return config
