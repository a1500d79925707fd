"""Cross-entropy ResNet-50 on ImageNet, the supervised baseline of the official code.

    python main.py --config=configs/cross_entropy_r50.py --config.data.dir=DIR
    python main.py --config=configs/cross_entropy_r50.py:cutmix --config.data.dir=DIR

`:official_2022` (default) trains with AutoAugment; `:mixup` and `:cutmix` with crops,
flips and mixtures instead, for the rows of Table 3.
Hardware: 128 TPU cores in the official script.
Time: not measured here. Expected top-1 (Table 3), not measured here: 77.6 %; mixup
77.4 %, cutmix 78.6 %, which the paper cites from CutMix's authors, who trained
300 epochs of batch 256.
Source: google-research/supcon, scripts/cross_entropy_imagenet_resnet50.sh, 2022. Both
alphas are our choice, as the paper gives none: 0.2 of mixup's authors for ImageNet
(arXiv 1710.09412), 1 of CutMix's (arXiv 1905.04899).
Known difference: one view of each image; the official code makes two, takes BatchNorm's
statistics over both and the loss of the first.
"""

from configs import common

# variant: augmentation, changes
VARIANTS = {
    "official_2022": ("auto_augment", {}),
    "mixup": ("identity", {"augment.mixup_alpha": 0.2}),
    "cutmix": ("identity", {"augment.cutmix_alpha": 1.0}),
}


def get_config(variant: str = ""):
    config = common.get_config()
    augmentation, changes = common.choose(variant or "official_2022", VARIANTS)
    config.epochs = 200.0
    common.set_imagenet(config, "resnet50", augmentation, batch_size=6144)
    common.set_official_cross_entropy(config)
    config.update_from_flattened_dict(changes)
    return config
