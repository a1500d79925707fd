"""SupCon on CIFAR-10: a small ResNet for minutes on a processor, or the full recipe.

    python main.py --config=configs/supcon_cifar10.py --config.data.dir=DIR
    python main.py --config=configs/supcon_cifar10.py:pytorch --config.data.dir=DIR

Without data.dir, TFDS downloads CIFAR-10 into its own default directory.

Default: ResNet-8 with a strided stem, crops and flips, 8 epochs; 2 CPU cores, minutes,
docs/results.md.
`:pytorch`: ResNet-50, 1000 epochs, the settings of the authors' PyTorch code; an
accelerator, hours. Expected: 96.0 % linear top-1 (Table 2), not measured here.

Source: github.com/HobbitLong/SupContrast, README and main_supcon.py at 66a8fe5.
Known differences of `:pytorch`: BatchNorm parameters are not decayed, the warm-up
starts from 0, the cosine ends at 0 and moves every step, BatchNorm is global.
"""

from configs import common


def get_config(variant: str = ""):
    config = common.get_config()
    full = common.choose(variant, {"": False, "pytorch": True})
    config.batch_size = 1024 if full else 256
    config.epochs = 1000.0 if full else 8.0
    config.log_every = 50
    config.eval_every = 980 if full else 390
    config.checkpoint_every = 980 if full else 390
    config.next_config = "configs/linear_cifar10.py" + (":pytorch" if full else "")
    set_cifar10(config)
    set_encoder(config, full)
    config.loss.temperature = 0.1
    if full:
        config.projection.hidden_dims = (2048,)
        # The authors' code multiplies the loss by temperature / 0.07.
        config.loss.scale = repr(0.1 / 0.07)
        config.optimizer.name = "momentum"
        config.optimizer.learning_rate = 0.5
        config.optimizer.learning_rate_batch = 1024
        config.optimizer.warmup_epochs = 10.0
    else:
        # LARS and BatchNorm in the head leave the collapse level within an epoch;
        # momentum with a linear head needs ten times as long.
        config.projection.hidden_dims = (128,)
        config.projection.batch_norm = True
        config.optimizer.learning_rate = 2.0
        config.optimizer.warmup_epochs = 0.5
        # Crops and flips alone: what docs/results.md was measured with.
        common.set_augmentation(config, "identity")
    config.knn.bank = 50_000 if full else 5_000
    return config


def set_cifar10(config):
    """Data and augmentation that all CIFAR-10 configs share."""
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.eval_resize = 32
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2023, 0.1994, 0.2010)
    config.augment.crop_area = (0.2, 1.0)
    common.set_augmentation(config, "sim_augment", strength=0.5, blur=False)


def set_encoder(config, full: bool):
    """The authors' ResNet-50, or what a processor trains in minutes."""
    config.encoder.name = "resnet50" if full else "resnet8"
    # At 32 pixels the strided stem leaves 8x8 maps: a sixteenth of the work.
    config.encoder.stem = "cifar" if full else "imagenet"
