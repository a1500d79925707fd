"""A classifier of your own photos on the encoder of configs/supcon_folder.py.

    python main.py --config=configs/linear_folder.py --config.data.root=DIR

The solution on features of plain images, nothing to tune (docs/evaluation.md); it draws
which classes are taken for which. Hardware: any. Time: seconds to minutes, one look at
every photo. `:multilabel` (docs/data.md) trains it by SGD, a sigmoid for each class.
Expected: docs/your_own_data.md.
"""

from configs import common, supcon_folder


def get_config(variant: str = ""):
    config = common.get_config()
    common.set_linear(config, common.run_name("supcon_folder", variant))
    supcon_folder.set_folder(config, variant)
    if variant:
        sgd(config)
    else:
        config.probe.solver = "lbfgs"
        config.next_config = "supcon_jax.tools.predict"
    return config


def sgd(config):
    """Ours: the rate of the digits' probe, falling by a cosine over the encoder's epochs."""
    config.batch_size = 0
    config.epochs = 0.0
    config.log_every = 20
    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 0.05
    config.optimizer.schedule = "cosine"
