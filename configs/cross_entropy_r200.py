"""Cross-entropy ResNet-200 on ImageNet, the supervised baseline of the official code.

    python main.py --config=configs/cross_entropy_r200.py --config.data.dir=DIR

Hardware: 256 TPU cores in the official script.
Time: not measured here. Expected: 80.9 % top-1 (Table 3), not measured here.
Source: google-research/supcon, scripts/cross_entropy_imagenet_resnet200.sh, 2022.
Known difference: one view of each image; the official code makes two, takes BatchNorm's
statistics over both and the loss of the first.
"""

from configs import common


def get_config(variant: str = ""):
    config = common.get_config()
    common.choose(variant or "official_2022", {"official_2022": None})
    config.epochs = 700.0
    common.set_imagenet(config, "resnet200", "stacked_rand_augment", batch_size=4096)
    common.set_official_cross_entropy(config)
    return config
