"""Evaluation of the classifier of configs/linear_folder.py on any split of your folder.

    python main.py --config=configs/evaluate_folder.py --config.data.root=DIR

`--config.data.eval_split=test` takes the split that nothing was chosen by. Hardware: any.
Time: seconds to minutes. Expected: docs/your_own_data.md.
"""

from configs import common, supcon_folder


def get_config():
    config = common.get_config()
    config.mode = "evaluate"
    config.pretrained = "runs/linear_folder"
    supcon_folder.set_folder(config)
    return config
