"""Linear evaluation of configs/supcon_r50.py and configs/simclr_r50.py on ImageNet.

    python main.py --config=configs/linear_r50.py --config.data.dir=DIR
    python main.py --config=configs/linear_r50.py:simclr --config.data.dir=DIR
    python main.py --config=configs/linear_r50.py --config.data.dir=DIR \\
        --config.batch_size=8 --config.total_steps=3        # on a laptop's CPU

A variant takes the encoder of the pretraining config's variant of that name. Stage 2 of
2020 (3a41fa1) is that of 2022; `:paper` trains for 350 epochs, as Table 8 says;
`:paper_v1` has the batch of its stage 1, 8192, as both stages of the official job share
theirs.
Hardware: 128 TPU cores in the official script.
Time: not measured here. Expected: 78.7 % top-1 (Table 3), SimCLR 70.2 % (Table 2), not
measured here.
Source: google-research/supcon, scripts/supcon_imagenet_resnet50.sh,
simclr_imagenet_resnet50.sh and configs.sh.
Known difference: BatchNorm stays in inference mode; the official job trains both
stages at once and keeps it in training mode.
"""

from configs import common


def supcon(config, batch_size=6144):
    common.set_imagenet(config, "resnet50", "auto_augment", batch_size=batch_size)
    common.set_official_linear(config)


def paper(config):
    supcon(config)
    config.epochs = 350.0


def paper_v1(config):
    supcon(config, batch_size=8192)


def simclr(config):
    common.set_imagenet(config, "resnet50", "sim_augment", batch_size=6144)
    config.epochs = 90.0
    config.classifier.init = "zeros"
    config.loss.label_smoothing = 0.05
    config.optimizer.name = "nesterov"
    config.optimizer.learning_rate = 0.1
    config.optimizer.warmup_epochs = 12.0
    config.optimizer.weight_decay = 1e-6


# variant: pretraining run, recipe
VARIANTS = {
    "": ("supcon_r50", supcon),
    "official_2022": ("supcon_r50_official_2022", supcon),
    "official_2020": ("supcon_r50_official_2020", supcon),
    "paper": ("supcon_r50_paper", paper),
    "paper_v1": ("supcon_r50_paper_v1", paper_v1),
    "simclr": ("simclr_r50", simclr),
    "simclr_official_2022": ("simclr_r50_official_2022", simclr),
    "simclr_official_2020": ("simclr_r50_official_2020", simclr),
}


def get_config(variant: str = ""):
    config = common.get_config()
    pretrained, recipe = common.choose(variant, VARIANTS)
    recipe(config)
    common.set_linear(config, pretrained)
    config.next_config = common.with_variant("configs/evaluate_r50.py", variant)
    return config
