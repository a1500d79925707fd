"""SupCon ResNet-50 on ImageNet, the recipe of the paper's official code.

    python main.py --config=configs/supcon_r50.py --config.data.dir=DIR
    python main.py --config=configs/supcon_r50.py --config.data.dir=DIR \\
        --config.batch_size=8 --config.total_steps=3        # on a laptop's CPU

`:official_2022` is the default, `:official_2020` the revision 3a41fa1, `:paper` has the
MLP head that the paper's text names first.
Hardware: 128 TPU cores in the official script; batch 8192 is one override.
Time: not measured here. Expected: 78.7 % linear top-1 (Table 3), not measured here.
Source: google-research/supcon, scripts/supcon_imagenet_resnet50.sh and configs.sh.
Known differences: docs/recipes.md.
"""

from configs import common

VARIANTS = {
    "official_2022": {},
    "official_2020": {
        "loss.temperature": 0.07,
        "loss.scale": common.base_temperature_scale(0.07),
        "optimizer.learning_rate": 0.3,
        "optimizer.weight_decay": 1e-4,
    },
    "paper": {"projection.hidden_dims": (2048,)},
}


def get_config(variant: str = ""):
    config = common.get_config()
    changes = common.choose(variant or "official_2022", VARIANTS)
    config.epochs = 350.0
    config.next_config = common.with_variant("configs/linear_r50.py", variant)
    common.set_imagenet(config, "resnet50", "auto_augment", batch_size=6144)
    common.set_official_supcon(config)
    config.optimizer.learning_rate = 0.4
    config.optimizer.weight_decay = 1e-3
    config.update_from_flattened_dict(changes)
    return config
