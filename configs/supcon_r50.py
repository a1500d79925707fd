"""SupCon ResNet-50 on ImageNet, the recipe of the paper's official code.

    python main.py --config=configs/supcon_r50.py --config.data.dir=DIR
    python main.py --config=configs/supcon_r50.py --config.data.dir=DIR \\
        --config.batch_size=8 --config.total_steps=3        # on a laptop's CPU

`:official_2022` is the default, `:official_2020` the revision 3a41fa1, `:paper` has the
MLP head that the paper's text names first, `:paper_v1` the batch (8192), length (700
epochs) and temperature (0.07) of the paper's first version. Its other settings are those
of the default: they were not compared with that version.
Hardware: 128 TPU cores in the official script.
Time: not measured here. Expected: 78.7 % linear top-1 (Table 3), 78.8 % in the first
version; not measured here.
Source: google-research/supcon, scripts/supcon_imagenet_resnet50.sh and configs.sh.
Known differences: docs/recipes.md.
"""

from configs import common

# variant: batch, epochs, changes
VARIANTS = {
    "official_2022": (6144, 350.0, {}),
    "official_2020": (
        6144,
        350.0,
        {
            "loss.temperature": 0.07,
            "loss.scale": common.base_temperature_scale(0.07),
            "optimizer.learning_rate": 0.3,
            "optimizer.weight_decay": 1e-4,
        },
    ),
    "paper": (6144, 350.0, {"projection.hidden_dims": (2048,)}),
    "paper_v1": (8192, 700.0, {"loss.temperature": 0.07}),
}


def get_config(variant: str = ""):
    config = common.get_config()
    batch_size, epochs, changes = common.choose(variant or "official_2022", VARIANTS)
    config.epochs = epochs
    config.next_config = common.with_variant("configs/linear_r50.py", variant)
    common.set_imagenet(config, "resnet50", "auto_augment", batch_size=batch_size)
    common.set_official_supcon(config)
    config.optimizer.learning_rate = 0.4
    config.optimizer.weight_decay = 1e-3
    config.update_from_flattened_dict(changes)
    return config
