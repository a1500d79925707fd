"""A classifier of your own photos on the encoder of configs/supcon_folder.py.

    python main.py --config=configs/linear_folder.py --config.data.root=DIR

The solution on features of plain images, nothing to tune (docs/evaluation.md); it draws
which classes are taken for which. Hardware: any. Time: seconds to minutes, one look at
every photo. Expected: docs/your_own_data.md.
"""

from configs import common, supcon_folder


def get_config():
    config = common.get_config()
    common.set_linear(config, "supcon_folder")
    config.probe.solver = "lbfgs"
    config.next_config = "supcon_jax.tools.predict"
    supcon_folder.set_folder(config)
    return config
