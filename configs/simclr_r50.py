"""SimCLR ResNet-50 on ImageNet, the self-supervised baseline of the official code.

    python main.py --config=configs/simclr_r50.py --config.data.dir=DIR

`:official_2022` is the default, `:official_2020` the first release, 5870c18.
Hardware: 128 TPU cores in the official script.
Time: not measured here. Expected: Table 2 has 70.2 % linear top-1 for SimCLR; whether
these 100 epochs give it is not said there, nor measured here.
Source: google-research/supcon, scripts/simclr_imagenet_resnet50.sh and configs.sh.
Known differences: docs/recipes.md.
"""

from configs import common

VARIANTS = {
    "official_2022": {},
    "official_2020": {
        "projection.hidden_dims": (2048,),
        "loss.scale": common.base_temperature_scale(0.1),
        "optimizer.weight_decay": 1e-6,
    },
}


def get_config(variant: str = ""):
    config = common.get_config()
    changes = common.choose(variant or "official_2022", VARIANTS)
    config.epochs = 100.0
    next_variant = f"simclr_{variant}" if variant else "simclr"
    config.next_config = f"configs/linear_r50.py:{next_variant}"
    common.set_imagenet(config, "resnet50", "sim_augment", batch_size=6144)
    config.projection.hidden_dims = (2048, 2048)
    config.projection.batch_norm = True
    config.loss.name = "simclr"
    config.loss.temperature = 0.1
    config.optimizer.name = "lars"
    config.optimizer.learning_rate = 0.3
    config.optimizer.warmup_epochs = 12.0
    config.optimizer.weight_decay = 1e-4
    config.update_from_flattened_dict(changes)
    return config
