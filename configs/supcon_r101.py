"""SupCon ResNet-101 on ImageNet, the recipe of the paper's official code.

    python main.py --config=configs/supcon_r101.py --config.data.dir=DIR

`:official_2022` is the default, `:official_2020` the revision 3a41fa1, `:paper` has the
MLP head and the augmentation (Stacked RandAugment) of the paper's text.
Hardware: 128 TPU cores in the official script.
Time: not measured here. Expected: 80.2 % linear top-1 (Table 3, where the augmentation
is that of `:paper`), not measured here.
Source: google-research/supcon, scripts/supcon_imagenet_resnet101.sh and configs.sh.
Known differences: docs/recipes.md.
"""

from configs import common

# variant: augmentation, changes
VARIANTS = {
    "official_2022": ("auto_augment", {}),
    "official_2020": (
        "auto_augment",
        {
            "loss.scale": common.base_temperature_scale(0.1),
            "optimizer.learning_rate": 0.3,
        },
    ),
    "paper": ("stacked_rand_augment", {"projection.hidden_dims": (2048,)}),
}


def get_config(variant: str = ""):
    config = common.get_config()
    augmentation, changes = common.choose(variant or "official_2022", VARIANTS)
    config.epochs = 350.0
    config.next_config = common.with_variant("configs/linear_r101.py", variant)
    common.set_imagenet(config, "resnet101", augmentation, batch_size=4096)
    common.set_official_supcon(config)
    config.optimizer.learning_rate = 0.4
    config.optimizer.weight_decay = 1e-4
    config.update_from_flattened_dict(changes)
    return config
