"""SupCon on CIFAR-100: configs/supcon_cifar10.py on a hundred classes.

    python main.py --config=configs/supcon_cifar100.py --config.data.dir=DIR
    python main.py --config=configs/supcon_cifar100.py:pytorch --config.data.dir=DIR

Default: ResNet-8, 8 epochs; 2 CPU cores, minutes, not measured yet.
`:pytorch`: ResNet-50, 1000 epochs, the settings of the authors' PyTorch code, which has
none of its own for CIFAR-100; 8 GPUs there, hours. Expected: 76.5 % linear top-1
(Table 2), not measured here.
Source: github.com/HobbitLong/SupContrast, README and main_supcon.py at 66a8fe5.
Known differences: docs/recipes.md.
"""

from configs import common, supcon_cifar10

VARIANTS = {"": supcon_cifar10.small, "pytorch": supcon_cifar10.pytorch}


def get_config(variant: str = ""):
    config = common.get_config()
    recipe = common.choose(variant, VARIANTS)
    common.set_cifar(config, classes=100)
    recipe(config)
    config.next_config = common.with_variant("configs/linear_cifar100.py", variant)
    return config
