"""SupCon on scikit-learn's handwritten digits: real images, nothing to download.

    python main.py --config=configs/digits.py

Hardware: 2 CPU cores. Time: about a minute. Expected: see docs/results.md.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.batch_size = 128
    config.epochs = 40
    config.log_every = 25
    config.eval_every = 100
    config.checkpoint_every = 100
    config.next_config = "configs/linear_digits.py"
    set_digits(config)
    config.projection.hidden_dims = ()
    config.projection.output_dim = 64
    config.optimizer.name = "momentum"
    config.optimizer.learning_rate = 0.1
    config.optimizer.warmup_epochs = 5.0
    return config


def set_digits(config):
    """Data, augmentation and encoder that all digits configs share."""
    config.data.name = "digits"
    config.data.image_size = 8
    config.data.eval_resize = 8
    # Digits have no colour, a mirrored digit is another sign, and a small part is none.
    config.augment.crop_area = (0.75, 1.0)
    config.augment.flip = False
    common.set_augmentation(config, "identity")
    config.encoder.name = "resnet8"
    config.encoder.stem = "cifar"
