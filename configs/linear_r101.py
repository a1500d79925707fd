"""Linear evaluation of configs/supcon_r101.py on ImageNet.

    python main.py --config=configs/linear_r101.py --config.data.dir=DIR

A variant takes the encoder of the pretraining config's variant of that name. `:paper`
has the augmentation of Table 3 and the 350 epochs of Table 8.
Hardware: 128 TPU cores in the official script.
Time: not measured here. Expected: 80.2 % top-1 (Table 3, where the augmentation is that
of `:paper`), not measured here.
Source: google-research/supcon, scripts/supcon_imagenet_resnet101.sh and configs.sh.
Known difference: BatchNorm stays in inference mode, see linear_r50.py.
"""

from configs import common

# variant: augmentation, epochs
VARIANTS = {
    "official_2022": ("auto_augment", 90.0),
    "official_2020": ("auto_augment", 90.0),
    "paper": ("stacked_rand_augment", 350.0),
}


def get_config(variant: str = ""):
    config = common.get_config()
    augmentation, epochs = common.choose(variant or "official_2022", VARIANTS)
    common.set_linear(config, common.run_name("supcon_r101", variant))
    common.set_imagenet(config, "resnet101", augmentation, batch_size=4096)
    common.set_official_linear(config)
    config.epochs = epochs
    return config
