"""SupCon ResNet-50 on ImageNet, the recipe of the paper's official code (2022).

    python main.py --config=configs/supcon_r50.py --config.data.dir=DIR
    python main.py --config=configs/supcon_r50.py --config.data.dir=DIR \\
        --config.batch_size=8 --config.total_steps=3        # on a laptop's processor

Hardware: 128 TPU cores in the official script; batch 8192 is one override.
Time: not measured here. Expected: 78.7 % linear top-1 (Table 3), not measured here.
Source: google-research/supcon, scripts/configs.sh and hparams.py, 2022.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.batch_size = 6144
    config.epochs = 350.0
    config.log_every = 100
    config.eval_every = 2085
    config.checkpoint_every = 2085
    config.next_config = "configs/linear_r50.py"
    set_imagenet(config)
    config.encoder.name = "resnet50"
    config.encoder.dtype = "auto"
    config.encoder.normalize_embedding = True
    config.projection.hidden_dims = ()
    config.projection.output_dim = 128
    config.loss.temperature = 0.1
    config.loss.scale = "temperature"
    config.optimizer.name = "lars"
    config.optimizer.learning_rate = 0.4
    config.optimizer.warmup_epochs = 12.0
    config.optimizer.weight_decay = 1e-3
    return config


def set_imagenet(config):
    """Data and augmentation that all ImageNet configs share."""
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.image_size = 224
    config.data.eval_resize = 256
    config.augment.crop_area = (0.08, 1.0)
    common.set_augmentation(config, "auto_augment")
