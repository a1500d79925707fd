"""Cross-entropy on CIFAR-10, the supervised baseline: small, or a full recipe.

    python main.py --config=configs/cross_entropy_cifar10.py --config.data.dir=DIR
    python main.py --config=configs/cross_entropy_cifar10.py:pytorch --config.data.dir=DIR

Default: ResNet-8, the images and views of configs/supcon_cifar10.py; 2 CPU cores,
minutes. Expected: docs/results.md.
`:gpu`: ResNet-18, 300 epochs of two views, the augmentation of supcon_cifar10.py:gpu; one
GPU, ten minutes expected, `python -m benchmarks.cifar10`. Measured: 93 epochs of larger
batches, docs/results.md.
`:pytorch`: ResNet-50, 500 epochs, the settings of the authors' PyTorch code, which gave
the paper's 95.0 % top-1 (Table 2); 8 GPUs there, hours. Not measured here.
`:official_2022`: ResNet-50, 1000 epochs, the paper's TensorFlow code, 32 TPU cores there;
its first release has the same script. Not measured here.

Source: github.com/HobbitLong/SupContrast, README and main_ce.py at 66a8fe5;
google-research/supcon, scripts/cross_entropy_cifar10_resnet50.sh.
Known differences: docs/recipes.md.
"""

from configs import common


def small(config):
    common.set_small_cifar(config)
    config.optimizer.name = "nesterov"
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 5e-4


def gpu(config):
    common.set_gpu_cifar(config)
    # Rate of the authors' PyTorch code, decay of the official one.
    config.optimizer.learning_rate = 0.8
    config.optimizer.weight_decay = 5e-4


def pytorch(config):
    common.set_pytorch_cifar(config, learning_rate=0.8)
    common.set_augmentation(config, "identity")
    config.epochs = 500.0
    config.data.views = 1


def official(config):
    common.set_official_cifar(config, batch_size=1024)
    config.epochs = 1000.0
    config.data.views = 1
    config.optimizer.name = "nesterov"
    config.optimizer.learning_rate = 0.1
    config.optimizer.warmup_epochs = 12.0
    config.optimizer.weight_decay = 5e-4


VARIANTS = {"": small, "gpu": gpu, "pytorch": pytorch, "official_2022": official}


def get_config(variant: str = ""):
    config = common.get_config()
    recipe = common.choose(variant, VARIANTS)
    common.set_cifar(config, classes=10)
    recipe(config)
    config.loss.name = "cross_entropy"
    return config
