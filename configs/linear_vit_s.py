"""Linear evaluation of configs/supcon_vit_s.py, a solution on features of plain images.

    python main.py --config=configs/linear_vit_s.py --config.data.dir=DIR
    python main.py --config=configs/linear_vit_s.py --config.data.dir=DIR \\
        --config.pretrained= --config.encoder.init_from=FILE

The second is the probe of weights as they come from another program (docs/weights.md).
`:imported` evaluates what configs/supcon_vit_s.py:imported has made of them.
Hardware: an accelerator. Time: not measured. Expected: not measured.
Source: ours; docs/evaluation.md.
"""

from configs import common


def get_config(variant: str = ""):
    config = common.get_config()
    known = {"": "supcon_vit_s"} | {
        name: f"supcon_vit_s_{name}" for name in ("scratch", "imported")
    }
    run = common.choose(variant, known)
    common.set_imagenet(config, "vit_small_patch16", "identity", batch_size=256)
    common.set_linear(config, run)
    config.encoder.normalize_embedding = True
    config.probe.solver = "lbfgs"
    return config
