"""Linear evaluation of configs/supcon_queue_r50.py on ImageNet.

    python main.py --config=configs/linear_queue_r50.py --config.data.dir=DIR

The paper does not say how the 79.1 % were evaluated. This is MoCo v2's protocol, our
assumption; both variants, `:batch_256` and `:batch_1024`, name the pretraining's batch.
Hardware: 8 V100 in MoCo.
Time: not measured here. Expected: 79.1 % top-1 (section 4.1) if the assumptions hold,
not measured here.
Source: github.com/facebookresearch/moco, main_lincls.py.
Known differences: the classifier starts from Glorot's initialiser, not N(0, 0.01); those
of the encoder are in docs/recipes.md.
"""

from configs import common

VARIANTS = dict.fromkeys(("batch_256", "batch_1024"))


def get_config(variant: str = ""):
    config = common.get_config()
    common.choose(variant or "batch_256", VARIANTS)
    common.set_linear(config, common.run_name("supcon_queue_r50", variant))
    common.set_moco(config, batch_size=256)
    config.epochs = 100.0
    config.optimizer.learning_rate = 30.0
    config.optimizer.schedule = "piecewise"
    config.optimizer.boundaries_epochs = (60.0, 80.0)
    config.optimizer.decay_rate = 0.1
    config.optimizer.weight_decay = 0.0
    return config
