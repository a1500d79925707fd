"""SupCon ResNet-50 on ImageNet with a momentum encoder and a queue of labelled keys.

    python main.py --config=configs/supcon_queue_r50.py --config.data.dir=DIR

The paper's 79.1 % (section 4.1) without large batches. Its code was never released, so
this is a reconstruction:
- known from the paper: ResNet-50, 8,192 keys, batch 256, SGD (`:batch_256`, the default);
- known from its authors (SupContrast, issue 120): "most" settings from MoCo v2, but
  8,192 keys, temperature 0.07 and batch 1024 (`:batch_1024`; the two do not agree);
- MoCo v2's, so assumed: decay 0.999, learning rate 0.03 for 256 images, cosine without
  warm-up, weight decay 1e-4 on everything, MLP head with biases, augmentation, mean and
  standard deviation of the pixels;
- unknown: the length (200 epochs is MoCo v2's, our assumption), the scale of the loss
  (1 here), BatchNorm (here over the global batch, where MoCo shuffles the keys between
  GPUs), the linear stage (see linear_queue_r50.py).
The resizing, the max-pool and the initialisers are this program's, not MoCo's:
docs/recipes.md.

Hardware: 8 V100 in the paper.
Time: not measured here. Expected: 79.1 % linear top-1 if the assumptions hold, not
measured here.
Source: Khosla et al., section 4.1; github.com/facebookresearch/moco, main_moco.py.
"""

from configs import common

VARIANTS = {"batch_256": 256, "batch_1024": 1024}


def get_config(variant: str = ""):
    config = common.get_config()
    batch_size = common.choose(variant or "batch_256", VARIANTS)
    config.epochs = 200.0
    config.next_config = common.with_variant("configs/linear_queue_r50.py", variant)
    common.set_moco(config, batch_size=batch_size)
    config.augment.crop_area = (0.2, 1.0)
    common.set_augmentation(config, "sim_augment", strength=0.5)
    config.projection.hidden_dims = (2048,)
    config.projection.bias = True
    config.momentum_encoder.decay = 0.999
    config.momentum_encoder.queue_size = 8192
    config.loss.temperature = 0.07
    config.loss.contrast_mode = "one"
    config.optimizer.learning_rate = 0.03
    config.optimizer.weight_decay = 1e-4
    config.optimizer.exclude = ()
    return config
