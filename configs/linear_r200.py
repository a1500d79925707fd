"""Linear evaluation of configs/supcon_r200.py on ImageNet.

    python main.py --config=configs/linear_r200.py --config.data.dir=DIR

A variant takes the encoder of the pretraining config's variant of that name. `:paper`
trains for the 350 epochs of Table 8.
Hardware: 256 TPU cores in the official script.
Time: not measured here. Expected: 81.4 % top-1 (Table 3), not measured here.
Source: google-research/supcon, scripts/supcon_imagenet_resnet200.sh and configs.sh.
Known difference: BatchNorm stays in inference mode, see linear_r50.py.
"""

from configs import common

# variant: epochs
VARIANTS = {"official_2022": 90.0, "official_2020": 90.0, "paper": 350.0}


def get_config(variant: str = ""):
    config = common.get_config()
    epochs = common.choose(variant or "official_2022", VARIANTS)
    common.set_linear(config, common.run_name("supcon_r200", variant))
    common.set_imagenet(config, "resnet200", "stacked_rand_augment", batch_size=4096)
    common.set_official_linear(config)
    config.epochs = epochs
    return config
