"""SupCon ViT-S/16 on ImageNet, from scratch or from weights of another program.

    python main.py --config=configs/supcon_vit_s.py --config.data.dir=DIR
    python main.py --config=configs/supcon_vit_s.py:imported --config.data.dir=DIR \\
        --config.encoder.init_from=FILE

`:imported` trains the encoder in FILE further, a state dict of timm's
`vit_small_patch16_224` (docs/weights.md): a tenth of the epochs at a tenth of the rate. The
pixels are scaled to [-1, 1], as those weights expect; DeiT's expect ImageNet's statistics
(--config.data.mean, --config.data.std).
Hardware: an accelerator; --config.microbatch_size where 4096 images do not fit.
Time: not measured. Expected: not measured.
Source: optimizer, batch and length of MoCo v3's ViT-S (Chen et al., arXiv 2104.02057,
section 5), augmentation and head of configs/supcon_r50.py:paper, stochastic depth of DeiT
(arXiv 2012.12877, Table 9). That they go together is our assumption.
"""

from configs import common

# variant: epochs, warm-up epochs, learning rate for 256 images
VARIANTS = {"scratch": (300.0, 40.0, 1.5e-4), "imported": (30.0, 4.0, 1.5e-5)}


def get_config(variant: str = ""):
    config = common.get_config()
    epochs, warmup, rate = common.choose(variant or "scratch", VARIANTS)
    config.epochs = epochs
    config.next_config = common.with_variant("configs/linear_vit_s.py", variant)
    common.set_imagenet(config, "vit_small_patch16", "auto_augment", batch_size=4096)
    common.set_official_supcon(config)
    config.loss.scale = "none"
    config.projection.hidden_dims = (2048,)
    config.encoder.stochastic_depth = 0.1
    if variant == "imported":
        config.encoder.init_from = "vit_small_patch16_224.safetensors"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = rate
    config.optimizer.warmup_epochs = warmup
    config.optimizer.weight_decay = 0.1
    config.optimizer.exclude = ("norm", "bias", "token_stem", "positions_stem")
    return config
