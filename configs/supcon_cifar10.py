"""SupCon on CIFAR-10: a small ResNet for minutes on a CPU, or a full recipe.

    python main.py --config=configs/supcon_cifar10.py --config.data.dir=DIR
    python main.py --config=configs/supcon_cifar10.py:pytorch --config.data.dir=DIR

Without data.dir, TFDS downloads CIFAR-10 into its own default directory.

Default: ResNet-8 with a strided stem, crops and flips, 8 epochs; 2 CPU cores, minutes,
docs/results.md.
`:gpu`: ResNet-18, 300 epochs, AutoAugment and cutout, bfloat16; one GPU, ten minutes
expected, `python -m benchmarks.cifar10`. Measured: 93 epochs of larger batches,
docs/results.md.
`:pytorch`: ResNet-50, 1000 epochs, the settings of the authors' PyTorch code, which gave
the paper's 96.0 % linear top-1 (Table 2); 8 GPUs there, hours. Not measured here.
`:official_2022`, `:official_2020` (the first release, 5870c18): ResNet-50, batch 4096,
the paper's TensorFlow code, 32 TPU cores there; "slightly" below the PyTorch code by its
own account. Not measured here.

Source: github.com/HobbitLong/SupContrast, README and main_supcon.py at 66a8fe5;
google-research/supcon, scripts/supcon_cifar10_resnet50.sh.
Known differences: docs/recipes.md. BatchNorm sees what one device has. In the TensorFlow
code that is both views of 128 images, so on one GPU `--config.microbatch_size=128` does
the same. In the PyTorch code each of 8 GPUs has one view of 256 images, which `:pytorch`
does not reproduce.
"""

from configs import common


def small(config):
    common.set_small_cifar(config)
    config.loss.temperature = 0.1
    # LARS and BatchNorm in the head leave the collapse level within an epoch;
    # momentum with a linear head needs ten times as long.
    config.projection.hidden_dims = (128,)
    config.projection.batch_norm = True
    config.optimizer.learning_rate = 2.0


def gpu(config):
    common.set_gpu_cifar(config)
    config.projection.hidden_dims = (512,)
    config.projection.bias = True
    config.loss.temperature = 0.1
    # Rate (for 1,024 images), decay and scale as in the authors' code.
    config.loss.scale = common.base_temperature_scale(0.1)
    config.optimizer.learning_rate = 0.5
    config.optimizer.weight_decay = 1e-4


def pytorch(config):
    common.set_pytorch_cifar(config, learning_rate=0.5)
    config.epochs = 1000.0
    config.projection.hidden_dims = (2048,)
    config.projection.bias = True
    config.loss.temperature = 0.1
    config.loss.scale = common.base_temperature_scale(0.1)


def official(config):
    common.set_official_cifar(config, batch_size=4096)
    config.epochs = 1000.0
    config.encoder.batch_norm_devices = 1
    config.projection.hidden_dims = (2048,)
    config.loss.temperature = 0.1
    config.loss.scale = "temperature"
    config.optimizer.learning_rate = 0.5
    config.optimizer.weight_decay = 1e-4


def official_2020(config):
    official(config)
    config.loss.scale = common.base_temperature_scale(0.1)
    config.optimizer.learning_rate = 0.125


VARIANTS = {
    "": small,
    "gpu": gpu,
    "pytorch": pytorch,
    "official_2022": official,
    "official_2020": official_2020,
}


def get_config(variant: str = ""):
    config = common.get_config()
    recipe = common.choose(variant, VARIANTS)
    common.set_cifar(config, classes=10)
    recipe(config)
    config.next_config = common.with_variant("configs/linear_cifar10.py", variant)
    return config
