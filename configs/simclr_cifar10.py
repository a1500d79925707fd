"""SimCLR on CIFAR-10, the self-supervised baseline: small, or a full recipe.

    python main.py --config=configs/simclr_cifar10.py --config.data.dir=DIR
    python main.py --config=configs/simclr_cifar10.py:pytorch --config.data.dir=DIR

Default: ResNet-8 as in configs/supcon_cifar10.py; 2 CPU cores, minutes, not measured
yet.
`:pytorch`: ResNet-50, 1000 epochs, the settings of the authors' PyTorch code, which gave
the paper's 93.6 % linear top-1 (Table 2); 8 GPUs there, hours. Not measured here.
`:official_2022`, `:official_2020` (the first release, 5870c18): ResNet-50, 400 epochs,
the paper's TensorFlow code, 32 TPU cores there. Not measured here.

Source: github.com/HobbitLong/SupContrast, README and main_supcon.py at 66a8fe5;
google-research/supcon, scripts/simclr_cifar10_resnet50.sh.
Known differences: docs/recipes.md.
"""

from configs import common, supcon_cifar10


def small(config):
    supcon_cifar10.small(config)
    config.loss.name = "simclr"
    config.loss.temperature = 0.5


def pytorch(config):
    supcon_cifar10.pytorch(config)
    config.loss.name = "simclr"
    config.loss.temperature = 0.5
    config.loss.scale = common.base_temperature_scale(0.5)


def official(config):
    common.set_official_cifar(config, batch_size=1024)
    config.epochs = 400.0
    config.projection.hidden_dims = (2048, 2048)
    config.projection.batch_norm = True
    config.loss.name = "simclr"
    config.loss.temperature = 0.5
    config.optimizer.learning_rate = 0.5
    config.optimizer.weight_decay = 1e-4


def official_2020(config):
    official(config)
    config.projection.hidden_dims = (2048,)
    config.loss.temperature = 0.2
    config.loss.scale = common.base_temperature_scale(0.2)
    config.optimizer.learning_rate = 0.125
    config.optimizer.weight_decay = 5e-4


VARIANTS = {
    "": small,
    "pytorch": pytorch,
    "official_2022": official,
    "official_2020": official_2020,
}


def get_config(variant: str = ""):
    config = common.get_config()
    recipe = common.choose(variant, VARIANTS)
    common.set_cifar(config, classes=10)
    recipe(config)
    next_variant = common.run_name("simclr", variant)
    config.next_config = f"configs/linear_cifar10.py:{next_variant}"
    return config
