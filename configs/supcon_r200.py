"""SupCon ResNet-200 on ImageNet, the recipe of the paper's official code.

    python main.py --config=configs/supcon_r200.py --config.data.dir=DIR

`:official_2022` is the default, `:official_2020` the revision 3a41fa1, `:paper` has the
MLP head that the paper's text names first.
Hardware: 256 TPU cores in the official script.
Time: not measured here. Expected: 81.4 % linear top-1 (Table 3), not measured here.
Source: google-research/supcon, scripts/supcon_imagenet_resnet200.sh and configs.sh.
Known differences: docs/recipes.md.
"""

from configs import common

VARIANTS = {
    "official_2022": {},
    "official_2020": {
        "loss.scale": common.base_temperature_scale(0.1),
        "optimizer.learning_rate": 0.3,
    },
    "paper": {"projection.hidden_dims": (2048,)},
}


def get_config(variant: str = ""):
    config = common.get_config()
    changes = common.choose(variant or "official_2022", VARIANTS)
    config.epochs = 700.0
    config.next_config = common.with_variant("configs/linear_r200.py", variant)
    common.set_imagenet(config, "resnet200", "stacked_rand_augment", batch_size=4096)
    common.set_official_supcon(config)
    config.optimizer.learning_rate = 0.2
    config.optimizer.weight_decay = 1e-4
    config.update_from_flattened_dict(changes)
    return config
